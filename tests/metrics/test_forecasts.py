"""Scores of draws against loops over every scored value, closed forms, and what they must not see."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Tensors, lengths, mask_of, padding, seeds

from seqdisent.metrics import CRPS, EnergyScore, IntervalCoverage, QuantileLoss

LEVELS = (0.25, 0.9)
METRICS = {
    "fair CRPS": CRPS,
    "plain CRPS": lambda: CRPS(fair=False),
    "fair energy": EnergyScore,
    "plain energy": lambda: EnergyScore(fair=False),
    "energy by step": lambda: EnergyScore(by_step=True),
    "coverage": lambda: IntervalCoverage(LEVELS),
    "loss": lambda: QuantileLoss(LEVELS),
}
each_metric = pytest.mark.parametrize("name", METRICS)


@st.composite
def cases(draw):
    """Draw (draws, target, mask, observed) with a filler wherever nothing is scored, and what is scored."""
    tensors = Tensors(draw(seeds()))
    mask = mask_of(draw(lengths()), draw(st.integers(0, 1)))
    event = draw(st.sampled_from(((), (2,), (2, 1, 3))))
    draws = 3 * tensors.normal(draw(st.integers(2, 6)), *mask.shape, *event)
    target = tensors.normal(*mask.shape, *event)
    holes = draw(st.sampled_from(("none", "steps", "coordinates")))
    observed = None if holes == "none" else tensors.uniform(*(mask if holes == "steps" else target).shape) < 0.7
    scored = mask.reshape(mask.shape + (1,) * len(event)).expand(target.shape).clone()
    if observed is not None:
        observed[0, 0] = True
        scored &= observed.reshape(observed.shape + (1,) * (target.ndim - observed.ndim))
    filler = draw(padding())
    return (draws.where(scored, filler), target.where(scored, filler), mask, observed), scored


def computed(name, *batches):
    metric = METRICS[name]()
    for batch in batches:
        metric.update(*batch)
    return numbers(metric.compute())


def numbers(result):
    """Return a result as a flat list of floats."""
    if isinstance(result, torch.Tensor):
        return [float(result)]
    parts = [part.values() if isinstance(part, dict) else [part] for part in result]
    return [float(value) for part in parts for value in part]


def kernel_score(vectors, truth, *, fair):
    """Return the score of draws (lists) against a list, by all pairs."""
    size = len(vectors)
    near = sum(math.dist(x, truth) for x in vectors) / size
    return near - sum(math.dist(x, y) for x in vectors for y in vectors) / (2 * size * (size - 1 if fair else size))


def quantile(values, level):
    values = sorted(values)
    at = level * (len(values) - 1)
    low = min(int(at), len(values) - 2)
    return values[low] + (at - low) * (values[low + 1] - values[low])


def by_loops(name, draws, target, scored):
    """Return the score by loops over sequences, steps, values and pairs of draws."""
    places = scored.nonzero().tolist()
    values = [(draws[(slice(None), *at)].tolist(), float(target[tuple(at)])) for at in places]
    if "CRPS" in name:
        scores = [kernel_score([[x] for x in xs], [y], fair="fair" in name) for xs, y in values]
        return [sum(scores) / len(scores)]
    if "energy" in name:
        groups = sorted({tuple(at[: 2 if "step" in name else 1]) for at in places})
        scores = [
            kernel_score(
                draws[(slice(None), *at)][:, scored[at]].tolist(),
                target[at][scored[at]].tolist(),
                fair="plain" not in name,
            )
            for at in groups
        ]
        return [sum(scores) / len(scores)]
    if name == "coverage":
        ends = [[(quantile(x, (1 - c) / 2), quantile(x, (1 + c) / 2), y) for x, y in values] for c in LEVELS]
        coverage = [sum(low <= y <= high for low, high, y in level) / len(values) for level in ends]
        expected = [c * (len(draws) - 1) / (len(draws) + 1) for c in LEVELS]
        return coverage + expected + [sum(high - low for low, high, _ in level) / len(values) for level in ends]
    errors = [[y - quantile(x, c) for x, y in values] for c in LEVELS]
    sums = [sum(c * e if e > 0 else (c - 1) * e for e in of_level) for c, of_level in zip(LEVELS, errors, strict=True)]
    weighted = [2 * x / sum(abs(y) for _, y in values) for x in sums]
    return [x / len(values) for x in sums] + weighted + [sum(weighted) / len(LEVELS)]


@each_metric
@given(case=cases())
def test_scores_are_those_of_loops_whatever_is_not_scored(name, case):
    batch, scored = case
    assert computed(name, batch) == pytest.approx(by_loops(name, *batch[:2], scored), abs=1e-9)


@each_metric
@given(case=cases(), other=st.integers(2, 6), seed=seeds())
def test_batches_and_processes_add_up(name, case, other, seed):
    (draws, target, mask, observed), scored = case
    again = 2 * Tensors(seed).normal(2 * other, *target.shape)  # as many values, another number of draws
    batches = (draws, target, mask, observed), (again, target, mask, observed)
    called, first, second = (METRICS[name]() for _ in range(3))
    for batch, part in zip(batches, (first, second), strict=True):
        assert numbers(called(*batch)) == pytest.approx(computed(name, batch))
        part.update(*batch)
    first.merge_state(second)
    both = [sum(x) / 2 for x in zip(*(by_loops(name, *batch[:2], scored) for batch in batches), strict=True)]
    for found in (numbers(called.compute()), numbers(first.compute()), computed(name, *batches)):
        assert found == pytest.approx(both, abs=1e-9)


@each_metric
def test_neither_the_precision_nor_where_zero_is_costs_digits(name):
    tensors = Tensors(0)
    draws, target = 2**14 + tensors.normal(100, 3, 4), 2**14 + tensors.normal(3, 4)
    draws, target = draws.float(), target.float()
    expected = computed(name, (draws.double(), target.double()))
    assert computed(name, (draws, target)) == pytest.approx(expected, rel=1e-5)
    half = draws.bfloat16(), target.bfloat16()
    assert computed(name, half) == computed(name, tuple(x.float() for x in half))


def test_energy_of_many_draws_is_that_of_all_pairs():
    draws, target = Tensors(0).normal(130, 1, 3), torch.zeros(1, 3, dtype=torch.float64)
    for name in ("fair energy", "plain energy"):
        assert computed(name, (draws, target)) == pytest.approx(by_loops(name, draws, target, target == 0))


@pytest.mark.parametrize("fair", [True, False])
@given(case=cases())
def test_energy_of_single_numbers_is_the_crps(fair, case):
    (draws, target, mask, observed), _ = case
    if target.ndim == 2:
        energy, crps = EnergyScore(fair=fair, by_step=True), CRPS(fair=fair)
        for metric in (energy, crps):
            metric.update(draws, target, mask, observed)
        torch.testing.assert_close(energy.compute(), crps.compute())


@pytest.mark.parametrize("size", [2, 10])
@pytest.mark.parametrize("fair", [True, False])
def test_crps_of_gaussian_draws_has_the_expectation_of_the_closed_form(size, fair):
    count, loc, scale, y = 100_000, 1.0, 2.0, 2.5
    draws = loc + scale * Tensors(size).normal(size, 1, count)
    metric = CRPS(fair=fair)
    metric.update(draws, torch.full((1, count), y, dtype=torch.float64))
    z = (y - loc) / scale
    below, density = 0.5 * (1 + math.erf(z / math.sqrt(2))), math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    expected = scale * (z * (2 * below - 1) + 2 * density - 1 / math.sqrt(math.pi))
    expected += 0 if fair else scale / (math.sqrt(math.pi) * size)  # half the mean distance of two draws, over S
    assert float(metric.compute()) == pytest.approx(expected, abs=4 * 2 * scale / math.sqrt(count))


def test_energy_sees_dependence_that_crps_cannot():
    tensors = Tensors(0)
    shared = tensors.normal(51, 400, 1).expand(-1, -1, 8)  # all steps of a sequence are equal
    independent = tensors.normal(50, 400, 8)
    found = {}
    for name in ("fair CRPS", "fair energy", "energy by step"):
        found[name] = [computed(name, (draws, shared[50]))[0] for draws in (shared[:50], independent)]
    assert found["fair energy"][0] < 0.95 * found["fair energy"][1]
    assert found["fair CRPS"][0] == pytest.approx(found["fair CRPS"][1], rel=0.02)
    assert found["energy by step"] == pytest.approx(found["fair CRPS"])


@pytest.mark.parametrize("size", [2, 9, 50])
def test_draws_of_the_truth_cover_what_is_expected_and_no_more(size):
    sample = Tensors(size).uniform(size + 1, 1, 20_000)
    metric = IntervalCoverage((0.5, 0.9))
    metric.update(sample[:-1], sample[-1])
    scores = metric.compute()
    for level in (0.5, 0.9):
        assert float(scores.coverage[level]) == pytest.approx(float(scores.expected[level]), abs=4 * 0.5 / 141)
        assert float(scores.width[level]) == pytest.approx(float(scores.expected[level]), abs=0.02)  # of a uniform


def test_a_mean_repeated_is_no_interval():
    truth = Tensors(0).normal(1, 1000)
    metric = IntervalCoverage()
    metric.update(torch.zeros(20, 1, 1000, dtype=torch.float64), truth)
    scores = metric.compute()
    assert numbers(scores) == [0, 0, *numbers(scores)[2:4], 0, 0]


def test_the_weighted_loss_of_the_median_is_the_normalised_deviation():
    tensors = Tensors(0)
    draws, target = tensors.normal(11, 4, 5), tensors.normal(4, 5)
    metric = QuantileLoss((0.5,))
    metric.update(draws, target)
    deviation = (draws.median(0).values - target).abs().sum() / target.abs().sum()
    torch.testing.assert_close(metric.compute().weighted[0.5], deviation)


def test_default_levels():
    assert QuantileLoss().levels == tuple(k / 10 for k in range(1, 10))
    assert IntervalCoverage().levels == (0.5, 0.9)
