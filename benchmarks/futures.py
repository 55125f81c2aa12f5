"""Many futures of many sequences by `forecast` against one batched call that is written by hand, without Pyro.

    python benchmarks/futures.py
    python benchmarks/futures.py --samples 1000

A deep Markov model with a gated transition and a guide that reads the frames backward; one thread. By default, 100
futures of 75 sequences of 50 steps, 20 steps ahead. For equal seeds, both ways draw the same latents, which is checked.
Each way also draws the observations.
"""

from __future__ import annotations

from statistics import median

import pyro
import pyro.distributions as dist
import torch
from measuring import arguments_of, ratio, report, time_in_turns
from torch import nn

from seqdisent import Combiner, GatedTransition, IndependentSteps, MarkovChain, batch_sizes, forecast, read_backward

FRAME_DIM, LATENT_DIM, HIDDEN_DIM = 8, 16, 64


class DMM(nn.Module):
    """p(z_t | z_{t-1}) p(x_t | z_t), q(z_t | z_{t-1}, x_t, ..., x_T)."""

    def __init__(self):
        super().__init__()
        self.transition = GatedTransition(LATENT_DIM, HIDDEN_DIM)
        self.rnn = nn.GRU(FRAME_DIM, HIDDEN_DIM, batch_first=True)
        self.combiner = Combiner(LATENT_DIM, HIDDEN_DIM, context_dim=HIDDEN_DIM)
        self.emission = nn.Sequential(nn.Linear(LATENT_DIM, HIDDEN_DIM), nn.ReLU(), nn.Linear(HIDDEN_DIM, FRAME_DIM))

    def start(self, num_sequences):
        return torch.zeros(num_sequences, LATENT_DIM)

    def step(self, z):
        return dist.Normal(self.emission(z), 0.1, validate_args=False).to_event(1)

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = batch_sizes(frames, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            initial = self.transition(self.start(num_sequences))
            z = pyro.sample("z", MarkovChain(initial, self.transition, num_steps, mask=mask))
            pyro.sample("x", IndependentSteps(self.step(z), mask), obs=frames)

    def guide(self, frames, mask=None):
        read = self.combiner.project(read_backward(self.rnn, frames, mask))
        with pyro.plate("sequences", len(frames)):
            initial = self.combiner.step(self.start(len(frames)), read[:, 0])
            pyro.sample("z", MarkovChain(initial, self.combiner.step, frames.shape[1], inputs=read, mask=mask))


def by_hand(network, frames, num_steps, num_samples):
    """Draw everything for (S, B) sequences at once."""
    read = network.combiner.project(read_backward(network.rnn, frames)).unbind(1)
    path = [network.combiner.step(network.start(len(frames)), read[0]).rsample((num_samples,))]
    for x in read[1:]:
        path.append(network.combiner.step(path[-1], x.expand(num_samples, -1, -1)).rsample())
    for _ in range(num_steps):
        path.append(network.transition(path[-1]).rsample())
    x = network.step(torch.stack(path, -2))
    return x, x.sample()


def by_forecast(network, frames, num_steps, num_samples):
    x = forecast(network.model, network.guide, frames, num_steps=num_steps, num_samples=num_samples)["x"]
    return x, x.sample()


@torch.no_grad()
def main() -> None:
    arguments = arguments_of(__doc__, repeats=9, sequences=75, steps=50, ahead=20, samples=100)
    torch.set_num_threads(1)
    network, frames = DMM(), torch.randn(arguments.sequences, arguments.steps, FRAME_DIM)
    ways = {
        name: lambda draw=draw: draw(network, frames, arguments.ahead, arguments.samples)
        for name, draw in (("forecast", by_forecast), ("by hand", by_hand))
    }
    means = []
    for draw in ways.values():
        torch.manual_seed(arguments.seed)
        means.append(draw()[0].mean)
    torch.testing.assert_close(*means)
    seconds = time_in_turns(ways, arguments.repeats)
    rows = [
        {"way": way, "seconds": median(seconds[way]), "times by hand": ratio(seconds, way, "by hand")} for way in ways
    ]
    report("futures", arguments, rows)


if __name__ == "__main__":
    main()
