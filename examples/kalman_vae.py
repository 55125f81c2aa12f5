"""A linear-Gaussian chain seen through a learnt emission, after the Kalman VAE (Fraccaro et al., NeurIPS 2017).

    python examples/kalman_vae.py                 train on pendula, then forecast 40 frames beyond what was seen
    python examples/kalman_vae.py forecast RUN --from CLIP --num-steps 40

Every frame has a code a_t; codes are what a linear-Gaussian state-space model emits. Given the codes, the posterior of
its states is known exactly: the guide samples a from the frames and then z from that posterior, so that log p(a, z)
less log q(z | a) is log p(a), the Kalman filter's evidence, whatever z was drawn. The paper blends several linear
dynamics by the codes; here there is one. The command line is in `command_line.py`, data and pictures in `videos.py`.
"""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from command_line import main
from parts import bernoulli, real_frames
from settings import Example
from torch import nn
from torch.nn.functional import softplus
from videos import VIDEOS, calibrated_stage

from seqdisent import ConvDecoder, ConvEncoder, IndependentSteps, LinearGaussianChain, NormalHead, batch_sizes
from seqdisent.chains import LinearEmission


class KalmanVAE(nn.Module):
    """p(z_1) prod_t p(z_t | z_{t-1}) p(a_t | z_t) p(x_t | a_t); q(a_t | x_t), and p(z_{1:T} | a_{1:T}) itself."""

    def __init__(
        self, frame_shape, latent_dim: int = 16, code_dim: int = 8, feature_dim: int = 128, encoder: tuple[int, ...] |
        None = None, decoder: tuple[int, ...] | None = None,
    ):  # fmt: skip
        super().__init__()
        channels, image_size, _ = frame_shape
        self.encoder = ConvEncoder(feature_dim, in_channels=channels, image_size=image_size, channels=encoder)
        self.code = NormalHead(feature_dim, code_dim, initial_scale=0.1)
        self.decoder = ConvDecoder(code_dim, out_channels=channels, image_size=image_size, channels=decoder)
        near_identity = torch.eye(latent_dim) + 0.1 * torch.randn(latent_dim, latent_dim) / latent_dim**0.5
        self.dynamics = nn.Parameter(near_identity)  # A
        self.reading = nn.Parameter(torch.randn(code_dim, latent_dim) / latent_dim**0.5)  # C
        self.noises = nn.ParameterDict(  # softplus of these are standard deviations
            {"z": torch.full((latent_dim,), -2.0), "a": torch.full((code_dim,), -2.0), "z_1": torch.ones(latent_dim)}
        )

    def scale(self, name):
        return softplus(self.noises[name]) + 1e-2  # less, and float32 is too coarse for the recursion below

    def chain(self, num_sequences, num_steps, mask):
        loc = self.noises["z_1"].new_zeros(num_sequences, len(self.dynamics))
        return LinearGaussianChain(loc, self.scale("z_1"), self.dynamics, self.scale("z"), num_steps, mask=mask)

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = batch_sizes(frames, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            z = pyro.sample("z", self.chain(num_sequences, num_steps, mask))
            with torch.autocast(z.device.type, enabled=False):  # in half precision, the posterior is not exact
                codes = dist.Normal(z @ self.reading.T, self.scale("a"), validate_args=False).to_event(1)
            a = pyro.sample("a", IndependentSteps(codes, mask))
            pyro.sample("x", bernoulli(self.decoder(a), mask, 3), obs=real_frames(frames, mask))

    def guide(self, frames, mask=None):
        num_sequences, num_steps = frames.shape[:2]
        with pyro.plate("sequences", num_sequences):
            a = pyro.sample("a", IndependentSteps(self.code(self.encoder(real_frames(frames, mask))), mask))
            emission = LinearEmission(self.reading, self.scale("a"))
            pyro.sample("z", self.chain(num_sequences, num_steps, mask).posterior(a, emission))


EXAMPLE = Example(
    "kalman_vae", __doc__, VIDEOS, KalmanVAE, {"training": partial(calibrated_stage, kl="monte-carlo")}, motion=("z",)
)

if __name__ == "__main__":
    main(EXAMPLE)
