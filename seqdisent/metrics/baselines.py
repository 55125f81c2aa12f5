"""Forecasts and imputations without a model, which a model's should be better than."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seqdisent._checks import check_positive
from seqdisent.metrics._draws import check_finite, check_floating, known_places


def seasonal_naive(
    values: Tensor,
    num_steps: int,
    season: int,
    *,
    mask: Tensor | None = None,
    observed: Tensor | None = None,
    fill: float = 0.0,
) -> Tensor:
    r"""Forecast the value one season before, repeated.

    A sequence is continued after its own last real step. Each step of the forecast has the last observed value of its
    phase; a phase without one has the last observed value of any phase.

    Args:
        values: (B, T, \*E); anything in padding and in holes.
        num_steps: H, how many steps to forecast.
        season: steps of a season, at most T; 1 repeats the last value.
        mask: (B, T) bool, which steps are real; None for all.
        observed: (B, T) or (B, T, \*E) bool, True where measured; None for all.
        fill: what a coordinate has of which nothing was observed.

    Returns:
        (B, H, \*E).

    Raises:
        TypeError: `values` is not floating point; `mask` or `observed` is not bool.
        ValueError: fewer than one step to forecast or in a season, a season longer than the values, shapes that do not
            fit, or an observed value that is not finite.

    Example:
        >>> seasonal_naive(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 4, season=3)
        tensor([[2., 3., 4., 2.]])

    References:
        Hyndman and Athanasopoulos. Forecasting: principles and practice, 3rd edition, section 5.2.
    """
    return _last_seen(values, num_steps, season, mask, observed, fill)[0]


def seasonal_naive_draws(
    values: Tensor,
    num_steps: int,
    season: int,
    num_samples: int,
    generator: torch.Generator,
    *,
    mask: Tensor | None = None,
    observed: Tensor | None = None,
    fill: float = 0.0,
) -> Tensor:
    r"""Draw forecasts around :func:`seasonal_naive`, with residuals of the sequence itself.

    A draw adds to each step a residual :math:`x_t - x_{t - m}` of the same sequence and coordinate, drawn with
    replacement from those whose both values were observed. With k full seasons between the step and the value that is
    repeated there, the variance of a seasonal random walk grows to k + 1 times that of a residual, so the residual is
    multiplied by :math:`\sqrt{k + 1}`: the older the value, the wider the draws. Residuals are not centred, so a
    trend widens and shifts the draws. Steps and coordinates are drawn independently of each other: quantiles of a step
    are intervals, a draw is no realistic trajectory.

    Args:
        values: as :func:`seasonal_naive`.
        num_steps: H, how many steps to forecast.
        season: m, steps of a season, fewer than T.
        num_samples: S, how many draws.
        generator: seeded, of the draws.
        mask: as there.
        observed: as there.
        fill: as there.

    Returns:
        (S, B, H, \*E). A coordinate without a residual has no spread.

    Raises:
        TypeError: as :func:`seasonal_naive`.
        ValueError: as there; fewer than one draw, or a season of T steps, of which no residual is left.

    Example:
        >>> values = torch.tensor([[0.0, 5.0, 1.0, 6.0, 2.0, 7.0]])  # each season 1 higher
        >>> seasonal_naive_draws(values, 4, 2, 2, torch.Generator().manual_seed(0))
        tensor([[[3.0000, 8.0000, 3.4142, 8.4142]],
        <BLANKLINE>
                [[3.0000, 8.0000, 3.4142, 8.4142]]])

    References:
        Hyndman and Athanasopoulos. Forecasting: principles and practice, 3rd edition, section 5.5. There the residuals
        are added season by season, which gives the same variance.
    """
    centre, distance = _last_seen(values, num_steps, season, mask, observed, fill)
    check_positive(num_samples=num_samples)
    known = _known(values, mask, observed)
    if season == values.shape[1]:
        raise ValueError(f"season: got {season}, expected fewer than the {season} steps of values, for residuals")
    known = known[:, season:] & known[:, :-season]
    residuals = torch.where(known, values[:, season:] - values[:, :-season], 0.0)
    first = known.int().argsort(dim=1, descending=True, stable=True)  # those that are known
    shape = (len(values), num_samples * num_steps, *values.shape[2:])
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device).to(values.device)
    drawn = residuals.gather(1, first).gather(1, (uniform * known.sum(1, keepdim=True)).long())
    scale = ((distance - 1) // season + 1).to(values.dtype).sqrt()
    added: Tensor = scale * drawn.unflatten(1, (num_samples, num_steps)).movedim(1, 0)
    return centre + added


def linear_interpolation(
    values: Tensor,
    observed: Tensor,
    mask: Tensor | None = None,
    *,
    times: Tensor | None = None,
    fill: float = 0.0,
) -> Tensor:
    r"""Fill holes by straight lines between the observed values of each coordinate.

    Before the first and after the last observed value, it is repeated. Without `times`, lines are straight over the
    steps, whatever time lies between them.

    Args:
        values: (B, T, \*E); anything in padding and in holes.
        observed: (B, T) or (B, T, \*E) bool, True where measured.
        mask: (B, T) bool, which steps are real; None for all.
        times: (B, T), when each step was, increasing; anything in padding. None for equal distances.
        fill: what a coordinate has of which nothing was observed.

    Returns:
        (B, T, \*E): the values where they were observed, 0 in padding.

    Raises:
        TypeError: `values` or `times` is not floating point; `mask` or `observed` is not bool.
        ValueError: shapes that do not fit, an observed value or the time of a real step that is not finite, or times
            that do not increase.

    Example:
        >>> values = torch.tensor([[torch.nan, 1.0, torch.nan, torch.nan, 4.0]])
        >>> linear_interpolation(values, ~values.isnan())
        tensor([[1., 1., 2., 3., 4.]])
        >>> linear_interpolation(values, ~values.isnan(), times=torch.tensor([[0.0, 1.0, 5.0, 6.0, 7.0]]))
        tensor([[1.0000, 1.0000, 3.0000, 3.5000, 4.0000]])
    """
    known = _known(values, mask, observed)
    num_steps = values.shape[1]
    step = torch.arange(num_steps, device=values.device).reshape(-1, *[1] * (values.ndim - 2)).expand(values.shape)
    before = torch.where(known, step, -1).cummax(1).values
    after = torch.where(known, step, num_steps).flip(1).cummin(1).values.flip(1)
    left = torch.where(before >= 0, before, after).clamp(max=num_steps - 1)
    right = torch.where(after < num_steps, after, before).clamp(min=0)
    at = step.double() if times is None else _spread_times(times, values, mask)
    start, length = at.gather(1, left), at.gather(1, right) - at.gather(1, left)
    weight = (at - start) / torch.where(length > 0, length, 1.0)
    line = torch.lerp(values.gather(1, left), values.gather(1, right), weight.to(values.dtype))
    line = torch.where(known.any(1, keepdim=True), line, fill)
    return torch.where(known_places(values, mask, None), line, 0.0)


def _spread_times(times: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Return times as float64 of the values' shape, 0 in padding, after a look at them."""
    check_floating("times", times)
    if times.shape != values.shape[:2]:
        raise ValueError(
            f"times: has shape {tuple(times.shape)}, expected {tuple(values.shape[:2])}, one for each step"
        )
    real = known_places(times, mask, None)
    check_finite("times", times, real)
    if bool((real[:, 1:] & (times.diff(dim=1) <= 0)).any()):
        raise ValueError("times: got some that do not increase, expected each real step later than the one before")
    times = torch.where(real, times.double(), 0.0)
    return times.reshape(times.shape + (1,) * (values.ndim - 2)).expand(values.shape)


