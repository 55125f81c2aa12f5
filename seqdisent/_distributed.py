"""Decisions that every process of a run takes alike."""

from __future__ import annotations

import torch
from torch import Tensor


def all_processes(condition: Tensor) -> bool:
    """Say whether a condition () holds on every process; under torch.distributed all have to ask."""
    everywhere = condition.to(torch.int32)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
    return bool(everywhere)
