"""A small model whose training takes a second, and what its runs have logged."""

from __future__ import annotations

import csv

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from seqdisent import AnnealingSchedule, training


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 4), nn.Linear(2, 3)

    def model(self, x, gain=1.0):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(gain * self.decode(z), 1.0, validate_args=False).to_event(1), obs=x)

    def guide(self, x, gain=1.0):
        with pyro.plate("sequences", len(x)):
            loc, scale = self.encode(x).chunk(2, -1)
            scale = nn.functional.softplus(scale)
            pyro.sample("z", dist.Normal(loc, scale, validate_args=False).to_event(1))


class Interrupted(Exception):
    pass


def make(*, stop_at=None, bad_at=None, num_steps=30):
    torch.manual_seed(0)
    network = Linear()
    drawn = []

    def draw(generator):
        if len(drawn) == stop_at:
            raise Interrupted
        batch = torch.randn(5, 3, generator=generator)
        if len(drawn) == bad_at:
            batch[2, 1] = float("nan")
        drawn.append(batch)
        return batch

    module = training.ELBOTraining(
        network,
        network.model,
        network.guide,
        draw,
        num_steps=num_steps,
        learning_rate=AnnealingSchedule.cosine(1e-2, 1e-3, num_steps),
        weights={"z": AnnealingSchedule.linear(0.0, 1.0, 20)},
        inputs={"gain": AnnealingSchedule.linear(0.5, 1.0, 20)},
        arguments=lambda batch: (batch,),
        seed=3,
    )
    return module, drawn


def run(module, folder, **options):
    training.fit(module, folder, checkpoint_every=10, log_every=1, progress_bar=False, accelerator="cpu", **options)


def losses(folder, key="loss"):
    """Return the rows of a run's logs that have a value for `key`, {step: row}."""
    found = {}
    for log in sorted((folder / "logs").glob("*/metrics.csv")):
        with log.open(newline="") as file:
            found |= {int(row["step"]): row for row in csv.DictReader(file) if row.get(key)}
    return found
