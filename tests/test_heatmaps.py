"""Heat maps: each value has its colour and place, padding is blank, holes are grey."""

import pytest
import torch
from strategies import Tensors

pytest.importorskip("matplotlib")
image = pytest.importorskip("PIL.Image")

from seqdisent.plotting import heatmaps, plot_heatmap  # noqa: E402

GREY = (191, 191, 191)
LENGTHS = torch.tensor([6, 3])
MASK = torch.arange(6) < LENGTHS[:, None]


def drawn(monkeypatch, values, **options):
    """Return the figure that is not written."""
    figures = []
    monkeypatch.setattr(heatmaps, "save_figure", lambda figure, path: figures.append(figure))
    plot_heatmap(values, "unused.png", **options)
    return figures[0]


def pixels(path):
    """Return the pixels (H, W, 3) of a picture."""
    with image.open(path) as file:
        return torch.tensor(list(file.convert("RGB").tobytes())).reshape(file.height, file.width, 3)


def count(path, colour):
    return int((pixels(path) == torch.tensor(colour)).all(-1).sum())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("by_step", [True, False])
@pytest.mark.parametrize("ragged", [True, False])
def test_each_value_stands_at_its_step_and_coordinate(by_step, ragged, rows, monkeypatch):
    tensors = Tensors(rows)
    values = {f"row {number}": tensors.normal(2, 6, 4) for number in range(rows)}
    observed = {"row 0": tensors.normal(2, 6) > 0 if by_step else tensors.normal(2, 6, 4) > 0}
    lengths = LENGTHS.tolist() if ragged else [6, 6]
    figure = drawn(monkeypatch, values, mask=MASK if ragged else None, observed=observed)
    shown = []
    for number, axis in enumerate(figure.axes[: 2 * rows]):
        row, sequence = divmod(number, 2)
        found = axis.images[0].get_array()
        assert found.shape == (4, lengths[sequence])
        assert axis.images[0].origin == "lower"
        assert axis.get_xlim() == (-0.5, 5.5)
        for step in range(lengths[sequence]):
            for coordinate in range(4):
                seen = observed["row 0"][sequence, step] if row == 0 else torch.tensor(True)
                if seen.expand(4)[coordinate]:
                    assert found[coordinate, step] == float(values[f"row {row}"][sequence, step, coordinate])
                    shown.append(float(found[coordinate, step]))
                else:
                    assert found.mask[coordinate, step]
    limits = {axis.images[0].get_clim() for axis in figure.axes[: 2 * rows]}
    assert limits == {(min(shown), max(shown))}


def test_rows_sequences_and_coordinates_have_their_titles(monkeypatch):
    values = {"data": torch.zeros(2, 6, 3), "model": torch.ones(2, 6, 3)}
    figure = drawn(monkeypatch, values, names=["anna", "ben"], columns=["x", "y", "z"], limits=(0.0, 5.0))
    first, second, third, _, bar = figure.axes
    assert [axis.get_title() for axis in (first, second, third)] == ["anna", "ben", ""]
    assert [axis.get_ylabel() for axis in (first, second, third)] == ["data", "", "model"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["x", "y", "z"]
    assert first.images[0].get_clim() == bar.get_ylim() == (0.0, 5.0)
    assert [axis.get_title() for axis in drawn(monkeypatch, values).axes[:2]] == ["0", "1"]


def test_holes_are_grey_and_padding_is_blank(tmp_path):
    values = torch.arange(12.0).reshape(1, 6, 2)
    whole = plot_heatmap({"x": values}, tmp_path / "whole.png")
    assert count(whole, GREY) < 100  # in letters
    short = torch.arange(6)[None] < 3
    ragged = plot_heatmap({"x": values}, tmp_path / "ragged.png", mask=short, limits=(0, 11))
    assert count(ragged, GREY) < 100
    cells = count(ragged, (255, 255, 255)) - count(whole, (255, 255, 255))
    holes = plot_heatmap({"x": values}, tmp_path / "holes.png", observed={"x": short})
    assert count(holes, GREY) > 0.8 * cells > 10_000  # half of the steps; the figure has a legend, too
    infinite = values.masked_fill(~short.unsqueeze(-1), torch.inf)
    assert torch.equal(pixels(plot_heatmap({"x": infinite}, tmp_path / "infinite.png")), pixels(holes))


def test_what_stands_in_holes_and_padding_changes_no_heat_map(tmp_path):
    values, seen = Tensors(0).normal(2, 6, 4), Tensors(1).normal(2, 6, 4) > 0
    one = plot_heatmap({"x": values}, tmp_path / "a.png", mask=MASK, observed={"x": seen})
    filled = torch.where(MASK.unsqueeze(-1) & seen, values, 1e6)
    other = plot_heatmap({"x": filled}, tmp_path / "b.png", mask=MASK, observed={"x": seen})
    assert torch.equal(pixels(one), pixels(other))


@pytest.mark.parametrize("values", [torch.ones(1, 3, 2), torch.full((1, 3, 2), torch.nan)], ids=["constant", "holes"])
def test_a_heat_map_of_one_value_or_none_is_drawn(values, tmp_path):
    assert plot_heatmap({"x": values}, tmp_path / "a.png").stat().st_size > 0


def test_whole_numbers_and_half_precision_are_drawn(tmp_path):
    keys = torch.eye(6).expand(1, 6, 6)
    wanted = pixels(plot_heatmap({"keys": keys}, tmp_path / "float.png"))
    for number, dtype in enumerate((torch.uint8, torch.bool, torch.bfloat16)):
        assert torch.equal(pixels(plot_heatmap({"keys": keys.to(dtype)}, tmp_path / f"{number}.png")), wanted)
