"""What else might make a training step faster: VDSM's first stage in several ways, each timed in a process of its own.

    python benchmarks/ways.py

For the paper's sizes (40 experts, 20 sequences of 8 frames) and those of the preset `cpu` (24 narrower experts, 8
sequences of 8 frames): as built; with freed memory kept (environment variables of the C library); in bfloat16
(autocast); with the encoder in channels-last; with Adam not fused. The ways run in turns, `--repeats` times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from measuring import KEEP_MEMORY, report

from seqdisent import elbo_terms

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import vdsm as example

WAYS = ("as built", "memory kept", "memory kept, huge pages", "memory kept, bfloat16", "memory kept, channels-last",
        "memory kept, Adam not fused")  # fmt: skip
STEPS = 7


def seconds_a_step(sizes: str, way: str, seed: int) -> float:
    torch.manual_seed(seed)
    plan, batch = (example.Sizes(40), 20) if sizes == "paper" else (example.EXAMPLE.preset("cpu", "sprites").sizes, 8)
    vdsm, frames = example.VDSM((3, 64, 64), plan), torch.rand(batch, 8, 3, 64, 64)
    if "channels-last" in way:
        vdsm.encoder.to(memory_format=torch.channels_last)
    trained = [p for part in (vdsm.encoder, vdsm.static, vdsm.pose, vdsm.decoder) for p in part.parameters()]
    optimiser = torch.optim.Adam(trained, lr=1e-4, fused="not fused" not in way)
    half = torch.autocast("cpu", torch.bfloat16) if "bfloat16" in way else contextlib.nullcontext()
    seconds = []
    for _ in range(2 + STEPS):
        start = time.perf_counter()
        optimiser.zero_grad()
        with half:
            terms = elbo_terms(vdsm.pretraining_model, vdsm.pretraining_guide, frames)
        (-terms.elbo().sum()).backward()
        optimiser.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the figures to this JSON file")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(seconds_a_step(*arguments.one, arguments.seed)))
        return
    rows = []
    for sizes in ("paper", "cpu"):
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(arguments.repeats):
            for way in WAYS:
                environment = {**os.environ, **(KEEP_MEMORY if "memory kept" in way else {})}
                if "huge pages" in way:
                    environment["THP_MEM_ALLOC_ENABLE"] = "1"  # read by torch
                command = [sys.executable, __file__, "--one", sizes, way, "--seed", str(arguments.seed)]
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                seconds[way].append(json.loads(done.stdout))
        for way in WAYS:
            times_as_built = statistics.median(a / b for a, b in zip(seconds[way], seconds["as built"], strict=True))
            row = {"sizes": sizes, "way": way, "seconds": statistics.median(seconds[way])}
            rows.append({**row, "times as built": times_as_built})
    report("ways", arguments, rows)


if __name__ == "__main__":
    main()
