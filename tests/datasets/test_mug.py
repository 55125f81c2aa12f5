"""MUG: files of the licensed layout, made here."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqdisent.datasets import mug

KEPT = {0: 0, 1: 1, 3: 3, 4: 4, 7: 2, 8: 5}


def made(lengths, seed=0, size=8):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (length, size, size, 3), dtype=np.uint8) for length in lengths]


def written(folder, sequences, labels):
    np.savez(folder / "sequences.npz", *sequences)
    np.savez(folder / "labels.npz", np.asarray(labels))
    return folder / "sequences.npz"


rows = st.lists(st.tuples(st.integers(1, 9), st.integers(3, 6), st.integers(0, 8)), min_size=1, max_size=8)


@given(rows, st.integers(0, 99))
def test_clips_are_the_kept_sequences_halved(tmp_path_factory, rows, seed):
    sequences, labels = made([n for n, _, _ in rows], seed), [row[1:] for row in rows]
    path = written(tmp_path_factory.mktemp("mug"), sequences, labels)
    kept = [row for row, (_, _, action) in enumerate(rows) if action in KEPT]
    if not kept:
        with pytest.raises(ValueError, match=r"sequences\.npz: .*actions"):
            mug(path, image_size=8)
        return
    clips = mug(path, image_size=8)
    assert clips.names == [str(row) for row in kept]
    for place, row in enumerate(kept):
        who, action = labels[row]
        wanted = sequences[row][::2].transpose(0, 3, 1, 2)
        assert np.array_equal(clips.frames[place, : clips.lengths[place]].numpy(), wanted)
        assert int(clips.identity[place]) == who
        assert int(clips.labels["action"][place]) == KEPT[action]
        assert clips.factor_names["action"][KEPT[action]] == str(action)
        assert clips.factor_names["identity"][int(clips.labels["identity"][place])] == str(who)
    assert clips.static_factors == ("identity",)
    assert clips.motion_factors == ("action",)


def test_segments_are_windows_and_short_sequences_come_whole(tmp_path):
    path = written(tmp_path, made([60, 7], size=4), [[0, 0], [1, 8]])
    clips = mug(path, image_size=4)
    assert clips.lengths.tolist() == [30, 4]
    batch = clips.draw_clips(2, torch.Generator().manual_seed(0), num_steps=16)
    assert sorted(batch.mask.sum(1).tolist()) == [4, 16]
    assert batch.frames.shape == (2, 16, 3, 4, 4)


def test_frames_are_resized_to_64_by_default(tmp_path):
    pytest.importorskip("PIL")
    sequences = [np.full((3, 112, 112, 3), value, dtype=np.uint8) for value in (40, 200)]
    clips = mug(written(tmp_path, sequences, [[0, 0], [1, 1]]))
    assert clips.frames.shape == (2, 2, 3, 64, 64)
    assert clips.frames.flatten(1).unique(dim=1).tolist() == [[40], [200]]  # no border


def test_one_array_may_hold_sequences_of_one_length(tmp_path):
    sequences, labels = made([6, 6, 6]), [[0, 0], [0, 2], [1, 7]]
    apart = mug(written(tmp_path, sequences, labels), image_size=8)
    np.savez(tmp_path / "together.npz", np.stack(sequences))
    together = mug(tmp_path / "together.npz", labels=tmp_path / "labels.npz", image_size=8)
    assert torch.equal(apart.frames, together.frames)
    assert apart.names == together.names == ["0", "2"]


def test_an_array_of_objects_is_refused_with_a_line_that_converts_it(tmp_path, monkeypatch):
    sequences = made([6, 9])
    path = written(tmp_path, sequences, [[0, 0], [1, 1]])
    expected = mug(path, image_size=8)
    objects = np.empty(2, dtype=object)
    objects[:] = sequences
    np.savez(tmp_path / "YOURS.npz", objects)
    path.unlink()
    with pytest.raises(ValueError, match=r"YOURS\.npz: ") as error:
        mug(tmp_path / "YOURS.npz", image_size=8)
    line = str(error.value).split("with: ")[1]
    assert line in re.sub(r"\s+", " ", mug.__doc__)
    monkeypatch.chdir(tmp_path)
    exec(line, {"np": np})
    assert torch.equal(mug(path, image_size=8).frames, expected.frames)


@pytest.mark.parametrize(
    ("arrays", "labels", "error", "message"),
    [
        (made([2]), [[0, 0], [1, 1]], ValueError, r"sequences\.npz: .*'arr_1'"),
        (made([2, 2]), [[0, 0]], ValueError, r"sequences\.npz: .*sequence 1"),
        (
            [made([2])[0][..., :1]],
            [[0, 0]],
            ValueError,
            r"sequences\.npz: .*\(2, 8, 8, 1\)",
        ),
        (made([0]), [[0, 0]], ValueError, r"sequences\.npz: .*\(0, 8, 8, 3\)"),
        ([made([2])[0] / 255], [[0, 0]], TypeError, r"sequences\.npz: .*float64"),
        (made([2]), [0], ValueError, r"labels\.npz: .*\(1,\)"),
        (made([2]), [[0.0, 0.0]], TypeError, r"labels\.npz: .*float64"),
        (made([2]), [[0, 9]], ValueError, r"labels\.npz: .*9 to 9"),
        (made([2]), [[0, -1]], ValueError, r"labels\.npz: .*-1 to -1"),
        (made([2]), [[0, 5]], ValueError, r"sequences\.npz: .*actions"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, arrays, labels, error, message):
    with pytest.raises(error, match=message):
        mug(written(tmp_path, arrays, labels), image_size=8)


def test_missing_damaged_and_misnamed_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"labels\.npz: "):
        mug(tmp_path / "sequences.npz")
    path = written(tmp_path, made([2]), [[0, 0]])
    np.savez(path, frames=made([2])[0])
    with pytest.raises(ValueError, match=r"sequences\.npz: .*'frames'"):
        mug(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"sequences\.npz: "):
        mug(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"sequences\.npz: "):
        mug(path)
    np.savez(tmp_path / "labels.npz", who=np.zeros(1))
    with pytest.raises(ValueError, match=r"labels\.npz: "):
        mug(path)
