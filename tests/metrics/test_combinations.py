"""Combinations of factors: counted by hand, and those of generators that combine and that memorise."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from seqdisent.metrics import combination_scores

SIZES = {"who": 4, "what": 3, "where": 2}
ALL = list(itertools.product(*map(range, SIZES.values())))


def labels(combinations):
    return dict(zip(SIZES, torch.tensor(combinations).reshape(-1, len(SIZES)).unbind(1), strict=True))


def draw(generator, count):
    """Return `count` combinations, each factor drawn independently and uniformly."""
    return torch.stack([torch.randint(size, (count,), generator=generator) for size in SIZES.values()], 1)


@given(seed=seeds(), drawn=st.integers(1, 20), train=st.integers(1, 20), held_out=st.integers(1, 20))
def test_counts_are_those_of_loops(seed, drawn, train, held_out):
    generator = torch.Generator().manual_seed(seed)
    found, known, wanted = (draw(generator, count).tolist() for count in (drawn, train, held_out))
    scores = combination_scores(labels(found), labels(known), labels(wanted), SIZES)
    different = [one for i, one in enumerate(wanted) if one not in wanted[:i] and one not in known]
    assert scores.num_held_out == len(different)
    assert scores.new == sum(one not in known for one in found) / drawn
    if not different:
        assert math.isnan(scores.covered)
        assert math.isnan(scores.covered_if_independent)
        return
    assert scores.covered == sum(one in found for one in different) / len(different)

    def probability(combination):
        product = 1.0
        for i, value in enumerate(combination):
            product *= sum(one[i] == value for one in known) / train
        return product

    assert scores.new_if_independent == pytest.approx(sum(probability(one) for one in ALL if list(one) not in known))
    assert scores.covered_if_independent == pytest.approx(
        sum(1 - (1 - probability(one)) ** drawn for one in different) / len(different)
    )


def test_logits_and_class_numbers_are_the_same_and_other_factors_are_ignored():
    numbers = labels(ALL)
    logits = {name: torch.nn.functional.one_hot(values, SIZES[name]).float() for name, values in numbers.items()}
    some = labels(ALL[::2])
    wanted = combination_scores(numbers, some, numbers, SIZES)
    assert combination_scores({**logits, "hair": None}, some, numbers, SIZES) == wanted
    lists = {name: values.tolist() for name, values in numbers.items()}
    assert combination_scores(lists, some, numbers, SIZES) == wanted


def test_one_that_combines_is_at_the_reference_and_one_that_memorises_is_at_zero():
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(ALL), generator=generator).tolist()
    train, held_out = (labels([ALL[i] for i in some]) for some in (order[:16], order[16:]))
    runs = [combination_scores(combined(train, 30, generator), train, held_out, SIZES) for _ in range(400)]
    for share in ("new", "covered"):
        found = torch.tensor([getattr(run, share) for run in runs], dtype=torch.float64)
        expected = getattr(runs[0], f"{share}_if_independent")
        assert abs(found.mean() - expected) < 4 * found.std() / len(runs) ** 0.5  # four standard errors
        assert expected > 0.2
    memorised = combination_scores(train, train, held_out, SIZES)
    assert memorised.new == memorised.covered == 0


def combined(train, count, generator):
    """Draw every factor from the training clips, independently of the others."""
    return {name: values[torch.randint(len(values), (count,), generator=generator)] for name, values in train.items()}


def test_wrong_arguments_are_named():
    good = labels(ALL)
    for position, argument in enumerate(("generated", "train", "held_out")):
        for wrong, match in (({"who": [0]}, "what"), ({**good, "who": torch.full((24,), 4)}, "0 to 3")):
            sets = [good, good, good]
            sets[position] = wrong
            with pytest.raises(ValueError, match=rf"^{argument}.*{match}"):
                combination_scores(*sets, SIZES)
    with pytest.raises(ValueError, match="^num_classes: "):
        combination_scores(good, good, good, {})
