"""Random positions that depend on a generator alone."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_positions(total: int, count: int, generator: torch.Generator) -> Tensor:
    """Positions below `total`, none used once more than another needs.

    Args:
        total: How many positions there are.
        count: How many to draw.
        generator: Decides which.

    Returns:
        (count,) int64, all different while `count` is at most `total`, otherwise as even as possible.
    """
    rounds = -(-count // total)
    keys = torch.rand(rounds, total, generator=generator, device=generator.device)
    return keys.argsort(dim=1).flatten()[:count]


def draw_below(limit: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform whole numbers from 0 to each limit less 1.

    Args:
        limit: Positive whole numbers that broadcast to `shape`.
        shape: Of the result.
        generator: Decides which.

    Returns:
        int64 of the given shape.
    """
    uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64).to(limit.device)
    return (uniform * limit).long().minimum(limit - 1)
