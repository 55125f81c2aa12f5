"""The KL term of one latent site: in closed form where there is one, step by step where it is a chain."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from seqdisent._masking import overwrite_padding, repeat_first_step
from seqdisent._sites import Site, bare, check_agreement, counted, same, unmasked
from seqdisent.chains import Chain, Conditionals, as_chain


class SiteKL(NamedTuple):
    """What a site has in the ledger; the second and third are a chain's alone."""

    term: Tensor
    per_step: Tensor | None
    real_steps: Tensor | None
    pair: Any  # (q, p)
    closed_form: bool


def site_kl(name: str, q_site: Site, p_site: Site, *, analytic: bool) -> SiteKL:
    value = q_site["value"]
    q, q_mask = unmasked(q_site)
    p, p_mask = unmasked(p_site)
    check_agreement(name, q_site, p_site, q_mask, p_mask)
    if q.event_shape != p.event_shape:
        raise ValueError(
            f"site {name!r}: has event shape {tuple(q.event_shape)} in the guide, "
            f"expected the model's {tuple(p.event_shape)}"
        )
    q_chain, p_chain = as_chain(q), as_chain(p)
    if q_chain is not None and p_chain is not None:
        per_step, pair, closed_form = _chain_kl(name, q_chain, p_chain, value, analytic)
        per_step = scale_and_mask(per_step, _to_step(q_site["scale"]), _to_step(q_mask))
        is_real = torch.ones_like(per_step, dtype=torch.bool)
        real_steps = is_real if q_chain.step_mask is None else is_real & q_chain.step_mask
        real_steps = real_steps if q_mask is None else real_steps & _to_step(q_mask)
        return SiteKL(per_step.sum(-1), per_step, real_steps, pair, closed_form)
    q_counted, p_counted = counted(q), counted(p)
    if q_counted is not p_counted:  # both are None where nothing is masked
        ones = torch.ones((), dtype=torch.bool, device=value.device)
        if not same(ones if q_counted is None else q_counted, ones if p_counted is None else p_counted):
            raise ValueError(f"site {name!r}: coordinates have different masks in model and guide, expected the same")
    term, closed_form = _pair_kl(name, q, p, value, analytic)
    return SiteKL(scale_and_mask(term, q_site["scale"], q_mask), None, None, (q, p), closed_form)


def _chain_kl(
    name: str, q: Chain, p: Chain, path: Tensor, analytic: bool
) -> tuple[Tensor, tuple[Conditionals, Conditionals], bool]:
    mask = q.step_mask
    if not same(mask, p.step_mask):
        raise ValueError(
            f"site {name!r}: the chains of guide and model have different masks, expected the same real steps in both"
        )
    q_at = q.kept_conditionals(path) if hasattr(q, "kept_conditionals") else None
    if mask is not None:
        path = repeat_first_step(path, mask)
    q_at, p_at = q.conditionals(path) if q_at is None else q_at, p.conditionals(path)
    per_step, closed_form = _pair_kl(name, q_at.initial, p_at.initial, path[..., 0, :], analytic)
    per_step = per_step.unsqueeze(-1)
    if q_at.steps is not None:
        later, later_closed_form = _pair_kl(name, q_at.steps, p_at.steps, path[..., 1:, :].movedim(-2, 0), analytic)
        later = later.movedim(0, -1)
        closed_form = closed_form and later_closed_form
        per_step = torch.cat([per_step.expand(*later.shape[:-1], 1), later], -1)
    if mask is not None:
        per_step = overwrite_padding(per_step, mask, event_dims=0)
    return per_step, (q_at, p_at), closed_form


def _pair_kl(name: str, q: Any, p: Any, value: Tensor, analytic: bool) -> tuple[Tensor, bool]:
    if _is_discrete(q) != _is_discrete(p) and not isinstance(bare(q), dist.Delta):  # a point is a mass
        raise ValueError(
            f"site {name!r}: is a {type(q).__name__} in the guide and a {type(p).__name__} in the model, expected both "
            "discrete or both continuous: a density minus a mass is no KL (for a class, "
            "OneHotCategoricalStraightThrough in the guide)"
        )
    if analytic:
        try:
            return kl_divergence(q, p), True
        except NotImplementedError:
            pass  # no closed form: the caller names the site in `monte_carlo`
    if _is_discrete(q) and torch.is_grad_enabled():
        raise ValueError(
            f"site {name!r}: is discrete and has no closed form here, so the gradient of its term would be silently "
            'wrong; expected kl="analytic" and the model\'s order of sites in the guide, or torch.no_grad()'
        )
    return q.log_prob(value) - p.log_prob(value), False


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except (AttributeError, NotImplementedError):  # it does not say
        return False


def _to_step(factor: Any) -> Any:
    return factor.unsqueeze(-1) if isinstance(factor, Tensor) and factor.ndim else factor
