"""The text format .ts of the time-series archives (aeon's and sktime's)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class TimeSeries(NamedTuple):
    """What a .ts file holds."""

    arrays: list[npt.NDArray[np.float32]]
    """Each (T_i, X), NaN where missing."""
    classes: list[int] | None
    """One for each of the arrays, from 0; None if the file has no class labels."""
    class_names: list[str]


def read_ts(path: Path) -> TimeSeries:
    """Read a .ts file.

    Raises:
        ValueError: a line that is not of the format, or a header that asks for what is not read (time stamps,
            regression targets); the message names the line.
    """
    has_class, names, found = False, [], TimeSeries([], [], [])
    lines = _lines(path)
    for where, line in lines:
        if not line.startswith("@"):
            raise ValueError(f"{where}: got {line[:40]!r}, expected a line of the header, such as @data")
        key, *words = line[1:].split()
        key = key.lower()
        said_so = bool(words) and words[0].lower() == "true"
        if key == "data":
            break
        if key == "classlabel":
            has_class, names = said_so, words[1:]
        elif said_so and key in ("timestamps", "targetlabel"):
            raise ValueError(f"{where}: @{key} is true, expected a file without: this is not read")
    for where, line in lines:
        *dimensions, label = line.split(":") if has_class else [*line.split(":"), ""]
        if has_class and label.strip() not in names:
            raise ValueError(f"{where}: the class is {label.strip()!r}, expected one of {names}")
        if has_class and found.classes is not None:
            found.classes.append(names.index(label.strip()))
        found.arrays.append(_array(where, dimensions))
        if found.arrays[-1].shape[1] != found.arrays[0].shape[1]:
            raise ValueError(
                f"{where}: got {found.arrays[-1].shape[1]} dimensions, expected {found.arrays[0].shape[1]} as before"
            )
    if not found.arrays:
        raise ValueError(f"{path}: no series after @data, expected at least one")
    return TimeSeries(found.arrays, found.classes if has_class else None, names)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Where each line is, and its text, without comments and empty lines."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if (text := line.strip()) and not text.startswith("#"):
                yield f"{path}, line {number}", text


def _array(where: str, dimensions: list[str]) -> npt.NDArray[np.float32]:
    if not dimensions:
        raise ValueError(f"{where}: got a class alone, expected values before it")
    try:
        rows = [["nan" if value.strip() == "?" else value for value in part.split(",")] for part in dimensions]
        columns = [np.array([float(value) for value in row], np.float32) for row in rows]
    except ValueError as error:
        raise ValueError(f"{where}: {error}, expected numbers, ? or NaN with commas between") from error
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"{where}: its dimensions have {[len(c) for c in columns]} values, expected as many in each")
    return np.stack(columns, axis=1)
