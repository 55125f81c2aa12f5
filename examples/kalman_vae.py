"""A linear-Gaussian chain seen through a learnt emission, after the Kalman VAE (Fraccaro et al., NeurIPS 2017).

    python examples/kalman_vae.py                 train on pendula, then forecast 40 frames beyond what was seen
    python examples/kalman_vae.py forecast RUN --from CLIP --num-steps 40

Every frame has a code a_t; codes are what a linear-Gaussian state-space model emits. Given the codes, the posterior of
its states is known exactly: the guide samples a from the frames and then z from that posterior, so that log p(a, z)
less log q(z | a) is log p(a), the Kalman filter's evidence, whatever z was drawn. The paper blends several linear
dynamics by the codes; here there is one. The command line is in `command_line.py`, data and pictures in `videos.py`.
"""

from __future__ import annotations

from functools import partial, wraps

import pyro
import pyro.distributions as dist
import torch
from command_line import main
from parts import bernoulli, real_frames
from settings import Example
from torch import nn
from torch.nn.functional import softplus
from videos import VIDEOS, calibrated_stage

from seqdisent import ConvDecoder, ConvEncoder, IndependentSteps, MarkovChain, NormalHead, batch_sizes


def in_full_precision(function):
    """Keep autocast away from linear algebra: in half precision the exact posterior is not exact."""

    @wraps(function)
    def run(*args):
        with torch.autocast(next(x for x in args if isinstance(x, torch.Tensor)).device.type, enabled=False):
            return function(*args)

    return run


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

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = batch_sizes(frames, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            initial = self.state(self.noises["z_1"].new_zeros(num_sequences, len(self.dynamics)), "z_1")
            z = pyro.sample("z", MarkovChain(initial, self.transition, num_steps, mask=mask))
            a = pyro.sample("a", IndependentSteps(self.emission(z), mask))
            pyro.sample("x", bernoulli(self.decoder(a), mask, 3), obs=real_frames(frames, mask))

    @in_full_precision
    def emission(self, z):
        return dist.Normal(z @ self.reading.T, self.scale("a"), validate_args=False).to_event(1)

    @in_full_precision
    def transition(self, z_prev):
        return self.state(z_prev @ self.dynamics.T, "z")

    def state(self, loc, name):
        return dist.MultivariateNormal(loc, scale_tril=self.scale(name).diag(), validate_args=False)

    def guide(self, frames, mask=None):
        with pyro.plate("sequences", len(frames)):
            a = pyro.sample("a", IndependentSteps(self.code(self.encoder(real_frames(frames, mask))), mask))
            pyro.sample("z", self.smoothed(a, mask))

    @in_full_precision
    def smoothed(self, a, mask=None):
        """The exact posterior p(z_{1:T} | a_{1:T}): a chain again, p(z_t | z_{t-1}, a_{t:T}), linear-Gaussian."""
        size = len(self.dynamics)
        seen = self.reading / self.scale("a").unsqueeze(-1).square()  # R^-1 C
        real = a.new_ones(a.shape[:-1]) if mask is None else mask.to(a)
        # What a_t ... a_T say of z_t is exp(-1/2 z' L z + z' l): L and l, from the end on
        precision, shift = a.new_zeros(*a.shape[:-2], size, size), a.new_zeros(*a.shape[:-2], size, 1)
        messages = []
        for a_t, real_t in zip(reversed(a.unbind(-2)), reversed(real.unbind(-1)), strict=True):
            precision = precision + real_t[..., None, None] * (seen.T @ self.reading)
            shift = shift + real_t[..., None, None] * (a_t @ seen).unsqueeze(-1)
            messages.append((precision, shift))
            # through the transition: A' (I + L Q)^-1 (L A, l)
            mixed = torch.eye(size).to(a) + precision * self.scale("z").square()
            both = self.dynamics.T @ torch.linalg.solve(mixed, torch.cat([precision @ self.dynamics, shift], -1))
            precision, shift = both[..., :size], both[..., size:]
        precision, shift = (torch.stack(parts[::-1], -3) for parts in zip(*messages, strict=True))

        def posterior(name, prior_loc, precision, shift):
            """Combine a state's prior N(loc, Q), loc linear in the state before, with what is said of it."""
            inverse = self.scale(name).square().reciprocal()
            factor = torch.linalg.cholesky(precision + inverse.diag())
            covariance = torch.cholesky_inverse(factor)
            return (
                covariance @ (inverse.unsqueeze(-1) * prior_loc),
                covariance @ shift,
                torch.linalg.cholesky(covariance),
            )

        gain, offset, factor = posterior("z", self.dynamics, precision, shift)
        inputs = torch.cat([gain.flatten(-2), offset.flatten(-2), factor.flatten(-2)], -1)

        @in_full_precision
        def step(z_prev, inputs):
            gain, offset, factor = inputs.split([size * size, size, size * size], -1)
            loc = (gain.unflatten(-1, (size, size)) @ z_prev.unsqueeze(-1)).squeeze(-1) + offset
            return dist.MultivariateNormal(loc, scale_tril=factor.unflatten(-1, (size, size)), validate_args=False)

        _, loc, factor = posterior("z_1", self.dynamics, precision[..., 0, :, :], shift[..., 0, :, :])
        initial = dist.MultivariateNormal(loc.squeeze(-1), scale_tril=factor, validate_args=False)
        return MarkovChain(initial, step, a.shape[-2], inputs=inputs, mask=mask)


EXAMPLE = Example(
    "kalman_vae", __doc__, VIDEOS, KalmanVAE, {"training": partial(calibrated_stage, kl="monte-carlo")}, motion=("z",)
)

if __name__ == "__main__":
    main(EXAMPLE)
