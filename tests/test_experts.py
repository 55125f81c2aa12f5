"""Blending: against loops, one-hot, linear, blind to order and to neighbours; what cannot be blended is refused."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings

import pytest
import torch
from contracts import Contract
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import blended_decoder, blended_module, plain_decoder
from strategies import Tensors, batch_shapes, dimensions, num_steps, seeds
from torch import Tensor, nn

from seqdisent import MixtureOfExperts, MixtureOfExpertsConvDecoder

CONTRACTS = {
    "MixtureOfExperts": Contract(
        lambda: MixtureOfExperts(lambda: nn.Linear(3, 2), 4),
        ((3,), (4,)),
        (2,),
        "num_experts=4",
        takes_any=("x",),  # whatever the expert takes
    ),
    "MixtureOfExpertsConvDecoder": Contract(
        lambda: MixtureOfExpertsConvDecoder(2, 4, out_channels=1, image_size=8, channels=(3,)),
        ((2, 2), (4,)),
        (2, 1, 8, 8),
        "latent_dim=2, num_experts=4, out_channels=1, image_size=8, channels=(3,)",
    ),
}

CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # float64; sums are taken in another order
SIZES = st.sampled_from(((8, (3,)), (16, (3, 2))))  # image_size, channels


class Tied(nn.Module):
    """An autoencoder of one matrix, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 3, bias=False)
        self.decode = nn.Linear(3, 3)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))


class WithConstants(nn.Module):
    """A module with buffers that forward only reads; the names hold "_u" and "_v" as those of spectral norm do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("time_unit", torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("scale_v", torch.tensor(0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale_v * self.linear(x * self.time_unit)


class Scaled(nn.Module):
    """A module with a number as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x)


