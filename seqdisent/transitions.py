"""One step of a chain: the gated transition of the prior, one for unequal time steps, the combiner of the posterior."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqdisent._checks import (
    check_context_dim,
    check_kind,
    check_last_dim,
    check_positive,
    check_scale,
    expand_to,
    reads_at_once,
)
from seqdisent.heads import NormalHead, check_precision, diagonal_normal, full_precision
from seqdisent.masks import check_mask, fill_padding


def _expand(
    context: Tensor | None, z_prev: Tensor, size: int, name: str = "context", size_name: str = "context_dim"
) -> Tensor:
    """Expand `context` to the batch shape of `z_prev`, which starts with time where a chain is scored."""
    if context is None:
        raise ValueError(f"{name}: got None, expected a tensor whose last dimension is {size_name}={size}")
    check_last_dim(name, context, size, size_name)
    return expand_to(name, context, (*z_prev.shape[:-1], size))


def _join(z_prev: Tensor, context: Tensor | None, latent_dim: int, context_dim: int) -> Tensor:
    """Check and concatenate z_prev and context."""
    check_last_dim("z_prev", z_prev, latent_dim, "latent_dim")
    if context_dim == 0:
        if context is not None:
            raise ValueError(f"context: got shape {tuple(context.shape)}, expected None since context_dim=0")
        return z_prev
    return torch.cat([z_prev, _expand(context, z_prev, context_dim)], -1)


class GatedTransition(nn.Module):
    r"""The gated transition of a deep Markov model, p(z_t | z_{t-1}, context).

    With :math:`u = \{z_{t-1}, c\}` (paper, equation 6):

    .. math::
        g &= \mathrm{sigmoid}(f_2(\mathrm{ReLU}(f_1(u)))), \qquad h = f_4(\mathrm{ReLU}(f_3(u))) \\
        \mathrm{loc} &= g \circ h + (1 - g) \circ f_5(u), \qquad
        \mathrm{scale} = \mathrm{softplus}(f_6(\mathrm{ReLU}(h))) + \mathrm{min\_scale}

    The linear path f5 starts as the identity on z and zero on the context.

    Args:
        latent_dim: size of z.
        hidden_dim: output size of f1 and f3.
        context_dim: size of the conditioning input (dynamics, actions); 0 for none.
        min_scale: the smallest scale.

    Shape:
        - z_prev: (\*B, latent_dim)
        - context: (\*B, context_dim) or a shape that expands to it (where a chain is scored, time is a leading
          dimension, and a static context expands over it); None when context_dim is 0
        - output: Normal, batch \*B, event (latent_dim,)

    Raises:
        ValueError: inputs of another size or on another device, a missing context, or a context although context_dim is
            0.
        TypeError: z_prev of another dtype than the parameters, or parameters in half precision.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> transition = GatedTransition(3, 8, context_dim=2)
        >>> transition(torch.randn(5, 3), torch.randn(5, 2)).mean.shape
        torch.Size([5, 3])

    References:
        Krishnan, Shalit and Sontag, "Structured inference networks for nonlinear state space models", AAAI 2017.
        In the released VDSM code, f5 reads z alone, and its initial identity is overwritten.
    """

    def __init__(self, latent_dim: int, hidden_dim: int, *, context_dim: int = 0, min_scale: float = 1e-4) -> None:
        super().__init__()
        check_positive(latent_dim=latent_dim, hidden_dim=hidden_dim)
        check_scale(min_scale=min_scale)
        check_context_dim(context_dim)
        self.latent_dim, self.context_dim, self.min_scale = latent_dim, context_dim, min_scale
        in_features = latent_dim + context_dim
        self.gate = nn.Sequential(
            nn.Linear(in_features, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, latent_dim), nn.Sigmoid()
        )
        self.proposal = nn.Sequential(nn.Linear(in_features, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, latent_dim))
        self.linear = nn.Linear(in_features, latent_dim)
        self.scale = nn.Linear(latent_dim, latent_dim)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(latent_dim, in_features))
            self.linear.bias.zero_()

    def forward(self, z_prev: Tensor, context: Tensor | None = None) -> dist.Independent:
        """Return p(z_t | z_prev, context)."""
        check_precision(self.linear.weight)
        check_kind("z_prev", z_prev, self.linear.weight)
        u = _join(z_prev, context, self.latent_dim, self.context_dim)
        g, h = self.gate(u), self.proposal(u)
        with torch.autocast(u.device.type, enabled=False):
            g, h, u = full_precision(g), full_precision(h), full_precision(u)
            loc = g * h + (1 - g) * self.linear(u)
            scale = F.softplus(self.scale(F.relu(h))) + self.min_scale
            return diagonal_normal(loc, scale)


class OrnsteinUhlenbeckTransition(nn.Module):
    r"""A transition for unequal time steps, :math:`p(z_t \mid z_{t-1}, \Delta_t)`, exact whatever the step.

    Each coordinate is an Ornstein-Uhlenbeck process with a mean :math:`\mu`, a time scale :math:`\tau` and a stationary
    scale :math:`\sigma`, all learnt:

    .. math:: z_t \mid z_{t-1} \sim \mathcal N\bigl(\mu + (z_{t-1} - \mu) e^{-\Delta_t / \tau},\;
        \sigma^2 (1 - e^{-2 \Delta_t / \tau})\bigr)

    From the :meth:`stationary` distribution on, a path is a Gaussian process with covariance
    :math:`\sigma^2 e^{-|t - t'| / \tau}`: two steps in turn are one step of their sum. The times since the step before
    are the `inputs` of a chain; that of the first step is never read::

        dt = torch.diff(times, dim=-1, prepend=times[..., :1]).unsqueeze(-1)
        initial = transition.stationary().expand([num_sequences])
        MarkovChain(initial, transition, num_steps, inputs=dt, mask=mask)

    Args:
        latent_dim: size of z.
        initial_time_scale: the :math:`\tau` at which training starts, in the unit of the data's times.
        initial_scale: the :math:`\sigma` at which training starts.
        min_scale: the smallest scale. It is reached where :math:`\Delta_t` is near 0 (a repeated measurement).

    Shape:
        - z_prev: (\*B, latent_dim)
        - dt: (\*B, 1) or a shape that expands to it, or \*B; at least 0, in the unit of the data's times
        - output: Normal, batch \*B, event (latent_dim,)

    Raises:
        ValueError: a size below 1, a scale that is not positive, inputs of another size or on another device, or a
            negative dt (looked for on the CPU alone).
        TypeError: inputs of another dtype than the parameters, or parameters in half precision.

    Example:
        >>> transition = OrnsteinUhlenbeckTransition(1, initial_time_scale=2.0)
        >>> dt = torch.tensor([[0.0], [2.0], [1e6]])
        >>> step = transition(torch.ones(3, 1), dt)
        >>> step.mean.flatten().detach(), step.stddev.flatten().detach()
        (tensor([1.0000, 0.3679, 0.0000]), tensor([1.0000e-04, 9.2987e-01, 1.0000e+00]))

    References:
        Uhlenbeck and Ornstein, "On the theory of the Brownian motion", Physical Review 1930; Rasmussen and Williams,
        "Gaussian processes for machine learning", 2006, section 4.2.1, for the covariance.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        initial_time_scale: float = 1.0,
        initial_scale: float = 1.0,
        min_scale: float = 1e-4,
    ) -> None:
        super().__init__()
        check_positive(latent_dim=latent_dim)
        check_scale(initial_time_scale=initial_time_scale, initial_scale=initial_scale, min_scale=min_scale)
        self.latent_dim, self.min_scale = latent_dim, min_scale
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.log_time_scale = nn.Parameter(torch.full((latent_dim,), math.log(initial_time_scale)))
        self.log_scale = nn.Parameter(torch.full((latent_dim,), math.log(initial_scale)))

    def extra_repr(self) -> str:
        """Return the size, for the repr."""
        return f"latent_dim={self.latent_dim}"

    def stationary(self) -> dist.Independent:
        """Return the distribution of a step without a past, batch (), event (latent_dim,): a chain's initial one.

        Raises:
            TypeError: parameters in half precision.
        """
        check_precision(self.loc)
        return diagonal_normal(self.loc, self.log_scale.exp().clamp(min=self.min_scale))

    def forward(self, z_prev: Tensor, dt: Tensor) -> dist.Independent:
        """Return p(z_t | z_prev, dt)."""
        check_precision(self.loc)
        check_last_dim("z_prev", z_prev, self.latent_dim, "latent_dim")
        if isinstance(dt, Tensor) and dt.shape == z_prev.shape[:-1]:
            dt = dt.unsqueeze(-1)
        dt = _expand(dt, z_prev, 1, "dt", "the size of a time step")
        for name, value in (("z_prev", z_prev), ("dt", dt)):
            check_kind(name, value, self.loc)
        if reads_at_once(dt) and (dt < 0).any():
            raise ValueError(f"dt: got {dt.min():g}, expected times since the step before, at least 0")
        z_prev, dt = full_precision(z_prev), full_precision(dt)
        elapsed = dt * (-self.log_time_scale).exp()
        variance = self.log_scale.mul(2).exp() * -torch.expm1(-2 * elapsed)
        scale = variance.clamp(min=self.min_scale**2).sqrt()
        return diagonal_normal(torch.lerp(self.loc, z_prev, (-elapsed).exp()), scale)


