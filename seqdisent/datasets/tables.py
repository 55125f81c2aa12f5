"""Sequences from a long table, one row for each id and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seqdisent.datasets._columns import Floats, as_floats, as_items, is_missing, read_columns
from seqdisent.datasets._timeline import Part, as_spacing, parts_of, put_in_time
from seqdisent.datasets.sequences import Sequences


def sequences_from_table(
    table: Any,
    *,
    columns: Sequence[str],
    id: str | None = None,
    time: str | None = None,
    covariates: Sequence[str] = (),
    labels: Sequence[str] = (),
    step: float | timedelta | np.timedelta64 | None = None,
    sort: bool = False,
    dt: bool | float | timedelta | np.timedelta64 = False,
    dtype: torch.dtype = torch.float32,
) -> Sequences:
    """Sequences from a long table: one row for each id and time, one column for each thing that was measured.

    Ids come in the order in which they first stand in the table, and are the names of the sequences; `columns` are
    those of its coordinates. What is missing (NaN, an empty cell, "NA" and the like) was not measured.

    Args:
        table: A DataFrame of pandas or polars, a mapping of names to arrays, or the path of a CSV file with a header.
        columns: What was measured, the values of a step.
        id: The column that says which sequence a row belongs to; by default all rows are one sequence.
        time: The column of times: numbers, dates of any kind, durations (timedelta64), or ISO text with hyphens, since
            "20240131" is a number; by default rows are in order.
        covariates: Columns of known inputs, which have a number in each row; with `step`, the table then has a row at
            each time. Rows after the last measurement of an id are then no holes, but its known future, of which a
            forecast is made: a sequence ends with its last measurement, its covariates go on, and
            `future_covariates` of the sequences hands them out. So it is with `dt` alone.
        labels: Columns that do not differ within a sequence, text or numbers; their values are numbered in their order.
        step: The regular spacing of times, in their unit (seconds for dates and durations) or as a timedelta: a time
            that the table lacks becomes a hole. None keeps rows as they come.
        sort: Put the rows of each id in the order of their times; by default that is an error.
        dt: Add the time since the last step as the last covariate: True in the unit of the times (seconds for dates and
            durations), or the unit, a number of theirs or a timedelta. Networks learn where it is near 1. The first
            step of a sequence has the median of all (1 where no sequence has two steps).
        dtype: Of the values.

    Returns:
        The sequences, with values (N, T, len(columns)). With `time` they have `times`, from the first step of each id
        on: seconds for dates and durations, else in the unit of the column.

    Raises:
        TypeError: `table` is something else, `columns`, `covariates` or `labels` is a string, or `dtype` is neither
            float32 nor float64.
        ValueError: A column that is not there, or comes twice in a CSV file; a CSV file without commas; no time, the
            same time twice, or times out of order in one id; text, dates or durations where numbers belong, or an
            infinite number; a covariate that is missing; a label that is missing or differs within one id; a time that
            does not fit `step`; an id with nothing measured; `step`, `sort` or `dt` without `time`. The message names
            the column and the id.

    Example:
        >>> table = {
        ...     "who": ["a", "a", "b", "b", "b"],
        ...     "hour": [0, 2, 5, 6, 7],
        ...     "pulse": [60.0, 62.0, 80.0, None, 85.0],
        ... }
        >>> data = sequences_from_table(table, columns=["pulse"], id="who", time="hour", step=1)
        >>> data.names, data.values[..., 0].tolist()
        (['a', 'b'], [[60.0, 0.0, 62.0], [80.0, 0.0, 85.0]])
        >>> print(data.observed)
        tensor([[ True, False,  True],
                [ True, False,  True]])
        >>> print(sequences_from_table(table, columns=["pulse"], id="who", time="hour", dt=True).subset([1]).covariates)
        tensor([[[1.],
                 [1.],
                 [1.]]])
    """
    if time is None and (step is not None or sort or dt is not False):
        raise ValueError("time: got None, expected the column of times, which `step`, `sort` and `dt` need")
    if not columns:
        raise ValueError("columns: got none, expected at least one")
    for argument, names in (("columns", columns), ("covariates", covariates), ("labels", labels)):
        if isinstance(names, str):
            raise TypeError(f"{argument}: got the string {names!r}, expected a sequence of names such as [{names!r}]")
    wanted = {"columns": columns, "covariates": covariates, "labels": labels}
    wanted |= {name: [column] for name, column in (("id", id), ("time", time)) if column is not None}
    cells = read_columns(table, wanted)
    ids = ["0"] * len(cells[columns[0]]) if id is None else _ids(id, cells[id])
    parts = parts_of(ids)
    if time is not None:
        parts = put_in_time(time, cells[time], ids, parts, step=step, sort=sort, has_id=id is not None)
    values = np.stack([as_floats(name, cells[name], ids) for name in columns], axis=1)
    inputs = [_covariates(covariates, cells, ids, parts)] if covariates else []
    inputs += [_time_steps(parts, 1.0 if dt is True else as_spacing("dt", dt))] if dt is not False else []
    placed = [torch.from_numpy(part.place(values)).to(dtype) for part in parts]
    arrays = [_until_measured(part) for part in placed] if inputs else placed
    return Sequences.from_arrays(
        arrays,
        columns=columns,
        times=None
        if time is None
        else [since[: len(of)] for since, of in zip(map(_times, parts), arrays, strict=True)],
        covariates=[torch.from_numpy(np.concatenate(of, axis=1)) for of in zip(*inputs, strict=True)] or None,
        names=[str(part.who) for part in parts],
        **_labels(labels, cells, parts),
    )


def _until_measured(values: Tensor) -> Tensor:
    """Values (T, X) without the steps after the last measurement; all of them where there is none."""
    measured = (~values.isnan()).any(1).nonzero()
    return values[: int(measured[-1]) + 1] if len(measured) else values


def _ids(name: str, column: npt.NDArray[Any]) -> list[Any]:
    ids = as_items(column)
    if (row := next((row for row, who in enumerate(ids) if is_missing(who)), None)) is not None:
        raise ValueError(f"column {name!r}: got no id in row {row}, expected one in each row")
    return ids


def _covariates(
    names: Sequence[str], cells: Mapping[str, npt.NDArray[Any]], ids: Sequence[Any], parts: Sequence[Part]
) -> list[Floats]:
    """Known inputs (T, X) of each sequence; they have no holes."""
    known = np.stack([as_floats(name, cells[name], ids) for name in names], axis=1)
    if np.isnan(known).any():
        row, column = np.argwhere(np.isnan(known))[0]
        raise ValueError(f"column {names[column]!r}: got no covariate at id {ids[row]!r}, expected one in each row")
    for part in parts:
        if part.steps[-1] >= len(part.steps):
            raise ValueError(
                f"column {names[0]!r}: id {part.who!r} lacks a row at some time of the regular `step`, expected rows "
                "with their covariates, and nothing in `columns`, at all times; or step=None"
            )
    return [part.place(known) for part in parts]


def _time_steps(parts: Sequence[Part], unit: float) -> list[Floats]:
    """Time since the last step, (T, 1) of each sequence."""
    gaps = [np.zeros(0) if part.gaps is None else part.gaps / unit for part in parts]
    every = np.concatenate(gaps)
    first = np.median(every, keepdims=True) if len(every) else np.ones(1)
    return [np.concatenate([first, gap])[:, None] for gap in gaps]


def _times(part: Part) -> Floats:
    """Time from the first step of a sequence to each of its steps, (T,)."""
    return np.concatenate([np.zeros(1), np.zeros(0) if part.gaps is None else part.gaps.cumsum()])


def _labels(names: Sequence[str], cells: Mapping[str, npt.NDArray[Any]], parts: Sequence[Part]) -> dict[str, Any]:
    """The arguments of the constructor that say what each sequence is."""
    labels, factor_names = {}, {}
    for name in names:
        items = as_items(cells[name])
        for part in parts:
            said = {items[row] for row in part.rows}
            if len(said) > 1 or any(map(is_missing, said)):
                found = sorted(map(str, said))
                raise ValueError(f"column {name!r}: got {found} at id {part.who!r}, expected one label in all its rows")
        values = sorted(set(items), key=_number_or_text)
        labels[name] = [values.index(items[part.rows[0]]) for part in parts]
        factor_names[name] = [str(value) for value in values]
    return {"labels": labels, "factor_names": factor_names}


def _number_or_text(item: Any) -> tuple[int, float, str]:
    try:
        return 0, float(item), ""
    except (TypeError, ValueError):
        return 1, 0.0, str(item)
