"""The evidence lower bound of any Pyro model and guide, as a ledger of named terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from torch import Tensor

from seqdisent._checks import check_positive, check_weights
from seqdisent._distributed import all_processes
from seqdisent._kl import site_kl
from seqdisent._random import kept_random_state
from seqdisent._sites import (
    PARTICLES,
    check_sites,
    is_plate,
    per_sequence,
    run_both,
    same,
    sample_sites,
    sequences_plate,
)


@dataclass(frozen=True, eq=False)
class ELBOTerms:
    r"""The evidence lower bound, term by term, in nats, neither weighted nor reduced over the batch.

    Every term is (B,), one value a sequence; (K, B) with K particles; () or (K,) for a site outside the sequences'
    plate.

    Attributes:
        log_likelihood: {observed site: :math:`\log p(x \mid z)`}
        kl: {latent site: its KL term at the sample}. With ``kl="monte-carlo"``, :math:`\log q - \log p`.
        kl_per_step: {chain site: (..., B, T), the same term step by step, 0 at padding}
        real_steps: {chain site: (..., B, T) bool, which of these steps are not padding}
        conditionals: {latent site: (q, p)}, the distributions that the term compares; for a chain, each is its
            :class:`~seqdisent.chains.Conditionals` at the sampled path (of a chain of flows, the log-density there and
            nowhere else). Empty with several particles in a loop.
        monte_carlo: the latent sites whose term is a Monte Carlo estimate: all, or those without a closed form that
            holds (see :func:`elbo_terms`).
        num_sequences: B, or 1 without a plate.
    """

    log_likelihood: dict[str, Tensor]
    kl: dict[str, Tensor]
    kl_per_step: dict[str, Tensor]
    real_steps: dict[str, Tensor]
    conditionals: dict[str, tuple[Any, Any]]
    monte_carlo: frozenset[str]
    num_sequences: int
    _in_plate: frozenset[str]
    _num_particles: int | None  # None: terms have no particle dimension
    _wholly_monte_carlo: bool
    _scaled: frozenset[str] = frozenset()

    def elbo(self, weights: Mapping[str, float | Tensor] | None = None) -> Tensor:
        """Return the bound of each sequence, averaged over particles.

        Args:
            weights: {site: weight of its term}; a site that is not named counts 1. Both latent and observed sites may
                be named.

        Returns:
            (B,), or () without a plate, in nats. A term outside the sequences' plate is shared out equally, so that the
            sum over the batch counts it once.

        Raises:
            ValueError: `weights` names a site that the ledger does not have, or a number that is not finite, or a
                tensor of another shape.
            TypeError: a weight is not a number (a schedule gives one when it is called with the step).

        Example:
            See :func:`elbo_terms`.
        """
        weights = dict(weights or {})
        self.check_weights(weights)
        total = sum(
            (self._shared_out(name, term) * weights.get(name, 1.0) for name, term in self.log_likelihood.items()),
            start=torch.zeros(()),
        )
        for name, term in self.kl.items():
            total = total - self._shared_out(name, term) * weights.get(name, 1.0)
        return total if self._num_particles is None else total.mean(0)

    @property
    def shape(self) -> torch.Size:
        """That of the bound: (B,), or () without a plate."""
        return torch.Size([self.num_sequences] if self._in_plate else [])

    def check_weights(self, weights: Mapping[str, float | Tensor]) -> None:
        """Raise unless every one of `weights` is a finite number (or a tensor, one or one a sequence) of a known site.

        Args:
            weights: {site: weight of its term}.

        Raises:
            ValueError: as :meth:`elbo`.
            TypeError: as :meth:`elbo`.
        """
        unknown = set(weights) - set(self.log_likelihood) - set(self.kl)
        if unknown:
            raise ValueError(
                f"weights: no site {sorted(unknown)} in the ledger, expected some of "
                f"{sorted(self.kl)} (latent) and {sorted(self.log_likelihood)} (observed)"
            )
        check_weights(weights, self.num_sequences)

    def importance_weighted(self) -> Tensor:
        r"""Return the importance-weighted bound :math:`\log \frac1K \sum_k p(x, z_k) / q(z_k)` of each sequence, (B,).

        Raises:
            ValueError: the terms are not all Monte Carlo estimates (``elbo_terms(..., kl="monte-carlo")``), a site
                lies outside the sequences' plate, so that the weights do not factorise over sequences, or a site is
                scaled (a subsampling plate), so that its terms are no log-densities of a sequence.

        References:
            Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016.
        """
        if not self._wholly_monte_carlo:
            raise ValueError(
                'importance_weighted: the KL terms are analytic, expected elbo_terms(..., kl="monte-carlo")'
            )
        outside = sorted({*self.kl, *self.log_likelihood} - self._in_plate)
        if outside and self._in_plate:
            raise ValueError(
                f"importance_weighted: {outside} lie outside the sequences' plate; their weights are shared"
            )
        if self._scaled:
            raise ValueError(
                f"importance_weighted: {sorted(self._scaled)} are scaled (by a subsampling plate or poutine.scale); "
                "expected a plate over the sequences themselves"
            )
        terms = [*self.log_likelihood.values(), *(-term for term in self.kl.values())]
        log_weights = sum(terms[1:], start=terms[0])
        if self._num_particles is None:
            return log_weights
        return torch.logsumexp(log_weights, 0) - math.log(self._num_particles)

    def is_finite(self) -> Tensor:
        """Say whether every term is finite on this process: (), bool, without waiting for the device."""
        terms = [*self.log_likelihood.values(), *self.kl.values()]
        return torch.stack([term.detach().isfinite().all() for term in terms]).all()

    def check_finite(self, step: int | None = None) -> None:
        """Raise unless every term is finite; under torch.distributed all ranks raise together.

        Args:
            step: the training step, for the message.

        Raises:
            FloatingPointError: names the first term that is not finite, its sequence and its time step.
        """
        terms, finite = {**self.log_likelihood, **self.kl}, self.is_finite()
        if all_processes(finite):
            return
        when = "" if step is None else f" at training step {step}"
        if finite:
            raise FloatingPointError(f"a term of the ELBO is not finite{when} on another process")
        name, term = next((name, term) for name, term in terms.items() if not term.isfinite().all())
        kind = "log_likelihood" if name in self.log_likelihood else "kl"
        if name in self.kl_per_step and not self.kl_per_step[name].isfinite().all():
            kind, term = "kl_per_step", self.kl_per_step[name]
        where = tuple((~term.isfinite()).nonzero()[0].tolist())
        axes = [*(["particle"] if self._num_particles is not None else [])]
        axes += ["sequence"] if name in self._in_plate else []
        axes += ["time step"] if kind == "kl_per_step" else []
        place = ", ".join(f"{axis} {i}" for axis, i in zip(axes, where, strict=True))
        raise FloatingPointError(f"{kind}[{name!r}] is {term[where].item()}{when}" + (f" ({place})" if place else ""))

    def _shared_out(self, name: str, term: Tensor) -> Tensor:
        if name in self._in_plate or not self._in_plate:
            return term
        return (term / self.num_sequences).unsqueeze(-1)


def elbo_terms(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    kl: Literal["analytic", "monte-carlo"] = "analytic",
    num_particles: int = 1,
    vectorize_particles: bool = False,
    **kwargs: Any,
) -> ELBOTerms:
    r"""Run guide and model once and return every term of the evidence lower bound under its site's name.

    .. math:: \log p(x) \ge \mathbb E_q \Big[ \sum_i \log p(x_i \mid \cdot) \Big]
        - \sum_j \mathbb E_q \, \mathrm{KL}\big(q(z_j \mid \cdot) \,\|\, p(z_j \mid \cdot)\big)

    For VDSM these are the terms of the paper's equation 4, and of equation 7 at its first stage. With
    ``kl="analytic"`` a term is a closed-form KL divergence; for a chain, :math:`\sum_t \mathrm{KL}(q(z_t | z_{t-1}) \|
    p(z_t | z_{t-1}))`, each in closed form at the sampled path: the expectation of :math:`\log q - \log p`, usually
    with a lower variance. Two kinds of site are Monte Carlo all the same, and named in ``monte_carlo``: a pair without
    closed form (a flow), and a site that comes after another in the model and before it in the guide, which was then
    drawn knowing this one's value, so that an average over this one's posterior alone would be another number. With
    ``kl="monte-carlo"`` and unit weights the ledger is Pyro's ``Trace_ELBO`` on the same sample.

    The sequences' plate is the leftmost plate of the observed sites (batch first); a term is summed over everything
    else. Scales of plates and ``poutine.mask`` count in every term.

    Args:
        model: a Pyro model; its observed sites give the likelihoods.
        guide: a Pyro guide with the same latent sites, all of them reparameterised.
        *args: given to both.
        kl: closed form where there is one, or Monte Carlo for every site.
        num_particles: K samples of the guide.
        vectorize_particles: draw them in one run, in a plate to the left of all others. To find that place, both
            programs run once more, without particles or gradient.
        **kwargs: given to both.

    Raises:
        ValueError: a latent site of the model that the guide lacks, or the reverse; a guide site without `rsample` or
            with enumeration (its gradient would be silently wrong); scales, masks or shapes of a site that differ
            between model and guide; a site that is discrete in one of them alone; a batch dimension without a plate;
            a model that observes nothing; an unknown `kl`.
        TypeError: a chain's step mask that is not bool.

    Example:
        Under the exact posterior the Monte Carlo bound is the evidence, whatever was drawn: here log N(1; 0, 2).

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
    """
    if kl not in ("analytic", "monte-carlo"):
        raise ValueError(f'kl: got {kl!r}, expected "analytic" or "monte-carlo"')
    check_positive(num_particles=num_particles)
    if num_particles == 1 and not vectorize_particles:
        return _one_run(model, guide, args, kwargs, kl, None)
    if vectorize_particles:
        dim = -1 - _max_plate_nesting(model, guide, args, kwargs)
        model, guide = (_in_particle_plate(fn, num_particles, dim) for fn in (model, guide))
        return _one_run(model, guide, args, kwargs, kl, num_particles)
    runs = [_one_run(model, guide, args, kwargs, kl, None) for _ in range(num_particles)]

    def stack(name: str) -> dict[str, Tensor]:
        return {site: torch.stack([getattr(run, name)[site] for run in runs]) for site in getattr(runs[0], name)}

    return ELBOTerms(
        stack("log_likelihood"), stack("kl"), stack("kl_per_step"), stack("real_steps"), {},
        runs[0].monte_carlo, runs[0].num_sequences,
        runs[0]._in_plate, num_particles, runs[0]._wholly_monte_carlo, runs[0]._scaled,
    )  # fmt: skip


class DecomposedELBO(ELBO):
    """The ledger as a loss for ``pyro.infer.SVI``: minus the weighted bound, summed over the batch.

    Args:
        weights: {site: weight of its term}; 1 for the others. To anneal, build one for each step.
        kl: closed form where there is one, or Monte Carlo for every site.
        num_particles: samples of the guide that are averaged.
        vectorize_particles: draw them in one run.

    Raises:
        ValueError: as :func:`elbo_terms` and :meth:`ELBOTerms.elbo`, when it is used.
        TypeError: as these.

    Example:
        Minus the evidence of log N(1; 0, 2), of two sequences.

        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("sequences", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("sequences", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> round(DecomposedELBO(kl="monte-carlo").loss(model, guide, torch.ones(2)), 3)
        3.031
    """

    def __init__(
        self,
        *,
        weights: Mapping[str, float] | None = None,
        kl: Literal["analytic", "monte-carlo"] = "analytic",
        num_particles: int = 1,
        vectorize_particles: bool = False,
    ) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            num_particles=num_particles, vectorize_particles=vectorize_particles
        )
        self.weights = dict(weights or {})
        self.kl: Literal["analytic", "monte-carlo"] = kl

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return minus the bound of `model` and `guide` at `args` and `kwargs`, summed over the batch, in nats."""
        options: dict[str, Any] = {"num_particles": self.num_particles, "vectorize_particles": self.vectorize_particles}
        return -elbo_terms(model, guide, *args, kl=self.kl, **options, **kwargs).elbo(self.weights).sum()

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Return :meth:`differentiable_loss` of `model`, `guide`, `args` and `kwargs` as a number, without a graph."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Return :meth:`loss` of `model`, `guide`, `args` and `kwargs`, and add its gradient to the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[poutine.Trace, poutine.Trace]:
        """Return the traces of model and guide, as Pyro's base class wants them."""
        return run_both(model, guide, args, kwargs)


def _one_run(
    model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any, kl: str, num_particles: int | None
) -> ELBOTerms:
    model_trace, guide_trace = run_both(model, guide, args, kwargs)
    guide_sites = sample_sites(guide_trace)
    model_sites = sample_sites(model_trace)
    observed = {name: site for name, site in model_sites.items() if site["is_observed"]}
    latent = {name: site for name, site in model_sites.items() if not site["is_observed"]}
    check_sites(observed, latent, guide_sites)
    plate = sequences_plate(observed)

    log_likelihood, kl_terms, kl_per_step, real_steps, conditionals = {}, {}, {}, {}, {}
    monte_carlo, in_plate = set(), set()
    for name, site in observed.items():
        term = scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])
        log_likelihood[name] = per_sequence(term, site, plate)
    drawn_before = {name: set(list(guide_sites)[:i]) for i, name in enumerate(guide_sites)}
    for i, (name, site) in enumerate(latent.items()):
        # a closed form is right where all that p may condition on was drawn without looking at this site
        analytic = kl == "analytic" and drawn_before[name].issuperset(list(latent)[:i])
        found = site_kl(name, guide_sites[name], site, analytic=analytic)
        kl_terms[name] = per_sequence(found.term, site, plate)
        conditionals[name] = found.pair
        if found.per_step is not None and found.real_steps is not None:
            kl_per_step[name] = per_sequence(found.per_step, site, plate, event_dims=1)
            real_steps[name] = per_sequence(found.real_steps, site, plate, event_dims=1) > 0
        if not found.closed_form:
            monte_carlo.add(name)
    for name, site in model_sites.items():
        if any(is_plate(frame, plate) for frame in site["cond_indep_stack"]):
            in_plate.add(name)
    return ELBOTerms(
        log_likelihood, kl_terms, kl_per_step, real_steps, conditionals, frozenset(monte_carlo),
        plate.size if plate is not None else 1, frozenset(in_plate), num_particles, kl == "monte-carlo",
        frozenset(name for name, site in model_sites.items() if not same(site["scale"], 1.0)),
    )  # fmt: skip


def _in_particle_plate(fn: Callable[..., Any], num_particles: int, dim: int) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(PARTICLES, num_particles, dim=dim):
            return fn(*args, **kwargs)

    return run


def _max_plate_nesting(model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any) -> int:
    """Run both once, without touching the random state, to find the leftmost plate."""
    with kept_random_state(), torch.no_grad(), poutine.block():
        traces = run_both(model, guide, args, kwargs)
    frames = [f for trace in traces for s in sample_sites(trace).values() for f in s["cond_indep_stack"]]
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)
