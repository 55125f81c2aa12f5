"""The honest baseline of time series: a linear-Gaussian state-space model, whose posterior is exact."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from seqdisent import IndependentSteps, LinearGaussianChain, batch_sizes
from seqdisent.chains import LinearEmission


class LinearGaussian(nn.Module):
    """p(z_1) prod_t p(z_t | z_{t-1}) p(x_t | z_t), all linear and Gaussian; q is the posterior itself.

    With ``kl="monte-carlo"`` the bound is the evidence of the Kalman filter, whatever z was drawn.
    """

    def __init__(self, step_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.dynamics = nn.Parameter(0.9 * torch.eye(latent_dim) + 0.05 * torch.randn(latent_dim, latent_dim))
        self.reading = nn.Parameter(torch.randn(step_dim, latent_dim) / latent_dim**0.5)
        self.offset = nn.Parameter(torch.zeros(step_dim))
        self.noises = nn.ParameterDict(  # softplus of these are standard deviations
            {"z_1": torch.ones(latent_dim), "z": torch.full((latent_dim,), -1.0), "x": torch.full((step_dim,), -0.5)}
        )

    def scale(self, name: str) -> Tensor:
        return softplus(self.noises[name]) + 0.01

    def chain(self, loc: Tensor, num_steps: int, mask: Tensor | None) -> LinearGaussianChain:
        """Return p(z), whose first step has the mean `loc`."""
        return LinearGaussianChain(loc, self.scale("z_1"), self.dynamics, self.scale("z"), num_steps, mask=mask)

    def model(self, x=None, mask=None, observed=None, covariates=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = batch_sizes(x, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            z = pyro.sample("z", self.chain(self.start(num_sequences), num_steps, mask))
            step = dist.Normal(z @ self.reading.T + self.offset, self.scale("x"), validate_args=False).to_event(1)
            pyro.sample("x", IndependentSteps(step, mask, observed), obs=x)

    def guide(self, x, mask=None, observed=None, covariates=None):
        emission = LinearEmission(self.reading, self.scale("x"), self.offset)
        with pyro.plate("sequences", len(x)):
            chain = self.chain(self.start(len(x)), x.shape[1], mask)
            pyro.sample("z", chain.posterior(x, emission, observed))

    def start(self, num_sequences: int) -> Tensor:
        return self.offset.new_zeros(num_sequences, len(self.dynamics))
