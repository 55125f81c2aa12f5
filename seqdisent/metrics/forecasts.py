"""Scores of draws from a forecast or an imputation against what happened (extra ``metrics``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqdisent.metrics._draws import check_levels, errors_of_draws, quantiles

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        "seqdisent.metrics.forecasts needs torchmetrics; install it with: pip install 'seqdisent[metrics]'"
    ) from error


class CRPS(Metric):
    r"""Continuous ranked probability score of draws, averaged over the scored values; 0 is best.

    For each value y and its draws :math:`x_1, \dots, x_S`,

    .. math::
        \frac{1}{S} \sum_i |x_i - y| - \frac{1}{2 S (S - 1)} \sum_{i, j} |x_i - x_j|

    in units of the data; the absolute error if all draws are equal. Each value is scored by itself, so the score says
    nothing about dependence between steps or coordinates: :class:`EnergyScore` does.

    Args:
        fair: the unbiased estimator above, whose expectation does not depend on S; a single value may be negative.
            False divides by :math:`2 S^2` instead, which scores the draws as if they were the whole forecast and is
            larger with few draws.
        **options: options of :class:`torchmetrics.Metric`.

    Shape:
        - draws: (S, B, T, \*E) with S >= 2, floating point
        - target: (B, T, \*E), floating point
        - mask: (B, T) bool, which steps are real; None for all
        - observed: (B, T) or (B, T, \*E) bool, which values are scored; None for all. What is padding or not observed
          may hold anything, in `draws` and in `target`.

    Returns:
        A float64 scalar from ``compute()``.

    Raises:
        TypeError: `draws` or `target` is not floating point; `mask` or `observed` is not bool.
        ValueError: fewer than two draws, a shape or device that does not fit, or a scored value that is not finite; in
            ``compute``, nothing was scored.

    Example:
        >>> metric = CRPS()
        >>> target = torch.tensor([[0.0, torch.nan]])
        >>> metric.update(torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]], [[6.0, 0.0]]]), target, observed=~target.isnan())
        >>> metric.compute()
        tensor(1.3333, dtype=torch.float64)

    References:
        Gneiting and Raftery. Strictly proper scoring rules, prediction, and estimation, JASA 2007 (equation 21).
        Ferro. Fair scores for ensemble forecasts, QJRMS 2014 (the fair estimator).
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self, *, fair: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.fair = fair
        self.total: Tensor
        self.count: Tensor
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, draws: Tensor, target: Tensor, mask: Tensor | None = None, observed: Tensor | None = None) -> None:
        """Add a batch."""
        errors, scored, _ = errors_of_draws(draws, target, mask, observed)
        size = len(errors)
        # of sorted draws, the sum of x_j - x_i over i < j
        weights = 2 * torch.arange(size, dtype=torch.float64, device=errors.device) - (size - 1)
        spread = errors.sort(0).values.flatten(1).sum(1, dtype=torch.float64) @ weights
        distance = errors.abs().sum(dtype=torch.float64) / size
        self.total += (distance - spread / (size * (size - 1 if self.fair else size))).to(self.device)
        self.count += scored.sum().to(self.device)

    def compute(self) -> Tensor:
        """Return the average."""
        _check_scored(self.count)
        return self.total / self.count