class Combiner(nn.Module):
    r"""The combiner of a structured inference network, q(z_t | z_{t-1}, context).

    With the context :math:`c = \{\bar h_t, d\}` (paper, equation 5):

    .. math::
        e &= \tfrac12 (\tanh(f_7(z_{t-1})) + W c + b) \\
        \mathrm{loc} &= f_8(e), \qquad \mathrm{scale} = \mathrm{softplus}(f_9(e)) + \mathrm{min\_scale}

    The paper adds c itself. Here the linear layer W maps it to the output size of f7.

    ``combiner(z_prev, context)`` is ``combiner.step(z_prev, combiner.project(context))``. A chain is faster if it walks
    through contexts that were projected before, all steps in one product; then every step reads them with `step`::

        contexts = combiner.project(contexts, mask)
        initial = combiner.step(z_0, contexts[..., 0, :])
        MarkovChain(initial, combiner.step, num_steps, inputs=contexts, mask=mask)

    Args:
        latent_dim: size of z.
        hidden_dim: size of e.
        context_dim: size of the context.
        min_scale: the smallest scale.

    Shape:
        - z_prev: (\*B, latent_dim)
        - context: (\*B, context_dim) or a shape that expands to it
        - output: Normal, batch \*B, event (latent_dim,)

    Raises:
        TypeError: inputs of another dtype than the parameters, parameters in half precision, or a mask, given to
            `project`, that is not bool.
        ValueError: inputs of another size or on another device, or no context.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> combiner = Combiner(3, 8, context_dim=2)
        >>> combiner(torch.randn(5, 3), torch.randn(5, 2)).mean.shape
        torch.Size([5, 3])

    References:
        Vowels, Camgoz and Bowden, "VDSM", CVPR 2021, equation 5, after Krishnan, Shalit and Sontag, AAAI 2017.
    """

    def __init__(self, latent_dim: int, hidden_dim: int, *, context_dim: int, min_scale: float = 1e-4) -> None:
        super().__init__()
        check_positive(latent_dim=latent_dim, hidden_dim=hidden_dim, context_dim=context_dim)
        self.latent_dim, self.context_dim = latent_dim, context_dim
        self.previous = nn.Linear(latent_dim, hidden_dim)
        self.context = nn.Linear(context_dim, hidden_dim)
        self.head = NormalHead(hidden_dim, latent_dim, min_scale=min_scale)

    def forward(self, z_prev: Tensor, context: Tensor) -> dist.Independent:
        """Return q(z_t | z_prev, context)."""
        check_last_dim("z_prev", z_prev, self.latent_dim, "latent_dim")
        return self.step(z_prev, self.project(_expand(context, z_prev, self.context_dim)))

    def project(self, context: Tensor, mask: Tensor | None = None) -> Tensor:
        r"""Return :math:`W c + b` of contexts, for :meth:`step`.

        Args:
            context: (\*B, context_dim), or (\*B, T, context_dim) for all steps of a sequence at once.
            mask: (\*B, T) bool, True where a step is real; padding then does not affect any gradient.

        Returns:
            A tensor of the same shape, but with last dimension hidden_dim.

        Raises:
            TypeError: contexts of another dtype than the parameters, or a mask that is not bool.
            ValueError: contexts of another size or on another device, or a mask with a hole.
        """
        check_last_dim("context", context, self.context_dim, "context_dim")
        check_kind("context", context, self.context.weight)
        if mask is not None:
            mask = check_mask(mask, context.shape[:-2], context.shape[-2], context.device)
            context = fill_padding(context, mask)
        projected: Tensor = self.context(context)
        return projected

    def step(self, z_prev: Tensor, projected: Tensor) -> dist.Independent:
        r"""Return q(z_t | z_prev, context) for a context from :meth:`project`.

        Args:
            z_prev: (\*B, latent_dim).
            projected: (\*B, hidden_dim) or a shape that expands to it. If context_dim equals hidden_dim, a context that
                was not projected is not detected.

        Raises:
            TypeError: z_prev of another dtype than the parameters.
            ValueError: inputs of another size, or z_prev on another device.
        """
        check_last_dim("z_prev", z_prev, self.latent_dim, "latent_dim")
        check_kind("z_prev", z_prev, self.previous.weight)
        projected = _expand(projected, z_prev, self.head.loc.in_features, "projected", "hidden_dim")
        posterior: dist.Independent = self.head(0.5 * (torch.tanh(self.previous(z_prev)) + projected))
        return posterior
