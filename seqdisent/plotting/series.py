"""Values against the time step: errors, and intervals over what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqdisent.metrics._draws import quantiles
from seqdisent.plotting._figures import make_axes, save_figure
from seqdisent.plotting._known import by_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_error_over_time(errors: Mapping[str, Tensor], path: str | Path, *, trained_on: int | None = None) -> Path:
    """Plot mean squared errors against the time step, with a line after the given frames, and return the path.

    Args:
        errors: {label: (T,), mean squared errors of pixels in [0, 1]}.
        path: the file to write; its suffix selects the format.
        trained_on: number of given frames; None for no line.

    Raises:
        ImportError: matplotlib is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_error_over_time({"model": torch.rand(9)}, Path(folder) / "error.png", trained_on=4).name
        'error.png'
    """
    figure, (axis,) = make_axes(1, width=5.0)
    for name, error in errors.items():
        axis.plot(range(1, len(error) + 1), error.tolist(), label=name)
    if trained_on is not None:
        axis.axvline(trained_on + 0.5, color="grey", linestyle=":", label="end of the given frames")
    axis.set(xlabel="step", ylabel="mean squared error of pixels", ylim=(0, None))
    axis.legend()
    return save_figure(figure, path)


def plot_intervals(
    values: Tensor,
    draws: Tensor,
    path: str | Path,
    *,
    mask: Tensor | None = None,
    observed: Tensor | None = None,
    hidden: Tensor | None = None,
    levels: Sequence[float] = (0.5, 0.9),
    names: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> Path:
    r"""Plot intervals of a forecast or an imputation over what was measured, and return the path.

    Sequences stand side by side, coordinates one below the other. Dots are what was measured, rings what of this was
    hidden from the model, ticks at the bottom real steps at which nothing was measured. The line is the median of the
    draws, each band a central interval: :class:`~seqdisent.metrics.IntervalCoverage` scores them. A legend says so.

    Args:
        values: the sequences; anything in padding and in holes.
        draws: S draws of them, NaN where there is nothing to draw, such as before a forecast.
        path: the file to write; its suffix selects the format.
        mask: True where a step is real; None for all.
        observed: True where measured; None for all.
        hidden: True where something was measured and the model did not see it; None for nowhere.
        levels: of the intervals, above 0 and below 1.
        names: titles of the sequences; None for their numbers.
        columns: what the coordinates are called; None for no names.

    Shape:
        - values: (N, T) or (N, T, X)
        - draws: (S, N, T) or (S, N, T, X)
        - mask: (N, T) bool
        - observed, hidden: (N, T) bool, or of the values' shape

    Raises:
        ValueError: shapes that do not fit, a level that is not between 0 and 1, or another number of names or columns.
        ImportError: matplotlib is missing.

    Example:
        >>> import tempfile
        >>> values = torch.tensor([[1.0, 2.0, torch.nan, 4.0]])
        >>> draws = values.nan_to_num(3.0) + torch.randn(50, 1, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_intervals(values, draws, Path(folder) / "filled.png", observed=~values.isnan()).name
        'filled.png'
    """
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise ValueError(f"values: has shape {tuple(values.shape)}, expected (N, T) or (N, T, X), none of them 0")
    if draws.shape[1:] != values.shape or len(draws) == 0:
        raise ValueError(f"draws: has shape {tuple(draws.shape)}, expected (S, *{tuple(values.shape)})")
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels: got {levels!r}, expected numbers above 0 and below 1")
    names = [str(number) for number in range(len(values))] if names is None else list(names)
    if len(names) != len(values):
        raise ValueError(f"names: got {len(names)}, expected {len(values)}, one for each sequence")
    num_columns = values.shape[2] if values.ndim == 3 else 1
    if columns is not None and len(columns) != num_columns:
        raise ValueError(f"columns: got {len(columns)}, expected {num_columns}, one for each coordinate")
    real = by_value("mask", mask, values[..., 0] if values.ndim == 3 else values)
    real = real.expand(-1, -1, values.shape[2]) if values.ndim == 3 else real
    seen = real & by_value("observed", observed, values)
    unseen = seen & by_value("hidden", hidden, values) if hidden is not None else torch.zeros_like(seen)
    if values.ndim == 2:
        values, draws = values.unsqueeze(-1), draws.unsqueeze(-1)
    bounds = [(1 - level) / 2 for level in levels] + [(1 + level) / 2 for level in levels]
    found = quantiles(draws.detach().cpu().double(), [*bounds, 0.5])
    lines = torch.where(real, found, torch.nan).numpy()
    count, num_steps, size = values.shape
    figure, axes = make_axes(count, width=3.6, height=2.2, rows=size)
    for number, axis in enumerate(axes):
        coordinate, row = divmod(number, count)
        at = (row, slice(None), coordinate)
        for low, high in zip(lines[: len(levels)], lines[len(levels) : -1], strict=True):
            axis.fill_between(range(num_steps), low[at], high[at], color="C0", alpha=0.25, linewidth=0)
        axis.plot(lines[-1][at], color="C0", linewidth=0.8)
        for shown, face, edge, label in (
            (seen & ~unseen, "black", "black", "measured"),
            (unseen, "none", "C3", "hidden from the model"),
        ):
            steps = shown[at].nonzero().squeeze(1)
            how: dict[str, Any] = {"facecolors": face, "edgecolors": edge, "label": label if len(steps) else None}
            axis.scatter(steps, values[at].detach().cpu()[steps], s=9, zorder=3, **how)
        steps = (real & ~seen)[at].nonzero().squeeze(1)
        how = {"color": "C1", "label": "not measured" if len(steps) else None}
        axis.plot(steps, 0.03 * torch.ones(len(steps)), "|", transform=axis.get_xaxis_transform(), **how)
        axis.set(xlabel="step" if coordinate == size - 1 else "", title=names[row] if coordinate == 0 else "")
        if columns is not None and row == 0:
            axis.set_ylabel(columns[coordinate])
    _add_legend(figure, axes, levels if bool(torch.from_numpy(lines).isfinite().any()) else ())
    return save_figure(figure, path)


def _add_legend(figure: Any, axes: Sequence[Axes], levels: Sequence[float]) -> None:
    """Say below the panels what is drawn in any of them; bands lie upon each other, so narrow ones are darker."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if levels:
        found["median of the draws"] = Line2D([], [], color="C0", linewidth=0.8)
    for depth, level in enumerate(sorted(levels, reverse=True), 1):
        found[f"{100 * level:g} % interval"] = Patch(color="C0", alpha=1 - 0.75**depth, linewidth=0)
    ncols = 2 * round(figure.get_figwidth() / 3.6)
    figure.set_figheight(figure.get_figheight() + 0.2 + 0.2 * math.ceil(len(found) / ncols))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=ncols, fontsize="small")
