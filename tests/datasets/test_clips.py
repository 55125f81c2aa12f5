"""Clips: what a batch holds, what draws depend on, and what is refused."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqdisent.datasets import Batch, Clips, Sequences


def tagged(lengths, identity=None, **options):
    """Clips whose frame t of clip n has the one value 1 + 16 n + t in every pixel, and 255 in its padding."""
    lengths = torch.as_tensor(lengths)
    steps = torch.arange(int(lengths.max()))
    values = 1 + 16 * torch.arange(len(lengths))[:, None] + steps
    values = torch.where(steps < lengths[:, None], values, 255).to(torch.uint8)
    frames = values[:, :, None, None, None].expand(-1, -1, 2, 3, 3).contiguous()
    return Clips(frames, lengths=lengths, identity=None if identity is None else torch.as_tensor(identity), **options)


def tags(batch):
    """(clip, step) of each frame of a batch of tagged clips; padding gives clip -1."""
    values = (batch.frames[:, :, 0, 0, 0] * 255).round().long() - 1
    assert torch.equal(batch.frames, batch.frames[:, :, :1, :1, :1].expand_as(batch.frames))
    return values.div(16, rounding_mode="floor"), values % 16


def generator(seed):
    return torch.Generator().manual_seed(seed)


seeds = st.integers(0, 2**31)
ragged = st.lists(st.integers(1, 9), min_size=1, max_size=15)


@given(ragged, st.data())
def test_batch_holds_the_clips_trims_to_the_longest_and_zeroes_padding(lengths, data):
    clips = tagged(lengths)
    indices = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6))
    batch = clips.batch(indices)
    assert isinstance(batch, Batch)
    assert batch.frames.dtype == torch.float32
    assert batch.mask.dtype == torch.bool
    assert batch.frames.shape == (len(indices), max(lengths[i] for i in indices), 2, 3, 3)
    clip, step = tags(batch)
    for row, index in enumerate(indices):
        n = lengths[index]
        assert batch.mask[row].tolist() == [t < n for t in range(batch.mask.shape[1])]
        assert clip[row, :n].tolist() == [index] * n
        assert step[row, :n].tolist() == list(range(n))
        assert not batch.frames[row, n:].any()
    assert batch.identity.tolist() == indices


def test_frames_become_floats_in_the_unit_interval():
    frames = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1, 1)
    assert torch.allclose(Clips(frames).batch([0]).frames.flatten(), torch.tensor([0.0, 0.2, 1.0]), atol=1e-7)


@given(st.lists(st.integers(1, 4), max_size=4), st.sampled_from([1, 3, 100, 255]), ragged, seeds)
def test_frames_may_have_any_shape_and_scale(more, scale, lengths, seed):
    shape = (len(lengths), max(lengths), 3, *more)
    frames = torch.randint(scale + 1, shape, generator=generator(seed), dtype=torch.uint8)
    clips = Clips(frames, scale=scale, lengths=torch.tensor(lengths))
    for some in (clips, clips.subset(range(len(clips)))):
        batch = some.batch(range(len(some)))
        assert torch.allclose(batch.frames[batch.mask], frames[batch.mask] / scale)
        assert not batch.frames[~batch.mask].any()
        assert some.draw_groups(2, 5, generator(seed)).frames.shape == (2, 5, 3, *more)
        assert some.draw_clips(2, generator(seed), num_steps=1).frames.shape == (2, 1, 3, *more)


def test_a_byte_above_the_scale_is_refused_unless_it_is_padding_or_a_hole():
    frames = torch.tensor([[1, 2], [0, 1]], dtype=torch.uint8)[:, :, None]
    with pytest.raises(ValueError, match="^frames: "):
        Clips(frames, scale=1)
    assert Clips(frames, scale=1, lengths=torch.tensor([1, 2])).batch([0, 1]).frames.max() == 1
    for observed in (frames[..., 0] < 2, frames < 2):  # by frame, and by value
        assert Clips(frames, scale=1, observed=observed).batch([0, 1]).frames.max() == 1
    with pytest.raises(ValueError, match="^frames: got values up to 2, expected at most scale=1"):
        Clips(frames, scale=1, observed=frames > 0)
    with pytest.raises(ValueError, match="^scale: "):
        Clips(frames, scale=0)


@given(ragged, st.integers(1, 40), st.one_of(st.none(), st.integers(1, 12)), seeds)
def test_drawn_windows_are_contiguous_real_and_as_long_as_possible(lengths, batch_size, num_steps, seed):
    clips = tagged(lengths)
    batch = clips.draw_clips(batch_size, generator(seed), num_steps=num_steps)
    clip, step = tags(batch)
    rows = clip[:, 0].tolist()
    assert batch.frames.shape[0] == batch_size
    assert batch.identity.tolist() == rows
    for row, index in enumerate(rows):
        n = lengths[index] if num_steps is None else min(lengths[index], num_steps)
        assert batch.mask[row].tolist() == [t < n for t in range(batch.mask.shape[1])]
        assert clip[row, :n].tolist() == [index] * n
        start = int(step[row, 0])
        assert step[row, :n].tolist() == list(range(start, start + n))
        assert start + n <= lengths[index]
        assert not batch.frames[row, n:].any()
    assert batch.mask.shape[1] == int(batch.mask.sum(1).max())
    uses = [rows.count(index) for index in range(len(lengths))]
    assert max(uses) - min(uses) <= 1


def test_every_window_comes_about_equally_often():
    # 4,000 draws among 4 starts; 5 standard deviations (27) either side: fails for fewer than one seed in 400,000
    batch = tagged([7]).draw_clips(4000, generator(0), num_steps=4)
    counts = tags(batch)[1][:, 0].bincount(minlength=4)
    assert len(counts) == 4
    assert (counts - 1000).abs().max() < 5 * 27


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=15), st.data(), seeds)
def test_groups_hold_frames_of_one_identity_without_repeats_while_there_are_enough(clips_of, data, seed):
    lengths, identity = [n for n, _ in clips_of], [7 * who - 3 for _, who in clips_of]
    clips = tagged(lengths, identity)
    num_groups, size = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 20))
    batch = clips.draw_groups(num_groups, size, generator(seed))
    assert batch.frames.shape == (num_groups, size, 2, 3, 3)
    assert batch.mask.shape == (num_groups, size)
    assert batch.mask.all()
    clip, step = tags(batch)
    for row in range(num_groups):
        who = int(batch.identity[row])
        frames = list(zip(clip[row].tolist(), step[row].tolist(), strict=True))
        assert {identity[n] for n, _ in frames} == {who}
        assert all(t < lengths[n] for n, t in frames)
        available = sum(n for n, i in zip(lengths, identity, strict=True) if i == who)
        if size <= available:
            assert len(set(frames)) == size
    uses = [batch.identity.tolist().count(who) for who in set(identity)]
    assert max(uses) - min(uses) <= 1


def test_groups_reach_every_frame_in_no_order():
    clips = tagged([3, 2, 4], [0, 1, 0])
    seen, ordered = set(), 0
    for seed in range(60):
        batch = clips.draw_groups(2, 2, generator(seed))
        clip, step = tags(batch)
        seen |= set(zip(clip.flatten().tolist(), step.flatten().tolist(), strict=True))
        ordered += int((clip * 16 + step).diff(dim=1).gt(0).sum())
    assert seen == {(n, t) for n, length in enumerate([3, 2, 4]) for t in range(length)}
    assert 30 < ordered < 90  # of 120 pairs; half of them expected


def test_groups_with_too_few_frames_still_reach_them_all():
    batch = tagged([3], [0]).draw_groups(1, 60, generator(0))
    assert set(tags(batch)[1].flatten().tolist()) == {0, 1, 2}


def test_groups_have_the_static_labels_alone():
    labels = {"hat": torch.tensor([1, 1, 0]), "walk": torch.tensor([0, 1, 0])}
    clips = tagged([2, 2, 2], [5, 5, 6], labels=labels, static_factors=["hat"], motion_factors=["walk"])
    batch = clips.draw_groups(2, 2, generator(0))
    assert set(batch.labels) == {"hat"}
    assert [{5: 1, 6: 0}[who] for who in batch.identity.tolist()] == batch.labels["hat"].tolist()
    assert set(clips.draw_clips(2, generator(0)).labels) == {"hat", "walk"}


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=15), st.integers(1, 20), seeds)
def test_pairs_are_two_whole_clips_of_one_identity_in_a_row(clips_of, batch_size, seed):
    lengths, identity = [n for n, _ in clips_of], [7 * who - 3 for _, who in clips_of]
    clips = tagged(lengths, identity)
    batch = clips.draw_pairs(batch_size, generator(seed))
    clip, step = tags(batch)
    rows = clip[:, 0].tolist()
    assert batch.frames.shape[0] == batch_size
    for row, first in enumerate(rows):
        n = lengths[first]
        second = int(clip[row, n])
        total = n + lengths[second]
        assert identity[first] == identity[second] == int(batch.identity[row])
        assert batch.mask[row].tolist() == [t < total for t in range(batch.mask.shape[1])]
        assert clip[row, :total].tolist() == [first] * n + [second] * lengths[second]
        assert step[row, :total].tolist() == [*range(n), *range(lengths[second])]
        assert not batch.frames[row, total:].any()
    assert batch.mask.shape[1] == int(batch.mask.sum(1).max())
    real = clips.frames.flatten(0, 1)[batch.positions] / 255
    assert torch.allclose(real[batch.mask], batch.frames[batch.mask])
    uses = [rows.count(index) for index in range(len(lengths))]
    assert max(uses) - min(uses) <= 1


def test_every_pair_comes_about_equally_often():
    # 3,600 draws among 9 ordered pairs; 5 standard deviations (19) either side: fails for one seed in 190,000 or so
    labels = {"hat": torch.tensor([1, 0, 1, 1]), "walk": torch.tensor([0, 0, 1, 2])}
    clips = tagged([2, 1, 2, 2], [5, 6, 5, 5], labels=labels, static_factors=["hat"], motion_factors=["walk"])
    batch = clips.draw_pairs(4800, generator(0))
    assert set(batch.labels) == {"hat"}
    clip = tags(batch)[0][batch.identity == 5]
    counts = torch.stack([clip[:, 0], clip[:, 2]], dim=1).unique(dim=0, return_counts=True)[1]
    assert len(counts) == 9
    assert (counts - 400).abs().max() < 5 * 19


class Seeded(torch.utils.data.Dataset):
    """What a loader's worker draws: item i from a generator seeded with i."""

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return 6

    def __getitem__(self, seed):
        drawn = generator(seed)
        windows = self.clips.draw_clips(3, drawn, num_steps=2)
        return windows, self.clips.draw_groups(2, 3, drawn), self.clips.draw_pairs(2, drawn)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_draws_do_not_depend_on_the_number_of_workers():
    data = Seeded(tagged([5, 4, 5, 3], [0, 0, 1, 1]))
    alone, shared = (list(torch.utils.data.DataLoader(data, batch_size=None, num_workers=n)) for n in (0, 2))
    assert len(alone) == len(shared) == 6
    for batches, others in zip(alone, shared, strict=True):
        for batch, other in zip(batches, others, strict=True):
            assert torch.equal(batch.frames, other.frames)
            assert torch.equal(batch.positions, other.positions)
            assert torch.equal(batch.identity, other.identity)