class TwoNames(nn.Module):
    """A module that has one parameter under two names, as long as the banks of some tests."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4))
        self.bias = self.gain

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * torch.tanh(x) + self.bias


EXPERTS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,)),
    "linear on steps": (lambda: nn.Linear(3, 2), (5, 3)),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv1d(3, 1, 1)), (2, 6)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), (3,)),
    "tied": (Tied, (3,)),
    "constant buffers": (WithConstants, (3,)),
    "a number as a parameter": (Scaled, (3,)),
    "one parameter under two names": (TwoNames, (4,)),
}
every_expert = pytest.mark.parametrize(("factory", "example_shape"), EXPERTS.values(), ids=EXPERTS)


def bank_of(mixture: MixtureOfExperts) -> dict[str, Tensor]:
    return {name: bank.detach() for name, bank in mixture.expert.named_parameters()}


def layers_of(decoder: MixtureOfExpertsConvDecoder) -> list[tuple[Tensor, Tensor]]:
    return list(zip(decoder.kernels, decoder.biases, strict=True))


def set_bank(decoder: MixtureOfExpertsConvDecoder, layers: list[tuple[Tensor, Tensor]]) -> MixtureOfExpertsConvDecoder:
    decoder = copy.deepcopy(decoder)
    with torch.no_grad():
        for (kernel, bias), (new_kernel, new_bias) in zip(layers_of(decoder), layers, strict=True):
            kernel.copy_(new_kernel)
            bias.copy_(new_bias)
    return decoder


def small_decoder(tensors: Tensors, num_experts: int, latent_dim: int = 2) -> MixtureOfExpertsConvDecoder:
    return tensors.build(
        lambda: MixtureOfExpertsConvDecoder(latent_dim, num_experts, out_channels=2, image_size=8, channels=(3,))
    )


# The decoder -----------------------------------------------------------------------------------------------------


@settings(max_examples=10)  # the reference loops over pixels
@given(seeds(), SIZES, dimensions(3), dimensions(3), dimensions(3), dimensions(3), dimensions(2))
def test_decoder_equals_the_loop(seed, size, latent_dim, num_experts, out_channels, batch, steps):
    tensors, (image_size, channels) = Tensors(seed), size
    decoder = tensors.build(
        lambda: MixtureOfExpertsConvDecoder(
            latent_dim, num_experts, out_channels=out_channels, image_size=image_size, channels=channels
        )
    )
    # weights off the simplex as well: the blend is linear, whatever they are
    latents, weights = tensors.normal(batch, steps, latent_dim), tensors.normal(batch, num_experts)
    logits = decoder(latents, weights)
    assert logits.shape == (batch, steps, out_channels, image_size, image_size)
    torch.testing.assert_close(logits, blended_decoder(layers_of(decoder), latents, weights), **CLOSE)


@given(seeds(), SIZES, dimensions(4), num_steps(3))
def test_decoder_with_one_hot_weights_is_the_plain_decoder(seed, size, num_experts, steps):
    tensors, (image_size, channels) = Tensors(seed), size
    decoder = tensors.build(
        lambda: MixtureOfExpertsConvDecoder(2, num_experts, image_size=image_size, channels=channels)
    )
    latents = tensors.normal(num_experts, steps, 2)
    logits = decoder(latents, torch.eye(num_experts, dtype=torch.float64))
    for k in range(num_experts):
        plain = plain_decoder([kernel[k] for kernel in decoder.kernels], [bias[k] for bias in decoder.biases])
        torch.testing.assert_close(logits[k], plain(latents[k][..., None, None]), **CLOSE)


@given(seeds(), dimensions(5), num_steps(3))
def test_decoder_sees_only_the_blend_which_is_linear_in_the_bank(seed, num_experts, steps):
    tensors = Tensors(seed)
    decoder, plain = small_decoder(tensors, num_experts), small_decoder(tensors, 1)
    latents, weights = tensors.normal(1, steps, 2), tensors.normal(1, num_experts)
    average = [
        (torch.tensordot(weights, kernel, 1), torch.tensordot(weights, bias, 1)) for kernel, bias in layers_of(decoder)
    ]
    expected = set_bank(plain, average)(latents, torch.ones(1, 1, dtype=torch.float64))
    torch.testing.assert_close(decoder(latents, weights), expected, **CLOSE)


@given(seeds(), dimensions(5), dimensions(3))
def test_decoder_is_blind_to_the_order_of_experts(seed, num_experts, batch):
    tensors = Tensors(seed)
    decoder = small_decoder(tensors, num_experts)
    latents, weights = tensors.normal(batch, 2, 2), tensors.simplex(batch, num_experts)
    order = torch.randperm(num_experts, generator=tensors.generator)
    permuted = set_bank(decoder, [(kernel[order], bias[order]) for kernel, bias in layers_of(decoder)])
    torch.testing.assert_close(permuted(latents, weights[:, order]), decoder(latents, weights), **CLOSE)


@given(seeds(), st.integers(2, 4), dimensions(3))
def test_decoder_row_does_not_see_its_neighbours(seed, batch, num_experts):
    tensors = Tensors(seed)
    decoder = small_decoder(tensors, num_experts)
    latents = tensors.normal(batch, 2, 2).requires_grad_()
    weights = tensors.simplex(batch, num_experts).requires_grad_()
    logits = decoder(latents, weights)
    others_changed = decoder(
        torch.cat([latents[:1], tensors.normal(batch - 1, 2, 2)]),
        torch.cat([weights[:1], tensors.simplex(batch - 1, num_experts)]),
    )
    torch.testing.assert_close(logits[0], others_changed[0], rtol=1e-12, atol=1e-12)
    for gradient in torch.autograd.grad(logits[0].square().sum(), [latents, weights]):
        assert gradient[0].abs().sum() > 0
        assert (gradient[1:] == 0).all()


@given(seeds(), num_steps(4))
def test_decoder_frame_does_not_see_other_frames(seed, steps):
    tensors = Tensors(seed)
    decoder = small_decoder(tensors, 3)
    latents, weights = tensors.normal(1, steps, 2), tensors.simplex(1, 3)
    one_by_one = torch.cat([decoder(latents[:, t : t + 1], weights) for t in range(steps)], 1)
    torch.testing.assert_close(decoder(latents, weights), one_by_one, **CLOSE)


@given(seeds(), batch_shapes())
def test_decoder_takes_any_batch_shape(seed, batch_shape):
    tensors = Tensors(seed)
    decoder = small_decoder(tensors, 3)
    latents, weights = tensors.normal(*batch_shape, 2, 2), tensors.simplex(*batch_shape, 3)
    logits = decoder(latents, weights)
    assert logits.shape == (*batch_shape, 2, 2, 8, 8)
    flat = decoder(latents.reshape(-1, 2, 2), weights.reshape(-1, 3))
    torch.testing.assert_close(logits, flat.reshape(logits.shape), **CLOSE)


def test_every_bank_parameter_leads_with_the_experts_and_each_expert_gets_a_gradient():
    tensors = Tensors(0)
    decoder = small_decoder(tensors, 5)
    decoder(tensors.normal(3, 2, 2), tensors.simplex(3, 5)).square().sum().backward()
    assert len(list(decoder.parameters())) == 4
    for parameter in decoder.parameters():
        assert parameter.shape[0] == 5
        assert (parameter.grad.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("num_experts", [1, 8, 40])
def test_decoder_starts_with_logits_of_order_one_at_uniform_weights(num_experts):
    # He: the logits' variance over latents is about 1 where a pixel sees all its 2x2 inputs, less at the border. Over
    # 30 seeds it came to 1.00 with a standard deviation of 0.03 for each K, so the bounds are ten of them away.
    # The average of K independent decoders gives 0.12 for 8 experts and 0.02 for 40.
    tensors = Tensors(1, torch.float32)
    torch.manual_seed(1)
    decoder = MixtureOfExpertsConvDecoder(16, num_experts, image_size=8, channels=(64,))
    logits = decoder(tensors.normal(2, 64, 16), torch.full((2, num_experts), 1 / num_experts))
    assert 0.7 < logits.std((0, 1)).mean() < 1.3
    assert all((bias == 0).all() for bias in decoder.biases)


def test_one_decoder_starts_with_the_deviation_that_he_et_al_give_it():
    """Each kernel's deviation is sqrt(2 / (1 + slope^2) / inputs of a pixel), within 4 standard errors."""
    torch.manual_seed(0)
    decoder = MixtureOfExpertsConvDecoder(48, 1, image_size=16, channels=(40, 32))
    for kernel, inputs in zip(decoder.kernels, (48, 40 * 4, 32 * 4), strict=True):
        ratio = kernel.std() / math.sqrt(2 / (1 + 0.01**2) / inputs)
        assert abs(ratio - 1) < 4 / math.sqrt(2 * kernel.numel())


