"""Sequences: what a batch holds of values, holes, covariates and labels, and what is refused."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqdisent import training
from seqdisent.datasets import Batch, Clips, Sequences

NAN, INF = float("nan"), float("inf")
seeds = st.integers(0, 2**31)
ragged = st.lists(st.integers(1, 9), min_size=1, max_size=9)


def generator(seed):
    return torch.Generator().manual_seed(seed)


DRAWS = {
    "batch": lambda data, seed: data.batch([len(data) - 1, 0]),
    "windows": lambda data, seed: data.draw_windows(4, generator(seed)),
    "short windows": lambda data, seed: data.draw_windows(4, generator(seed), num_steps=3),
    "groups": lambda data, seed: data.draw_groups(3, 4, generator(seed)),
    "pairs": lambda data, seed: data.draw_pairs(4, generator(seed)),
    "subset": lambda data, seed: data.subset(range(len(data))[::-1]).draw_windows(4, generator(seed), num_steps=2),
    "split": lambda data, seed: (
        data.split(0.5, seed, by="sequence")[0].batch([0]) if len(data) > 1 else data.batch([0])
    ),
}
each_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


def assert_same(batch, other, but=()):
    for name in Batch._fields:
        one, two = getattr(batch, name), getattr(other, name)
        if name in but:
            continue
        if isinstance(one, torch.Tensor):
            assert one.dtype == two.dtype
            torch.testing.assert_close(one, two, rtol=0.0, atol=0.0)
        elif isinstance(one, dict):
            assert one.keys() == two.keys()
            assert all(torch.equal(one[key], two[key]) for key in one)
        else:
            assert one == two


@each_draw
@given(ragged, st.data(), seeds)
def test_complete_sequences_give_the_batches_of_clips(draw, lengths, data, seed):
    identity = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths))))
    frames = torch.randint(256, (len(lengths), max(lengths), 2, 3), generator=generator(seed), dtype=torch.uint8)
    options = {
        "lengths": torch.tensor(lengths),
        "identity": identity,
        "labels": {"hat": identity, "walk": torch.arange(len(lengths))},
        "static_factors": ["hat"],
        "covariates": torch.rand(len(lengths), max(lengths) + 2, 1, generator=generator(seed)),
        "step_labels": {"word": torch.randint(5, frames.shape[:2], generator=generator(seed))},
    }
    batches = [draw(of, seed) for of in (Clips(frames, **options), Sequences(frames.float() / 255, **options))]
    assert_same(*batches)
    assert batches[0].observed is None


def holey(lengths, by_value, seed):
    """Values with holes, and which of them are real and measured; at least the first value of each sequence is."""
    size = (len(lengths), max(lengths), 3)
    observed = torch.rand(size if by_value else size[:2], generator=generator(seed)) > 0.4
    observed[:, 0] = True
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    if by_value:
        observed[0, 0, 0] = False  # a step in part
    observed &= mask if not by_value else mask[:, :, None]
    full = observed if by_value else observed[:, :, None].expand(size)
    return torch.randn(size, generator=generator(seed)) + 5, full, observed


@each_draw
@given(ragged, st.booleans(), st.sampled_from([NAN, INF, 1e6, -1.0]), seeds)
def test_filler_never_reaches_a_batch(draw, lengths, by_value, filler, seed):
    values, full, observed = holey(lengths, by_value, seed)
    lengths = torch.tensor(lengths)
    hours = torch.arange(values.shape[1]).expand(len(lengths), -1)[:, :, None].float()
    words = torch.arange(values.shape[1]).expand(len(lengths), -1)
    beyond = torch.arange(values.shape[1]) >= lengths[:, None]
    clean, filled = (
        Sequences(
            torch.where(full, values, what),
            lengths=lengths,
            observed=observed,
            identity=torch.arange(len(lengths)) % 2,
            covariates=torch.where(beyond[:, :, None], NAN, hours),
            step_labels={"word": torch.where(beyond, number, words)},
        )
        for what, number in ((0.0, 7), (filler, 1000))
    )
    assert not filled.step_labels["word"][beyond].any()
    batch = draw(filled, seed)
    assert_same(batch, draw(clean, seed))
    # the slow way, one step at a time
    at = {n * values.shape[1] + t: (n, t) for n in range(len(lengths)) for t in range(int(lengths[n]))}
    if filled.values.shape == values.shape and draw not in (DRAWS["subset"], DRAWS["split"]):
        for row, col in batch.mask.nonzero().tolist():
            n, t = at[int(batch.positions[row, col])]
            assert torch.equal(batch.values[row, col], values[n, t].where(full[n, t], 0.0))
            assert torch.equal(batch.observed[row, col], observed[n, t])
            assert float(batch.covariates[row, col]) == t
            assert int(batch.step_labels["word"][row, col]) == t
    for row, length in enumerate(batch.mask.sum(1).tolist()):
        assert not batch.values[row, length:].any()
        assert not batch.observed[row, length:].any()
        assert not batch.step_labels["word"][row, length:].any()
        assert (batch.covariates[row, length:] == batch.covariates[row, length - 1]).all()


@given(ragged, st.booleans(), seeds)
def test_nan_says_what_was_not_measured(lengths, by_value, seed):
    values, full, observed = holey(lengths, by_value, seed)
    lengths = torch.tensor(lengths)
    said = Sequences(values, lengths=lengths, observed=observed)
    found = Sequences(torch.where(full, values, NAN), lengths=lengths)
    whole = bool(full[said.mask].all())
    assert (found.observed is None) == whole
    if not whole:
        assert torch.equal(found.observed, said.observed)
    assert torch.equal(found.values, said.values)
    assert not said.values[~full].any()


@given(ragged, st.booleans(), st.integers(1, 4), seeds)
def test_no_row_is_drawn_in_which_nothing_was_measured(lengths, by_value, num_steps, seed):
    values, _, _ = holey(lengths, by_value, seed)
    lengths = torch.tensor(lengths)
    observed = torch.zeros(values.shape if by_value else values.shape[:2], dtype=torch.bool)
    observed[torch.arange(len(lengths)), lengths - 1] = True  # the last step alone
    data = Sequences(values, lengths=lengths, observed=observed, identity=torch.arange(len(lengths)) // 2)
    measured = observed.reshape(*values.shape[:2], -1).any(2)
    windows = data.draw_windows(len(lengths), generator(seed), num_steps=num_steps)
    assert windows.observed.flatten(1).any(1).all()
    ends = windows.positions.gather(1, windows.mask.sum(1, keepdim=True) - 1).squeeze(1) % values.shape[1]
    assert sorted(ends.tolist()) == sorted((lengths - 1).tolist())
    groups = data.draw_groups(3, 4, generator(seed))
    assert measured.flatten()[groups.positions].all()


def test_windows_are_drawn_evenly_among_those_with_a_measurement():
    seen = torch.tensor([1, 0, 0, 0, 0, 1, 1]).bool()
    data = Sequences(torch.ones(1, 7, 1).expand(4000, 7, 1), observed=seen.expand(4000, 7))
    starts = data.draw_windows(4000, generator(0), num_steps=2).positions[:, 0] % 7
    counts = starts.bincount(minlength=6).tolist()  # of [0:2], [4:6] and [5:7], 1333 each, standard deviation 30
    assert [count > 0 for count in counts] == [True, False, False, False, True, True]
    assert all(1200 < count < 1466 for count in counts if count)


def test_padding_alone_is_no_hole():
    values = torch.tensor([[[1.0], [NAN]], [[2.0], [3.0]]])
    data = Sequences(values, lengths=torch.tensor([1, 2]))
    assert data.observed is None
    assert data.batch([0, 1]).values.flatten().tolist() == [1.0, 0.0, 2.0, 3.0]
    assert values.isnan().any()  # the caller's tensor stays as it is


def test_bytes_may_have_holes_too():
    frames = torch.full((2, 3, 2), 255, dtype=torch.uint8)
    observed = torch.tensor([[True, False, True], [True, True, False]])
    clips = Clips(frames, lengths=torch.tensor([3, 2]), observed=observed)
    batch = clips.batch([0, 1])
    assert torch.equal(batch.observed, observed)
    assert torch.equal(batch.values, observed[:, :, None].expand(2, 3, 2).float())
    assert clips.frames is frames
    assert clips.frames is clips.values


def test_a_known_future_is_kept_and_a_batch_has_the_part_of_its_window():
    covariates = torch.arange(16.0).reshape(2, 8, 1)
    covariates[1, 6:] = NAN
    data = Sequences(torch.zeros(2, 5, 1), lengths=torch.tensor([5, 4]), covariates=covariates)
    assert data.covariates[..., 0].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 13, 13]]
    assert data.batch([0, 1]).covariates[..., 0].tolist() == [[0, 1, 2, 3, 4], [8, 9, 10, 11, 11]]
    assert torch.equal(data.subset([1]).covariates, data.covariates[1:, :6])
    window = data.draw_windows(1, generator(0), num_steps=2)
    first = int(window.positions[0, 0])
    assert window.covariates.flatten().tolist() == data.covariates[first // 5, first % 5 :][:2].flatten().tolist()


PARTS = {
    "subset": lambda data: (data.subset(range(len(data))[::-1]).subset(range(len(data))[::-1]), 0),
    "map_values": lambda data: (data.map_values(lambda values: values + 1), 0),
    "training part": lambda data: (data.split(1, by="time")[0], 1),
    "half, training part": lambda data: (data.split(0.5, by="time")[0], None),
    "held-out part": lambda data: (data.split(1, by="time")[1], 0),
    "half, held-out part": lambda data: (data.split(0.5, by="time")[1], 0),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@given(st.lists(st.tuples(st.integers(2, 9), st.integers(0, 4)), min_size=2, max_size=4), st.integers(1, 5))
def test_a_future_is_handed_out_as_far_as_it_is_known(part, sizes, num_steps):
    # covariate 100 n + t at step t of sequence n, known for `ahead` steps after its last
    rows = [100.0 * n + torch.arange(length + ahead)[:, None] for n, (length, ahead) in enumerate(sizes)]
    data = Sequences.from_arrays([torch.zeros(length, 1) for length, _ in sizes], covariates=rows)
    found, more = part(data)
    for n, (length, ahead) in enumerate(sizes):
        held = length - int(found.lengths[n]) if more is None else more
        last, known = length - held, ahead + held
        if num_steps <= known:
            wanted = [100.0 * n + t for t in range(last, last + num_steps)]
            assert found.future_covariates([n], num_steps).flatten().tolist() == wanted
        else:
            with pytest.raises(ValueError, match=f"^num_steps: got {num_steps}, expected at most {known}, .* {n} "):
                found.future_covariates([n], num_steps)


def test_padding_and_windows_have_no_known_future():
    covariates = torch.arange(10.0).reshape(2, 5, 1)
    options = {"lengths": torch.tensor([5, 3]), "names": ["a", "b"]}
    padded = Sequences(torch.zeros(2, 5, 1), covariates=covariates, **options)
    ended = covariates.clone()
    ended[1, 4] = NAN
    known = Sequences(torch.zeros(2, 5, 1), covariates=ended, **options)
    longer = Sequences(torch.zeros(2, 5, 1), covariates=torch.cat([covariates, covariates], dim=1), **options)
    assert known.future_covariates([1], 1).flatten().tolist() == [8.0]
    assert longer.future_covariates([1, 0], 2).flatten().tolist() == [8.0, 9.0, 0.0, 1.0]
    for data in (padded, padded.subset([0, 1]), longer.windows(5), longer.windows(4), known.windows(5)):
        for row in range(len(data)):
            with pytest.raises(ValueError, match="^num_steps: got 1, expected at most 0, the known future of seq"):
                data.future_covariates([row], 1)
    with pytest.raises(ValueError, match="got 2, expected at most 1, the known future of sequence 1 .'b'."):
        known.future_covariates([1, 0], 2)
    with pytest.raises(ValueError, match="^future_covariates: these sequences have no covariates"):
        Sequences(torch.zeros(1, 2, 1)).future_covariates([0], 1)
    with pytest.raises(ValueError, match="^num_steps: got 0"):
        known.future_covariates([0], 0)
    with pytest.raises(ValueError, match="^indices: "):
        longer.future_covariates([2], 1)


def test_dtypes_are_kept():
    double = Sequences(torch.zeros(1, 2, 1).double(), covariates=torch.zeros(1, 2, 1))
    assert double.batch([0]).values.dtype == double.batch([0]).covariates.dtype == torch.float64
    clips = Clips(torch.zeros(1, 2, 1, dtype=torch.uint8), covariates=torch.zeros(1, 2, 1).double())
    assert clips.batch([0]).covariates.dtype == torch.float32


def test_a_batch_is_fit_for_model_and_guide():
    values = torch.tensor([[[1.0], [2.0]], [[2.0], [NAN]]])
    covariates = torch.zeros(2, 2, 3)
    options = {"lengths": torch.tensor([2, 1]), "covariates": covariates}
    full = Sequences(torch.ones(2, 2, 1), **options)
    holes = Sequences(values.where(values != 1, NAN), lengths=torch.tensor([2, 1]))
    known = Sequences(values.where(values != 1, NAN), **options)
    names = ("frames", "mask", "observed", "covariates")

    def given_of(batch):
        given = training.frames_and_mask(batch)
        for name, part in zip(names, given, strict=False):
            assert part is None or part is getattr(batch, name)
        return [name if part is not None else None for name, part in zip(names, given, strict=False)]

    assert given_of(Sequences(torch.ones(2, 2, 1)).batch([0])) == ["frames"]
    assert given_of(full.batch([0])) == ["frames", None, None, "covariates"]
    assert given_of(full.batch([0, 1])) == ["frames", "mask", None, "covariates"]
    assert given_of(holes.batch([0])) == ["frames", None, "observed"]
    assert given_of(holes.batch([0, 1])) == ["frames", "mask", "observed"]
    assert given_of(known.batch([0, 1])) == list(names)
    batch = known.batch([0, 1])
    assert given_of(SimpleNamespace(frames=batch.frames, mask=batch.mask)) == ["frames", "mask"]
    assert_same(pickle.loads(pickle.dumps(batch)), batch)
    assert_same(copy.deepcopy(known).batch([0, 1]), batch)
    made = Batch(batch.frames, batch.mask, batch.identity, {}, batch.positions, True)
    assert (made.observed, made.covariates, made.step_labels) == (None, None, None)
    assert made.values is made.frames


def test_subset_keeps_everything():
    data = Sequences(
        torch.tensor([[[1.0, 2.0]], [[NAN, 3.0]], [[4.0, 5.0]]]),
        labels={"a": torch.tensor([0, 1, 0])},
        step_labels={"b": torch.tensor([[7], [-8], [9]])},
        names=["x", "y", "z"],
        motion_factors=["a"],
    )
    part = data.subset([1, 2])
    assert type(part) is Sequences
    assert part.names == ["y", "z"]
    assert part.step_labels["b"].tolist() == [[-8], [9]]
    assert part.motion_factors == ("a",)
    assert part.observed.tolist() == [[[False, True]], [[True, True]]]
    assert data.subset([0]).observed.all()  # a part without holes still says so: a model reads the same as of the whole


def test_every_part_keeps_the_columns_and_when_its_steps_were():
    times = torch.tensor([[0.0, 1.0, 5.0, 6.0], [2.0, 4.0, 5.0, NAN]])
    how = {"lengths": torch.tensor([4, 3]), "columns": ["pulse", "heat"], "times": times}
    data = Sequences(torch.rand(2, 4, 2), **how)
    assert data.times.tolist() == [[0, 1, 5, 6], [2, 4, 5, 0]]  # 0 in padding
    before, after = data.split(1, by="time")
    assert before.times.tolist() == [[0, 1, 5], [2, 4, 0]]
    assert after.times.tolist() == [[6], [5]]
    assert data.windows(2).times.tolist() == [[0, 1], [5, 6], [2, 4], [5, 0]]
    assert data.subset([1]).times.tolist() == [[2, 4, 5, 0]]
    for part in (before, after, data.windows(2), data.subset([1]), data.map_values(torch.exp)):
        assert part.columns == ("pulse", "heat")
    assert torch.equal(data.map_values(torch.exp).times, data.times)
    assert data.map_values(lambda values: values[..., :1]).columns is None  # these are other coordinates
    listed = Sequences.from_arrays([torch.zeros(2, 1), torch.ones(1, 1)], times=[[0.5, 2.0], [3.0]], columns=["x"])
    assert listed.times.tolist() == [[0.5, 2.0], [3.0, 0.0]]
    assert listed.columns == ("x",)
    none = Sequences(torch.zeros(1, 2, 1)).subset([0])
    assert none.columns is none.times is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"values": [0]}, TypeError, "^values: got list, expected a tensor of floating point"),
        ({"values": torch.zeros(2, 2, 1, dtype=torch.uint8)}, TypeError, "^values: got torch.uint8"),
        ({"values": torch.zeros(2, 2, 1).half()}, TypeError, "^values: got torch.float16, expected float32 or float64"),
        ({"values": torch.zeros(2, 2)}, ValueError, r"^values: shape is \(2, 2\), expected \(N, T, \*E\)"),
        ({"values": torch.zeros(2, 0, 1)}, ValueError, "^values: shape is"),
        ({"values": torch.tensor([[[1.0]], [[INF]]])}, ValueError, "^values: not finite in sequence 1 .'1'., expected"),
        ({"values": torch.tensor([[[1.0]], [[NAN]]])}, ValueError, "^observed: nothing was measured in sequence 1"),
        (
            {"values": torch.tensor([[[1.0, 1.0]], [[NAN, 1.0]]]), "observed": torch.ones(2, 1, dtype=torch.bool)},
            ValueError,
            "^values: not finite in sequence 1",
        ),
        ({"observed": torch.ones(2, 2)}, TypeError, "^observed: got torch.float32, expected a tensor of bool"),
        ({"observed": [True]}, TypeError, "^observed: got list, expected a tensor of bool"),
        (
            {"observed": torch.ones(2, 2, 2, dtype=torch.bool)},
            ValueError,
            r"^observed: shape is \(2, 2, 2\), expected \(2, 2\) or \(2, 2, 1\)",
        ),
        (
            {"observed": torch.tensor([[True, True], [False, True]]), "lengths": torch.tensor([2, 1]), "names": "ab"},
            ValueError,
            "^observed: nothing was measured in sequence 1 .'b'., expected at least one value",
        ),
        ({"covariates": torch.zeros(2, 2, 1).long()}, TypeError, "^covariates: got torch.int64"),
        ({"covariates": torch.zeros(2, 1, 1)}, ValueError, r"^covariates: shape is \(2, 1, 1\), expected \(2, 2 or"),
        ({"covariates": torch.zeros(2, 2)}, ValueError, r"^covariates: shape is \(2, 2\)"),
        (
            {"covariates": torch.tensor([[[1.0], [1.0]], [[1.0], [NAN]]]), "names": ["a", "b"]},
            ValueError,
            "^covariates: end early in sequence 1 .'b'., expected finite values in each of its real steps",
        ),
        ({"covariates": torch.tensor([[[1.0], [NAN], [1.0]]] * 2)}, ValueError, "^covariates: end early in sequence 0"),
        ({"step_labels": {"w": torch.zeros(2)}}, TypeError, "^step_labels.'w'.: "),
        (
            {"step_labels": {"w": torch.zeros(2).long()}},
            ValueError,
            r"^step_labels.'w'.: .*\(2, 2\), one value per step",
        ),
        ({"lengths": torch.tensor([0, 1])}, ValueError, "^lengths: .*0 to 1, expected 1 to 2"),
        ({"identity": torch.tensor([1])}, ValueError, "^identity: .*one value per sequence"),
        ({"names": ["a"]}, ValueError, "^names: got 1, expected one for each of 2 sequences"),
        ({"columns": ["a", "b"]}, ValueError, r"^columns: got 2, expected one for each coordinate of steps \(1,\)"),
        ({"columns": "ab", "values": torch.zeros(2, 2, 2, 1)}, ValueError, "^columns: got 2, expected one for each"),
        ({"columns": "aa", "values": torch.zeros(2, 2, 2)}, ValueError, "^columns: got 'a' twice, expected each name"),
        ({"times": torch.zeros(2, 2).long()}, TypeError, "^times: got torch.int64"),
        ({"times": torch.zeros(2)}, ValueError, r"^times: shape is \(2,\), expected \(2, 2\), one for each step"),
        (
            {"times": torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 1.0]]), "values": torch.zeros(2, 3, 1)},
            ValueError,
            "^times: do not increase in sequence 1 .'1'., expected each real step later than the one before",
        ),
        ({"times": torch.tensor([[0.0, INF], [0.0, 1.0]])}, ValueError, "^times: not finite in sequence 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        Sequences(**{"values": torch.zeros(2, 2, 1), **options})


def test_clips_refuse_observed_and_covariates_that_do_not_fit():
    frames = torch.zeros(2, 2, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="^observed: nothing was measured in sequence 0"):
        Clips(frames, observed=torch.tensor([[False, False], [True, True]]))
    with pytest.raises(ValueError, match="^covariates: end early in sequence 0"):
        Clips(frames, covariates=torch.full((2, 2, 1), NAN))
