"""What the sites of model and guide must agree on, and what would make a term or a gradient silently wrong."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from seqdisent._checks import reads_at_once
from seqdisent.chains import IndependentSteps
from seqdisent.chains.factorised import as_chain, without_mask
from seqdisent.chains.protocol import fill_path
from seqdisent.inference.plates import PARTICLES, Site, plates_of
from seqdisent.inference.programs import bare, is_auxiliary


def check_sites(observed: dict[str, Site], latent: dict[str, Site], guide_sites: dict[str, Site]) -> None:
    """Raise unless model and guide have the same latent sites and the guide's can be differentiated."""
    if not observed:
        raise ValueError("model: observes nothing, expected at least one site with obs=...")
    missing, extra = sorted(set(latent) - set(guide_sites)), sorted(set(guide_sites) - set(latent))
    extra = [name for name in extra if not is_auxiliary(guide_sites[name])]
    if missing:
        raise ValueError(
            f"guide: has no site {missing}, which the model samples; expected one site for each latent of the model"
        )
    if extra:
        raise ValueError(
            f"model: has no latent site {extra}, which the guide samples; expected the sites {sorted(latent)}"
        )


def check_gradient(name: str, site: Site) -> None:
    """Raise unless the gradient of a guide's site flows through its sample."""
    if (site["infer"] or {}).get("enumerate"):
        raise ValueError(
            f"guide: site {name!r} is enumerated, which the ledger does not support; expected a reparameterised sample"
        )
    if not site["fn"].has_rsample:
        raise ValueError(no_rsample(name, site["fn"]))


def no_rsample(name: str, fn: Any, because: str = "") -> str:
    """Say what is wrong with a site of the guide whose gradient would be silently wrong."""
    is_class = isinstance(bare(fn), dist.Categorical | dist.OneHotCategorical)
    instead = ", for a class OneHotCategoricalStraightThrough" if is_class else ""
    return (
        f"guide: site {name!r} has no rsample ({because or type(fn).__name__}), so the gradient of its parameters "
        f"would be silently wrong; expected a reparameterised distribution{instead}"
    )


def check_observed(name: str, site: Site) -> None:
    """Raise unless what is observed has a value for each coordinate of the event and each member of the plates.

    An emission that does not change over time may have one step for all of them: an event (1, D) or (1, C, H, W), or
    (1,) of a hidden Markov model.
    """
    fn, value = site["fn"], site["value"]
    if isinstance(fn, dist.Unit):  # pyro.factor observes nothing
        return
    batch_shape, event_shape = value.shape[: value.ndim - fn.event_dim], value.shape[value.ndim - fn.event_dim :]
    one_for_all = fn.event_dim in (2, 4) or isinstance(without_mask(fn)[0], dist.DiscreteHMM | IndependentSteps)
    first = 1 if one_for_all and fn.event_shape[0] == 1 else 0
    if value.ndim < fn.event_dim or event_shape[first:] != fn.event_shape[first:]:
        raise ValueError(
            f"site {name!r}: what is observed has shape {tuple(value.shape)}, expected one that ends in the event's, "
            f"{tuple(fn.event_shape)}"
        )
    for frame in site["cond_indep_stack"]:
        if frame.vectorized and frame.name != PARTICLES:
            if len(batch_shape) < -frame.dim or batch_shape[frame.dim] != frame.size:
                raise ValueError(
                    f"site {name!r}: what is observed has batch shape {tuple(batch_shape)}, expected {frame.size} at "
                    f"dimension {frame.dim}, that of the plate {frame.name!r}"
                )


