"""Generated clips and their nearest neighbours: precision, recall, density and coverage; memorised clips."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from seqdisent._checks import check_positive
from seqdisent.metrics._predictions import as_tensor
from seqdisent.metrics.counterfactual import nearest_clip, squared_error


class NeighbourScores(NamedTuple):
    """Result of :func:`neighbour_scores`.

    Attributes:
        precision: share of generated clips in the ball of a real clip, in [0, 1].
        recall: share of real clips in the ball of a generated clip, in [0, 1].
        density: number of real balls that a generated clip is in, divided by k; at least 0, and above 1 if generated
            clips lie where real ones are dense. 1 is expected if both sets have the same distribution.
        coverage: share of real clips with a generated clip in their ball, in [0, 1].
        expected_coverage: coverage that is expected if both sets have the same distribution; it depends only on the
            sizes of the sets and on k.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    expected_coverage: float


def neighbour_scores(
    real: Tensor, generated: Tensor, *, num_neighbours: int = 5, batch_size: int = 1024
) -> NeighbourScores:
    r"""Compute precision, recall, density and coverage of generated clips, in the features of any network.

    The ball of a clip reaches to its k-th nearest neighbour in its own set. With :math:`x_i` the N real features,
    :math:`y_j` the M generated ones, and :math:`B` the balls,

    .. math::
        \text{precision} &= \tfrac{1}{M} \textstyle\sum_j 1[y_j \in \bigcup_i B(x_i)], &
        \text{recall} &= \tfrac{1}{N} \textstyle\sum_i 1[x_i \in \bigcup_j B(y_j)], \\
        \text{density} &= \tfrac{1}{k M} \textstyle\sum_{j, i} 1[y_j \in B(x_i)], &
        \text{coverage} &= \tfrac{1}{N} \textstyle\sum_i 1[\exists j : y_j \in B(x_i)].

    If both sets have the same continuous distribution, the expected density is 1, and the expected coverage
    :math:`1 - \prod_{l=1}^{k} (N - l) / (N + M - l)`: 0.97 for k = 5 and as many generated as real clips. Precision and
    recall have no such value; report those of two sets of real clips. A ball around an outlier is large, which raises
    precision and recall, but hardly density and coverage. All four depend on the extractor. A generator that copies
    training clips passes: report :func:`memorisation_scores` too.

    Distances are computed from differences, in float64. They take N M F operations (two minutes for 10,000 real and
    generated clips and 256 features on one core) and memory for `batch_size` (N + M) numbers.

    Args:
        real: features of real clips that did not train the model, such as ``judge.features``; a tensor, array or list.
        generated: features of generated clips, from the same extractor.
        num_neighbours: k, smaller than the number of real and that of generated clips.
        batch_size: number of clips whose distances are computed at once.

    Shape:
        - real: (N, F)
        - generated: (M, F)

    Returns:
        The scores.

    Raises:
        TypeError: features that are not numbers.
        ValueError: features of another shape, of different sizes or not finite, or no more than `num_neighbours`.

    Example:
        >>> features = torch.randn(2, 500, 3, generator=torch.Generator().manual_seed(0))
        >>> [round(score, 2) for score in neighbour_scores(*features)]
        [0.99, 0.97, 1.04, 0.97, 0.97]
        >>> [round(score, 2) for score in neighbour_scores(features[0], features[1] + 100)]
        [0.0, 0.0, 0.0, 0.0, 0.97]

    References:
        Kynkaanniemi et al. Improved precision and recall metric for assessing generative models, NeurIPS 2019,
        equations 1 and 2 (precision and recall; a point on the edge of a ball is inside).
        Naeem et al. Reliable fidelity and diversity metrics for generative models, ICML 2020 (density and coverage;
        lemma 2 is the expected coverage). Its released code leaves the edge out, so that copies of one clip are in no
        ball; the two agree unless distances are equal. With the edge, the density of a set and itself is (k + 1) / k.
    """
    real, generated = as_tensor("real", real).detach(), as_tensor("generated", generated).detach()
    check_positive(num_neighbours=num_neighbours, batch_size=batch_size)
    for name, features in (("real", real), ("generated", generated)):
        if features.ndim != 2:
            raise ValueError(f"{name}: has shape {tuple(features.shape)}, expected features (N, F)")
        _check_set(name, features, "real", real)
        if len(features) <= num_neighbours:
            raise ValueError(f"{name}: has {len(features)} rows, expected more than num_neighbours={num_neighbours}")
    real, generated = real.double(), generated.to(real.device, torch.float64)
    num_real, num_generated = len(real), len(generated)
    real_radius, generated_radius = (_radii(values, num_neighbours, batch_size) for values in (real, generated))
    precise = torch.zeros(num_generated, dtype=torch.bool, device=real.device)
    recalled = covered = inside = 0
    for rows, radius in zip(real.split(batch_size), real_radius.split(batch_size), strict=True):
        distance = _distances(rows, generated)
        in_real = distance <= radius.unsqueeze(1)
        precise |= in_real.any(0)
        covered += int(in_real.any(1).sum())
        inside += int(in_real.sum())
        recalled += int((distance <= generated_radius).any(1).sum())
    factors = ((num_real - i) / (num_real + num_generated - i) for i in range(1, num_neighbours + 1))
    return NeighbourScores(
        precision=int(precise.sum()) / num_generated,
        recall=recalled / num_real,
        density=inside / (num_neighbours * num_generated),
        coverage=covered / num_real,
        expected_coverage=1 - math.prod(factors),
    )


