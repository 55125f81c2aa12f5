"""Arrays in NumPy's files, read without pickle."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

REFUSED = "arrays of objects are refused"


def read_arrays(path: Path, remedy: str = REFUSED) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Name and array of each member of an .npz file, one in memory at a time; of an .npy file its array as `frames`.

    Raises:
        ValueError: The file is damaged, is no NumPy file, or holds objects or what is no array; the message ends with
            `remedy`.
    """
    with path.open("rb") as file:  # opened here, since NumPy leaves a damaged archive open
        with _explained(path, remedy):
            archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            yield "frames", archive
            return
        with archive:
            for name in archive.files:
                with _explained(path, remedy):
                    array: Any = archive[name]
                if not isinstance(array, np.ndarray):  # NumPy hands out the bytes of a member that is no array
                    raise ValueError(f"{path}: member {name!r} is not an array, expected arrays alone")
                yield name, array


@contextmanager
def _explained(path: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a NumPy file that can be read ({error}); {remedy}") from error
