"""Encoders: against loops over unpadded sequences; padding changes no value and no gradient."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from contracts import Contract
from half_precision import needs_lstm
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import affine, final_states, leaky_relu, masked_average, softplus, unrolled
from strategies import Tensors, batch_shapes, dimensions, lengths, mask_of, masks, num_steps, padding, seeds
from torch import Tensor, nn
from torch.nn import functional as F

from seqdisent import ConvEncoder, Seq2SeqDynamicsEncoder, StaticEncoder

CONTRACTS = {
    "ConvEncoder": Contract(
        lambda: ConvEncoder(4, in_channels=1, image_size=8, channels=(3,)), ((1, 8, 8),), (4,), "Conv2d(1, 3"
    ),
    "StaticEncoder": Contract(
        lambda: StaticEncoder(3, 2, hidden_dim=4), ((5, 3),), (2,), "in_features=4, out_features=2"
    ),
    "Seq2SeqDynamicsEncoder": Contract(
        lambda: Seq2SeqDynamicsEncoder(3, 2, hidden_dim=4, num_layers=2),
        ((5, 3),),
        (2,),
        "LSTM(3, 4, num_layers=2",
        other_calls=lambda module, inputs: [module.unroll(module(*inputs).mean, 2)],
    ),
}

CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # float64; sums are taken in another order


def average_pool(channels: int) -> nn.Module:
    return nn.AvgPool2d(2, ceil_mode=True)


def conv_encoder() -> ConvEncoder:
    return ConvEncoder(4, image_size=8, channels=(3,))


def static_encoder() -> StaticEncoder:
    return StaticEncoder(3, 2, hidden_dim=4)


def dynamics_encoder() -> Seq2SeqDynamicsEncoder:
    return Seq2SeqDynamicsEncoder(3, 2, hidden_dim=4, num_layers=2)


both_sequence_encoders = pytest.mark.parametrize("build", [static_encoder, dynamics_encoder])


# Frames ----------------------------------------------------------------------------------------------------------


@given(seeds(), batch_shapes(), st.sampled_from(((8, (2,)), (16, (2, 3)))), dimensions(3))
def test_conv_encoder_with_own_downsample_equals_its_layers_by_hand(seed, batch_shape, size, in_channels):
    tensors, (image_size, channels) = Tensors(seed), size
    encoder = tensors.build(
        lambda: ConvEncoder(
            5, in_channels=in_channels, image_size=image_size, channels=channels, downsample=average_pool
        )
    )
    frames = tensors.uniform(*batch_shape, in_channels, image_size, image_size)
    features = encoder(frames)
    parameters = list(encoder.parameters())
    hidden = frames.reshape(-1, in_channels, image_size, image_size)
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        hidden = F.avg_pool2d(leaky_relu(F.conv2d(hidden, weight, bias, padding=1)), 2, ceil_mode=True)
    expected = leaky_relu((hidden[:, None] * parameters[-2]).sum((2, 3, 4)) + parameters[-1])
    assert features.shape == (*batch_shape, 5)
    torch.testing.assert_close(features, expected.reshape(features.shape), **CLOSE)


@pytest.mark.parametrize("image_size", [8, 16, 32, 64, 128])
def test_conv_encoder_default_channels(image_size):
    encoder = ConvEncoder(3, image_size=image_size)
    widths = [layer.out_channels for layer in encoder.convolutions if isinstance(layer, nn.Conv2d)]
    num_halvings = int(math.log2(image_size)) - 2
    assert widths == [32, 32, 64, 64, 64][:num_halvings] + [3]
    assert encoder(torch.rand(2, 3, image_size, image_size)).shape == (2, 3)


def test_default_downsample_blurs_before_the_stride():
    encoder = ConvEncoder(3, image_size=16, channels=(2, 2))
    pools = [layer for layer in encoder.convolutions if type(layer).__name__ == "BlurPool"]
    assert len(pools) == 2
    row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    for pool in pools:
        torch.testing.assert_close(pool.filt[0, 0], torch.outer(row, row))
        # a checkerboard is beyond what half the resolution can show: it must fade to its mean, not alias
        board = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).float().expand(1, 2, 8, 8)
        torch.testing.assert_close(pool(board), torch.full((1, 2, 4, 4), 0.5))


def test_conv_encoder_starts_with_features_that_tell_frames_apart():
    # eight frames of one colour each: how much the features differ between them. Over 30 seeds 0.12 with a standard
    # deviation of 0.04, at least 0.06; with torch's default initialisation, which shrinks the signal, at most 0.008
    torch.manual_seed(0)
    encoder = ConvEncoder(64, image_size=32, channels=(16, 16, 16))
    features = encoder(torch.rand(8, 3, 1, 1).expand(8, 3, 32, 32))
    assert 0.03 < features.std(0).mean() < 0.5


def test_conv_encoder_frame_does_not_see_its_neighbours():
    tensors = Tensors(0)
    encoder = tensors.build(conv_encoder)
    frames = tensors.uniform(3, 3, 8, 8).requires_grad_()
    features = encoder(frames)
    changed = encoder(torch.cat([frames[:1], tensors.uniform(2, 3, 8, 8)]))
    torch.testing.assert_close(features[0], changed[0], rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(features[0].sum(), frames)
    assert gradient[0].abs().sum() > 0
    assert (gradient[1:] == 0).all()


@given(seeds(), batch_shapes().filter(lambda shape: math.prod(shape) > 1))
def test_calibrated_conv_encoder_has_standardised_channels(seed, batch_shape):
    tensors = Tensors(seed)
    encoder = tensors.build(lambda: ConvEncoder(4, image_size=16, channels=(3, 2), downsample=average_pool))
    before = copy.deepcopy(encoder)
    frames = 0.5 + 0.01 * tensors.normal(*batch_shape, 3, 16, 16)
    encoder.calibrate(frames)
    hidden = frames.reshape(-1, 3, 16, 16)
    for layer, old in zip(encoder.convolutions, before.convolutions, strict=True):
        hidden = layer(hidden)
        if isinstance(layer, nn.Conv2d):
            of_channels = hidden.transpose(0, 1).flatten(1)
            torch.testing.assert_close(of_channels.mean(1), torch.zeros(len(of_channels)).double(), rtol=0, atol=1e-6)
            torch.testing.assert_close(of_channels.std(1), torch.ones(len(of_channels)).double(), rtol=1e-6, atol=0)
            ratios = (layer.weight / old.weight).flatten(1)  # each channel is rescaled as a whole, not turned
            torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios), **CLOSE)
            assert layer.weight.requires_grad
            assert layer.weight.grad is None


def test_calibrated_static_encoder_has_standardised_embeddings():
    tensors = Tensors(0)
    encoder = tensors.build(static_encoder)
    features = 5 + 0.1 * tensors.normal(6, 4, 3)
    encoder.calibrate(features)
    embedded = encoder.embedding(features).flatten(0, 1)
    torch.testing.assert_close(embedded.mean(0), torch.zeros(4).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(embedded.std(0), torch.ones(4).double(), **CLOSE)


def test_calibrating_on_frames_that_are_all_alike_does_not_blow_up():
    encoder = conv_encoder()
    frames = torch.rand(3, 8, 8).expand(5, 3, 8, 8)
    encoder.calibrate(frames)
    assert encoder(torch.rand(2, 3, 8, 8)).abs().max() < 100


@pytest.mark.parametrize(
    ("calibrate", "error", "message"),
    [
        (lambda: conv_encoder().calibrate(torch.rand(1, 3, 8, 8)), ValueError, "^frames: "),
        (lambda: conv_encoder().calibrate(torch.rand(0, 3, 8, 8)), ValueError, "^frames: "),
        (lambda: conv_encoder().calibrate(torch.rand(4, 1, 8, 8)), ValueError, r"^frames: .*\(4, 1, 8, 8\)"),
        (lambda: conv_encoder().calibrate(torch.ones(4, 3, 8, 8).byte()), TypeError, "^frames: "),
        (lambda: static_encoder().calibrate(torch.rand(1, 3)), ValueError, "^features: "),
        (lambda: static_encoder().calibrate(torch.rand(4, 2)), ValueError, "^features: "),
    ],
)
def test_calibration_refuses_what_it_cannot_use(calibrate, error, message):
    with pytest.raises(error, match=message):
        calibrate()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_conv_encoder_refuses_integer_frames(dtype):
    encoder = conv_encoder()
    with pytest.raises(TypeError, match="^frames: "):
        encoder(torch.zeros(2, 3, 8, 8, dtype=dtype))


@pytest.mark.parametrize("shape", [(3, 8, 9), (2, 1, 8, 8), (8, 8), (2, 8, 8, 3), (2, 3, 16, 16)])
def test_conv_encoder_refuses_frames_of_another_shape(shape):
    encoder = conv_encoder()
    with pytest.raises(ValueError, match="^frames: "):
        encoder(torch.zeros(shape))


@pytest.mark.parametrize("image_size", [48, 0, 4, 8.0, (64, 32)])
def test_conv_encoder_refuses_other_image_sizes(image_size):
    with pytest.raises(ValueError, match="^image_size: "):
        ConvEncoder(4, image_size=image_size)


@pytest.mark.parametrize(
    ("feature_dim", "options", "message"),
    [
        (0, {}, "^feature_dim: "),
        (4, {"in_channels": 0}, "^in_channels: "),
        (4, {"image_size": 16, "channels": (4,)}, "^channels: "),
        (4, {"image_size": 8, "channels": (0,)}, r"^channels\[0\]: "),
    ],
)
def test_conv_encoder_refuses_sizes(feature_dim, options, message):
    with pytest.raises(ValueError, match=message):
        ConvEncoder(feature_dim, **options)


@pytest.mark.parametrize(
    ("downsample", "left"),
    [(lambda channels: nn.AvgPool2d(2), r"\(3, 3\)"), (lambda channels: nn.Identity(), r"\(14, 14\)")],
    ids=["rounds down", "does not halve"],
)
def test_conv_encoder_refuses_a_downsample_that_does_not_halve(downsample, left):
    encoder = ConvEncoder(4, image_size=16, channels=(2, 2), downsample=downsample)
    with pytest.raises(ValueError, match=f"^downsample: .*{left}"):
        encoder(torch.rand(1, 3, 16, 16))


# Sequences: what both encoders hold to -----------------------------------------------------------------------------


def moments(posterior) -> Tensor:
    return torch.cat([posterior.mean, posterior.stddev], -1)


def gradients(total: Tensor, module: nn.Module, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the parameters (zeros for those that `total` does not read) and of the inputs."""
    parameters = list(module.parameters())
    found = torch.autograd.grad(total, [*parameters, *inputs], allow_unused=True)
    of_parameters = zip(parameters, found, strict=False)
    return [torch.zeros_like(p) if g is None else g for p, g in of_parameters], list(found[len(parameters) :])


