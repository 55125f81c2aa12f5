"""The decoders: against loops, one-hot, linear in the bank, blind to order and to neighbours; what they refuse."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from contracts import Contract
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import blended_decoder, plain_decoder
from strategies import Tensors, batch_shapes, dimensions, num_steps, seeds
from torch import Tensor

from seqdisent import ConvDecoder, MixtureOfExpertsConvDecoder

CONTRACTS = {
    "ConvDecoder": Contract(
        lambda: ConvDecoder(2, out_channels=1, image_size=8, channels=(3,)), ((2,),), (1, 8, 8), "ConvTranspose2d(3, 1"
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


# Any module as an expert -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("num_experts", [2, 8, 40])
def test_experts_differ_from_their_average_by_the_stated_share(num_experts):
    # deviations of 0.3 sqrt(K - 1) times the average's own; 16,384 weights, so that the ratio has a standard error of
    # sqrt(2) / sqrt(2 * 16384) = 0.8 %, and 4 % is five of them
    torch.manual_seed(0)
    bank = MixtureOfExpertsConvDecoder(16, num_experts, image_size=8, channels=(64,)).kernels[0].detach()
    average = bank.mean(0)
    ratio = ((bank - average).square().mean() / average.square().mean()).sqrt().item()
    assert ratio == pytest.approx(0.3 * math.sqrt(num_experts - 1), rel=0.04)


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
    with pytest.raises(ValueError, match="^image_size: "):
        MixtureOfExpertsConvDecoder(2, 2, image_size=image_size)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((2, 2), {"image_size": 16, "channels": (4,)}, "^channels: "),
        ((2, 2), {"image_size": 8, "channels": (4, 4)}, "^channels: "),
        ((2, 2), {"image_size": 16, "channels": (4, 0)}, r"^channels\[1\]: "),
        ((0, 2), {}, "^latent_dim: "),
        ((2, 0), {}, "^num_experts: "),
        ((2, True), {}, "^num_experts: "),
        ((2, 1.5), {}, "^num_experts: "),
        ((2, 2), {"out_channels": -1}, "^out_channels: "),
    ],
)
def test_decoder_refuses_sizes(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfExpertsConvDecoder(*arguments, **options)


@pytest.mark.parametrize(
    ("latents", "weights", "message"),
    [
        ((2, 3, 5), (2, 4), "^latents: .*5"),
        ((2,), (4,), r"^latents: .*\(2,\)"),
        ((2, 3, 2), (2, 5), "^weights: .*5"),
        ((2, 3, 2), (), r"^weights: .*\(\)"),
        ((2, 3, 2), (1, 4), r"^weights: .*\(1,\)"),
        ((2, 3, 2), (2, 3, 4), r"^weights: .*\(2, 3\)"),
        ((2, 0, 2), (2, 4), "^latents: .*length 0"),
        ((0, 3, 2), (0, 4), r"^latents: .*\(0,\)"),
        ((2, 0, 3, 2), (2, 0, 4), r"^latents: .*\(2, 0\)"),
    ],
)
def test_decoder_refuses_inputs(latents, weights, message):
    decoder = MixtureOfExpertsConvDecoder(2, 4, image_size=8, channels=(2,))
    with pytest.raises(ValueError, match=message):
        decoder(torch.zeros(latents), torch.zeros(weights))


@pytest.mark.parametrize("named", ["latents", "weights"])
def test_decoder_names_the_input_of_another_dtype(named):
    inputs = {"latents": torch.zeros(2, 3, 2), "weights": torch.zeros(2, 4)}
    inputs[named] = inputs[named].double()
    with pytest.raises(TypeError, match=f"^{named}: "):
        MixtureOfExpertsConvDecoder(2, 4, image_size=8, channels=(3,))(**inputs)


def test_float32_logits_under_autocast():
    decoder = MixtureOfExpertsConvDecoder(2, 3, image_size=8, channels=(4,))
    latents, weights = torch.randn(2, 2, 2), torch.full((2, 3), 1 / 3)
    with torch.autocast("cpu", torch.bfloat16):
        logits = decoder(latents, weights)
    assert logits.dtype == torch.float32
    # bfloat16 has 8 bits: a relative error of 0.4 % an operation, on logits of order 1
    torch.testing.assert_close(logits, decoder(latents, weights), rtol=0, atol=0.1)


# One decoder for all sequences -----------------------------------------------------------------------------------


@given(seeds(), SIZES, dimensions(3), dimensions(3), batch_shapes())
def test_plain_decoder_is_one_expert_of_the_bank(seed, size, latent_dim, out_channels, batch_shape):
    tensors, (image_size, channels) = Tensors(seed), size
    options = {"out_channels": out_channels, "image_size": image_size, "channels": channels}
    plain = tensors.build(lambda: ConvDecoder(latent_dim, **options))
    parameters = list(plain.parameters())
    bank = MixtureOfExpertsConvDecoder(latent_dim, 1, **options).double()
    bank = set_bank(bank, [(kernel[None], bias[None]) for kernel, bias in zip(*[iter(parameters)] * 2, strict=True)])
    latents, weights = tensors.normal(*batch_shape, 2, latent_dim), tensors.simplex(*batch_shape, 1)
    logits = plain(latents)
    assert logits.shape == (*batch_shape, 2, out_channels, image_size, image_size)
    torch.testing.assert_close(logits, bank(latents, weights), **CLOSE)
    torch.testing.assert_close(logits[..., 0, :, :, :], plain(latents[..., 0, :]), **CLOSE)  # without time


def test_plain_decoder_starts_with_the_deviation_that_he_et_al_give_it():
    """Each kernel's deviation is sqrt(2 / (1 + slope^2) / inputs of a pixel), within 4 standard errors."""
    torch.manual_seed(0)
    decoder = ConvDecoder(48, image_size=16, channels=(40, 32))
    kernels, biases = list(decoder.parameters())[::2], list(decoder.parameters())[1::2]
    for kernel, inputs in zip(kernels, (48, 40 * 4, 32 * 4), strict=True):
        ratio = kernel.std() / math.sqrt(2 / (1 + 0.01**2) / inputs)
        assert abs(ratio - 1) < 4 / math.sqrt(2 * kernel.numel())
    assert all((bias == 0).all() for bias in biases)


