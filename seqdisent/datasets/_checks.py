"""Checks of arguments that the data sets share; each raises an error that names the argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from seqdisent._checks import is_integer

if TYPE_CHECKING:
    from seqdisent.datasets.sequences import Sequences


def check_count(**counts: object) -> None:
    """Raise TypeError unless every count is an integer (a bool is none), ValueError unless it is at least 1."""
    for name, value in counts.items():
        if not is_integer(value):
            raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected an int")
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def _kind_of(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_tensor(name: str, value: object, kind: Literal["uint8", "whole", "floating"]) -> None:
    """Raise TypeError unless `value` is a tensor of bytes, of whole numbers (no bool), or of floating point."""
    if isinstance(value, Tensor):
        inexact = value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
        if {"uint8": value.dtype == torch.uint8, "whole": not inexact, "floating": value.is_floating_point()}[kind]:
            return
    wanted = {"uint8": "uint8 (pixels 0 to 255)", "whole": "whole numbers", "floating": "floating point"}[kind]
    raise TypeError(f"{name}: got {_kind_of(value)}, expected a tensor of {wanted}")


def check_frames(frames: Tensor) -> None:
    r"""Raise unless frames are uint8 (N, T, \*E), and none of it empty."""
    check_tensor("frames", frames, "uint8")
    if frames.dim() < 3 or 0 in frames.shape:
        raise ValueError(
            f"frames: shape is {tuple(frames.shape)}, expected (N, T, *E), such as (N, T, C, H, W), nothing empty"
        )


def check_values(values: Tensor) -> None:
    r"""Raise unless values are float32 or float64 (N, T, \*E), and none of it empty."""
    check_tensor("values", values, "floating")
    if values.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"values: got {values.dtype}, expected float32 or float64")
    if values.dim() < 3 or 0 in values.shape:
        raise ValueError(
            f"values: shape is {tuple(values.shape)}, expected (N, T, *E), such as (N, T, X), nothing empty"
        )


def check_columns(columns: Sequence[str] | None, shape: Sequence[int]) -> None:
    """Raise ValueError unless there is one name for each coordinate of steps (X,), each another one."""
    if columns is None:
        return
    if len(shape) != 1 or len(columns) != shape[0]:
        raise ValueError(f"columns: got {len(columns)}, expected one for each coordinate of steps {tuple(shape)}")
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise ValueError(f"columns: got {twice[0]!r} twice, expected each name once")


def check_whole(name: str, numbers: Tensor, wanted: torch.Size, device: torch.device, unit: str) -> Tensor:
    """Check and return whole numbers of the `wanted` shape, one for each `unit`, as int64 on a device."""
    check_tensor(name, numbers, "whole")
    if numbers.shape != wanted:
        raise ValueError(f"{name}: shape is {tuple(numbers.shape)}, expected {tuple(wanted)}, one value per {unit}")
    return numbers.to(device=device, dtype=torch.int64)


def check_lengths(lengths: Tensor, num_steps: int) -> None:
    """Raise ValueError unless all lengths are from 1 to `num_steps`."""
    low, high = int(lengths.min()), int(lengths.max())
    if low < 1 or high > num_steps:
        raise ValueError(f"lengths: got values from {low} to {high}, expected 1 to {num_steps}")


def check_positions(name: str, indices: Tensor | Sequence[int], total: int, unit: str) -> Tensor:
    """Check and return positions of sequences, at least one, as int64 (M,); they may be a bool tensor (total,)."""
    positions = torch.as_tensor(indices)
    if positions.dtype == torch.bool and positions.shape == (total,):
        positions = positions.nonzero().squeeze(1)
    if positions.dim() != 1 or not len(positions) or positions.is_floating_point() or positions.dtype == torch.bool:
        raise ValueError(f"{name}: got {_kind_of(positions)}, expected at least one {unit}'s position, shape (M,)")
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or high >= total:
        raise ValueError(f"{name}: got positions from {low} to {high}, expected 0 to {total - 1}")
    return positions.long()


def check_factors(data: Sequences, factor_names: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError unless names, labels and factors fit together; names are as the caller's."""
    if len(data.names) != len(data):
        raise ValueError(f"names: got {len(data.names)}, expected one for each of {len(data)} {data._unit}s")
    for argument, factors in (
        ("factor_names", factor_names),
        ("static_factors", data.static_factors),
        ("motion_factors", data.motion_factors),
    ):
        for name in factors:
            if name not in data.labels:
                raise ValueError(f"{argument}: {name!r} is not among the labels {sorted(data.labels)}")
    for name, label in data.labels.items():
        low, high, known = int(label.min()), int(label.max()), len(data.factor_names[name])
        if low < 0 or high >= known:
            raise ValueError(f"labels[{name!r}]: got values from {low} to {high}, expected 0 to {known - 1}")
    for name in data.static_factors:
        if torch.unique(torch.stack([data.identity, data.labels[name]]), dim=1).shape[1] != data.num_identities:
            raise ValueError(
                f"static_factors: {name!r} differs between {data._unit}s of one identity, expected one value each"
            )
