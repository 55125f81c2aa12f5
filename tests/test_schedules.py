"""Schedules hit their ends, stay in bounds, pass through their points, and are values: frozen, equal, picklable."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from seqdisent import AnnealingSchedule

values = st.floats(-1e3, 1e3)
positive = st.floats(1e-3, 1e3)
spans = st.integers(1, 1000)
steps = st.integers(0, 3000) | st.floats(0, 3000)

RAMPS = {
    "linear": AnnealingSchedule.linear,
    "cosine": AnnealingSchedule.cosine,
    "geometric": AnnealingSchedule.geometric,
}
every_ramp = pytest.mark.parametrize("ramp", RAMPS.values(), ids=RAMPS)


@st.composite
def points(draw: st.DrawFn, min_size: int = 2, max_size: int = 6) -> list[tuple[float, float]]:
    gaps = draw(st.lists(st.integers(1, 50) | st.floats(0.5, 50), min_size=min_size, max_size=max_size))
    start = draw(st.sampled_from((0, 0, 7)))
    return [(start + sum(gaps[: i + 1]) - gaps[0], draw(values)) for i in range(len(gaps))]


def examples() -> dict[str, AnnealingSchedule]:
    """One schedule of each kind, built anew at each call."""
    linear = AnnealingSchedule.linear(0.0, 1.0, num_steps=10)
    return {
        "constant": AnnealingSchedule.constant(2.0),
        "constant for a time": AnnealingSchedule.constant(2.0, num_steps=5),
        "linear": linear,
        "cosine": AnnealingSchedule.cosine(0.0, 1.0, 10),
        "geometric": AnnealingSchedule.geometric(30.0, 1.0, 10),
        "quadratic": AnnealingSchedule.quadratic([(0, 30.0), (5, 0.2), (10, 0.4), (20, 1.0)]),
        "cyclical": AnnealingSchedule.cyclical(0.0, 1.0, cycle_steps=4, num_cycles=3),
        "endless": AnnealingSchedule.cyclical(0.0, 1.0, cycle_steps=4, ramp=1.0),
        "then": linear.then(AnnealingSchedule.cosine(1.0, 0.5, 3)),
        "clamp": linear.clamp(0.2, 0.8),
    }


every_kind = pytest.mark.parametrize("kind", examples())


# Ramps ---------------------------------------------------------------------------------------------------------------


@every_ramp
@given(start=positive, end=positive, span=spans, step=steps)
def test_ramps_hit_both_ends_exactly_and_stay_between_them(ramp, start, end, span, step):
    schedule = ramp(start, end, span)
    assert schedule(0) == start
    assert schedule(span) == schedule(span + 1) == schedule(1e9) == end
    assert schedule.num_steps == span
    low, high = sorted((start, end))
    assert low * (1 - 1e-12) <= schedule(step) <= high * (1 + 1e-12)


@every_ramp
@given(start=positive, end=positive, span=st.integers(1, 60))
def test_ramps_are_monotone(ramp, start, end, span):
    path = [ramp(start, end, span)(step) for step in range(span + 2)]
    if start > end:
        path = path[::-1]
    assert all(b >= a * (1 - 1e-12) for a, b in zip(path, path[1:], strict=False))


@given(values, values, st.integers(1, 500))
def test_ramps_are_half_way_where_they_should_be(start, end, half):
    middle = (start + end) / 2
    assert AnnealingSchedule.linear(start, end, 2 * half)(half) == pytest.approx(middle, rel=1e-9, abs=1e-9)
    assert AnnealingSchedule.cosine(start, end, 2 * half)(half) == pytest.approx(middle, rel=1e-9, abs=1e-9)
    low, high = 1 + abs(start), 1 + abs(end)
    assert AnnealingSchedule.geometric(low, high, 2 * half)(half) == pytest.approx(math.sqrt(low * high), rel=1e-9)


@given(values, values, spans, st.floats(0, 1))
def test_linear_and_cosine_are_their_formulas(start, end, span, part):
    step = part * span
    assume(step < span)
    assert AnnealingSchedule.linear(start, end, span)(step) == pytest.approx((1 - part) * start + part * end, abs=1e-9)
    weight = math.sin(math.pi * part / 2) ** 2
    assert AnnealingSchedule.cosine(start, end, span)(step) == pytest.approx(
        (1 - weight) * start + weight * end, abs=1e-9
    )


@given(positive, positive, st.integers(2, 50))
def test_geometric_takes_the_same_factor_at_every_step(start, end, span):
    schedule = AnnealingSchedule.geometric(start, end, span)
    for step in range(span):
        assert schedule(step + 1) / schedule(step) == pytest.approx((end / start) ** (1 / span), rel=1e-9)


@given(values, steps, st.none() | spans)
def test_constant_is_constant(value, step, span):
    assert AnnealingSchedule.constant(value, span)(step) == value


# Points --------------------------------------------------------------------------------------------------------------


@given(points())
def test_quadratic_passes_through_its_points(points):
    schedule = AnnealingSchedule.quadratic(points)
    for step, value in points:
        assert schedule(step) == value
    assert schedule(0) == points[0][1]
    assert schedule(points[-1][0] + 100) == points[-1][1]
    assert schedule.num_steps == points[-1][0]


@given(points(), st.lists(st.floats(0, 1), min_size=1, max_size=20))
@example([(0, -0.92), (25, 0.93), (27, -0.03)], [24.999999975 / 25])  # rounding alone would leave the bounds
def test_quadratic_pieces_stay_within_their_ends_and_are_monotone(points, parts):
    schedule = AnnealingSchedule.quadratic(points)
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        low, high = min(y0, y1), max(y0, y1)
        path = [y0, *(schedule(min(x0 + part * (x1 - x0), x1)) for part in sorted(parts)), y1]
        assert all(low <= value <= high for value in path)
        direction = 1 if y1 >= y0 else -1
        rounding = 1e-9 * (1 + abs(y0) + abs(y1))
        assert all(direction * (b - a) >= -rounding for a, b in zip(path, path[1:], strict=False))


@given(st.integers(1, 50), st.integers(1, 50), values, st.floats(-10, 10), st.floats(0, 3), st.floats(0, 1))
def test_quadratic_is_the_parabola_through_three_points_where_that_one_is_monotone(a, b, y, slope, curve, part):
    def parabola(x: float) -> float:
        return y + slope * (x + curve * x * x)  # slope * (1 + 2 curve x) has one sign for x >= 0

    schedule = AnnealingSchedule.quadratic([(x, parabola(x)) for x in (0, a, a + b)])
    step = part * (a + b)
    assert schedule(step) == pytest.approx(parabola(step), rel=1e-9, abs=1e-6)


def test_a_parabola_does_not_depend_on_where_its_steps_begin():
    early, late = (AnnealingSchedule.quadratic([(at + x, 1.0 + x + x**2) for x in (0, 2, 6)]) for at in (0, 100))
    for step in range(7):
        assert early(step) == pytest.approx(1 + step + step**2, rel=1e-12)
        assert late(100 + step) == pytest.approx(1 + step + step**2, rel=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_piece_starts_with_at_most_twice_its_mean_slope(sign):
    """The parabola through the three points would leave the first piece; the steepest that does not ends flat."""
    schedule = AnnealingSchedule.quadratic([(0, sign * 30.0), (50, sign * 0.2), (60, sign * 10.2)])
    for step in range(51):
        assert schedule(step) == pytest.approx(sign * (0.2 + 29.8 * (1 - step / 50) ** 2), rel=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_piece_that_would_start_the_wrong_way_starts_flat(sign):
    schedule = AnnealingSchedule.quadratic([(0, 0.0), (10, sign * 1.0), (20, sign * 40.0)])
    for step in range(11):
        assert schedule(step) == pytest.approx(sign * (step / 10) ** 2, rel=1e-12)


def test_quadratic_passes_through_a_point_that_its_parabola_would_miss_by_rounding():
    schedule = AnnealingSchedule.quadratic([(0, 0.8), (3, 2.4), (7, 1.6)])
    assert schedule(3) == 2.4


@given(st.integers(1, 50), values, values, st.floats(0, 1))
def test_quadratic_through_two_points_is_the_straight_line(span, start, end, part):
    schedule = AnnealingSchedule.quadratic([(0, start), (span, end)])
    assert schedule(part * span) == pytest.approx(start + part * (end - start), rel=1e-9, abs=1e-9)


@given(points())
def test_quadratic_pieces_are_parabolas(points):
    schedule = AnnealingSchedule.quadratic(points)
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        a, b, c, d = (schedule(x0 + (x1 - x0) * part) for part in (0.2, 0.4, 0.6, 0.8))
        third_difference = d - 3 * c + 3 * b - a
        assert third_difference == pytest.approx(0, abs=1e-9 * (1 + abs(y0) + abs(y1)))


def test_quadratic_waits_at_its_first_point():
    schedule = AnnealingSchedule.quadratic([(10, 0.0), (20, 1.0), (30, 10.0)])
    assert [schedule(step) for step in range(11)] == [0.0] * 11
    assert schedule(15) > 0


def test_quadratic_does_not_dip_where_the_released_code_does():
    schedule = AnnealingSchedule.quadratic([(0, 30.0), (50, 0.2), (100, 0.4), (200, 1.0)])
    path = [schedule(step) for step in range(201)]
    assert min(path) == 0.2
    assert max(path) == 30.0


# Cycles, sequences, limits -------------------------------------------------------------------------------------------


@given(values, values, st.integers(1, 30), st.integers(1, 5), st.floats(0.05, 1), steps)
def test_cyclical_repeats_then_stays_at_its_end(start, end, cycle, num_cycles, ramp, step):
    schedule = AnnealingSchedule.cyclical(start, end, cycle_steps=cycle, num_cycles=num_cycles, ramp=ramp)
    endless = AnnealingSchedule.cyclical(start, end, cycle_steps=cycle, ramp=ramp)
    total = cycle * num_cycles
    assert schedule.num_steps == total
    assert endless.num_steps == math.inf
    assert all(schedule(cycle * i) == endless(cycle * i) == start for i in range(num_cycles))
    assert schedule(total) == schedule(total + step) == end
    slack = 1e-9 * (abs(start) + abs(end))
    assert min(start, end) - slack <= endless(step) <= max(start, end) + slack
    whole = int(step)
    assert endless(whole) == endless(whole + cycle)
    if whole < total:
        assert schedule(whole) == endless(whole)


def test_cyclical_ramps_up_then_stays_level():
    schedule = AnnealingSchedule.cyclical(1.0, 3.0, cycle_steps=8, num_cycles=2, ramp=0.5)
    one_cycle = [1.0, 1.5, 2.0, 2.5, 3.0, 3.0, 3.0, 3.0]
    assert [schedule(step) for step in range(18)] == [*one_cycle, *one_cycle, 3.0, 3.0]


def test_a_cycle_s_ramp_ends_at_its_end_and_not_at_a_rounding_of_it():
    schedule = AnnealingSchedule.cyclical(2.4, 0.9, cycle_steps=2, ramp=0.5)
    assert 2.4 + (0.9 - 2.4) != 0.9
    assert schedule(1) == schedule(3) == 0.9


@given(values, values, spans, values, spans, steps)
def test_then_runs_one_schedule_after_the_other(start, end, span, last, more, step):
    first, second = AnnealingSchedule.linear(start, end, span), AnnealingSchedule.cosine(end, last, more)
    both = first.then(second)
    assert both.num_steps == span + more
    assert both(span + more) == last
    assert both(span) == end
    assert both(step) == (first(step) if step < span else second(step - span))


def test_then_may_be_chained_and_may_end_without_end():
    hold = AnnealingSchedule.constant(5.0, num_steps=2)
    schedule = hold.then(AnnealingSchedule.linear(4.0, 2.0, 2)).then(
        AnnealingSchedule.cyclical(0.0, 1.0, cycle_steps=2, ramp=1.0)
    )
    assert [schedule(step) for step in range(8)] == [5.0, 5.0, 4.0, 3.0, 0.0, 0.5, 0.0, 0.5]
    assert schedule.num_steps == math.inf


@given(st.sampled_from(sorted(examples())), steps, values, values)
def test_clamp_limits_and_changes_nothing_else(kind, step, a, b):
    schedule, (low, high) = examples()[kind], sorted((a, b))
    clamped = schedule.clamp(low, high)
    assert low <= clamped(step) <= high
    assert clamped(step) in (schedule(step), low, high)
    if low <= schedule(step) <= high:
        assert clamped(step) == schedule(step)
    assert clamped.num_steps == schedule.num_steps


# Schedules are values ------------------------------------------------------------------------------------------------


@every_kind
def test_schedules_survive_pickling(kind):
    schedule = examples()[kind]
    again = pickle.loads(pickle.dumps(schedule))  # noqa: S301 - our own bytes
    assert again == schedule
    assert [again(step) for step in range(30)] == [schedule(step) for step in range(30)]


@every_kind
def test_schedules_are_equal_to_those_built_alike_and_to_no_others(kind):
    schedule = examples()[kind]
    for other_kind, other in examples().items():
        assert (schedule == other) == (kind == other_kind)
        assert (schedule != other) == (kind != other_kind)
    assert hash(schedule) == hash(examples()[kind])
    assert len({schedule, examples()[kind]}) == 1


@every_kind
def test_schedules_are_frozen(kind):
    schedule = examples()[kind]
    for name in [*vars(schedule), "new"]:
        with pytest.raises(FrozenInstanceError):
            setattr(schedule, name, 1.0)


@every_kind
def test_schedules_are_readable(kind):
    schedule = examples()[kind]
    for name in vars(schedule):
        assert f"{name}=" in repr(schedule)
    assert " at 0x" not in repr(schedule)


@every_kind
def test_schedules_have_no_state(kind):
    schedule = examples()[kind]
    forward = [schedule(step) for step in range(30)]
    assert [schedule(step) for step in reversed(range(30))] == forward[::-1]
    assert [schedule(float(step)) for step in range(30)] == forward


def numpys(number: float) -> float:
    return np.int64(number) if isinstance(number, int) else np.float64(number)


def test_numpys_numbers_give_the_same_schedules():
    n = numpys
    pairs = [
        (AnnealingSchedule.constant(n(2.0), n(5)), AnnealingSchedule.constant(2.0, 5)),
        (AnnealingSchedule.linear(n(0), n(1.0), n(4)), AnnealingSchedule.linear(0, 1.0, 4)),
        (AnnealingSchedule.cosine(n(0.0), np.float32(0.5), n(4)), AnnealingSchedule.cosine(0.0, 0.5, 4)),
        (AnnealingSchedule.geometric(n(1.0), n(2.0), np.int32(4)), AnnealingSchedule.geometric(1.0, 2.0, 4)),
        (AnnealingSchedule.quadratic([(n(0), n(1.0)), (n(3), n(2.0))]), AnnealingSchedule.quadratic([(0, 1), (3, 2)])),
        (
            AnnealingSchedule.cyclical(n(0), n(1), cycle_steps=n(4), num_cycles=n(2), ramp=n(0.5)).clamp(
                n(0.1), n(0.9)
            ),
            AnnealingSchedule.cyclical(0, 1, cycle_steps=4, num_cycles=2, ramp=0.5).clamp(0.1, 0.9),
        ),
    ]
    for theirs, ours in pairs:
        assert theirs == ours
        assert pickle.dumps(theirs) == pickle.dumps(ours)  # Python's own numbers are what is kept
        for step in range(10):
            assert theirs(np.int64(step)) == theirs(np.float32(step)) == ours(step)
            assert type(theirs(np.int64(step))) in (int, float)


# Errors --------------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("step", [-1, -1e-9, math.nan, -math.inf, True, False, None, "3", np.int64(-1), np.bool_(True)])
def test_steps_that_make_no_sense_are_refused(kind, step):
    with pytest.raises(ValueError, match="^step: "):
        examples()[kind](step)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: AnnealingSchedule.constant(math.nan), "^value: "),
        (lambda: AnnealingSchedule.constant(True), "^value: "),
        (lambda: AnnealingSchedule.constant(1.0, 0), "^num_steps: "),
        (lambda: AnnealingSchedule.linear(math.inf, 1.0, 3), "^start: "),
        (lambda: AnnealingSchedule.linear(0.0, "1", 3), "^end: "),
        (lambda: AnnealingSchedule.linear(0.0, 1.0, -3), "^num_steps: "),
        (lambda: AnnealingSchedule.linear(0.0, 1.0, 2.5), "^num_steps: "),
        (lambda: AnnealingSchedule.linear(0.0, 1.0, np.float64(2)), "^num_steps: "),
        (lambda: AnnealingSchedule.linear(0.0, np.float64("nan"), 2), "^end: "),
        (lambda: AnnealingSchedule.cosine(math.inf, 1.0, 3), "^start: "),
        (lambda: AnnealingSchedule.cosine(0.0, math.nan, 3), "^end: "),
        (lambda: AnnealingSchedule.cosine(0.0, 1.0, True), "^num_steps: "),
        (lambda: AnnealingSchedule.geometric(0.0, 1.0, 3), "^start: "),
        (lambda: AnnealingSchedule.geometric(1.0, -1.0, 3), "^end: "),
        (lambda: AnnealingSchedule.geometric(math.nan, 1.0, 3), "^start: "),
        (lambda: AnnealingSchedule.geometric(1.0, math.nan, 3), "^end: "),
        (lambda: AnnealingSchedule.quadratic([]), "^points: "),
        (lambda: AnnealingSchedule.quadratic([(0, 1.0)]), "^points: "),
        (lambda: AnnealingSchedule.quadratic([(3, 1.0), (3, 2.0)]), "^points: "),
        (lambda: AnnealingSchedule.quadratic([(3, 1.0), (2, 2.0)]), "^points: "),
        (lambda: AnnealingSchedule.quadratic([(-1, 1.0), (2, 2.0)]), "^points: "),
        (lambda: AnnealingSchedule.quadratic([(0, 1.0), (2, math.nan)]), "^points: "),
        (lambda: AnnealingSchedule.quadratic([(0, 1.0), (math.nan, 2.0)]), "^points: "),
        (lambda: AnnealingSchedule.quadratic([(0, 1.0), (math.inf, 2.0)]), "^points: "),
        (lambda: AnnealingSchedule.cyclical(math.nan, 1.0, cycle_steps=3), "^start: "),
        (lambda: AnnealingSchedule.cyclical(0.0, math.inf, cycle_steps=3), "^end: "),
        (lambda: AnnealingSchedule.cyclical(0.0, 1.0, cycle_steps=0), "^cycle_steps: "),
        (lambda: AnnealingSchedule.cyclical(0.0, 1.0, cycle_steps=3, num_cycles=0), "^num_cycles: "),
        (lambda: AnnealingSchedule.cyclical(0.0, 1.0, cycle_steps=3, ramp=0), "^ramp: "),
        (lambda: AnnealingSchedule.cyclical(0.0, 1.0, cycle_steps=3, ramp=1.5), "^ramp: "),
        (lambda: examples()["linear"].clamp(2.0, 1.0), "^low: "),
        (lambda: examples()["linear"].clamp(math.nan, 1.0), "^low: "),
        (lambda: examples()["constant"].then(examples()["linear"]), "^then: "),
        (lambda: examples()["endless"].then(examples()["linear"]), "^then: "),
    ],
)
def test_schedules_that_make_no_sense_are_refused(factory, message):
    with pytest.raises(ValueError, match=message):
        factory()


def test_then_wants_a_schedule():
    with pytest.raises(TypeError, match="^other: "):
        examples()["linear"].then(0.5)


def test_the_class_itself_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        AnnealingSchedule()
