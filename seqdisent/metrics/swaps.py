"""Swaps as a judge sees them: what follows the donor, what stays, what leaks (extra ``metrics``)."""

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
    """What :class:`SwapAccuracy` says of one factor; all are shares in [0, 1], or NaN where no pair can show it.

    Attributes:
        follows: whether the factor should follow the donor; if not, it should stay the source's.
        accuracy: predictions equal to the wanted label, among all pairs; 1 is perfect.
        chance: the most that a constant prediction reaches on the same pairs: how often the commonest wanted label
            comes. 1 / K where the labels are balanced, more where they are not.
        leakage: predictions equal to the unwanted label, among the pairs whose two labels differ. 0 is perfect.
        leakage_chance: the most that a constant prediction reaches there. Leakage above it means that the unwanted
            clip's label came through; a swap that is blind to both clips stays at or below it.
        agreement: pairs whose two labels are the same. There a swap that changes nothing is right, so an accuracy means
            something only where it is above this too.
        towards_unwanted: predictions equal to the unwanted label among all pairs; a perfect swap has `agreement`.
    """

    follows: bool
    accuracy: Tensor
    chance: Tensor
    leakage: Tensor
    leakage_chance: Tensor
    agreement: Tensor
    towards_unwanted: Tensor


class SwapAccuracy(Metric):
    """Judge swapped clips: does each factor follow the clip that it should follow, and nothing of the other?

    One direction alone can be gamed: a model that keeps everything in one latent swaps the whole clip, and scores 100 %
    on the factors that should follow. So all factors are scored at once, and both swaps belong in a report (identity
    from the donor, and motion from the donor). Scores are those of the judge too: show its accuracy beside them.

    It sums counts, so batches and processes add up exactly. Pairs should be drawn beforehand, from a seed
    (:func:`~seqdisent.metrics.pick_donors`).

    Args:
        num_classes: {factor: how many values it has}, such as ``judge.num_classes``.
        follows: the factors that should follow the donor; the others should stay the source's.
        **options: those of :class:`torchmetrics.Metric`.

    Shape:
        - predictions: {factor: class numbers (N,), or logits (N, K)}; tensors, arrays or lists
        - source, donor: {factor: labels (N,)}; factors that are not in `num_classes` are left out

    Returns:
        {factor: :class:`SwapScores`} from ``compute()``.

    Raises:
        TypeError: values that are no numbers.
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
        """Return, for each factor, the counts (K, K) of wanted labels (down) and predictions (across), here so far."""
        return {
            name: getattr(self, f"same_{i}") + getattr(self, f"wanted_{i}") for i, name in enumerate(self.num_classes)
        }


def intervention_score(swaps: Sequence[Mapping[str, SwapScores]]) -> Tensor:
    r"""Return the intervention score of the MSD benchmark for a set of swaps.

    .. math::
        1 - \tfrac{1}{2} \bigl(
            \operatorname{mean} |\text{on} - 1| + \operatorname{mean} |\text{off} - \text{chance}| \bigr)

    where *on* are the accuracies of the factors that should stay, *off* those of the factors that should follow the
    donor, *both towards the source's label*, pooled over all swaps. The benchmark's chance is 1 / K; here it is how
    often the donor's label agrees with the source's on the very pairs, which is the same for balanced labels and random
    pairs, and what a perfect swap gets for any others.

    It asks only whether a swapped factor leaves the source, not whether it arrives at the donor: a model that draws it
    at random scores 1. Read it beside :class:`SwapAccuracy`.

    Args:
        swaps: what ``SwapAccuracy.compute()`` returned for each swap (identity from the donor, motion from the donor).

    Returns:
        The score, at most 1.

    Raises:
        TypeError: the result of one swap alone, which belongs in a list.
        ValueError: the swaps together leave no factor in place, or exchange none.

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
