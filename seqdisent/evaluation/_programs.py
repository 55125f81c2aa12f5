"""A model and its guide as the measures call them: clips in, the mean of the emission out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from seqdisent.chains.factorised import as_chain
from seqdisent.datasets import Batch, Clips
from seqdisent.inference.interventions import Inferred, forecast, generate, infer, reconstruct, swap


class Programs(NamedTuple):
    """What :func:`~seqdisent.evaluation.evaluate` is given of the model."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    static: tuple[str, ...]
    motion: tuple[str, ...]
    emission: str | None
    sample: bool
    history: bool
    inputs: Mapping[str, Any]

    def infer(self, *args: Tensor) -> dict[str, Inferred]:
        return infer(self.guide, *args, sample=self.sample, **self.inputs)

    def reconstruct(self, *args: Tensor) -> Tensor:
        how: dict[str, Any] = {"sample": self.sample, "history": self.history, **self.inputs}
        return self._mean(reconstruct(self.model, self.guide, *args, **how))

    def swap(self, source: Any, donor: Any, sites: Sequence[str], keep: Sequence[str] = ()) -> Tensor:
        how: dict[str, Any] = {"sites": sites, "keep": keep, "sample": self.sample, **self.inputs}
        return self._mean(swap(self.model, self.guide, source, donor, **how))

    def swap_static(self, source: Any, donor: Any) -> Tensor:
        """Return the donor's identity in the source's own motion, whatever the guide infers motion from."""
        return self.swap(source, donor, self.static, self.motion)

    def generate(self, num_sequences: int, num_steps: int, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return clips from the prior, or, where some latents are given, the mean that follows from them."""
        how: dict[str, Any] = {"num_sequences": num_sequences, "num_steps": num_steps, **self.inputs}
        how["emissions"] = None if self.emission is None else [self.emission]
        return self._mean(generate(self.model, given=given, sample=given is None or self.sample, **how))

    def forecast(self, *args: Tensor, num_steps: int) -> Tensor:
        how: dict[str, Any] = {"sample": self.sample, "history": self.history, **self.inputs}
        how["num_steps"] = num_steps
        return self._mean(forecast(self.model, self.guide, *args, **how))

    def _mean(self, emitted: Mapping[str, TorchDistribution]) -> Tensor:
        name = list(emitted)[-1] if self.emission is None else self.emission
        if name not in emitted:
            raise ValueError(f"emission: the model has no site {name!r}, expected one of {sorted(emitted)}")
        mean: Tensor = emitted[name].mean
        return mean


def frames_and_mask(batch: Batch) -> tuple[Tensor, ...]:
    """Return what the programs take: the mask only if there is padding."""
    return (batch.frames, batch.mask) if batch.ragged else (batch.frames,)


def is_trajectory(site: Inferred) -> bool:
    return as_chain(site.distribution) is not None


def batches(clips: Clips, size: int) -> Iterator[tuple[Tensor, Batch]]:
    for rows in torch.arange(len(clips)).split(size):
        yield rows, clips.batch(rows)


def motion_numbers(clips: Clips) -> Tensor | None:
    """Return one number for the motion factors of each clip, None if they are not known."""
    if not clips.motion_factors:
        return None
    labels = torch.stack([clips.labels[name] for name in clips.motion_factors])
    numbers: Tensor = torch.unique(labels, dim=1, return_inverse=True)[1]
    return numbers


def mean_frame(clips: Clips) -> Tensor:
    some = slice(None, None, max(1, len(clips) // 500))
    return clips.frames[some][clips.mask[some]].float().mean(0) / clips.scale
