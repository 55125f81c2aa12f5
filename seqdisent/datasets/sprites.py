"""Sprites: 840 characters doing nine things, composed from 22 sheets of the Liberated Pixel Cup.

The art is by the artists that the Universal LPC Spritesheet's AUTHORS.txt names, under CC-BY-SA 3.0 and GPL 3.0 (dual);
frames composed from it carry the same terms. It is not part of this package: the sheets are read from a folder or
downloaded.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seqdisent._downloads import cache_folder
from seqdisent.datasets._frame_cache import kept_frames
from seqdisent.datasets._images import read_rgba
from seqdisent.datasets._progress import progress
from seqdisent.datasets._sheets import BASE_URL, SHEETS, find_sheets
from seqdisent.datasets.clips import Clips

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "body": ("light", "dark", "dark2", "darkelf", "darkelf2", "tanned", "tanned2"),
    "shirt": ("longsleeve_brown", "longsleeve_teal", "longsleeve_maroon", "longsleeve_white"),
    "pants": ("magenta", "red", "teal", "white", "robe_skirt"),
    "hair": ("green", "blue", "pink", "raven", "white", "dark_blonde"),
}
"""The static factors; a character's index counts with the last one fastest."""

ACTIONS: dict[str, tuple[int, tuple[int, ...]]] = {
    "walk": (8, (0, 1, 2, 3, 4, 5, 6, 7)),
    "spellcast": (0, (0, 1, 2, 3, 4, 5, 6, 6)),
    "slash": (12, (0, 1, 2, 3, 4, 5, 5, 5)),
}
"""Of each action the sheet row where its block begins, and the sheet columns of its frames."""

DIRECTIONS: dict[str, int] = {"left": 1, "front": 2, "right": 3}
"""Of each direction its row within an action's block. (The released code reads slash one row too low.)"""

NUM_CHARACTERS = 840
NUM_MOTIONS = 9
NUM_STEPS = 8
_SIZE = 64
_RECIPE_VERSION = 1  # to count up whenever `_compose` gives other frames: it names the cached ones

Floats = npt.NDArray[np.float64]


class _Layer(NamedTuple):
    """The pixels of a sheet that are not empty, over all nine clips."""

    where: npt.NDArray[np.intp]
    """Positions, (P,)."""
    pixels: Floats
    """RGBA in [0, 1], not premultiplied, (P, 4)."""


