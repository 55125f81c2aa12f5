"""Many coordinates over time, as images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from seqdisent.masks import check_mask
from seqdisent.plotting._figures import make_axes, save_figure
from seqdisent.plotting._known import by_value

MISSING = "0.75"  # grey


def plot_heatmap(
    values: Mapping[str, Tensor],
    path: str | Path,
    *,
    mask: Tensor | None = None,
    observed: Mapping[str, Tensor] | None = None,
    limits: tuple[float, float] | None = None,
    names: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> Path:
    """Plot many coordinates over time as images in one colour scale, and return the path.

    Spectrograms, piano rolls, or measurements of many sensors: time runs from left to right, the first coordinate is at
    the bottom. Sequences are columns; rows show the same sequences by what they are called, such as data,
    reconstruction and imputation. Padding is blank. What was not observed is grey, and so is what is not finite. Scale
    coordinates of unlike units before (:class:`~seqdisent.datasets.Scaler`), since they share the colours.

    Args:
        values: {title of a row: the sequences}; anything in padding and in holes.
        path: the file to write; its suffix selects the format.
        mask: True where a step is real; None for all.
        observed: {title of a row: True where measured}; rows that it leaves out have no holes, None for no holes.
        limits: lowest and highest value of the colour scale, values beyond have the colours of its ends; None for the
            extremes of all that is shown.
        names: titles of the sequences; None for their numbers.
        columns: what the coordinates are called; None for their numbers.

    Shape:
        - values: (N, T, X) each
        - mask: (N, T) bool
        - observed: (N, T) or (N, T, X) bool each

    Raises:
        TypeError: `mask` is not bool.
        ValueError: no row, shapes that do not fit, a row of `observed` that is not there, limits that are infinite or
            in another order, or another number of names or columns.
        ImportError: matplotlib is missing.

    Example:
        >>> import tempfile
        >>> values = torch.randn(2, 30, 12, generator=torch.Generator().manual_seed(0)).cumsum(1)
        >>> seen = values < 8.0
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     shown = {"measured": values, "smooth": values.cumsum(1) / torch.arange(1, 31)[:, None]}
        ...     plot_heatmap(shown, Path(folder) / "sensors.png", observed={"measured": seen}).name
        'sensors.png'
    """
    rows, real = _rows(values, mask, {} if observed is None else observed)
    count, num_steps, size = rows[0].shape
    if limits is not None and not -math.inf < limits[0] < limits[1] < math.inf:
        raise ValueError(f"limits: got {limits!r}, expected finite numbers, the lower one first")
    for argument, labels, number, one in (
        ("names", names, count, "sequence"),
        ("columns", columns, size, "coordinate"),
    ):
        if labels is not None and len(labels) != number:
            raise ValueError(f"{argument}: got {len(labels)}, expected {number}, one for each {one}")
    finite = torch.cat([row[row.isfinite()] for row in rows])
    if limits is None:
        limits = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    height = 0.13 * size if columns is not None else size / 60
    figure, axes = make_axes(
        count, rows=len(rows), width=min(max(3.6, num_steps / 80), 12.0), height=min(max(2.2, height), 8.0)
    )
    from matplotlib import colormaps
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    colours = colormaps["viridis"].with_extremes(bad=MISSING)
    for number, axis in enumerate(axes):
        row, column = divmod(number, count)
        steps = rows[row][column, : int(real[column].sum())]
        image = axis.imshow(
            steps.T.numpy(),
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            cmap=colours,
            vmin=limits[0],
            vmax=limits[1],
        )
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(xlim=(-0.5, num_steps - 0.5), xlabel="step" if row == len(rows) - 1 else "")
        if row == 0:
            axis.set_title(str(column) if names is None else names[column])
        if column == 0:
            axis.set_ylabel(list(values)[row])
        if column == 0 and columns is not None:
            axis.set_yticks(range(size), labels=columns, fontsize=7)
        axis.tick_params(labelbottom=row == len(rows) - 1, labelleft=column == 0)
    figure.colorbar(image, ax=axes, pad=0.02)
    if any(bool(row[real].isnan().any()) for row in rows):
        figure.legend(handles=[Patch(color=MISSING, label="not observed")], loc="outside lower right")
    return save_figure(figure, path)


def _rows(
    values: Mapping[str, Tensor], mask: Tensor | None, observed: Mapping[str, Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Return the sequences (N, T, X) of each row, NaN where there is nothing to show, and the mask (N, T)."""
    if not values:
        raise ValueError("values: is empty, expected {title of a row: (N, T, X)}")
    if unknown := [title for title in observed if title not in values]:
        raise ValueError(f"observed: got {unknown}, expected titles of values, {list(values)}")
    first = next(iter(values.values()))
    for title, sequences in values.items():
        if sequences.ndim != 3 or 0 in sequences.shape or sequences.shape != first.shape:
            raise ValueError(
                f"values[{title!r}]: has shape {tuple(sequences.shape)}, expected (N, T, X), none of them 0, the same "
                "in each row"
            )
    real = torch.ones(first.shape[:2], dtype=torch.bool)
    if mask is not None:
        real = check_mask(mask.cpu(), first.shape[:1], first.shape[1])
    rows = []
    for title, sequences in values.items():
        known = real.unsqueeze(-1) & by_value(f"observed[{title!r}]", observed.get(title), sequences)
        row = sequences.detach().cpu().double()
        rows.append(torch.where(known & row.isfinite(), row, torch.nan))
    return rows, real
