"""Figures of matplotlib, without its global state, and files that are written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from seqdisent import _files

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def make_axes(count: int, *, width: float, height: float = 2.8, rows: int = 1) -> tuple[Any, list[Axes]]:
    """Return a figure and its axes, row by row; width and height, in inches, are those of one of the axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install 'seqdisent[plot]'") from error
    # not pyplot's figure, which is global state and may open a window
    figure = Figure(figsize=(width * count, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, count, squeeze=False).flat)


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure, in the format of the suffix, and return the path."""
    return write_file(path, lambda file: figure.savefig(file, dpi=110, format=Path(path).suffix[1:] or "png"))


def write_file(path: str | Path, write: Callable[[BinaryIO], object]) -> Path:
    """Write a file whole or not at all, and return the path."""
    path = Path(path)
    _files.write(path, write)
    return path
