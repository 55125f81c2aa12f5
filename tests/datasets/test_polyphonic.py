"""JSB chorales: the rolls say what the file says, and a file that is not the one is refused."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from seqdisent.datasets import jsb_chorales, polyphonic

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
