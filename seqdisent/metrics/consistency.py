"""Accuracy consistency: a judge's agreement between clips and their reconstructions (extra ``metrics``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from seqdisent.metrics._predictions import check_classes, class_numbers, shares, tabulate
from seqdisent.metrics.counterfactual import pixels
from seqdisent.metrics.judge import train_judge

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        "seqdisent.metrics.consistency needs torchmetrics; install it with: pip install 'seqdisent[metrics]'"
    ) from error

if TYPE_CHECKING:
    from seqdisent.datasets.clips import Clips


class ConsistencyScores(NamedTuple):
    """Result of :class:`AccuracyConsistency`; all values are in [0, 1].

    Attributes:
        agreement: {factor: fraction of clips with the same prediction for the clip and its reconstruction}; 1 is best.
        chance: {factor: largest agreement of identical reconstructions}, which is the frequency of the most common
            prediction on real clips. It is 1 for a judge that always predicts the same.
        average: agreement averaged over the factors.
    """

    agreement: dict[str, Tensor]
    chance: dict[str, Tensor]
    average: Tensor


class AccuracyConsistency(Metric):
    """Agreement of a judge's predictions for clips and for their reconstructions (paper, Table 2).

    The judge should be trained only on real clips of other identities (:func:`~seqdisent.metrics.train_judge`).
    Agreement needs no labels, so it does not depend on whether the judge is right: report the judge's accuracy too. It
    does not measure disentanglement, since a reconstruction swaps nothing.

    Args:
        num_classes: {factor: number of classes}, such as ``judge.num_classes``.
        **options: options of :class:`torchmetrics.Metric`.

    Shape:
        - real, reconstructed: {factor: class numbers (N,) or logits (N, K)}, in the same order; tensors, arrays or
          lists

    Returns:
        :class:`ConsistencyScores` from ``compute()``.

    Raises:
        TypeError: values that are not numbers.
        ValueError: a factor that is missing, or has another shape or values out of range.

    Example:
        >>> metric = AccuracyConsistency({"hair": 3})
        >>> metric.update({"hair": torch.tensor([0, 1, 2, 2])}, {"hair": torch.tensor([0, 1, 2, 0])})
        >>> metric.compute().average
        tensor(0.7500)
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, num_classes: Mapping[str, int], **options: Any) -> None:
        super().__init__(**options)
        self.num_classes = check_classes(num_classes)
        for i, size in enumerate(self.num_classes.values()):
            self.add_state(f"table_{i}", torch.zeros(size, size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, real: Mapping[str, Tensor], reconstructed: Mapping[str, Tensor]) -> None:
        """Count clips."""
        before = class_numbers("real", real, self.num_classes, device=self.device)
        count = len(next(iter(before.values())))
        after = class_numbers("reconstructed", reconstructed, self.num_classes, device=self.device, count=count)
        for i, (name, size) in enumerate(self.num_classes.items()):
            getattr(self, f"table_{i}").add_(tabulate(before[name], after[name], size))

    def compute(self) -> ConsistencyScores:
        """Return agreement, chance and average."""
        both = {name: shares(getattr(self, f"table_{i}")) for i, name in enumerate(self.num_classes)}
        agreement = {name: share for name, (share, _) in both.items()}
        chance = {name: share for name, (_, share) in both.items()}
        return ConsistencyScores(agreement, chance, torch.stack(list(agreement.values())).mean())


def released_protocol_consistency(
    real: Clips, reconstructed: Tensor, *, seed: int, train_share: float = 0.8, **options: Any
) -> ConsistencyScores:
    """Accuracy consistency as VDSM's released notebook computes it, for comparison with the paper's numbers.

    It differs from :class:`AccuracyConsistency` with a judge from :func:`~seqdisent.metrics.train_judge` in two ways,
    and both raise the result. The judge is also trained on the reconstructions, with the labels of their originals, so
    it learns to ignore the model's errors. Training and test clips are drawn with replacement from the same clips, so
    the judge has been trained on more than half of the test clips.

    Args:
        real: clips with labels.
        reconstructed: their reconstructions, in the same order; uint8, or floating point in [0, 1].
        seed: seed of the split and of the judge.
        train_share: number of draws that train the judge, as a fraction of the clips; the remaining draws test it.
        **options: options of :func:`~seqdisent.metrics.train_judge`.

    Shape:
        - reconstructed: (N, T, C, H, W)

    Returns:
        The scores of the test clips.

    Raises:
        TypeError: `reconstructed` is neither uint8 nor floating point.
        ValueError: `reconstructed` has another shape than the clips or pixels outside [0, 1], or `train_share` leaves
            no clips for training or test.

    Example:
        >>> from seqdisent.datasets import Clips
        >>> who = torch.arange(2).repeat(8)
        >>> frames = (200 * who[:, None, None, None, None]).expand(16, 2, 1, 8, 8).to(torch.uint8)
        >>> clips = Clips(frames, labels={"who": who})
        >>> scores = released_protocol_consistency(  # trained on them
        ...     clips, 255 - frames, seed=0, num_steps=20, batch_size=8, channels=(4,)
        ... )
        >>> scores.average
        tensor(1.)
    """
    from seqdisent.datasets.clips import Clips

    if reconstructed.shape != real.frames.shape:
        raise ValueError(
            f"reconstructed: has shape {tuple(reconstructed.shape)}, expected that of the clips, "
            f"{tuple(real.frames.shape)}"
        )
    num_train = round(train_share * len(real))
    if not 0 < num_train < len(real):
        raise ValueError(f"train_share: got {train_share!r}, expected a share that leaves clips on both sides")
    if reconstructed.dtype != torch.uint8:
        values = pixels("reconstructed", reconstructed, real.mask.to(reconstructed.device)).detach().clamp(0, 1)
        reconstructed = (values * real.scale).round().to(torch.uint8)
    pool = Clips(
        torch.cat([real.frames, reconstructed.to(real.frames.device)]),
        lengths=real.lengths.repeat(2),
        labels={name: label.repeat(2) for name, label in real.labels.items()},
        factor_names=real.factor_names,
        scale=real.scale,
    )
    draws = torch.randint(len(real), (len(real),), generator=torch.Generator().manual_seed(seed))
    train, test = draws[:num_train], draws[num_train:]
    judge = train_judge(pool.subset(torch.cat([train, train + len(real)])), pool.subset(test), seed=seed, **options)
    metric = AccuracyConsistency(judge.num_classes).to(real.frames.device)
    with torch.no_grad():
        for rows in test.split(64):
            before, after = pool.batch(rows), pool.batch(rows + len(real))
            metric.update(judge(before.frames, before.mask), judge(after.frames, after.mask))
    scores: ConsistencyScores = metric.compute()
    return scores
