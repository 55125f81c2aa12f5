"""A self-supervised sequential VAE (S3VAE: Zhu, Min, Kadav and Graf, CVPR 2020), on Sprites.

    python examples/s3vae.py                      train, then measure swaps
    python examples/s3vae.py --data pendulum      on pendula, which need no file
    python examples/s3vae.py evaluate RUN         judge, swaps, probes

Model and guide are those of a DSVAE. Beside the bound stand three losses, each with its weight in the plan:

    consistency    a triplet: f nearer to f of the same clip, its frames in another order, than to f of another clip
    motion_target  where the clip moves, among nine parts of the frame, should be told from z_t
    information    the mutual information of f and z_t at each step, estimated by minibatch weighted sampling

The paper's motion target comes from a network for optical flow. Here it comes from the frames: where two frames in a
row differ most. As f comes from the average of the frames' features, whatever their order, f is drawn a second time
where the paper shuffles. The last loss is DSVAE's method, for clips of one length. Data and pictures: `videos.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import dsvae
import torch
from command_line import main
from dsvae import DSVAE
from parts import mlp, real_frames
from settings import Example, Plan
from torch import Tensor
from torch.nn import functional as F
from videos import VIDEOS

PARTS, MOVING = 3, 3  # a frame is cut into 3 x 3 parts, and three of them are where it moves


@dataclass(frozen=True)
class SelfSupervisedPlan(Plan):
    """Training in one stage with losses beside the bound."""

    consistency: float = 100.0  # weight of the triplet
    motion_target: float = 10.0  # weight of the cross-entropy of the moving parts
    information: float = 1.0  # weight of the mutual information
    margin: float = 1.0


def moving_parts(frames: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return (B, T, 9) of frames (B, T, C, H, W), or of windows (B, T, X): 1 for the three parts that change most.

    A step is compared with the next, a clip's last one with the one before. A part that stays as it is has 0.
    """
    change = frames.diff(dim=1).abs()
    before, after = (torch.cat(steps, 1) for steps in ([change[:, :1], change], [change, change[:, -1:]]))
    if mask is not None:
        goes_on = F.pad(mask[:, 1:], (0, 1)).view(*mask.shape, *[1] * (frames.ndim - 2))
        after = torch.where(goes_on, after, before)
    change = after.flatten(0, 1)
    if frames.ndim == 5:
        parts = F.adaptive_avg_pool2d(change.mean(1), PARTS).flatten(1)
    else:
        parts = F.adaptive_avg_pool1d(change, PARTS * PARTS)
    moving = torch.zeros_like(parts).scatter_(1, parts.topk(MOVING, 1).indices, 1.0)
    return (moving * (parts > 0)).unflatten(0, frames.shape[:2])


class S3VAE(DSVAE):
    """A DSVAE and its losses; q(f | x) prod_t q(z_t | x_t)."""

    losses = ("consistency", "motion_target", "information")

    def __init__(
        self, frame_shape, static_dim: int = 64, latent_dim: int = 32, rnn_dim: int = 128, hidden_dim: int = 128,
        feature_dim: int = 256, encoder: tuple[int, ...] | None = None, decoder: tuple[int, ...] | None = None,
    ):  # fmt: skip
        sizes = {"static_dim": static_dim, "latent_dim": latent_dim, "rnn_dim": rnn_dim, "hidden_dim": hidden_dim}
        super().__init__(frame_shape, **sizes, feature_dim=feature_dim, encoder=encoder, decoder=decoder)
        self.moving = mlp(latent_dim, hidden_dim, PARTS * PARTS)
        self.margin = 1.0

    def consistency(self, drawn, frames, mask=None):
        f = drawn["f"].value
        again, other = drawn["f"].distribution.rsample(), f.roll(1, -2)
        return F.triplet_margin_loss(f, again, other, margin=self.margin, reduction="none")

    def motion_target(self, drawn, frames, mask=None):
        target = moving_parts(real_frames(frames, mask), mask)
        loss = F.binary_cross_entropy_with_logits(self.moving(drawn["z"].value), target, reduction="none").sum(-1)
        return loss.mean(1) if mask is None else loss.where(mask, 0.0).sum(1) / mask.sum(1)


def training(network, plan, clips, seed, **options):
    network.margin = plan.margin
    return dsvae.training(network, plan, clips, seed, **options)


EXAMPLE = Example(
    "s3vae", __doc__, VIDEOS.on("sprites"), S3VAE, {"training": training}, plan=SelfSupervisedPlan, static=("f",),
    motion=("z",),
)  # fmt: skip

if __name__ == "__main__":
    main(EXAMPLE)
