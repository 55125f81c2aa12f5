"""MUG: faces that show six expressions, from the licensed files that you bring."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from seqdisent.datasets._archives import REFUSED, read_arrays
from seqdisent.datasets._checks import check_count
from seqdisent.datasets._images import Pixels, resize
from seqdisent.datasets.clips import Clips

ACTIONS: tuple[int, ...] = (0, 1, 7, 3, 4, 8)
"""The file's number of each action that is kept, in the order of the labels; 2, 5 and 6 are dropped."""

_NUM_ACTIONS = 9
_CONVERT = "np.savez('sequences.npz', *(np.stack(list(s)) for s in np.load('YOURS.npz', allow_pickle=True)['arr_0']))"


def mug(path: str | Path, *, labels: str | Path | None = None, image_size: int = 64) -> Clips:
    """The MUG facial expressions in the layout of VDSM's released code, as a user with a licence prepares them.

    Two files of NumPy. The first has the sequences in order, `arr_0`, `arr_1` and so on, each uint8 (T, H, W, 3) with a
    length of its own (where all are as long as one another, `arr_0` alone may hold them, (N, T, H, W, 3)). The second
    has `arr_0` with a row for each sequence: identity and action, whole numbers, the action 0 to 8. The released code's
    own file of sequences is one array of objects, which only pickle can read, and pickle can run anything; if you made
    the file yourself, convert it once (`import numpy as np`)::

        np.savez('sequences.npz', *(np.stack(list(s)) for s in np.load('YOURS.npz', allow_pickle=True)['arr_0']))

    As in the released code, actions 2, 5 and 6 (neutral, mixed, others) are dropped, 7 becomes 2 and 8 becomes 5, and
    every second frame is kept, the first one included. It trains on random segments of 16 frames (20 in its README),
    which are `clips.draw_clips(batch_size, generator, num_steps=16)`; sequences that are shorter come whole and padded.
    It holds out a quarter of the sequences: `clips.split(0.25, seed, by="sequence")`.

    Args:
        path: The .npz file of sequences.
        labels: The file of labels; by default `labels.npz` beside `path`.
        image_size: Height and width of the clips in pixels; frames of another size are resized.

    Returns:
        The clips, in RGB and ragged. `identity` is the file's; labels are `identity`, numbered from 0 (static), and
        `action` (motion), each with the file's numbers as names.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A file is damaged, holds objects or lacks a sequence; an array has the wrong shape; an action is not
            0 to 8; no sequence is left. The message names the file and what was expected.
        TypeError: Sequences that are not uint8, labels that are not whole numbers.
        ImportError: Pillow is needed and missing.

    Example:
        Two sequences of two identities, one of seven frames and one of four, of which every second is kept.

        >>> import tempfile
        >>> frames = np.zeros((7, 8, 8, 3), np.uint8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/sequences.npz", frames, frames[:4])
        ...     np.savez(f"{folder}/labels.npz", np.array([[0, 1], [1, 7]]))
        ...     mug(f"{folder}/sequences.npz", image_size=8)
        Clips(2 clips of 2 to 4 frames, 3x8x8, 2 identities)

    References:
        Aifanti, Papachristou, Delopoulos. The MUG facial expression database, WIAMIS 2010 (mug.ee.auth.gr/fed gives the
        licence). Vowels, Camgoz, Bowden. VDSM, CVPR 2021: its released code also crops 160 x 160 out of frames of
        112 x 112 before it resizes them, which puts a black border around each face; this does not.
    """
    check_count(image_size=image_size)
    path = Path(path)
    rows = _read_labels(path.parent / "labels.npz" if labels is None else Path(labels))
    kept = np.flatnonzero(np.isin(rows[:, 1], ACTIONS)).tolist()
    if not kept:
        raise ValueError(f"{path}: no sequence is left without actions 2, 5 and 6, expected others too")
    clips = {
        row: np.stack([resize(frame, image_size) for frame in sequence[::2]])
        for row, sequence in _read_sequences(path, len(rows))
        if rows[row, 1] in ACTIONS
    }
    lengths = torch.tensor([len(clips[row]) for row in kept])
    frames = torch.zeros(len(kept), int(lengths.max()), 3, image_size, image_size, dtype=torch.uint8)
    for place, row in enumerate(kept):
        frames[place, : lengths[place]] = torch.from_numpy(clips[row]).permute(0, 3, 1, 2)
    identity = torch.from_numpy(rows[kept, 0])
    people, person = torch.unique(identity, return_inverse=True)
    return Clips(
        frames,
        lengths=lengths,
        identity=identity,
        labels={"identity": person, "action": torch.tensor([ACTIONS.index(int(rows[row, 1])) for row in kept])},
        factor_names={
            "identity": [str(number) for number in people.tolist()],
            "action": [str(number) for number in ACTIONS],
        },
        static_factors=("identity",),
        motion_factors=("action",),
        names=[str(row) for row in kept],
    )


def _read_labels(path: Path) -> npt.NDArray[np.int64]:
    """(N, 2): identity and action."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected the labels, 'arr_0' (N, 2) with identity and action")
    arrays = dict(read_arrays(path))
    if "arr_0" not in arrays:
        raise ValueError(f"{path}: holds {sorted(arrays)}, expected an array 'arr_0' (N, 2)")
    rows = arrays["arr_0"]
    if rows.dtype.kind not in "iu":
        raise TypeError(f"{path}: array 'arr_0' is {rows.dtype}, expected whole numbers, identity and action")
    if rows.ndim != 2 or rows.shape[1] != 2 or not len(rows):
        raise ValueError(f"{path}: array 'arr_0' has shape {rows.shape}, expected (N, 2), identity and action")
    low, high = int(rows[:, 1].min()), int(rows[:, 1].max())
    if low < 0 or high >= _NUM_ACTIONS:
        raise ValueError(f"{path}: actions are {low} to {high}, expected 0 to {_NUM_ACTIONS - 1}")
    return rows.astype(np.int64)


def _read_sequences(path: Path, count: int) -> Iterator[tuple[int, Pixels]]:
    """Number and frames of each sequence, checked, one in memory at a time where each is an array."""
    layout = f"expected 'arr_0' to 'arr_{count - 1}', one sequence for each row of labels"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected an .npz of sequences")
    found: set[int] = set()
    for name, array in read_arrays(path, f"{REFUSED}; convert your own file with: {_CONVERT}"):
        number = re.fullmatch(r"arr_(0|[1-9]\d*)", name)
        if number is None:
            raise ValueError(f"{path}: holds {name!r}, {layout}")
        together = name == "arr_0" and array.ndim == 5
        for row, sequence in enumerate(array) if together else [(int(number[1]), array)]:
            if row >= count:
                raise ValueError(f"{path}: holds sequence {row}, {layout}")
            if sequence.dtype != np.uint8:
                raise TypeError(f"{path}: sequence {row} is {sequence.dtype}, expected uint8 (pixels 0 to 255)")
            if sequence.ndim != 4 or sequence.shape[3] != 3 or 0 in sequence.shape:
                raise ValueError(f"{path}: sequence {row} has shape {sequence.shape}, expected (T, H, W, 3), not empty")
            if row in found:
                raise ValueError(f"{path}: holds sequence {row} twice, {layout}")
            found.add(row)
            yield row, sequence
    if len(found) != count:
        raise ValueError(f"{path}: holds {len(found)} sequences, {layout}")
