"""A training step of a deep Markov model against the same model with one Pyro site per time step.

    python benchmarks/dmm_step.py
    python benchmarks/dmm_step.py --compile 1      the guide's step through torch.compile
    python benchmarks/dmm_step.py --parts 1        where our step's time goes

The sizes of Krishnan et al. (2017) on chorales: 100 latent and 600 hidden units, 88 keys; 20 ragged sequences of up to
129 steps. All ways train the example's network with the same optimiser on the same data and, for equal seeds, with the
same noise, and the losses are checked to be equal. The floor is the recurrent network of the guide alone, forward and
backward: whatever the rest costs, a step takes longer than that.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from statistics import median

import pyro
import pyro.distributions as dist
import torch
from measuring import arguments_of, ratio, report, time_in_turns
from pyro.infer import TraceMeanField_ELBO

from seqdisent import MarkovChain, elbo_terms, read_backward

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import dmm as example


class DMM(example.DMM):
    """The example's, and the same with a site for every step, as one writes it with Pyro alone."""

    def __init__(self, **sizes):
        super().__init__((88,), **sizes)

    def first(self, which, num_sequences):
        return self.z_before[which].expand(num_sequences, -1)

    def looped_model(self, rolls, mask):
        with pyro.plate("sequences", len(rolls)):
            z = self.first("prior", len(rolls))
            for t in range(rolls.shape[1]):
                z = pyro.sample(f"z_{t}", self.transition(z).mask(mask[:, t]))
                keys = dist.Bernoulli(logits=self.emission(z), validate_args=False).to_event(1)
                pyro.sample(f"x_{t}", keys.mask(mask[:, t]), obs=rolls[:, t])

    def looped_guide(self, rolls, mask, *, projected=False):
        futures = read_backward(self.rnn, rolls, mask)
        step = self.combiner.step if projected else self.combiner
        contexts = (self.combiner.project(futures) if projected else futures).unbind(1)
        with pyro.plate("sequences", len(rolls)):
            z = self.first("posterior", len(rolls))
            for t in range(rolls.shape[1]):
                z = pyro.sample(f"z_{t}", step(z, contexts[t]).mask(mask[:, t]))


def some_chorales(num_sequences, num_steps):
    """Random chords of four keys; the first sequence is the longest."""
    lengths = torch.randint(num_steps // 2, num_steps + 1, (num_sequences, 1))
    lengths[0] = num_steps
    mask = torch.arange(num_steps) < lengths
    rolls = torch.zeros(num_sequences, num_steps, 88).scatter(-1, torch.randint(88, (num_sequences, num_steps, 4)), 1.0)
    return torch.where(mask[..., None], rolls, 0.0), mask


def parts_of(network, rolls, mask):
    """Return three parts of a training step, each forward and backward."""
    futures = read_backward(network.rnn, rolls, mask).detach().requires_grad_()
    contexts = network.combiner.project(futures).detach().requires_grad_()

    def walk():
        initial = network.posterior(network.first("posterior", len(rolls)), contexts[:, 0])
        chain = MarkovChain(initial, network.posterior, rolls.shape[1], inputs=contexts, mask=mask)
        chain.rsample_with_conditionals().path.sum().backward()

    return {
        "the recurrent network": lambda: read_backward(network.rnn, rolls, mask).sum().backward(),
        "the projection of its outputs": lambda: network.combiner.project(futures).sum().backward(),
        "the walk": walk,
    }


def report_parts(arguments, ways):
    """Print the seconds of each part and its share of the whole step, which comes first in `ways`."""
    seconds = time_in_turns(ways, arguments.repeats)
    whole, *parts = ways
    seconds["the rest"] = [of_all - sum(of_parts) for of_all, *of_parts in zip(*seconds.values(), strict=True)]
    report("dmm_step", arguments, [
        {"part": part, "seconds": median(seconds[part]), "share": ratio(seconds, part, whole)}
        for part in (*parts, "the rest", whole)
    ])  # fmt: skip


def main() -> None:
    arguments = arguments_of(__doc__, batch=20, steps=129, compile=0, parts=0)
    rolls, mask = some_chorales(arguments.batch, arguments.steps)
    network = DMM()
    if arguments.compile:
        network.combiner.step = torch.compile(network.combiner.step)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-5, fused=True)

    def our_loss():
        terms = elbo_terms(network.model, network.guide, rolls, mask)
        terms.check_finite()
        return -terms.elbo().sum()

    def looped_loss(guide=network.looped_guide):
        return TraceMeanField_ELBO().differentiable_loss(network.looped_model, guide, rolls, mask)

    def projected_loss():
        return looped_loss(partial(network.looped_guide, projected=True))

    def train(loss):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()

    parts = parts_of(network, rolls, mask)
    if arguments.parts:
        report_parts(arguments, {"a step": lambda: train(our_loss), **parts, "Adam": optimiser.step})
        return
    losses = []
    for loss in (our_loss, looped_loss, projected_loss):
        torch.manual_seed(arguments.seed)
        losses.append(loss())
    for other in losses[1:]:
        torch.testing.assert_close(losses[0], other)
    ways = {
        "ours": lambda: train(our_loss),
        "one Pyro site a step": lambda: train(looped_loss),
        "... contexts projected at once": lambda: train(projected_loss),
        "the recurrent network alone": parts["the recurrent network"],
    }
    seconds = time_in_turns(ways, arguments.repeats)
    rows = [
        {
            "way": way,
            "seconds": median(seconds[way]),
            "times the recurrent network": ratio(seconds, way, "the recurrent network alone"),
            "times faster than one site a step": ratio(seconds, "one Pyro site a step", way),
        }
        for way in ways
    ]
    report("dmm_step", arguments, rows)


if __name__ == "__main__":
    main()