def _known(values: Tensor, mask: Tensor | None, observed: Tensor | None) -> Tensor:
    """Return which values are real and were observed, after a look at these."""
    check_floating("values", values)
    if values.ndim < 2 or values.shape[1] == 0:
        raise ValueError(f"values: has shape {tuple(values.shape)}, expected (B, T, *E) with at least one step")
    known = known_places(values, mask, observed)
    check_finite("values", values, known)
    return known


def _last_seen(
    values: Tensor, num_steps: int, season: int, mask: Tensor | None, observed: Tensor | None, fill: float
) -> tuple[Tensor, Tensor]:
    r"""Return what each step of the forecast repeats, and how many steps before that step it was observed.

    Both are (B, H, \*E).
    """
    check_positive(num_steps=num_steps, season=season)
    known = _known(values, mask, observed)
    if season > values.shape[1]:
        raise ValueError(f"season: got {season}, expected at most the {values.shape[1]} steps of values")
    newest, known = _newest_first(values, known, mask, season)
    by_season = known.unflatten(1, (-1, season))
    column = (-1, *[1] * (values.ndim - 2))
    of_phase = _first(by_season) * season + torch.arange(season, device=values.device).reshape(column)
    age = torch.where(by_season.any(1), of_phase, _first(known).unsqueeze(1))
    last = torch.where(known.any(1, keepdim=True), newest.gather(1, age), fill)
    ahead = torch.arange(1, num_steps + 1, device=values.device)
    phase = -ahead % season
    return last[:, phase], age[:, phase] + ahead.reshape(column)


def _newest_first(values: Tensor, known: Tensor, mask: Tensor | None, season: int) -> tuple[Tensor, Tensor]:
    """Return values and what is known of them, from each row's last real step backwards, over whole seasons."""
    num_steps = values.shape[1]
    age = torch.arange(math.ceil(num_steps / season) * season, device=values.device)
    lengths = torch.full_like(age[:1], num_steps) if mask is None else mask.sum(-1)
    step = (lengths.unsqueeze(-1) - 1 - age).expand(len(values), -1)
    step = step.reshape(step.shape + (1,) * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
    at = step.clamp(min=0)
    return values.gather(1, at), known.gather(1, at) & (step >= 0)


def _first(known: Tensor) -> Tensor:
    """Return the position of the first True along dimension 1; 0 where there is none."""
    return known.int().argmax(1)
