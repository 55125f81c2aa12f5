"""Annealing schedules: pure functions of the training step."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from seqdisent._checks import check_positive


class AnnealingSchedule(ABC):
    """A value for every training step, such as a KL weight or a temperature.

    A schedule has no state: ``schedule(step)`` depends only on the step, so a resumed run continues exactly.
    Schedules are immutable, picklable, hashable and comparable. The methods below create them.

    Raises:
        ValueError: a value that is not a finite number, or a number of steps that is not an integer of at least 1.

    Example:
        >>> weight = AnnealingSchedule.linear(0.0, 1.0, num_steps=100)
        >>> [weight(step) for step in (0, 25, 100, 5000)]
        [0.0, 0.25, 1.0, 1.0]
        >>> warm = AnnealingSchedule.constant(30.0, num_steps=10).then(AnnealingSchedule.cosine(30.0, 1.0, 50))
        >>> warm(9), round(warm(35), 6), warm(60)
        (30.0, 15.5, 1.0)
    """

    def __call__(self, step: int | float) -> float:
        """Return the value at `step` >= 0.

        Raises:
            ValueError: a negative step or one that is not a number.
        """
        if isinstance(step, bool) or not isinstance(step, numbers.Real) or not step >= 0:
            raise ValueError(f"step: got {step!r}, expected a number >= 0")
        return self._value(float(step))

    @abstractmethod
    def _value(self, step: float) -> float:
        """Return the value at a valid step."""

    @property
    @abstractmethod
    def num_steps(self) -> float:
        """Number of steps after which the value is constant; infinite if it never is."""

    @staticmethod
    def constant(value: float, num_steps: int | None = None) -> AnnealingSchedule:
        """Return `value` at every step; `num_steps` is the length of this part if :meth:`then` follows."""
        value = _finite("value", value)
        return _Linear(value, value, 0 if num_steps is None else _steps(num_steps))

    @staticmethod
    def linear(start: float, end: float, num_steps: int) -> AnnealingSchedule:
        """Go from `start` to `end` linearly over `num_steps` steps, then stay at `end`."""
        return _Linear(_finite("start", start), _finite("end", end), _steps(num_steps))

    @staticmethod
    def cosine(start: float, end: float, num_steps: int) -> AnnealingSchedule:
        """Go from `start` to `end` along half a cosine period over `num_steps` steps, then stay at `end`."""
        return _Cosine(_finite("start", start), _finite("end", end), _steps(num_steps))

    @staticmethod
    def geometric(start: float, end: float, num_steps: int) -> AnnealingSchedule:
        """Go from `start` to `end`, both positive, by a constant factor over `num_steps` steps, then stay at `end`."""
        start, end = _finite("start", start), _finite("end", end)
        for name, value in (("start", start), ("end", end)):
            if not value > 0:
                raise ValueError(f"{name}: got {value}, expected a positive number")
        return _Geometric(start, end, _steps(num_steps))

    @staticmethod
    def quadratic(points: Iterable[tuple[float, float]]) -> AnnealingSchedule:
        """Interpolate (step, value) points by parabolas, whose slopes agree at the points where possible.

        Between two points the value is monotone: the initial slope of each parabola is limited accordingly. Without
        that limit interpolation overshoots. The pose weight of the released VDSM code, through 30, 0.2, 0.4 and 1,
        falls below 0 and is clipped at 0.005.

        Args:
            points: at least two, with increasing steps >= 0. The value is constant before the first and after the last.

        Raises:
            ValueError: fewer than two points, steps that do not increase, or a number that is not finite.

        Example:
            >>> schedule = AnnealingSchedule.quadratic([(0, 30.0), (50, 0.2), (100, 0.4), (200, 1.0)])
            >>> [round(schedule(step), 2) for step in (0, 50, 100, 200)]
            [30.0, 0.2, 0.4, 1.0]
            >>> min(schedule(step) for step in range(200))
            0.2
        """
        return _Quadratic(tuple((float(step), float(value)) for step, value in points))

    @staticmethod
    def cyclical(
        start: float, end: float, *, cycle_steps: int, num_cycles: int | None = None, ramp: float = 0.5
    ) -> AnnealingSchedule:
        """Repeat a cycle: from `start` to `end` linearly, then constant (Fu et al., NAACL 2019).

        Args:
            start: value at the start of a cycle.
            end: value after the ramp.
            cycle_steps: number of steps of one cycle.
            num_cycles: number of cycles, after which the value stays at `end`; None for no limit.
            ramp: fraction of a cycle, in (0, 1], during which the value changes.

        Example:
            >>> schedule = AnnealingSchedule.cyclical(0.0, 1.0, cycle_steps=4)
            >>> [schedule(step) for step in range(6)]
            [0.0, 0.5, 1.0, 1.0, 0.0, 0.5]
        """
        if not 0 < ramp <= 1:
            raise ValueError(f"ramp: got {ramp}, expected a part of the cycle in (0, 1]")
        cycles = math.inf if num_cycles is None else _steps(num_cycles, "num_cycles")
        start, end = _finite("start", start), _finite("end", end)
        return _Cyclical(start, end, _steps(cycle_steps, "cycle_steps"), cycles, float(ramp))

    def then(self, other: AnnealingSchedule) -> AnnealingSchedule:
        """Follow this schedule for its `num_steps`, then `other` from its step 0.

        Raises:
            ValueError: this schedule has no end (a constant without `num_steps`, or cycles without limit).
            TypeError: `other` is not a schedule.
        """
        if not isinstance(other, AnnealingSchedule):
            raise TypeError(f"other: got {other!r}, expected a schedule (constant(v) for a number)")
        return _Then(self, other)

    def clamp(self, low: float, high: float) -> AnnealingSchedule:
        """Limit the values of this schedule to [low, high]."""
        if not low <= high:
            raise ValueError(f"low: got {low} above high={high}, expected low <= high")
        return _Clamp(self, float(low), float(high))


@dataclass(frozen=True)
class _Ramp(AnnealingSchedule):
    start: float
    end: float
    steps: int

    @property
    def num_steps(self) -> float:
        return self.steps

    def _value(self, step: float) -> float:
        # exactly `end`, without rounding
        return self.end if step >= self.steps else self._between(step / self.steps)

    @abstractmethod
    def _between(self, part: float) -> float:
        """Return the value after a fraction `part`, in [0, 1), of the steps."""


@dataclass(frozen=True)
class _Linear(_Ramp):
    def _between(self, part: float) -> float:
        return self.start + (self.end - self.start) * part


@dataclass(frozen=True)
class _Cosine(_Ramp):
    def _between(self, part: float) -> float:
        return self.start + (self.end - self.start) * (1 - math.cos(math.pi * part)) / 2


@dataclass(frozen=True)
class _Geometric(_Ramp):
    def _between(self, part: float) -> float:
        return float(self.start * (self.end / self.start) ** part)


@dataclass(frozen=True)
class _Quadratic(AnnealingSchedule):
    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if len(self.points) < 2:
            raise ValueError(f"points: got {len(self.points)}, expected at least two (step, value) pairs")
        for point in self.points:
            for number in point:
                _finite("points", number)
        steps = [step for step, _ in self.points]
        if steps[0] < 0 or any(b <= a for a, b in pairwise(steps)):
            raise ValueError(f"points: steps are {steps}, expected them to increase from 0 or more")

    @property
    def num_steps(self) -> float:
        return self.points[-1][0]

    def _value(self, step: float) -> float:
        first_step, first_value = self.points[0]
        if step <= first_step:
            return first_value
        for ((x0, y0), (x1, y1)), slope in zip(pairwise(self.points), self._slopes(), strict=True):
            if step < x1:
                part, width = (step - x0) / (x1 - x0), x1 - x0
                value = y0 + slope * width * part + (y1 - y0 - slope * width) * part**2
                return min(max(value, min(y0, y1)), max(y0, y1))  # against rounding; the parabola is monotone
        return self.points[-1][1]

    def _slopes(self) -> list[float]:
        """Return the slope at the start of each piece."""
        secants = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in pairwise(self.points)]
        slope = secants[0]
        if len(secants) > 1:  # the parabola through the first three points
            (x0, _), (x1, _), (x2, _) = self.points[:3]
            slope -= (secants[1] - secants[0]) / (x2 - x0) * (x1 - x0)
        slopes = []
        for secant in secants:
            slope = min(max(slope, min(0.0, 2 * secant)), max(0.0, 2 * secant))
            slopes.append(slope)
            slope = 2 * secant - slope  # at the end of this parabola
        return slopes


@dataclass(frozen=True)
class _Cyclical(AnnealingSchedule):
    start: float
    end: float
    cycle_steps: int
    num_cycles: float
    ramp: float

    @property
    def num_steps(self) -> float:
        return self.cycle_steps * self.num_cycles

    def _value(self, step: float) -> float:
        if step >= self.num_steps:
            return self.end
        part = (step % self.cycle_steps) / (self.cycle_steps * self.ramp)
        return self.end if part >= 1 else self.start + (self.end - self.start) * part


@dataclass(frozen=True)
class _Then(AnnealingSchedule):
    first: AnnealingSchedule
    second: AnnealingSchedule

    def __post_init__(self) -> None:
        if not 0 < self.first.num_steps < math.inf:
            raise ValueError(
                "then: the first schedule has no end, expected one with num_steps (constant(v, num_steps))"
            )

    @property
    def num_steps(self) -> float:
        return self.first.num_steps + self.second.num_steps

    def _value(self, step: float) -> float:
        return self.first(step) if step < self.first.num_steps else self.second(step - self.first.num_steps)


@dataclass(frozen=True)
class _Clamp(AnnealingSchedule):
    schedule: AnnealingSchedule
    low: float
    high: float

    @property
    def num_steps(self) -> float:
        return self.schedule.num_steps

    def _value(self, step: float) -> float:
        return min(max(self.schedule(step), self.low), self.high)


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name}: got {value!r}, expected a finite number")
    return float(value)


def _steps(value: int, name: str = "num_steps") -> int:
    check_positive(**{name: value})
    return int(value)
