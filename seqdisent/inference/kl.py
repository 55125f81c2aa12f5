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

from seqdisent.chains import Chain, Draw, IndependentSteps
from seqdisent.chains.factorised import as_chain, as_steps
from seqdisent.inference.checks import check_agreement, check_coordinates, counted, same, unmasked
from seqdisent.inference.plates import Site
from seqdisent.inference.programs import bare
from seqdisent.masks import fill_padding, overwrite_padding

How = Literal["density", "closed form", "monte carlo"]


class Score(NamedTuple):
    """What a site has in the ledger, not yet summed to a value a sequence."""

    term: Tensor
    how: How
    pair: tuple[Any, Any] | None = None  # (q, p) of a latent
    per_step: Tensor | None = None  # of a trajectory
    real_steps: Tensor | None = None


def site_kl(name: str, q_site: Site, p_site: Site, *, analytic: bool, draw: Draw | None = None) -> Score:
    """Compare a guide's site with the model's, at the guide's value; `draw` is what the guide's chain handed over."""
    value = q_site["value"]
    q, q_mask = unmasked(q_site)
    p, p_mask = unmasked(p_site)
    check_agreement(name, q_site, p_site, q_mask, p_mask)
    if q.event_shape != p.event_shape:
        raise ValueError(
            f"site {name!r}: has event shape {tuple(q.event_shape)} in the guide, "
            f"expected the model's {tuple(p.event_shape)}"
        )
    chains = _both_chains(q, p)
    if chains is not None:
        per_step, pair, is_closed = _chain_kl(name, *chains, value, analytic, draw)
        per_step, real_steps = over_steps(per_step, chains[0].step_mask, q_site["scale"], q_mask)
        return Score(per_step.sum(-1), _how(is_closed), pair, per_step, real_steps)
    check_coordinates(name, q, p, value)
    term, is_closed = _pair_kl(name, q, p, value, analytic)
    return Score(scale_and_mask(term, q_site["scale"], q_mask), _how(is_closed), (q, p))


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
    name: str, q: Chain, p: Chain, path: Tensor, analytic: bool, draw: Draw | None
) -> tuple[Tensor, tuple[Any, Any], bool]:
    mask = q.step_mask
    if not same(mask, p.step_mask):
        raise ValueError(
            f"site {name!r}: the chains of guide and model have different masks, expected the same real steps in both"
        )
    if isinstance(q, IndependentSteps) and isinstance(p, IndependentSteps):
        steps = q.step_distribution, p.step_distribution
        if mask is not None:
            path = fill_padding(path, mask, event_dims=len(q.event_shape) - 1)
        per_step, is_closed = _pair_kl(name, *steps, path, analytic)
        per_step = per_step.expand(torch.broadcast_shapes(per_step.shape, steps[0].batch_shape))
        return _without_padding(per_step, mask), steps, is_closed
    if mask is not None:
        path = fill_padding(path, mask)
    drawn = None if draw is None else draw.log_prob_per_step
    if any(
        isinstance(chain, IndependentSteps) and not chain.is_normal for chain in (q, p)
    ):  # they compare as densities
        log_q = q.log_prob_per_step(path) if drawn is None else _without_padding(drawn, mask)
        return log_q - p.log_prob_per_step(path), (q, p), False
    q_at, p_at = q.conditionals(path) if draw is None else draw.conditionals, p.conditionals(path)
    per_step, is_closed = _pair_kl(
        name, q_at.initial, p_at.initial, path[..., 0, :], analytic, None if drawn is None else drawn[..., 0]
    )
    per_step = per_step.unsqueeze(-1)
    if q_at.steps is not None:
        later_drawn = None if drawn is None else drawn[..., 1:].movedim(-1, 0)
        later_path = path[..., 1:, :].movedim(-2, 0)
        later, later_is_closed = _pair_kl(name, q_at.steps, p_at.steps, later_path, analytic, later_drawn)
        later = later.movedim(0, -1)
        is_closed = is_closed and later_is_closed
        per_step = torch.cat([per_step.expand(*later.shape[:-1], 1), later], -1)
    return _without_padding(per_step, mask), (q_at, p_at), is_closed


def _without_padding(per_step: Tensor, mask: Tensor | None) -> Tensor:
    return per_step if mask is None else overwrite_padding(per_step, mask, event_dims=0)


def _pair_kl(
    name: str, q: Any, p: Any, value: Tensor, analytic: bool, drawn: Tensor | None = None
) -> tuple[Tensor, bool]:
    """Return KL(q, p) in closed form or log q - log p at the value, and which; `drawn` is log q where it is known."""
    is_point = isinstance(bare(q), dist.Delta)
    if _is_discrete(q) != _is_discrete(p) and not is_point:  # a point is a mass
        raise ValueError(
            f"site {name!r}: is a {type(q).__name__} in the guide and a {type(p).__name__} in the model, expected both "
            "discrete or both continuous: a density minus a mass is no KL (for a class, "
            "OneHotCategoricalStraightThrough in the guide)"
        )
    if analytic and not is_point:
        term = closed_form(q, p)
        if term is not None:
            return term, True
    if _is_discrete(q) and torch.is_grad_enabled() and not is_point:
        raise ValueError(
            f"site {name!r}: is discrete and has no closed form here, so the gradient of its term would be silently "
            'wrong; expected kl="analytic" and the model\'s order of sites in the guide, or torch.no_grad()'
        )
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
        if term is None or not same(q._mask, p._mask):
            return None
        masked: Tensor = scale_and_mask(term, mask=q._mask)
        return masked
    families = _family(q), _family(p)
    if families == (torch.distributions.LogNormal,) * 2:  # KL does not change under the same exp of both
        return closed_form(q.base_dist, p.base_dist)
    if type(q) is dist.Independent and families[1] is torch.distributions.MultivariateNormal:
        is_known = q.reinterpreted_batch_ndims == 1 and _family(q.base_dist) is torch.distributions.Normal
    else:
        is_known = families in _KL_REGISTRY and not any(family in _GENERIC for family in families)
    if not is_known:
        return None
    try:
        term = kl_divergence(q, p)
    except NotImplementedError:
        return None
    return term


# what torch and Pyro have formulas for whatever is inside, or that hold for some members alone
_GENERIC = (
    torch.distributions.Independent,
    torch.distributions.TransformedDistribution,
    dist.MaskedDistribution,
    dist.Delta,
)


def _family(fn: Any) -> type:
    """Return the class whose density a distribution has: of Pyro's copy of a torch class, torch's."""
    found = type(fn)
    if found.__module__ == "pyro.distributions.torch" and issubclass(found, TorchDistributionMixin):
        found = found.__bases__[0]
    straight_through = torch.distributions.OneHotCategoricalStraightThrough
    return torch.distributions.OneHotCategorical if found is straight_through else found


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except (AttributeError, NotImplementedError):  # it does not say
        return False


def _to_step(factor: Any) -> Any:
    return factor.unsqueeze(-1) if isinstance(factor, Tensor) and factor.ndim else factor