@pytest.mark.parametrize("image_size", [8, 16, 32, 64, 128])
def test_default_channels_halve_from_512(image_size):
    with torch.device("meta"):
        decoder = MixtureOfExpertsConvDecoder(2, 1, image_size=image_size)
        logits = decoder(torch.zeros(1, 2, 2), torch.ones(1, 1))
    assert logits.shape == (1, 2, 3, image_size, image_size)
    assert decoder.channels == tuple(512 // 2**i for i in range(int(math.log2(image_size)) - 2))
    assert f"latent_dim=2, num_experts=1, out_channels=3, image_size={image_size}, channels=" in repr(decoder)


def test_default_channels_at_64_pixels_are_the_papers():
    with torch.device("meta"):
        assert MixtureOfExpertsConvDecoder(2, 1).channels == (512, 256, 128, 64)


@pytest.mark.parametrize("image_size", [48, 0, -8, 4, 1, 65, 64.0, (64, 32), True, None])
def test_decoder_refuses_other_image_sizes(image_size):
    wanted = (
        f"image_size: got {image_size!r}, expected one integer 4 * 2**n for square images (8, 16, 32, 64, 128, ...)"
    )
    with pytest.raises(ValueError, match=re.escape(wanted)):
        MixtureOfExpertsConvDecoder(2, 2, image_size=image_size)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((2, 2), {"image_size": 16, "channels": (4,)}, r"channels: got 1 values \(4,\), expected 2 for image_size=16"),
        ((2, 2), {"image_size": 8, "channels": (4, 4)}, r"expected 1 for image_size=8 \(4 \* 2\*\*1 pixels\)"),
        ((2, 2), {"image_size": 16, "channels": (4, 0)}, r"channels\[1\]: got 0, expected an integer >= 1"),
        ((0, 2), {}, "latent_dim: got 0"),
        ((2, 0), {}, "num_experts: got 0"),
        ((2, True), {}, "num_experts: got True"),
        ((2, 1.5), {}, "num_experts: got 1.5"),
        ((2, 2), {"out_channels": -1}, "out_channels: got -1"),
    ],
)
def test_decoder_refuses_sizes(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfExpertsConvDecoder(*arguments, **options)


@pytest.mark.parametrize(
    ("latents", "weights", "message"),
    [
        ((2, 3, 5), (2, 4), "latents: last dimension is 5, expected latent_dim=2"),
        ((2,), (4,), r"latents: has shape \(2,\), expected at least 2 dimensions"),
        ((2, 3, 2), (2, 5), "weights: last dimension is 5, expected num_experts=4"),
        ((2, 3, 2), (), r"weights: has shape \(\), expected at least 1"),
        ((2, 3, 2), (1, 4), r"weights: has batch shape \(1,\), expected that of latents, \(2,\)"),
        ((2, 3, 2), (2, 3, 4), r"weights: has batch shape \(2, 3\), expected that of latents, \(2,\)"),
        ((2, 0, 2), (2, 4), "latents: has length 0"),
        ((0, 3, 2), (0, 4), r"latents: has batch shape \(0,\), expected at least one sequence"),
        ((2, 0, 3, 2), (2, 0, 4), r"latents: has batch shape \(2, 0\), expected at least one sequence"),
    ],
)
def test_decoder_refuses_inputs(latents, weights, message):
    decoder = MixtureOfExpertsConvDecoder(2, 4, image_size=8, channels=(2,))
    with pytest.raises(ValueError, match=message):
        decoder(torch.zeros(latents), torch.zeros(weights))


# Any module as an expert -----------------------------------------------------------------------------------------


@every_expert
@settings(max_examples=5)  # for each of the experts
@given(seed=seeds(), num_experts=dimensions(4), batch=dimensions(3))
def test_mixture_equals_the_loop(factory, example_shape, seed, num_experts, batch):
    tensors = Tensors(seed)
    mixture = tensors.build(lambda: MixtureOfExperts(factory, num_experts))
    x, weights = tensors.normal(batch, *example_shape), tensors.normal(batch, num_experts)
    expected = blended_module(factory().to(torch.float64), bank_of(mixture), x, weights)
    torch.testing.assert_close(mixture(x, weights), expected, **CLOSE)


@every_expert
def test_one_expert_is_the_plain_module(factory, example_shape):
    torch.manual_seed(3)
    mixture = MixtureOfExperts(factory, 1).double()
    torch.manual_seed(3)
    plain = factory().double()
    x = Tensors(0).normal(2, *example_shape)
    expected = torch.stack([plain(row) for row in x])
    torch.testing.assert_close(mixture(x, torch.ones(2, 1, dtype=torch.float64)), expected, **CLOSE)


@every_expert
def test_one_hot_weights_pick_one_expert_of_the_bank(factory, example_shape):
    tensors = Tensors(0)
    mixture = tensors.build(lambda: MixtureOfExperts(factory, 3))
    x = tensors.normal(*example_shape).expand(3, *example_shape)
    outputs = mixture(x, torch.eye(3, dtype=torch.float64))
    for k in range(3):
        plain = factory().double()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(bank_of(mixture)[name][k])
        torch.testing.assert_close(outputs[k], plain(x[k]), **CLOSE)


@given(seeds(), dimensions(4), st.floats(-2, 2), st.floats(-2, 2))
def test_mixture_of_linear_experts_is_linear_in_the_bank(seed, num_experts, a, b):
    tensors = Tensors(seed)
    first, second = (tensors.build(lambda: MixtureOfExperts(lambda: nn.Linear(3, 2), num_experts)) for _ in range(2))
    both = copy.deepcopy(first)
    with torch.no_grad():
        for parameter, one, two in zip(both.parameters(), first.parameters(), second.parameters(), strict=True):
            parameter.copy_(a * one + b * two)
    x, weights = tensors.normal(2, 3), tensors.simplex(2, num_experts)
    torch.testing.assert_close(both(x, weights), a * first(x, weights) + b * second(x, weights), **CLOSE)


@every_expert
def test_mixture_is_blind_to_the_order_of_experts(factory, example_shape):
    tensors = Tensors(0)
    mixture = tensors.build(lambda: MixtureOfExperts(factory, 4))
    permuted, order = copy.deepcopy(mixture), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for parameter in permuted.parameters():
            parameter.copy_(parameter[order].clone())
    x, weights = tensors.normal(3, *example_shape), tensors.simplex(3, 4)
    torch.testing.assert_close(permuted(x, weights[:, order]), mixture(x, weights), **CLOSE)


@every_expert
def test_mixture_row_does_not_see_its_neighbours(factory, example_shape):
    tensors = Tensors(0)
    mixture = tensors.build(lambda: MixtureOfExperts(factory, 2))
    x, weights = tensors.normal(3, *example_shape).requires_grad_(), tensors.simplex(3, 2).requires_grad_()
    output = mixture(x, weights)
    changed = mixture(
        torch.cat([x[:1], tensors.normal(2, *example_shape)]), torch.cat([weights[:1], tensors.simplex(2, 2)])
    )
    torch.testing.assert_close(output[0], changed[0], rtol=1e-12, atol=1e-12)
    for gradient in torch.autograd.grad(output[0].square().sum(), [x, weights]):
        assert gradient[0].abs().sum() > 0
        assert (gradient[1:] == 0).all()


@every_expert
@pytest.mark.parametrize("batch_shape", [(), (2,), (2, 3), (1, 2, 1)])
def test_mixture_takes_any_batch_shape(factory, example_shape, batch_shape):
    tensors = Tensors(0)
    mixture = tensors.build(lambda: MixtureOfExperts(factory, 2))
    x, weights = tensors.normal(*batch_shape, *example_shape), tensors.simplex(*batch_shape, 2)
    output, flat = mixture(x, weights), mixture(x.reshape(-1, *example_shape), weights.reshape(-1, 2))
    assert output.shape == (*batch_shape, *flat.shape[1:])
    torch.testing.assert_close(output, flat.reshape(output.shape), **CLOSE)


@every_expert
def test_every_parameter_of_a_mixture_leads_with_the_experts_and_gets_a_gradient(factory, example_shape):
    tensors = Tensors(0)
    mixture = tensors.build(lambda: MixtureOfExperts(factory, 3))
    mixture(tensors.normal(4, *example_shape), tensors.simplex(4, 3)).pow(3).sum().backward()
    assert {name for name, _ in mixture.expert.named_parameters()} == {name for name, _ in factory().named_parameters()}
    for parameter in mixture.parameters():
        assert parameter.shape[0] == 3
        assert (parameter.grad.reshape(3, -1).norm(dim=1) > 0).all()


def test_tied_parameters_stay_tied():
    mixture = MixtureOfExperts(Tied, 3)
    for module in (mixture, copy.deepcopy(mixture), pickle.loads(pickle.dumps(mixture))):  # noqa: S301 - our own
        assert module.expert.encode.weight is module.expert.decode.weight
        assert len(list(module.parameters())) == 2


def test_a_parameter_under_two_names_is_one_bank():
    mixture = MixtureOfExperts(TwoNames, 3)
    assert mixture.expert.gain is mixture.expert.bias
    assert mixture.expert.gain.shape == (3, 4)


def test_frozen_parameters_stay_frozen():
    def expert() -> nn.Module:
        layer = nn.Linear(2, 2)
        layer.bias.requires_grad_(False)
        return layer

    mixture = MixtureOfExperts(expert, 3)
    assert mixture.expert.weight.requires_grad
    assert not mixture.expert.bias.requires_grad


@pytest.mark.parametrize("num_experts", [1, 8, 40])
def test_uniform_average_of_the_bank_has_the_spread_of_one_expert(num_experts):
    # nn.Linear(64, .) draws uniformly from [-1/8, 1/8]: standard deviation 1 / (8 sqrt 3). 4,096 weights: the standard
    # error of a standard deviation is at most 1 / sqrt(2 * 4096) = 1.1 %, so 5 % is four of them; without sqrt(K) it
    # would be 0.16 of it for 40 experts
    torch.manual_seed(0)
    mixture = MixtureOfExperts(lambda: nn.Linear(64, 64), num_experts)
    spread = mixture.expert.weight.detach().mean(0).std().item()
    assert spread * 8 * math.sqrt(3) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("num_experts", [2, 8, 40])
def test_experts_differ_from_their_average_by_the_stated_share(num_experts):
    # deviations of 0.3 sqrt(K - 1) times the average's own; at least 4,096 weights of each, so that the ratio has a
    # standard error of at most sqrt(2) / sqrt(2 * 4096) = 1.6 %, and 6 % is four of them
    torch.manual_seed(0)
    mixture = MixtureOfExperts(lambda: nn.Linear(64, 64), num_experts)
    decoder = MixtureOfExpertsConvDecoder(16, num_experts, image_size=8, channels=(64,))
    for bank in (mixture.expert.weight.detach(), decoder.kernels[0].detach()):
        average = bank.mean(0)
        ratio = ((bank - average).square().mean() / average.square().mean()).sqrt().item()
        assert ratio == pytest.approx(0.3 * math.sqrt(num_experts - 1), rel=0.06)


def test_the_bank_is_what_was_drawn_nearer_to_its_average_and_scaled():
    drawn = [nn.Linear(3, 2) for _ in range(4)]
    mixture = MixtureOfExperts(iter(drawn).__next__, 4)
    average = sum(expert.weight for expert in drawn) / 4
    for bank, expert in zip(mixture.expert.weight, drawn, strict=True):
        torch.testing.assert_close(bank, 2 * (0.7 * average + 0.3 * expert.weight))


def test_the_factorys_own_module_is_left_alone():
    shared = nn.Linear(3, 2)
    before = copy.deepcopy(shared.state_dict())
    mixture = MixtureOfExperts(lambda: shared, 2)
    assert shared.weight is not mixture.expert.weight
    for name, tensor in shared.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_parameters_that_are_no_draws_are_not_scaled():
    mixture = MixtureOfExperts(lambda: nn.LayerNorm(3), 4)
    assert (mixture.expert.weight == 1).all()
    assert (mixture.expert.bias == 0).all()


def test_dropout_inside_an_expert_differs_between_rows_and_stops_in_eval():
    mixture = MixtureOfExperts(lambda: nn.Sequential(nn.Linear(3, 200), nn.Dropout(0.5)), 2)
    x, weights = torch.ones(2, 3), torch.full((2, 2), 0.5)
    first, second = mixture(x, weights)
    dropped = torch.stack([first, second]) == 0
    # each of 2 x 200 units is dropped with probability 1/2: 40 is four standard deviations of the count
    assert abs(dropped.sum().item() - 200) <= 40
    assert (dropped[0] != dropped[1]).any()
    first, second = mixture.eval()(x, weights)
    assert torch.equal(first, second)
    assert not (first == 0).any()


def _named(expert: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"part": expert}))


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        (lambda: nn.BatchNorm1d(3), r"BatchNorm1d\) cannot be blended: it writes running statistics .* use LayerNorm"),
        (lambda: nn.InstanceNorm1d(3, track_running_stats=True), r"InstanceNorm1d\) cannot be blended: .*statistics"),
        (lambda: nn.LSTM(3, 3), r"LSTM\) cannot be blended: fused recurrent networks"),
        (lambda: nn.GRU(3, 3), r"GRU\) cannot be blended: fused recurrent networks"),
        (lambda: nn.utils.spectral_norm(nn.Linear(3, 3)), r"Linear\) cannot be blended: its weights are computed"),
        (lambda: nn.utils.weight_norm(nn.Linear(3, 3)), r"Linear\) cannot be blended: its weights are computed"),
        (
            lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
            r"ParametrizedLinear\) cannot be blended: its weights are computed",
        ),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
            r"ParametrizedLinear\) cannot be blended: its weights are computed",
        ),
        (lambda: nn.LazyLinear(3), r"LazyLinear\) cannot be blended: its parameters have no sizes yet"),
    ],
    ids=["batch norm", "instance norm", "lstm", "gru", "spectral", "weight", "new spectral", "new weight", "lazy"],
)
def test_modules_that_cannot_be_blended_are_refused_by_name(expert, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the old norms and lazy modules warn
        with pytest.raises(ValueError, match=r"expert: the module itself \(" + message):
            MixtureOfExperts(expert, 2)
        with pytest.raises(ValueError, match=r"expert: 1\.part \(" + message):
            MixtureOfExperts(lambda: _named(expert()), 2)


def test_an_unblendable_expert_is_refused_even_when_it_is_not_the_first():
    experts = iter([nn.Linear(3, 3), nn.LSTM(3, 3)])
    with pytest.raises(ValueError, match="LSTM"):
        MixtureOfExperts(lambda: next(experts), 2)


class Drawn(nn.Module):
    """A module with buffers, of which one may be drawn."""

    def __init__(self, buffer: Tensor) -> None:
        super().__init__()
        self.register_buffer("unit", torch.ones(2))
        self.part = nn.Linear(2, 2)
        self.part.register_buffer("w", buffer)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x * self.unit) * self.part.w


