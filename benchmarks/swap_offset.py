"""How much of a swap's error on moving MNIST is a shift of the whole digit.

    python benchmarks/swap_offset.py RUN

For the held-out clips of a run of `examples/vdsm.py --data moving_mnist`: mean squared errors of reconstructions and of
swaps of the digit against the true frames, as they are and after the best shift, by up to three pixels, of each clip
as a whole and of each frame; and of clips whose static factors come from their own digit on another trajectory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from seqdisent import reconstruct, swap
from seqdisent.datasets import moving_mnist
from seqdisent.metrics import squared_error

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import vdsm as example
from command_line import load_run

SHIFTS = [(y, x) for y in range(-3, 4) for x in range(-3, 4)]


def best_shift(errors):
    """The smallest of the errors (49, ...) and how far the shift that has it goes, in pixels."""
    smallest, which = errors.min(0)
    return smallest, torch.tensor(SHIFTS)[which].float().norm(dim=-1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    vdsm, _ = load_run(example.EXAMPLE, arguments.run)
    clips = moving_mnist(500, split="test", seed=arguments.seed)
    frames = clips.frames.float() / 255
    own = torch.arange(len(clips))
    other = own.roll(1)
    another_way = clips.true_swap(own, other).float() / 255  # the same digit on another trajectory
    true_swap = clips.true_swap(other, own).float() / 255
    found = {name: [] for name in ("reconstruction", "its own digit from another trajectory", "swap of the digit")}
    for rows in own.split(50):
        x = frames[rows]
        shown = (
            reconstruct(vdsm.model, vdsm.guide, x)["x"].mean,
            swap(vdsm.model, vdsm.guide, x, another_way[rows], sites=["s"], keep=["d", "z"])["x"].mean,
            swap(vdsm.model, vdsm.guide, x, frames[other[rows]], sites=["s"], keep=["d", "z"])["x"].mean,
        )
        for name, clip, true in zip(found, shown, (x, x, true_swap[rows]), strict=True):
            errors = torch.stack([(clip.roll(s, (-2, -1)) - true).square().flatten(2).mean(-1) for s in SHIFTS])
            by_clip, by_frame = best_shift(errors.mean(-1)), best_shift(errors)
            found[name].append((squared_error(clip, true), *by_clip, by_frame[0].mean(-1), by_frame[1].mean(-1)))
    unit = torch.cat([parts[0] for parts in found["reconstruction"]]).mean()
    print("errors, and in brackets how many times the reconstruction's; shifts are mean lengths")
    for name, parts in found.items():
        error, clip_error, clip_shift, frame_error, frame_shift = (
            torch.cat(part).mean() for part in zip(*parts, strict=True)
        )
        print(
            f"{name:40} as it is {error:.5f} ({error / unit:.2f}); each clip shifted {clip_error:.5f} "
            f"({clip_error / unit:.2f}), by {clip_shift:.2f} pixels; each frame shifted {frame_error:.5f} "
            f"({frame_error / unit:.2f}), by {frame_shift:.2f} pixels"
        )


if __name__ == "__main__":
    main()
