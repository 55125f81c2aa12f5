"""Parts of sequences in time: windows, a split by time; and other values for the same steps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqdisent.datasets import Clips, Scaler, Sequences

NAN = float("nan")


def tagged(lengths, holes=0.0, seed=0, **options):
    """Sequences with value 100 n + t at step t of sequence n; its step label is t and its covariate t + 0.5."""
    count, num_steps = len(lengths), max(lengths)
    values = (100.0 * torch.arange(count)[:, None] + torch.arange(num_steps))[:, :, None]
    generator = torch.Generator().manual_seed(seed)
    observed = torch.rand(count, num_steps, generator=generator) >= holes
    observed[:, 0] = True
    steps = torch.arange(num_steps + 3) + 0.5
    covariates = torch.where(steps < torch.tensor(lengths)[:, None] + 2, steps, NAN)[:, :, None]  # two steps beyond
    return Sequences(
        values,
        lengths=torch.tensor(lengths),
        observed=observed if holes else None,
        covariates=covariates,
        identity=torch.arange(count) // 2,
        labels={"n": torch.arange(count)},
        step_labels={"t": torch.arange(num_steps).expand(count, -1)},
        names=[f"s{n}" for n in range(count)],
        **options,
    )


def check_part(part, row, n, steps):
    """Row `row` of a part has these steps of sequence n of `tagged`."""
    size = len(steps)
    assert int(part.lengths[row]) == size
    seen = torch.ones(size).bool() if part.observed is None else part.observed[row, :size]
    assert part.values[row, :size, 0].tolist() == [(100.0 * n + t) * bool(s) for t, s in zip(steps, seen, strict=True)]
    assert part.covariates[row, :size, 0].tolist() == [t + 0.5 for t in steps]
    assert part.step_labels["t"][row, :size].tolist() == list(steps)
    assert int(part.identity[row]) == n // 2
    assert int(part.labels["n"][row]) == n


ragged = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@given(ragged, st.integers(1, 14), st.one_of(st.none(), st.integers(1, 14)), st.sampled_from([0.0, 0.7]))
def test_windows_are_those_of_a_loop(lengths, num_steps, stride, holes):
    data = tagged(lengths, holes)
    found = data.windows(num_steps, stride)
    row = 0
    for n, length in enumerate(lengths):
        start = 0
        while True:
            steps = range(start, min(start + num_steps, length))
            if data.observed is None or data.observed[n, list(steps)].any():
                check_part(found, row, n, steps)
                assert found.names[row] == f"s{n}[{start}:{steps.stop}]"
                if data.observed is not None:
                    assert torch.equal(found.observed[row, : len(steps)], data.observed[n, list(steps)])
                row += 1
            start += stride or num_steps
            if steps.stop == length or start >= length:
                break
    assert len(found) == row
    assert found.values.shape[1] == int(found.lengths.max())
    assert found.covariates.shape[1] == found.values.shape[1]


def test_windows_by_value_keep_those_with_a_value():
    values = torch.tensor([[[1.0, NAN], [NAN, NAN], [NAN, NAN], [NAN, 2.0], [NAN, NAN]]])
    assert Sequences(values).windows(1).names == ["0[0:1]", "0[3:4]"]
    late = Sequences(values[:, 2:], lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match="^windows: nothing was measured in any, got stride=3, expected a smaller one"):
        late.windows(1, stride=3)


@given(st.lists(st.integers(2, 12), min_size=1, max_size=5), st.data(), st.sampled_from([0.0, 0.5]))
def test_a_split_by_time_holds_out_the_end(lengths, data, holes):
    how = data.draw(st.one_of(st.integers(1, min(lengths) - 1), st.floats(0.05, 0.95)))
    whole = tagged(lengths, holes)
    whole.observed = None if whole.observed is None else torch.where(whole.mask, True, False)
    train, test = whole.split(how, by="time")
    assert train.names == test.names == whole.names
    for n, length in enumerate(lengths):
        later = how if isinstance(how, int) else min(max(round(how * length), 1), length - 1)
        known = list(range(length + 2))
        assert train.covariates[n, : length + 2, 0].tolist() == [t + 0.5 for t in known]
        assert test.covariates[n, : later + 2, 0].tolist() == [t + 0.5 for t in known[length - later :]]
        assert int(train.lengths[n]) == length - later
        assert int(test.lengths[n]) == later
        if not holes:
            check_part(train, n, n, range(length - later))
            check_part(test, n, n, range(length - later, length))


def test_a_split_by_time_keeps_all_of_a_known_future():
    known = torch.arange(16.0).reshape(2, 8, 1)
    train, test = Sequences(torch.ones(2, 5, 1), lengths=torch.tensor([5, 2]), covariates=known).split(1, by="time")
    assert torch.equal(train.covariates, known)
    assert test.covariates[0, :4, 0].tolist() == [4, 5, 6, 7]
    assert test.covariates[1, :, 0].tolist() == [9, 10, 11, 12, 13, 14, 15]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (
            3,
            ValueError,
            "^held_out: got 3 of the 3 steps of sequence 1 .'s1'., expected at least one step on each side",
        ),
        (0, ValueError, "^held_out: got 0, expected at least 1"),
        (1.0, ValueError, "^held_out: got 1.0, expected a fraction between 0 and 1, or an int"),
        ("half", TypeError, "^held_out: got str, expected an int, or a fraction"),
    ],
)
def test_splits_by_time_that_are_refused(how, error, message):
    with pytest.raises(error, match=message):
        tagged([5, 3]).split(how, by="time")


def test_more_that_is_refused():
    with pytest.raises(ValueError, match="^held_out: got 0.5 of the 1 steps of sequence 1"):
        tagged([5, 1]).split(0.5, by="time")
    with pytest.raises(ValueError, match="^observed: nothing was measured in sequence 0 .'0'."):
        Sequences(torch.tensor([[[1.0], [NAN]]])).split(1, by="time")
    with pytest.raises(
        ValueError, match="^seed: got None, expected an int, which decides what is held out by identity"
    ):
        tagged([5, 3, 2]).split(1, by="identity")
    with pytest.raises(ValueError, match="^by: got 'clip', expected one of 'identity', 'sequence', 'time'"):
        tagged([5, 3]).split(1, 0, by="clip")
    for options in ((0,), (1, 0)):
        with pytest.raises(ValueError, match="^(num_steps|stride): got 0, expected at least 1"):
            tagged([5]).windows(*options)
    with pytest.raises(TypeError, match="^stride: "):
        tagged([5]).windows(2, 1.5)


class Never:
    """A renderer that must not be called."""

    def __call__(self, content, motion, num_steps):
        raise AssertionError


def test_clips_have_windows_without_true_swaps():
    frames = torch.arange(10, dtype=torch.uint8).reshape(2, 5, 1)
    clips = Clips(frames, scale=9, renderer=Never())
    windows = clips.windows(2)
    assert type(windows) is Clips
    assert windows.scale == 9
    assert windows.frames[..., 0].tolist() == [[0, 1], [2, 3], [4, 4], [5, 6], [7, 8], [9, 9]]
    assert windows.batch([2]).values.flatten().tolist() == pytest.approx([4 / 9])
    with pytest.raises(ValueError, match="^true_swap: "):
        windows.true_swap(0, 1)
    assert clips.split(0.5, 0, by="sequence")[0].renderer is not None


def test_other_values_for_the_same_steps():
    data = tagged([4, 2], holes=0.4, seed=3)
    assert not data.observed[data.mask].all()
    doubled = data.map_values(lambda values: torch.cat([values, 1 / values.where(values > 0, 1) + 2], dim=2))
    assert torch.equal(doubled.observed, data.observed)
    assert torch.equal(doubled.values[..., :1], data.values)
    assert not doubled.values[~data.observed].any()
    assert torch.equal(doubled.covariates, data.covariates)
    assert doubled.names == data.names
    complete = tagged([4, 2]).map_values(lambda values: values.log1p().double())  # of padding, too
    assert complete.observed is None
    assert complete.batch([0]).values.dtype == torch.float64
    assert torch.equal(
        Clips(torch.ones(1, 2, 1).byte()).map_values(lambda frames: 255 - frames).frames.flatten(),
        torch.tensor([254, 254]).byte(),
    )


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (torch.log, ValueError, "^values: not finite in sequence 0 .'s0'."),
        (lambda values: values.where(values != 101, NAN), ValueError, "^values: not finite in sequence 1 .'s1'."),
        (lambda values: values[:, 1:], ValueError, r"^function: returned shape \(2, 3, 1\), expected \(2, 4, \*E\)"),
        (lambda values: values.long(), TypeError, "^values: got torch.int64"),
        (lambda values: None, TypeError, "^values: got NoneType"),
    ],
)
def test_values_that_do_not_fit_are_refused(function, error, message):
    with pytest.raises(error, match=message):
        tagged([4, 2]).map_values(function)


def test_only_the_training_part_is_looked_at():
    data = Sequences(torch.cat([torch.zeros(3, 4, 1), torch.ones(3, 2, 1) * 9], dim=1))
    train, test = data.split(2, by="time")
    scaler = Scaler.fit(train)
    assert (float(scaler.loc), float(scaler.scale)) == (0.0, 1.0)
    assert test.scaled(scaler).values.unique().tolist() == [9.0]
    with pytest.raises(TypeError, match="^frames: got torch.float32"):
        Clips(torch.zeros(1, 2, 1).byte()).scaled(scaler)