class EnergyScore(Metric):
    r"""Energy score of whole trajectories, averaged over the sequences; 0 is best.

    For each sequence, the vector y of all its scored values and its draws :math:`x_1, \dots, x_S`,

    .. math::
        \frac{1}{S} \sum_i \lVert x_i - y \rVert - \frac{1}{2 S (S - 1)} \sum_{i, j} \lVert x_i - x_j \rVert

    in units of the data. It is proper for the joint distribution over steps and coordinates, but reacts weakly to wrong
    dependence. It grows with the number of scored values, as :math:`\sqrt n` where these are alike: compare forecasts
    of the same values, and bring coordinates to one scale first. Costs :math:`S^2` distances for each sequence.

    Args:
        fair: as for :class:`CRPS`.
        by_step: score each step by itself, (S, \*E), and average over the steps instead.
        **options: options of :class:`torchmetrics.Metric`.

    Shape:
        - draws, target, mask, observed: as for :class:`CRPS`

    Returns:
        A float64 scalar from ``compute()``. Sequences (or steps) of which nothing is scored are left out.

    Raises:
        TypeError: as :class:`CRPS`.
        ValueError: as there.

    Example:
        >>> metric = EnergyScore(fair=False)
        >>> metric.update(torch.tensor([[[3.0, 4.0]], [[-3.0, -4.0]]]), torch.zeros(1, 2))
        >>> metric.compute()
        tensor(2.5000, dtype=torch.float64)

    References:
        Gneiting and Raftery. Strictly proper scoring rules, prediction, and estimation, JASA 2007 (equation 22).
        Pinson and Tastu. Discrimination ability of the energy score, 2013 (how weakly it reacts to dependence).
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self, *, fair: bool = True, by_step: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.fair, self.by_step = fair, by_step
        self.total: Tensor
        self.count: Tensor
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, draws: Tensor, target: Tensor, mask: Tensor | None = None, observed: Tensor | None = None) -> None:
        """Add a batch."""
        errors, scored, _ = errors_of_draws(draws, target, mask, observed)
        size = len(errors)
        if self.by_step:
            errors, scored = errors.flatten(1, 2).unsqueeze(-1), scored.flatten(0, 1).unsqueeze(-1)
        vectors = errors.flatten(2).transpose(0, 1)  # (N, S, D)
        distance = torch.linalg.vector_norm(vectors, dim=-1).sum(dtype=torch.float64) / size
        spread = torch.zeros_like(distance)
        for some in vectors.split(64, dim=1):  # not all S^2 at once; exact, as a matrix product would not be
            between = torch.cdist(some, vectors, compute_mode="donot_use_mm_for_euclid_dist")
            spread += between.sum(dtype=torch.float64)
        self.total += (distance - spread / (2 * size * (size - 1 if self.fair else size))).to(self.device)
        self.count += scored.flatten(1).any(1).sum().to(self.device)

    def compute(self) -> Tensor:
        """Return the average."""
        _check_scored(self.count)
        return self.total / self.count


class CoverageScores(NamedTuple):
    """Result of :class:`IntervalCoverage`; {level: value} each.

    Attributes:
        coverage: share of the scored values within the interval.
        expected: coverage to expect of as many draws from the true distribution, level (S - 1) / (S + 1): below the
            level, since the ends are themselves estimated.
        width: mean width of the interval, in units of the data. Of two forecasts with the right coverage, the one with
            the smaller width is the better.
    """

    coverage: dict[float, Tensor]
    expected: dict[float, Tensor]
    width: dict[float, Tensor]


class IntervalCoverage(Metric):
    r"""Share of the scored values within central intervals of the draws, and the intervals' mean width.

    The interval of a level c goes from the quantile (1 - c) / 2 of the draws to the quantile (1 + c) / 2, linear
    between the draws. It is right on average only: too wide here and too narrow there can cancel.

    Args:
        levels: of the intervals, above 0 and below 1.
        **options: options of :class:`torchmetrics.Metric`.

    Shape:
        - draws, target, mask, observed: as for :class:`CRPS`

    Returns:
        :class:`CoverageScores` from ``compute()``.

    Raises:
        TypeError: as :class:`CRPS`.
        ValueError: as there; no `levels`, or one that is no number in (0, 1) or comes twice.

    Example:
        >>> metric = IntervalCoverage((0.5,))
        >>> metric.update(torch.arange(5.0).reshape(5, 1, 1).expand(5, 1, 4), torch.tensor([[0.0, 1.0, 2.0, 3.5]]))
        >>> scores = metric.compute()
        >>> scores.coverage, scores.width
        ({0.5: tensor(0.5000, dtype=torch.float64)}, {0.5: tensor(2., dtype=torch.float64)})
    """

    full_state_update = False

    def __init__(self, levels: Sequence[float] = (0.5, 0.9), **options: Any) -> None:
        super().__init__(**options)
        self.levels = check_levels(levels)
        self.count: Tensor
        self.expected: Tensor
        self.covered: Tensor
        self.width: Tensor
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("expected", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("covered", torch.zeros(len(self.levels), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("width", torch.zeros(len(self.levels), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, draws: Tensor, target: Tensor, mask: Tensor | None = None, observed: Tensor | None = None) -> None:
        """Add a batch."""
        errors, scored, _ = errors_of_draws(draws, target, mask, observed)
        ends = [(1 - level) / 2 for level in self.levels] + [(1 + level) / 2 for level in self.levels]
        low, high = quantiles(errors, ends).flatten(1).split(len(self.levels))
        covered = (low <= 0) & (high >= 0) & scored.flatten()
        self.covered += covered.sum(1).to(self.device)
        self.width += (high - low).sum(1, dtype=torch.float64).to(self.device)
        count = scored.sum().to(self.device)
        self.count += count
        self.expected += count.double() * (len(errors) - 1) / (len(errors) + 1)

    def compute(self) -> CoverageScores:
        """Return coverage and width of each level."""
        _check_scored(self.count)
        factor = self.expected / self.count
        return CoverageScores(
            _by_level(self.levels, self.covered / self.count),
            {level: level * factor for level in self.levels},
            _by_level(self.levels, self.width / self.count),
        )


class QuantileScores(NamedTuple):
    """Result of :class:`QuantileLoss`.

    Attributes:
        loss: {level: mean pinball loss of the scored values}, in units of the data.
        weighted: {level: twice the summed loss, divided by the sum of abs(target)}, wQL; not finite if all targets
            are 0. At level 0.5 it is the summed absolute error of the medians divided by that sum.
        average: `weighted` averaged over the levels.
    """

    loss: dict[float, Tensor]
    weighted: dict[float, Tensor]
    average: Tensor


class QuantileLoss(Metric):
    r"""Pinball loss of quantiles of the draws, and the weighted quantile loss (wQL) of the forecasting literature.

    .. math::
        \rho_c(y, q) = \max\bigl(c\, (y - q), (c - 1) (y - q)\bigr), \qquad
        \mathrm{wQL}_c = \frac{2 \sum \rho_c(y, q)}{\sum |y|}

    with q the quantile c of the draws, linear between them. Few draws estimate quantiles badly, most near 0 and 1, and
    that raises the loss. wQL depends on where the data's zero is, so it means little for standardised data.

    Args:
        levels: above 0 and below 1; by default the nine of most benchmarks.
        **options: options of :class:`torchmetrics.Metric`.

    Shape:
        - draws, target, mask, observed: as for :class:`CRPS`

    Returns:
        :class:`QuantileScores` from ``compute()``.

    Raises:
        TypeError: as :class:`CRPS`.
        ValueError: as :class:`IntervalCoverage`.

    Example:
        >>> metric = QuantileLoss((0.5, 0.75))
        >>> metric.update(torch.arange(5.0).reshape(5, 1, 1), torch.tensor([[4.0]]))
        >>> metric.compute().loss
        {0.5: tensor(1., dtype=torch.float64), 0.75: tensor(0.7500, dtype=torch.float64)}

    References:
        Salinas et al. DeepAR: probabilistic forecasting with autoregressive recurrent networks, 2020 (wQL, as
        rho-risk).
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self, levels: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), **options: Any) -> None:
        super().__init__(**options)
        self.levels = check_levels(levels)
        self.count: Tensor
        self.loss: Tensor
        self.size: Tensor
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("loss", torch.zeros(len(self.levels), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("size", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, draws: Tensor, target: Tensor, mask: Tensor | None = None, observed: Tensor | None = None) -> None:
        """Add a batch."""
        errors, scored, target = errors_of_draws(draws, target, mask, observed)
        above = quantiles(errors, self.levels).flatten(1)
        level = torch.tensor(self.levels, dtype=above.dtype, device=above.device).unsqueeze(-1)
        loss = torch.maximum((1 - level) * above, -level * above)
        self.loss += loss.sum(1, dtype=torch.float64).to(self.device)
        self.size += target.abs().sum(dtype=torch.float64).to(self.device)
        self.count += scored.sum().to(self.device)

    def compute(self) -> QuantileScores:
        """Return the losses of each level."""
        _check_scored(self.count)
        weighted = 2 * self.loss / self.size
        return QuantileScores(
            _by_level(self.levels, self.loss / self.count), _by_level(self.levels, weighted), weighted.mean()
        )


def _check_scored(count: Tensor) -> None:
    if not count:
        raise ValueError("target: got no scored value in any update, expected at least one that is real and observed")


def _by_level(levels: Sequence[float], values: Tensor) -> dict[float, Tensor]:
    return dict(zip(levels, values, strict=True))
