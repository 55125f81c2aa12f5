"""A variational recurrent network of polyphonic music (Chung et al., NeurIPS 2015).

    python examples/vrnn.py                        train, then measure the estimates of the likelihood
    python examples/vrnn.py --data nottingham      other music: musedata, piano-midi
    python examples/vrnn.py likelihood RUN --num-particles 1000

Everything reads the state h_t that a recurrent network carries, which has seen all z and x before t. The paper's h is
one step further on: its h_{t-1} is our h_t. It also has a network between z and whatever reads z. When the model goes
on by itself, it reads back the keys that are likelier pressed than not, so that h is a function of z. The command line
is in `command_line.py`, training and estimates in `chorales.py`, data in `music.py`.
"""

from __future__ import annotations

import pyro
import torch
from chorales import MUSIC, MusicPlan, training
from command_line import main
from parts import bernoulli, mlp, normal_mlp, pressed, real_frames, uniform_noise
from settings import Example
from torch import nn

from seqdisent import RecurrentChain, batch_sizes, feedback, shift_steps


class VRNN(nn.Module):
    """p(z_t | h_t) p(x_t | z_t, h_t), q(z_t | x_t, h_t), with h_t = f(h_{t-1}, z_{t-1}, x_{t-1})."""

    def __init__(
        self, frame_shape, latent_dim: int = 32, hidden_dim: int = 200, rnn_dim: int = 300,
    ):  # fmt: skip
        super().__init__()
        (num_keys,) = frame_shape
        self.read = nn.Sequential(mlp(num_keys, hidden_dim), nn.ReLU())
        self.rnn = nn.GRU(latent_dim + hidden_dim, rnn_dim, batch_first=True)
        self.prior = normal_mlp(rnn_dim, hidden_dim, latent_dim)
        self.posterior = normal_mlp(rnn_dim + hidden_dim, hidden_dim, latent_dim)
        self.emission = mlp(latent_dim + rnn_dim, hidden_dim, num_keys)
        self.initial_state = nn.Parameter(torch.zeros(rnn_dim))

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None, history=None):
        num_sequences, num_steps = batch_sizes(frames, num_sequences, num_steps)
        frames, noise = real_frames(frames, mask), None
        with pyro.plate("sequences", num_sequences):
            if frames is None:
                noise = uniform_noise(self.initial_state, num_steps, self.emission[-1].out_features)
                inputs = feedback(self.frame, history, prepare=self.read, noise=noise)
            else:
                inputs = shift_steps(self.read(frames))
            chain = self.chain(self.prior, num_sequences, num_steps, inputs=inputs, mask=mask)
            z = pyro.sample("z", chain)
            logits = self.emission(torch.cat([z, chain.states(z)], -1))
            drawn = None if noise is None else pressed(logits, noise)
            pyro.sample("x", bernoulli(logits, mask, drawn=drawn), obs=frames)

    def guide(self, frames, mask=None):
        seen = self.read(real_frames(frames, mask))
        with pyro.plate("sequences", len(frames)):
            steps = {"inputs": shift_steps(seen), "context": seen, "mask": mask}
            pyro.sample("z", self.chain(self.posterior, *frames.shape[:2], **steps))

    def chain(self, head, num_sequences, num_steps, context=None, **steps):
        state = self.initial_state.expand(num_sequences, -1)
        first = head(state if context is None else torch.cat([state, context[:, 0]], -1))
        return RecurrentChain(
            first, lambda _, read: head(read), num_steps, recurrence=self.rnn, state=state, context=context, **steps
        )

    def frame(self, z, state, noise):
        return pressed(self.emission(torch.cat([z, state], -1)), noise)


EXAMPLE = Example("vrnn", __doc__, MUSIC, VRNN, {"training": training}, plan=MusicPlan, motion=("z",), history=True)

if __name__ == "__main__":
    main(EXAMPLE)
