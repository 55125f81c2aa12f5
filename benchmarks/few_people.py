"""Write an archive of long, ragged clips of few people, as video of one's own is: made from Sprites.

    SEQDISENT_DATA=FOLDER_WITH_lpc python benchmarks/few_people.py few_people.npz
    python examples/vdsm.py --data few_people.npz --held-out 2

Nine people, four motions each and one clip of a motion: 50 to 150 frames of 64 x 64, in which the eight frames of the
motion are repeated at the clip's own speed, from any of them on, by someone who sways a little. Everyone's wall has
colours of its own.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch

from seqdisent.datasets import sprites

NUM_MOTIONS = 9


def clip(frames: torch.Tensor, wall: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return one clip (T, 3, 64, 64) of a motion's frames (8, 3, 64, 64), all float in [0, 1]."""
    count = int(torch.randint(50, 151, (), generator=generator))
    start, speed, phase = torch.rand(3, generator=generator).tolist()
    steps = torch.arange(count)
    shown = frames[((8 * start + steps * (0.25 + 0.35 * speed)) % 8).long()]
    figure = (shown.amax(1, keepdim=True) > 0).float()  # what is black around a character is transparent
    picture = figure * shown + (1 - figure) * wall
    sway = (2 * math.pi * (steps / 40 + phase)).sin().mul(4).round().long()
    return torch.stack([frame.roll(int(shift), -1) for frame, shift in zip(picture, sway, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--people", type=int, default=9)
    parser.add_argument("--motions", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(options.seed)
    source = sprites()
    people = torch.randperm(source.num_identities, generator=generator)[: options.people]
    clips, identity, motions = [], [], []
    for number, person in enumerate(people.tolist()):
        low, high = torch.rand(2, 3, generator=generator) * 0.7 + 0.1
        wall = torch.lerp(low, high, torch.linspace(0, 1, 64)[:, None])
        wall = wall.T[:, :, None].expand(3, 64, 64)  # from the ceiling's colour to the floor's
        for motion in torch.randperm(NUM_MOTIONS, generator=generator)[: options.motions].tolist():
            clips.append(clip(source.frames[person * NUM_MOTIONS + motion].float() / 255, wall, generator))
            identity.append(number)
            motions.append(motion)
    lengths = [len(frames) for frames in clips]
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    array = (255 * padded).round().to(torch.uint8).permute(0, 1, 3, 4, 2).numpy()
    np.savez_compressed(options.archive, frames=array, lengths=lengths, identity=identity, motion=motions)
    print(f"wrote {options.archive}: {len(clips)} clips of {min(lengths)} to {max(lengths)} frames")


if __name__ == "__main__":
    main()
