"""Blocks, chains and schedules that users build wrong, and what they are told."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from failures import check, rows
from models import LinearChain
from torch import nn

from seqdisent import (
    AnnealingSchedule,
    ConvEncoder,
    FlowPrior,
    GatedTransition,
    MarkovChain,
    MixtureOfExperts,
    MixturePrior,
    NormalHead,
    RecurrentChain,
    Seq2SeqDynamicsEncoder,
    StaticEncoder,
    VampPrior,
)

ones = torch.ones


def start(*batch_shape):
    return dist.Normal(torch.zeros(*batch_shape, 3), 1.0).to_event(1)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and options
# ---------------------------------------------------------------------------------------------------------------------


@rows(
    ("no class of experts", lambda: MixtureOfExperts(lambda: nn.Linear(3, 2), 0), ValueError,
     "^num_experts: got 0, expected an integer >= 1$"),
    ("a size that is no integer", lambda: StaticEncoder(6, 2.0), ValueError,
     "^static_dim: got 2.0, expected an integer >= 1$"),
    ("channels for another image size", lambda: ConvEncoder(6, image_size=16, channels=(4,)), ValueError,
     r"channels: got 1 values \(4,\), expected 2 for image_size=16 \(4 \* 2\*\*2 pixels\)"),
    ("a channel of no kernel", lambda: ConvEncoder(6, image_size=8, channels=(0,)), ValueError,
     r"channels\[0\]: got 0, expected an integer >= 1"),
    ("a pooling that rounds down", lambda: ConvEncoder(
        6, image_size=16, channels=(2, 2), downsample=lambda _: nn.AvgPool2d(2))(ones(1, 3, 16, 16)), ValueError,
     r"downsample: leaves \(3, 3\) pixels to the last convolution, expected \(4, 4\); each call must halve the image, "
     "rounding up"),
    ("dropout of everything", lambda: Seq2SeqDynamicsEncoder(6, 4, dropout=1.0), ValueError,
     r"dropout: got 1.0, expected a probability in \[0, 1\)"),
    ("a scale of 0", lambda: StaticEncoder(6, 3, initial_scale=0.0), ValueError,
     "initial_scale: got 0.0, expected a positive finite number"),
    ("a first scale below the smallest", lambda: NormalHead(6, 3, initial_scale=1e-5), ValueError,
     "initial_scale: got 1e-05, expected more than min_scale=0.0001"),
    ("a context of negative size", lambda: GatedTransition(2, 3, context_dim=-1), ValueError,
     "context_dim: got -1, expected an integer >= 0"),
    ("a flow of one coordinate", lambda: FlowPrior(1), ValueError,
     "latent_dim: got 1, expected 2 or more: a coupling needs two halves"),
    ("a mixture's context that is missing", lambda: MixturePrior(2, 3, context_dim=4)(), ValueError,
     r"context: got None, expected a tensor \(\*B, context_dim=4\)"),
    ("a context where there is none", lambda: MixturePrior(2, 3)(ones(5, 4)), ValueError,
     r"context: got shape \(5, 4\), expected None since context_dim=0"),
    ("fewer samples than components", lambda: MixturePrior(2, 3).start(ones(2, 2)), ValueError,
     "samples: got 1 different ones, expected 3 or more"),
    ("samples of another size", lambda: MixturePrior(2, 3).start(ones(9, 3)), ValueError,
     r"samples: .*3.*expected.*latent_dim"),
    ("samples that are not finite", lambda: FlowPrior(2).start(torch.full((9, 2), math.nan)), ValueError,
     "samples: have values that are not finite, expected numbers"),
    ("pseudo-inputs of bytes", lambda: VampPrior(ones(3, 4).byte()), TypeError,
     r"pseudo_inputs: got torch.uint8, expected a floating-point tensor \(K, \*E\)"),
    ("one pseudo-input, without K", lambda: VampPrior(ones(4)), ValueError,
     r"pseudo_inputs: has shape \(4,\), expected \(K, \*E\) with K >= 1"),
    ("bounds in the wrong order", lambda: VampPrior(ones(3, 4), bounds=(1.0, 0.0)), ValueError,
     r"bounds: got \(1.0, 0.0\), expected \(smallest, largest\)"),
    ("an encoder that mixes pseudo-inputs", lambda: VampPrior(ones(3, 4))(lambda u: dist.Normal(u.mean(0), 1.0)),
     ValueError, r"encode: returned a distribution with batch \(4,\), expected \(3,\), one a pseudo-input"),
)  # fmt: skip
def test_sizes_and_options(row):
    check(row)


# ---------------------------------------------------------------------------------------------------------------------
# Experts
# ---------------------------------------------------------------------------------------------------------------------


class Answers(nn.Linear):
    def forward(self, x):
        return True


class Drawn(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.register_buffer("w", torch.rand(2))


def experts(factory, number=2):
    return lambda: MixtureOfExperts(factory, number)


def of(*modules):
    return experts(iter(modules).__next__, len(modules))


shared = nn.Linear(3, 2)
counts = nn.ParameterDict({"count": nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)})


@rows(
    ("a module where a function belongs", experts(nn.Linear(3, 2)), TypeError,
     "expert: expected a function that returns a new module, such as `lambda: nn.Linear"),
    ("a function that returns no module", experts(lambda: ones(3)), TypeError,
     "expert: returned Tensor, expected a torch.nn.Module"),
    ("a module without parameters", experts(nn.ReLU), ValueError, "expert: has no parameters to blend"),
    ("integer parameters", experts(lambda: counts), ValueError,
     "expert: parameter count is torch.int64, expected floating point"),
    ("running statistics", experts(lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))), ValueError,
     r"expert: 1 \(BatchNorm1d\) cannot be blended: it writes running statistics in forward; use LayerNorm, GroupNorm"),
    ("a fused recurrent network", experts(lambda: nn.GRU(3, 3)), ValueError,
     r"expert: the module itself \(GRU\) cannot be blended: fused recurrent networks keep their weights apart; use"),
    ("weights that are computed", experts(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))), ValueError,
     r"cannot be blended: its weights are computed in forward \(parametrised, spectral or weight norm\)"),
    ("sparse gradients", experts(lambda: nn.Embedding(5, 3, sparse=True)), ValueError,
     r"\(Embedding\) cannot be blended: its gradients are sparse; use sparse=False"),
    ("parameters without sizes", experts(lambda: nn.LazyLinear(3)), ValueError,
     r"\(LazyLinear\) cannot be blended: its parameters have no sizes yet; give it its input size"),
    ("one module for all experts", experts(lambda: shared), ValueError,
     "expert: its modules share parameter weight, expected a new module from each call"),
    ("experts of different sizes", of(nn.Linear(3, 2), nn.Linear(3, 4)), ValueError,
     r"expert: call 2 returned parameters \{'weight': \(4, 3\), 'bias': \(4,\)\}, expected the same names and shapes "
     r"as in the first call, \{'weight': \(2, 3\), 'bias': \(2,\)\}"),
    ("a buffer that is drawn", experts(Drawn), ValueError,
     "expert: buffer w differs between experts, expected the same in all, since only parameters are blended; draw it"),
    ("an expert that returns no tensor", lambda: MixtureOfExperts(lambda: Answers(3, 2), 2)(ones(2, 3), ones(2, 2)),
     TypeError, "expert: returned bool, expected a tensor, or a tuple, list or dict of tensors"),
)  # fmt: skip
def test_experts(row):
    check(row)


# ---------------------------------------------------------------------------------------------------------------------
# Chains
# ---------------------------------------------------------------------------------------------------------------------


def walk(z_prev, *_):
    return dist.Normal(z_prev, 1.0).to_event(1)


class NotReparameterised(dist.Normal):
    has_rsample = False


class Dropping(nn.Dropout):
    def forward(self, z_prev):
        return walk(super().forward(z_prev))


def recurrent(recurrence=None, **options):
    return RecurrentChain(start(2), walk, 4, recurrence=recurrence or nn.GRU(3, 5), **options)


def past_the_end():
    chain = LinearChain(0, (3,), 4, 2).chain()
    path = chain.rsample()
    return chain.step(path[:, 3], chain.state_after(path))


@rows(
    ("a number for a transition", lambda: MarkovChain(start(2), 0.5, 4), TypeError,
     "transition: got float, expected a function of z_prev"),
    ("a transition with dropout", lambda: MarkovChain(start(2), Dropping(), 4), ValueError,
     "transition: Dropping drops units at random, so a path would be scored under another transition than the one that "
     r"drew it; remove it or call .eval\(\)"),
    ("a transition without .to_event(1)", lambda: MarkovChain(start(2), lambda z: dist.Normal(z, 1.0), 4).rsample(),
     ValueError, r"transition: returned batch \(2, 3\) and event \(\) for z_prev of shape \(2, 3\), expected \(2,\) "
     r"and \(3,\); .to_event\(1\) makes the last dimension the event"),
    ("a step without rsample", lambda: MarkovChain(
        start(2), lambda z: NotReparameterised(z, 1.0).to_event(1), 4).rsample(), NotImplementedError,
     "a step is a Independent, which has no rsample"),
    ("the step before without its state", lambda: MarkovChain(start(2), walk, 4).step(ones(2, 3)), ValueError,
     "state: got one of z_prev and state without the other, expected both or neither"),
    ("a step after the last input", past_the_end, ValueError,
     "state: 4 steps are done, expected fewer: the chain has inputs for 4"),
    ("no recurrent network", lambda: recurrent(nn.Linear(3, 5)), TypeError,
     "recurrence: got Linear, expected an nn.GRU, nn.LSTM or nn.RNN"),
    ("a network of two directions", lambda: recurrent(nn.GRU(3, 5, bidirectional=True)), ValueError,
     "recurrence: has two directions or projections, expected one direction and none"),
    ("a network with dropout", lambda: recurrent(nn.GRU(3, 5, 2, dropout=0.5)), ValueError,
     "recurrence: drops units at random, so a path would be scored under another state than the one that drew it;"),
    ("a network that reads more than there is", lambda: recurrent(nn.GRU(4, 5)), ValueError,
     r"recurrence: reads 4 values, expected those of `inputs` and, with reads_latent=True, of z: \{'z': 3\}"),
    ("a network that reads nothing", lambda: recurrent(reads_latent=False), ValueError,
     "recurrence: reads 3 values, expected .* reads_latent=True, of z: none"),
    ("a state of another batch", lambda: recurrent(state=ones(7, 5)), ValueError,
     r"state: has shape \(7, 5\), expected one that expands to \(2, 5\)"),
    ("a context of another length", lambda: recurrent(context=ones(2, 3, 1)), ValueError,
     r"context: has shape \(2, 3, 1\), expected \(\*B, T, C\) with T=4"),
    ("more steps than there is context for", lambda: recurrent(context=ones(2, 4, 1)).extend(ones(2, 2, 3), 3),
     ValueError, "num_steps: the chain has context for 4 steps, expected 2 of the prefix [+] 3"),
)  # fmt: skip
def test_chains(row):
    check(row)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------------------------------

linear = AnnealingSchedule.linear(0.0, 1.0, 5)


@rows(
    ("a negative step", lambda: linear(-1), ValueError, "step: got -1, expected a number >= 0"),
    ("a step that is NaN", lambda: linear(math.nan), ValueError, "step: got nan, expected a number >= 0"),
    ("a schedule over no step", lambda: AnnealingSchedule.cosine(0.0, 1.0, 0), ValueError, "num_steps: got 0"),
    ("a schedule that ends in NaN", lambda: AnnealingSchedule.linear(0.0, math.nan, 5), ValueError,
     "end: got nan, expected a finite number"),
    ("a constant factor from 0", lambda: AnnealingSchedule.geometric(0.0, 1.0, 3), ValueError,
     "start: got 0.0, expected a positive number"),
    ("a ramp longer than its cycle", lambda: AnnealingSchedule.cyclical(0.0, 1.0, cycle_steps=3, ramp=1.5), ValueError,
     r"ramp: got 1.5, expected a part of the cycle in \(0, 1\]"),
    ("a clamp whose ends are reversed", lambda: linear.clamp(1.0, 0.0), ValueError,
     "low: got 1.0 above high=0.0, expected low <= high"),
    ("one point", lambda: AnnealingSchedule.quadratic([(0, 1.0)]), ValueError,
     r"points: got 1, expected at least two \(step, value\) pairs"),
    ("points of a schedule in the wrong order", lambda: AnnealingSchedule.quadratic([(5, 1.0), (1, 2.0)]), ValueError,
     r"points: steps are \[5.0, 1.0\], expected them to increase from 0 or more"),
    ("a number after a schedule", lambda: linear.then(0.5), TypeError,
     r"other: got 0.5, expected a schedule \(constant\(v\) for a number\)"),
    ("something after a schedule without end", lambda: AnnealingSchedule.cyclical(0.0, 1.0, cycle_steps=3).then(linear),
     ValueError, r"then: the first schedule has no end, expected one with num_steps \(constant\(v, num_steps\)\)"),
)  # fmt: skip
def test_schedules(row):
    check(row)