@pytest.mark.parametrize(
    "draw",
    [
        lambda clips, g: clips.draw_pairs(5, g),
        lambda clips, g: clips.draw_clips(5, g),
        lambda clips, g: clips.draw_clips(5, g, num_steps=3),
        lambda clips, g: clips.draw_groups(3, 4, g),
    ],
)
def test_draws_depend_on_the_generator_alone(draw):
    clips = tagged([9, 8, 7, 9, 6, 8], [0, 0, 1, 1, 2, 2])
    torch.manual_seed(1)
    first = draw(clips, generator(3))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = draw(clips, generator(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.frames, again.frames)
    assert torch.equal(first.identity, again.identity)
    assert any(not torch.equal(first.frames, draw(clips, generator(seed)).frames) for seed in range(4, 8))
    one = generator(3)
    assert torch.equal(draw(clips, one).frames, first.frames)
    assert any(not torch.equal(first.frames, draw(clips, one).frames) for _ in range(4))


@given(st.lists(st.integers(0, 6), min_size=2, max_size=15), st.data(), st.integers(0, 99))
def test_split_by_identity_parts_identities_and_keeps_every_clip(identity, data, seed):
    clips = tagged([2] * len(identity), identity)
    total = len(set(identity))
    if total < 2:
        with pytest.raises(ValueError, match="^split by identity: "):
            clips.split(0.5, seed, by="identity")
        return
    amount = data.draw(st.one_of(st.integers(1, total - 1), st.floats(0.01, 0.99)))
    train, held_out = clips.split(amount, seed, by="identity")
    assert not set(train.identity.tolist()) & set(held_out.identity.tolist())
    assert sorted(train.names + held_out.names, key=int) == clips.names
    if isinstance(amount, int):
        assert held_out.num_identities == amount
    else:
        assert abs(held_out.num_identities - amount * total) <= 1
    again = clips.split(amount, seed, by="identity")[1]
    assert again.names == held_out.names


@given(st.lists(st.integers(0, 3), min_size=2, max_size=15), st.data(), st.integers(0, 99))
def test_split_by_sequence_parts_clips_whoever_they_show(identity, data, seed):
    clips = tagged([2] * len(identity), identity)
    amount = data.draw(st.integers(1, len(identity) - 1))
    train, held_out = clips.split(amount, seed, by="sequence")
    assert len(held_out) == amount
    assert sorted(train.names + held_out.names, key=int) == clips.names
    assert clips.split(amount, seed, by="sequence")[1].names == held_out.names
    quarter = clips.split(0.25, seed, by="sequence")[1]
    assert len(quarter) == max(round(0.25 * len(clips)), 1)


def test_split_by_sequence_follows_the_seed_and_may_leave_an_identity_on_both_sides():
    clips = tagged([1] * 12, [0, 1, 2] * 4)
    assert len({tuple(clips.split(3, seed, by="sequence")[1].names) for seed in range(5)}) > 1
    assert any(set(a.identity.tolist()) & set(b.identity.tolist()) for a, b in [clips.split(3, 0, by="sequence")])


def test_split_by_something_else_is_refused():
    with pytest.raises(ValueError, match="^by: "):
        tagged([1, 1]).split(1, 0, by="clip")
    with pytest.raises(ValueError, match="^split by sequence: "):
        tagged([1]).split(1, 0, by="sequence")


def test_split_by_identity_follows_the_seed():
    clips = tagged([1] * 12)
    assert len({tuple(clips.split(3, seed, by="identity")[1].names) for seed in range(5)}) > 1


@pytest.mark.parametrize("amount", [0, 3, -1, 0.0, 1.0, 1.5, float("nan")])
def test_split_by_identity_refuses_what_leaves_a_side_empty(amount):
    with pytest.raises(ValueError, match="^held_out: "):
        tagged([1, 1, 1]).split(amount, 0, by="identity")


def test_subset_keeps_everything_in_the_order_given():
    labels = {"hat": torch.tensor([0, 1, 2])}
    clips = tagged([2, 3, 1], [4, 5, 6], labels=labels, factor_names={"hat": ["a", "b", "c"]}, names=["x", "y", "z"])
    part = clips.subset([2, 0])
    assert part.names == ["z", "x"]
    assert part.identity.tolist() == [6, 4]
    assert part.lengths.tolist() == [1, 2]
    assert part.labels["hat"].tolist() == [2, 0]
    assert part.factor_names == {"hat": ("a", "b", "c")}
    assert torch.equal(part.frames, clips.frames[[2, 0]])
    assert torch.equal(part.mask, clips.mask[[2, 0]])
    assert clips.subset(clips.identity != 5).names == ["x", "z"]
    assert part.subset([1]).source.tolist() == [0]


class Recorder:
    """A renderer that shows which rows it was asked for."""

    def __call__(self, content, motion, num_steps):
        steps = torch.zeros(len(content), num_steps or 2, 1, 1, 1, dtype=torch.uint8)
        return steps + (10 * content + motion).to(torch.uint8)[:, None, None, None, None]


def test_true_swap_survives_subset_and_takes_many():
    clips = tagged([2] * 5, renderer=Recorder())
    part = clips.subset([4, 2, 3]).subset([1, 0])
    assert part.true_swap(0, 1).shape == (2, 1, 1, 1)
    assert part.true_swap(0, 1).unique().tolist() == [24]
    many = part.true_swap(torch.tensor([0, 1, 1]), [1, 0, 1])
    assert many[:, 0].flatten().tolist() == [24, 42, 44]
    assert part.true_clip(1, 7).shape == (7, 1, 1, 1)
    assert part.true_clip([0, 1], 7)[:, 6].flatten().tolist() == [22, 44]
    assert pickle.loads(pickle.dumps(part)).true_swap(0, 1).unique().tolist() == [24]


def test_true_swap_errors():
    with pytest.raises(ValueError, match="^true_swap: "):
        tagged([2, 2]).true_swap(0, 1)
    clips = tagged([2, 2], renderer=Recorder())
    with pytest.raises(ValueError, match="^motion: "):
        clips.true_swap([0, 1], [1])
    with pytest.raises(ValueError, match="^content: "):
        clips.true_swap(2, 0)
    with pytest.raises(ValueError, match="^num_steps: "):
        clips.true_clip(0, 0)


@pytest.mark.parametrize("method", ["batch", "subset"])
@pytest.mark.parametrize("indices", [[], [0.5], [[0]], [-1], [2], torch.tensor([True])])
def test_wrong_indices_are_refused(method, indices):
    with pytest.raises(ValueError, match="^indices: "):
        getattr(tagged([1, 1]), method)(indices)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lengths": torch.tensor([0, 1])}, ValueError, "^lengths: .*0 to 1"),
        ({"lengths": torch.tensor([3, 1])}, ValueError, "^lengths: .*1 to 3"),
        ({"lengths": torch.tensor([1])}, ValueError, r"^lengths: .*\(1,\)"),
        ({"identity": torch.tensor([0.0, 1.0])}, TypeError, "^identity: "),
        ({"identity": [0, 1]}, TypeError, "^identity: "),
        (
            {"labels": {"a": torch.tensor([0, -1])}, "factor_names": {"a": ["x"]}},
            ValueError,
            "^labels.'a'.: .*-1",
        ),
        (
            {"labels": {"a": torch.tensor([0, 1])}, "factor_names": {"a": ["x"]}},
            ValueError,
            "^labels.'a'.: .*1",
        ),
        ({"labels": {"a": torch.tensor([True, False])}}, TypeError, r"^labels\['a'\]: "),
        ({"factor_names": {"b": ["x"]}}, ValueError, "^factor_names: 'b'"),
        ({"static_factors": ["b"]}, ValueError, "^static_factors: 'b'"),
        ({"motion_factors": ["b"]}, ValueError, "^motion_factors: 'b'"),
        ({"names": ["x"]}, ValueError, "^names: "),
        (
            {
                "labels": {"a": torch.tensor([0, 1])},
                "identity": torch.tensor([3, 3]),
                "static_factors": ["a"],
            },
            ValueError,
            "^static_factors: 'a'",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        Clips(torch.zeros(2, 2, 1, 1, 1, dtype=torch.uint8), **options)


def test_clips_as_sequences_keep_what_is_known_of_them():
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (3, 4, 2), generator=generator).byte()
    observed = torch.rand(3, 4, 2, generator=generator) < 0.7
    observed[:, 0] = True
    lengths, covariates = torch.tensor([4, 2, 3]), torch.rand(3, 6, 1, generator=generator)
    how = {"labels": {"who": torch.tensor([0, 1, 0])}, "static_factors": ["who"], "names": ["a", "b", "c"]}
    clips = Clips(frames, lengths=lengths, observed=observed, covariates=covariates, identity=lengths, **how)
    data = clips.as_sequences()
    assert type(data) is Sequences
    for one, other in zip(data.batch([0, 1, 2]), clips.batch([0, 1, 2]), strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other)
        elif isinstance(one, dict):
            torch.testing.assert_close(one, other)
        else:
            assert one == other
    assert torch.equal(data.future_covariates([0], 2), clips.future_covariates([0], 2))
    assert (data.names, data.static_factors, data.factor_names) == (clips.names, ("who",), clips.factor_names)


def test_wrong_frames_are_refused():
    with pytest.raises(TypeError, match="^frames: "):
        Clips(torch.zeros(1, 1, 1, 1, 1))
    with pytest.raises(TypeError, match="^frames: "):
        Clips([0])
    with pytest.raises(ValueError, match="^frames: "):
        Clips(torch.zeros(1, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="^frames: "):
        Clips(torch.zeros(0, 1, 1, 1, 1, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (lambda clips, g: clips.draw_clips(0, g), "batch_size"),
        (lambda clips, g: clips.draw_clips(1, g, num_steps=0), "num_steps"),
        (lambda clips, g: clips.draw_pairs(0, g), "batch_size"),
        (lambda clips, g: clips.draw_groups(0, 1, g), "num_groups"),
        (lambda clips, g: clips.draw_groups(1, 0, g), "frames_per_group"),
    ],
)
def test_draws_of_nothing_are_refused(draw, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        draw(tagged([2]), generator(0))


def test_counts_must_be_whole_numbers():
    with pytest.raises(TypeError, match="^batch_size: "):
        tagged([2]).draw_clips(2.0, generator(0))
    with pytest.raises(TypeError, match="^held_out: "):
        tagged([2, 2]).split(True, 0, by="identity")