@pytest.mark.parametrize("second", [torch.tensor([1.0, 3.0]), torch.ones(3), None], ids=["value", "shape", "none"])
def test_a_buffer_that_differs_between_experts_is_refused_by_name(second):
    buffers = iter([torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), second])
    with pytest.raises(ValueError, match=r"expert: buffer part\.w differs between experts, expected the same in all"):
        MixtureOfExperts(lambda: Drawn(next(buffers)), 3)
    MixtureOfExperts(lambda: Drawn(torch.tensor([1.0, 2.0])), 3)


def test_norms_without_running_statistics_are_taken():
    mixture = MixtureOfExperts(lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4)), 2)
    assert mixture(torch.randn(3, 1, 2, 5), torch.full((3, 2), 0.5)).shape == (3, 1, 4, 5)


@pytest.mark.parametrize(
    ("expert", "error", "message"),
    [
        (nn.Linear(3, 2), TypeError, "expert: expected a function that returns a new module"),
        ("linear", TypeError, "expert: expected a function that returns a new module"),
        (lambda: torch.zeros(3), TypeError, "expert: returned Tensor, expected a torch.nn.Module"),
        (nn.ReLU, ValueError, "expert: has no parameters to blend"),
        (
            lambda: nn.ParameterDict({"count": nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)}),
            ValueError,
            "expert: parameter count is torch.int64, expected floating point",
        ),
    ],
    ids=["instance", "string", "no module", "no parameters", "integers"],
)
def test_what_is_no_factory_of_experts_is_refused(expert, error, message):
    with pytest.raises(error, match=message):
        MixtureOfExperts(expert, 2)


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [
        ((2, 3), (2, 5), "weights: last dimension is 5, expected num_experts=4"),
        ((2, 3), (), r"weights: has shape \(\), expected at least 1"),
        ((3, 3), (2, 4), r"x: has batch shape \(3,\), expected that of weights, \(2,\)"),
        ((1, 3), (2, 4), r"x: has batch shape \(1,\), expected that of weights, \(2,\)"),
        ((3,), (2, 3, 4), r"x: has batch shape \(3,\), expected that of weights, \(2, 3\)"),
    ],
)
def test_mixture_refuses_inputs(x, weights, message):
    mixture = MixtureOfExperts(lambda: nn.Linear(3, 2), 4)
    with pytest.raises(ValueError, match=message):
        mixture(torch.zeros(x), torch.zeros(weights))