@both_sequence_encoders
@given(seed=seeds(), mask=masks(), fill=padding())
def test_padding_changes_no_value_and_no_gradient(build, seed, mask, fill):
    tensors = Tensors(seed)
    encoder = tensors.build(build)
    sequences = tensors.normal(*mask.shape, 3)
    padded = torch.where(mask[..., None], sequences, fill).requires_grad_()
    alone = [sequences[b : b + 1, : int(mask[b].sum())].clone().requires_grad_() for b in range(len(mask))]
    together, separate = (
        moments(encoder(padded, mask)),
        torch.cat([moments(encoder(sequence)) for sequence in alone]),
    )
    torch.testing.assert_close(together, separate, **CLOSE)

    coefficients = tensors.normal(*together.shape)
    of_parameters, (of_padded,) = gradients((coefficients * together).sum(), encoder, [padded])
    expected, of_alone = gradients((coefficients * separate).sum(), encoder, alone)
    torch.testing.assert_close(of_parameters, expected, **CLOSE)
    assert all(gradient.isfinite().all() for gradient in of_parameters)
    assert (of_padded[~mask] == 0).all()
    torch.testing.assert_close(of_padded[mask], torch.cat(of_alone, 1)[0], **CLOSE)


@both_sequence_encoders
@given(seed=seeds(), batch_shape=batch_shapes(), steps=num_steps())
def test_any_batch_shape_equals_the_flattened_call(build, seed, batch_shape, steps):
    tensors = Tensors(seed)
    encoder = tensors.build(build)
    sequences = tensors.normal(*batch_shape, steps, 3)
    real = torch.randint(1, steps + 1, batch_shape, generator=tensors.generator)
    mask = torch.arange(steps) < real[..., None]
    for arguments in ((), (mask,)):
        posterior = encoder(sequences, *arguments)
        assert posterior.batch_shape == batch_shape
        assert posterior.event_shape == (2,)
        flat = encoder(sequences.reshape(-1, steps, 3), *(m.reshape(-1, steps) for m in arguments))
        torch.testing.assert_close(moments(posterior), moments(flat).reshape(*batch_shape, 4), **CLOSE)


