"""A deep Markov model of polyphonic music (Krishnan, Shalit and Sontag, AAAI 2017).

    python examples/dmm.py                        train, then measure the estimates of the likelihood
    python examples/dmm.py --preset short         for a quarter of the steps
    python examples/dmm.py --plan.transposition 6 --plan.sizes.dropout 0.1
    python examples/dmm.py --flow                 with an inverse autoregressive flow in the guide
    python examples/dmm.py --flow --plan.objective stl        likewise, with the path derivative
    python examples/dmm.py --data nottingham      other music: musedata, piano-midi
    python examples/dmm.py likelihood RUN --num-particles 1000

Chords x_t are 88 keys, each pressed or not. The command line is in `command_line.py`, data in
`music.py`, estimates and pictures in `chorales.py`.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from chorales import MUSIC, MusicPlan, training
from command_line import main
from parts import bernoulli, mlp, real_frames
from pyro.distributions.transforms import affine_autoregressive
from settings import Example
from torch import nn

from seqdisent import Combiner, GatedTransition, MarkovChain, batch_sizes, read_backward


def flow(latent_dim):
    """An inverse autoregressive flow that starts near the identity: the guide starts near the one without it."""
    made = affine_autoregressive(latent_dim, [latent_dim])
    with torch.no_grad():
        for parameter in made.arn.layers[-1].parameters():
            parameter.mul_(0.01)
    return made


class DMM(nn.Module):
    """p(z_1) prod_t p(z_t | z_{t-1}) p(x_t | z_t), and structured inference (ST-R): q(z_t | z_{t-1}, x_{t:T})."""

    def __init__(
        self, frame_shape, latent_dim: int = 100, transition_dim: int = 200, rnn_dim: int = 600,
        emission_dim: int = 100, num_flows: int = 0, dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        (num_keys,) = frame_shape
        self.transition = GatedTransition(latent_dim, transition_dim)
        self.emission = mlp(latent_dim, emission_dim, emission_dim, num_keys, dropout=dropout)
        self.dropout = nn.Dropout(dropout)  # of the chords that the guide reads; the library refuses it in a transition
        self.rnn = nn.RNN(num_keys, rnn_dim, nonlinearity="relu", batch_first=True)
        self.combiner = Combiner(latent_dim, rnn_dim, context_dim=rnn_dim)
        self.flows = nn.ModuleList(flow(latent_dim) for _ in range(num_flows))
        self.z_before = nn.ParameterDict({name: torch.zeros(latent_dim) for name in ("prior", "posterior")})

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = batch_sizes(frames, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            initial = self.transition(self.z_before["prior"].expand(num_sequences, -1))
            z = pyro.sample("z", MarkovChain(initial, self.transition, num_steps, mask=mask))
            pyro.sample("x", bernoulli(self.emission(z), mask), obs=real_frames(frames, mask))

    def guide(self, frames, mask=None):
        futures = self.combiner.project(read_backward(self.rnn, self.dropout(frames), mask))  # 0 at padding
        with pyro.plate("sequences", len(frames)):
            initial = self.posterior(self.z_before["posterior"].expand(len(frames), -1), futures[:, 0])
            pyro.sample("z", MarkovChain(initial, self.posterior, frames.shape[1], inputs=futures, mask=mask))

    def posterior(self, z_prev, future):
        normal = self.combiner.step(z_prev, future)
        return dist.TransformedDistribution(normal, list(self.flows)) if self.flows else normal


EXAMPLE = Example(
    "dmm", __doc__, MUSIC, DMM, {"training": training}, plan=MusicPlan, motion=("z",),
    flags={"flow": ("an inverse autoregressive flow in the guide", {"num_flows": 1})},
)  # fmt: skip

if __name__ == "__main__":
    main(EXAMPLE)
