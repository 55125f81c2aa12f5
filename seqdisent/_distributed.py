"""Decisions and values that all processes of a distributed run share."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

_Value = TypeVar("_Value")


def all_processes(condition: Tensor) -> bool:
    """Say whether a condition () holds on every process; under torch.distributed all have to ask."""
    everywhere = condition.to(torch.int32)
    if _is_distributed():
        torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
    return bool(everywhere)


def of_all_processes(value: _Value) -> list[_Value]:
    """Return the value of every process, by rank; under torch.distributed all have to ask."""
    if not _is_distributed():
        return [value]
    values: list[_Value] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
