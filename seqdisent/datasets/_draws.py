"""Random positions that depend on a generator alone."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from seqdisent.datasets._checks import check_choice, check_count


def draw_positions(total: int, count: int, generator: torch.Generator) -> Tensor:
    """Positions below `total`, (count,) int64: all different while there are enough, else as even as possible."""
    rounds = -(-count // total)
    keys = torch.rand(rounds, total, generator=generator, device=generator.device)
    return keys.argsort(dim=1).flatten()[:count]


def draw_below(limit: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform whole numbers, int64 of a shape, from 0 to each limit less 1; limits broadcast to the shape."""
    uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64).to(limit.device)
    return (uniform * limit).long().minimum(limit - 1)


def draw_starts(seen: Tensor, totals: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
    """First steps (B,) of windows of `lengths` (B,) in rows of `totals` (B,) steps, of those that hold a step `seen`.

    Uniform; `seen` (B, T) has such a step in each row.
    """
    starts = torch.arange(seen.shape[1], device=seen.device)
    stops = starts + lengths[:, None]
    before = torch.nn.functional.pad(seen.cumsum(dim=1), (1, 0))
    good = before.gather(1, stops.clamp(max=seen.shape[1])) > before[:, :-1]
    good &= stops <= totals[:, None]
    pick = draw_below(good.sum(dim=1), (len(seen),), generator)
    return (good.cumsum(dim=1) > pick[:, None]).int().argmax(dim=1)


def draw_samples(count: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Samples (B, size), each in random order, of the whole numbers below its `count` (B,).

    They are without replacement, except where there are too few.
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
    """For each of `rows` (M,) any row of the same identity (N,), itself included."""
    identities, order = identity.sort(stable=True)
    first = torch.searchsorted(identities, identity[rows])
    count = torch.searchsorted(identities, identity[rows], right=True) - first
    return order[first + draw_below(count, tuple(rows.shape), generator)]


def draw_held_out(owner: Tensor, held_out: float, seed: int, by: str) -> Tensor:
    """Which sequences to hold out, (N,) bool, as `Sequences.split` says; `owner` (N,) has their identities from 0."""
    check_choice("by", by, ("identity", "sequence", "time"))
    unit = owner if by == "identity" else torch.arange(len(owner), device=owner.device)
    total = int(unit.max()) + 1
    if total < 2:
        raise ValueError(f"split by {by}: there is {total}, expected at least 2")
    if isinstance(held_out, Integral):
        check_count(held_out=held_out)
        count = int(held_out)
        if count >= total:
            raise ValueError(f"held_out: got {count} of {total} by {by}, expected at most {total - 1}")
    elif 0.0 < held_out < 1.0:
        count = min(max(round(held_out * total), 1), total - 1)
    else:
        raise ValueError(f"held_out: got {held_out}, expected a fraction between 0 and 1, or an int")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return torch.isin(unit, order[:count].to(unit.device))
