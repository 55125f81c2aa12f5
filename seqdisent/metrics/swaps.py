"""Accuracy and leakage of swaps, according to a judge (extra ``metrics``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqdisent.metrics._predictions import check_classes, class_numbers, shares, tabulate

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        "seqdisent.metrics.swaps needs torchmetrics; install it with: pip install 'seqdisent[metrics]'"
    ) from error


class SwapScores(NamedTuple):
    """Result of :class:`SwapAccuracy` for one factor; all values are fractions in [0, 1], or NaN without such pairs.

    Attributes:
        follows: whether the wanted label is the donor's (True) or the source's. The other one is unwanted.
        accuracy: predictions equal to the wanted label, among all pairs; 1 is best.
        chance: accuracy of the best constant prediction on the same pairs, which is the frequency of the most common
            wanted label: 1 / K for balanced labels, more otherwise.
        leakage: predictions equal to the unwanted label, among the pairs whose two labels differ; 0 is best.
        leakage_chance: leakage of the best constant prediction. Higher leakage means that the unwanted label is
            transferred; a swap that does not depend on either clip is at or below it.
        agreement: pairs whose two labels are equal. A swap that changes nothing has this accuracy, so only an accuracy
            above it shows that a factor was swapped.
        towards_unwanted: predictions equal to the unwanted label, among all pairs; equal to `agreement` for a perfect
            swap.
    """

    follows: bool
    accuracy: Tensor
    chance: Tensor
    leakage: Tensor
    leakage_chance: Tensor
    agreement: Tensor
    towards_unwanted: Tensor


class SwapAccuracy(Metric):
    """Accuracy and leakage of swapped clips for all factors, those taken from the donor and those kept from the source.

    One direction alone is not enough: a model that encodes everything in one latent swaps the whole clip, and scores
    100 % on the factors that should follow the donor. Therefore all factors are scored, and a report should have both
    swaps (identity from the donor, and motion from the donor). The scores also depend on the judge: report its accuracy
    beside them.

    The metric sums counts, so the result is exact over batches and processes. Draw the pairs in advance with a seed
    (:func:`~seqdisent.metrics.pick_donors`).

    Args:
        num_classes: {factor: number of classes}, such as ``judge.num_classes``.
        follows: the factors that should follow the donor; the others should be the source's.
        **options: options of :class:`torchmetrics.Metric`.

    Shape:
        - predictions: {factor: class numbers (N,) or logits (N, K)}; tensors, arrays or lists
        - source, donor: {factor: labels (N,)}; factors that are not in `num_classes` are ignored

    Returns:
        {factor: :class:`SwapScores`} from ``compute()``.

    Raises:
        TypeError: values that are not numbers.
        ValueError: `follows` names an unknown factor; in ``update``, a factor that is missing, or has another shape or
            values out of range.

    Example:
        >>> metric = SwapAccuracy({"who": 2, "what": 2}, follows=["what"])
        >>> source = {"who": torch.tensor([0, 1, 1]), "what": torch.tensor([0, 0, 0])}
        >>> donor = {"who": torch.tensor([1, 0, 0]), "what": torch.tensor([1, 1, 1])}
        >>> metric.update({"who": source["who"], "what": torch.tensor([1, 1, 0])}, source, donor)
        >>> scores = metric.compute()
        >>> [round(float(scores[name].accuracy), 2) for name in scores], round(float(scores["what"].leakage), 2)
        ([1.0, 0.67], 0.33)
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, num_classes: Mapping[str, int], follows: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self.num_classes = check_classes(num_classes)
        if isinstance(follows, str) or not set(follows) <= set(num_classes):
            raise ValueError(f"follows: got {follows!r}, expected a sequence of some of {sorted(num_classes)}")
        self.follows = frozenset(follows)
        for i, size in enumerate(self.num_classes.values()):
            for table in ("same", "wanted", "unwanted"):
                self.add_state(f"{table}_{i}", torch.zeros(size, size, dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self, predictions: Mapping[str, Tensor], source: Mapping[str, Tensor], donor: Mapping[str, Tensor]
    ) -> None:
        """Count pairs of clips."""
        predicted = class_numbers("predictions", predictions, self.num_classes, device=self.device)
        count = len(next(iter(predicted.values())))
        sources = class_numbers("source", source, self.num_classes, device=self.device, count=count)
        donors = class_numbers("donor", donor, self.num_classes, device=self.device, count=count)
        for i, (name, size) in enumerate(self.num_classes.items()):
            wanted, unwanted = donors[name], sources[name]
            if name not in self.follows:
                wanted, unwanted = unwanted, wanted
            same = wanted == unwanted
            for table, target, rows in (
                ("same", wanted, same),
                ("wanted", wanted, ~same),
                ("unwanted", unwanted, ~same),
            ):
                getattr(self, f"{table}_{i}").add_(tabulate(target[rows], predicted[name][rows], size))

    def compute(self) -> dict[str, SwapScores]:
        """Return the scores of each factor."""
        scores = {}
        for i, name in enumerate(self.num_classes):
            same, wanted, unwanted = (getattr(self, f"{table}_{i}") for table in ("same", "wanted", "unwanted"))
            accuracy, chance = shares(same + wanted)
            leakage, leakage_chance = shares(unwanted)
            towards_unwanted, _ = shares(same + unwanted)
            agreement = same.sum() / (same.sum() + wanted.sum())
            scores[name] = SwapScores(
                name in self.follows, accuracy, chance, leakage, leakage_chance, agreement, towards_unwanted
            )
        return scores

    def confusion(self) -> dict[str, Tensor]:
        """Return the counts (K, K) of wanted labels (rows) and predictions (columns) of each factor on this process."""
        return {
            name: getattr(self, f"same_{i}") + getattr(self, f"wanted_{i}") for i, name in enumerate(self.num_classes)
        }


def intervention_score(swaps: Sequence[Mapping[str, SwapScores]]) -> Tensor:
    r"""Return the intervention score of the MSD benchmark for a set of swaps.

    .. math::
        1 - \tfrac{1}{2} \bigl(
            \operatorname{mean} |\text{on} - 1| + \operatorname{mean} |\text{off} - \text{chance}| \bigr)

    where *on* and *off* are frequencies of the *source's* label, *on* for the factors that should stay and *off* for
    those that should follow the donor, pooled over all swaps. In the benchmark, chance is 1 / K. Here it is the
    frequency of pairs whose source and donor have the same label. The two are equal for balanced labels and random
    pairs, and a perfect swap has this value for any labels.

    The score measures only whether a swapped factor differs from the source, not whether it equals the donor's: a model
    that draws the factor at random scores 1. Report it with :class:`SwapAccuracy`.

    Args:
        swaps: results of ``SwapAccuracy.compute()``, one per swap (identity from the donor, motion from the donor).

    Returns:
        The score, at most 1.

    Raises:
        TypeError: a single result instead of a list.
        ValueError: no factor that stays, or none that follows the donor.

    Example:
        >>> metric = SwapAccuracy({"who": 2, "what": 2}, follows=["what"])
        >>> labels = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
        >>> source, donor = ({"who": label, "what": label} for label in labels)
        >>> metric.update({"who": source["who"], "what": donor["what"]}, source, donor)
        >>> intervention_score([metric.compute()])
        tensor(1.)
        >>> metric.reset()
        >>> metric.update(source, source, donor)  # nothing was swapped
        >>> intervention_score([metric.compute()])
        tensor(0.7500)

    References:
        Barami et al. Disentanglement beyond static vs. dynamic: a benchmark and evaluation framework for multi-factor
        sequential representations, NeurIPS 2025, and its released code.
    """
    if isinstance(swaps, Mapping):
        raise TypeError("swaps: got the result of one swap, expected a sequence of them, such as [metric.compute()]")
    scores = [score for swap in swaps for score in swap.values()]
    on = [(score.accuracy - 1).abs() for score in scores if not score.follows]
    off = [(score.towards_unwanted - score.agreement).abs() for score in scores if score.follows]
    if not on or not off:
        raise ValueError(
            f"swaps: {len(on)} factors stay and {len(off)} follow the donor, expected at least one of each"
        )
    return 1 - (torch.stack(on).mean() + torch.stack(off).mean()) / 2
