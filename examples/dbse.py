"""Static information from a single sequence element (DBSE: Berman, Naiman, Arbiv, Fadlon, Azencot, ICML 2024), Sprites.

    python examples/dbse.py                      train, then measure swaps
    python examples/dbse.py --data pendulum      on pendula, which need no file
    python examples/dbse.py evaluate RUN         judge, swaps, probes

The model is that of a DSVAE, and so is the bound; what keeps who and what apart is how they are inferred. f comes from
the first step alone, so it sees nothing that happens later. z comes from how the features of each step differ from
those of the first, read in both directions: where nothing moves, z sees nothing of what stands there. Where something
moves, the differences may still tell how it looks; and what a single frame shows, such as the direction in which a
character looks, f may take for who. The one loss beside the bound, `first_step` in the plan, has the first step
explained once more. Data and pictures are in `videos.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import dsvae
import pyro
import torch
from command_line import main
from dsvae import DSVAE
from parts import real_frames
from settings import Example, Plan
from torch import nn
from videos import VIDEOS

from seqdisent import MarkovChain, NormalHead, read_backward


@dataclass(frozen=True)
class FirstStepPlan(Plan):
    """Training in one stage with a loss beside the bound."""

    first_step: float = 0.2  # weight; the released code has 1 to the 5 of the whole sequence


class DBSE(DSVAE):
    """A DSVAE with another guide; q(f | x_1) prod_t q(z_t | the features of x_{1:T} minus those of x_1)."""

    losses = ("first_step",)

    def __init__(
        self, frame_shape, static_dim: int = 64, latent_dim: int = 32, rnn_dim: int = 128, hidden_dim: int = 128,
        feature_dim: int = 256, encoder: tuple[int, ...] | None = None, decoder: tuple[int, ...] | None = None,
    ):  # fmt: skip
        sizes = {"static_dim": static_dim, "latent_dim": latent_dim, "rnn_dim": rnn_dim, "hidden_dim": hidden_dim}
        super().__init__(frame_shape, **sizes, feature_dim=feature_dim, encoder=encoder, decoder=decoder)
        self.forward_rnn = nn.LSTM(feature_dim, rnn_dim, batch_first=True)
        self.backward_rnn = nn.LSTM(feature_dim, rnn_dim, batch_first=True)
        self.motion = NormalHead(2 * rnn_dim, latent_dim)

    def guide(self, frames, mask=None):
        features = self.encoder(real_frames(frames, mask))
        first = features[:, :1]
        change = features - first
        seen = torch.cat([self.forward_rnn(change)[0], read_backward(self.backward_rnn, change, mask)], -1)
        with pyro.plate("sequences", len(frames)):
            pyro.sample("f", self.static(first))
            # no step reads the one before, but the sequence is a chain all the same
            initial = self.motion(seen[:, 0])
            chain = MarkovChain(initial, lambda _, x: self.motion(x), frames.shape[1], inputs=seen, mask=mask)
            pyro.sample("z", chain)

    def first_step(self, drawn, frames, mask=None):
        """Minus the log-likelihood of the first step."""
        latents = torch.cat([drawn["f"].value.unsqueeze(-2), drawn["z"].value[..., :1, :]], -1)
        return -self.emission(self.decoder(latents), None).log_prob(frames[:, :1])


EXAMPLE = Example(
    "dbse", __doc__, VIDEOS.on("sprites"), DBSE, {"training": dsvae.training}, plan=FirstStepPlan, static=("f",),
    motion=("z",),
)  # fmt: skip

if __name__ == "__main__":
    main(EXAMPLE)
