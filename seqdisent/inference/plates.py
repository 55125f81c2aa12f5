"""Where the sequences are: the plate over them, found in one place, and sums over everything beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

Site = dict[str, Any]
PARTICLES = "_seqdisent_particles"  # the plate of particles that are drawn in one run


def sequences_plate(sites: Mapping[str, Site], size: int | None = None) -> Any:
    """Return the plate of the sequences, the leftmost of these sites (batch first) of that size, or None."""
    frames = [frame for site in sites.values() for frame in site["cond_indep_stack"] if _is_users(frame)]
    return min((f for f in frames if size in (None, f.size)), key=lambda frame: frame.dim, default=None)


def in_particle_plate(program: Callable[..., Any], num_particles: int, num_plates: int) -> Callable[..., Any]:
    """Return a program that draws particles as a dimension on the left of its own `num_plates`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(PARTICLES, num_particles, dim=-1 - num_plates):
            return program(*args, **kwargs)

    return run


def num_plates(*runs: Mapping[str, Site]) -> int:
    """Return how far to the left the plates of some programs' sites reach."""
    frames = [frame for sites in runs for site in sites.values() for frame in site["cond_indep_stack"]]
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)


def is_in(site: Mapping[str, Any], plate: Any) -> bool:
    """Say whether a site lies in the plate of the sequences."""
    return plate is not None and any(_is_users(f) and f.name == plate.name for f in site["cond_indep_stack"])


def by_row(mask: Tensor, site: Mapping[str, Any], plate: Any, batch_dims: int) -> Tensor | None:
    """Return a mask (B, T) with B where the sequences' plate stands among `batch_dims`; None outside of the plate.

    The plate is the guide's; in the model it may have another name, but not another place and size.
    """
    places = [frame.dim for frame in site["cond_indep_stack"] if _is_same(frame, plate) and -frame.dim <= batch_dims]
    if not places:
        return None
    shape = [1] * batch_dims
    shape[places[0]] = len(mask)
    return mask.reshape(*shape, -1)


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


def plates_of(stack: Sequence[Any]) -> set[tuple[int, int]]:
    """Return the plates of a site, as (dim, size)."""
    return {(frame.dim, frame.size) for frame in stack if frame.vectorized}


def per_sequence(term: Tensor, site: Site, plate: Any, *, event_dims: int = 0) -> Tensor:
    """Sum a term over all batch dimensions but the particles' and the sequences'."""
    event_shape = term.shape[term.ndim - event_dims :]
    batch_shape = torch.broadcast_shapes(term.shape[: term.ndim - event_dims], site["fn"].batch_shape)
    term = term.expand(batch_shape + event_shape)
    plates = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    kept = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized and frame.name == PARTICLES}
    if is_in(site, plate):
        kept.add(plate.dim)
    summed = []
    for dim in range(-(term.ndim - event_dims), 0):
        if dim not in kept:
            summed.append(dim - event_dims)
            if dim not in plates and term.shape[dim - event_dims] != 1:  # of a mask or a scale
                raise ValueError(
                    f"site {site['name']!r}: its term has batch shape {tuple(batch_shape)}, by a mask or a scale with "
                    f"a dimension {dim} that is no plate's"
                )
    return term.sum(summed) if summed else term


def _is_users(frame: Any) -> bool:
    return bool(frame.vectorized and frame.name != PARTICLES)


def _is_same(frame: Any, plate: Any) -> bool:
    if plate is None or not _is_users(frame) or frame.size != plate.size:
        return False
    return bool(frame.name == plate.name or frame.dim == plate.dim)
