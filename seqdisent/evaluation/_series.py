"""Values that were hidden and steps that were held back, scored by draws, beside guesses without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqdisent.datasets import Batch, Sequences
from seqdisent.datasets.batch import frames_and_mask
from seqdisent.evaluation._programs import Programs, batches, coordinate_names, frozen_step, mean_frame, measured_steps
from seqdisent.inference.imputation import Imputed
from seqdisent.masks import steps_after
from seqdisent.metrics import (
    CRPS,
    IntervalCoverage,
    linear_interpolation,
    seasonal_naive,
    seasonal_naive_draws,
)
from seqdisent.metrics._draws import known_places


class Asked(NamedTuple):
    """What is asked of draws, as of :func:`~seqdisent.evaluation.evaluate`; 0 steps for no forecast."""

    forecast_steps: int
    season: int | None
    hidden: float | None
    num_samples: int
    seed: int
    batch_size: int

    def share_of(self, data: Sequences) -> float:
        """Return what share of the measured values is hidden."""
        default = 0.0 if data.observed is None else 0.15
        return default if self.hidden is None else self.hidden


class DrawScores:
    """Squared error, CRPS and coverage of guesses and of draws, over all scored values of all batches.

    Of all coordinates together, and of each of those that have a name.
    """

    def __init__(self, coordinates: Sequence[str] = ()) -> None:
        self.coordinates = {name: DrawScores() for name in coordinates}
        self.crps, self.coverage = CRPS(), IntervalCoverage()
        self.total = torch.zeros((), dtype=torch.float64)
        self.count, self.has_draws = 0, False

    def update(self, guess: Tensor, draws: Tensor | None, target: Tensor, observed: Tensor) -> None:
        r"""Add guesses (B, T, \*E) and draws (S, B, T, \*E); without draws, CRPS is the absolute error of the guess."""
        scored = known_places(target, None, observed)
        self.total += torch.where(scored, guess - target, 0.0).square().sum(dtype=torch.float64).cpu()
        self.count += int(scored.sum())
        if draws is None:
            draws = guess.expand(2, *guess.shape)
        else:
            self.has_draws = True
            self.coverage.update(draws, target, None, observed)
        self.crps.update(draws, target, None, observed)
        for i, scores in enumerate(self.coordinates.values()):
            of_values = observed[..., i] if observed.ndim > 2 else observed
            scores.update(guess[..., i], draws[..., i] if self.has_draws else None, target[..., i], of_values)

    def compute(self) -> dict[str, Any]:
        scores: dict[str, Any] = {"mean_squared_error": self.total / self.count, "crps": self.crps.compute()}
        if self.has_draws:
            for name, of in self.coverage.compute()._asdict().items():
                scores[name] = {f"{100 * level:g}": value for level, value in of.items()}
        if self.coordinates:
            scores["coordinates"] = {name: of.compute() for name, of in self.coordinates.items() if of.count}
        return scores


def scores_of(names: Sequence[str], data: Sequences) -> dict[str, DrawScores]:
    """Return scores for each of the names, of each coordinate too where there are several."""
    coordinates = coordinate_names(data)
    return {name: DrawScores(coordinates if len(coordinates) > 1 else ()) for name in names}


def hide_some(data: Sequences, share: float, seed: int) -> Tensor:
    r"""Choose what to hide, by step (N, T) or, where the data say so of each value, by value (N, T, \*E).

    Something is left of each sequence.

    Raises:
        ValueError: nothing is hidden.
    """
    observed = data.mask if data.observed is None else data.observed
    drawn = torch.rand(observed.shape, generator=torch.Generator().manual_seed(seed)).to(observed.device)
    hidden = observed & (drawn < share)
    keeps_some = (observed & ~hidden).flatten(1).any(1)
    hidden = hidden & keeps_some.reshape(-1, *[1] * (hidden.ndim - 1))
    if not hidden.any():
        raise ValueError(
            f"hidden: got {share}, which hides nothing of {len(data)} sequences, expected a larger share, or sequences "
            "with more than one measured value"
        )
    return hidden


def without_hidden(batch: Batch, hidden: Tensor) -> Batch:
    """Return the batch as if what is hidden had not been measured."""
    visible = (batch.mask if batch.observed is None else batch.observed) & ~hidden
    return batch._replace(
        frames=torch.where(known_places(batch.frames, batch.mask, visible), batch.frames, 0.0), observed=visible
    )


def in_units(programs: Programs, guess: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return programs.in_units(guess), None if draws is None else programs.in_units(draws)


def impute_hidden(programs: Programs, batch: Batch, hidden: Tensor, num_samples: int) -> Imputed:
    return programs.impute(*frames_and_mask(without_hidden(batch, hidden)), num_samples=num_samples)


def measure_series(programs: Programs, train: Sequences, held_out: Sequences, asked: Asked) -> dict[str, Any]:
    """Measure imputations and forecasts, where these are asked for."""
    numbers: dict[str, Any] = {}
    if asked.share_of(held_out):
        torch.manual_seed(asked.seed)
        numbers["imputation"] = measure_imputation(programs, train, held_out, asked)
    if asked.forecast_steps:
        torch.manual_seed(asked.seed)
        numbers["forecast"] = measure_held_back(programs, train, held_out, asked)
    return numbers


def measure_imputation(programs: Programs, train: Sequences, held_out: Sequences, asked: Asked) -> dict[str, Any]:
    """Measure what the model says of what was measured and hidden from it."""
    hidden = hide_some(held_out, asked.share_of(held_out), asked.seed)
    scores = scores_of(("model", "linear interpolation", "mean step"), held_out)
    mean = mean_frame(train)
    for rows, batch in batches(held_out, asked.batch_size):
        chosen = hidden[rows][:, : batch.frames.shape[1]]
        imputed = impute_hidden(programs, batch, chosen, asked.num_samples)
        seen = without_hidden(batch, chosen)
        known = known_places(seen.frames, batch.mask, seen.observed)
        times = None if held_out.times is None else held_out.times[rows][:, : batch.frames.shape[1]]
        line = linear_interpolation(seen.frames, known, batch.mask, times=times)
        guesses: dict[str, tuple[Tensor, Tensor | None]] = {
            "model": (imputed.distribution.mean.mean(0), imputed.values),
            "linear interpolation": (torch.where(known.any(1, keepdim=True), line, mean), None),
            "mean step": (mean.expand_as(batch.frames), None),
        }
        for name, guess in guesses.items():
            scores[name].update(*in_units(programs, *guess), programs.in_units(batch.frames), chosen)
    return {
        "hidden_values": scores["model"].count,
        "num_samples": asked.num_samples,
        **{name: of.compute() for name, of in scores.items()},
    }


def hold_back(data: Sequences, num_steps: int, season: int | None) -> tuple[Sequences, Sequences, Sequences]:
    """Return whole sequences, what comes before their last `num_steps` steps, and these.

    A sequence is left out if it has no step before, or no more than a season, or if nothing was measured on one side.

    Raises:
        ValueError: all are left out.
    """
    later = torch.arange(data.values.shape[1], device=data.lengths.device) >= (data.lengths - num_steps)[:, None]
    seen = measured_steps(data)
    fits = (data.lengths > num_steps + (season or 0)) & (seen & ~later).any(1) & (seen & later).any(1)
    if not fits.any():
        more = "" if season is None else f" after a season of {season}"
        raise ValueError(
            f"forecast_steps: got {num_steps}, expected fewer: no held-out sequence goes on for so long{more}, with "
            "something measured before and after"
        )
    whole = data.subset(fits)
    return (whole, *whole.split(num_steps, by="time"))


def draw_future(programs: Programs, past: Batch, future: Batch, num_samples: int) -> tuple[Tensor, Tensor]:
    r"""Return the mean (B, H, \*E) and draws (S, B, H, \*E) of the H steps that follow each sequence's own last one."""
    num_steps = future.frames.shape[1]
    how: dict[str, Any] = {"num_steps": num_steps, "num_samples": num_samples, "covariates": future.covariates}
    emitted = programs.draw_forecast(*frames_and_mask(past), **how)
    means, draws = (
        steps_after(of, past.mask, num_steps, event_dims=future.frames.ndim - 2)
        for of in (emitted.mean, emitted.sample())
    )
    return means.mean(0), draws


