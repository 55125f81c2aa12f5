"""The columns of a long table, whatever holds it."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MISSING = frozenset({"", "?", "na", "n/a", "nan", "nat", "none", "null", "<na>"})
"""What stands for a value that is missing, in lower case."""

Floats = npt.NDArray[np.float64]


def read_columns(table: Any, wanted: Mapping[str, Sequence[str]]) -> dict[str, npt.NDArray[Any]]:
    """Take columns from a table.

    Args:
        table: a mapping, a DataFrame, or the path of a CSV file with a header.
        wanted: {argument: the columns that it names}.

    Returns:
        {column: its array}, all of one length; of a CSV file text.

    Raises:
        TypeError: `table` is something else.
        ValueError: a column that the table lacks, a file that is no table, has other separators than commas or has a
            column twice, columns of different lengths, or no row.
    """
    if isinstance(table, str | Path):
        table = _read_csv(Path(table))
    known = list(table) if isinstance(table, Mapping) else list(getattr(table, "columns", ()))
    if not known or not hasattr(table, "__getitem__"):
        raise TypeError(
            f"table: got {type(table).__name__} without columns, expected a DataFrame, a mapping or the path of a CSV"
        )
    found: dict[str, npt.NDArray[Any]] = {}
    for argument, names in wanted.items():
        for name in names:
            if name not in known:
                raise ValueError(f"{argument}: {name!r} is not in the table, expected some of {known}")
            found[name] = np.asarray(table[name])
            if found[name].ndim != 1:
                raise ValueError(f"{argument}: {name!r} has shape {found[name].shape}, expected one value a row")
    lengths = {name: len(array) for name, array in found.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"table: its columns have {lengths} rows, expected as many in each, at least one")
    return found


def _read_csv(path: Path) -> dict[str, list[str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if len(header) == 1 and (separator := next((each for each in ";\t|" if each in header[0]), None)):
        raise ValueError(
            f"{path}: got {separator!r} between the names of the header, expected commas; "
            f"pandas.read_csv(path, sep={separator!r}) reads the file, and its DataFrame is a table too"
        )
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise ValueError(f"{path}: got column {twice[0]!r} twice in the header, expected each name once")
    rows = [row for row in rows if row]
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"{path}: row {number} has {len(row)} cells, expected {len(header)}, as in the header")
    return {name: [row[column] for row in rows] for column, name in enumerate(header)}


def as_floats(name: str, column: npt.NDArray[Any], ids: Sequence[Any]) -> Floats:
    """Return a column of numbers, NaN where missing.

    Raises:
        ValueError: text, dates, durations or an infinite number; `ids` has the sequence of each row, for the message.
    """
    if column.dtype.kind in "mM":  # whose numbers depend on a unit that nobody sees
        raise ValueError(f"column {name!r}: got {column.dtype}, expected numbers")
    if column.dtype.kind in "biuf":
        numbers = column.astype(np.float64)
    else:
        numbers = np.empty(len(column))
        for row, item in enumerate(column.tolist()):
            try:
                numbers[row] = np.nan if is_missing(item) else float(item)
            except (TypeError, ValueError) as error:
                raise ValueError(f"column {name!r}: got {item!r} at id {ids[row]!r}, expected a number") from error
    if np.isinf(numbers).any():
        row = int(np.isinf(numbers).argmax())
        raise ValueError(f"column {name!r}: got {numbers[row]} at id {ids[row]!r}, expected a finite number or nothing")
    return numbers


def as_times(name: str, column: npt.NDArray[Any], ids: Sequence[Any]) -> Floats:
    """Return times as numbers from the first one on: dates, durations and ISO text in seconds, else as they are.

    Raises:
        ValueError: a time that is missing, or what is neither a number nor a date.
    """
    missing = np.array([is_missing(item) for item in as_items(column)])
    if missing.any():
        row = int(missing.argmax())
        raise ValueError(f"column {name!r}: got no time at id {ids[row]!r}, expected one in each row")
    if column.dtype.kind not in "iufmM":
        try:
            column = np.array([float(item) for item in column.tolist()])
        except (TypeError, ValueError):
            column = _as_dates(name, column, ids)
    if column.dtype.kind in "mM":
        since: Floats = (column - column.min()).astype("timedelta64[us]").astype(np.int64) / 1e6
        return since
    if not np.isfinite(column).all():
        row = int((~np.isfinite(column)).argmax())
        raise ValueError(f"column {name!r}: got {column[row]} at id {ids[row]!r}, expected a finite number or a date")
    shifted: Floats = (column - column.min()).astype(np.float64)
    return shifted


def _as_dates(name: str, column: npt.NDArray[Any], ids: Sequence[Any]) -> npt.NDArray[Any]:
    dates = np.empty(len(column), "datetime64[us]")
    for row, item in enumerate(column.tolist()):
        try:
            if len(str(item).strip()) == 8 and str(item).strip().isdigit():
                raise ValueError  # NumPy would take 20240131 for a year
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # NumPy warns of a time zone
                dates[row] = np.datetime64(item, "us")
        except (TypeError, ValueError, UserWarning, DeprecationWarning) as error:
            raise ValueError(
                f"column {name!r}: got {item!r} at id {ids[row]!r}, expected a number, or a date without a time zone"
            ) from error
    return dates


def as_items(column: npt.NDArray[Any]) -> list[Any]:
    """Return the cells of a column; dates as text, since those of NumPy would become numbers."""
    items: list[Any] = (column.astype(str) if column.dtype.kind == "M" else column).tolist()
    return items


def is_missing(item: Any) -> bool:
    """Return whether a cell holds nothing."""
    return str(item).strip().lower() in MISSING
