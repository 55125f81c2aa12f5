"""A contrastively disentangled sequential autoencoder (C-DSVAE: Bai, Wang and Gomes, NeurIPS 2021), on Sprites.

    python examples/cdsvae.py                     train, then measure swaps
    python examples/cdsvae.py --data pendulum     on pendula, which need no file
    python examples/cdsvae.py evaluate RUN        judge, swaps, probes

Model and guide are those of a DSVAE. Beside the bound stand three losses, each with its weight in the plan:

    contrast_f     f should be nearer to f of the same clip, its frames in another order, than to that of other clips
    contrast_z     z should be nearer to z of the same clip in other colours than to that of other clips
    information    the mutual information of f and z_t at each step, estimated by minibatch weighted sampling

The first needs no second view of a clip here: f comes from the average of the frames' features, whatever their order,
so f is drawn a second time. Where a clip has no colours, the second needs a weight of 0. The last is DSVAE's method,
for clips of one length. Data and pictures are in `videos.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import dsvae
import torch
from command_line import main
from dsvae import DSVAE
from parts import real_frames
from settings import Example, Plan
from torch import Tensor
from torch.nn import functional as F
from videos import VIDEOS, recoloured

from seqdisent import overwrite_padding


@dataclass(frozen=True)
class ContrastPlan(Plan):
    """Training in one stage with losses beside the bound."""

    contrast_f: float = 1.0  # weights
    contrast_z: float = 1.0
    information: float = 1.0
    contrast_temperature: float = 0.5


def contrast(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Return, of two views of each clip, (B, D), minus the log-probability of telling which two belong together."""
    similarity = F.cosine_similarity(one.unsqueeze(1), other.unsqueeze(0), dim=-1) / temperature
    return F.cross_entropy(similarity, torch.arange(len(one), device=one.device), reduction="none")


class CDSVAE(DSVAE):
    """A DSVAE and its losses; q(f | x) prod_t q(z_t | x_t)."""

    losses = ("contrast_f", "contrast_z", "information")

    def __init__(
        self, frame_shape, static_dim: int = 64, latent_dim: int = 32, rnn_dim: int = 128, hidden_dim: int = 128,
        feature_dim: int = 256, encoder: tuple[int, ...] | None = None, decoder: tuple[int, ...] | None = None,
    ):  # fmt: skip
        sizes = {"static_dim": static_dim, "latent_dim": latent_dim, "rnn_dim": rnn_dim, "hidden_dim": hidden_dim}
        super().__init__(frame_shape, **sizes, feature_dim=feature_dim, encoder=encoder, decoder=decoder)
        self.temperature = 1.0

    def contrast_f(self, drawn, frames, mask=None):
        again = drawn["f"].distribution.rsample()
        return contrast(drawn["f"].value, again, self.temperature)

    def contrast_z(self, drawn, frames, mask=None):
        seed = int(torch.randint(2**31, ()))
        frames = real_frames(frames, mask)
        if frames.ndim == 5 and frames.shape[2] == 3:
            frames = recoloured(frames.float().cpu(), torch.Generator().manual_seed(seed)).to(frames)
        other = self.motion(self.encoder(frames)).rsample()
        if mask is not None:
            other = overwrite_padding(other, mask)
        z = drawn["z"].value if mask is None else overwrite_padding(drawn["z"].value, mask)
        return contrast(z.flatten(1), other.flatten(1), self.temperature)


def training(network, plan, clips, seed, **options):
    network.temperature = plan.contrast_temperature
    return dsvae.training(network, plan, clips, seed, **options)


EXAMPLE = Example(
    "cdsvae", __doc__, VIDEOS.on("sprites"), CDSVAE, {"training": training}, plan=ContrastPlan, static=("f",),
    motion=("z",),
)  # fmt: skip

if __name__ == "__main__":
    main(EXAMPLE)
