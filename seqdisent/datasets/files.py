"""Clips from your own files: folders of pictures, animations, NumPy archives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seqdisent.datasets._archives import read_arrays
from seqdisent.datasets._checks import check_count
from seqdisent.datasets._images import Pixels, read_frames, resize
from seqdisent.datasets._labels import number_labels
from seqdisent.datasets.clips import Clips

_FOLDER_LAYOUT = "expected the layout identity/clip/frame.png"


def load_clips(path: str | Path, *, image_size: int = 64) -> Clips:
    """Clips from a folder `identity/clip/frame.png` or from an .npz archive.

    In a folder, frames are any pictures that Pillow reads, in natural order (frame10 after frame2); hidden files are
    passed over. Transparent parts become black. Clips keep the names of their folders (`anna/smile`), identities are
    numbered in natural order.

    In an archive, `frames` is uint8 (N, T, H, W, C) or (N, T, H, W) for grey; `lengths` (N,) says how many frames of
    each clip are real (default: all); `identity` (N,) whom it shows (default: every clip is its own identity); each
    other array of whole numbers (N,) is a label whose values are renumbered from 0. Where some identity has several
    clips, a label that never differs within one identity counts as static and the others as motion; otherwise nothing
    tells them apart and they count as neither.

    Frames of another size or shape are resized to the square (their proportions are not kept). Grey stays grey, one
    channel, unless some frame is in colour. Shorter clips are padded.

    Args:
        path: The folder or the archive.
        image_size: Height and width of the clips in pixels.

    Returns:
        The clips; they have no renderer.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: A file is not a picture, is damaged or is of the wrong kind; a clip is empty; there is no clip or
            only one identity; an array has the wrong shape, or lengths are out of range. The message names the file or
            the array.
        TypeError: An array has the wrong dtype, such as frames that are not uint8.
        ImportError: Pillow is needed and missing.

    Example:
        >>> import tempfile
        >>> frames, lengths, identity = np.zeros((3, 5, 8, 8, 3), np.uint8), np.array([5, 4, 5]), np.array([0, 0, 1])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/clips.npz", frames=frames, lengths=lengths, identity=identity)
        ...     load_clips(f"{folder}/clips.npz", image_size=8)
        Clips(3 clips of 4 to 5 frames, 3x8x8, 2 identities)
    """
    check_count(image_size=image_size)
    path = Path(path)
    if path.is_dir():
        clips = _clips_of_folder(path, image_size)
    elif path.is_file():
        clips = _clips_of_archive(path, image_size)
    else:
        raise FileNotFoundError(f"{path}: no such folder or .npz file")
    if clips.num_identities < 2:
        raise ValueError(f"{path}: all clips show one identity, expected at least 2: there is nothing to tell apart")
    return clips


def load_frames(path: str | Path, *, image_size: int = 64, channels: int | None = None) -> Tensor:
    """The frames of one clip.

    Args:
        path: A folder of pictures (in natural order), a picture, an animation such as a GIF, or an .npy or .npz file
            (array `frames`) with uint8 (T, H, W, C), or (T, H, W) for grey.
        image_size: Height and width wanted; other sizes are resized.
        channels: 1 turns frames grey, 3 to colour; None leaves them as they are (colour where some frame is).

    Shape:
        - Output: (T, C, image_size, image_size)

    Returns:
        uint8 frames.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: As `load_clips`; or `channels` is neither 1 nor 3.
        TypeError: Frames that are not uint8.
        ImportError: Pillow is needed and missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/clip.npy", np.zeros((5, 16, 16), np.uint8))
        ...     load_frames(f"{folder}/clip.npy", image_size=16, channels=3).shape
        torch.Size([5, 3, 16, 16])
    """
    check_count(image_size=image_size)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels: got {channels}, expected 1, 3 or None")
    path = Path(path)
    if path.is_dir():
        frames = _frames_of_clip(path, image_size)
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: no such folder or file")
    elif path.suffix in (".npy", ".npz"):
        array = _load_arrays(path)["frames"]
        frames = [resize(frame, image_size) for frame in _channels_last(path, array, "(T, H, W, C) or (T, H, W)", 3)]
    else:
        frames = read_frames(path, image_size)
    wanted = channels or max(frame.shape[2] for frame in frames)
    return (
        torch.from_numpy(np.stack([_with_channels(frame, wanted) for frame in frames])).permute(0, 3, 1, 2).contiguous()
    )


def _clips_of_folder(path: Path, image_size: int) -> Clips:
    clips: list[list[Pixels]] = []
    identity: list[int] = []
    names: list[str] = []
    for number, person in enumerate(_visible(path)):
        if not person.is_dir():
            raise ValueError(f"{person}: a file where an identity's folder belongs; {_FOLDER_LAYOUT}")
        folders = _visible(person)
        if not folders:
            raise ValueError(f"{person}: this identity has no clip; add one or remove the folder; {_FOLDER_LAYOUT}")
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"{folder}: a file where a clip's folder belongs; {_FOLDER_LAYOUT}")
            clips.append(_frames_of_clip(folder, image_size))
            identity.append(number)
            names.append(f"{person.name}/{folder.name}")
    if not clips:
        raise ValueError(f"{path}: no clip in this folder; {_FOLDER_LAYOUT}")
    channels = max(frame.shape[2] for clip in clips for frame in clip)
    lengths = torch.tensor([len(clip) for clip in clips])
    frames = torch.zeros(len(clips), int(lengths.max()), channels, image_size, image_size, dtype=torch.uint8)
    for row, clip in enumerate(clips):
        pixels = np.stack([_with_channels(frame, channels) for frame in clip])
        frames[row, : len(clip)] = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return Clips(frames, lengths=lengths, identity=torch.tensor(identity), names=names)


def _frames_of_clip(folder: Path, image_size: int) -> list[Pixels]:
    files = _visible(folder)
    if not files:
        raise ValueError(f"{folder}: an empty clip; add frames or remove the folder")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: a folder where a frame belongs; {_FOLDER_LAYOUT}")
    return [read_frames(file, image_size, first_only=True)[0] for file in files]


def _clips_of_archive(path: Path, image_size: int) -> Clips:
    arrays = _load_arrays(path)
    layout = "(N, T, H, W, C) or (N, T, H, W)"
    array = _channels_last(path, arrays.pop("frames"), layout, 4)
    count, num_steps, height, width, channels = array.shape
    if (height, width) != (image_size, image_size):
        flat = [resize(frame, image_size) for frame in array.reshape(-1, height, width, channels)]
        array = np.stack(flat).reshape(count, num_steps, image_size, image_size, channels)
    for name, values in arrays.items():
        if values.shape != (count,):
            raise ValueError(
                f"{path}: array {name!r} has shape {values.shape}, expected ({count},), one value per clip"
            )
        if values.dtype.kind not in "iu":
            raise TypeError(f"{path}: array {name!r} is {values.dtype}, expected whole numbers")
    whole = {name: torch.from_numpy(values.astype(np.int64)) for name, values in arrays.items()}
    lengths, identity = whole.pop("lengths", None), whole.pop("identity", None)
    if lengths is not None and not (int(lengths.min()) >= 1 and int(lengths.max()) <= num_steps):
        worst = int(((lengths < 1) | (lengths > num_steps)).nonzero()[0])
        raise ValueError(
            f"{path}: array 'lengths' says {int(lengths[worst])} for clip {worst}, expected 1 to {num_steps}"
        )
    return Clips(
        torch.from_numpy(np.ascontiguousarray(array.transpose(0, 1, 4, 2, 3))),
        lengths=lengths,
        identity=identity,
        **number_labels(whole, identity).options(),
    )


def _load_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """All arrays of an .npz file; of an .npy file, its array as `frames`."""
    arrays = dict(read_arrays(path))
    if "frames" not in arrays:
        raise ValueError(f"{path}: holds {sorted(arrays)}, expected an array 'frames'")
    return arrays


def _channels_last(path: Path, frames: npt.NDArray[Any], layout: str, dim_if_grey: int) -> Pixels:
    if frames.dtype != np.uint8:
        raise TypeError(f"{path}: array 'frames' is {frames.dtype}, expected uint8 (pixels 0 to 255); {layout}")
    pixels = frames[..., None] if frames.ndim == dim_if_grey else frames
    if pixels.ndim != dim_if_grey + 1 or pixels.shape[-1] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(
            f"{path}: array 'frames' has shape {frames.shape}, expected {layout} with 1 or 3 channels, not empty"
        )
    return pixels


def _with_channels(frame: Pixels, channels: int) -> Pixels:
    if frame.shape[2] == channels:
        return frame
    if channels == 3:
        return frame.repeat(3, axis=2)
    grey: Pixels = (frame @ np.array([0.299, 0.587, 0.114]) + 0.5).astype(np.uint8)[:, :, None]
    return grey


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder, in natural order, without hidden files."""
    found = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(found, key=lambda entry: (_natural(entry.name), entry.name))


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]
