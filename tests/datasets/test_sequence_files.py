"""Sequences from lists of arrays, .npz archives and .ts files."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqdisent.datasets import Clips, Sequences, load_sequences

NAN = float("nan")
DATA = Path(os.environ.get("SEQDISENT_DATA") or Path(__file__).parents[3] / "shared" / "data")


def needs(name):
    file = DATA / name / f"{name}.npz"
    return pytest.mark.skipif(not file.is_file(), reason=f"no {file}; SEQDISENT_DATA says where it is")


def made(lengths, seed=0):
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(n, 2)).astype(np.float32) for n in lengths]
    for array in arrays:
        array[rng.random(array.shape) < 0.3] = np.nan
        array[0, 0] = 1.0
    return arrays


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 99), st.booleans())
def test_a_list_gives_its_arrays_back(lengths, seed, as_tensors):
    arrays = made(lengths, seed)
    words = [np.arange(n) + 10 * row for row, n in enumerate(lengths)]
    known = [np.arange(n + 2, dtype=np.float64)[:, None] for n in lengths]
    given_ = [torch.from_numpy(array) for array in arrays] if as_tensors else arrays
    data = Sequences.from_arrays(
        given_,
        covariates=known,
        identity=[5] * len(lengths),
        labels={"a": np.arange(len(lengths))},
        step_labels={"word": words},
        names=[f"n{row}" for row in range(len(lengths))],
    )
    assert data.lengths.tolist() == lengths
    assert data.values.dtype == torch.float32
    assert data.covariates.shape[1] == max(lengths) + 2
    assert data.labels["a"].tolist() == list(range(len(lengths)))
    for row, array in enumerate(arrays):
        n = len(array)
        expected = torch.from_numpy(np.nan_to_num(array))
        assert torch.equal(data.values[row, :n], expected)
        assert data.step_labels["word"][row, :n].tolist() == words[row].tolist()
        assert data.covariates[row, : n + 2].flatten().tolist() == list(range(n + 2))
        assert (data.covariates[row, n + 2 :] == n + 1).all()
        if data.observed is not None:
            seen = data.observed if data.observed.dim() == 3 else data.observed[:, :, None].expand_as(data.values)
            assert torch.equal(seen[row, :n], torch.from_numpy(~np.isnan(array)))
            assert not seen[row, n:].any()


def test_what_was_measured_may_come_in_a_list_and_clips_too():
    data = Sequences.from_arrays([torch.ones(2, 1), torch.ones(1, 1)], observed=[np.array([True, False]), [True]])
    assert data.observed.tolist() == [[True, False], [True, False]]
    swapped = np.array([[1.5], [2.5]], ">f4")[::-1]  # another byte order, and backwards
    assert Sequences.from_arrays([swapped]).values.flatten().tolist() == [2.5, 1.5]
    clips = Clips.from_arrays([np.full((2, 3), 255, np.uint8), np.full((1, 3), 255, np.uint8)], names=["a", "b"])
    assert clips.batch([0, 1]).values.sum(dim=(1, 2)).tolist() == [6.0, 3.0]
    assert torch.equal(clips.subset([1]).values, clips.values[1:])


@pytest.mark.parametrize(
    ("arrays", "options", "error", "message"),
    [
        ([], {}, ValueError, "^arrays: got no array"),
        ([torch.ones(1, 2), torch.ones(0, 2)], {}, ValueError, r"^arrays\[1\]: shape is \(0, 2\), expected \(T, 2\)"),
        ([torch.ones(1, 2), torch.ones(1, 3)], {}, ValueError, r"^arrays\[1\]: shape is \(1, 3\), expected \(T, 2\)"),
        ([torch.ones(1, 2), torch.ones(1, 2).double()], {}, TypeError, r"^arrays\[1\]: got torch.float64, expected"),
        ([np.array([["a"]])], {}, TypeError, r"^arrays\[0\]: got <U1, expected numbers"),
        ([torch.ones(2, 1)], {"covariates": []}, ValueError, "^covariates: got 0, expected one for each of 1"),
        ([torch.ones(2, 1)], {"covariates": [torch.ones(1, 1)]}, ValueError, "^covariates: end early in sequence 0"),
        ([torch.ones(2, 1)], {"observed": [[True]]}, ValueError, r"^observed\[0\]: got 1 steps, expected 2"),
        ([torch.ones(2, 1)], {"observed": [[True]] * 2}, ValueError, "^observed: got 2, expected one for each of 1"),
        ([torch.ones(2, 1)], {"step_labels": {"w": [[0, 0, 0]]}}, ValueError, r"^step_labels\['w'\]\[0\]: got 3 steps"),
        ([torch.ones(2, 1)], {"identity": [0.5]}, TypeError, "^identity: "),
        ([torch.ones(2, 1)], {"labels": {"a": ["x"]}}, TypeError, r"^labels\['a'\]: "),
    ],
)
def test_lists_that_do_not_fit_together_are_refused(arrays, options, error, message):
    with pytest.raises(error, match=message):
        Sequences.from_arrays(arrays, **options)


def test_an_archive(tmp_path):
    values = np.arange(12, dtype=">f8").reshape(3, 2, 2)
    values[1, 1] = np.nan
    np.savez(
        tmp_path / "a.npz",
        values=values,
        lengths=np.array([2, 2, 1]),
        covariates=np.zeros((3, 4, 1)),
        identity=np.array([4, 4, 7]),
        site=np.array([30, 30, 10], np.uint16),
        day=np.array([1, 2, 1]),
        died=np.array([True, False, False]),
        word=np.arange(6).reshape(3, 2),
        features=np.array(["a", "b"]),
        weight=np.zeros(3),
    )
    data = load_sequences(tmp_path / "a.npz")
    assert data.values.dtype == torch.float64
    assert data.values[0].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert data.observed.tolist() == [[True, True], [True, False], [True, False]]
    assert data.covariates.shape == (3, 4, 1)
    assert data.labels["site"].tolist() == [1, 1, 0]
    assert data.factor_names["site"] == ("10", "30")
    assert data.labels["died"].tolist() == [1, 0, 0]
    assert (data.static_factors, data.motion_factors) == (("site",), ("day", "died"))
    assert data.step_labels["word"].tolist() == [[0, 1], [2, 3], [4, 0]]
    assert set(data.labels) == {"site", "day", "died"}
    assert data.times is data.columns is None
    when = {"times": np.array([[0, 3], [1, 2]]), "columns": np.array(["pulse", "heat"])}
    np.savez(tmp_path / "b.npz", values=np.zeros((2, 2, 2)), **when)
    data = load_sequences(tmp_path / "b.npz")
    assert (data.times.tolist(), data.columns) == ([[0, 3], [1, 2]], ("pulse", "heat"))
    assert not data.step_labels


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"frames": np.zeros((1, 1, 1))}, ValueError, "a.npz: holds .'frames'., expected an array 'values'"),
        (
            {"values": np.zeros((1, 1, 1), int)},
            TypeError,
            "a.npz: array 'values' is int64, expected float32 or float64",
        ),
        ({"values": np.zeros((1, 1))}, ValueError, r"a.npz: values: shape is \(1, 1\)"),
        ({"values": np.full((1, 1, 1), np.inf)}, ValueError, "a.npz: values: not finite in sequence 0"),
        ({"values": np.zeros((1, 1, 1)), "lengths": np.array([2])}, ValueError, "a.npz: lengths: "),
        ({"values": np.zeros((1, 1, 1)), "identity": np.array(["x"])}, TypeError, "a.npz: array 'identity' is <U1"),
        ({"values": np.zeros((1, 1, 1)), "observed": np.ones((1, 1))}, TypeError, "a.npz: observed: got torch.float64"),
    ],
)
def test_archives_that_are_refused(tmp_path, arrays, error, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(error, match=message):
        load_sequences(tmp_path / "a.npz")


def test_what_is_no_file_of_sequences_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.npz: no such \.npz or \.ts file"):
        load_sequences(tmp_path / "none.npz")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"a.csv: got a file '.csv', expected \.npz or \.ts"):
        load_sequences(tmp_path / "a.csv")
    (tmp_path / "a.npz").write_text("x")
    with pytest.raises(ValueError, match=r"a.npz: not a NumPy file"):
        load_sequences(tmp_path / "a.npz")


HEADER = "# a comment\n@problemName x\n@timeStamps false\n@missing true\n@classLabel true low high\n@data\n"


def test_a_ts_file(tmp_path):
    (tmp_path / "a.ts").write_text(HEADER + "1.5,?,3:4,5,6:high\n\n7,8:9,NaN:low\n")
    data = load_sequences(tmp_path / "a.ts")
    assert data.lengths.tolist() == [3, 2]
    assert data.values.tolist() == [[[1.5, 4], [0, 5], [3, 6]], [[7, 9], [8, 0], [0, 0]]]
    assert data.observed[..., 0].tolist() == [[True, False, True], [True, True, False]]
    assert data.observed[..., 1].tolist() == [[True, True, True], [True, False, False]]
    assert data.labels["class"].tolist() == [1, 0]
    assert data.factor_names["class"] == ("low", "high")


def test_a_ts_file_without_classes(tmp_path):
    (tmp_path / "a.ts").write_text("@classlabel false\n@DATA\n1,2\n3\n")
    data = load_sequences(tmp_path / "a.ts")
    assert data.values[..., 0].tolist() == [[1, 2], [3, 0]]
    assert not data.labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2\n", "line 1: got '1,2', expected a line of the header"),
        ("@timestamps true\n@data\n", "line 1: @timestamps is true, expected a file without"),
        ("@targetlabel true\n@data\n", "line 1: @targetlabel is true"),
        (HEADER, "a.ts: no series after @data"),
        (HEADER + "1:2:middle\n", "line 7: the class is 'middle', expected one of .'low', 'high'."),
        (HEADER + "low\n", "line 7: got a class alone"),
        (HEADER + "1,x:low\n", "line 7: could not convert string to float: 'x', expected numbers"),
        (HEADER + "1,2:3:low\n", r"line 7: its dimensions have \[2, 1\] values"),
        (HEADER + "1:3:low\n1:low\n", "line 8: got 1 dimensions, expected 2"),
        (HEADER + "1:low\n?:low\n", "a.ts: observed: nothing was measured in sequence 1"),
    ],
)
def test_ts_files_that_are_refused(tmp_path, text, message):
    (tmp_path / "a.ts").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_sequences(tmp_path / "a.ts")


@needs("japanese_vowels")
def test_japanese_vowels():
    with np.load(DATA / "japanese_vowels" / "japanese_vowels.npz") as arrays:
        rows, lengths, speaker = arrays["train"], arrays["train_length"], arrays["train_speaker"]
    data = Sequences.from_arrays(
        np.split(rows, lengths.cumsum()[:-1]), labels={"speaker": speaker}, identity=speaker, static_factors=["speaker"]
    )
    assert repr(data) == "Sequences(270 sequences of 7 to 26 steps, 12, 9 identities)"
    assert data.observed is None
    np.testing.assert_array_equal(data.values[data.mask].numpy(), rows)
    batch = data.draw_groups(9, 5, torch.Generator().manual_seed(0))
    assert batch.labels["speaker"].tolist() == batch.identity.tolist()


@needs("air_quality")
def test_air_quality():
    path = DATA / "air_quality" / "air_quality.npz"
    data = load_sequences(path)
    with np.load(path) as arrays:
        values, stations = arrays["values"], arrays["station"]
    seen = ~np.isnan(values)
    np.testing.assert_array_equal(data.observed.numpy(), seen)
    np.testing.assert_array_equal(data.values.numpy(), np.where(seen, values, 0))
    assert data.labels["station"].tolist() == stations.tolist()
    assert data.factor_names["year"] == ("2013", "2014", "2015", "2016", "2017")
    assert not data.draw_windows(50, torch.Generator().manual_seed(0), num_steps=48).values.isnan().any()
