"""The sites of a model's and a guide's traces: which there are, whether they fit, and the plate of the sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

Site = dict[str, Any]
PARTICLES = "_seqdisent_particles"  # the plate of particles that are drawn in one run


def sample_sites(trace: poutine.Trace) -> dict[str, Any]:
    """Return {name: sample site} without a plate's subsample and without what ``pyro.deterministic`` records."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not (site["infer"] or {}).get("_deterministic")
    }


def run_both(
    model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[poutine.Trace, poutine.Trace]:
    """Run the guide, then the model on the guide's sample."""
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    for name, site in sample_sites(guide_trace).items():
        if site["is_observed"]:
            raise ValueError(f"guide: site {name!r} is observed, expected a sample")
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    for program, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, site in sample_sites(trace).items():
            check_plates(program, name, site)
    return model_trace, guide_trace


def check_sites(observed: dict[str, Site], latent: dict[str, Site], guide_sites: dict[str, Site]) -> None:
    if not observed:
        raise ValueError("model: observes nothing, expected at least one site with obs=...")
    missing, extra = sorted(set(latent) - set(guide_sites)), sorted(set(guide_sites) - set(latent))
    if missing:
        raise ValueError(
            f"guide: has no site {missing}, which the model samples; expected one site for each latent of the model"
        )
    if extra:
        raise ValueError(
            f"model: has no latent site {extra}, which the guide samples; expected the sites {sorted(latent)}"
        )
    for name, site in observed.items():
        check_observed(name, site)
    for name, site in guide_sites.items():
        if site["infer"].get("enumerate"):
            raise ValueError(
                f"guide: site {name!r} is enumerated, which the ledger does not support; "
                "expected a reparameterised sample"
            )
        if not site["fn"].has_rsample:
            raise ValueError(
                f"guide: site {name!r} has no rsample ({type(site['fn']).__name__}), so the gradient of its parameters "
                f"would be silently wrong; expected a reparameterised distribution{_instead(site['fn'])}"
            )


def bare(fn: Any) -> Any:
    """Return a distribution without what `.to_event(...)` and `.mask(...)` put around it."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def _instead(fn: Any) -> str:
    is_class = isinstance(bare(fn), dist.Categorical | dist.OneHotCategorical)
    return ", for a class OneHotCategoricalStraightThrough" if is_class else ""


def check_plates(program: str, name: str, site: Site) -> None:
    """Raise if a batch dimension is in no plate: it would be summed away, and Pyro's own bound refuses it too."""
    batch_shape = site["fn"].batch_shape
    if site["is_observed"]:
        value_shape = site["value"].shape
        batch_shape = torch.broadcast_shapes(batch_shape, value_shape[: len(value_shape) - site["fn"].event_dim])
    plates = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    for dim in range(-len(batch_shape), 0):
        if batch_shape[dim] != 1 and dim not in plates:
            raise ValueError(
                f"{program}: site {name!r} has batch shape {tuple(batch_shape)} and no plate at dimension {dim}; "
                "expected one there, or `.to_event(n)` if these are values of one sequence"
            )


def check_observed(name: str, site: Site) -> None:
    """Raise unless what is observed has a value for each coordinate of the event and each member of the plates.

    An emission that does not change over time may have one step for all of them: an event (1, D) or (1, C, H, W).
    """
    fn, value = site["fn"], site["value"]
    if isinstance(fn, dist.Unit):  # pyro.factor observes nothing
        return
    batch_shape, event_shape = value.shape[: value.ndim - fn.event_dim], value.shape[value.ndim - fn.event_dim :]
    first = 1 if fn.event_dim in (2, 4) and fn.event_shape[0] == 1 else 0
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


def check_agreement(name: str, q_site: Site, p_site: Site, q_mask: Any, p_mask: Any) -> None:
    q_plates, p_plates = (
        {(frame.dim, frame.size) for frame in site["cond_indep_stack"] if frame.vectorized} for site in (q_site, p_site)
    )
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


def unmasked(site: Site) -> tuple[Any, Any]:
    """Return a site's distribution without `.mask(...)` around it, and all its masks in one."""
    fn, mask = site["fn"], site["mask"]
    while isinstance(fn, dist.MaskedDistribution):
        mask = fn._mask if mask is None else mask & fn._mask
        fn = fn.base_dist
    return fn, mask


def counted(fn: Any) -> Tensor | None:
    """Return which coordinates of an event count, (*B, *E) bool, by the masks within a distribution; None for all."""
    shape, masks = fn.shape(), []
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            mask = torch.as_tensor(fn._mask)
            masks.append(mask.reshape(mask.shape + (1,) * fn.event_dim))
        fn = fn.base_dist
    if getattr(fn, "step_mask", None) is not None:  # a chain
        masks.append(fn.step_mask.unsqueeze(-1))
    found = None
    for mask in masks:
        found = mask.expand(shape) if found is None else found & mask
    return found


def same(a: Any, b: Any) -> bool:
    if a is b or a is None or b is None:
        return a is b
    if isinstance(a, Tensor) and isinstance(b, Tensor) and _is_one_view(a, b):  # known without waiting for the device
        return True
    try:
        equal = a == b
    except RuntimeError:  # shapes that do not broadcast
        return False
    return bool(equal.all()) if isinstance(equal, Tensor) else bool(equal)


def _is_one_view(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def sequences_plate(observed: dict[str, Site]) -> Any:
    frames = [
        frame
        for site in observed.values()
        for frame in site["cond_indep_stack"]
        if frame.vectorized and frame.name != PARTICLES
    ]
    return min(frames, key=lambda frame: frame.dim, default=None)


def is_plate(frame: Any, plate: Any) -> bool:
    """Say whether a plate is that of the sequences."""
    return plate is not None and frame.vectorized and frame.name == plate.name


def per_sequence(term: Tensor, site: Site, plate: Any, *, event_dims: int = 0) -> Tensor:
    """Sum a term over all batch dimensions but the particles' and the sequences'."""
    event_shape = term.shape[term.ndim - event_dims :]
    term = term.expand(
        torch.broadcast_shapes(term.shape[: term.ndim - event_dims], site["fn"].batch_shape) + event_shape
    )
    kept = {
        frame.dim
        for frame in site["cond_indep_stack"]
        if frame.vectorized and (frame.name == PARTICLES or is_plate(frame, plate))
    }
    plates = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    summed = []
    for dim in range(-(term.ndim - event_dims), 0):
        if dim not in kept:
            summed.append(dim - event_dims)
            if dim not in plates and term.shape[dim - event_dims] != 1:  # of a mask or a scale
                shape = tuple(term.shape[: term.ndim - event_dims])
                raise ValueError(
                    f"site {site['name']!r}: its term has batch shape {shape}, by a mask or a scale with a dimension "
                    f"{dim} that is no plate's"
                )
    return term.sum(summed) if summed else term