def check_left_out(name: str, site: Site) -> None:
    """Raise if there is NaN or infinity under a mask of an observed site: its term is finite, and the gradient NaN.

    IndependentSteps fill what they leave out. Values are looked at only where that waits for no device.
    """
    (fn, mask), value = without_mask(site["fn"], site["mask"]), site["value"]
    if mask is False or not (value.is_floating_point() and torch.is_grad_enabled() and reads_at_once(value)):
        return
    chain = as_chain(fn)
    inner = counted(fn.step_distribution if isinstance(fn, IndependentSteps) else fn)
    if not isinstance(mask, Tensor) and inner is None:
        return
    value = value if chain is None else fill_path(chain, value)
    wrong = _measured(fn, ~value.isfinite())
    left_out = torch.zeros_like(wrong) if inner is None else wrong & ~inner  # where it counts, its term says so itself
    if isinstance(mask, Tensor):
        left_out = left_out | wrong & ~mask.reshape(mask.shape + (1,) * fn.event_dim)
    if left_out.any():
        raise ValueError(
            f"site {name!r}: what is observed has NaN or infinity under a mask, so that gradients would be NaN; "
            "expected IndependentSteps(step, mask, observed), which leaves holes out"
        )


def _measured(fn: Any, where: Tensor) -> Tensor:
    """Return which of what is marked, (*B, T, *E) bool, an emission counts as measured."""
    if not isinstance(fn, IndependentSteps) or fn.observed is None:
        return where
    observed = fn.observed
    return where & observed.reshape(observed.shape + (1,) * (fn.event_dim + len(fn.batch_shape) - observed.ndim))


def check_numbers(name: str, site: Site) -> None:
    """Raise if NaN counts in what is observed: for an observation whose density could not be computed."""
    fn, wrong = without_mask(site["fn"])[0], site["value"].isnan()
    if not wrong.any():
        return
    mask = counted(fn)
    wrong = _measured(fn, wrong if mask is None else wrong & mask)
    if wrong.any():
        raise ValueError(
            f"site {name!r}: what is observed has {int(wrong.sum())} NaN, expected numbers, or holes that `observed` "
            "names: IndependentSteps(step, mask, observed)"
        )


def check_drawn(guide_sites: dict[str, Site]) -> None:
    """Raise if the guide drew NaN: for a model that failed on it."""
    for name, site in guide_sites.items():
        if site["value"].isnan().any():
            raise ValueError(
                f"guide: site {name!r} is NaN, expected numbers; if the guide reads NaN in holes, "
                "mark_missing(values, observed, mask) has 0 there"
            )


def check_steps_masked(observed: dict[str, Site], latent: dict[str, Site]) -> None:
    """Raise if an observed site counts steps that are padding in a latent trajectory."""
    step_masks = {name: getattr(as_chain(site["fn"]), "step_mask", None) for name, site in latent.items()}
    for name, site in observed.items():
        chain, is_masked = as_chain(site["fn"]), site["mask"] is not None or counted(site["fn"]) is not None
        for other, mask in step_masks.items():
            if mask is None:
                continue
            if chain is not None and chain.step_mask is not None:
                counts = chain.step_mask.shape == mask.shape and not _is_within(chain.step_mask, mask)
            else:
                first = site["value"].shape[site["value"].ndim - site["fn"].event_dim :][:1]
                counts = not is_masked and first == mask.shape[-1:] and not mask.all()
            if counts:
                raise ValueError(
                    f"site {name!r}: counts steps that are padding in {other!r}, of {mask.shape[-1]}; expected "
                    "IndependentSteps(step, mask) with the same mask, or `.mask(True)` if these are no steps"
                )


def _is_within(a: Tensor, b: Tensor) -> bool:
    return _is_same_memory(a, b) or not bool((a & ~b).any())


def check_step_masks(name: str, q_mask: Tensor | None, p_mask: Tensor | None) -> None:
    """Raise unless the same steps are real in guide and model."""
    if not same(q_mask, p_mask):
        raise ValueError(
            f"site {name!r}: the chains of guide and model have different masks, expected the same real steps in both"
        )


