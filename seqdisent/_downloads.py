"""Where data lies, and how files are fetched and checked."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seqdisent import _files


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


def verify(content: bytes, digest: str, what: str, remedy: str, *, gzipped: bool = False) -> None:
    """Raise ValueError if the SHA-256 of `content`, or of what it holds if it is `gzipped`, is not `digest`."""
    if gzipped:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{what}: not a whole gzip file ({error}); {remedy}") from error
    got = hashlib.sha256(content).hexdigest()
    if got != digest:
        raise ValueError(f"{what}: SHA-256 is {got}, expected {digest}; {remedy}")


class _HttpsLeadsToHttps(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.type == "https" and not newurl.startswith("https:"):
            raise urllib.error.HTTPError(req.full_url, code, f"it leads to {newurl}, expected https", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str, timeout: float, *, limit: int | None = None) -> bytes:
    """The content behind an address, whole, or ConnectionError; ValueError if it has more bytes than `limit`."""
    try:
        with urllib.request.build_opener(_HttpsLeadsToHttps).open(url, timeout=timeout) as response:
            content: bytes = response.read() if limit is None else response.read(limit + 1)
            missing = 0 if limit is None else response.length or 0  # a read of so many bytes lets it be cut off
    except urllib.error.HTTPError as error:
        error.close()
        remedy = ", there is no such file" if error.code in (404, 410) else ", try again" if error.code >= 400 else ""
        raise ConnectionError(f"could not download {url}: {error}; nothing was kept{remedy}") from error
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise ConnectionError(f"could not download {url}: {error!r}; nothing was kept, try again") from error
    if limit is not None and len(content) > limit:
        raise ValueError(f"{url}: has more than {limit} bytes; nothing was kept")
    if missing:
        raise ConnectionError(f"could not download {url}: {missing} bytes are missing; nothing was kept, try again")
    return content


def find_files(
    root: str | Path | None,
    name: str,
    files: Mapping[str, tuple[str, str]],
    *,
    what: str,
    remedy: str,
    download: bool,
    base_url: str,
    timeout: float,
    attribution: str | None = None,
    gzipped: bool = False,
) -> Path:
    """The folder that holds all files of a data set, each checked.

    Args:
        root: Where to look first.
        name: Of the data set's folder, as `data_folders` takes it.
        files: Of each file its path below `base_url` and its SHA-256.
        what: The files, for the message where some are in no folder.
        remedy: What the caller can do then.
        download: Fetch what is missing.
        base_url: Where from.
        timeout: Seconds that a download may stall.
        attribution: What to write to `ATTRIBUTION.md` beside the files, once they are fetched.
        gzipped: The checksums are of what the gzip files hold (packed again, the same content has another one).

    Returns:
        The folder.

    Raises:
        FileNotFoundError: Files are missing, and `download` is False.
        ConnectionError: A download failed.
        ValueError: A checksum is wrong.
    """
    folders = data_folders(root, name)
    again = "delete it and fetch it again"
    for folder in folders:
        if all((folder / file).is_file() for file in files):
            for file, (_, digest) in files.items():
                verify((folder / file).read_bytes(), digest, str(folder / file), again, gzipped=gzipped)
            return folder
    if not download:
        looked = ", ".join(str(folder) for folder in folders)
        raise FileNotFoundError(f"{what}: in none of: {looked}. {remedy}")
    target = folders[-1] if root is None else folders[0]
    for file, (path, digest) in files.items():
        if (target / file).is_file():
            verify((target / file).read_bytes(), digest, str(target / file), again, gzipped=gzipped)
        else:
            url = f"{base_url.rstrip('/')}/{path}"
            content = fetch(url, timeout)
            not_kept = "nothing was kept; try again or another base_url"
            verify(content, digest, f"{file} from {url}", not_kept, gzipped=gzipped)
            _files.write(target / file, content, several_writers=True)
    if attribution is not None:
        _files.write(target / "ATTRIBUTION.md", attribution.encode(), several_writers=True)
    return target
