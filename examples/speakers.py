"""VDSM's idea on one-dimensional signals: who is speaking, and what, without a label.

    python examples/speakers.py                   train on signals that it generates itself, then measure swaps

A step is a window of the signal, and the decoder a bank of networks for windows, blended once per sequence by who is
speaking. The command line is in `command_line.py`, the signals and their pictures in `signals.py`, the measures in
`videos.py`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from command_line import main, single_stage
from parts import mlp, real_frames, standard_normal, windows
from settings import Example
from signals import SIGNALS, STEPS
from torch import nn

from seqdisent import (
    GatedTransition,
    MarkovChain,
    MixtureOfExperts,
    NormalHead,
    StaticEncoder,
    batch_sizes,
)


class Speakers(nn.Module):
    """p(s) p(z_1) prod_t p(z_t | z_{t-1}) p(x_t | s, z_t): s blends the experts that turn z_t into a window."""

    def __init__(
        self, frame_shape, num_experts: int = 8, latent_dim: int = 2, hidden_dim: int = 128, temperature: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        (window,) = frame_shape
        self.num_experts, self.latent_dim, self.temperature = num_experts, latent_dim, temperature
        self.encoder = nn.Sequential(mlp(window, 2 * hidden_dim, hidden_dim), nn.ReLU())
        self.static = StaticEncoder(hidden_dim, num_experts, initial_scale=0.1)
        self.pose = NormalHead(hidden_dim, latent_dim)
        self.transition = GatedTransition(latent_dim, hidden_dim)
        self.decoder = MixtureOfExperts(lambda: mlp(latent_dim, hidden_dim, 2 * hidden_dim, window), num_experts)
        self.noise = nn.Parameter(torch.tensor(-2.0))  # of a window; its softplus is a standard deviation

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None, ordered=True):
        num_sequences, num_steps = batch_sizes(frames, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            prior = dist.Normal(self.noise.new_zeros(self.num_experts), self.num_experts**-0.5).to_event(1)
            s = pyro.sample("s", prior)
            initial = standard_normal(s, num_sequences, self.latent_dim)
            step = self.transition if ordered else lambda z_prev: standard_normal(z_prev, *z_prev.shape)
            z = pyro.sample("z", MarkovChain(initial, step, num_steps, mask=mask))
            decoded = self.decoder(z, torch.softmax(s / self.temperature, -1))
            pyro.sample("x", windows(decoded, self.noise, mask), obs=real_frames(frames, mask))

    def guide(self, frames, mask=None):
        features = self.encoder(real_frames(frames, mask))
        with pyro.plate("sequences", len(frames)):
            pyro.sample("s", self.static(features, mask))
            # no step reads the one before, but the sequence is a chain all the same
            initial = self.pose(features[:, 0])
            chain = MarkovChain(initial, lambda _, x: self.pose(x), frames.shape[1], inputs=features, mask=mask)
            pyro.sample("z", chain)


# Training, as VDSM's: with every window on its own, a voice that is in z is paid for in each, in s once


def unordered(speakers, plan, clips, seed):
    speakers.transition.requires_grad_(False)
    draw = partial(clips.draw_groups, plan.batch_size, STEPS)
    return single_stage(speakers, plan, clips, seed, model=partial(speakers.model, ordered=False), draw=draw)


def dynamics(speakers, plan, clips, seed):
    speakers.requires_grad_(False)
    speakers.transition.requires_grad_(True)
    return single_stage(speakers, replace(plan, num_steps=(plan.num_steps + 2) // 3, annealed={}), clips, seed + 1)


EXAMPLE = Example(
    "speakers", __doc__, SIGNALS, Speakers, {"unordered": unordered, "dynamics": dynamics}, static=("s",),
    motion=("z",),
)  # fmt: skip

if __name__ == "__main__":
    main(EXAMPLE)
