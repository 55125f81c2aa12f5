"""The evidence lower bound of any Pyro model and guide, as a ledger of named terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from seqdisent._checks import check_positive
from seqdisent._random import kept_random_state
from seqdisent.inference import auxiliary
from seqdisent.inference.auxiliary import AuxiliaryLosses, check_auxiliary_losses
from seqdisent.inference.checks import same
from seqdisent.inference.interventions import Inferred
from seqdisent.inference.objectives import (
    KL,
    Held,
    Objective,
    check_kl,
    check_objective,
    score_twice,
)
from seqdisent.inference.plates import in_particle_plate, is_in, num_plates, per_sequence, sequences_plate
from seqdisent.inference.programs import run_both, sample_sites
from seqdisent.inference.scoring import Scores, score
from seqdisent.inference.terms import ELBOTerms, Term


def elbo_terms(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    kl: KL | None = None,
    objective: Objective = "elbo",
    num_particles: int = 1,
    vectorize_particles: bool = False,
    max_plate_nesting: int | None = None,
    auxiliary_losses: AuxiliaryLosses | None = None,
    **kwargs: Any,
) -> ELBOTerms:
    r"""Run guide and model and return every term of the evidence lower bound under its site's name.

    .. math:: \log p(x) \ge \mathbb E_q \Big[ \sum_i \log p(x_i \mid \cdot) \Big]
        - \sum_j \mathbb E_q \, \mathrm{KL}\big(q(z_j \mid \cdot) \,\|\, p(z_j \mid \cdot)\big)

    For VDSM these are the terms of the paper's equation 4, and of equation 7 at its first stage. With
    ``kl="analytic"`` a term is a closed-form KL divergence; for a chain, :math:`\sum_t \mathrm{KL}(q(z_t | z_{t-1}) \|
    p(z_t | z_{t-1}))`, each in closed form at the sampled path: the expectation of :math:`\log q - \log p`, usually
    with a lower variance. Two kinds of site are Monte Carlo all the same, and named in ``monte_carlo``: a pair without
    closed form (a flow, or a subclass of one's own: a formula counts for the classes that it is registered for), and a
    site that comes after another in the model and before it in the guide, which was then drawn knowing this one's
    value, so that an average over this one's posterior alone would be another number. With ``kl="monte-carlo"`` and
    unit weights the ledger is Pyro's ``Trace_ELBO`` on the same sample.

    The sequences' plate is the leftmost plate of the observed sites (batch first); a term is summed over everything
    else. Scales of plates and ``poutine.mask`` count in every term. Every site is scored at its sample statement, while
    its program runs, so a transition may use what the program changes later. A site that the guide alone has, marked
    ``is_auxiliary`` as in Pyro's automatic guides, has log q as its term: then only sums of terms are KL divergences.

    Args:
        model: a Pyro model; its observed sites give the likelihoods.
        guide: a Pyro guide with the same latent sites, all of them reparameterised.
        *args: given to both.
        kl: closed form where there is one ("analytic"), or Monte Carlo for every site. None: the first with the
            objective ``"elbo"``, the second with the others, which need the density of the sample.
        objective: what :meth:`ELBOTerms.bound` returns: ``"elbo"``, ``"stl"`` (the same, with the path derivative),
            ``"iwae"`` (the importance-weighted bound of K particles), ``"dreg"`` (the same, doubly reparameterised) or
            ``"fivo"`` (the log-evidence of :func:`seqdisent.particles.filter`, whose particles are resampled between
            steps). The terms of the first four are the same. For ``"stl"`` the guide runs a second time, for ``"dreg"``
            both programs do, with the same noise; under ``torch.no_grad()`` none does. Those of ``"fivo"`` are of the
            filter's particles, each step at what that step drew.
        num_particles: K samples of the guide.
        vectorize_particles: draw them in one run, in a plate to the left of all others. ``"fivo"`` always does.
        max_plate_nesting: how many dimensions the programs' own plates take. None: to find out, both run once more,
            without particles or gradient.
        auxiliary_losses: {name: function}. A function gets ``(drawn, *args, **kwargs)``, where `drawn` is {latent site:
            its :class:`~seqdisent.inference.Inferred`}, the guide's distribution and what was drawn from it, and
            returns a value for each sequence, (B,), which :meth:`ELBOTerms.bound` subtracts with its weight. With K
            particles, draws have K on the left, and it may return (K, B). It is no part of :meth:`ELBOTerms.elbo`.
        **kwargs: given to both.

    Raises:
        ValueError: a latent site of the model that the guide lacks, or the reverse; a guide site without `rsample` or
            with enumeration (its gradient would be silently wrong); scales, masks or shapes of a site that differ
            between model and guide; a site that is discrete in one of them alone; a batch dimension without a plate;
            a model that observes nothing; an observed site that counts steps which are padding in a latent; NaN that
            an observed site counts and its distribution refuses; an unknown `kl` or `objective`; ``kl="analytic"`` with
            another objective than ``"elbo"``; with ``"stl"`` or ``"dreg"``, a point (Delta) in the guide whose gradient
            would be silently wrong; with ``"fivo"``, programs that :func:`seqdisent.particles.filter` refuses, or an
            auxiliary loss; an auxiliary loss that returns another shape, or has the name of a site.
        RuntimeError: a program that fails with a particle dimension on the left of its own.
        TypeError: a chain's step mask that is not bool, an auxiliary loss that is no function.

    Example:
        Under the exact posterior the Monte Carlo bound is the evidence, whatever was drawn: here log N(1; 0, 2).

        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("sequences", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("sequences", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> elbo_terms(model, guide, torch.ones(1), kl="monte-carlo").elbo()
        tensor([-1.5155])
        >>> terms = elbo_terms(model, guide, torch.ones(3))
        >>> sorted(terms.log_likelihood), sorted(terms.kl), terms.elbo(weights={"z": 0.5}).shape
        (['x'], ['z'], torch.Size([3]))
        >>> terms.kl["z"]
        tensor([0.2216, 0.2216, 0.2216])

        A tighter bound: three sequences, eight draws each, and the gradient of Tucker et al. (2019).

        >>> terms = elbo_terms(
        ...     model, guide, torch.ones(3), objective="dreg", num_particles=8, vectorize_particles=True)
        >>> terms.kl["z"].shape, terms.bound()
        (torch.Size([8, 3]), tensor([-1.5155, -1.5155, -1.5155]))

        A loss beside the bound, named, with a weight of its own.

        >>> terms = elbo_terms(
        ...     model, guide, torch.ones(3), auxiliary_losses={"far": lambda drawn, x: drawn["z"].value ** 2})
        >>> torch.allclose(terms.bound({"far": 0.1}), terms.elbo() - 0.1 * terms.auxiliary_losses["far"])
        True
    """
    check_objective(objective)
    check_positive(num_particles=num_particles)
    analytic = check_kl(objective, kl) == "analytic"
    losses = check_auxiliary_losses(auxiliary_losses, objective)
    if objective == "fivo":
        from seqdisent.particles.bound import filtered_terms  # the filter is built on the ledger's parts

        is_stacked = num_particles > 1 or vectorize_particles
        return filtered_terms(model, guide, args, kwargs, num_particles=num_particles, is_stacked=is_stacked)
    how = analytic, objective, num_particles > 1, losses
    if num_particles == 1 and not vectorize_particles:
        return _one_run(model, guide, args, kwargs, *how, None)
    if vectorize_particles:
        if max_plate_nesting is None:
            max_plate_nesting = guess_max_plate_nesting(model, guide, args, kwargs)
        model, guide = (in_particle_plate(fn, num_particles, max_plate_nesting) for fn in (model, guide))
        try:
            return _one_run(model, guide, args, kwargs, *how, num_particles)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"vectorize_particles: model or guide failed with {num_particles} particles as a dimension on the left "
                f"of their own; expected programs that broadcast what they read of a latent (or "
                f"vectorize_particles=False): {error}"
            ) from error
    return _stacked([_one_run(model, guide, args, kwargs, *how, None) for _ in range(num_particles)])


def _one_run(
    model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any,
    analytic: bool, objective: Objective, several: bool, losses: AuxiliaryLosses, particles: int | None,
) -> ELBOTerms:  # fmt: skip
    twice = objective in ("stl", "dreg") and torch.is_grad_enabled()
    if twice:
        scores, log_q, again = score_twice(model, guide, args, kwargs, with_model=several and objective == "dreg")
    else:
        scores = score(model, guide, args, kwargs, analytic=analytic)
    plate = sequences_plate({name: site for name, site in scores.sites.items() if name in scores.observed})
    terms: dict[str, Term] = {}
    for name, found in {**scores.observed, **scores.latent}.items():
        site = scores.sites[name]
        per_step = None if found.per_step is None else per_sequence(found.per_step, site, plate, event_dims=1)
        real = None if found.real_steps is None else per_sequence(found.real_steps, site, plate, event_dims=1) > 0
        terms[name] = Term(
            name, "log_likelihood" if name in scores.observed else "kl", per_sequence(found.term, site, plate),
            per_step, real, found.pair, found.how, is_in(site, plate), not same(site["scale"], 1.0),
        )  # fmt: skip
    held = None
    if twice:
        by_site = {name: per_sequence(found.term, scores.sites[name], plate) for name, found in log_q.items()}
        held = Held(by_site, None if again is None else _log_weights(again, plate))
    ledger = ELBOTerms(terms, plate.size if plate is not None else 1, particles, objective, held)
    if not losses:
        return ledger
    sites = sample_sites(scores.guide_trace)
    draws = {name: Inferred(site["fn"], site["value"]) for name, site in sites.items()}
    return replace(
        ledger, auxiliary_losses=auxiliary.auxiliary_losses(losses, draws, args, kwargs, ledger.shape, particles)
    )


def _log_weights(scores: Scores, plate: Any) -> Tensor:
    total = torch.zeros(())
    for name, found in {**scores.observed, **scores.latent}.items():
        term = per_sequence(found.term, scores.sites[name], plate)
        total = total + (term if name in scores.observed else -term)
    return total


def _stacked(runs: list[ELBOTerms]) -> ELBOTerms:
    """Return the terms of several runs with a particle dimension on the left."""
    terms = {}
    for name, term in runs[0].terms.items():
        kept = [key for key in ("value", "per_step", "real_steps") if getattr(term, key) is not None]
        stacked: dict[str, Any] = {key: torch.stack([getattr(run.terms[name], key) for run in runs]) for key in kept}
        terms[name] = replace(term, pair=None, **stacked)
    held, first = None, runs[0].held
    if first is not None:
        each = [run.held for run in runs if run.held is not None]
        log_q = {name: torch.stack([one.log_q[name] for one in each]) for name in first.log_q}
        log_weights = [one.log_weights for one in each if one.log_weights is not None]
        held = Held(log_q, torch.stack(log_weights) if log_weights else None)
    losses = {name: torch.stack([run.auxiliary_losses[name] for run in runs]) for name in runs[0].auxiliary_losses}
    num_sequences, objective = runs[0].num_sequences, runs[0].objective
    return ELBOTerms(terms, num_sequences, len(runs), objective, held, auxiliary_losses=losses)


def guess_max_plate_nesting(
    model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
) -> int:
    """Run both once, without touching the random state, to find the leftmost plate."""
    with kept_random_state(), torch.no_grad(), poutine.block():
        return num_plates(*(sample_sites(trace) for trace in run_both(model, guide, args, kwargs)))