def measure_held_back(programs: Programs, train: Sequences, held_out: Sequences, asked: Asked) -> dict[str, Any]:
    """Measure forecasts of the last steps of sequences from the steps before."""
    num_steps, season, num_samples = asked.forecast_steps, asked.season, asked.num_samples
    _, before, after = hold_back(held_out, num_steps, season)
    mean = mean_frame(train)
    generator = torch.Generator().manual_seed(asked.seed)
    names = ("model", "last step, frozen", *(() if season is None else ("seasonal naive",)), "mean step")
    scores = scores_of(names, held_out)
    for rows, past in batches(before, asked.batch_size):
        future = after.batch(rows)
        guesses: dict[str, tuple[Tensor, Tensor | None]] = {
            "model": draw_future(programs, past, future, num_samples),
            "mean step": (mean.expand_as(future.frames), None),
        }
        guesses["last step, frozen"] = frozen_step(past, num_steps, mean), None
        if season is not None:
            known = known_places(past.frames, past.mask, past.observed).any(1, keepdim=True)
            how: dict[str, Any] = {"mask": past.mask, "observed": past.observed}
            naive = seasonal_naive(past.frames, num_steps, season, **how)
            drawn = seasonal_naive_draws(past.frames, num_steps, season, num_samples, generator, **how)
            guesses["seasonal naive"] = torch.where(known, naive, mean), torch.where(known, drawn, mean)
        for name, scored in scores.items():
            observed = future.mask if future.observed is None else future.observed
            scored.update(*in_units(programs, *guesses[name]), programs.in_units(future.frames), observed)
    return {
        "num_steps": num_steps,
        "sequences": len(before),
        "num_samples": num_samples,
        **{name: of.compute() for name, of in scores.items()},
    }
