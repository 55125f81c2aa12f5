"""The KL term of one latent site: in closed form where that is known to be right, step by step where it is a chain."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor
from torch.distributions import kl_divergence
from torch.distributions.kl import _KL_REGISTRY

from seqdisent.chains import Chain, Conditionals, Draw, HiddenMarkovEmission, IndependentSteps
from seqdisent.chains.draws import is_flow
from seqdisent.chains.factorised import as_chain, as_steps, without_mask
from seqdisent.chains.protocol import fill_path, overwrite_steps
from seqdisent.inference.checks import (
    check_agreement,
    check_coordinates,
    check_density,
    check_kinds,
    check_step_masks,
    counted,
)
from seqdisent.inference.plates import Site
from seqdisent.inference.programs import bare

How = Literal["density", "closed form", "monte carlo"]


class Score(NamedTuple):
    """What a site has in the ledger, not yet summed to a value a sequence."""

    term: Tensor
    how: How
    pair: tuple[Any, Any] | None = None  # (q, p) of a latent
    per_step: Tensor | None = None  # of a trajectory
    real_steps: Tensor | None = None


def site_kl(name: str, q_site: Site, p_site: Site, draw: Draw, *, analytic: bool, with_gradient: bool) -> Score:
    """Compare a guide's site, and what it handed over, with the model's at the guide's value."""
    q, q_mask = without_mask(q_site["fn"], q_site["mask"])
    p, p_mask = without_mask(p_site["fn"], p_site["mask"])
    check_agreement(name, q_site, p_site, q_mask, p_mask)
    if q.event_shape != p.event_shape:
        raise ValueError(
            f"site {name!r}: has event shape {tuple(q.event_shape)} in the guide, "
            f"expected the model's {tuple(p.event_shape)}"
        )
    chains = _both_chains(q, p)
    at = None
    if chains is not None:
        q_chain, p_chain = chains
        check_step_masks(name, q_chain.step_mask, p_chain.step_mask)
        at = conditionals_at(name, p_chain, draw.path)  # the transition runs as in the program
    with torch.set_grad_enabled(with_gradient):
        if chains is not None:
            per_step, pair, is_closed = _chain_kl(name, q_chain, p_chain, draw, at, analytic)
            per_step, real_steps = over_steps(per_step, q_chain.step_mask, q_site["scale"], q_mask)
            return Score(per_step.sum(-1), _how(is_closed), pair, per_step, real_steps)
        term, is_closed = _pair_kl(name, q, p, draw.path, analytic, whole_density(q, draw))
        return Score(scale_and_mask(term, q_site["scale"], q_mask), _how(is_closed), (q, p))


def conditionals_at(name: str, chain: Chain | None, path: Tensor) -> Conditionals | None:
    """Return the conditionals of a chain at a path, whatever stands in its padding; None of steps without them."""
    if chain is None or isinstance(chain, IndependentSteps | HiddenMarkovEmission):
        return None
    check_density(name, chain)
    return chain.conditionals(fill_path(chain, path))


def log_q_per_step(chain: Any, draw: Draw) -> Tensor:
    r"""Return the log-density (\*S, \*B, T) of the steps of a path, in nats; 0 at padding."""
    if draw.log_prob_per_step is not None:
        per_step = draw.log_prob_per_step
    elif draw.conditionals is None:
        per_step = chain.log_prob_per_step(draw.path)
    else:
        per_step = draw.conditionals.log_prob_per_step(fill_path(chain, draw.path))
    return overwrite_steps(chain, per_step)


def whole_density(fn: TorchDistribution, draw: Draw) -> Tensor | None:
    """Return the density that a site which is no trajectory handed over, by steps where it could be seen so."""
    log_prob = draw.log_prob_per_step
    return log_prob if log_prob is None or as_steps(fn) is None else log_prob.sum(-1)


def has_plain_parameters(fn: TorchDistribution) -> bool:
    """Say whether the density of a distribution is that of its parameters, whenever it is asked for."""
    found = bare(fn)
    if isinstance(found, IndependentSteps):
        return has_plain_parameters(found.step_distribution)
    is_known = type(found).__module__.startswith(("torch.distributions.", "pyro.distributions.torch"))
    return isinstance(found, dist.Delta) or (is_known and not is_flow(found))


def over_steps(per_step: Tensor, step_mask: Tensor | None, scale: Any, mask: Any) -> tuple[Tensor, Tensor]:
    """Return the steps of a term (..., T) under its site's scale and mask, and which of them are real."""
    real_steps = torch.ones_like(per_step, dtype=torch.bool)
    for factor in (step_mask, _to_step(mask)):
        real_steps = real_steps if factor is None else real_steps & factor
    return scale_and_mask(per_step, _to_step(scale), _to_step(mask)), real_steps


def _how(is_closed: bool) -> How:
    return "closed form" if is_closed else "monte carlo"


