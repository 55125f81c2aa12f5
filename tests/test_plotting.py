"""Pictures: what is in them, not only that they are there."""

import os
import re

import pytest
import torch

pytest.importorskip("matplotlib")
image = pytest.importorskip("PIL.Image")

from seqdisent import AnnealingSchedule  # noqa: E402
from seqdisent.plotting import (  # noqa: E402
    film_strip,
    plot_error_over_time,
    plot_intervals,
    plot_ledger,
    plot_schedules,
    save_gif,
    save_png,
    swap_table,
)


def clips(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def pixels(path):
    with image.open(path) as file:
        return torch.tensor(list(file.convert("RGB").tobytes()), dtype=torch.uint8)


def test_film_strip_puts_clips_in_rows_and_time_from_left_to_right():
    frames = clips(2, 3, 3, 4, 5)
    strip = film_strip(frames, gap=1, background=0.5)
    assert strip.shape == (3, 2 * 5 - 1, 3 * 6 - 1)
    torch.testing.assert_close(strip[:, 5:9, 12:17], frames[1, 2])
    assert (strip[:, 4] == 0.5).all()


@pytest.mark.parametrize("by_pixel", [False, True])
def test_film_strip_leaves_padding_blank_and_chequers_what_was_not_observed(by_pixel):
    frames, mask = clips(2, 3, 3, 4, 5), torch.tensor([[True, True, True], [True, False, False]])
    observed = clips(2, 3, 3, 4, 5) < 0.5 if by_pixel else torch.tensor([[True, False, True], [False, True, True]])
    shown = frames.masked_fill(~observed if by_pixel else ~observed[..., None, None, None], torch.nan)
    shown[1, 1:] = torch.nan
    strip = film_strip(shown, mask=mask, observed=observed, gap=1, background=0.9)
    for row in range(2):
        for step in range(3):
            frame = strip[:, 5 * row : 5 * row + 4, 6 * step : 6 * step + 5]
            if not mask[row, step]:
                assert (frame == 0.9).all()
                continue
            for channel, y, x in torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(5)).tolist():
                seen = observed[row, step, channel, y, x] if by_pixel else observed[row, step]
                grey = 0.65 if (y // 2 + x // 2) % 2 else 0.35
                wanted = frames[row, step, channel, y, x] if seen else grey
                assert frame[channel, y, x] == pytest.approx(float(wanted))
    whole = film_strip(frames, mask=torch.ones(2, 3).bool(), observed=torch.ones(2, 3).bool())
    torch.testing.assert_close(whole, film_strip(frames))


def test_holes_and_padding_that_do_not_fit_the_clips_are_named():
    frames = clips(2, 3, 1, 4, 4)
    with pytest.raises(ValueError, match=r"^mask: has shape \(2, 2\)"):
        film_strip(frames, mask=torch.ones(2, 2).bool())
    with pytest.raises(TypeError, match="^mask: "):
        film_strip(frames, mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"^observed: has shape \(2, 3, 4, 4\)"):
        film_strip(frames, observed=torch.ones(2, 3, 4, 4).bool())
    with pytest.raises(TypeError, match="^observed: "):
        film_strip(frames, observed=frames)


def test_swap_table_puts_identities_in_rows_and_motions_in_columns():
    static, motion, swapped = clips(2, 4, 3, 4, 4), clips(3, 4, 3, 4, 4) / 2, clips(2, 3, 4, 3, 4, 4) / 3
    table = swap_table(static, motion, swapped, gap=0)
    assert table.shape == (4, 3, 12, 16)
    for t in range(4):
        assert (table[t, :, :4, :4] == 1).all()
        torch.testing.assert_close(table[t, :, 4:8, :4], static[0, t])
        torch.testing.assert_close(table[t, :, :4, 8:12], motion[1, t])
        torch.testing.assert_close(table[t, :, 8:12, 12:16], swapped[1, 2, t])
    with pytest.raises(ValueError, match="^swapped: "):
        swap_table(motion, static, swapped)


def test_png_and_gif_hold_the_pixels(tmp_path):
    frames = torch.zeros(3, 3, 2, 2)
    frames[1, 0, 0, 1] = 1.0
    frames[2] = 1.0
    path = save_png(frames[1], tmp_path / "a.png", scale=2)
    found = pixels(path).reshape(4, 4, 3)
    assert found[:2, 2:, 0].eq(255).all()
    assert found.sum() == 4 * 255
    with image.open(save_gif(frames, tmp_path / "a.gif")) as animation:
        assert animation.n_frames == 3
        assert animation.info["loop"] == 0
    with pytest.raises(ValueError, match="^picture: "):
        save_png(torch.zeros(2, 4, 4), tmp_path / "b.png")


def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    pictures, errors = clips(3, 3, 4, 4), {"model": torch.arange(5.0)}
    paths = [tmp_path / name for name in ("a.png", "a.gif", "error.png")]

    writers = (
        lambda: save_png(pictures[0], paths[0]),
        lambda: save_gif(pictures, paths[1]),
        lambda: plot_error_over_time(errors, paths[2]),
    )
    for write in writers:
        write()
    before = [path.read_bytes() for path in paths]

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write, path in zip(writers, paths, strict=True):
        with pytest.raises(OSError, match=f"{path.name} was not written: No space left on device"):
            write()
    assert [path.read_bytes() for path in paths] == before
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_plots_are_written_and_depend_on_what_they_show(tmp_path):
    rising, falling = AnnealingSchedule.linear(0, 1, 10), AnnealingSchedule.linear(1, 0, 10)
    one = pixels(plot_schedules({"a": rising}, 10, tmp_path / "one.png"))
    two = pixels(plot_schedules({"a": falling}, 10, tmp_path / "two.png"))
    assert (one != two).any()
    error = plot_error_over_time({"forecast": torch.arange(5.0)}, tmp_path / "error.png", trained_on=3)
    assert pixels(error).float().std() > 1


def test_ledger_reads_the_parts_of_a_run_in_order(tmp_path):
    first, second, none = (tmp_path / name for name in ("first.csv", "second.csv", "none.csv"))
    first.write_text("step,KL(z),log_p(x),elbo,loss\n0,1.0,-5,-6,6\n1,2.0,-4,-6,6\n")
    second.write_text("step,KL(z),log_p(x),elbo,loss\n1,9.0,-4,-6,6\n")
    none.write_text("step,loss\n0,1\n")
    whole = pixels(plot_ledger([first, second], tmp_path / "a.png"))
    assert (whole != pixels(plot_ledger([first], tmp_path / "b.png"))).any()
    with pytest.raises(ValueError, match="^logs: "):
        plot_ledger([none], tmp_path / "c.png")


def coloured(path):
    """Return which columns have a band or line (blue) and rings (red), and how much of bands and ticks there is.

    This is of the panel, above the legend.
    """
    with image.open(path) as file:
        every = torch.tensor(list(file.convert("RGB").tobytes())).reshape(file.height, file.width, 3)
    red, green, blue = every[:225].unbind(2)
    return {
        "blue": (blue > red + 30).any(0).nonzero().flatten(),
        "red": (red > blue + 60).any(0).nonzero().flatten(),
        "blue pixels": int((blue > red + 30).sum()),
        "ticks": int(((red > 200) & (90 < green) & (green < 170) & (blue < 80)).sum()),
    }


def test_intervals_stand_where_there_are_draws_and_rings_where_something_was_hidden(tmp_path):
    values = torch.linspace(-1, 1, 10).expand(1, 10)
    draws = values + torch.randn(200, 1, 10, generator=torch.Generator().manual_seed(0))
    draws[:, :, :5] = torch.nan
    hidden = torch.zeros(1, 10, dtype=torch.bool)
    hidden[:, 8] = True
    shown = coloured(plot_intervals(values, draws, tmp_path / "a.png", hidden=hidden))
    with image.open(tmp_path / "a.png") as file:
        middle = file.width // 2
    assert shown["blue"].min() > middle
    assert shown["red"].min() > middle
    assert shown["red"].max() - shown["red"].min() < 10  # one ring
    plain = coloured(plot_intervals(values, draws, tmp_path / "b.png"))
    assert len(plain["red"]) == 0
    narrow = coloured(plot_intervals(values, draws, tmp_path / "c.png", levels=(0.5,)))
    assert 0 < narrow["blue pixels"] < plain["blue pixels"]
    empty = coloured(plot_intervals(values, torch.full_like(draws, torch.nan), tmp_path / "d.png"))
    assert empty["blue pixels"] == 0
    missing = coloured(
        plot_intervals(values, draws, tmp_path / "e.png", observed=torch.arange(10).expand(1, 10) % 2 > 0)
    )
    assert missing["ticks"] > 0
    assert plain["ticks"] == 0


def texts(path):
    """Return what is written in an SVG, which has its texts as comments."""
    return re.findall("<!-- (.*) -->", path.read_text())


def test_a_legend_says_what_is_drawn_and_nothing_else(tmp_path):
    values, draws = clips(2, 6, 2), clips(9, 2, 6, 2)
    hidden = torch.arange(6).expand(2, 6) > 3
    marks = {"measured", "hidden from the model", "not measured"}
    bands = {"median of the draws", "50 % interval", "90 % interval"}
    how = {"observed": torch.arange(6).expand(2, 6) != 5, "hidden": hidden}
    assert marks | bands <= set(texts(plot_intervals(values, draws, tmp_path / "all.svg", **how)))
    shown = texts(plot_intervals(values, draws, tmp_path / "whole.svg", levels=(0.8,)))
    assert {"measured", "median of the draws", "80 % interval"} == set(shown) & (marks | bands | {"80 % interval"})
    shown = texts(plot_intervals(values, draws * torch.nan, tmp_path / "none.svg", **how))
    assert set(shown) & (marks | bands) == marks
    assert shown.count("measured") == 1  # of four panels


def test_coordinates_have_names_where_these_are_known(tmp_path):
    values, draws = clips(2, 6, 2), clips(9, 2, 6, 2)
    shown = texts(plot_intervals(values, draws, tmp_path / "a.svg", columns=["pulse", "heat"]))
    assert shown.count("pulse") == shown.count("heat") == 1  # beside the first sequence
    assert shown.index("pulse") < shown.index("heat")
    one = texts(plot_intervals(values[..., 0], draws[..., 0], tmp_path / "b.svg", columns=["pulse"]))
    assert one.count("pulse") == 1


def test_intervals_of_very_many_draws_are_drawn(tmp_path):
    """torch.quantile refuses more than 2^24 draws."""
    draws = torch.arange(2.0**24 + 1).reshape(-1, 1, 1)
    assert plot_intervals(torch.zeros(1, 1), draws, tmp_path / "many.png").stat().st_size > 0


def test_what_stands_in_holes_and_padding_changes_no_picture_of_intervals(tmp_path):
    values, draws = clips(2, 6, 2), clips(9, 2, 6, 2)
    mask, observed = torch.arange(6) < torch.tensor([[6], [3]]), clips(2, 6, 2) < 0.6
    one = pixels(plot_intervals(values, draws, tmp_path / "a.png", mask=mask, observed=observed))
    filled = torch.where(mask.unsqueeze(-1) & observed, values, 1e6)
    draws = torch.where(mask.unsqueeze(-1), draws, -1e6)
    assert torch.equal(one, pixels(plot_intervals(filled, draws, tmp_path / "b.png", mask=mask, observed=observed)))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"values": torch.zeros(3)}, "^values: has shape"),
        ({"draws": torch.zeros(5, 2, 3)}, "^draws: has shape"),
        ({"levels": (50,)}, "^levels: got"),
        ({"names": ["a"]}, "^names: got 1, expected 2"),
        ({"columns": ["a"]}, "^columns: got 1, expected 3, one for each coordinate"),
        ({"mask": torch.ones(2, 4)}, "^mask: has shape"),
        ({"mask": torch.ones(2, 4, 3).bool()}, "^mask: has shape"),
        ({"observed": torch.ones(4).bool()}, "^observed: has shape"),
        ({"hidden": torch.ones(2, 3).bool()}, "^hidden: has shape"),
    ],
)
def test_what_no_intervals_can_be_drawn_of_is_named(changed, said, tmp_path):
    given = {"values": torch.zeros(2, 4, 3), "draws": torch.zeros(5, 2, 4, 3), **changed}
    with pytest.raises(ValueError, match=said):
        plot_intervals(path=tmp_path / "a.png", **given)