@pytest.mark.parametrize("named", ["x", "weights"])
def test_mixture_names_the_input_of_another_dtype(named):
    inputs = {"x": torch.zeros(2, 3), "weights": torch.zeros(2, 4)}
    inputs[named] = inputs[named].double()
    with pytest.raises(TypeError, match=f"^{named}: has dtype torch.float64, expected torch.float32"):
        MixtureOfExperts(lambda: nn.Linear(3, 2), 4)(**inputs)


@pytest.mark.parametrize("named", ["latents", "weights"])
def test_decoder_names_the_input_of_another_dtype(named):
    inputs = {"latents": torch.zeros(2, 3, 2), "weights": torch.zeros(2, 4)}
    inputs[named] = inputs[named].double()
    with pytest.raises(TypeError, match=f"^{named}: has dtype torch.float64, expected torch.float32"):
        MixtureOfExpertsConvDecoder(2, 4, image_size=8, channels=(3,))(**inputs)


def test_an_expert_may_read_integers():
    mixture = MixtureOfExperts(lambda: nn.Embedding(5, 2), 3)
    weights = torch.randn(2, 3).softmax(-1)
    rows = torch.tensor([4, 1])
    blended = [sum(w * table[row] for w, table in zip(ws, mixture.expert.weight, strict=True))
               for ws, row in zip(weights, rows, strict=True)]  # fmt: skip
    torch.testing.assert_close(mixture(rows, weights), torch.stack(blended))


@pytest.mark.parametrize("num_experts", [0, -1, 2.0, True])
def test_mixture_refuses_a_bank_of_no_experts(num_experts):
    with pytest.raises(ValueError, match=f"num_experts: got {num_experts}, expected an integer >= 1"):
        MixtureOfExperts(lambda: nn.Linear(3, 2), num_experts)


def test_float32_logits_under_autocast():
    decoder = MixtureOfExpertsConvDecoder(2, 3, image_size=8, channels=(4,))
    latents, weights = torch.randn(2, 2, 2), torch.full((2, 3), 1 / 3)
    with torch.autocast("cpu", torch.bfloat16):
        logits = decoder(latents, weights)
    assert logits.dtype == torch.float32
    # bfloat16 has 8 bits: a relative error of 0.4 % an operation, on logits of order 1
    torch.testing.assert_close(logits, decoder(latents, weights), rtol=0, atol=0.1)
