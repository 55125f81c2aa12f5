"""What several examples' models are made of, and too small for the library."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from seqdisent import MixtureOfExpertsConvDecoder, NormalHead, overwrite_padding
from seqdisent._checks import reads_at_once


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers from size to size, with ReLU between them."""
    layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def normal_mlp(*sizes: int) -> nn.Sequential:
    """Linear layers from size to size with ReLU between them; they end in a diagonal Normal of the last size."""
    return nn.Sequential(mlp(*sizes[:-1]), nn.ReLU(), NormalHead(sizes[-2], sizes[-1]))


class ConvDecoder(MixtureOfExpertsConvDecoder):
    """One decoder for all sequences: a bank of one."""

    def __init__(self, latent_dim: int, frame_shape: tuple[int, int, int], channels: tuple[int, ...] | None) -> None:
        super().__init__(latent_dim, 1, out_channels=frame_shape[0], image_size=frame_shape[1], channels=channels)

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z, z.new_ones(*z.shape[:-2], 1))


def lengths(frames: Tensor | None, num_sequences: int | None, num_steps: int | None) -> tuple[int, int]:
    """Return how many sequences of how many steps a model has: as the frames, or as asked where there are none."""
    if frames is not None:
        return frames.shape[0], frames.shape[1]
    if num_sequences is None or num_steps is None:
        raise ValueError("num_sequences, num_steps: got None without frames, expected both")
    return num_sequences, num_steps


def real_frames(frames: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Return frames in [0, 1] without what padding holds, which so stays out of values and gradients."""
    if frames is None:
        return None
    if mask is not None:
        frames = overwrite_padding(frames, mask, event_dims=frames.ndim - 2)
    if reads_at_once(frames) and (frames.amin() < 0 or frames.amax() > 1):
        raise ValueError(f"frames: got values from {frames.amin():g} to {frames.amax():g}, expected all in [0, 1]")
    return frames


def of_real_steps(step: TorchDistribution, mask: Tensor | None) -> TorchDistribution:
    """Return independent steps as one distribution of a sequence, in which padding counts nothing."""
    return (step if mask is None else step.mask(mask)).to_event(1)


def bernoulli(logits: Tensor, mask: Tensor | None, event_dims: int = 1) -> TorchDistribution:
    """Return independent pixels or keys; between 0 and 1, it is a cross-entropy and not a normalised density."""
    return of_real_steps(dist.Bernoulli(logits=logits, validate_args=False).to_event(event_dims), mask)


def factor(name: str, log_factor: Tensor) -> None:
    """Be `pyro.factor` without its check of the values, which waits for the device."""
    unit = dist.Unit(log_factor, validate_args=False)
    pyro.sample(name, unit, obs=unit.sample(), infer={"is_auxiliary": True})


def standard_normal(like: Tensor, *shape: int) -> TorchDistribution:
    """Return N(0, 1) with a vector as event, in the device and dtype of `like`."""
    return dist.Normal(like.new_zeros(shape), 1.0, validate_args=False).to_event(1)


def fed_back(own, history, prepare=lambda frames: frames):
    """Return what a chain reads where nothing is observed: frames of the history, and after them the model's `own`.

    Args:
        own: the model's frame of z and h.
        history: (frames, mask) so far, or None.
        prepare: what is made of a frame before it is read.
    """

    def inputs(z_prev: Tensor, state: Tensor, t: int) -> Tensor:
        frame = own(z_prev, state)
        if history is not None and t <= history[0].shape[1]:
            frames, mask = history
            known = frames[:, t - 1] if mask is None else torch.where(mask[:, t - 1, None], frames[:, t - 1], frame)
            frame = known.expand_as(frame)
        return prepare(frame)

    return inputs


def previous(values: Tensor) -> Tensor:
    """Return (B, T, X) one step late; what comes first is never read."""
    return torch.cat([values[:, :1], values[:, :-1]], 1)
