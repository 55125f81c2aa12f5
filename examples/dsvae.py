"""A disentangled sequential autoencoder (Li and Mandt, ICML 2018), on Sprites.

    python examples/dsvae.py                      train with the factorised posterior, then measure swaps
    python examples/dsvae.py --full               with the full posterior, in which z reads f and all frames
    python examples/dsvae.py --grouped            f is inferred from any clip of the same identity in training
    python examples/dsvae.py --data pendulum      on pendula, which need no file
    python examples/dsvae.py evaluate RUN         judge, swaps, probes

f says who, z_1 ... z_T what; the prior of z is a recurrent network's. The paper infers f with a recurrent network; here
it is from the average of the frames' features, as in VDSM. Nothing in a single clip says whether what does not change
in it (a direction) is who or what. With `--grouped`, as in VDSM's first stage, training knows which clips show the same
identity: f comes from one of them, drawn at random, and tells of the clip's own motion only where that is the clip
itself (on Sprites one time in nine). The command line is in `command_line.py`, data and pictures are in `videos.py`.
"""

from __future__ import annotations

import pyro
import torch
from command_line import main
from parts import bernoulli, mlp, normal_mlp, real_frames, standard_normal, windows
from settings import Example
from torch import nn
from videos import VIDEOS, calibrated_stage, paired_draws

from seqdisent import (
    ConvDecoder,
    ConvEncoder,
    MarkovChain,
    NormalHead,
    RecurrentChain,
    StaticEncoder,
    batch_sizes,
    read_backward,
)
from seqdisent.inference import minibatch_mutual_information


class DSVAE(nn.Module):
    """p(f) p(z_{1:T}) prod_t p(x_t | f, z_t); q(f | x) prod_t q(z_t | x_t), or, full, q(f | x) q(z_{1:T} | f, x)."""

    losses: tuple[str, ...] = ()  # methods that are losses beside the bound; the plan has a weight of each name

    def __init__(
        self, frame_shape, static_dim: int = 64, latent_dim: int = 32, rnn_dim: int = 128, hidden_dim: int = 128,
        feature_dim: int = 256, full: bool = False, grouped: bool = False, encoder: tuple[int, ...] | None = None,
        decoder: tuple[int, ...] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.static_dim, self.rnn_dim, self.full, self.grouped = static_dim, rnn_dim, full, grouped
        self.num_clips = 1  # of the training, for the information
        if len(frame_shape) == 3:
            image = {"image_size": frame_shape[1]}
            self.encoder = ConvEncoder(feature_dim, in_channels=frame_shape[0], channels=encoder, **image)
            self.decoder = ConvDecoder(static_dim + latent_dim, out_channels=frame_shape[0], channels=decoder, **image)
        else:  # a step is a window of a signal
            self.encoder = nn.Sequential(mlp(*frame_shape, 2 * hidden_dim, feature_dim), nn.ReLU())
            self.decoder = mlp(static_dim + latent_dim, hidden_dim, 2 * hidden_dim, *frame_shape)
            self.noise = nn.Parameter(torch.tensor(-2.0))
        self.static = StaticEncoder(feature_dim, static_dim)
        if full:
            self.forward_rnn = nn.LSTM(feature_dim + static_dim, rnn_dim, batch_first=True)
            self.backward_rnn = nn.LSTM(feature_dim + static_dim, rnn_dim, batch_first=True)
            self.rnn = nn.RNN(2 * rnn_dim, rnn_dim, batch_first=True)
            self.motion = NormalHead(rnn_dim, latent_dim)
        else:
            self.motion = normal_mlp(feature_dim, hidden_dim, latent_dim)
        self.prior_rnn, self.prior = nn.LSTM(latent_dim, rnn_dim, batch_first=True), NormalHead(rnn_dim, latent_dim)

    def model(self, frames=None, mask=None, partner=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = batch_sizes(frames, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            f = pyro.sample("f", standard_normal(self.prior.loc.weight, self.static_dim))
            initial = self.prior(f.new_zeros(num_sequences, self.rnn_dim))
            prior = RecurrentChain(initial, lambda _, h: self.prior(h), num_steps, recurrence=self.prior_rnn, mask=mask)
            z = pyro.sample("z", prior)
            latents = torch.cat([f.unsqueeze(-2).expand(*z.shape[:-1], -1), z], -1)
            pyro.sample("x", self.emission(self.decoder(latents), mask), obs=real_frames(frames, mask))

    def emission(self, decoded, mask):
        return windows(decoded, self.noise, mask) if hasattr(self, "noise") else bernoulli(decoded, mask, 3)

    def guide(self, frames, mask=None, partner=None):
        features = self.encoder(real_frames(frames, mask))
        who = (features, mask) if partner is None else (self.encoder(real_frames(*partner)), partner[1])
        with pyro.plate("sequences", len(frames)):
            f = pyro.sample("f", self.static(*who))
            seen = self.read_all(features, f, mask) if self.full else features
            # no step reads the one before, but the sequence is a chain all the same
            initial = self.motion(seen[..., 0, :])
            chain = MarkovChain(initial, lambda _, x: self.motion(x), frames.shape[1], inputs=seen, mask=mask)
            pyro.sample("z", chain)

    def read_all(self, features, f, mask):
        batch, (num_steps, size) = f.shape[:-1], features.shape[-2:]
        f_at_every_step = f.unsqueeze(-2).expand(*batch, num_steps, -1)
        read = torch.cat([features.expand(*batch, num_steps, size), f_at_every_step], -1).flatten(0, -3)
        mask = None if mask is None else mask.expand(*batch, num_steps).flatten(0, -2)
        both_ways = torch.cat([self.forward_rnn(read)[0], read_backward(self.backward_rnn, read, mask)], -1)
        return self.rnn(both_ways)[0].unflatten(0, batch)

    def information(self, drawn, frames, mask=None):
        """I(f; z_t), summed over the steps: a loss of C-DSVAE's and S3VAE's."""
        if mask is not None:
            raise ValueError("plan.information: got clips of different lengths, expected 0 for them")
        f, z = drawn["f"], drawn["z"]
        of_z = z.distribution.log_prob_per_step(z.value.unsqueeze(1))
        of_f = f.distribution.log_prob(f.value.unsqueeze(1)).unsqueeze(-1).expand_as(of_z)
        return minibatch_mutual_information(of_f, of_z, self.num_clips).sum(-1)


def training(network, plan, clips, seed, **options):
    network.num_clips = len(clips)
    options |= {"losses": {name: getattr(plan, name) for name in network.losses}}
    if network.grouped:
        options |= {"draw": paired_draws(clips, plan.batch_size, plan.clip_length), "arguments": tuple}
    return calibrated_stage(network, plan, clips, seed, **options)


EXAMPLE = Example(
    "dsvae",
    __doc__,
    VIDEOS.on("sprites"),
    DSVAE,
    {"training": training},
    static=("f",),
    motion=("z",),
    flags={
        "full": ("the full posterior, in which z reads f and all frames", {"full": True}),
        "grouped": ("f is inferred from any clip of the same identity in training", {"grouped": True}),
    },
)

if __name__ == "__main__":
    main(EXAMPLE)
