"""Checks of what an evaluation is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from seqdisent._checks import check_positive, is_integer
from seqdisent.datasets import Clips, Scaler, Sequences
from seqdisent.metrics import Judge


def check_programs(model: Any, guide: Any, static: Sequence[str], motion: Sequence[str]) -> None:
    for argument, program in (("model", model), ("guide", guide)):
        module = getattr(program, "__self__", program)
        if isinstance(module, nn.Module) and module.training:
            raise ValueError(f"{argument}: {type(module).__name__} is in training mode, expected .eval() before")
    for argument, sites in (("static", static), ("motion", motion)):
        if isinstance(sites, str):
            raise TypeError(f"{argument}: got the string {sites!r}, expected a sequence of site names")
    if both := sorted(set(static) & set(motion)):
        raise ValueError(f"motion: {both} are in `static` too, expected each site in one of the two")


def check_data(train: Sequences, held_out: Sequences, candidates: Clips | None) -> None:
    if isinstance(train, Clips) != isinstance(held_out, Clips):
        raise TypeError(
            f"train: got {type(train).__name__}, expected {type(held_out).__name__} as held_out: both Clips or neither"
        )
    for argument, clips in (("train", train), ("held_out", held_out), ("candidates", candidates)):
        if isinstance(clips, Clips) and clips.covariates is not None:  # clips from the prior have none
            raise ValueError(
                f"{argument}: got Clips with `covariates`, expected Clips without, or Sequences of numbers, which are "
                "evaluated with them: Sequences(clips.frames / clips.scale, covariates=clips.covariates, ...)"
            )
    if candidates is not None and candidates.observed is not None:
        raise ValueError("candidates: got Clips with `observed`, expected whole clips, which a swap is compared with")
    shape, num_steps = tuple(held_out.values.shape[2:]), int(held_out.lengths.max())
    if candidates is not None and bool((held_out.lengths == num_steps).all()):  # else there is no retrieval
        lengths = sorted(set(candidates.lengths.tolist()))
        if lengths != [num_steps] or tuple(candidates.values.shape[2:]) != shape:
            raise ValueError(
                f"candidates: have lengths {lengths} and steps of shape {tuple(candidates.values.shape[2:])}, expected "
                f"{num_steps} and {shape}, as the held-out clips"
            )


def check_labels(
    train: Sequences, held_out: Sequences, candidates: Clips | None, judge: Any, factors: Sequence[str] | None
) -> None:
    if isinstance(factors, str):
        raise TypeError(f"factors: got the string {factors!r}, expected a sequence of labels")
    known = sorted(set(train.labels) & set(held_out.labels))
    if judge is None and factors:
        raise ValueError(f"factors: got {list(factors)}, expected None with judge=None, which leaves out all labels")
    if judge is not None:
        _check_names("held_out", held_out, "train", train)
    if candidates is not None:
        _check_names("candidates", candidates, "held_out", held_out)
    if unknown := sorted(set(factors or ()) - set(known)):
        raise ValueError(f"factors: the clips have no label {unknown}, expected some of {known}")


def _check_names(argument: str, data: Sequences, other_argument: str, other: Sequences) -> None:
    """Check that labels of both are called the same: else the same number is another value."""
    for name in sorted(set(data.labels) & set(other.labels)):
        names, wanted = data.factor_names[name], other.factor_names[name]
        if names != wanted:
            raise ValueError(
                f"{argument}: factor {name!r} has other values than that of {other_argument} ({len(names)} and "
                f"{len(wanted)}), expected the same; pass the same factor_names to both"
            )


def check_kind(
    held_out: Sequences,
    candidates: Clips | None,
    forecast_steps: int | None,
    season: int | None,
    hidden: float | None,
    num_samples: int | None,
    scaler: Any,
) -> None:
    """Check that what is asked for is for this kind of data."""
    if not isinstance(held_out, Clips):
        if candidates is not None:
            raise ValueError(f"candidates: got {len(candidates)} clips, expected None where `held_out` is no Clips")
        if season is not None and not forecast_steps:
            raise ValueError(
                f"season: got {season}, expected None with forecast_steps={forecast_steps}, or `forecast_steps` of at "
                "least 1, to forecast them"
            )
        return
    asked = {"season": season, "hidden": hidden, "num_samples": num_samples, "scaler": scaler}
    for argument, value in asked.items():
        if value:
            raise ValueError(f"{argument}: got {value}, expected None where `held_out` is Clips")


def check_units(train: Sequences, held_out: Sequences, scaler: Any) -> None:
    """Check that both data sets, and the scaler, have the same coordinates."""
    if None not in (train.columns, held_out.columns) and train.columns != held_out.columns:
        raise ValueError(f"held_out: has columns {held_out.columns}, expected those of train, {train.columns}")
    if scaler is None:
        return
    if not isinstance(scaler, Scaler):
        raise TypeError(f"scaler: got {type(scaler).__name__}, expected a Scaler, or None")
    try:
        scaler.undo(held_out.values[:1])
    except ValueError as error:
        wanted, found = tuple(held_out.values.shape[2:]), tuple(scaler.loc.shape)
        raise ValueError(f"scaler: is of steps of shape {found}, expected {wanted}, as held_out") from error


def check_numbers(
    forecast_steps: int | None, season: int | None, hidden: float | None, num_samples: int | None, batch_size: int
) -> None:
    check_positive(batch_size=batch_size)
    if forecast_steps is not None and (not is_integer(forecast_steps) or forecast_steps < 0):
        raise ValueError(f"forecast_steps: got {forecast_steps!r}, expected an integer >= 0, or None")
    if season is not None:
        check_positive(season=season)
    if hidden is not None and not 0 <= hidden < 1:
        raise ValueError(f"hidden: got {hidden!r}, expected a share of at least 0 and below 1, or None")
    if num_samples is not None and (not is_integer(num_samples) or num_samples < 2):
        raise ValueError(f"num_samples: got {num_samples!r}, expected an integer >= 2, or None")


def check_judge(judge: Any, train: Sequences, held_out: Sequences) -> None:
    if judge is not None and not isinstance(judge, int | Judge):
        raise TypeError(
            f"judge: got {type(judge).__name__}, expected a Judge, a number of steps to train one, or None; "
            "predictions of another classifier go into seqdisent.metrics.SwapAccuracy"
        )
    if isinstance(judge, Judge) and not isinstance(held_out, Clips):
        raise TypeError("judge: got a Judge, which sees Clips, expected a number or None for other Sequences")
    if isinstance(judge, Judge) and has_holes(train, held_out):
        raise ValueError(
            "judge: got a Judge with clips that have `observed`, expected a number or None: it would read a hole as 0, "
            "and no clip of a model has holes"
        )


def has_holes(train: Sequences, held_out: Sequences) -> bool:
    return train.observed is not None or held_out.observed is not None