@both_sequence_encoders
@given(seed=seeds(), lengths=lengths())
def test_one_mask_for_all_rows_is_expanded(build, seed, lengths):
    tensors = Tensors(seed)
    encoder = tensors.build(build)
    mask = mask_of(lengths)[0]
    sequences = tensors.normal(3, len(mask), 3)
    expected = moments(encoder(sequences, mask.expand(3, -1)))
    torch.testing.assert_close(moments(encoder(sequences, mask)), expected, rtol=0, atol=0)


@both_sequence_encoders
def test_a_mask_of_real_steps_alone_changes_nothing(build):
    tensors = Tensors(0)
    encoder, sequences = tensors.build(build), tensors.normal(2, 4, 3)
    masked = moments(encoder(sequences, torch.ones(2, 4, dtype=torch.bool)))
    torch.testing.assert_close(masked, moments(encoder(sequences)), **CLOSE)


@both_sequence_encoders
def test_a_row_does_not_see_its_neighbours(build):
    tensors = Tensors(0)
    encoder = tensors.build(build)
    sequences = tensors.normal(3, 4, 3).requires_grad_()
    mask = mask_of([3, 4, 1])
    posterior = moments(encoder(sequences, mask))
    changed = moments(encoder(torch.cat([sequences[:1], tensors.normal(2, 4, 3)]), mask_of([3, 2, 4])))
    torch.testing.assert_close(posterior[0], changed[0], rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(posterior[0].sum(), sequences)
    assert gradient[0].abs().sum() > 0
    assert (gradient[1:] == 0).all()


@both_sequence_encoders
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([[True, False, True], [True] * 3], ValueError, "^mask: .*hole"),
        ([[False, True, True], [True] * 3], ValueError, "^mask: .*first step"),
        ([[False] * 3, [True] * 3], ValueError, "^mask: .*first step"),
        ([[1.0] * 3] * 2, TypeError, "^mask: "),
        ([[1] * 3] * 2, TypeError, "^mask: "),
        ([[True] * 4] * 2, ValueError, "^mask: .*T=3"),
        ([[True] * 3] * 3, ValueError, r"^mask: .*\(3, 3\)"),
        ([[[True] * 3] * 2], ValueError, r"^mask: .*\(1, 2, 3\)"),
        (True, ValueError, r"^mask: .*\(\)"),
    ],
)
def test_masks_that_make_no_sense_are_refused(build, mask, error, message):
    with pytest.raises(error, match=message):
        build()(torch.zeros(2, 3, 3), torch.tensor(mask))


