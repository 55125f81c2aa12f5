"""What pictures of imputations and forecasts show: a few sequences with draws of what the model did not see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from seqdisent.datasets import Batch, Sequences
from seqdisent.evaluation._programs import Programs
from seqdisent.evaluation._series import Asked, draw_future, hide_some, hold_back, impute_hidden

NUM_SEQUENCES, NUM_COORDINATES = 3, 3  # what fits into a picture

Panels = Mapping[str, Any]
"""Arguments of :func:`~seqdisent.plotting.plot_intervals`."""


def draw_intervals(programs: Programs, held_out: Sequences, asked: Asked) -> dict[str, Panels]:
    """Return {name of the file: panels} of what :func:`~seqdisent.evaluation._series.measure_series` measures."""
    found = {}
    if share := asked.share_of(held_out):
        torch.manual_seed(asked.seed)
        hidden = hide_some(held_out, share, asked.seed)
        found["imputation.png"] = _of_imputation(programs, held_out, hidden, asked.num_samples)
    if asked.forecast_steps:
        torch.manual_seed(asked.seed)
        parts = hold_back(held_out, asked.forecast_steps, asked.season)
        found["forecast.png"] = _of_forecast(programs, *parts, asked.num_samples)
    return found


def _of_imputation(programs: Programs, data: Sequences, hidden: Tensor, num_samples: int) -> Panels:
    rows = _spread(data)
    batch = data.batch(rows)
    chosen = hidden[rows][:, : batch.frames.shape[1]]
    draws = impute_hidden(programs, batch, chosen, num_samples).values
    return _panels(programs, data, rows, batch, draws, chosen)


def _of_forecast(programs: Programs, whole: Sequences, before: Sequences, after: Sequences, num_samples: int) -> Panels:
    rows = _spread(whole)
    batch, past = whole.batch(rows), before.batch(rows)
    _, future = draw_future(programs, past, after.batch(rows), num_samples)
    later = batch.mask.clone()
    later[:, : past.mask.shape[1]] &= ~past.mask
    draws = torch.full((num_samples, *batch.frames.shape), torch.nan, dtype=future.dtype, device=future.device)
    draws[:, later] = future.flatten(1, 2)
    return _panels(programs, whole, rows, batch, draws, later)


def _spread(data: Sequences) -> Tensor:
    return torch.linspace(0, len(data) - 1, min(NUM_SEQUENCES, len(data))).long()


def _panels(programs: Programs, data: Sequences, rows: Tensor, batch: Batch, draws: Tensor, hidden: Tensor) -> Panels:
    shape = batch.frames.shape
    known = {"observed": batch.mask if batch.observed is None else batch.observed, "hidden": hidden}
    by_value = {name: of.reshape(of.shape + (1,) * (len(shape) - of.ndim)).expand(shape) for name, of in known.items()}
    shown = {"values": programs.in_units(batch.frames), "draws": programs.in_units(draws), **by_value}
    return {
        **{name: of.flatten(3 if name == "draws" else 2)[..., :NUM_COORDINATES].cpu() for name, of in shown.items()},
        "mask": batch.mask.cpu(),
        "names": [data.names[row] for row in rows.tolist()],
        "columns": None if data.columns is None else list(data.columns[:NUM_COORDINATES]),
    }
