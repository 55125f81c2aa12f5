"""Your own files: what is read, and what the errors say."""

import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqdisent.datasets import load_clips, load_frames

image = pytest.importorskip("PIL.Image")


def save(path, value, *, size=(8, 8), mode="L"):
    """A picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new(mode, size, value).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two identities: anna with clips of 12 frames and 1, ben with one of 3; frame t has the value 10 t."""
    for clip, count in (("anna/smile", 12), ("anna/walk", 1), ("ben/smile", 3)):
        for t in range(count):
            save(tmp_path / "faces" / clip / f"frame{t}.png", 10 * t)
    return tmp_path / "faces"


def values(frames):
    """Of frames of one colour, that colour."""
    assert torch.equal(frames, frames[..., :1, :1].expand_as(frames))
    return frames[..., 0, 0]


def test_a_folder_becomes_ragged_clips_in_natural_order(folder):
    clips = load_clips(folder, image_size=8)
    assert clips.names == ["anna/smile", "anna/walk", "ben/smile"]
    assert clips.identity.tolist() == [0, 0, 1]
    assert clips.lengths.tolist() == [12, 1, 3]
    assert clips.frames.shape == (3, 12, 1, 8, 8)
    assert values(clips.frames)[0, :, 0].tolist() == [10 * t for t in range(12)]
    assert values(clips.frames)[2, :, 0].tolist() == [0, 10, 20] + [0] * 9
    assert clips.labels == {}


def test_identities_and_clips_are_in_natural_order_too(tmp_path):
    for name in ("p10/c1", "p9/c11", "p9/c2"):
        save(tmp_path / name / "0.png", 1)
    assert load_clips(tmp_path, image_size=8).names == ["p9/c2", "p9/c11", "p10/c1"]


def test_hidden_files_are_passed_over(folder):
    for place in (folder, folder / "anna", folder / "anna" / "smile"):
        (place / ".DS_Store").write_bytes(b"no picture")
    assert len(load_clips(folder, image_size=8)) == 3


def test_one_colour_frame_makes_all_clips_colour(folder):
    save(folder / "ben" / "smile" / "frame1.png", (200, 100, 50), mode="RGB")
    clips = load_clips(folder, image_size=8)
    assert clips.frames.shape[2] == 3
    assert values(clips.frames)[2, 1].tolist() == [200, 100, 50]
    assert values(clips.frames)[0, 3].tolist() == [30, 30, 30]


def test_transparency_is_black_and_palettes_are_colour(folder):
    save(folder / "anna" / "walk" / "frame0.png", (200, 100, 50, 0), mode="RGBA")
    palette = image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 90, 190])
    palette.save(folder / "ben" / "smile" / "frame0.png")
    palette.save(folder / "ben" / "smile" / "frame1.png", transparency=1)
    clips = load_clips(folder, image_size=8)
    assert values(clips.frames)[1, 0].tolist() == [0, 0, 0]
    assert values(clips.frames)[2, :2].tolist() == [[9, 90, 190], [0, 0, 0]]


def test_pictures_of_other_sizes_and_kinds_are_resized(folder):
    save(folder / "ben" / "smile" / "frame0.png", 77, size=(30, 20))
    (folder / "ben" / "smile" / "frame1.png").unlink()
    save(folder / "ben" / "smile" / "frame1.bmp", 78, size=(5, 5))
    clips = load_clips(folder, image_size=16)
    assert clips.frames.shape == (3, 12, 1, 16, 16)
    assert values(clips.frames)[2, :2, 0].tolist() == [77, 78]


