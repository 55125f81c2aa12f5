"""Where data lies, and how files are fetched, checked and written."""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import urllib.error
import urllib.request
from pathlib import Path


def cache_folder() -> Path:
    """`$SEQDISENT_CACHE`, else `$XDG_CACHE_HOME/seqdisent`, else `~/.cache/seqdisent`."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SEQDISENT_CACHE") or Path(caches) / "seqdisent")


def data_folders(root: str | Path | None, name: str) -> list[Path]:
    """The folders to look in, in this order; the last one is the cache.

    Args:
        root: The caller's own folder, if any.
        name: Of the data set's folder below `$SEQDISENT_DATA` and the cache.
    """
    folders = [] if root is None else [Path(root)]
    if os.environ.get("SEQDISENT_DATA"):
        folders.append(Path(os.environ["SEQDISENT_DATA"]) / name)
    return [*folders, cache_folder() / name]


def verify(content: bytes, digest: str, what: str, remedy: str) -> None:
    """Raise ValueError if the SHA-256 of `content` is not `digest`."""
    got = hashlib.sha256(content).hexdigest()
    if got != digest:
        raise ValueError(f"{what}: SHA-256 is {got}, expected {digest}; {remedy}")


def fetch(url: str, timeout: float) -> bytes:
    """The content behind an address, whole, or ConnectionError."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            content: bytes = response.read()
    except urllib.error.HTTPError as error:
        error.close()
        raise ConnectionError(f"could not download {url}: {error}; nothing was kept, try again") from error
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise ConnectionError(f"could not download {url}: {error!r}; nothing was kept, try again") from error
    return content


def write(path: Path, content: bytes) -> None:
    """Writes a file that other processes see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # a cache may be shared, and temporary files are private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
