"""Bouncing digits: the real idx files where they are, and files made up here."""

import gzip
import hashlib
import http.server
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loopback import serving

from seqdisent.datasets import MovingMNISTRenderer, _mnist, moving_mnist

REAL = Path(os.environ.get("SEQDISENT_DATA", "nowhere")) / "mnist"
needs_files = pytest.mark.skipif(not REAL.is_dir(), reason="SEQDISENT_DATA has no mnist/")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four idx files of made-up digits, which the package believes in."""
    rng = np.random.default_rng(0)
    made = tmp_path / "mnist"
    made.mkdir()
    for split, (prefix, _) in _mnist.SPLITS.items():
        count = {"train": 30, "test": 20}[split]
        monkeypatch.setitem(_mnist.SPLITS, split, (prefix, count))
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        contents = {
            "images-idx3": bytes([0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, 28, 0, 0, 0, 28]) + pixels.tobytes(),
            "labels-idx1": bytes([0, 0, 8, 1, 0, 0, 0, count]) + (np.arange(count, dtype=np.uint8) % 10).tobytes(),
        }
        for kind, content in contents.items():
            name = f"{prefix}-{kind}-ubyte"
            (made / f"{name}.gz").write_bytes(gzip.compress(content))
            monkeypatch.setitem(_mnist.FILES, name, hashlib.sha256(content).hexdigest())
    monkeypatch.delenv("SEQDISENT_DATA", raising=False)
    monkeypatch.setenv("SEQDISENT_CACHE", str(tmp_path / "cache"))
    return made


def walked(start, velocity, num_steps):
    """One coordinate, a step at a time, turned back at either wall."""
    places, x, v = [], start, velocity
    for _ in range(num_steps):
        places.append(x)
        x += v
        if x > 1:
            x, v = 2 - x, -v
        elif x < 0:
            x, v = -x, -v
    return places


@given(start=st.floats(0, 1), velocity=st.floats(-0.3, 0.3))
def test_digits_bounce_as_if_walked_step_by_step(start, velocity):
    renderer = MovingMNISTRenderer(
        torch.zeros(1, 1, 28, 28, dtype=torch.uint8),
        torch.tensor([[[start, 0.5]]], dtype=torch.float64),
        torch.tensor([[[velocity, 0.0]]], dtype=torch.float64),
        num_steps=40,
        image_size=64,
    )
    found = renderer.corner(torch.tensor([0]))[0, :, 0, 0]
    wanted = 36 * torch.tensor(walked(start, velocity, 40), dtype=torch.float64)
    assert ((found - wanted).abs() <= 0.5 + 1e-6).all()  # the nearest pixel


def test_frames_hold_the_digits_where_the_renderer_says(folder):
    clips = moving_mnist(5, seed=3, num_digits=2, num_steps=4, root=folder)
    corner = clips.renderer.corner(torch.arange(5))
    for n in range(5):
        for t in range(4):
            wanted = np.zeros((64, 64), dtype=np.uint8)
            for k in range(2):
                x, y = corner[n, t, k].tolist()
                there = wanted[y : y + 28, x : x + 28]
                np.maximum(there, clips.renderer.digits[n, k].numpy(), out=there)
            assert np.array_equal(clips.frames[n, t, 0].numpy(), wanted)


def test_a_swap_shows_one_clips_digit_on_another_clips_way(folder):
    clips = moving_mnist(6, seed=0, num_steps=5, root=folder)
    swapped = clips.true_swap(2, 4)
    x, y = clips.renderer.corner(torch.tensor([4]))[0, :, 0].unbind(-1)
    for t in range(5):
        shown = swapped[t, 0, y[t] : y[t] + 28, x[t] : x[t] + 28]
        assert torch.equal(shown, clips.renderer.digits[2, 0])
    assert torch.equal(clips.true_clip(4, 9)[:5], clips.frames[4])


def test_identity_is_the_instance_and_the_label_its_class(folder):
    clips = moving_mnist(30, root=folder, num_steps=1)
    assert clips.identity.sort().values.tolist() == list(range(30))  # every instance once
    assert torch.equal(clips.labels["digit"], clips.identity % 10)
    more = moving_mnist(45, root=folder, num_steps=1)
    assert more.identity.bincount().tolist().count(2) == 15


def test_the_seed_and_the_split_decide_the_clips(folder):
    first, again = (moving_mnist(8, seed=1, root=folder) for _ in range(2))
    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.frames, moving_mnist(8, seed=2, root=folder).frames)
    assert len(moving_mnist(20, split="test", root=folder).identity.unique()) == 20


def test_without_the_files_the_error_says_what_to_do(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz.*SEQDISENT_DATA.*download=True"):
        moving_mnist(2, root=tmp_path / "elsewhere")


@pytest.mark.parametrize("spoil", [lambda content: content[:-9], lambda content: gzip.compress(b"else")])
def test_a_wrong_file_is_refused(folder, spoil):
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz: "):
        moving_mnist(2, split="test", root=folder)
    moving_mnist(2, split="train", root=folder)  # the other split does not need it


def test_files_are_fetched_once_and_checked(folder, tmp_path):
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            asked.append(self.path)

    with serving(Handler) as server:
        options = {"download": True, "base_url": server.url}
        fetched = moving_mnist(4, **options)
        again = moving_mnist(4, **options)
        labels = folder / "t10k-labels-idx1-ubyte.gz"
        labels.write_bytes(b"something else")
        with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz: "):
            moving_mnist(4, split="test", **options)
    assert sorted(set(asked))[-2:] == ["/train-images-idx3-ubyte.gz", "/train-labels-idx1-ubyte.gz"]
    assert asked.count("/train-images-idx3-ubyte.gz") == 1
    assert not (tmp_path / "cache" / "mnist" / "t10k-labels-idx1-ubyte.gz").exists()
    assert torch.equal(fetched.frames, moving_mnist(4, root=folder).frames)
    assert torch.equal(fetched.frames, again.frames)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clips": 0}, "^num_clips: "),
        ({"num_digits": 0}, "^num_digits: "),
        ({"image_size": 28}, "^image_size: "),
        ({"split": "valid"}, "^split: "),
    ],
)
def test_bad_arguments_are_named(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        moving_mnist(**{"num_clips": 2, "root": folder, **arguments})


@needs_files
def test_the_fixed_test_set_is_the_same_to_the_bit():
    clips = moving_mnist(500, split="test", root=REAL)
    assert clips.identity.unique().numel() == 500
    digest = "3bfbff47b0b635b5b547581e3b623e647798748169b2ee10a3cdc501a681267f"
    assert hashlib.sha256(clips.frames.numpy().tobytes()).hexdigest() == digest
