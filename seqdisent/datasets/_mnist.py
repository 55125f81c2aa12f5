"""The MNIST files: where they lie, what their checksums are, and how they are fetched and read."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from torch import Tensor

from seqdisent._downloads import find_files

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
    wanted = {
        f"{name}.gz": (f"{name}.gz", digest) for name, digest in FILES.items() if name.startswith(SPLITS[split][0])
    }
    return find_files(
        root,
        "mnist",
        wanted,
        what=f"the MNIST files {', '.join(wanted)}",
        remedy="Point root or SEQDISENT_DATA at them, or call moving_mnist(download=True) to fetch them (11 MB)",
        download=download,
        base_url=base_url,
        timeout=timeout,
        gzipped=True,
    )
