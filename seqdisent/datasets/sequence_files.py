"""Sequences from your own files: NumPy archives, and .ts files of the time-series archives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from seqdisent.datasets._archives import read_arrays
from seqdisent.datasets._labels import number_labels
from seqdisent.datasets._ts_files import read_ts
from seqdisent.datasets.sequences import Sequences


def load_sequences(path: str | Path) -> Sequences:
    r"""Sequences from an .npz archive or a .ts file.

    In an archive, `values` is float32 or float64 (N, T, \*E), NaN where nothing was measured; `lengths` (N,),
    `observed` (N, T) or (N, T, \*E), `covariates` (N, T or more, X), `identity` (N,), `times` (N, T) and `columns`, X
    names, are as of :class:`Sequences`.
    Each other array of whole numbers or truth values is a label: (N,) of a sequence, renumbered from 0, or (N, T) of
    each step, as it is. Where some identity has several sequences, a label that never differs within one identity
    counts as static and the others as motion. Arrays of another kind or shape are passed over.

    A .ts file (aeon's and sktime's) gives float32 values; ? and NaN are what is missing. Its class is the label
    "class".

    Args:
        path: The file.

    Returns:
        The sequences.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: The file is damaged or of another kind, or what it holds does not fit together. The message names
            the file and the array or line.
        TypeError: An array has the wrong dtype, such as values that are whole numbers.

    Example:
        >>> import tempfile
        >>> values = np.zeros((3, 5, 2), np.float32)
        >>> values[0, 1] = np.nan
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/mine.npz", values=values, lengths=np.array([5, 4, 5]), site=np.array([7, 7, 9]))
        ...     data = load_sequences(f"{folder}/mine.npz")
        >>> data
        Sequences(3 sequences of 4 to 5 steps, 2, 3 identities)
        >>> data.labels["site"].tolist(), data.factor_names["site"]
        ([0, 0, 1], ('7', '9'))
        >>> print(data.subset([0]).observed)
        tensor([[ True, False,  True,  True,  True]])
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such .npz or .ts file")
    if path.suffix not in (".npz", ".ts"):
        raise ValueError(f"{path}: got a file {path.suffix!r}, expected .npz or .ts")
    try:
        return _of_archive(path) if path.suffix == ".npz" else _of_ts(path)
    except TypeError as error:
        raise TypeError(_at(path, error)) from error
    except ValueError as error:
        raise ValueError(_at(path, error)) from error


def _of_archive(path: Path) -> Sequences:
    arrays = {name: _native(array) for name, array in read_arrays(path)}
    if "values" not in arrays:
        raise ValueError(f"{path}: holds {sorted(arrays)}, expected an array 'values'")
    own: dict[str, Any] = {
        name: arrays.pop(name, None) for name in ("lengths", "observed", "covariates", "identity", "times")
    }
    for name, array in own.items():
        if array is not None and array.dtype.kind not in "biuf":
            raise TypeError(f"{path}: array {name!r} is {array.dtype}, expected numbers")
    options: dict[str, Any] = {name: None if array is None else torch.from_numpy(array) for name, array in own.items()}
    if (columns := arrays.pop("columns", None)) is not None:
        options["columns"] = columns.tolist()
    values = arrays.pop("values")
    if values.dtype.kind != "f":
        raise TypeError(f"{path}: array 'values' is {values.dtype}, expected float32 or float64")
    whole = {
        name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items() if array.dtype.kind in "biu"
    }
    numbered = number_labels(
        {name: label for name, label in whole.items() if label.shape == values.shape[:1]}, options["identity"]
    )
    by_step = {name: label for name, label in whole.items() if label.shape == values.shape[:2]}
    return Sequences(torch.from_numpy(values), step_labels=by_step, **options, **numbered.options())


def _of_ts(path: Path) -> Sequences:
    found = read_ts(path)
    options: dict[str, Any] = {}
    if found.classes is not None:
        options = {"labels": {"class": found.classes}, "factor_names": {"class": found.class_names}}
    return Sequences.from_arrays(found.arrays, **options)


def _at(path: Path, error: Exception) -> str:
    return str(error) if str(error).startswith(str(path)) else f"{path}: {error}"


def _native(array: Any) -> Any:
    """Return an array in this machine's byte order, as torch wants it."""
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
