"""Random positions that depend on a generator alone."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from seqdisent.datasets._checks import check_choice, check_count


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


def draw_samples(count: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Samples without replacement, each in random order; with replacement where there are too few.

    Args:
        count: Of each sample how many things there are to draw from, (B,).
        size: Of each sample.
        generator: Decides which.

    Returns:
        (B, size) int64, from 0 to each count less 1.
    """
    count = count[:, None]
    # The things with the largest of independent uniform keys are a sample without replacement, in random order.
    width = max(int(count.max()), size)
    keys = torch.rand(len(count), width, generator=generator, device=generator.device).to(count.device)
    keys = keys.masked_fill(torch.arange(width, device=keys.device) >= count, -1.0)
    picks = keys.topk(size, dim=1).indices
    if bool((count < size).any()):
        picks = torch.where(count < size, draw_below(count, (len(count), size), generator), picks)
    return picks


def draw_partners(identity: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """For each row any row of the same identity, itself included.

    Args:
        identity: Of all rows, (N,).
        rows: Positions, (M,).
        generator: Decides which.

    Returns:
        (M,) int64.
    """
    identities, order = identity.sort(stable=True)
    first = torch.searchsorted(identities, identity[rows])
    count = torch.searchsorted(identities, identity[rows], right=True) - first
    return order[first + draw_below(count, tuple(rows.shape), generator)]


def draw_held_out(owner: Tensor, held_out: float, seed: int, by: str) -> Tensor:
    """Which clips to hold out.

    Args:
        owner: The identity of each, numbered from 0, (N,).
        held_out: How many identities or sequences: an int, or a float for a fraction (at least one goes and one stays).
        seed: Decides which.
        by: "identity" or "sequence".

    Returns:
        (N,) bool, True where a clip is held out.

    Raises:
        TypeError: `held_out` is a bool.
        ValueError: Fewer than two identities or sequences, `held_out` leaves one side empty, or `by` is neither.
    """
    check_choice("by", by, ("identity", "sequence"))
    unit = owner if by == "identity" else torch.arange(len(owner), device=owner.device)
    total = int(unit.max()) + 1
    if total < 2:
        raise ValueError(f"split by {by}: there is {total}, expected at least 2")
    if isinstance(held_out, Integral):
        count = check_count("held_out", held_out)
        if count >= total:
            raise ValueError(f"held_out: got {count} of {total} by {by}, expected at most {total - 1}")
    elif 0.0 < held_out < 1.0:
        count = min(max(round(held_out * total), 1), total - 1)
    else:
        raise ValueError(f"held_out: got {held_out}, expected a fraction between 0 and 1, or an int")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return torch.isin(unit, order[:count].to(unit.device))
