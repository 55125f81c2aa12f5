"""What several examples' models are made of, and too small for the library."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import kl_divergence

from seqdisent import AnnealingSchedule, IndependentSteps, NormalHead, fill_padding

READ_AT_ONCE = ("cpu",)  # devices whose values can be looked at without waiting for them


def mlp(*sizes: int, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers from size to size, with ReLU between them, and dropout after it, if any."""
    layers: list[nn.Module] = []
    for a, b in zip(sizes[:-2], sizes[1:-1], strict=True):
        layers += [nn.Linear(a, b), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


def normal_mlp(*sizes: int) -> nn.Sequential:
    """Linear layers from size to size with ReLU between them; they end in a diagonal Normal of the last size."""
    return nn.Sequential(mlp(*sizes[:-1]), nn.ReLU(), NormalHead(sizes[-2], sizes[-1]))


def real_frames(frames: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Return frames in [0, 1] without what padding holds, which so stays out of values and gradients."""
    if frames is None:
        return None
    if mask is not None:
        frames = fill_padding(frames, mask, event_dims=frames.ndim - 2)
    if frames.device.type in READ_AT_ONCE and (frames.amin() < 0 or frames.amax() > 1):
        raise ValueError(f"frames: got values from {frames.amin():g} to {frames.amax():g}, expected all in [0, 1]")
    return frames


def bernoulli(
    logits: Tensor, mask: Tensor | None, event_dims: int = 1, drawn: Tensor | None = None
) -> TorchDistribution:
    """Return independent pixels or keys; between 0 and 1, it is a cross-entropy and not a normalised density."""
    step = dist.Bernoulli(logits=logits, validate_args=False).to_event(event_dims)
    return IndependentSteps(step, mask, drawn=drawn)


def windows(logits: Tensor, noise: Tensor, mask: Tensor | None) -> TorchDistribution:
    """Return independent windows of a signal in [0, 1] with one standard deviation, above 0.03."""
    window = dist.Normal(logits.sigmoid(), nn.functional.softplus(noise) + 0.03, validate_args=False).to_event(1)
    return IndependentSteps(window, mask)


def uniform_noise(like: Tensor, *shape: int) -> Tensor:
    """Sample what decides which keys are pressed, in a site that is no emission; at its mean, the likelier is."""
    noise = dist.Uniform(like.new_zeros(shape), 1.0, validate_args=False).to_event(len(shape))
    return pyro.sample("noise", noise, infer={"is_auxiliary": True})


def pressed(logits: Tensor, noise: Tensor) -> Tensor:
    """Draw keys: each is pressed where its probability exceeds its noise, uniform in [0, 1]."""
    return (logits.sigmoid() > noise).to(logits.dtype)


def factor(name: str, log_factor: Tensor) -> None:
    """Be `pyro.factor` without its check of the values, which waits for the device.

    It counts among the log-likelihoods of the ledger, whose sum is then no bound.
    """
    unit = dist.Unit(log_factor, validate_args=False)
    pyro.sample(name, unit, obs=unit.sample(), infer={"is_auxiliary": True})


def disagreement(one: TorchDistribution, other: TorchDistribution) -> Tensor:
    """Return KL(one || other) + KL(other || one)."""
    both: Tensor = kl_divergence(one, other) + kl_divergence(other, one)
    return both


def unstack(normals: TorchDistribution) -> list[TorchDistribution]:
    """Return the Normals of vectors that a batch (N, *B) of them holds, N of them."""
    loc, scale = normals.base_dist.loc, normals.base_dist.scale
    return [dist.Normal(*each, validate_args=False).to_event(1) for each in zip(loc, scale, strict=True)]


def warmed_up(rate: float, warm_up: int, num_steps: int, *, decays: bool = True) -> AnnealingSchedule:
    """Return a learning rate that rises over the first steps (half of all, at most), then falls to 0 along a cosine."""
    warm_up = max(1, min(warm_up, num_steps // 2))
    rises = AnnealingSchedule.linear(rate / warm_up, rate, warm_up)
    return rises.then(AnnealingSchedule.cosine(rate, 0.0, max(1, num_steps - warm_up))) if decays else rises


def standard_normal(like: Tensor, *shape: int) -> TorchDistribution:
    """Return N(0, 1) with a vector as event, in the device and dtype of `like`."""
    return dist.Normal(like.new_zeros(shape), 1.0, validate_args=False).to_event(1)


def beside(steps: Tensor, s: Tensor | None) -> Tensor:
    """Return vectors of steps (*B, T, X) with what does not change, (*S, *B, D), beside each; None for nothing."""
    if s is None:
        return steps
    steps = steps.expand(*s.shape[:-1], *steps.shape[-2:])
    return torch.cat([steps, s.unsqueeze(-2).expand(*steps.shape[:-1], -1)], -1)
