"""A recurrent state-space model (Hafner et al., ICML 2019), on swinging pendula.

    python examples/rssm.py                       train, then forecast 40 frames beyond what was seen
    python examples/rssm.py forecast RUN --from CLIP --num-steps 40

A recurrent network carries h_t, which has seen all z and all actions before t; prior, posterior and frames read it. The
KL term is balanced (Hafner et al., ICLR 2021): it trains the prior more than the posterior, and no step's is pushed
below its free nats. Released code has a layer before the recurrent network; here it reads {z, a} itself. The command
line is in `command_line.py`, data and pictures are in `videos.py`.
"""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from command_line import main
from parts import bernoulli, normal_mlp, real_frames
from settings import Example
from torch import nn
from torch.distributions import kl_divergence
from videos import VIDEOS, calibrated_stage

from seqdisent import ConvDecoder, ConvEncoder, RecurrentChain, batch_sizes, shift_steps


class RSSM(nn.Module):
    """p(z_t | h_t) p(x_t | h_t, z_t), q(z_t | h_t, x_t), with h_t = f(h_{t-1}, z_{t-1}, a_{t-1}); a are actions."""

    def __init__(
        self, frame_shape, latent_dim: int = 16, rnn_dim: int = 128, hidden_dim: int = 128, feature_dim: int = 128,
        action_dim: int = 0, encoder: tuple[int, ...] | None = None, decoder: tuple[int, ...] | None = None,
    ):  # fmt: skip
        super().__init__()
        channels, image_size, _ = frame_shape
        self.encoder = ConvEncoder(feature_dim, in_channels=channels, image_size=image_size, channels=encoder)
        self.rnn = nn.GRU(latent_dim + action_dim, rnn_dim, batch_first=True)
        self.prior = normal_mlp(rnn_dim, hidden_dim, latent_dim)
        self.posterior = normal_mlp(rnn_dim + feature_dim, hidden_dim, latent_dim)
        self.decoder = ConvDecoder(latent_dim + rnn_dim, out_channels=channels, image_size=image_size, channels=decoder)
        self.initial_state = nn.Parameter(torch.zeros(rnn_dim))

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None, actions=None):
        num_sequences, num_steps = batch_sizes(frames, num_sequences, num_steps)
        self.check(actions, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            chain = self.chain(self.prior, num_sequences, num_steps, actions, mask)
            z = pyro.sample("z", chain)
            logits = self.decoder(torch.cat([z, chain.states(z)], -1))
            pyro.sample("x", bernoulli(logits, mask, 3), obs=real_frames(frames, mask))

    def guide(self, frames, mask=None, *, actions=None):
        features = self.encoder(real_frames(frames, mask))
        self.check(actions, *frames.shape[:2])
        with pyro.plate("sequences", len(frames)):
            pyro.sample("z", self.chain(self.posterior, *frames.shape[:2], actions, mask, features))

    def check(self, actions, num_sequences, num_steps):
        size = self.rnn.input_size - self.prior[-1].loc.out_features
        found = None if actions is None else tuple(actions.shape)
        wrong = found is None or found[0] != num_sequences or found[1] < num_steps or found[2:] != (size,)
        if wrong if size else found is not None:
            wanted = f"({num_sequences}, {num_steps} or more, {size})" if size else "none"
            raise ValueError(f"actions: got {found}, expected {wanted}")

    def chain(self, head, num_sequences, num_steps, actions, mask, context=None):
        state = self.initial_state.expand(num_sequences, -1)
        initial = head(state if context is None else torch.cat([state, context[:, 0]], -1))
        return RecurrentChain(
            initial, lambda _, read: head(read), num_steps, recurrence=self.rnn, state=state,
            inputs=None if actions is None else shift_steps(actions[:, :num_steps]), context=context, mask=mask,
        )  # fmt: skip


def balanced_bound(terms, weights, *, to_prior=0.8, free_nats=0.5):
    """The bound with its KL term balanced between prior and posterior, and no step's counted below the free nats."""
    q, p = terms.conditionals["z"]
    pairs = [(q.initial, p.initial)] if q.steps is None else [(q.initial, p.initial), (q.steps, p.steps)]
    trains_p = torch.cat([kl_divergence(_constant(a), b).reshape(-1, terms.num_sequences) for a, b in pairs])
    trains_q = torch.cat([kl_divergence(a, _constant(b)).reshape(-1, terms.num_sequences) for a, b in pairs])
    kl = (to_prior * trains_p + (1 - to_prior) * trains_q).T.clamp(min=free_nats)
    kl = torch.where(terms.real_steps["z"], kl, 0.0)
    return terms.elbo({**weights, "z": 0.0}) - weights.get("z", 1.0) * kl.sum(-1)


def _constant(normal):
    return dist.Normal(normal.mean.detach(), normal.stddev.detach(), validate_args=False).to_event(1)


EXAMPLE = Example(
    "rssm", __doc__, VIDEOS, RSSM, {"training": partial(calibrated_stage, objective=balanced_bound)}, motion=("z",)
)

if __name__ == "__main__":
    main(EXAMPLE)
