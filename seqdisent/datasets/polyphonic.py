"""Polyphonic music: Bach's chorales as piano rolls, of many lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch

from seqdisent.datasets._checks import check_choice
from seqdisent.datasets._downloads import find_files
from seqdisent.datasets.clips import Clips

COMMIT = "9a7f733ddb4ed91f48da64ac7f0f621c34aadd4d"
BASE_URL = f"https://raw.githubusercontent.com/czhuang/JSB-Chorales-dataset/{COMMIT}"

FILE = "jsb-chorales-quarter.json"
DIGEST = "2db9329f1881a1d3f49703ec556bf1d6f84b4f6c1d702c156536e93cf31e1c91"

NUM_KEYS = 88
LOWEST_NOTE = 21
"""The MIDI note of a piano's first key; the last one's is 108."""


def jsb_chorales(
    root: str | Path | None = None,
    split: Literal["train", "valid", "test"] = "train",
    *,
    download: bool = False,
    base_url: str = BASE_URL,
    timeout: float = 30.0,
) -> Clips:
    """The JSB chorales: 229 pieces to train on, 76 to validate with and 77 to test with, one step a quarter note.

    A step is a chord, 88 numbers of which those are 1 whose keys sound, and the others 0; where nothing sounds, all are
    0. Key 0 is MIDI note 21, key 87 note 108. Pieces have 25 to 160 steps, and each is its own identity. The split is
    the one that results are published for.

    Args:
        root: Folder with `jsb-chorales-quarter.json`. Where it is None or lacks the file, the folders
            `$SEQDISENT_DATA/jsb` and the cache (`$SEQDISENT_CACHE`, `$XDG_CACHE_HOME/seqdisent` or
            `~/.cache/seqdisent`, there `jsb`) are tried.
        split: Which pieces.
        download: Fetch the file (0.4 MB) into `root`, or into the cache where `root` is None, if it is missing.
        base_url: Where to download from; a mirror has the file below it.
        timeout: Seconds that the download may stall.

    Returns:
        The pieces, (N, T, 88), with `scale=1`; no labels and no renderer.

    Raises:
        FileNotFoundError: The file is missing, and `download` is False.
        ConnectionError: The download failed; nothing half-written is left.
        ValueError: The file's SHA-256 is wrong, or `split` is none of the three.

    References:
        Boulanger-Lewandowski, Bengio, Vincent. Modeling temporal dependencies in high-dimensional sequences, ICML 2012
        (data and split). Krishnan, Shalit, Sontag. Structured inference networks for nonlinear state space models, AAAI
        2017 (the deep Markov model). File: github.com/czhuang/JSB-Chorales-dataset, which states no licence.
    """
    check_choice("split", split, ("train", "valid", "test"))
    folder = find_files(
        root,
        "jsb",
        {FILE: (FILE, DIGEST)},
        what=f"the chorales' file {FILE}",
        remedy="Point root or SEQDISENT_DATA at it, or call jsb_chorales(download=True) to fetch it (0.4 MB)",
        download=download,
        base_url=base_url,
        timeout=timeout,
    )
    pieces: list[list[list[int]]] = json.loads((folder / FILE).read_bytes())[split]
    lengths = torch.tensor([len(chords) for chords in pieces])
    keys = torch.tensor(
        [
            (piece, step, note - LOWEST_NOTE)
            for piece, chords in enumerate(pieces)
            for step, chord in enumerate(chords)
            for note in chord
        ]
    )
    rolls = torch.zeros(len(pieces), int(lengths.max()), NUM_KEYS, dtype=torch.uint8)
    rolls[keys.unbind(1)] = 1
    return Clips(rolls, scale=1, lengths=lengths, names=[f"{split} {piece}" for piece in range(len(pieces))])
