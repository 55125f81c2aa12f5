"""Backward simulation: joint draws of whole paths given the whole sequence, from what a filter has stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqdisent._checks import check_positive
from seqdisent.chains import MarkovChain
from seqdisent.masks import fill_padding
from seqdisent.particles.filtering import Particles
from seqdisent.particles.resampling import pick


@torch.no_grad()
def smooth(particles: Particles, num_draws: int) -> dict[str, Tensor]:
    r"""Draw paths from the smoothing distribution :math:`p(z_{1:T} \mid x_{1:T})` by backward simulation.

    Ancestral paths of a filter coincide at early steps. Here a path is drawn from its end on: the last step by the
    filter's weights, and each step before by

    .. math:: P(z_t = z_t^k) \propto W_t^k \, p(z_{t+1} \mid z_t^k),

    from all K particles that the filter has stored of it. The cost is that of K S transitions a step.

    Args:
        particles: what :func:`~seqdisent.particles.filter` returned.
        num_draws: S, how many paths of each sequence.

    Returns:
        {trajectory: (S, B, T, \*E)}, in padding the first step, without gradient.

    Raises:
        ValueError: `num_draws` below 1; a model with static sites, since particles that differ in them cannot be
            joined; a chain whose steps read the whole path before (a network that reads z); a model whose terms need
            whole sequences (`runs`), of which it is not known whether a step depends on its own latents alone.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from seqdisent import IndependentSteps, MarkovChain
        >>> from seqdisent.particles import filter
        >>> def walk(x):
        ...     start = dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1)
        ...     return MarkovChain(start, lambda z: dist.Normal(z, 1.0).to_event(1), x.shape[1])
        >>> def guide(x):
        ...     with pyro.plate("sequences", len(x)):
        ...         pyro.sample("z", walk(x))
        >>> def model(x):
        ...     with pyro.plate("sequences", len(x)):
        ...         z = pyro.sample("z", walk(x))
        ...         pyro.sample("x", IndependentSteps(dist.Normal(z, 0.5).to_event(1)), obs=x)
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(1, 20, 1).cumsum(1)
        >>> smooth(filter(model, guide, x, num_particles=100), num_draws=10)["z"].shape
        torch.Size([10, 1, 20, 1])

    References:
        Godsill, Doucet and West, "Monte Carlo smoothing for nonlinear time series", JASA 2004.
    """
    check_positive(num_draws=num_draws)
    if particles.static:
        raise ValueError(
            f"particles: have static sites {sorted(particles.static)}, expected none: particles that differ in them "
            "cannot be joined to a path"
        )
    if particles._chains is None:
        raise ValueError(
            "particles: the model was run on whole sequences, expected one that can be run on one step alone, so that "
            "a step is known to depend on its own latents and those of the step before alone"
        )
    chains = {name: chain for name, chain in particles._chains.items() if isinstance(chain, MarkovChain)}
    for name, chain in chains.items():
        if not chain.is_markov:
            raise ValueError(
                f"site {name!r}: is a {type(chain).__name__} each of whose steps depends on all before it; expected a "
                "chain whose steps depend on the step before alone"
            )
    real = particles._real
    conditionals = {name: _conditionals(chain, particles.draws[name]) for name, chain in chains.items()}
    drawn: list[dict[str, Tensor]] = []
    for t in reversed(range(real.shape[1])):
        logits = particles.log_weights_per_step[..., t].expand(num_draws, -1, -1)  # (S, K, B)
        if drawn:
            for name, steps in conditionals.items():
                z_next = drawn[-1][name].unsqueeze(1).expand(-1, particles.num_particles, -1, -1)
                logits = logits + torch.where(real[:, t + 1], steps[t + 1].log_prob(z_next), 0.0)
        weights = logits.movedim(1, -1).softmax(-1)
        index = torch.multinomial(weights.flatten(0, 1), 1).reshape(num_draws, -1)
        drawn.append({name: pick(values[:, :, t], index) for name, values in particles.draws.items()})
    paths = {name: torch.stack([step[name] for step in reversed(drawn)], 2) for name in particles.draws}
    return {name: fill_padding(path, real, event_dims=path.ndim - 3) for name, path in paths.items()}


def _conditionals(chain: MarkovChain, draws: Tensor) -> list[Any]:
    """Return the conditional of each step given every particle of the one before, batch (K, B)."""
    conditional, state = chain.step()
    found = [conditional]
    for z_prev in draws.unbind(2)[:-1]:
        conditional, state = chain.step(z_prev, state)
        found.append(conditional)
    return found
