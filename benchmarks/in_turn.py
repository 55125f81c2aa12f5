"""A training step here and in another checkout, in turn: CPU seconds of one thread, which other work hardly changes.

    git worktree add ../before 7d378f3
    python benchmarks/in_turn.py ../before

VDSM's first and second stage, Adam included, and the blended decoder alone, at the paper's sizes: 20 sequences of 8
frames, 40 experts. Each turn is a process of its own; of its steps, the median counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def measure(tree: Path, num_steps: int, seed: int) -> dict[str, float]:
    """Return CPU seconds a step with the library and the example of a checkout."""
    sys.path[:0] = [str(tree), str(tree / "examples")]
    import torch
    import vdsm as example

    from seqdisent import elbo_terms

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    vdsm = example.VDSM((3, 64, 64), example.Sizes(num_experts=40))
    frames, latents = torch.rand(20, 8, 3, 64, 64), torch.randn(20, 8, 70)
    weights = torch.rand(20, 40).softmax(-1)
    found = {}

    def clock(name: str, loss: Callable[[], torch.Tensor]) -> None:
        optimizer = torch.optim.Adam([p for p in vdsm.parameters() if p.requires_grad], fused=True)
        seconds = []
        for _ in range(num_steps + 1):
            start = time.process_time()
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            seconds.append(time.process_time() - start)
        found[name] = statistics.median(seconds[1:])

    clock("stage 1", lambda: -elbo_terms(vdsm.pretraining_model, vdsm.pretraining_guide, frames).elbo().sum())
    clock("blended decoder", lambda: vdsm.decoder(latents, weights).sum())
    vdsm.encoder.requires_grad_(False)
    vdsm.decoder.requires_grad_(False)
    features = vdsm.encoder(frames)
    clock("stage 2", lambda: -elbo_terms(vdsm.model, vdsm.guide, frames, None, features).elbo().sum())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="another checkout of this repository")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.other, options.steps, options.seed)))
        return
    trees = {"there": options.other.resolve(), "here": HERE}
    for turn in range(options.turns):
        for name, tree in trees.items():
            command = [sys.executable, __file__, str(tree), "--one", "--steps", str(options.steps)]
            environment = {**os.environ, "PYTHONPATH": str(tree)}
            output = subprocess.run(
                [*command, "--seed", str(options.seed)], env=environment, check=True, capture_output=True, text=True
            ).stdout
            numbers = json.loads(output.splitlines()[-1])
            print(f"turn {turn + 1}, {name:5}", *(f"{key} {value:.2f} s" for key, value in numbers.items()), sep="  ")


if __name__ == "__main__":
    main()
