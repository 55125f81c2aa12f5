"""How time and memory of a training step grow with batch, steps, experts and image size, one at a time.

    python benchmarks/scale.py --out scale.json
    python benchmarks/scale.py --plot scale.json docs/images/scale.png

VDSM's first stage at the paper's sizes, Adam included: 20 sequences of 8 frames, 40 experts, 64 x 64 pixels, and from
there up and down along each axis. Every point is a process of its own, whose peak of resident memory is read when it
ends; the memory that Python and torch take by themselves is subtracted. Memory that is freed is kept for the next step
(`KEEP_MEMORY` in measuring.py), as docs/performance/memory.md advises, which also makes times steadier. "growth" is the
exponent b of time ~ size^b between a point and the one before it: 1 is linear. Processes have a thread and a batch each
(DistributedDataParallel on gloo), so with enough cores one would hope for 0; their memory is that of one of them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from measuring import KEEP_MEMORY, report
from torch import distributed, nn

from seqdisent import elbo_terms

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import vdsm as example

START = {"batch": 20, "steps": 8, "experts": 40, "image": 64}
AXES = {
    "batch": (5, 10, 20, 40),
    "steps": (2, 4, 8, 16),
    "experts": (1, 10, 20, 40, 80),
    "image": (16, 32, 64, 128),
    "processes": (1, 2),
}


class Loss(nn.Module):
    """What DistributedDataParallel wants: a module whose forward pass is the loss."""

    def __init__(self, vdsm: example.VDSM) -> None:
        super().__init__()
        self.vdsm = vdsm

    def forward(self, frames):
        return -elbo_terms(self.vdsm.pretraining_model, self.vdsm.pretraining_guide, frames).elbo().sum()


def memory() -> float:
    """The largest resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def point(sizes: dict[str, int], repeats: int, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    before = memory()
    channels = tuple(512 // 2**i for i in range(int(math.log2(sizes["image"] // 4))))
    plan = example.Sizes(sizes["experts"], encoder_channels=None, decoder_channels=channels)
    vdsm = example.VDSM((3, sizes["image"], sizes["image"]), plan)
    frames = torch.rand(sizes["batch"], sizes["steps"], 3, sizes["image"], sizes["image"])
    vdsm.requires_grad_(False)
    for part in (vdsm.encoder, vdsm.static, vdsm.pose, vdsm.decoder):
        part.requires_grad_(True)
    loss = Loss(vdsm)
    if distributed.is_torchelastic_launched():
        distributed.init_process_group("gloo")
        loss = nn.parallel.DistributedDataParallel(loss)
    optimiser = torch.optim.Adam([p for p in vdsm.parameters() if p.requires_grad], lr=1e-4, fused=True)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        optimiser.zero_grad()
        loss(frames).backward()
        optimiser.step()
        seconds.append(time.perf_counter() - start)
    bank = sum(p.numel() * p.element_size() for p in vdsm.decoder.parameters()) / 2**30
    return {"seconds": statistics.median(seconds[1:]), "GB": memory() - before, "GB of the bank": bank}


def measure(arguments: argparse.Namespace) -> None:
    rows = []
    for axis in [arguments.axis] if arguments.axis else AXES:
        environment = {**os.environ, **KEEP_MEMORY, **({"OMP_NUM_THREADS": "1"} if axis == "processes" else {})}
        last = None
        for value in AXES[axis]:
            sizes = {**START, axis: value} if axis in START else START
            several = axis == "processes"
            launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(value)] if several else []
            command = [sys.executable, *launcher, __file__, "--point", json.dumps(sizes)]
            command += ["--repeats", str(arguments.repeats), "--seed", str(arguments.seed)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found = json.loads(done.stdout.splitlines()[0])  # each process prints its own
            growth = math.log(found["seconds"] / last[1]) / math.log(value / last[0]) if last else ""
            rows.append({"axis": axis, "size": value, **found, "growth": growth})
            last = value, found["seconds"]
    report("scale", arguments, rows)


def plot(source: str, target: str) -> None:
    from matplotlib.figure import Figure

    rows = json.loads(Path(source).read_text())["rows"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for panel, quantity, label in zip(
        figure.subplots(1, 2), ("seconds", "GB"), ("seconds a step", "peak memory, GB"), strict=True
    ):
        for axis in START:
            points = [(row["size"] / START[axis], row[quantity]) for row in rows if row["axis"] == axis]
            panel.loglog(*zip(*points, strict=True), marker="o", label=axis)
        panel.set(xlabel="size, as a multiple of the paper's", ylabel=label)
        for axis, ticks in ((panel.xaxis, (1 / 40, 1 / 4, 1 / 2, 1, 2)), (panel.yaxis, (0.25, 0.5, 1, 2, 4))):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
            axis.set_ticks(ticks)
            axis.set_ticks([], minor=True)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the figures to this JSON file")
    parser.add_argument("--axis", choices=AXES, help="measure this one alone")
    parser.add_argument("--plot", nargs=2, metavar=("JSON", "PNG"), help="draw figures that were written before")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(point(json.loads(arguments.point), arguments.repeats, arguments.seed)))
    elif arguments.plot:
        plot(*arguments.plot)
    else:
        measure(arguments)
