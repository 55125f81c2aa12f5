"""Data that users get wrong, and what they are told."""

from __future__ import annotations

import sys
import zipfile

import numpy as np
import pytest
import torch
from failures import check, rows

from seqdisent.datasets import (
    Clips,
    load_clips,
    load_frames,
    moving_mnist,
    mug,
    pendulum,
    render_pendulum,
    sprites,
)
from seqdisent.datasets._progress import progress
from seqdisent.datasets.sprites import SpriteRenderer

image = pytest.importorskip("PIL.Image")


def bytes_of(*shape):
    return torch.zeros(*shape, dtype=torch.uint8)


def some_clips(**options):
    return Clips(bytes_of(3, 2, 1, 4, 4), **options)


def picture_folder(folder, *files, content=b"no picture"):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    return folder


def npz(folder, **arrays):
    np.savez(folder / "clips.npz", **arrays)
    return folder / "clips.npz"


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-50])
    return path


def picture(folder, dtype=np.uint8, name="anna/smile/0.png", keep=None):
    """A folder with one picture, of which the first `keep` bytes are left."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(np.arange(64, dtype=dtype).reshape(8, 8)).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    return folder


def made(folder, *parts):
    """A folder with what is named inside: a folder, or a file where the name has a suffix."""
    for part in parts:
        path = folder / part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"") if path.suffix else path.mkdir()
    return folder


def archive(folder, **arrays):
    return npz(folder, frames=arrays.pop("frames", np.zeros((4, 3, 8, 8), np.uint8)), **arrays)


def npy(folder, array):
    np.save(folder / "a.npy", array)
    return folder / "a.npy"


def not_an_array(folder):
    with zipfile.ZipFile(folder / "clips.npz", "w") as file:
        file.writestr("frames.npy", b"hello")
    return folder / "clips.npz"


def sequence(*shape):
    return np.zeros(shape or (2, 8, 8, 3), np.uint8)


def licensed(folder, *sequences, labels=((0, 0),), **named):
    """Files of MUG's layout; labels=None leaves theirs out."""
    if sequences or named:
        np.savez(folder / "sequences.npz", *sequences, **named)
    if labels is not None:
        np.savez(folder / "labels.npz", **(labels if isinstance(labels, dict) else {"arr_0": np.asarray(labels)}))
    return mug(folder / "sequences.npz", image_size=8)


def packed_wrongly(folder):
    for part in ("images-idx3", "labels-idx1"):
        (folder / f"train-{part}-ubyte.gz").write_bytes(b"no gzip")
    return folder


def wrong_sheets(folder):
    from seqdisent.datasets._sheets import SHEETS

    return picture_folder(folder, *SHEETS)


