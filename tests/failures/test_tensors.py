"""Tensors that users get wrong, and what they are told: shapes, devices, dtypes, masks."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import torch
from failures import check, rows
from torch import nn

from seqdisent import (
    Combiner,
    ConvDecoder,
    ConvEncoder,
    GatedTransition,
    IndependentSteps,
    MarkovChain,
    MixtureOfExperts,
    MixtureOfExpertsConvDecoder,
    NormalHead,
    Seq2SeqDynamicsEncoder,
    StaticEncoder,
    overwrite_padding,
    read_backward,
    steps_after,
)

encoder, plain = ConvEncoder(6, image_size=8, channels=(4,)), ConvDecoder(4, image_size=8, channels=(4,))
decoder = MixtureOfExpertsConvDecoder(4, 3, image_size=8, channels=(4,))
static = StaticEncoder(6, 3)
dynamics = Seq2SeqDynamicsEncoder(6, 4, hidden_dim=5, num_layers=1)
transition, combiner = GatedTransition(3, 5, context_dim=2), Combiner(3, 5, context_dim=2)
mixture = MixtureOfExperts(lambda: nn.Linear(3, 2), 3)
ones = torch.ones
mask = lambda *rows: torch.tensor(rows).bool()  # noqa: E731


def elsewhere(*shape):
    return torch.zeros(*shape, device="meta")  # any other device: this one needs no GPU


def chain(num_steps=4, **options):
    initial = dist.Normal(torch.zeros(2, 3), 1.0).to_event(1)
    return MarkovChain(initial, lambda z_prev, *context: transition(z_prev, *context), num_steps, **options)


@rows(
    # shapes
    ("frames of another size", lambda: encoder(ones(2, 5, 3, 16, 16)), ValueError,
     r"frames: has shape \(2, 5, 3, 16, 16\), expected \(\*B, 3, 8, 8\)"),
    ("channels last", lambda: encoder(ones(2, 5, 8, 8, 3)), ValueError,
     r"frames: has shape \(2, 5, 8, 8, 3\), expected \(\*B, 3, 8, 8\)"),
    ("grey frames where colour is expected", lambda: encoder(ones(2, 5, 1, 8, 8)), ValueError, r"frames: has shape"),
    ("an image size that cannot be halved down", lambda: ConvEncoder(6, image_size=48), ValueError,
     r"image_size: got 48, expected one integer 4 \* 2\*\*n"),
    ("features without time", lambda: static(ones(6)), ValueError, "features: has shape .6,., expected at least 2"),
    ("a sequence of no step", lambda: static(ones(2, 0, 6)), ValueError, "features: has length 0, expected at least"),
    ("embeddings of no step", lambda: dynamics(ones(2, 0, 6)), ValueError, "embeddings: has length 0, expected at"),
    ("embeddings of no sequence", lambda: dynamics(ones(0, 5, 6)), ValueError,
     r"embeddings: has batch shape \(0,\), expected at least one sequence"),
    ("features of another size", lambda: dynamics(ones(2, 5, 7)), ValueError,
     "embeddings: last dimension is 7, expected input_dim=6"),
    ("latents of another size", lambda: decoder(ones(2, 5, 3), ones(2, 3)), ValueError,
     "latents: last dimension is 3, expected latent_dim=4"),
    ("latents without time", lambda: decoder(ones(2, 4), ones(2, 3)), ValueError,
     r"weights: has batch shape \(2,\), expected that of latents, \(\)"),
    ("latents of no step", lambda: decoder(ones(2, 0, 4), ones(2, 3)), ValueError,
     "latents: has length 0, expected at least one step"),
    ("latents of no sequence", lambda: decoder(ones(0, 5, 4), ones(0, 3)), ValueError,
     r"latents: has batch shape \(0,\), expected at least one sequence"),
    ("no latent vector", lambda: plain(ones(3, 0, 4)), ValueError,
     r"latents: has batch shape \(3, 0\), expected at least one latent vector"),
    ("weights of another number of experts", lambda: decoder(ones(2, 5, 4), ones(2, 4)), ValueError,
     "weights: last dimension is 4, expected num_experts=3"),
    ("weights that change over time", lambda: decoder(ones(2, 5, 4), ones(2, 5, 3)), ValueError,
     r"weights: has batch shape \(2, 5\), expected that of latents, \(2,\)"),
    ("weights of another batch", lambda: mixture(ones(2, 3), ones(4, 3)), ValueError,
     r"x: has batch shape \(2,\), expected that of weights, \(4,\)"),
    ("weights of no row", lambda: mixture(ones(0, 3), ones(0, 3)), ValueError,
     r"weights: has batch shape \(0,\), expected at least one row"),
    ("an expert's input that is none", lambda: MixtureOfExperts(lambda: nn.LSTMCell(3, 2), 3)(
        (ones(2, 3), None), ones(2, 3)), TypeError, r"^x\[1\]: got NoneType, expected a tensor"),
    ("z_prev of another size", lambda: transition(ones(2, 4), ones(2, 2)), ValueError,
     "z_prev: last dimension is 4, expected latent_dim=3"),
    ("no context where there is one", lambda: transition(ones(2, 3)), ValueError, "context: got None, expected"),
    ("a context where none was declared", lambda: GatedTransition(3, 5)(ones(2, 3), ones(2, 2)), ValueError,
     r"context: got shape \(2, 2\), expected None since context_dim=0"),
    ("a context that was not projected", lambda: combiner.step(ones(2, 3), ones(2, 2)), ValueError,
     "projected: last dimension is 2, expected hidden_dim=5"),
    ("context of another batch", lambda: combiner(ones(2, 3), ones(5, 2)), ValueError,
     r"context: has shape \(5, 2\), expected one that expands to \(2, 2\)"),
    ("inputs shorter than num_steps", lambda: chain(inputs=ones(2, 3, 2)), ValueError,
     r"inputs: has shape \(2, 3, 2\), expected \(\*B, T, I\) with T=4"),
    ("inputs of another batch", lambda: chain(inputs=ones(5, 4, 2)), ValueError,
     r"inputs: has shape \(5, 4, 2\), expected the batch \(2,\) of `initial`"),
    ("an initial distribution of no sequence",
     lambda: MarkovChain(dist.Normal(ones(0, 3), 1.0).to_event(1), transition, 4), ValueError,
     r"initial: has batch shape \(0,\), expected at least one sequence"),
    ("an initial distribution of scalar classes", lambda: MarkovChain(dist.Categorical(ones(3)), transition, 4),
     ValueError, r"initial: has event shape \(\), .* a class is a vector as OneHotCategorical"),
    ("a prefix of no step", lambda: chain().extend(ones(2, 0, 3), 1), ValueError,
     r"prefix: has shape \(2, 0, 3\), expected \(\*B, T, 3\) with T >= 1"),
    ("steps without a batch to be time", lambda: IndependentSteps(dist.Normal(ones(3), 1.0).to_event(1)), ValueError,
     r"step: has batch shape \(\), expected \(\*B, T\): the last batch dimension of a Independent .* is time"),
    ("steps of another number than asked for", lambda: IndependentSteps(dist.Normal(ones(2, 4, 3), 1.0).to_event(1))
     .extend(ones(2, 2, 3), 3), ValueError, "num_steps: the distribution has 4 steps, expected 5"),
    ("a sequence without time, read backward", lambda: read_backward(nn.GRU(3, 2), ones(3)), ValueError,
     r"inputs: has shape \(3,\), expected \(\*B, T, 3\)"),
    ("no sequence, read backward", lambda: read_backward(nn.GRU(3, 2), ones(0, 4, 3)), ValueError,
     r"inputs: has shape \(0, 4, 3\), expected at least one sequence and one step"),
    ("one frame to calibrate on", lambda: encoder.calibrate(ones(1, 3, 8, 8)), ValueError,
     r"frames: got 1 to calibrate on, expected two or more \(a few hundred\)"),
    ("a path of another length", lambda: chain().log_prob(ones(2, 5, 3)), ValueError,
     r"path: has shape \(2, 5, 3\), expected .* ending in \(2, 4, 3\)"),
    ("a chain of no step", lambda: chain(0), ValueError, "num_steps: got 0, expected an integer >= 1"),
    ("an initial distribution without .to_event(1)",
     lambda: MarkovChain(dist.Normal(ones(2, 3), 1.0), transition, 4), ValueError, r"initial: .*; .to_event\(1\)"),
    ("more steps than the chain has inputs for", lambda: chain(inputs=ones(2, 4, 2)).extend(ones(2, 3, 3), 2),
     ValueError, "num_steps: the chain has inputs for 4 steps, expected 3 of the prefix [+] 2"),
    # devices
    ("frames on another device", lambda: encoder(elsewhere(2, 5, 3, 8, 8)), ValueError,
     "frames: is on meta, expected cpu, where the parameters are"),
    ("features on another device", lambda: static(elsewhere(2, 5, 6)), ValueError, "features: is on meta, expected"),
    ("embeddings on another device", lambda: dynamics(elsewhere(2, 5, 6)), ValueError, "embeddings: is on meta"),
    ("dynamics on another device", lambda: dynamics.unroll(elsewhere(2, 4), 5), ValueError, "dynamics: is on meta"),
    ("latents on another device", lambda: decoder(elsewhere(2, 5, 4), ones(2, 3)), ValueError, "latents: is on meta"),
    ("weights on another device", lambda: decoder(ones(2, 5, 4), elsewhere(2, 3)), ValueError, "weights: is on meta"),
    ("an expert's input on another device", lambda: mixture(elsewhere(2, 3), ones(2, 3)), ValueError,
     "x: is on meta, expected cpu, where the parameters are"),
    ("z_prev on another device", lambda: transition(elsewhere(2, 3), ones(2, 2)), ValueError, "z_prev: is on meta"),
    ("a context on another device", lambda: combiner(ones(2, 3), elsewhere(2, 2)), ValueError, "context: is on meta"),
    ("a head's features on another device", lambda: NormalHead(6, 2)(elsewhere(2, 6)), ValueError,
     "features: is on meta"),
    ("a mask on another device", lambda: static(ones(2, 5, 6), elsewhere(2, 5).bool()), ValueError,
     "mask: is on meta, expected cpu, where the values are"),
    # dtypes
    ("a float64 model and float32 frames", lambda: ConvEncoder(6, image_size=8, channels=(4,)).double()(
        ones(2, 5, 3, 8, 8)), TypeError, "frames: has dtype torch.float32, expected torch.float64, that of the param"),
    ("a float32 model and float64 frames", lambda: encoder(ones(2, 5, 3, 8, 8).double()), TypeError,
     "frames: has dtype torch.float64, expected torch.float32, that of the parameters"),
    ("half-precision features without autocast", lambda: static(ones(2, 5, 6).half()), TypeError,
     "features: has dtype torch.float16, expected torch.float32"),
    ("float64 embeddings", lambda: dynamics(ones(2, 5, 6).double()), TypeError, "embeddings: has dtype torch.float64"),
    ("float64 z_prev", lambda: transition(ones(2, 3).double(), ones(2, 2)), TypeError,
     "z_prev: has dtype torch.float64, expected torch.float32"),
    ("float64 z_prev of a posterior", lambda: combiner(ones(2, 3).double(), ones(2, 2)), TypeError, "z_prev: has"),
    ("a float64 context", lambda: combiner(ones(2, 3), ones(2, 2).double()), TypeError, "context: has dtype"),
    ("a head's float64 features", lambda: NormalHead(6, 2)(ones(2, 6).double()), TypeError, "features: has dtype"),
    ("float64 weights", lambda: decoder(ones(2, 5, 4), ones(2, 3).double()), TypeError, "weights: has dtype torch.fl"),
    ("integer weights", lambda: mixture(ones(2, 3), ones(2, 3).long()), TypeError, "weights: has dtype torch.int64"),
    ("frames as bytes, 0 to 255", lambda: encoder(ones(2, 5, 3, 8, 8).byte()), TypeError,
     r"frames: has dtype torch.uint8, expected floating point \(pixels in \[0, 1\]\)"),
    ("integer frames", lambda: encoder(ones(2, 5, 3, 8, 8).long()), TypeError, "frames: has dtype torch.int64, exp"),
    ("parameters in half precision", lambda: NormalHead(6, 2).half()(ones(2, 6)), TypeError,
     "parameters: have dtype torch.float16, expected torch.float32 or torch.float64; half precision needs "
     "torch.autocast, which keeps the parameters in float32"),
    # masks
    ("a mask of 0 and 1 that is not bool", lambda: static(ones(2, 3, 6), ones(2, 3)), TypeError,
     "mask: has dtype torch.float32, expected torch.bool .True where a step is real"),
    ("lengths for a mask", lambda: static(ones(2, 3, 6), torch.tensor([3, 2])), TypeError,
     r"mask: has dtype torch.int64, expected torch.bool .* of lengths: torch.arange\(T\) < lengths\[:, None\]"),
    ("lengths in a list for a mask", lambda: overwrite_padding(ones(2, 3, 6), [3, 2]), TypeError,
     r"mask: got list, expected a bool tensor \(\*B, T\), .* lengths: torch.arange\(T\) < lengths\[:, None\]"),
    ("NumPy's array for a mask", lambda: chain(mask=np.ones((2, 4), dtype=bool)), TypeError,
     "mask: got ndarray, expected a bool tensor"),
    ("a mask that does not fit the values", lambda: overwrite_padding(ones(2, 5, 3), mask([1] * 6, [1] * 6)),
     ValueError, r"mask: has shape \(2, 6\), expected one that fits values \(2, 5, 3\) with event_dims=1 to the right "
     r"of time \(1 for vectors, 3 for pictures\)"),
    ("the steps after rows of another batch", lambda: steps_after(ones(2, 9, 3), mask([1], [1], [1]), 2), ValueError,
     r"mask: has shape \(3, 1\), expected the batch of values \(2, 9, 3\) with event_dims=1"),
    ("the steps after what was observed", lambda: steps_after(ones(2, 9, 3), mask([1, 0, 1], [1, 1, 1]), 2), ValueError,
     "mask: a row has a hole; real steps come first, padding on the right"),
    ("the steps after one number", lambda: steps_after(ones(2, 9, 3), torch.tensor(True), 2), ValueError,
     r"mask: has shape \(\), expected the batch of values \(2, 9, 3\)"),
    ("more steps after a row than there are", lambda: steps_after(ones(2, 4, 3), mask([1, 1], [1, 0]), 3), ValueError,
     "values: have 4 steps, expected at least 5, those of the longest row and 3 more"),
    ("a mask of another length", lambda: static(ones(2, 3, 6), mask([1, 1], [1, 0])), ValueError,
     r"mask: has shape \(2, 2\), expected \(\*B, T\) with T=3 steps"),
    ("a mask of another batch", lambda: chain(mask=mask(*[[1, 1, 1, 0]] * 5)), ValueError,
     r"mask: has shape \(5, 4\), expected one that expands to \(2, 4\)"),
    ("a mask with a hole", lambda: static(ones(2, 3, 6), mask([1, 0, 1], [1, 1, 1])), ValueError, "a row has a hole"),
    ("padding on the left", lambda: static(ones(2, 3, 6), mask([0, 1, 1], [1, 1, 1])), ValueError,
     "mask: a row has no real first step"),
    ("a row of padding alone", lambda: static(ones(2, 3, 6), mask([0, 0, 0], [1, 1, 1])), ValueError,
     "mask: a row has no real first step; every sequence needs at least one, padding on the right"),
)  # fmt: skip
def test_tensors(row):
    check(row)
