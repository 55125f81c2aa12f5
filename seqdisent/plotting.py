"""Plots of sequences and of training (extra ``plot``): grids, GIFs, intervals, schedules, ledgers."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from seqdisent import _files
from seqdisent.metrics._draws import quantiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def film_strip(clips: Tensor, *, gap: int = 2, background: float = 1.0) -> Tensor:
    """Arrange clips in one picture: one row per clip, frames from left to right.

    Args:
        clips: pixels in [0, 1].
        gap: number of pixels between frames.
        background: brightness of the gaps.

    Shape:
        - clips: (N, T, C, H, W)
        - output: (C, N * (H + gap) - gap, T * (W + gap) - gap)

    Raises:
        ValueError: another number of dimensions.

    Example:
        >>> film_strip(torch.zeros(2, 3, 1, 4, 4)).shape
        torch.Size([1, 10, 16])
    """
    if clips.ndim != 5:
        raise ValueError(f"clips: has shape {tuple(clips.shape)}, expected (N, T, C, H, W)")
    padded = torch.nn.functional.pad(clips.float(), (0, gap, 0, gap), value=background)
    rows, columns, channels, height, width = padded.shape
    picture = padded.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)
    return picture[:, : picture.shape[1] - gap, : picture.shape[2] - gap]


def swap_table(static: Tensor, motion: Tensor, swapped: Tensor, *, gap: int = 4) -> Tensor:
    """Arrange swapped clips in a table, with identities in rows and motions in columns (paper, Figures 1 and 5).

    The left column shows the clips that provide the identity, the top row those that provide the motion, and cell
    (i, j) the swap with identity i and motion j. The corner is empty.

    Args:
        static: R clips that provide the identity, pixels in [0, 1].
        motion: Q clips that provide the motion.
        swapped: R x Q swapped clips.
        gap: number of pixels between cells.

    Shape:
        - static: (R, T, C, H, W), motion: (Q, T, C, H, W), swapped: (R, Q, T, C, H, W)
        - output: (T, C, (R + 1) * (H + gap) - gap, (Q + 1) * (W + gap) - gap)

    Raises:
        ValueError: inconsistent shapes.

    Example:
        >>> clip = torch.zeros(2, 5, 3, 8, 8)
        >>> swap_table(clip, clip, torch.zeros(2, 2, 5, 3, 8, 8)).shape
        torch.Size([5, 3, 32, 32])
    """
    if swapped.shape != (static.shape[0], *motion.shape) or static.shape[1:] != motion.shape[1:]:
        raise ValueError(
            f"swapped: has shape {tuple(swapped.shape)}, expected (R, Q, T, C, H, W) from static "
            f"{tuple(static.shape)} and motion {tuple(motion.shape)}"
        )
    corner = torch.ones_like(motion[:1])
    rows = [torch.cat([corner, motion]), *(torch.cat([s[None], row]) for s, row in zip(static, swapped, strict=True))]
    table = torch.stack(rows)  # (R + 1, Q + 1, T, C, H, W)
    return torch.stack([film_strip(frame, gap=gap) for frame in table.unbind(2)])


def save_png(picture: Tensor, path: str | Path, *, scale: int = 1) -> Path:
    """Write a picture as a PNG file and return the path.

    Args:
        picture: pixels in [0, 1]; other values are clipped.
        path: the file to write, whole or not at all; missing folders are made.
        scale: enlargement factor, an integer.

    Shape:
        - picture: (C, H, W) with 1 or 3 colours

    Raises:
        ValueError: a picture of another shape.
        ImportError: Pillow is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_png(torch.zeros(3, 8, 8), Path(folder) / "black.png", scale=4).name
        'black.png'
    """
    image = _image(picture, scale)
    return _written(path, lambda file: image.save(file, "PNG"))


def save_gif(pictures: Tensor, path: str | Path, *, frames_per_second: float = 8.0, scale: int = 1) -> Path:
    """Write pictures as an animated GIF that repeats, and return the path.

    Args:
        pictures: pixels in [0, 1]; other values are clipped.
        path: the file to write, whole or not at all; missing folders are made.
        frames_per_second: playback speed; GIF stores durations in hundredths of a second.
        scale: enlargement factor, an integer.

    Shape:
        - pictures: (T, C, H, W) with 1 or 3 colours

    Raises:
        ValueError: pictures of another shape.
        ImportError: Pillow is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_gif(torch.rand(5, 1, 8, 8), Path(folder) / "noise.gif").name
        'noise.gif'
    """
    first, *others = [_image(picture, scale) for picture in pictures]
    how: dict[str, Any] = {"duration": round(1000 / frames_per_second), "loop": 0}
    return _written(path, lambda file: first.save(file, "GIF", save_all=True, append_images=others, **how))


def plot_schedules(schedules: Mapping[str, Callable[[float], float]], num_steps: int, path: str | Path) -> Path:
    """Plot schedules against the training step, one panel each (paper, Figures 9 and 10), and return the path.

    Args:
        schedules: {title: a schedule, or any function of the step}.
        num_steps: number of training steps.
        path: the file to write; its suffix selects the format.

    Raises:
        ImportError: matplotlib is missing.

    Example:
        >>> import tempfile
        >>> from seqdisent import AnnealingSchedule
        >>> schedules = {"weight of z": AnnealingSchedule.cosine(30.0, 1.0, 500)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_schedules(schedules, 1000, Path(folder) / "schedules.png").name
        'schedules.png'
    """
    steps = torch.linspace(0, num_steps, 200).tolist()
    figure, axes = _axes(len(schedules), width=3.2)
    for axis, (name, schedule) in zip(axes, schedules.items(), strict=True):
        axis.plot(steps, [schedule(step) for step in steps])
        axis.set(title=name, xlabel="step")
    return _save_figure(figure, path)


def plot_ledger(logs: Sequence[str | Path], path: str | Path) -> Path:
    """Plot every term of the ledger against the training step, from the CSV files of one run, and return the path.

    Args:
        logs: ``metrics.csv`` of each part of the run, oldest first. If two parts log the same step, the later is used.
        path: the file to write; its suffix selects the format.

    Raises:
        ValueError: no log contains a term.
        ImportError: matplotlib is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = Path(folder) / "metrics.csv"
        ...     with log.open("w", newline="") as file:
        ...         csv.writer(file).writerows([("step", "KL(z)"), (0, 9.0), (20, 4.0)])
        ...     plot_ledger([log], Path(folder) / "ledger.png").name
        'ledger.png'
    """
    terms: dict[str, dict[int, float]] = {}
    for log in logs:
        with Path(log).open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get("step") is None:  # an incomplete last row, written when the disk was full
                    continue
                for name, value in row.items():
                    if value and (name.startswith(("KL(", "log_p(")) or name == "elbo"):
                        terms.setdefault(name, {})[int(row["step"])] = float(value)
    if not terms:
        raise ValueError(f"logs: {[str(log) for log in logs]} hold no term of a ledger")
    figure, axes = _axes(len(terms), width=3.6)
    for axis, (name, values) in zip(axes, sorted(terms.items()), strict=True):
        steps = sorted(values)
        axis.plot(steps, [values[step] for step in steps], linewidth=0.8)
        axis.set(title=name, xlabel="step", ylabel="nats a sequence")
        if name.startswith("KL(") and max(values.values()) > 5 * min(values.values()):
            axis.set_yscale("symlog", linthresh=1.0, subs=(2, 5))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
    return _save_figure(figure, path)


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
    figure, (axis,) = _axes(1, width=5.0)
    for name, error in errors.items():
        axis.plot(range(1, len(error) + 1), error.tolist(), label=name)
    if trained_on is not None:
        axis.axvline(trained_on + 0.5, color="grey", linestyle=":", label="end of the given frames")
    axis.set(xlabel="step", ylabel="mean squared error of pixels", ylim=(0, None))
    axis.legend()
    return _save_figure(figure, path)


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
    real = _by_value("mask", mask, values[..., 0] if values.ndim == 3 else values)
    real = real.expand(-1, -1, values.shape[2]) if values.ndim == 3 else real
    seen = real & _by_value("observed", observed, values)
    unseen = seen & _by_value("hidden", hidden, values) if hidden is not None else torch.zeros_like(seen)
    if values.ndim == 2:
        values, draws = values.unsqueeze(-1), draws.unsqueeze(-1)
    bounds = [(1 - level) / 2 for level in levels] + [(1 + level) / 2 for level in levels]
    found = quantiles(draws.detach().cpu().double(), [*bounds, 0.5])
    lines = torch.where(real, found, torch.nan).numpy()
    count, num_steps, size = values.shape
    figure, axes = _axes(count, width=3.6, height=2.2, rows=size)
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
    return _save_figure(figure, path)


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


def _by_value(argument: str, known: Tensor | None, values: Tensor) -> Tensor:
    """Return what is known by step or by value as bool (N, T, X)."""
    known = torch.ones(values.shape[:2], dtype=torch.bool) if known is None else known.cpu()
    if known.dtype != torch.bool or known.shape not in (values.shape[:2], values.shape):
        raise ValueError(
            f"{argument}: has shape {tuple(known.shape)} and dtype {known.dtype}, expected bool "
            f"{tuple(values.shape[:2])} or {tuple(values.shape)}"
        )
    size = values.shape[2] if values.ndim == 3 else 1
    return known if known.ndim == 3 else known.unsqueeze(-1).expand(-1, -1, size)


def _image(picture: Tensor, scale: int) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow; install it with: pip install 'seqdisent[plot]'") from error
    if picture.ndim != 3 or picture.shape[0] not in (1, 3):
        raise ValueError(f"picture: has shape {tuple(picture.shape)}, expected (C, H, W) with 1 or 3 colours")
    bytes_ = (picture.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    bytes_ = bytes_.repeat_interleave(scale, 1).repeat_interleave(scale, 2).expand(3, -1, -1)
    return Image.fromarray(bytes_.permute(1, 2, 0).contiguous().numpy())


def _axes(count: int, *, width: float, height: float = 2.8, rows: int = 1) -> tuple[Any, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install 'seqdisent[plot]'") from error
    # not pyplot's figure, which is global state and may open a window
    figure = Figure(figsize=(width * count, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, count, squeeze=False).flat)


def _save_figure(figure: Any, path: str | Path) -> Path:
    return _written(path, lambda file: figure.savefig(file, dpi=110, format=Path(path).suffix[1:] or "png"))


def _written(path: str | Path, write: Callable[[BinaryIO], object]) -> Path:
    path = Path(path)
    _files.write(path, write)
    return path
