"""Frames that took a while to compose, kept in a file and mapped into memory.

The file holds the frames' bytes and then their CRC-32. It is written beside its place and moved there whole, so several
processes may read and write it at once: all of them would write the same.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seqdisent import _files

_CHECKSUM_BYTES = 4


def kept_frames(path: Path, shape: tuple[int, ...], compose: Callable[[], npt.NDArray[np.uint8]]) -> Tensor:
    """Frames out of their file, composed and written there first where it is missing or damaged.

    Where the file cannot be written (no space, no right to), nothing of it stays, and the frames are held in memory.

    Args:
        path: The file; its name must change with what `compose` would give.
        shape: Of the frames.
        compose: Makes them.

    Returns:
        uint8 of the given shape, mapped copy-on-write: processes share the memory, and a change stays in one of them.

    Warns:
        RuntimeWarning: The file could not be written.
    """
    kept = _map(path, shape)
    if kept is not None:
        return kept
    frames = compose()
    try:
        parts = (frames.data.cast("B"), _checksum(frames))
        _files.write(path, lambda file: file.writelines(parts), several_writers=True)
    except OSError as error:
        warnings.warn(
            f"could not keep the composed frames in {path}: {error}; they are held in memory, and will be composed "
            "again. Make space, or point SEQDISENT_CACHE at another folder",
            RuntimeWarning,
            stacklevel=3,
        )
        return torch.from_numpy(frames)
    kept = _map(path, shape)
    return torch.from_numpy(frames) if kept is None else kept  # None: another process removed the file


def _map(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """The frames of a whole file, else None."""
    size = math.prod(shape)
    try:
        if path.stat().st_size != size + _CHECKSUM_BYTES:
            return None
        content = torch.from_file(str(path), shared=False, size=size + _CHECKSUM_BYTES, dtype=torch.uint8)
    except (OSError, RuntimeError):  # there is none, or another process took it away
        return None
    if _checksum(content[:size].numpy()) != content[size:].numpy().tobytes():
        return None
    return content[:size].view(shape)


def _checksum(frames: npt.NDArray[np.uint8]) -> bytes:
    return zlib.crc32(frames.data.cast("B")).to_bytes(_CHECKSUM_BYTES, "little")
