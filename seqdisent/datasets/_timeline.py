"""Which rows of a long table make up each sequence, and at which of its steps each stands."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from seqdisent.datasets._columns import Floats, as_times

Rows = npt.NDArray[np.intp]


class Part(NamedTuple):
    """The rows of one id."""

    who: Any
    rows: Rows
    """Rows of the table, in the order of time."""
    steps: Rows
    """Which step of the sequence each of them is."""
    gaps: Floats | None = None
    """Time from each step to the next one."""

    def place(self, column: Floats) -> Floats:
        """Return what the table holds (rows, X) by step, (T, X), NaN at steps without a row."""
        placed = np.full((self.steps[-1] + 1, column.shape[1]), np.nan)
        placed[self.steps] = column[self.rows]
        return placed


def parts_of(ids: Sequence[Any]) -> list[Part]:
    """Group rows by id, in the order in which the ids first come."""
    groups: dict[Any, list[int]] = {}
    for row, who in enumerate(ids):
        groups.setdefault(who, []).append(row)
    return [Part(who, np.array(rows), np.arange(len(rows))) for who, rows in groups.items()]


def put_in_time(
    name: str,
    column: npt.NDArray[Any],
    ids: Sequence[Any],
    parts: Sequence[Part],
    *,
    step: float | timedelta | np.timedelta64 | None,
    sort: bool,
    has_id: bool = True,
) -> list[Part]:
    """Order the rows of each id by time; with `step`, count steps in it from the first time of each id on.

    Without an id, all rows are one sequence, which may be why their times do not fit.

    Raises:
        ValueError: no time, times that are out of order or come twice, or that do not fit `step`.
    """
    times = as_times(name, column, ids)
    placed = []
    for part in parts:
        rows = part.rows[times[part.rows].argsort(kind="stable")] if sort else part.rows
        gaps = np.diff(times[rows])
        if (gaps <= 0).any():
            at = int((gaps <= 0).argmax())
            was, now = column[rows[at]], column[rows[at + 1]]
            whose = f" at id {part.who!r}" if has_id else ""
            several = "" if has_id else "; or id=, the column that tells several sequences apart"
            if gaps[at] == 0:
                raise ValueError(f"column {name!r}: got {now} twice{whose}, expected each time once{several}")
            raise ValueError(
                f"column {name!r}: got {now} after {was}{whose}, expected times in order, or sort=True{several}"
            )
        placed.append(Part(part.who, rows, part.steps, gaps))
    return (
        placed if step is None else [_on_grid(name, column, times, part, as_spacing("step", step)) for part in placed]
    )


def _on_grid(name: str, column: npt.NDArray[Any], times: Floats, part: Part, spacing: float) -> Part:
    since = (times[part.rows] - times[part.rows[0]]) / spacing
    steps = since.round()
    off = np.abs(since - steps) > 1e-3
    off[1:] |= np.diff(steps) == 0
    if off.any():
        at = part.rows[int(off.argmax())]
        raise ValueError(
            f"column {name!r}: {column[at]} at id {part.who!r} is not a whole number of steps of {spacing:g} after "
            f"{column[part.rows[0]]}, expected regular times, or step=None"
        )
    return Part(part.who, part.rows, steps.astype(np.intp), np.full(int(steps[-1]), spacing))


def as_spacing(argument: str, spacing: float | timedelta | np.timedelta64) -> float:
    """Return a spacing of times in seconds, or as the number that it is."""
    if isinstance(spacing, timedelta | np.timedelta64):
        spacing = float(np.timedelta64(spacing, "us").astype(np.int64)) / 1e6
    if not 0 < spacing < float("inf"):
        raise ValueError(f"{argument}: got {spacing}, expected a positive finite number or timedelta")
    return float(spacing)