@pytest.mark.parametrize(
    ("build", "shape", "message"),
    [
        (static_encoder, (2, 5, 4), "^features: .*4"),
        (static_encoder, (3,), r"^features: .*\(3,\)"),
        (static_encoder, (2, 0, 3), "^features: .*length 0"),
        (dynamics_encoder, (2, 5, 4), "^embeddings: .*4"),
        (dynamics_encoder, (3,), r"^embeddings: .*\(3,\)"),
        (dynamics_encoder, (2, 0, 3), "^embeddings: .*length 0"),
        (dynamics_encoder, (0, 4, 3), r"^embeddings: .*\(0,\)"),
    ],
)
def test_sequences_of_another_shape_are_refused(build, shape, message):
    with pytest.raises(ValueError, match=message):
        build()(torch.zeros(shape))


# What is static ------------------------------------------------------------------------------------------------------


@given(seeds(), masks(), dimensions(3), dimensions(3))
def test_static_encoder_equals_the_loop(seed, mask, feature_dim, static_dim):
    tensors = Tensors(seed)
    encoder = tensors.build(lambda: StaticEncoder(feature_dim, static_dim, hidden_dim=4))
    features = tensors.normal(*mask.shape, feature_dim)
    embedded = torch.stack([torch.stack([leaky_relu(affine(encoder.embedding, e)) for e in row]) for row in features])
    posterior = encoder(features, mask)
    for b, mean in enumerate(masked_average(embedded, mask)):
        torch.testing.assert_close(posterior.mean[b], affine(encoder.head.loc, mean), **CLOSE)
        torch.testing.assert_close(posterior.stddev[b], softplus(affine(encoder.head.scale, mean)) + 1e-4, **CLOSE)