def test_rows_and_columns_are_not_confused(tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for who in "ab":
        (tmp_path / who / "c").mkdir(parents=True)
        image.fromarray(pixels).save(tmp_path / who / "c" / "0.png")
    assert np.array_equal(load_clips(tmp_path, image_size=8).frames[1, 0, 0].numpy(), pixels)
    coloured = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    image.fromarray(coloured).save(tmp_path / "0.png")
    assert np.array_equal(load_frames(tmp_path / "0.png", image_size=8)[0].permute(1, 2, 0).numpy(), coloured)


def test_folder_errors_name_the_file_and_what_to_do(folder):
    broken = folder / "ben" / "smile" / "notes.txt"
    broken.write_text("not a picture")
    with pytest.raises(ValueError, match=r"ben/smile/notes\.txt: "):
        load_clips(folder)
    broken.unlink()

    whole = (folder / "anna" / "smile" / "frame3.png").read_bytes()
    (folder / "anna" / "smile" / "frame3.png").write_bytes(whole[:48])
    with pytest.raises(ValueError, match=r"frame3\.png: .*damaged"):
        load_clips(folder)
    (folder / "anna" / "smile" / "frame3.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"frame3\.png: "):
        load_clips(folder)
    (folder / "anna" / "smile" / "frame3.png").write_bytes(whole)

    deep = folder / "ben" / "smile" / "deep.png"
    image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(deep)
    with pytest.raises(ValueError, match=r"deep\.png: "):
        load_clips(folder)
    deep.unlink()

    (folder / "ben" / "empty").mkdir()
    with pytest.raises(ValueError, match="ben/empty: "):
        load_clips(folder)
    (folder / "ben" / "empty").rmdir()

    (folder / "carl").mkdir()
    with pytest.raises(ValueError, match="carl: "):
        load_clips(folder)
    (folder / "carl").rmdir()

    (folder / "ben" / "smile" / "more").mkdir()
    with pytest.raises(ValueError, match="smile/more: "):
        load_clips(folder)
    (folder / "ben" / "smile" / "more").rmdir()

    save(folder / "ben" / "frame0.png", 1)
    with pytest.raises(ValueError, match=r"ben/frame0\.png: "):
        load_clips(folder)
    (folder / "ben" / "frame0.png").unlink()

    save(folder / "frame0.png", 1)
    with pytest.raises(ValueError, match=r"frame0\.png: "):
        load_clips(folder)
    (folder / "frame0.png").unlink()
    load_clips(folder)


def test_no_clip_one_identity_and_nothing_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing: "):
        load_clips(tmp_path / "missing")
    (tmp_path / "faces").mkdir()
    with pytest.raises(ValueError, match="faces: .*no clip"):
        load_clips(tmp_path / "faces")
    save(tmp_path / "faces" / "anna" / "smile" / "0.png", 1)
    with pytest.raises(ValueError, match="faces: .*one identity"):
        load_clips(tmp_path / "faces")
    with pytest.raises(ValueError, match="^image_size: "):
        load_clips(tmp_path / "faces", image_size=0)


def test_without_pillow_the_error_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match="Pillow"):
        load_clips(folder)


# --- archives


@given(
    st.integers(1, 4),
    st.integers(2, 5),
    st.integers(1, 4),
    st.sampled_from([None, 1, 3]),
    st.integers(0, 99),
    st.booleans(),
)
def test_an_archive_comes_back_as_it_went_in(tmp_path_factory, size, count, num_steps, channels, seed, ragged):
    rng = np.random.default_rng(seed)
    shape = (count, num_steps, size, size) + (() if channels is None else (channels,))
    frames = rng.integers(0, 256, shape, dtype=np.uint8)
    lengths = rng.integers(1, num_steps + 1, count)
    path = tmp_path_factory.mktemp("archive") / "clips.npz"
    np.savez(path, frames=frames, **({"lengths": lengths} if ragged else {}))
    clips = load_clips(path, image_size=size)
    last = frames[..., None] if channels is None else frames
    assert np.array_equal(clips.frames.permute(0, 1, 3, 4, 2).numpy(), last)
    assert clips.lengths.tolist() == (lengths.tolist() if ragged else [num_steps] * count)
    assert clips.identity.tolist() == list(range(count))
    assert clips.static_factors == clips.motion_factors == ()


@pytest.fixture
def archive(tmp_path):
    def write(**arrays):
        path = tmp_path / "clips.npz"
        np.savez(path, **{"frames": np.zeros((4, 3, 8, 8), dtype=np.uint8), **arrays})
        return path

    return write


def test_labels_of_an_archive_are_renumbered_and_sorted_into_static_and_motion(archive):
    path = archive(
        identity=np.array([8, 8, 5, 5], dtype=np.int16),
        age=np.array([40, 40, 30, 30]),
        action=np.array([-1, 7, -1, 7], dtype=np.int8),
    )
    clips = load_clips(path, image_size=8)
    assert clips.identity.tolist() == [8, 8, 5, 5]
    assert clips.labels["age"].tolist() == [1, 1, 0, 0]
    assert clips.labels["action"].tolist() == [0, 1, 0, 1]
    assert clips.factor_names == {"age": ("30", "40"), "action": ("-1", "7")}
    assert clips.static_factors == ("age",)
    assert clips.motion_factors == ("action",)
    alone = load_clips(archive(age=np.array([40, 40, 30, 30])), image_size=8)
    assert alone.static_factors == alone.motion_factors == ()


def test_frames_of_an_archive_are_resized(archive):
    frames = np.full((2, 3, 10, 6, 3), 50, dtype=np.uint8)
    frames[1] = 120
    clips = load_clips(archive(frames=frames), image_size=16)
    assert clips.frames.shape == (2, 3, 3, 16, 16)
    assert values(clips.frames)[:, 0, 0].tolist() == [50, 120]


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"frames": np.zeros((2, 3, 8, 8))}, TypeError, "'frames' .*float64"),
        (
            {"frames": np.zeros((2, 8, 8), dtype=np.uint8)},
            ValueError,
            r"'frames' .*\(2, 8, 8\)",
        ),
        ({"frames": np.zeros((2, 3, 8, 8, 4), dtype=np.uint8)}, ValueError, r"'frames' .*\(2, 3, 8, 8, 4\)"),
        ({"frames": np.zeros((2, 0, 8, 8), dtype=np.uint8)}, ValueError, r"'frames' .*\(2, 0, 8, 8\)"),
        ({"lengths": np.array([1, 2, 3, 4])}, ValueError, "'lengths' .*4 for clip 3"),
        ({"lengths": np.array([1, 0, 3, 3])}, ValueError, "'lengths' .*0 for clip 1"),
        ({"lengths": np.array([1, 2, 3])}, ValueError, r"'lengths' .*\(3,\)"),
        ({"identity": np.array([0, 1])}, ValueError, r"'identity' .*\(2,\)"),
        ({"identity": np.zeros(4, dtype=int)}, ValueError, "one identity"),
        ({"weight": np.zeros(4)}, TypeError, "'weight' .*float64"),
        ({"names": np.array(["a", "b", "c", "d"])}, TypeError, "'names' .*<U1"),
        ({"frames": np.array([None, None])}, ValueError, "objects"),
        ({"extra": np.array([None] * 4)}, ValueError, "objects"),
    ],
)
def test_archive_errors_name_file_and_array(archive, arrays, error, message):
    with pytest.raises(error, match=r"clips\.npz: .*" + message):
        load_clips(archive(**arrays), image_size=8)


