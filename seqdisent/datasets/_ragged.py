"""Lists of arrays of different lengths, padded to one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pad_arrays(name: str, arrays: Sequence[Any], *, filler: float = 0.0, num_steps: int = 0) -> tuple[Tensor, Tensor]:
    r"""Pad arrays on the right.

    Args:
        name: of the argument, for errors.
        arrays: (T_i, \*E) each, NumPy's or tensors, of one E and one dtype.
        filler: What the padding holds.
        num_steps: Steps of the result, at least.

    Returns:
        (N, T, \*E), and the lengths (N,) int64.

    Raises:
        TypeError: an array that does not hold numbers, or arrays of different dtypes.
        ValueError: no array, one without a step, or arrays that differ in E.
    """
    parts = [_as_tensor(f"{name}[{row}]", array) for row, array in enumerate(arrays)]
    if not parts:
        raise ValueError(f"{name}: got no array, expected at least one")
    for row, part in enumerate(parts):
        if part.dim() < 1 or not len(part) or part.shape[1:] != parts[0].shape[1:]:
            wanted = ", ".join(map(str, ("T", *parts[0].shape[1:])))
            raise ValueError(f"{name}[{row}]: shape is {tuple(part.shape)}, expected ({wanted}) with T of at least 1")
        if part.dtype != parts[0].dtype:
            raise TypeError(f"{name}[{row}]: got {part.dtype}, expected {parts[0].dtype}, that of the first one")
    lengths = torch.tensor([len(part) for part in parts], device=parts[0].device)
    size = (len(parts), max(int(lengths.max()), num_steps), *parts[0].shape[1:])
    padded = parts[0].new_full(size, filler if parts[0].is_floating_point() else 0)
    for row, part in enumerate(parts):
        padded[row, : len(part)] = part
    return padded, lengths


def pad_beside(name: str, arrays: Sequence[Any], lengths: Tensor) -> Tensor:
    r"""Pad arrays (T_i, \*E), each as long as its sequence; `lengths` (N,)."""
    padded, found = pad_arrays(name, arrays, num_steps=int(lengths.max()))
    check_number(name, found, lengths)
    if not torch.equal(found, lengths.to(found.device)):
        row = int((found != lengths.to(found.device)).nonzero()[0])
        raise ValueError(f"{name}[{row}]: got {int(found[row])} steps, expected {int(lengths[row])}, as of the values")
    return padded


def check_number(name: str, found: Sequence[Any] | Tensor, lengths: Tensor) -> None:
    """Raise ValueError unless there is one of `found` for each sequence."""
    if len(found) != len(lengths):
        raise ValueError(f"{name}: got {len(found)}, expected one for each of {len(lengths)} sequences")


def as_whole(numbers: Any) -> Any:
    """Return whole numbers as a tensor; anything else as it is, for the constructor to refuse."""
    if isinstance(numbers, Tensor):
        return numbers
    array = np.asarray(numbers)
    return torch.from_numpy(array.astype(np.int64)) if array.dtype.kind in "iu" else numbers


def _as_tensor(name: str, array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array
    numbers = np.ascontiguousarray(np.asarray(array))
    if numbers.dtype.kind not in "biuf":
        raise TypeError(f"{name}: got {numbers.dtype}, expected numbers")
    return torch.from_numpy(numbers.astype(numbers.dtype.newbyteorder("="))).reshape(np.shape(array))