def _both_chains(q: TorchDistribution, p: TorchDistribution) -> tuple[Chain, Chain] | None:
    """Return both as chains if one of them says that it is one and the other can be seen so."""
    q_chain, p_chain = as_chain(q), as_chain(p)
    if q_chain is None and p_chain is not None and counted(q) is None:
        q_chain = as_steps(q)
    if p_chain is None and q_chain is not None and counted(p) is None:
        p_chain = as_steps(p)
    return None if q_chain is None or p_chain is None else (q_chain, p_chain)


def _chain_kl(
    name: str, q: Chain, p: Chain, draw: Draw, p_at: Conditionals | None, analytic: bool
) -> tuple[Tensor, tuple[Any, Any], bool]:
    path, drawn = fill_path(q, draw.path), draw.log_prob_per_step
    if isinstance(q, IndependentSteps) and isinstance(p, IndependentSteps):
        steps = q.step_distribution, p.step_distribution
        per_step, is_closed = _pair_kl(name, *steps, path, analytic, drawn)
        return overwrite_steps(q, per_step), steps, is_closed
    for chain in (q, p):
        if isinstance(chain, IndependentSteps) and not chain.is_normal:  # whose steps have no place beside another's
            check_kinds(name, q, p, is_estimate=True)
            return log_q_per_step(q, draw) - log_q_per_step(p, Draw(path, p_at)), (q, p), False
    q_at = q.conditionals(path) if draw.conditionals is None else draw.conditionals
    p_at = p.conditionals(path) if p_at is None else p_at
    first_drawn = None if drawn is None else drawn[..., 0]
    per_step, is_closed = _pair_kl(name, q_at.initial, p_at.initial, path[..., 0, :], analytic, first_drawn)
    per_step = per_step.unsqueeze(-1)
    if q_at.steps is not None:
        later_drawn = None if drawn is None else drawn[..., 1:].movedim(-1, 0)
        later_path = path[..., 1:, :].movedim(-2, 0)
        later, later_is_closed = _pair_kl(name, q_at.steps, p_at.steps, later_path, analytic, later_drawn)
        later = later.movedim(0, -1)
        is_closed = is_closed and later_is_closed
        per_step = torch.cat([per_step.expand(*later.shape[:-1], 1), later], -1)
    return overwrite_steps(q, per_step), (q_at, p_at), is_closed


def _pair_kl(
    name: str, q: Any, p: Any, value: Tensor, analytic: bool, drawn: Tensor | None = None
) -> tuple[Tensor, bool]:
    """Return KL(q, p) in closed form or log q - log p at the value, and which; `drawn` is log q where it is known."""
    is_point = isinstance(bare(q), dist.Delta)
    check_coordinates(name, q, p)
    term = closed_form(q, p) if analytic and not is_point else None
    check_kinds(name, q, p, is_estimate=term is None)
    if term is not None:
        return term, True
    log_q = q.log_prob(value) if drawn is None else drawn
    return log_q - p.log_prob(value), is_point and analytic  # of a point, the difference is the KL


def closed_form(q: Any, p: Any) -> Tensor | None:
    """Return KL(q, p) if a formula is known for exactly these two, else None.

    torch looks formulas up by base class, so a subclass with a density of its own, or a transformed distribution, would
    get that of another. Here a pair has a formula if it is registered for these very classes (Pyro's are torch's).
    """
    if type(q) is type(p) is dist.Independent and q.reinterpreted_batch_ndims == p.reinterpreted_batch_ndims:
        term = closed_form(q.base_dist, p.base_dist)
        return None if term is None else sum_rightmost(term, q.reinterpreted_batch_ndims)
    if type(q) is type(p) is dist.MaskedDistribution:
        term = closed_form(q.base_dist, p.base_dist)
        return None if term is None else scale_and_mask(term, mask=q._mask)  # one mask: check_coordinates has asked
    families = _family(q), _family(p)
    if families == (torch.distributions.LogNormal,) * 2:  # KL does not change under the same exp of both
        return closed_form(q.base_dist, p.base_dist)
    if type(q) is dist.Independent and families[1] is torch.distributions.MultivariateNormal:
        is_known = q.reinterpreted_batch_ndims == 1 and _family(q.base_dist) is torch.distributions.Normal
    else:
        is_known = any(pair in _KL_REGISTRY and not set(pair) & _GENERIC for pair in (families, (type(q), type(p))))
    if not is_known:
        return None
    try:
        term = kl_divergence(q, p)
    except NotImplementedError:
        return None
    return term


# what torch and Pyro have formulas for whatever is inside, or that hold for some members alone
_GENERIC = {
    torch.distributions.Independent,
    torch.distributions.TransformedDistribution,
    dist.Independent,
    dist.TransformedDistribution,
    dist.MaskedDistribution,
    dist.Delta,
}


def _family(fn: Any) -> type:
    """Return the class whose density a distribution has: of Pyro's copy of a torch class, torch's."""
    found = type(fn)
    if found.__module__ == "pyro.distributions.torch" and issubclass(found, TorchDistributionMixin):
        found = found.__bases__[0]
    straight_through = torch.distributions.OneHotCategoricalStraightThrough
    return torch.distributions.OneHotCategorical if found is straight_through else found


def _to_step(factor: Any) -> Any:
    return factor.unsqueeze(-1) if isinstance(factor, Tensor) and factor.ndim else factor