class MemorisationScores(NamedTuple):
    """Result of :func:`memorisation_scores`; distances are root mean squares of the differences, 0 for a copy.

    Attributes:
        median: median distance of a generated clip from its nearest training clip.
        mean: mean of that distance.
        held_out_median: median distance of a held-out clip from its nearest training clip.
        held_out_mean: mean of that distance.
        share_nearer: share of generated clips that are nearer to a training clip than `held_out_median`; of those at
            the same distance, half are counted. About 0.5 for clips like the held-out ones, 1 for copies.
    """

    median: float
    mean: float
    held_out_median: float
    held_out_mean: float
    share_nearer: float


def memorisation_scores(
    generated: Tensor, held_out: Tensor, train: Tensor, *, batch_size: int = 256
) -> MemorisationScores:
    """Compare the distances of generated and of held-out clips from their nearest training clips.

    A generator that copies training clips is much nearer to them than held-out clips are. A small distance alone proves
    no copy. A blurred clip is near to many clips. Held-out clips of new identities are farther from the training clips
    than any clip of a training identity, so hold out clips of the same identities, or compare the distance with that of
    reconstructed held-out clips. Of ragged clips, pass features.

    Args:
        generated: generated clips, or their features; tensors, arrays or lists, as the other arguments.
        held_out: held-out clips, or their features.
        train: training clips, or their features.
        batch_size: number of clips, of each side, that are compared at once.

    Shape:
        - generated: (N, F), features, or (N, T, C, H, W), clips without padding: uint8, or floating point in [0, 1]
        - held_out: (M, F) or (M, T, C, H, W)
        - train: (L, F) or (L, T, C, H, W)

    Returns:
        The scores, in pixels in [0, 1], or in the unit of the features.

    Raises:
        TypeError: values that are not numbers, or pixels that are neither uint8 nor floating point.
        ValueError: different shapes, an empty set, values that are not finite, or pixels outside [0, 1].

    Example:
        >>> train, held_out = torch.randn(2, 200, 4, generator=torch.Generator().manual_seed(0))
        >>> memorisation_scores(train[:50], held_out, train).share_nearer
        1.0
        >>> memorisation_scores(held_out, held_out, train).share_nearer
        0.5
    """
    check_positive(batch_size=batch_size)
    sets = {"train": train, "generated": generated, "held_out": held_out}
    found = {name: as_tensor(name, values).detach() for name, values in sets.items()}
    training = found.pop("train")
    for name, values in (("train", training), *found.items()):
        _check_set(name, values, "train", training)
    drawn, real = (_to_nearest(values, training, batch_size) for values in found.values())
    edge = real.quantile(0.5)
    share = (drawn < edge).double().mean() + (drawn == edge).double().mean() / 2
    return MemorisationScores(
        median=float(drawn.quantile(0.5)),
        mean=float(drawn.mean()),
        held_out_median=float(edge),
        held_out_mean=float(real.mean()),
        share_nearer=float(share),
    )


def _check_set(name: str, values: Tensor, first_name: str, first: Tensor) -> None:
    if values.ndim < 2 or 0 in values.shape:
        raise ValueError(
            f"{name}: has shape {tuple(values.shape)}, expected features (N, F) or clips (N, T, C, H, W), none of it 0"
        )
    if values.shape[1:] != first.shape[1:]:
        raise ValueError(
            f"{name}: has rows of shape {tuple(values.shape[1:])}, expected {tuple(first.shape[1:])} as {first_name}"
        )
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name}: has values that are not finite, expected numbers")


def _to_nearest(values: Tensor, train: Tensor, batch_size: int) -> Tensor:
    """Return the root mean square of the differences from the nearest training clip, in float64."""
    if values.ndim == 2:
        train = train.to(values.device, torch.float64)
        nearest = [
            torch.stack([_distances(rows, some).amin(1) for some in train.split(batch_size)]).amin(0)
            for rows in values.double().split(batch_size)
        ]
        return torch.cat(nearest) / math.sqrt(values.shape[1])
    positions = nearest_clip(values, train, batch_size=batch_size)
    errors = [
        squared_error(rows, train[nearest.to(train.device)].to(rows.device))
        for rows, nearest in zip(values.split(batch_size), positions.split(batch_size), strict=True)
    ]
    return torch.cat(errors).double().sqrt()


def _distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Return Euclidean distances from differences: 0 for equal rows, and the same in every batch and both orders."""
    return torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(values: Tensor, num_neighbours: int, batch_size: int) -> Tensor:
    """Return the distance of each row to its k-th nearest neighbour; a row itself is the first of k + 1."""
    nearest = [
        _distances(rows, values).topk(num_neighbours + 1, largest=False).values[:, -1]
        for rows in values.split(batch_size)
    ]
    return torch.cat(nearest)