class SpriteRenderer:
    """The truth behind `sprites`: any of its characters doing any of the nine motions, looked up.

    Args:
        frames: All clips, character by character, each with its nine motions.

    Shape:
        - frames: (9 * characters, T, C, H, W), uint8
    """

    def __init__(self, frames: Tensor) -> None:
        self.frames = frames

    def __call__(self, content: Tensor, motion: Tensor, num_steps: int | None = None) -> Tensor:
        """Frames of the characters of rows `content` doing what rows `motion` do; ValueError for more than 8."""
        if num_steps is not None and num_steps > self.frames.shape[1]:
            raise ValueError(
                f"num_steps: got {num_steps}, expected at most {self.frames.shape[1]}: the sheets have no more"
            )
        return self.frames[content // NUM_MOTIONS * NUM_MOTIONS + motion % NUM_MOTIONS, :num_steps]


def sprites(
    root: str | Path | None = None,
    *,
    download: bool = False,
    characters: Sequence[int] | None = None,
    cache: bool = False,
    base_url: str = BASE_URL,
    timeout: float = 30.0,
) -> Clips:
    """The Sprites data set: 840 characters, each with 9 clips of 8 frames in RGB, 64 x 64.

    Identity is the character, counted over body, shirt, pants and hair (the static factors) with hair fastest. The
    clips of a character are walk, spellcast and slash (`action`), each seen from the left, the front and the right
    (`direction`); `motion` is which of the nine, their product. These are the motion factors. Any true swap is known.
    `Clips.draw_pairs` draws two actions of one character, 16 frames, as the released code does at stage 1.

    All 840 take 743 MB and some seconds, with a progress bar on a terminal; every sheet's SHA-256 is checked before it
    is used. With `cache=True` the composed frames are kept in a file and mapped into memory, so that a later call takes
    a second, and processes share the memory. (`Clips.subset` and the splits copy what they keep.)

    Args:
        root: Folder with `body/`, `shirt/`, `pants/` and `hair/`. Where it is None or lacks a sheet, the folders
            `$SEQDISENT_DATA/lpc/layers` and the cache (`$SEQDISENT_CACHE`, `$XDG_CACHE_HOME/seqdisent` or
            `~/.cache/seqdisent`, there `lpc/layers`) are tried.
        download: Fetch missing sheets (2 MB) into `root`, or into the cache where `root` is None.
        characters: Which characters to compose, 0 to 839, in this order; by default all.
        cache: Keep the composed frames, 884,736 bytes a character, in the cache folder's `sprites`, in a file whose
            name changes with the sheets, the recipe and `characters`. A damaged one is composed again. Old ones are
            never removed.
        base_url: Where to download from; a mirror has the source repository's paths below it.
        timeout: Seconds that a download may stall.

    Returns:
        The clips, 9 per character; `identity` is the character's index.

    Raises:
        FileNotFoundError: A sheet is missing, and `download` is False.
        ConnectionError: A download failed; nothing half-written is left.
        ValueError: A sheet's SHA-256 is wrong, or `characters` is empty, repeats one or has one out of range.
        ImportError: Pillow or tqdm is missing.

    Warns:
        RuntimeWarning: The cache could not be written, since the disk is full or read-only, say; nothing half-written
            is left, and the frames are held in memory.

    References:
        Li, Mandt. Disentangled Sequential Autoencoder, ICML 2018. Vowels, Camgoz, Bowden. VDSM, CVPR 2021; its released
        code reads the slash rows off by one, which this does not. Art: lpc.opengameart.org, CC-BY-SA 3.0 and GPL 3.0.
    """
    chosen = list(range(NUM_CHARACTERS)) if characters is None else [int(character) for character in characters]
    if not chosen or len(set(chosen)) != len(chosen) or not 0 <= min(chosen) <= max(chosen) < NUM_CHARACTERS:
        raise ValueError(f"characters: got {chosen}, expected different numbers from 0 to {NUM_CHARACTERS - 1}")
    layers = find_sheets(root, download=download, base_url=base_url, timeout=timeout)
    if cache:
        shape = (len(chosen) * NUM_MOTIONS, NUM_STEPS, 3, _SIZE, _SIZE)
        frames = kept_frames(cache_folder() / "sprites" / _cache_name(chosen), shape, lambda: _compose(layers, chosen))
    else:
        frames = torch.from_numpy(_compose(layers, chosen))
    values = torch.tensor([_attributes(character) for character in chosen]).repeat_interleave(NUM_MOTIONS, dim=0)
    motions = list(itertools.product(ACTIONS, DIRECTIONS))
    motion = torch.arange(NUM_MOTIONS).repeat(len(chosen))
    return Clips(
        frames,
        identity=torch.tensor(chosen).repeat_interleave(NUM_MOTIONS),
        labels={
            **dict(zip(ATTRIBUTES, values.unbind(dim=1), strict=True)),
            "action": motion // len(DIRECTIONS),
            "direction": motion % len(DIRECTIONS),
            "motion": motion,
        },
        factor_names={
            **ATTRIBUTES,
            "action": tuple(ACTIONS),
            "direction": tuple(DIRECTIONS),
            "motion": [" ".join(pair) for pair in motions],
        },
        static_factors=tuple(ATTRIBUTES),
        motion_factors=("action", "direction", "motion"),
        names=[f"{character} {' '.join(pair)}" for character in chosen for pair in motions],
        renderer=SpriteRenderer(frames),
    )


def _attributes(character: int) -> tuple[int, ...]:
    """The index of its body, shirt, pants and hair."""
    values = []
    for names in reversed(ATTRIBUTES.values()):
        character, value = divmod(character, len(names))
        values.append(value)
    return tuple(reversed(values))


def _cache_name(chosen: Sequence[int]) -> str:
    """Says all that the frames depend on."""
    content = json.dumps([_RECIPE_VERSION, SHEETS, ATTRIBUTES, ACTIONS, DIRECTIONS, list(chosen)])
    return f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.frames"


def _compose(folder: Path, chosen: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Frames (9 * characters, 8, 3, 64, 64), as a tree: what characters share below the hair is composed once."""
    layers = {
        name: [_layer(read_rgba(folder / name / f"{v}.png")) for v in values] for name, values in ATTRIBUTES.items()
    }
    trees: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for position, character in enumerate(chosen):
        body, shirt, pants, hair = _attributes(character)
        trees.setdefault((body, pants, shirt), []).append((hair, position))
    frames = np.empty((len(chosen), NUM_MOTIONS, NUM_STEPS, 3, _SIZE, _SIZE), dtype=np.uint8)
    empty = np.zeros((NUM_MOTIONS * NUM_STEPS * _SIZE * _SIZE, 4))
    dressed: dict[tuple[int, int], Floats] = {}
    for body, pants, shirt in progress(sorted(trees), "composing sprites"):
        if (body, pants) not in dressed:
            dressed = {(body, pants): _over(_over(empty, layers["body"][body]), layers["pants"][pants])}
        below = _over(dressed[body, pants], layers["shirt"][shirt])
        flat = _flatten(below)
        for hair, position in trees[body, pants, shirt]:
            layer = layers["hair"][hair]
            picture = flat.copy()
            picture[layer.where] = _flatten(_blend(below[layer.where], layer.pixels))
            clips = picture.reshape(NUM_MOTIONS, NUM_STEPS, _SIZE, _SIZE, 3)
            frames[position] = clips.transpose(0, 1, 4, 2, 3)
    return frames.reshape(-1, NUM_STEPS, 3, _SIZE, _SIZE)


def _layer(sheet: npt.NDArray[np.uint8]) -> _Layer:
    tiles = sheet.reshape(sheet.shape[0] // _SIZE, _SIZE, sheet.shape[1] // _SIZE, _SIZE, 4).swapaxes(1, 2)
    clips = [tiles[row + view, list(columns)] for row, columns in ACTIONS.values() for view in DIRECTIONS.values()]
    pixels = np.stack(clips).reshape(-1, 4)
    where = np.flatnonzero(pixels[:, 3])
    return _Layer(where, pixels[where] / 255.0)


def _over(below: Floats, layer: _Layer) -> Floats:
    pixels = below.copy()
    pixels[layer.where] = _blend(below[layer.where], layer.pixels)
    return pixels


def _blend(below: Floats, above: Floats) -> Floats:
    """The "over" rule on colours that are not multiplied by their alpha; `above` is nowhere empty."""
    cover, rest = above[:, 3:], below[:, 3:] * (1.0 - above[:, 3:])
    alpha = cover + rest
    return np.concatenate([(above[:, :3] * cover + below[:, :3] * rest) / alpha, alpha], axis=1)


def _flatten(pixels: Floats) -> npt.NDArray[np.uint8]:
    """Bytes: the colour as it is wherever there is any, black elsewhere."""
    return np.where(pixels[:, 3:] > 0.0, np.floor(pixels[:, :3] * 255.0 + 0.5), 0.0).astype(np.uint8)