@rows(
    ("float frames in a data set of bytes", lambda _: Clips(torch.rand(3, 2, 1, 4, 4)), TypeError,
     r"frames: got torch.float32 of shape .*, expected a tensor of uint8 \(pixels 0 to 255\)"),
    ("a clip longer than its frames", lambda _: some_clips(lengths=torch.tensor([1, 2, 3])), ValueError,
     "lengths: got values from 1 to 3, expected 1 to 2"),
    ("a clip of no frame", lambda _: some_clips(lengths=torch.tensor([0, 2, 2])), ValueError, "lengths: got values fr"),
    ("frames without time", lambda _: Clips(bytes_of(3, 2)), ValueError,
     r"frames: shape is \(3, 2\), expected \(N, T, \*E\), such as \(N, T, C, H, W\), nothing empty"),
    ("a byte above the scale", lambda _: Clips(2 + bytes_of(3, 2, 1), scale=1), ValueError,
     "frames: got values up to 2, expected at most scale=1"),
    ("names of some clips alone", lambda _: some_clips(names=["x"]), ValueError,
     "names: got 1, expected one for each of 3 clips"),
    ("labels beyond their names", lambda _: some_clips(labels={"a": torch.tensor([0, 1, 0])}, factor_names={"a": "x"}),
     ValueError, r"labels\['a'\]: got values from 0 to 1, expected 0 to 0"),
    ("a factor without labels", lambda _: some_clips(static_factors=["b"]), ValueError,
     r"static_factors: 'b' is not among the labels \[\]"),
    ("identities of some clips alone", lambda _: some_clips(identity=torch.tensor([0, 1])), ValueError,
     r"identity: shape is \(2,\), expected \(3,\), one value per clip"),
    ("a static factor that changes within an identity", lambda _: some_clips(
        identity=torch.tensor([0, 0, 1]), labels={"hair": torch.tensor([0, 1, 0])}, static_factors=["hair"]),
     ValueError, "static_factors: 'hair' differs between clips of one identity"),
    ("a clip that is not there", lambda _: some_clips().batch([3]), ValueError, "indices: got positions from 3 to 3"),
    ("a mask of too few clips", lambda _: some_clips().batch(torch.tensor([True])), ValueError,
     r"indices: got torch.bool of shape \(1,\), expected at least one clip's position, shape \(M,\)"),
    ("a batch of no clip", lambda _: some_clips().draw_clips(0, torch.Generator()), ValueError,
     "batch_size: got 0, expected at least 1"),
    ("a batch of 2.0 clips", lambda _: some_clips().draw_clips(2.0, torch.Generator()), TypeError,
     "batch_size: got 2.0 of type float, expected an int"),
    ("a split by clips", lambda _: some_clips().split(1, 0, by="clip"), ValueError,
     "by: got 'clip', expected one of 'identity', 'sequence'"),
    ("a split of more than all", lambda _: some_clips().split(1.5, 0, by="sequence"), ValueError,
     "held_out: got 1.5, expected a fraction between 0 and 1, or an int"),
    ("too few identities for a split", lambda _: some_clips(identity=torch.zeros(3).long()).split(
        0.5, 0, by="identity"), ValueError, "split by identity: there is 1, expected at least 2"),
    ("a split that leaves nothing to train on", lambda _: some_clips().split(3, 0, by="identity"), ValueError,
     "held_out: got 3 of 3 by identity, expected at most 2"),
    ("a true swap of data that knows none", lambda _: some_clips().true_swap(0, 1), ValueError, "have no renderer"),
    ("motions of another number than contents", lambda _: pendulum(4, seed=0, num_steps=2, image_size=8).true_swap(
        [0, 1], [1]), ValueError, "motion: got 1 clips, expected 2, one for each clip of content"),
    ("a true clip longer than the sheets", lambda _: SpriteRenderer(bytes_of(9, 8, 3, 4, 4))(
        torch.tensor([0]), torch.tensor([0]), 9), ValueError, "num_steps: got 9, expected at most 8: the sheets have"),
    ("an angle that is NaN", lambda _: render_pendulum(torch.tensor([torch.nan]), torch.ones(3)), ValueError,
     "angle: got a value that is not finite"),
    ("a colour in bytes", lambda _: render_pendulum(torch.zeros(2), 255 * torch.ones(3)), ValueError,
     r"colour: got a value outside \[0, 1\]"),
    ("colours with an alpha channel", lambda _: render_pendulum(torch.zeros(2), torch.ones(2, 4)), ValueError,
     r"colour: shape is \(2, 4\), expected \(2, 3\) or what broadcasts to it"),
    ("colours of another number than angles", lambda _: render_pendulum(torch.zeros(2), torch.ones(5, 3)), ValueError,
     r"colour: shape is \(5, 3\), expected \(2, 3\) or what broadcasts to it"),
    # files
    ("a folder that is not there", lambda folder: load_clips(folder / "no"), FileNotFoundError, "no: no such folder"),
    ("an empty folder", lambda folder: load_clips(folder), ValueError, "no clip in this folder; expected the layout"),
    ("a clip without frames", lambda folder: (folder / "anna" / "smile").mkdir(parents=True) or load_clips(folder),
     ValueError, "anna/smile: an empty clip; add frames or remove the folder"),
    ("pictures in the wrong layout", lambda folder: load_clips(picture_folder(folder, "frame0.png")), ValueError,
     "frame0.png: a file where an identity's folder belongs"),
    ("a file that is no picture", lambda folder: load_clips(picture_folder(folder, "anna/smile/notes.txt")), ValueError,
     "notes.txt: not a picture that Pillow can read; remove it or convert it to PNG"),
    ("a picture that was cut off", lambda folder: load_clips(picture(folder, keep=48), image_size=4), ValueError,
     "0.png: the picture is damaged .*; replace the file or remove it"),
    ("a picture of 16 bits", lambda folder: load_clips(picture(folder, np.uint16), image_size=4), ValueError,
     r"0.png: mode is I.* \(more than 8 bits a channel\), expected 8 bits; convert it first"),
    ("an identity without clips", lambda folder: load_clips(made(folder, "carl")), ValueError,
     "carl: this identity has no clip; add one or remove the folder; expected the layout identity/clip/frame.png"),
    ("a picture where a clip belongs", lambda folder: load_clips(made(folder, "ben/0.png")), ValueError,
     "ben/0.png: a file where a clip's folder belongs; expected the layout"),
    ("a folder where a picture belongs", lambda folder: load_clips(made(folder, "ben/smile/more")), ValueError,
     "smile/more: a folder where a frame belongs; expected the layout"),
    ("two colours", lambda folder: load_frames(folder, channels=2), ValueError, "channels: got 2, expected 1, 3 or"),
    ("frames that are not there", lambda folder: load_frames(folder / "no"), FileNotFoundError,
     "no: no such folder or file"),
    ("one identity alone", lambda folder: load_clips(npz(folder, frames=np.zeros((2, 3, 8, 8), np.uint8),
     identity=np.zeros(2, int)), image_size=8), ValueError, "all clips show one identity, expected at least 2"),
    ("an archive without frames", lambda folder: load_clips(npz(folder, video=np.zeros(3))), ValueError,
     r"clips.npz: holds \['video'\], expected an array 'frames'"),
    ("an archive of float frames", lambda folder: load_clips(npz(folder, frames=np.zeros((2, 3, 8, 8)))), TypeError,
     "array 'frames' is float64, expected uint8 .pixels 0 to 255"),
    ("an archive that was cut off", lambda folder: load_clips(cut_off(npz(folder, frames=np.zeros(
        (2, 3, 8, 8), np.uint8)))), ValueError, "clips.npz: not a NumPy file that can be read"),
    ("an archive of something else", lambda folder: load_clips(not_an_array(folder)), ValueError,
     "clips.npz: member 'frames' is not an array, expected arrays alone"),
    ("an archive of frames without time", lambda folder: load_clips(archive(folder, frames=bytes_of(4, 8, 8).numpy())),
     ValueError, r"clips.npz: array 'frames' has shape \(4, 8, 8\), expected \(N, T, H, W, C\) or \(N, T, H, W\) with "
     "1 or 3 channels, not empty"),
    ("an archive of too few lengths", lambda folder: load_clips(archive(folder, lengths=np.array([1, 2]))), ValueError,
     r"clips.npz: array 'lengths' has shape \(2,\), expected \(4,\), one value per clip"),
    ("an archive of a clip without frames", lambda folder: load_clips(archive(folder, lengths=np.array([1, 0, 3, 3]))),
     ValueError, "clips.npz: array 'lengths' says 0 for clip 1, expected 1 to 3"),
    ("an archive of names", lambda folder: load_clips(archive(folder, names=np.array(list("abcd")))), TypeError,
     "clips.npz: array 'names' is <U1, expected whole numbers"),
    ("frames of many clips for one", lambda folder: load_frames(npy(folder, sequence(2, 3, 8, 8, 3))), ValueError,
     r"a.npy: array 'frames' has shape \(2, 3, 8, 8, 3\), expected \(T, H, W, C\) or \(T, H, W\)"),
    ("an archive with objects, which could run code", lambda folder: load_frames(npz(folder, frames=np.array(
        [{}], object))), ValueError, "arrays of objects are refused"),
    ("sprite sheets of another version", lambda folder: sprites(wrong_sheets(folder)), ValueError,
     "SHA-256 is .*, expected .*; delete it and fetch it again"),
    ("sprite sheets that are not there", lambda folder: sprites(folder), FileNotFoundError,
     r"sprite sheets: in none of: .*sprites\(download=True\)"),
    ("a character that does not exist", lambda _: sprites(characters=[840]), ValueError, "characters: got .840."),
    ("sheets that cannot be fetched", lambda _: sprites(download=True, base_url="http://127.0.0.1:1"), ConnectionError,
     "could not download http://127.0.0.1:1/.*; nothing was kept, try again"),
    ("digits that are not packed", lambda folder: moving_mnist(2, root=packed_wrongly(folder)), ValueError,
     r"images-idx3-ubyte.gz: not a whole gzip file \(.*\); delete it and fetch it again"),
    ("a picture no larger than a digit", lambda folder: moving_mnist(2, root=folder, image_size=28), ValueError,
     "image_size: got 28, expected more than the 28 pixels of a digit"),
    # MUG
    ("no labels", lambda folder: licensed(folder, sequence(), labels=None), FileNotFoundError,
     r"labels.npz: no such file, expected the labels, 'arr_0' \(N, 2\) with identity and action"),
    ("labels under another name", lambda folder: licensed(folder, sequence(), labels={"who": np.zeros(1)}), ValueError,
     r"labels.npz: holds \['who'\], expected an array 'arr_0' \(N, 2\)"),
    ("labels that are no integers", lambda folder: licensed(folder, sequence(), labels=[[0.0, 0.0]]), TypeError,
     "labels.npz: array 'arr_0' is float64, expected whole numbers, identity and action"),
    ("labels without action", lambda folder: licensed(folder, sequence(), labels=[0]), ValueError,
     r"labels.npz: array 'arr_0' has shape \(1,\), expected \(N, 2\), identity and action"),
    ("an unknown action", lambda folder: licensed(folder, sequence(), labels=[[0, 9]]), ValueError,
     "labels.npz: actions are 9 to 9, expected 0 to 8"),
    ("actions that the field leaves out", lambda folder: licensed(folder, sequence(), labels=[[0, 5]]), ValueError,
     "sequences.npz: no sequence is left without actions 2, 5 and 6, expected others too"),
    ("no sequences", lambda folder: licensed(folder), FileNotFoundError,
     "sequences.npz: no such file, expected an .npz of sequences"),
    ("sequences under another name", lambda folder: licensed(folder, frames=sequence()), ValueError,
     "sequences.npz: holds 'frames', expected 'arr_0' to 'arr_0', one sequence for each row of labels"),
    ("more sequences than labels", lambda folder: licensed(folder, sequence(), sequence()), ValueError,
     "sequences.npz: holds sequence 1, expected 'arr_0' to 'arr_0'"),
    ("more labels than sequences", lambda folder: licensed(folder, sequence(), labels=[[0, 0], [1, 1]]), ValueError,
     "sequences.npz: holds 1 sequences, expected 'arr_0' to 'arr_1'"),
    ("sequences of floats", lambda folder: licensed(folder, sequence() / 255), TypeError,
     r"sequences.npz: sequence 0 is float64, expected uint8 \(pixels 0 to 255\)"),
    ("grey sequences", lambda folder: licensed(folder, sequence(2, 8, 8, 1)), ValueError,
     r"sequences.npz: sequence 0 has shape \(2, 8, 8, 1\), expected \(T, H, W, 3\), not empty"),
)  # fmt: skip
def test_data(row, tmp_path, monkeypatch):
    monkeypatch.setenv("SEQDISENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SEQDISENT_DATA", raising=False)
    check(row, tmp_path)


def test_a_member_of_an_archive_cannot_leave_its_folder(tmp_path):
    """Archives are read in memory and never unpacked, so a path that climbs out has nowhere to go."""
    folder = tmp_path / "data"
    folder.mkdir()
    path = npz(folder, frames=np.zeros((2, 3, 8, 8), np.uint8), label=np.arange(2))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("frames.npy", members["frames.npy"])
        archive.writestr("../escaped.npy", members["label.npy"])
    assert len(load_clips(path, image_size=8)) == 2
    assert [found.name for found in tmp_path.rglob("*")] == ["data", "clips.npz"]


@pytest.mark.parametrize(
    ("package", "load", "said"),
    [
        ("PIL", load_clips, "reading pictures needs Pillow: pip install seqdisent.data."),
        ("tqdm", lambda _: progress([], "sprites"), "tqdm: pip install seqdisent.data."),
    ],
)
def test_a_package_that_is_not_installed(package, load, said, tmp_path, monkeypatch):
    folder = picture(tmp_path)
    for name in (package, f"{package}.Image"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=said):
        load(folder)