def test_what_is_no_archive(tmp_path):
    path = tmp_path / "clips.npz"
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"clips\.npz: "):
        load_clips(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("frames.npy", b"hello")
    with pytest.raises(ValueError, match=r"clips\.npz: .*'frames'"):
        load_clips(path)
    np.savez(path, pictures=np.zeros(3))
    with pytest.raises(ValueError, match=r"clips\.npz: .*'pictures'"):
        load_clips(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"clips\.npz: "):
        load_clips(path)


# --- the frames of one clip


def test_frames_from_a_folder_a_picture_and_arrays(folder, tmp_path):
    frames = load_frames(folder / "anna" / "smile", image_size=8)
    assert frames.shape == (12, 1, 8, 8)
    assert values(frames)[:, 0].tolist() == [10 * t for t in range(12)]
    assert load_frames(folder / "anna" / "smile" / "frame2.png", image_size=8).unique().tolist() == [20]
    array = np.arange(5 * 8 * 8 * 3, dtype=np.uint16).astype(np.uint8).reshape(5, 8, 8, 3)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", frames=array[..., 0])
    assert np.array_equal(load_frames(tmp_path / "a.npy", image_size=8).permute(0, 2, 3, 1).numpy(), array)
    assert np.array_equal(load_frames(tmp_path / "a.npz", image_size=8)[:, 0].numpy(), array[..., 0])
    assert load_frames(tmp_path / "a.npz", image_size=16).shape == (5, 1, 16, 16)


def test_frames_from_a_gif(tmp_path):
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    pictures = [image.new("RGB", (8, 8), colour) for colour in colours]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=50)
    frames = load_frames(tmp_path / "a.gif", image_size=8)
    assert frames.shape == (3, 3, 8, 8)
    assert [tuple(colour) for colour in values(frames).tolist()] == colours


def test_channels_on_request(folder, tmp_path):
    assert load_frames(folder / "anna" / "smile", image_size=8, channels=3).shape == (12, 3, 8, 8)
    save(tmp_path / "a.png", (100, 200, 50), mode="RGB")
    assert load_frames(tmp_path / "a.png", image_size=8, channels=1).unique().tolist() == [153]
    assert values(load_frames(tmp_path / "a.png", image_size=8)).tolist() == [[100, 200, 50]]
    with pytest.raises(ValueError, match="^channels: "):
        load_frames(tmp_path / "a.png", channels=2)


def test_frame_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing: "):
        load_frames(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: "):
        load_frames(tmp_path / "empty")
    np.save(tmp_path / "a.npy", np.zeros((3, 8, 8)))
    with pytest.raises(TypeError, match=r"a\.npy: .*float64"):
        load_frames(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"a\.npy: .*\(2, 3, 8, 8, 3\)"):
        load_frames(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.array([None]))
    with pytest.raises(ValueError, match=r"a\.npy: .*objects"):
        load_frames(tmp_path / "a.npy")
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"a\.gif: "):
        load_frames(tmp_path / "a.gif")
