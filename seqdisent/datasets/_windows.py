"""Parts of sequences: where windows lie, and how many of the last steps are held out."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from seqdisent.datasets._checks import check_count


def take_steps(tensor: Tensor, rows: Tensor, steps: Tensor) -> Tensor:
    """Return `steps` (M, K) of the sequences (N, T, ...) at `rows` (M,); beyond the end the last one."""
    return tensor[rows[:, None], steps.clamp(max=tensor.shape[1] - 1)]


def lay_windows(lengths: Tensor, num_steps: int, stride: int) -> tuple[Tensor, Tensor]:
    """Return sequence and first step, (M,) each, of windows that go on until one reaches the sequence's end."""
    beyond = (lengths - num_steps).clamp(min=0)
    count = 1 + (-(-beyond // stride)).minimum((lengths - 1) // stride)  # none starts after the end
    rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(count)
    before = count.cumsum(0) - count
    return rows, (torch.arange(len(rows), device=lengths.device) - before[rows]) * stride


def count_held_out(held_out: float, lengths: Tensor, names: Sequence[str]) -> Tensor:
    """Return how many of the last steps of each sequence (N,) are held out, as `Sequences.split` says.

    Raises:
        TypeError: `held_out` is no number.
        ValueError: it leaves a sequence without a step on one side.
    """
    if isinstance(held_out, Integral):
        check_count(held_out=held_out)
        count = torch.full_like(lengths, int(held_out))
    elif not isinstance(held_out, Real):
        raise TypeError(f"held_out: got {type(held_out).__name__}, expected an int, or a fraction")
    elif 0.0 < held_out < 1.0:
        count = (held_out * lengths.double()).round().long().clamp(min=1)
        count = count.minimum((lengths - 1).clamp(min=1))
    else:
        raise ValueError(f"held_out: got {held_out}, expected a fraction between 0 and 1, or an int")
    if bool((count >= lengths).any()):
        row = int((count >= lengths).nonzero()[0])
        raise ValueError(
            f"held_out: got {held_out} of the {int(lengths[row])} steps of sequence {row} ({names[row]!r}), expected "
            "at least one step on each side"
        )
    return count
