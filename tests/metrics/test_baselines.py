"""Baselines against loops over every coordinate."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Tensors, lengths, mask_of, padding, seeds

from seqdisent.metrics import IntervalCoverage, linear_interpolation, seasonal_naive, seasonal_naive_draws


@st.composite
def sequences(draw):
    """Draw values with a filler wherever they are not known, their mask, what was observed, and what is known."""
    tensors = Tensors(draw(seeds()), draw(st.sampled_from((torch.float32, torch.float64))))
    mask = mask_of(draw(lengths(largest=9)), draw(st.integers(0, 1)))
    values = tensors.normal(*mask.shape, *draw(st.sampled_from(((), (2,), (2, 1, 3)))))
    by_step = draw(st.booleans())
    observed = tensors.uniform(*(mask if by_step else values).shape) < draw(st.sampled_from((0.2, 0.7, 1.1)))
    known = observed.reshape(observed.shape + (1,) * (values.ndim - observed.ndim)).expand(values.shape)
    known = known & mask.reshape(mask.shape + (1,) * (values.ndim - 2))
    return values.where(known, draw(padding())), mask, observed, known


def coordinates(values, known, mask):
    """Iterate over (index of the row, index of the coordinate, values and what is known of its real steps)."""
    for b, count in enumerate(mask.sum(1).tolist()):
        for e in np.ndindex(*values.shape[2:]):
            at = (b, slice(0, count), *e)
            yield b, e, values[at].tolist(), known[at].tolist()


def last_seen(values, known, season, ahead):
    """Return the step that a forecast repeats, looking back season by season, then step by step."""
    at = len(values) - 1 + ahead
    back = [t for t in range(at % season, len(values), season) if known[t]]
    back = back or [t for t in range(len(values)) if known[t]]
    return back[-1] if back else None


def naive(values, known, season, ahead, fill):
    step = last_seen(values, known, season, ahead)
    return fill if step is None else values[step]


def full_seasons(values, known, season, ahead):
    """Count the full seasons between a step of a forecast and the value that it repeats."""
    step, at = last_seen(values, known, season, ahead), len(values) - 1 + ahead
    return 0 if step is None else len(range(step + season, at, season))


def residuals(values, known, season):
    pairs = [t for t in range(season, len(values)) if known[t] and known[t - season]]
    return [values[t] - values[t - season] for t in pairs]


@given(case=sequences(), season=st.integers(1, 4), num_steps=st.integers(1, 9), fill=st.sampled_from((0.0, 7.0)))
def test_the_forecast_is_the_value_of_the_phase_last_seen(case, season, num_steps, fill):
    values, mask, observed, known = case
    season = min(season, values.shape[1])
    found = seasonal_naive(values, num_steps, season, mask=mask, observed=observed, fill=fill)
    assert found.shape == (len(values), num_steps, *values.shape[2:])
    assert found.dtype == values.dtype
    for b, e, row, seen in coordinates(values, known, mask):
        expected = [naive(row, seen, season, ahead, fill) for ahead in range(1, num_steps + 1)]
        assert found[(b, slice(None), *e)].tolist() == expected


def test_without_mask_and_holes_it_is_the_last_season_repeated():
    values = Tensors(0).normal(3, 10, 2)
    assert torch.equal(seasonal_naive(values, 9, 4), values[:, -4:].repeat(1, 3, 1)[:, :9])
    whole = torch.ones(10, dtype=torch.bool)
    assert torch.equal(
        seasonal_naive(values, 9, 4, mask=whole, observed=whole.expand(3, 10)), seasonal_naive(values, 9, 4)
    )


@given(case=sequences(), season=st.integers(1, 3), num_steps=st.integers(1, 7), seed=seeds())
def test_draws_add_residuals_of_the_same_coordinate_scaled_by_seasons_since_the_value(case, season, num_steps, seed):
    values, mask, observed, known = case
    season = min(season, values.shape[1] - 1)
    if season == 0:
        return
    options = {"mask": mask, "observed": observed}
    draw = [
        seasonal_naive_draws(values, num_steps, season, 4, torch.Generator().manual_seed(seed), **options) for _ in "ab"
    ]
    assert torch.equal(*draw)
    assert draw[0].dtype == values.dtype
    centre = seasonal_naive(values, num_steps, season, **options)
    assert draw[0].shape == (4, *centre.shape)
    for b, e, row, seen in coordinates(values, known, mask):
        of_row = residuals(row, seen, season) or [0.0]
        for h in range(num_steps):
            added = (draw[0] - centre)[(slice(None), b, h, *e)] / math.sqrt(1 + full_seasons(row, seen, season, h + 1))
            distance = (added.double().unsqueeze(-1) - torch.tensor(of_row, dtype=torch.float64)).abs().amin(-1)
            assert float(distance.max()) < 1e-5


def test_every_residual_is_drawn_as_often():
    values = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [3.0, 9.0], [6.0, 4.0], [10.0, 8.0]]])
    observed = torch.ones(1, 5, 2, dtype=torch.bool)
    observed[0, 2, 1] = False  # leaves 1 and 4 of the second coordinate
    draws = seasonal_naive_draws(values, 1, 1, 8000, torch.Generator().manual_seed(0), observed=observed)[:, 0, 0]
    for coordinate, last, wanted in ((0, 10, [1, 2, 3, 4]), (1, 8, [1, 4])):
        found, counts = (draws[:, coordinate] - last).unique(return_counts=True)
        assert found.tolist() == wanted
        share = 1 / len(wanted)
        assert counts.tolist() == pytest.approx(
            [8000 * share] * len(wanted), abs=4 * (8000 * share * (1 - share)) ** 0.5
        )
    both = draws - torch.tensor([10.0, 8.0])
    assert len(both.unique(dim=0)) == 8  # coordinates independently


def test_intervals_of_a_seasonal_random_walk_cover_at_every_distance():
    walks = Tensors(0).normal(2000, 70, 3).cumsum(1).flatten(1)  # 70 seasons of 3 steps
    past, future = walks[:, :-9], walks[:, -9:]
    draws = seasonal_naive_draws(past, 9, 3, 99, torch.Generator().manual_seed(0))
    for season in range(3):
        steps = slice(3 * season, 3 * season + 3)
        metric = IntervalCoverage((0.8,))
        metric.update(draws[:, :, steps], future[:, steps])
        scores = metric.compute()
        assert float(scores.coverage[0.8]) == pytest.approx(float(scores.expected[0.8]), abs=0.025)


@pytest.mark.parametrize("missing", [0, 3, 6])
def test_intervals_are_wider_where_the_last_values_were_not_measured(missing):
    walks = Tensors(0).normal(2000, 70, 3).cumsum(1).flatten(1)  # 70 seasons of 3 steps
    past, future = walks[:, :-3], walks[:, -3:]
    observed = torch.ones_like(past, dtype=torch.bool)
    observed[:, past.shape[1] - missing :] = False
    draws = seasonal_naive_draws(past, 3, 3, 99, torch.Generator().manual_seed(0), observed=observed)
    metric = IntervalCoverage((0.8,))
    metric.update(draws, future)
    scores = metric.compute()
    assert float(scores.coverage[0.8]) == pytest.approx(float(scores.expected[0.8]), abs=0.025)


@given(case=sequences(), fill=st.sampled_from((0.0, 7.0)))
def test_interpolation_is_numpys_in_each_coordinate(case, fill):
    values, mask, observed, known = case
    found = linear_interpolation(values, observed, mask, fill=fill)
    assert found.dtype == values.dtype
    assert torch.equal(found[known], values[known])
    digits = 1e-12 if values.dtype == torch.float64 else 1e-6
    for b, e, row, seen in coordinates(values, known, mask):
        at = [t for t in range(len(row)) if seen[t]]
        expected = np.interp(range(len(row)), at, [row[t] for t in at]) if at else np.full(len(row), fill)
        assert found[(b, slice(0, len(row)), *e)].tolist() == pytest.approx(expected.tolist(), abs=digits)
    assert not found[~mask].any()


@given(case=sequences(), seed=seeds(), padded=padding())
def test_interpolation_over_times_is_numpys(case, seed, padded):
    values, mask, observed, known = case
    times = (0.1 + Tensors(seed).uniform(*mask.shape)).cumsum(1).double()
    found = linear_interpolation(values, observed, mask, times=times.where(mask, padded))
    assert found.dtype == values.dtype
    digits = 1e-12 if values.dtype == torch.float64 else 1e-5
    for b, e, row, seen in coordinates(values, known, mask):
        at, when = [t for t in range(len(row)) if seen[t]], times[b].numpy()
        expected = np.interp(when[: len(row)], when[at], [row[t] for t in at]) if at else np.zeros(len(row))
        assert found[(b, slice(0, len(row)), *e)].tolist() == pytest.approx(expected.tolist(), abs=digits)
    assert not found[~mask].any()


@pytest.mark.parametrize(
    ("times", "error", "said"),
    [
        (torch.arange(6).reshape(2, 3), TypeError, "times: got dtype torch.int64, expected a floating-point tensor"),
        (torch.arange(3.0), ValueError, r"times: has shape \(3,\), expected \(2, 3\), one for each step"),
        (torch.tensor([[0.0, 1.0, 1.0]] * 2), ValueError, "times: got some that do not increase, expected each real"),
        (torch.tensor([[0.0, torch.nan, 1.0]] * 2), ValueError, "times: got 2 values that are not finite"),
    ],
)
def test_times_that_are_refused_are_named(times, error, said):
    values = torch.zeros(2, 3, 1)
    with pytest.raises(error, match=said):
        linear_interpolation(values, torch.ones(2, 3, dtype=torch.bool), times=times)


@pytest.mark.parametrize("what", ["naive", "draws", "interpolation", "over times"])
def test_gradients_reach_known_values_alone_and_are_finite(what):
    values = Tensors(0).normal(2, 6, 2)
    observed = Tensors(1).uniform(2, 6, 2) < 0.6
    observed[0, :, 1] = False
    values = values.where(observed, torch.nan).requires_grad_()
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    times = torch.arange(6.0).square().where(mask, torch.nan)
    made = {
        "naive": lambda: seasonal_naive(values, 4, 2, observed=observed),
        "draws": lambda: seasonal_naive_draws(values, 4, 2, 3, torch.Generator().manual_seed(0), observed=observed),
        "interpolation": lambda: linear_interpolation(values, observed),
        "over times": lambda: linear_interpolation(values, observed, mask, times=times),
    }[what]()
    made.square().sum().backward()
    assert not values.grad[~observed].any()
    assert values.grad.isfinite().all()
    assert values.grad.any()
