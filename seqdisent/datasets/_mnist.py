"""The MNIST files: where they lie, what their checksums are, and how they are fetched and read."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from torch import Tensor

from seqdisent.datasets._downloads import data_folders, fetch, verify, write

BASE_URL = "https://ossci-datasets.s3.amazonaws.com/mnist"

FILES: dict[str, str] = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
"""Of each MNIST file the SHA-256 of what its gzip file holds."""

SPLITS: dict[str, tuple[str, int]] = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
"""Of each split the prefix of its files and how many digits it has."""

DIGIT_SIZE = 28


def read_digits(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """The images, uint8 (N, 28, 28), and their classes, int64 (N,), of files that were checked."""
    prefix, count = SPLITS[split]
    images = gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:]
    pixels = torch.frombuffer(bytearray(images), dtype=torch.uint8).reshape(count, DIGIT_SIZE, DIGIT_SIZE)
    return pixels, torch.frombuffer(bytearray(labels), dtype=torch.uint8).long()


def find_mnist(root: str | Path | None, split: str, *, download: bool, base_url: str, timeout: float) -> Path:
    """The folder that holds the two files of a split, each checked."""
    folders = data_folders(root, "mnist")
    wanted = [name for name in FILES if name.startswith(SPLITS[split][0])]
    for folder in folders:
        if all((folder / f"{name}.gz").is_file() for name in wanted):
            for name in wanted:
                path = folder / f"{name}.gz"
                _check(path.read_bytes(), name, str(path), "delete it and fetch it again")
            return folder
    if not download:
        looked = ", ".join(str(folder) for folder in folders)
        raise FileNotFoundError(
            f"the MNIST files {', '.join(f'{name}.gz' for name in wanted)} are in none of: {looked}. Point root or "
            "SEQDISENT_DATA at them, or call moving_mnist(download=True) to fetch them"
        )
    target = folders[-1] if root is None else folders[0]
    for name in wanted:
        path, url = target / f"{name}.gz", f"{base_url.rstrip('/')}/{name}.gz"
        if path.is_file():
            _check(path.read_bytes(), name, str(path), "delete it and fetch it again")
        else:
            content = fetch(url, timeout)
            _check(content, name, url, "nothing was kept; try again or another base_url")
            write(path, content)
    return target


def _check(packed: bytes, name: str, what: str, remedy: str) -> None:
    """Check what the gzip file holds: packed again, the same file has another checksum."""
    try:
        content = gzip.decompress(packed)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{what}: not a whole gzip file ({error}); {remedy}") from error
    verify(content, FILES[name], what, remedy)