@given(seeds(), num_steps(6))
def test_static_encoder_knows_no_order_and_no_repetition(seed, steps):
    tensors = Tensors(seed)
    encoder, features = tensors.build(static_encoder), tensors.normal(2, steps, 3)
    posterior = moments(encoder(features))
    order = torch.randperm(steps, generator=tensors.generator)
    torch.testing.assert_close(moments(encoder(features[:, order])), posterior, **CLOSE)
    torch.testing.assert_close(moments(encoder(features.repeat(1, 3, 1))), posterior, **CLOSE)


@pytest.mark.parametrize("initial_scale", [0.05, 0.7, 30.0, 2000.0])
def test_static_encoder_starts_at_its_initial_scale(initial_scale):
    encoder = StaticEncoder(3, 5, hidden_dim=4, initial_scale=initial_scale).double()
    # features 0: what is left is the bias of the scale
    posterior = encoder(torch.zeros(1, 2, 3, dtype=torch.float64))
    torch.testing.assert_close(posterior.stddev, torch.full_like(posterior.stddev, initial_scale), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 2), {}, "^feature_dim: "),
        ((3, 0), {}, "^static_dim: "),
        ((3, 2), {"hidden_dim": 0}, "^hidden_dim: "),
        ((3, 2), {"initial_scale": 0.0}, "^initial_scale: "),
        ((3, 2), {"initial_scale": math.nan}, "^initial_scale: "),
        ((3, 2), {"initial_scale": 1e-5}, "^initial_scale: "),
    ],
)
def test_static_encoder_refuses_sizes(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        StaticEncoder(*arguments, **options)


# What is dynamic -----------------------------------------------------------------------------------------------------


@settings(max_examples=10)  # the reference runs every gate in Python
@given(seeds(), masks(largest=4, max_rows=3), dimensions(3), dimensions(2), dimensions(3), padding())
def test_dynamics_encoder_equals_the_loop(seed, mask, input_dim, num_layers, hidden_dim, fill):
    tensors = Tensors(seed)
    encoder = tensors.build(lambda: Seq2SeqDynamicsEncoder(input_dim, 2, hidden_dim=hidden_dim, num_layers=num_layers))
    embeddings = tensors.normal(*mask.shape, input_dim)
    posterior = encoder(torch.where(mask[..., None], embeddings, fill), mask)
    for b in range(len(mask)):
        final = final_states(encoder.encoder, embeddings[b, mask[b]])
        torch.testing.assert_close(posterior.mean[b], affine(encoder.head.loc, final), **CLOSE)
        torch.testing.assert_close(posterior.stddev[b], softplus(affine(encoder.head.scale, final)) + 1e-4, **CLOSE)


@settings(max_examples=10)  # the reference runs every gate in Python
@given(seeds(), dimensions(3), dimensions(2), dimensions(3), num_steps(4))
def test_unroll_equals_the_loop(seed, dynamics_dim, num_layers, hidden_dim, steps):
    tensors = Tensors(seed)
    encoder = tensors.build(
        lambda: Seq2SeqDynamicsEncoder(2, dynamics_dim, hidden_dim=hidden_dim, num_layers=num_layers)
    )
    dynamics = tensors.normal(2, dynamics_dim)
    outputs = encoder.unroll(dynamics, steps)
    assert outputs.shape == (2, steps, hidden_dim)
    for b in range(2):
        states = affine(encoder.initial_states, dynamics[b]).reshape(2, num_layers, hidden_dim)
        hidden, cell = torch.tanh(states[0]), states[1]
        expected = unrolled(encoder.decoder, encoder.decoder_input, hidden, cell, steps)
        torch.testing.assert_close(outputs[b], expected, **CLOSE)


@given(seeds(), batch_shapes(), num_steps(9), num_steps(9))
def test_a_longer_unroll_starts_with_the_shorter_one(seed, batch_shape, steps, more):
    tensors = Tensors(seed)
    encoder = tensors.build(dynamics_encoder)
    dynamics = tensors.normal(*batch_shape, 2)
    longer, shorter = encoder.unroll(dynamics, steps + more), encoder.unroll(dynamics, steps)
    assert shorter.shape == (*batch_shape, steps, 4)
    torch.testing.assert_close(longer[..., :steps, :], shorter, rtol=1e-12, atol=1e-12)
    flat = encoder.unroll(dynamics.reshape(-1, 2), steps)
    torch.testing.assert_close(flat.reshape(shorter.shape), shorter, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_reaches_every_parameter_and_step(masked):
    tensors = Tensors(0)
    encoder = tensors.build(dynamics_encoder)
    embeddings = tensors.normal(2, 4, 3).requires_grad_()
    posterior = encoder(embeddings, mask_of([4, 4]) if masked else None)
    (encoder.unroll(posterior.rsample(), 3).pow(3).sum() + posterior.stddev.sum()).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.norm() > 0, name
    assert (embeddings.grad.norm(dim=-1) > 0).all()


def test_order_matters_to_the_dynamics():
    tensors = Tensors(0)
    encoder, embeddings = tensors.build(dynamics_encoder), tensors.normal(2, 4, 3)
    assert (encoder(embeddings).mean - encoder(embeddings.flip(1)).mean).abs().min() > 1e-4


def test_dropout_acts_in_training_mode_alone():
    encoder = Seq2SeqDynamicsEncoder(3, 2, hidden_dim=4, num_layers=2, dropout=0.5)
    embeddings = torch.randn(2, 5, 3)
    assert not torch.equal(encoder(embeddings).mean, encoder(embeddings).mean)
    assert not torch.equal(encoder.unroll(embeddings[:, 0, :2], 4), encoder.unroll(embeddings[:, 0, :2], 4))
    encoder.eval()
    assert torch.equal(encoder(embeddings).mean, encoder(embeddings).mean)
    assert torch.equal(encoder.unroll(embeddings[:, 0, :2], 4), encoder.unroll(embeddings[:, 0, :2], 4))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 2), {}, "^input_dim: "),
        ((3, 0), {}, "^dynamics_dim: "),
        ((3, 2), {"hidden_dim": 0}, "^hidden_dim: "),
        ((3, 2), {"num_layers": 0}, "^num_layers: "),
        ((3, 2), {"dropout": 1.0}, "^dropout: "),
        ((3, 2), {"dropout": -0.1}, "^dropout: "),
        ((3, 2), {"dropout": math.nan}, "^dropout: "),
    ],
)
def test_dynamics_encoder_refuses_sizes(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        Seq2SeqDynamicsEncoder(*arguments, **options)


@pytest.mark.parametrize(
    ("shape", "steps", "message"),
    [
        ((2, 3), 4, "^dynamics: "),
        ((), 4, r"^dynamics: .*\(\)"),
        ((2, 2), 0, "^num_steps: "),
        ((2, 2), 2.0, "^num_steps: "),
    ],
)
def test_unroll_refuses_inputs(shape, steps, message):
    with pytest.raises(ValueError, match=message):
        dynamics_encoder().unroll(torch.zeros(shape), steps)


@needs_lstm
def test_posteriors_are_float32_under_autocast():
    for build in (static_encoder, dynamics_encoder):
        encoder, sequences, mask = build(), torch.randn(2, 4, 3), mask_of([4, 2])
        with torch.autocast("cpu", torch.bfloat16):
            posteriors = [encoder(sequences), encoder(sequences, mask)]
        for posterior, exact in zip(posteriors, [encoder(sequences), encoder(sequences, mask)], strict=True):
            assert posterior.mean.dtype == posterior.stddev.dtype == torch.float32
            # bfloat16 has 8 bits: a relative error of 0.4 % an operation, on numbers of order 1
            torch.testing.assert_close(moments(posterior), moments(exact), rtol=0, atol=0.05)


def test_a_copy_of_an_encoder_is_its_own():
    tensors = Tensors(0)
    encoder, embeddings = tensors.build(dynamics_encoder), tensors.normal(2, 4, 3)
    before, other = encoder(embeddings).mean, copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(encoder(embeddings).mean, before)
