"""Polyphonic music: the rolls say what the file says, and a file that is not the one is refused."""

import hashlib
import http.server
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback import serving

from seqdisent.datasets import jsb_chorales, polyphonic, polyphonic_music

DATA = Path(os.environ.get("SEQDISENT_DATA") or Path(__file__).parents[3] / "shared" / "data")
REAL = DATA / "jsb" / polyphonic.FILE
needs_file = pytest.mark.skipif(not REAL.is_file(), reason=f"no {REAL}; SEQDISENT_DATA says where it is")

PIECES = {
    "train": [[[60, 64, 67], [], [21, 108]], [[62]]],
    "valid": [[[50], [51]]],
    "test": [[[]], [[30], [31], [32]], [[40, 41]]],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, no data folder."""
    monkeypatch.setenv("SEQDISENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SEQDISENT_DATA", raising=False)
    return tmp_path / "cache" / "jsb"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a file made up here, which the package believes in."""
    content = json.dumps(PIECES).encode()
    monkeypatch.setattr(polyphonic, "DIGEST", hashlib.sha256(content).hexdigest())
    (tmp_path / "chorales").mkdir()
    (tmp_path / "chorales" / polyphonic.FILE).write_bytes(content)
    return tmp_path / "chorales"


def notes(clips):
    """The pieces as the file has them, read off the batches."""
    batch = clips.batch(range(len(clips)))
    assert torch.equal(batch.frames, batch.frames.bool().float())
    return [
        [(keys.nonzero().squeeze(1) + 21).tolist() for keys in piece[real]]
        for piece, real in zip(batch.frames, batch.mask, strict=True)
    ]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_the_rolls_are_the_files_notes(folder, split):
    clips = jsb_chorales(folder, split)
    assert notes(clips) == PIECES[split]
    assert clips.frames.shape[2:] == (88,)
    assert clips.scale == 1
    assert clips.identity.tolist() == list(range(len(PIECES[split])))
    assert clips.names[-1] == f"{split} {len(PIECES[split]) - 1}"


@needs_file
def test_the_real_file(monkeypatch):
    monkeypatch.setenv("SEQDISENT_DATA", str(REAL.parents[1]))
    truth = json.loads(REAL.read_bytes())
    for split, pieces in (("train", 229), ("valid", 76), ("test", 77)):
        clips = jsb_chorales(split=split)
        assert len(clips) == clips.num_identities == pieces
        assert notes(clips) == [[sorted(chord) for chord in piece] for piece in truth[split]]
    batch = clips.draw_clips(5, torch.Generator().manual_seed(0), num_steps=20)
    assert batch.frames.shape == (5, 20, 88)


def test_a_download_fills_the_cache(folder, cache):
    with pytest.raises(FileNotFoundError, match=r"jsb-chorales-quarter.json: in none of: .*download=True"):
        jsb_chorales()
    url = folder.as_uri()
    assert notes(jsb_chorales(split="valid", download=True, base_url=url)) == PIECES["valid"]
    (folder / polyphonic.FILE).unlink()
    assert notes(jsb_chorales(split="test")) == PIECES["test"]
    assert [path.name for path in cache.iterdir()] == [polyphonic.FILE]


def test_another_file_is_refused(folder, cache):
    (folder / polyphonic.FILE).write_bytes(b"{}")
    with pytest.raises(ValueError, match=f"{folder / polyphonic.FILE}: .*{polyphonic.DIGEST}"):
        jsb_chorales(folder)
    with pytest.raises(ValueError, match=r"jsb-chorales-quarter\.json: "):
        jsb_chorales(download=True, base_url=folder.as_uri())
    assert not cache.exists()


def test_another_split_is_refused(folder):
    with pytest.raises(ValueError, match="^split: "):
        jsb_chorales(folder, "all")


# Nottingham, MuseData, Piano-midi


SETS = {"nottingham": "Nottingham", "musedata": "MuseData", "piano-midi": "Piano_midi"}
PACKED = DATA / "polyphonic" / polyphonic.PACKED
needs_sets = pytest.mark.skipif(not PACKED.is_file(), reason=f"no {PACKED}; SEQDISENT_DATA says where it is")


def rolls_of(pieces):
    """(T, 88) rolls of pieces as lists of chords, written key by key."""
    rolls = [np.zeros((len(piece), 88)) for piece in pieces]
    for roll, piece in zip(rolls, pieces, strict=True):
        for step, chord in enumerate(piece):
            for note in chord:
                roll[step, note - 21] = 1
    return rolls


def matlab(rolls):
    """What a MATLAB file of {split: rolls} holds."""
    cells = {}
    for split, pieces in rolls.items():
        cells[f"{split}data"] = np.empty((1, len(pieces)), object)
        for i, piece in enumerate(pieces):
            cells[f"{split}data"][0, i] = piece
    content = io.BytesIO()
    pytest.importorskip("scipy.io").savemat(content, cells, do_compression=True)
    return content.getvalue()


def packed(stem, rolls):
    arrays = {}
    for split, pieces in rolls.items():
        arrays[f"{stem}_{split}"] = np.packbits(np.concatenate(pieces).astype(np.uint8), axis=1)
        arrays[f"{stem}_{split}_length"] = np.array([len(piece) for piece in pieces])
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


@pytest.fixture
def made_up(monkeypatch):
    """{split: rolls} of PIECES, which the package believes to be MuseData."""
    rolls = {split: rolls_of(pieces) for split, pieces in PIECES.items()}
    content = b"".join(
        np.array([len(piece) for piece in pieces], "<i4").tobytes()
        + np.packbits(np.concatenate(pieces).astype(bool), axis=1).tobytes()
        for pieces in rolls.values()
    )
    known = polyphonic._SETS["musedata"]._replace(digest=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(polyphonic._SETS, "musedata", known)
    return rolls


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("file", ["MuseData.mat", "polyphonic.npz"])
def test_both_files_hold_the_same_pieces(made_up, tmp_path, file, split):
    content = matlab(made_up) if file.endswith("mat") else packed("MuseData", made_up)
    (tmp_path / file).write_bytes(content)
    clips = polyphonic_music("musedata", tmp_path, split)
    assert notes(clips) == PIECES[split]
    assert (clips.scale, clips.frames.dtype, clips.names[0]) == (1, torch.uint8, f"{split} 0")


@pytest.mark.parametrize("name", SETS)
@needs_sets
def test_the_real_sets(monkeypatch, tmp_path, name):
    monkeypatch.setenv("SEQDISENT_DATA", str(PACKED.parents[1]))
    known = {"nottingham": (694, 173, 170), "musedata": (524, 135, 124), "piano-midi": (87, 12, 25)}
    rolls = {}
    with np.load(PACKED) as arrays:
        for split, pieces in zip(("train", "valid", "test"), known[name], strict=True):
            clips = polyphonic_music(name, split=split)
            assert len(clips) == pieces
            lengths = arrays[f"{SETS[name]}_{split}_length"]
            assert clips.lengths.tolist() == lengths.tolist()
            rows = np.unpackbits(arrays[f"{SETS[name]}_{split}"], axis=1)
            rolls[split] = np.split(rows, np.cumsum(lengths)[:-1])
            for i in (0, len(clips) // 2, len(clips) - 1):
                assert (clips.frames[i, : lengths[i]].numpy() == rolls[split][i]).all()
                assert not clips.frames[i, lengths[i] :].any()
    (tmp_path / f"{SETS[name]}.mat").write_bytes(matlab(rolls))  # the same checksum
    assert torch.equal(polyphonic_music(name, tmp_path, "test").frames, clips.frames)


def test_a_set_is_downloaded_into_the_cache(made_up, cache, tmp_path):
    content = matlab(made_up)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/mdata/MuseData.mat"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(content) if found else 0))
            self.end_headers()
            self.wfile.write(content if found else b"")

        def log_message(self, *_):
            pass

    with pytest.raises(FileNotFoundError, match=r"MuseData.mat or polyphonic.npz: in none of: .*download=True"):
        polyphonic_music("musedata")
    with serving(Handler) as server:
        with pytest.raises(ConnectionError, match=r"could not download .*Nottingham\.mat: .*404"):
            polyphonic_music("nottingham", download=True, base_url=f"{server.url}/mdata")
        clips = polyphonic_music("musedata", split="valid", download=True, base_url=f"{server.url}/mdata/")
    assert notes(clips) == PIECES["valid"]
    assert [path.name for path in (cache.parent / "polyphonic").iterdir()] == ["MuseData.mat"]
    assert notes(polyphonic_music("musedata", split="test")) == PIECES["test"]  # the server is gone


@pytest.mark.parametrize("file", ["MuseData.mat", "polyphonic.npz"])
@pytest.mark.parametrize("damage", ["another piece", "cut off"])
def test_a_set_with_other_content_is_refused(made_up, cache, tmp_path, file, damage):
    rolls = dict(made_up)
    if damage == "another piece":
        rolls["test"] = rolls["valid"]
    content = matlab(rolls) if file.endswith("mat") else packed("MuseData", rolls)
    (tmp_path / file).write_bytes(content[: 60 if damage == "cut off" else None])
    said = "cannot be read" if damage == "cut off" else "MuseData's pieces: SHA-256 is .*expected"
    with pytest.raises(ValueError, match=f"{tmp_path / file}: {said}.*delete it"):
        polyphonic_music("musedata", tmp_path)
    if file == "MuseData.mat":
        with pytest.raises(ValueError, match=r"MuseData.mat"):
            polyphonic_music("musedata", download=True, base_url=tmp_path.as_uri())
        assert not (cache.parent / "polyphonic").exists()


def test_a_matlab_file_without_scipy_says_what_to_install(made_up, tmp_path, monkeypatch):
    (tmp_path / "MuseData.mat").write_bytes(matlab(made_up))
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"MuseData.mat: .*pip install scipy"):
        polyphonic_music("musedata", tmp_path)


def test_another_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^name: "):
        polyphonic_music("jsb", tmp_path)
    with pytest.raises(ValueError, match="^split: "):
        polyphonic_music("musedata", tmp_path, "all")
