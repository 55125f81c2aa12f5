"""A model and its guide as the measures call them: sequences in, the mean of the emission, or draws of it, out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from seqdisent.chains.factorised import as_chain
from seqdisent.datasets import Batch, Clips, Scaler, Sequences
from seqdisent.datasets.batch import frames_and_mask
from seqdisent.inference.forecasting import forecast
from seqdisent.inference.imputation import Imputed, impute
from seqdisent.inference.interventions import Inferred, generate, infer, reconstruct, swap
from seqdisent.inference.programs import carries_on, is_auxiliary, run
from seqdisent.metrics import seasonal_naive
from seqdisent.metrics._draws import known_places


class Latent(NamedTuple):
    """Which of the two programs says that a latent is a trajectory."""

    in_guide: bool
    in_model: bool

    @property
    def is_trajectory(self) -> bool:
        return self.in_guide or self.in_model


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
    scaler: Scaler | None = None  # of the sequences
    latents: Mapping[str, Latent] = {}
    can_forecast: bool = False  # whether the frames given bear on those that follow

    def looked_at(self, data: Sequences) -> Programs:
        """Return the same with `latents` and `can_forecast`, found by a run of both programs on the first sequence.

        Raises:
            ValueError: `static` or `motion` has a name that the guide does not have.
        """
        batch = data.batch([0])
        args = frames_and_mask(batch)
        inferred = run(self.guide, {}, self.sample, args, self.inputs)
        values = {name: site["value"] for name, site in inferred.items() if not is_auxiliary(site)}
        for argument, names in (("static", self.static), ("motion", self.motion)):
            if unknown := sorted(set(names) - set(values)):
                raise ValueError(f"{argument}: the guide has no site {unknown}, expected some of {sorted(values)}")
        how: dict[str, Any] = {"num_sequences": 1, "num_steps": batch.frames.shape[1], **self._inputs(batch.covariates)}
        if self.history:
            how["history"] = (batch.frames, batch.observed)
        sites = run(self.model, values, self.sample, (), how, num_steps=batch.frames.shape[1])
        latents = {
            name: Latent(as_chain(inferred[name]["fn"]) is not None, as_chain(sites[name]["fn"]) is not None)
            for name in values
            if name in sites
        }
        emitted = [site["fn"] for name, site in sites.items() if name not in values]
        goes_on_alone = any(as_chain(fn) is not None and carries_on(fn) for fn in emitted)  # `forecast` refuses it
        carried = any(carries_on(sites[name]["fn"]) for name in latents) and not goes_on_alone
        return self._replace(latents=latents, can_forecast=self.history or carried)

    def in_units(self, values: Tensor) -> Tensor:
        r"""Return values (\*S, B, T, \*E) in the units that they had before the scaler."""
        return values if self.scaler is None else self.scaler.undo(values)

    def infer(self, *args: Tensor | None) -> dict[str, Inferred]:
        return infer(self.guide, *args, sample=self.sample, **self.inputs)

    def reconstruct(self, *args: Tensor | None) -> Tensor:
        how: dict[str, Any] = {"sample": self.sample, "history": self.history, **self.inputs}
        return self._mean(reconstruct(self.model, self.guide, *args, **how))

    def first_steps(self, inferred: Mapping[str, Inferred]) -> dict[str, Tensor]:
        """Return the values of latents, of every trajectory that the model can continue only the first step."""
        return {
            name: site.value.narrow(site.value.ndim - site.distribution.event_dim, 0, 1)
            if self.latents[name].in_model
            else site.value
            for name, site in inferred.items()
            if name in self.latents
        }

    def swap(
        self, source: Batch, donor: Batch, sites: Sequence[str], keep: Sequence[str] = ()
    ) -> tuple[Tensor, Tensor]:
        """Return the swapped clips and their mask: the donor's if a trajectory comes from it, else the source's."""
        how: dict[str, Any] = {"sites": sites, "keep": keep, "sample": self.sample, **self.inputs}
        swapped = swap(self.model, self.guide, frames_and_mask(source), frames_and_mask(donor), **how)
        brings_length = any(self.latents[name].in_guide for name in sites)
        return self._mean(swapped), donor.mask if brings_length else source.mask

    def swap_static(self, source: Batch, donor: Batch) -> tuple[Tensor, Tensor]:
        """Return the donor's identity in the source's own motion, whatever the guide infers motion from."""
        return self.swap(source, donor, self.static, self.motion)

    def generate(
        self,
        num_sequences: int,
        num_steps: int,
        given: Mapping[str, Tensor] | None = None,
        covariates: Tensor | None = None,
    ) -> Tensor:
        """Return sequences from the prior, or, where some latents are given, the mean that follows from them."""
        how: dict[str, Any] = {"num_sequences": num_sequences, "num_steps": num_steps, **self._inputs(covariates)}
        how["emissions"] = None if self.emission is None else [self.emission]
        return self._mean(generate(self.model, given=given, sample=given is None or self.sample, **how))

    def forecast(self, *args: Tensor | None, num_steps: int) -> Tensor:
        how: dict[str, Any] = {"sample": self.sample, "history": self.history, **self.inputs}
        how["num_steps"] = num_steps
        return self._mean(forecast(self.model, self.guide, *args, **how))

    def draw_forecast(
        self, *args: Tensor | None, num_steps: int, num_samples: int, covariates: Tensor | None
    ) -> TorchDistribution:
        """Return the emission, with `num_samples` futures on the left; `covariates` are those of the steps to come."""
        how: dict[str, Any] = {"num_steps": num_steps, "num_samples": num_samples, "history": self.history}
        how["future"] = None if covariates is None else {"covariates": covariates}
        return self._emission(forecast(self.model, self.guide, *args, **how, **self.inputs))

    def impute(self, *args: Tensor | None, num_samples: int) -> Imputed:
        how: dict[str, Any] = {"num_samples": num_samples, "emission": self.emission, "history": self.history}
        return impute(self.model, self.guide, *args, **how, **self.inputs)

    def _inputs(self, covariates: Tensor | None) -> dict[str, Any]:
        return {**self.inputs} if covariates is None else {**self.inputs, "covariates": covariates}

    def _mean(self, emitted: Mapping[str, TorchDistribution]) -> Tensor:
        mean: Tensor = self._emission(emitted).mean
        return mean

    def _emission(self, emitted: Mapping[str, TorchDistribution]) -> TorchDistribution:
        name = list(emitted)[-1] if self.emission is None else self.emission
        if name not in emitted:
            raise ValueError(f"emission: the model has no site {name!r}, expected one of {sorted(emitted)}")
        return emitted[name]


def batches(data: Sequences, size: int) -> Iterator[tuple[Tensor, Batch]]:
    for rows in torch.arange(len(data)).split(size):
        yield rows, data.batch(rows)


def coordinate_names(data: Sequences) -> list[str]:
    """Return what the coordinates of steps that are vectors are called, by default their numbers; else none."""
    if data.values.ndim != 3:
        return []
    return list(data.columns or map(str, range(data.values.shape[2])))


def motion_numbers(data: Sequences) -> Tensor | None:
    """Return one number for the motion factors of each sequence, None if they are not known."""
    if not data.motion_factors:
        return None
    labels = torch.stack([data.labels[name] for name in data.motion_factors])
    numbers: Tensor = torch.unique(labels, dim=1, return_inverse=True)[1]
    return numbers


def true_frames(clips: Clips, content: Tensor, motion: Tensor, num_steps: int | None = None) -> Tensor:
    """Return true swaps in the unit of a batch."""
    return clips.true_swap(content, motion, num_steps=num_steps).float() / clips.scale


def mean_frame(data: Sequences) -> Tensor:
    """Return the mean step, of clips that of some: of each coordinate, the mean of what was observed, or 0."""
    every, scale = (max(1, len(data) // 500), data.scale) if isinstance(data, Clips) else (1, 1)
    some = slice(None, None, every)
    values, mask = data.values[some], data.mask[some]
    values = values if values.is_floating_point() else values.float()
    if data.observed is None:
        return values[mask].mean(0) / scale
    known = known_places(values, mask, data.observed[some])
    return torch.where(known, values, 0.0).sum((0, 1)) / known.sum((0, 1)).clamp(min=1) / scale


def frozen_step(batch: Batch, num_steps: int, mean: Tensor) -> Tensor:
    """Return what was last observed of each coordinate, `num_steps` times; of what never was, the mean step."""
    known = known_places(batch.frames, batch.mask, batch.observed).any(1, keepdim=True)
    last = seasonal_naive(batch.frames, num_steps, 1, mask=batch.mask, observed=batch.observed)
    return torch.where(known, last, mean)


def measured_steps(data: Sequences) -> Tensor:
    """Return the real steps (N, T) of which something was observed."""
    if data.observed is None:
        return data.mask
    steps: Tensor = data.observed.flatten(2).any(2) if data.observed.ndim > 2 else data.observed
    return steps & data.mask
