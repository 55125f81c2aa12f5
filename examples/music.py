"""Polyphonic music for the examples: four data sets, transposition, and melodies that two splits share.

    python examples/music.py --data jsb --split test --threshold 0.4       the pieces with a near-duplicate in training

A melody is the highest key that sounds, as steps from note to note (in semitones, so that a transposed melody is the
same) with the duration of each. A piece's similarity with a training piece is the share of its runs of six such notes
that the other has too, its own similarity the highest of any training piece's. Of the chorales, pieces either share a
melody or hardly a run: the similarity of none is between 0.35 and 0.47. Voices below the melody do not count.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqdisent.datasets import Batch, Clips, jsb_chorales, polyphonic_music

DATA = ("jsb", "nottingham", "musedata", "piano-midi")
SPLITS = ("train", "valid", "test")
RUN = 6  # notes
THRESHOLD = 0.4


class Data(NamedTuple):
    """The published split."""

    train: Clips
    valid: Clips
    held_out: Clips


def load_music(name: str, *, download: bool = False) -> Data:
    if name not in DATA:
        raise ValueError(f"expected one of {', '.join(DATA)}")
    if name == "jsb":
        return Data(*(jsb_chorales(split=split, download=download) for split in SPLITS))
    return Data(*(polyphonic_music(name, split=split, download=download) for split in SPLITS))


def batches_by_length(lengths: Tensor, most_steps: int) -> Iterator[Tensor]:
    """Yield the positions of all sequences, the longest first, as many at once as have `most_steps` when padded."""
    order = lengths.argsort(descending=True, stable=True)
    while len(order):
        many = max(1, most_steps // int(lengths[order[0]]))
        yield order[:many]
        order = order[many:]


def transpose(batch: Batch, most: int, generator: torch.Generator) -> Batch:
    """Move each piece (or window of one) up or down by its own number of semitones, of -most to most.

    All numbers are equally likely that keep its keys on the keyboard.
    """
    keys = batch.frames.shape[-1]
    sounds = batch.frames.bool().any(1)
    lowest = torch.where(sounds.any(1), sounds.int().argmax(1), keys)
    highest = keys - 1 - sounds.flip(1).int().argmax(1)  # of silence, any
    down, up = lowest.clamp(max=most), (keys - 1 - highest).clamp(max=most)
    shifts = (torch.rand(len(sounds), generator=generator).to(down.device) * (down + up + 1)).long() - down
    source = (torch.arange(keys, device=shifts.device) - shifts[:, None]) % keys
    return batch._replace(frames=batch.frames.gather(-1, source[:, None].expand_as(batch.frames)))


def melody(roll: Tensor) -> list[tuple[int, int]]:
    """Return, of a roll (T, 88), the interval to the next note and the duration of each note of the highest voice."""
    tops = torch.where(roll.any(1), roll.shape[1] - 1 - roll.flip(1).int().argmax(1), -1)
    tops, durations = tops.unique_consecutive(return_counts=True)
    tops, durations = tops[tops >= 0], durations[tops >= 0]
    return list(zip(tops.diff().tolist(), durations[:-1].tolist(), strict=True))


def _runs(clips: Clips, piece: int) -> set[tuple[tuple[int, int], ...]]:
    notes = melody(clips.frames[piece, : clips.lengths[piece]].bool())
    return {tuple(notes[i : i + RUN]) for i in range(max(1, len(notes) - RUN + 1))} if notes else set()


def melodic_similarity(clips: Clips, others: Clips) -> tuple[Tensor, Tensor]:
    """Return the highest similarity of each clip's melody with any of `others`, (N,) in [0, 1], and which has it."""
    known = [_runs(others, i) for i in range(len(others))]
    shared = torch.tensor(
        [
            [len(runs & other) / max(1, len(runs)) for other in known]
            for runs in (_runs(clips, i) for i in range(len(clips)))
        ]
    )
    similarity, position = shared.max(1)
    return similarity, position


def main() -> None:
    how: dict[str, Any] = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**how)
    parser.add_argument("--data", choices=DATA, default="jsb")
    parser.add_argument("--split", choices=SPLITS[1:], default="test")
    parser.add_argument("--threshold", type=float, default=THRESHOLD)
    parser.add_argument("--download", action="store_true", help="fetch the data if it is not there")
    asked = parser.parse_args()
    data = load_music(asked.data, download=asked.download)
    clips = dict(zip(SPLITS, data, strict=True))[asked.split]
    similarity, position = melodic_similarity(clips, data.train)
    near = (similarity >= asked.threshold).nonzero().squeeze(1).tolist()
    print(f"{len(near)} of {len(clips)} {asked.split} pieces share at least {asked.threshold:g} of their melody with a")
    print("training piece (piece: training piece, similarity):")
    for piece in near:
        print(f"  {piece}: {int(position[piece])}, {similarity[piece]:.2f}")


if __name__ == "__main__":
    main()
