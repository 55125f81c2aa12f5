"""Training steps of the deep Markov model on an NVIDIA GPU: launched kernel by kernel, and replayed from a CUDA graph.

    python benchmarks/cuda_graphs.py --batch 100

The example's network and optimiser on random chords, 64 steps each, through `fit`, with the ledger's log and all; the
median of the steps after the first hundred, and the seconds of the first step (in which the graph is recorded).
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import lightning
import torch
from dmm_step import DMM
from measuring import arguments_of, report

from seqdisent import AnnealingSchedule
from seqdisent.training import ELBOTraining, fit


class Clock(lightning.Callback):
    """Notes when each step ends."""

    def __init__(self):
        self.times = [time.perf_counter()]

    def on_train_batch_end(self, *_):
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def seconds_of(*, cuda_graph, batch, steps, num_steps):
    """Return the seconds of the first step, and of a later one."""
    network, clock = DMM(), Clock()

    def draw(generator):
        keys = torch.randint(88, (batch, steps, 4), generator=generator)
        return (torch.zeros(batch, steps, 88).scatter(-1, keys, 1.0),)

    training = ELBOTraining(
        network, network.model, network.guide, draw, arguments=tuple, num_steps=num_steps,
        learning_rate=AnnealingSchedule.constant(1e-4), weights={"z": AnnealingSchedule.linear(0.2, 1.0, num_steps)},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        fit(training, Path(folder), cuda_graph=cuda_graph, callbacks=[clock], progress_bar=False, accelerator="gpu")
    durations = [after - before for before, after in itertools.pairwise(clock.times)]
    return durations[0], median(durations[100:])


def main() -> None:
    arguments = arguments_of(__doc__, batch=100, steps=64, num_steps=250)
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU")
    sizes = {"batch": arguments.batch, "steps": arguments.steps, "num_steps": arguments.num_steps}
    found = {name: seconds_of(cuda_graph=graph, **sizes) for name, graph in (("launched", False), ("replayed", True))}
    report("cuda_graphs", arguments, [
        {"way": name, "first step, s": first, "a step, ms": 1000 * later, "times faster": found["launched"][1] / later}
        for name, (first, later) in found.items()
    ])  # fmt: skip


if __name__ == "__main__":
    main()