def test_plain_decoder_has_the_banks_default_channels():
    with torch.device("meta"):
        plain, bank = ConvDecoder(2), MixtureOfExpertsConvDecoder(2, 1)
    assert [tuple(kernel[0].shape) for kernel in bank.kernels] == [
        tuple(p.shape) for p in list(plain.parameters())[::2]
    ]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0,), {}, "^latent_dim: "),
        ((2,), {"out_channels": True}, "^out_channels: "),
        ((2,), {"image_size": 48}, "^image_size: "),
        ((2,), {"image_size": 8, "channels": (4, 4)}, "^channels: "),
    ],
)
def test_plain_decoder_refuses_sizes(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ConvDecoder(*arguments, **options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((), r"^latents: .*\(\)"),
        ((2, 5), "^latents: "),
        ((0, 2), r"^latents: .*\(0,\)"),
        ((3, 0, 2), r"^latents: .*\(3, 0\)"),
    ],
)
def test_plain_decoder_refuses_latents(shape, message):
    with pytest.raises(ValueError, match=message):
        ConvDecoder(2, image_size=8, channels=(2,))(torch.zeros(shape))


def test_plain_decoder_names_latents_of_another_dtype_or_device():
    decoder = ConvDecoder(2, image_size=8, channels=(2,))
    with pytest.raises(TypeError, match="^latents: "):
        decoder(torch.zeros(1, 2).double())
    with pytest.raises(ValueError, match="^latents: "):
        decoder(torch.zeros(1, 2, device="meta"))


def test_plain_decoder_gives_float32_logits_under_autocast():
    decoder = ConvDecoder(2, image_size=8, channels=(4,))
    latents = torch.randn(2, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = decoder(latents)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, decoder(latents), rtol=0, atol=0.1)


def test_the_plain_decoder_starts_as_a_bank_of_one_at_the_same_seed():
    torch.manual_seed(0)
    plain = ConvDecoder(5, image_size=16, channels=(8, 4))
    torch.manual_seed(0)
    bank = MixtureOfExpertsConvDecoder(5, 1, image_size=16, channels=(8, 4))
    for layer, kernel in zip(plain.layers[::2], bank.kernels, strict=True):
        assert torch.equal(layer.weight, kernel[0])
