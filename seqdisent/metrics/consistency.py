"""Accuracy consistency: whether a judge says the same of a clip and of its reconstruction (extra ``metrics``)."""

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
    """What :class:`AccuracyConsistency` says, in shares of [0, 1].

    Attributes:
        agreement: {factor: clips of which the judge says the same as of their reconstructions}; 1 is perfect.
        chance: {factor: the most that reconstructions can reach which all look the same}: how often the judge gives its
            commonest answer on real clips. A judge that is blind agrees with itself always, and has a chance of 1.
        average: the agreement averaged over the factors.
    """

    agreement: dict[str, Tensor]
    chance: dict[str, Tensor]
    average: Tensor


class AccuracyConsistency(Metric):
    """The judge's agreement between each real clip and its reconstruction, per factor and averaged (paper, Table 2).

    The judge should be one that has only seen real clips of other identities (:func:`~seqdisent.metrics.train_judge`).
    Agreement needs no labels, and so says nothing of the judge: show its own accuracy beside it. It says nothing of
    disentanglement either, since reconstruction swaps nothing.

    Args:
        num_classes: {factor: how many values it has}, such as ``judge.num_classes``.
        **options: those of :class:`torchmetrics.Metric`.

    Shape:
        - real, reconstructed: {factor: class numbers (N,), or logits (N, K)}, in the same order; tensors, arrays or
          lists

    Returns:
        :class:`ConsistencyScores` from ``compute()``.

    Raises:
        TypeError: values that are no numbers.
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
        before = class_numbers("real", real, self.num_classes)
        count = len(next(iter(before.values())))
        after = class_numbers("reconstructed", reconstructed, self.num_classes, count=count)
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
    """Accuracy consistency the way VDSM's released notebook measures it, to compare with the paper's numbers alone.

    Two things differ from :class:`AccuracyConsistency` with a judge from :func:`~seqdisent.metrics.train_judge`, and
    both raise the number: the judge is trained on the reconstructions too, under the labels of their originals, so it
    learns to forgive what the model gets wrong; and the training and test clips are drawn with replacement from the
    same clips, so more than half of what it is tested on it has been trained on.

    Args:
        real: clips with labels.
        reconstructed: the reconstruction of each, in their order; uint8, or floating point in [0, 1].
        seed: of the split and the judge.
        train_share: how many draws train the judge, as a share of the clips; as many as are left test it.
        **options: those of :func:`~seqdisent.metrics.train_judge`.

    Shape:
        - reconstructed: (N, T, C, H, W)

    Returns:
        The scores of the clips drawn for the test.

    Raises:
        TypeError: `reconstructed` is neither uint8 nor floating point.
        ValueError: `reconstructed` has another shape than the clips or pixels of another range, or `train_share` leaves
            one side empty.

    Example:
        >>> from seqdisent.datasets import Clips
        >>> who = torch.arange(2).repeat(8)
        >>> frames = (200 * who[:, None, None, None, None]).expand(16, 2, 1, 8, 8).to(torch.uint8)
        >>> clips = Clips(frames, labels={"who": who})
        >>> scores = released_protocol_consistency(  # it learns to accept the error
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
