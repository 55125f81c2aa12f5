"""Whose labels a swap shows where there is no judge: told from each coordinate's mean and standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqdisent.datasets import Sequences
from seqdisent.datasets.batch import frames_and_mask
from seqdisent.evaluation._judged import PROBED_CLIPS, some
from seqdisent.evaluation._programs import Programs, batches
from seqdisent.metrics import probe
from seqdisent.metrics._draws import known_places


def statistics(values: Tensor, mask: Tensor, observed: Tensor | None = None) -> Tensor:
    r"""Return mean and standard deviation over time (B, 2 X) of values (B, T, \*E), 0 of what was never observed."""
    known = known_places(values, mask, observed).flatten(2)
    count, values = known.sum(1).clamp(min=1), values.flatten(2)
    mean = torch.where(known, values, 0.0).sum(1) / count
    variance = torch.where(known, values - mean.unsqueeze(1), 0.0).square().sum(1) / count
    return torch.cat([mean, variance.sqrt()], -1)


def measure_swapped_labels(
    programs: Programs,
    train: Sequences,
    held_out: Sequences,
    donors: Tensor,
    factors: Sequence[str],
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """Measure how often a linear classifier of the statistics of real sequences finds the donor's label in a swap.

    It learns from training sequences. Of swaps, pairs whose labels are equal are left out.
    """
    learnt = some(train, PROBED_CLIPS, seed)
    features = torch.cat([statistics(*_known(batch)) for _, batch in batches(learnt, batch_size)])
    directions = {"identity": (programs.static, programs.motion)}
    if programs.motion:
        directions["motion"] = (programs.motion, ())
    found: dict[str, list[Tensor]] = {name: [] for name in ("real", "reconstruction", *directions)}
    for rows, batch in batches(held_out, batch_size):
        found["real"].append(statistics(*_known(batch)))
        found["reconstruction"].append(statistics(programs.reconstruct(*frames_and_mask(batch)), batch.mask))
        for name, (sites, keep) in directions.items():
            swapped, mask = programs.swap(batch, held_out.batch(donors[rows]), sites, keep)
            found[name].append(statistics(swapped, mask))
    shown = {name: torch.cat(parts) for name, parts in found.items()}

    def accuracy(factor: str, name: str, labels: Tensor, of: Tensor | slice) -> float:
        return probe(features, learnt.labels[factor], shown[name][of], labels[of], seed=seed).accuracy

    numbers: dict[str, Any] = {"known": {}, **{name: {} for name in directions}}
    for factor in factors:
        own, other = held_out.labels[factor], held_out.labels[factor][donors]
        numbers["known"][factor] = {
            name: accuracy(factor, name, own, slice(None)) for name in ("real", "reconstruction")
        }
        if (differs := own != other).any():
            for name in directions:
                sides = {"donor": other, "source": own}
                numbers[name][factor] = {side: accuracy(factor, name, of, differs) for side, of in sides.items()}
    return numbers


def _known(batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    return batch.frames, batch.mask, batch.observed