def check_kinds(name: str, q: Any, p: Any, *, is_estimate: bool) -> None:
    """Raise if a mass is compared with a density, or if the gradient of an estimate for a class would be wrong."""
    if isinstance(bare(q), dist.Delta):  # a point is a mass
        return
    if _is_discrete(q) != _is_discrete(p):
        raise ValueError(
            f"site {name!r}: is a {type(q).__name__} in the guide and a {type(p).__name__} in the model, expected both "
            "discrete or both continuous: a density minus a mass is no KL (for a class, "
            "OneHotCategoricalStraightThrough in the guide)"
        )
    if is_estimate and _is_discrete(q) and torch.is_grad_enabled():
        raise ValueError(
            f"site {name!r}: is discrete and has no closed form here, so the gradient of its term would be silently "
            'wrong; expected kl="analytic" and the model\'s order of sites in the guide, or torch.no_grad()'
        )


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except (AttributeError, NotImplementedError):  # it does not say
        return False


def check_density(name: str, chain: Any) -> None:
    """Raise if a subclass of a chain changes its density and not its conditionals, which the ledger reads."""
    for method in ("log_prob", "log_prob_per_step"):
        if is_overridden(chain, method, beside="conditionals"):
            raise ValueError(
                f"site {name!r}: {type(chain).__name__} has its own {method} and inherits `conditionals`, which the "
                "ledger reads; expected both"
            )


def is_overridden(chain: Any, method: str, *, beside: str) -> bool:
    """Say whether a class has its own `method` and inherits `beside`, which then says something else."""
    places = [
        next((i for i, cls in enumerate(type(chain).__mro__) if name in vars(cls)), None) for name in (method, beside)
    ]
    return None not in places and places[0] < places[1]  # type: ignore[operator]


def check_agreement(name: str, q_site: Site, p_site: Site, q_mask: Any, p_mask: Any) -> None:
    """Raise unless a latent has the same plates, scale and mask in model and guide."""
    q_plates, p_plates = (plates_of(site["cond_indep_stack"]) for site in (q_site, p_site))
    if q_plates != p_plates:
        raise ValueError(
            f"site {name!r}: is in plates (dim, size) {sorted(p_plates)} in the model and {sorted(q_plates)} in the "
            "guide, expected the same"
        )
    if not same(q_site["scale"], p_site["scale"]):
        raise ValueError(
            f"site {name!r}: is scaled by {p_site['scale']} in the model and by {q_site['scale']} in the guide, "
            "expected the same; put the weight of a term into ELBOTerms.elbo(weights)"
        )
    if not same(q_mask, p_mask):
        raise ValueError(f"site {name!r}: has different masks in model and guide, expected the same")
    for site in (q_site, p_site):
        if getattr(without_mask(site["fn"])[0], "observed", None) is not None:
            raise ValueError(f"site {name!r}: is latent and has `observed`, which is for emissions")


def check_coordinates(name: str, q: Any, p: Any) -> None:
    """Raise unless the same coordinates of an event count in model and guide."""
    if not same(counted(q), counted(p)):
        raise ValueError(f"site {name!r}: coordinates have different masks in model and guide, expected the same")


def counted(fn: Any) -> Tensor | None:
    """Return which coordinates of an event count, (*B, *E) bool, by the masks within a distribution; None for all."""
    whole, masks = fn, []
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            mask = torch.as_tensor(fn._mask)
            masks.append(mask.reshape(mask.shape + (1,) * fn.event_dim))
        fn = fn.base_dist
    if getattr(fn, "step_mask", None) is not None:  # a chain
        masks.append(fn.step_mask.reshape(fn.step_mask.shape + (1,) * (fn.event_dim - 1)))
    found = None
    for mask in masks:
        found = mask.expand(whole.shape()) if found is None else found & mask
    return found


def same(a: Any, b: Any) -> bool:
    """Say whether two numbers or masks are the same; None is a mask under which all counts."""
    a, b = True if a is None else a, True if b is None else b
    if isinstance(a, Tensor) and isinstance(b, Tensor) and _is_same_memory(a, b):  # told without waiting for the device
        return True
    try:
        equal = a == b
    except RuntimeError:  # shapes that do not broadcast
        return False
    return bool(equal.all()) if isinstance(equal, Tensor) else bool(equal)


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
