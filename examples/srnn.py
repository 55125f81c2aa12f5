"""A stochastic recurrent network of polyphonic music (Fraccaro et al., NeurIPS 2016).

    python examples/srnn.py                        train, then measure the estimates of the likelihood
    python examples/srnn.py --data nottingham      other music: musedata, piano-midi
    python examples/srnn.py likelihood RUN --num-particles 1000

A recurrent network reads the chords alone, d_t = f(d_{t-1}, x_{t-1}); above it z is a chain of its own. The guide
smooths: a second network reads {d_t, x_t} from the end, and the location of q is that of p plus a correction. When the
model goes on by itself, it reads back the keys that it draws; of means, those that are likelier pressed than not. The
command line is in `command_line.py`, training and estimates in `chorales.py`, data in `music.py`.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from chorales import MUSIC, MusicPlan, training
from command_line import main
from parts import bernoulli, mlp, normal_mlp, pressed, real_frames, uniform_noise
from settings import Example
from torch import nn

from seqdisent import MarkovChain, RecurrentChain, batch_sizes, feedback, read_backward, shift_steps


class SRNN(nn.Module):
    """p(z_t | z_{t-1}, d_t) p(x_t | z_t, d_t), and q(z_t | z_{t-1}, d_t, a_t) with a_t = g(a_{t+1}, {d_t, x_t})."""

    def __init__(
        self, frame_shape, latent_dim: int = 32, hidden_dim: int = 200, rnn_dim: int = 300,
    ):  # fmt: skip
        super().__init__()
        (num_keys,) = frame_shape
        self.latent_dim, self.rnn_dim = latent_dim, rnn_dim
        self.forward_rnn = nn.GRU(num_keys, rnn_dim, batch_first=True)
        self.backward_rnn = nn.GRU(rnn_dim + num_keys, rnn_dim, batch_first=True)
        self.prior = normal_mlp(latent_dim + rnn_dim, hidden_dim, latent_dim)
        self.correction = normal_mlp(latent_dim + rnn_dim, hidden_dim, latent_dim)
        self.emission = mlp(latent_dim + rnn_dim, hidden_dim, num_keys)
        self.z_before, self.initial_state = nn.Parameter(torch.zeros(latent_dim)), nn.Parameter(torch.zeros(rnn_dim))

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None, history=None):
        num_sequences, num_steps = batch_sizes(frames, num_sequences, num_steps)
        frames, noise = real_frames(frames, mask), None
        z_before, state = (start.expand(num_sequences, -1) for start in (self.z_before, self.initial_state))
        with pyro.plate("sequences", num_sequences):
            if frames is None:
                noise = uniform_noise(self.initial_state, num_steps, self.emission[-1].out_features)
                inputs = feedback(self.frame, history, noise=noise)
            else:
                inputs = shift_steps(frames)
            chain = RecurrentChain(
                self.transition(z_before, state), self.transition, num_steps, recurrence=self.forward_rnn, state=state,
                inputs=inputs, reads_latent=False, mask=mask,
            )  # fmt: skip
            z = pyro.sample("z", chain)
            logits = self.emission(torch.cat([z, chain.states(z)], -1))
            drawn = None if noise is None else pressed(logits, noise)
            pyro.sample("x", bernoulli(logits, mask, drawn=drawn), obs=frames)

    def guide(self, frames, mask=None):
        frames = real_frames(frames, mask)
        z_before, state = (start.expand(len(frames), -1) for start in (self.z_before, self.initial_state))
        later, _ = self.forward_rnn(frames, state[None].contiguous())
        d = torch.cat([state[:, None], later[:, :-1]], 1)
        steps = torch.cat([d, read_backward(self.backward_rnn, torch.cat([d, frames], -1), mask)], -1)
        with pyro.plate("sequences", len(frames)):
            initial = self.posterior(z_before, steps[:, 0])
            pyro.sample("z", MarkovChain(initial, self.posterior, frames.shape[1], inputs=steps, mask=mask))

    def transition(self, z_prev, d):
        return self.prior(torch.cat([z_prev, d.expand(*z_prev.shape[:-1], -1)], -1))

    def posterior(self, z_prev, step):
        d, a = step.split(self.rnn_dim, -1)
        corrected = self.correction(torch.cat([z_prev, a], -1))
        loc = self.transition(z_prev, d).mean + corrected.mean
        return dist.Normal(loc, corrected.stddev, validate_args=False).to_event(1)

    def frame(self, z, d, noise):
        return pressed(self.emission(torch.cat([z, d], -1)), noise)


EXAMPLE = Example("srnn", __doc__, MUSIC, SRNN, {"training": training}, plan=MusicPlan, motion=("z",), history=True)

if __name__ == "__main__":
    main(EXAMPLE)
