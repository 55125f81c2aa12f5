"""Model and guide with particles: which sites they have, and runs in which the filter chooses the values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from seqdisent._random import kept_random_state
from seqdisent.chains import Draw, IndependentSteps
from seqdisent.chains.factorised import as_chain, as_steps, without_mask
from seqdisent.inference.checks import (
    FILLS,
    check_agreement,
    check_gradient,
    check_kinds,
    check_observed,
    check_sites,
    check_step_masks,
    check_steps_masked,
    same,
)
from seqdisent.inference.kl import conditionals_at, log_q_per_step, over_steps
from seqdisent.inference.plates import Site, in_particle_plate, sequences_plate
from seqdisent.inference.programs import is_deterministic, is_sample, run_both, sample_sites

Choose = Callable[[str, Any], Tensor]  # of a latent site's name and distribution: its value


@dataclass(frozen=True)
class Programs:
    """Model and guide, and what is known of their sites.

    Attributes:
        num_particles: K.
        static: the latents that do not change over time, in the guide's order.
        trajectories: the other latents, in the guide's order.
        observed: the observed sites.
        real: (B, T) bool, which steps are not padding.
        counted: {site: (B, T) bool}, of which steps the terms count; (B,) of a static latent. The observed sites first,
            in the model's order.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    num_particles: int
    static: tuple[str, ...]
    trajectories: tuple[str, ...]
    observed: tuple[str, ...]
    real: Tensor
    counted: Mapping[str, Tensor]

    def draw_guide(self, choose: Choose, *, stop_after: tuple[str, ...] = ()) -> dict[str, Any]:
        """Run the guide on chosen values, up to the last of the sites named; return what each is drawn from."""
        return self._run(self.guide, _Run(choose, stop_after=stop_after), self.args, self.kwargs).distributions

    def read_model(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Run the model up to its last latent; return what each is drawn from, and the terms of the static ones."""
        run = _Run(lambda name, _: values[name], self.static, stop_after=self.static + self.trajectories)
        self._run(self.model, run, self.args, self.kwargs)
        return run.distributions, run.terms

    def score_model(
        self,
        values: Mapping[str, Tensor],
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        beside: tuple[str, ...] | None = None,
    ) -> dict[str, Tensor]:
        """Run the model on given values; return {site: its log-densities}, (K, B, T) or, of static sites, (K, B).

        Args:
            values: of the latents.
            args: the model's own, or those of some steps.
            kwargs: likewise.
            beside: the latents to score beside what is observed; None for all.
        """
        wanted = (self.static + self.trajectories if beside is None else beside) + self.observed
        run = _Run(lambda name, _: values[name], wanted, static=self.static)
        self._run(self.model, run, self.args if args is None else args, self.kwargs if kwargs is None else kwargs)
        return run.terms

    def _run(self, program: Callable[..., Any], run: _Run, args: Any, kwargs: Any) -> _Run:
        try:
            with run:
                in_particle_plate(program, self.num_particles, 1)(*args, **kwargs)
        except _Stopped:
            pass
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"num_particles: model or guide failed with {self.num_particles} particles as a dimension on the left "
                f"of their own; expected programs that broadcast what they read of a latent: {error}"
            ) from error
        return run


class _Stopped(Exception):  # noqa: N818
    """A program has reached the last site that was asked for."""


class _Run(Messenger):
    """Chooses the latents' values, and scores sites at their sample statements: afterwards, they may have changed."""

    def __init__(
        self,
        choose: Choose,
        scored: tuple[str, ...] = (),
        *,
        static: tuple[str, ...] | None = None,
        stop_after: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.choose, self.scored, self.stop_after = choose, scored, set(stop_after)
        self.static = scored if static is None else static
        self.with_gradient = torch.is_grad_enabled()
        self.distributions: dict[str, Any] = {}
        self.terms: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if is_sample(msg) and not (is_deterministic(msg) or msg["is_observed"] or msg["done"]):
            fn, _ = without_mask(msg["fn"])
            self.distributions[msg["name"]] = fn
            msg["value"] = self.choose(msg["name"], fn)

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.scored:
            self.terms[name] = log_density(msg, is_static=name in self.static, with_gradient=self.with_gradient)
        if self.stop_after and self.stop_after <= set(self.distributions):
            raise _Stopped


def log_density(site: Site, *, is_static: bool, with_gradient: bool) -> Tensor:
    """Return the log-density of a site at its value, step by step of a trajectory; 0 where it does not count."""
    fn, mask = without_mask(site["fn"], site["mask"])
    if is_static:
        with torch.set_grad_enabled(with_gradient):
            return scale_and_mask(fn.log_prob(site["value"]), mask=mask)  # type: ignore[no-any-return]
    chain = trajectory(site["fn"])
    at = conditionals_at(site["name"], chain, site["value"])  # the transition runs as in the program
    with torch.set_grad_enabled(with_gradient):
        per_step = log_q_per_step(chain, Draw(site["value"], at))
        return over_steps(per_step, chain.step_mask, 1.0, mask)[0]


def trajectory(fn: Any) -> Any:
    """Return a distribution as a chain, or as steps along the leftmost dimension of its event, or None."""
    chain = as_chain(fn)
    return as_steps(fn) if chain is None else chain


def examined(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Any,
    num_particles: int,
    *,
    reparameterised: bool = False,
) -> Programs:
    """Run both programs once, without particles, and say what is wrong with their sites.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: of both.
        kwargs: likewise.
        num_particles: K.
        reparameterised: whether a site of the guide without ``rsample`` is wrong.
    """
    with kept_random_state(), torch.no_grad(), poutine.block():
        model_trace, guide_trace = run_both(model, guide, args, kwargs)
    in_model, in_guide = sample_sites(model_trace), sample_sites(guide_trace)
    observed = {name: site for name, site in in_model.items() if site["is_observed"]}
    latent = {name: site for name, site in in_model.items() if not site["is_observed"]}
    check_sites(observed, latent, in_guide)
    plate = sequences_plate(observed)
    for site in [*in_model.values(), *in_guide.values()]:
        _check_place(site, plate)
    for name, site in observed.items():
        check_observed(name, site)
    check_steps_masked(observed, latent)
    static: list[str] = []
    trajectories: dict[str, Any] = {}
    for name, q_site in in_guide.items():
        if reparameterised:
            check_gradient(name, q_site)
        p_site = latent.get(name)
        if p_site is None:  # check_sites lets those pass that are marked
            raise ValueError(f"guide: site {name!r} is auxiliary, expected the model's sites alone")
        if as_chain(q_site["fn"]) is None and as_chain(p_site["fn"]) is None:
            static.append(name)
            if trajectories:
                raise ValueError(
                    f"guide: site {name!r} does not change over time and is drawn after the trajectory "
                    f"{next(iter(trajectories))!r}, expected the static sites first"
                )
        else:
            trajectories[name] = _checked_trajectory(name, q_site, p_site)
        check_agreement(name, q_site, p_site, *(without_mask(s["fn"], s["mask"])[1] for s in (q_site, p_site)))
        check_kinds(name, *(without_mask(s["fn"])[0] for s in (q_site, p_site)), is_estimate=reparameterised)
    num_steps = {name: chain.event_shape[0] for name, chain in trajectories.items()}
    num_steps |= {name: _observed_steps(name, site) for name, site in observed.items()}
    if len(set(num_steps.values())) > 1:
        raise ValueError(f"model: its sites have different numbers of steps, {num_steps}, expected one number")
    shape = plate.size, next(iter(num_steps.values()))
    all_steps = torch.ones(shape, dtype=torch.bool, device=next(iter(observed.values()))["value"].device)
    masks = [chain.step_mask for chain in trajectories.values()]
    if not masks:
        masks = [trajectory(site["fn"]).step_mask for site in observed.values()]
    real = ~all_steps
    for mask in masks:
        real = real | (all_steps if mask is None else mask)
    counted = {name: _counted(site, all_steps) for name, site in observed.items()}
    for name in latent:
        counted[name] = _counted(in_guide[name], all_steps, trajectories.get(name))
        counted[name] = counted[name] if name in trajectories else counted[name][:, 0]
    return Programs(
        model, guide, args, kwargs, num_particles, tuple(static), tuple(trajectories), tuple(observed), real, counted
    )


def _check_place(site: Site, plate: Any) -> None:
    name, plates = site["name"], {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
    if plate is None or plates != {-1: plate.size}:
        where = ", ".join(f"{size} at dimension {dim}" for dim, size in plates.items()) or "none"
        raise ValueError(
            f"site {name!r}: is in plates of {where}, expected one, of the sequences, at dimension -1; a trajectory is "
            "one site, a chain"
        )
    if not same(site["scale"], 1.0):
        raise ValueError(f"site {name!r}: is scaled, so that its term is no log-density; expected no scale")


def _checked_trajectory(name: str, q_site: Site, p_site: Site) -> Any:
    """Return the guide's chain of a site."""
    q, p = trajectory(q_site["fn"]), trajectory(p_site["fn"])
    for program, site, chain in (("guide", q_site, q), ("model", p_site, p)):
        if chain is None:
            raise ValueError(
                f"{program}: site {name!r} is a {type(site['fn']).__name__}, expected a chain as in the other program"
            )
    if not isinstance(q, IndependentSteps) and not (hasattr(q, "step") and hasattr(q, "state_after")):
        raise ValueError(
            f"guide: site {name!r} is a {type(q).__name__} that cannot be drawn step by step, expected a chain with "
            "step(z_prev, state) and state_after(path), as MarkovChain has them"
        )
    if q.event_shape != p.event_shape:
        raise ValueError(
            f"site {name!r}: has event shape {tuple(q.event_shape)} in the guide, expected the model's "
            f"{tuple(p.event_shape)}"
        )
    check_step_masks(name, q.step_mask, p.step_mask)
    return q


def _counted(site: Site, all_steps: Tensor, chain: Any = None) -> Tensor:
    """Return which steps of a site count: of what is observed, those that were."""
    fn, mask = without_mask(site["fn"], site["mask"])
    chain = trajectory(fn) if site["is_observed"] else chain
    real = over_steps(all_steps, None if chain is None else chain.step_mask, 1.0, mask)[1]
    seen = chain.observed_steps if site["is_observed"] and isinstance(chain, FILLS) else None
    return real if seen is None else real & seen


def _observed_steps(name: str, site: Site) -> int:
    fn, value = site["fn"], site["value"]
    if trajectory(fn) is None:
        raise ValueError(
            f"site {name!r}: is observed and has no steps ({type(fn).__name__}), expected IndependentSteps or a chain"
        )
    return int(value.shape[value.ndim - fn.event_dim])
