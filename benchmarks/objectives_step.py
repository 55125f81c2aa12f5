"""A training step of the variational recurrent network under each objective.

    python benchmarks/objectives_step.py      the chorales are read from $SEQDISENT_DATA

The network and the batch are those of examples/vrnn.py, preset `cpu`: 20 windows of up to 64 chords of Bach's chorales.
A step is the ledger, the backward pass and Adam's update, with several particles in one run. "the filter's checks" are
what a filter runs before its steps, without gradient, to see whether a step of the model can be run alone.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from statistics import median

import torch
from measuring import arguments_of, ratio, report, time_in_turns

from seqdisent import elbo_terms
from seqdisent.datasets import jsb_chorales
from seqdisent.particles.programs import examined
from seqdisent.particles.steps import runs_alone

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import vrnn as example


def main() -> None:
    arguments = arguments_of(__doc__, particles=4, batch=20, steps=64, repeats=3)
    clips = jsb_chorales(split="train")
    generator = torch.Generator().manual_seed(arguments.seed)
    batch = clips.draw_clips(arguments.batch, generator=generator, num_steps=arguments.steps)
    network = example.VRNN((88,))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-5, fused=True)
    given = network.model, network.guide, batch.frames, batch.mask

    def train(objective, num_particles):
        terms = elbo_terms(
            *given, objective=objective, num_particles=num_particles, vectorize_particles=num_particles > 1
        )
        terms.check_finite()
        optimiser.zero_grad()
        (-terms.bound().sum()).backward()
        optimiser.step()

    def check():
        runs_alone(examined(*given[:2], given[2:], {}, arguments.particles))

    several = {name: partial(train, name, arguments.particles) for name in ("elbo", "iwae", "dreg", "fivo")}
    ways = {"elbo, 1 particle": partial(train, "elbo", 1), **several, "the filter's checks": check}
    seconds = time_in_turns(ways, arguments.repeats)
    rows = [
        {"way": way, "seconds": median(seconds[way]), "times the elbo of 1": ratio(seconds, way, "elbo, 1 particle")}
        for way in ways
    ]
    report("objectives_step", arguments, rows)


if __name__ == "__main__":
    main()
