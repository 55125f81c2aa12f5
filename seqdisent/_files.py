"""Files that are written whole or not at all, and checked when they are read."""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

_ABANDONED = 24 * 3600.0  # seconds after which nobody is still writing an unfinished file


def write(path: Path, content: bytes | Callable[[BinaryIO], object], *, several_writers: bool = False) -> None:
    """Write a file that others see whole or not at all: beside its place first, then moved there.

    Args:
        path: the file; missing folders are made.
        content: the bytes, or a function that writes them to an open file.
        several_writers: whether other processes may write the same file at the same time. If not, the unfinished file
            is called ``NAME.unfinished``, and the next write replaces what a killed process has left. If so, each
            writer has a hidden file of its own, and those older than a day are removed.

    Raises:
        OSError: it could not be written (a full disk, say); a file that was there before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if several_writers:
            _remove_abandoned(path)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            os.chmod(name, 0o644)  # temporary files are private, and a cache may be shared
            file, unfinished = os.fdopen(handle, "wb"), Path(name)
        else:
            unfinished = path.with_name(path.name + ".unfinished")
            file = unfinished.open("wb")
    except OSError as error:
        raise OSError(error.errno, _why(path, error), str(path)) from error
    try:
        with file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut might leave the name without its content
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch hides the system's error
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, _why(path, cause), str(path)) from error
    except (Exception, KeyboardInterrupt):
        unfinished.unlink(missing_ok=True)
        raise


def write_tensors(content: Any, path: Path, *, several_writers: bool = False) -> None:
    """Write tensors, numbers, text and containers of these, as :func:`write` does."""
    write(path, lambda file: torch.save(content, file), several_writers=several_writers)


def read_tensors(path: Path) -> Any:
    """Return what :func:`write_tensors` wrote, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        PermissionError: it may not be read.
        pickle.UnpicklingError: it holds other objects than tensors, numbers, text and containers.
        Exception: a damaged file fails in any of many ways.
    """
    with zipfile.ZipFile(path) as archive:  # torch writes checksums and does not look at them
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} does not fit its checksum")
    return torch.load(path, map_location="cpu", weights_only=True)


def _why(path: Path, cause: OSError) -> str:
    kept = "the one before is whole" if path.exists() else "there was none before"
    return f"{path.name} was not written: {cause.strerror or cause}; {kept}"


def _remove_abandoned(path: Path) -> None:
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        with contextlib.suppress(OSError):  # another process may be removing it too
            if left.stat().st_mtime < time.time() - _ABANDONED:
                left.unlink()
