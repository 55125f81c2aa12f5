"""Combinations of factors in generated clips: those that no training clip has, and those of held-out clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import nan, prod
from typing import NamedTuple

import torch
from torch import Tensor

from seqdisent.metrics._predictions import check_classes, class_numbers


class CombinationScores(NamedTuple):
    """Result of :func:`combination_scores`; all but the number are shares in [0, 1].

    Attributes:
        new: generated clips whose combination no training clip has.
        new_if_independent: what `new` would be if each factor were drawn independently, with its frequency in the
            training clips.
        covered: held-out combinations, of those that no training clip has, that some generated clip has; NaN if there
            are none.
        covered_if_independent: what `covered` would be for as many clips, drawn in the same way.
        num_held_out: number of different held-out combinations that no training clip has.
    """

    new: float
    new_if_independent: float
    covered: float
    covered_if_independent: float
    num_held_out: int


def combination_scores(
    generated: Mapping[str, Tensor],
    train: Mapping[str, Tensor],
    held_out: Mapping[str, Tensor],
    num_classes: Mapping[str, int],
) -> CombinationScores:
    r"""Count combinations of factors, such as hair with shirt, that generated clips have and training clips do not.

    A generator that has learnt the factors combines them anew. One that has memorised the clips does not. The reference
    is a generator that draws each factor independently: with :math:`p(c)` the product of the factors' frequencies in
    the training clips, and M generated clips, it has

    .. math::
        \text{new} = 1 - \sum_{c \in \text{train}} p(c), \qquad
        \text{covered} = \operatorname{mean}_{c \in \text{held out} \setminus \text{train}}
        \bigl(1 - (1 - p(c))^M\bigr).

    Coverage grows with M: compare models at the same M. Wrong predictions of the judge count as new combinations, so
    report the same for the judge's predictions on reconstructed training clips, where `new` should be 0. A clip that
    the judge is uncertain of has a combination too: report the judge's confidence (:func:`generation_scores`).

    Args:
        generated: the judge's predictions for generated clips.
        train: labels of the training clips.
        held_out: labels of the held-out clips.
        num_classes: {factor: number of classes} of the factors that make a combination: for characters,
            ``{name: judge.num_classes[name] for name in clips.static_factors}``.

    Shape:
        - generated: {factor: class numbers (M,) or logits (M, K)}; tensors, arrays or lists
        - train, held_out: {factor: labels (N,)}, {factor: labels (L,)}

    Returns:
        The scores.

    Raises:
        TypeError: values that are not numbers.
        ValueError: a factor that is missing, has another shape or values out of range, or a set without clips.

    Example:
        >>> train = {"who": torch.tensor([0, 1]), "what": torch.tensor([0, 1])}
        >>> held_out = {"who": torch.tensor([0, 1]), "what": torch.tensor([1, 0])}
        >>> generated = {"who": torch.tensor([0, 0, 1, 1]), "what": torch.tensor([0, 1, 1, 1])}
        >>> scores = combination_scores(generated, train, held_out, {"who": 2, "what": 2})
        >>> scores.new, scores.new_if_independent, scores.covered, scores.num_held_out
        (0.25, 0.5, 0.5, 2)
    """
    num_classes = check_classes(num_classes)
    drawn, known, wanted = (
        _combinations(argument, values, num_classes)
        for argument, values in (("generated", generated), ("train", train), ("held_out", held_out))
    )
    frequencies = [Counter(column) for column in zip(*known, strict=True)]

    def probability(combination: tuple[int, ...]) -> float:
        return prod(counts[value] / len(known) for counts, value in zip(frequencies, combination, strict=True))

    seen, sought = set(known), set(wanted) - set(known)
    of_each = [1 - (1 - probability(combination)) ** len(drawn) for combination in sought]
    return CombinationScores(
        new=sum(combination not in seen for combination in drawn) / len(drawn),
        new_if_independent=1 - sum(map(probability, seen)),
        covered=len(sought & set(drawn)) / len(sought) if sought else nan,
        covered_if_independent=sum(of_each) / len(sought) if sought else nan,
        num_held_out=len(sought),
    )


def _combinations(argument: str, values: Mapping[str, Tensor], num_classes: Mapping[str, int]) -> list[tuple[int, ...]]:
    """Return the combination of each clip."""
    numbers = class_numbers(argument, values, num_classes, device=torch.device("cpu"))
    combinations = list(zip(*(of.tolist() for of in numbers.values()), strict=True))
    if not combinations:
        raise ValueError(f"{argument}: has no clips, expected at least one")
    return combinations
