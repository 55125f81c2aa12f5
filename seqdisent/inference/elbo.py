"""The evidence lower bound of any Pyro model and guide, as a ledger of named terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor

from seqdisent._checks import check_positive, check_weights
from seqdisent._distributed import all_processes
from seqdisent._random import kept_random_state
from seqdisent.inference.checks import same
from seqdisent.inference.kl import How
from seqdisent.inference.plates import in_particle_plate, is_in, num_plates, per_sequence, sequences_plate
from seqdisent.inference.programs import run_both, sample_sites
from seqdisent.inference.scoring import score


@dataclass(frozen=True, eq=False)
class Term:
    r"""The term of one site in the bound, in nats.

    Attributes:
        name: of the site.
        kind: what the bound adds, ``"log_likelihood"``, or subtracts, ``"kl"``.
        value: (B,), a value a sequence; (K, B) with K particles; () or (K,) outside the sequences' plate.
        per_step: (..., B, T), the same step by step, 0 at padding; None of a site that is no trajectory.
        real_steps: (..., B, T) bool, which of these steps are not padding and, of an emission, were observed, at least
            in part; None likewise.
        pair: (q, p), the distributions that a KL term compares; None of a likelihood, or of particles in a loop.
        how: ``"density"`` of what is observed, ``"closed form"`` or ``"monte carlo"``.
        in_plate: whether the site lies in the sequences' plate.
        is_scaled: whether a subsampling plate or ``poutine.scale`` scales it.
    """

    name: str
    kind: Literal["log_likelihood", "kl"]
    value: Tensor
    per_step: Tensor | None
    real_steps: Tensor | None
    pair: tuple[Any, Any] | None
    how: How
    in_plate: bool
    is_scaled: bool

    @property
    def signed(self) -> Tensor:
        """What the term adds to the bound."""
        return self.value if self.kind == "log_likelihood" else -self.value


@dataclass(frozen=True, eq=False)
class ELBOTerms:
    r"""The evidence lower bound, term by term, in nats, neither weighted nor reduced over the batch.

    Attributes:
        terms: {site: its :class:`~seqdisent.inference.Term`}, the observed sites first, in the model's order.
        num_sequences: B, or 1 without a plate.
        num_particles: K, or None where terms have no particle dimension.
    """

    terms: dict[str, Term]
    num_sequences: int
    num_particles: int | None

    def __repr__(self) -> str:
        means = [f"{term.kind}[{term.name!r}]={term.value.detach().mean().item():.4g}" for term in self.terms.values()]
        return f"ELBOTerms({', '.join(means)}; means over {self.num_sequences} sequences, in nats)"

    @property
    def log_likelihood(self) -> dict[str, Tensor]:
        r"""{observed site: :math:`\log p(x \mid z)`}."""
        return {term.name: term.value for term in self._of("log_likelihood")}

    @property
    def kl(self) -> dict[str, Tensor]:
        r"""{latent site: its KL term at the sample}. With ``kl="monte-carlo"``, :math:`\log q - \log p`."""
        return {term.name: term.value for term in self._of("kl")}

    @property
    def log_likelihood_per_step(self) -> dict[str, Tensor]:
        """{observed :class:`~seqdisent.IndependentSteps` or chain: (..., B, T)}, its term by step, 0 at padding."""
        return {term.name: term.per_step for term in self._of("log_likelihood") if term.per_step is not None}

    @property
    def kl_per_step(self) -> dict[str, Tensor]:
        """{latent trajectory: (..., B, T)}, its term step by step, 0 at padding."""
        return {term.name: term.per_step for term in self._of("kl") if term.per_step is not None}

    @property
    def real_steps(self) -> dict[str, Tensor]:
        """{trajectory: (..., B, T) bool}, which steps are not padding."""
        return {name: term.real_steps for name, term in self.terms.items() if term.real_steps is not None}

    @property
    def conditionals(self) -> dict[str, tuple[Any, Any]]:
        """{latent site: (q, p)}, the distributions that its term compares; empty with several particles in a loop.

        Of a chain, each is its :class:`~seqdisent.chains.Conditionals` at the sampled path; of independent steps in
        both programs, the distribution of a step.
        """
        return {term.name: term.pair for term in self._of("kl") if term.pair is not None}

    @property
    def monte_carlo(self) -> frozenset[str]:
        """The latent sites whose term is a Monte Carlo estimate: all, or those without a closed form that holds."""
        return frozenset(term.name for term in self._of("kl") if term.how == "monte carlo")

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
            (self._shared_out(term) * weights.get(name, 1.0) for name, term in self.terms.items()),
            start=torch.zeros(()),
        )
        return total if self.num_particles is None else total.mean(0)

    @property
    def shape(self) -> torch.Size:
        """That of the bound: (B,), or () without a plate."""
        return torch.Size([self.num_sequences] if self._has_plate else [])

    @property
    def _has_plate(self) -> bool:
        return any(term.in_plate for term in self.terms.values())

    def check_weights(self, weights: Mapping[str, float | Tensor]) -> None:
        """Raise unless :meth:`elbo` would take `weights`.

        Raises:
            ValueError: as there.
            TypeError: as there.
        """
        unknown = set(weights) - set(self.terms)
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
        if any(term.kind == "kl" and term.how == "closed form" for term in self.terms.values()):
            raise ValueError(
                'importance_weighted: the KL terms are analytic, expected elbo_terms(..., kl="monte-carlo")'
            )
        outside = sorted(name for name, term in self.terms.items() if not term.in_plate)
        if outside and self._has_plate:
            raise ValueError(
                f"importance_weighted: {outside} lie outside the sequences' plate; their weights are shared"
            )
        if scaled := sorted(name for name, term in self.terms.items() if term.is_scaled):
            raise ValueError(
                f"importance_weighted: {scaled} are scaled (by a subsampling plate or poutine.scale); "
                "expected a plate over the sequences themselves"
            )
        signed = [term.signed for term in self.terms.values()]
        log_weights = sum(signed[1:], start=signed[0])
        if self.num_particles is None:
            return log_weights
        return torch.logsumexp(log_weights, 0) - math.log(self.num_particles)

    def is_finite(self) -> Tensor:
        """Say whether every term is finite on this process: (), bool, without waiting for the device."""
        return torch.stack([term.value.detach().isfinite().all() for term in self.terms.values()]).all()

    def check_finite(self, step: int | None = None) -> None:
        """Raise unless every term is finite; under torch.distributed all ranks raise together.

        Args:
            step: the training step, for the message.

        Raises:
            FloatingPointError: names the first term that is not finite, its sequence and its time step.
        """
        finite = self.is_finite()
        if all_processes(finite):
            return
        when = "" if step is None else f" at training step {step}"
        if finite:
            raise FloatingPointError(f"a term of the ELBO is not finite{when} on another process")
        term = next(term for term in self.terms.values() if not term.value.isfinite().all())
        kind: str = term.kind
        value = term.value
        axes = [*(["particle"] if self.num_particles is not None else []), *(["sequence"] if term.in_plate else [])]
        if term.per_step is not None and not term.per_step.isfinite().all():
            kind, value, axes = f"{term.kind}_per_step", term.per_step, [*axes, "time step"]
        where = tuple((~value.isfinite()).nonzero()[0].tolist())
        place = ", ".join(f"{axis} {i}" for axis, i in zip(axes, where, strict=True))
        raise FloatingPointError(
            f"{kind}[{term.name!r}] is {value[where].item()}{when}" + (f" ({place})" if place else "")
        )

    def _shared_out(self, term: Term) -> Tensor:
        if term.in_plate or not self._has_plate:
            return term.signed
        return (term.signed / self.num_sequences).unsqueeze(-1)

    def _of(self, kind: str) -> list[Term]:
        return [term for term in self.terms.values() if term.kind == kind]


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
        kl: closed form where there is one, or Monte Carlo for every site.
        num_particles: K samples of the guide.
        vectorize_particles: draw them in one run, in a plate to the left of all others. To find that place, both
            programs run once more, without particles or gradient.
        **kwargs: given to both.

    Raises:
        ValueError: a latent site of the model that the guide lacks, or the reverse; a guide site without `rsample` or
            with enumeration (its gradient would be silently wrong); scales, masks or shapes of a site that differ
            between model and guide; a site that is discrete in one of them alone; a batch dimension without a plate;
            a model that observes nothing; an observed site that counts steps which are padding in a latent; NaN that
            an observed site counts and its distribution refuses; an unknown `kl`.
        RuntimeError: a program that fails with a particle dimension on the left of its own.
        TypeError: a chain's step mask that is not bool.

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
    """
    if kl not in ("analytic", "monte-carlo"):
        raise ValueError(f'kl: got {kl!r}, expected "analytic" or "monte-carlo"')
    check_positive(num_particles=num_particles)
    analytic = kl == "analytic"
    if num_particles == 1 and not vectorize_particles:
        return _one_run(model, guide, args, kwargs, analytic, None)
    if vectorize_particles:
        nesting = _max_plate_nesting(model, guide, args, kwargs)
        model, guide = (in_particle_plate(fn, num_particles, nesting) for fn in (model, guide))
        try:
            return _one_run(model, guide, args, kwargs, analytic, num_particles)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"vectorize_particles: model or guide failed with {num_particles} particles as a dimension on the left "
                f"of their own; expected programs that broadcast what they read of a latent (or "
                f"vectorize_particles=False): {error}"
            ) from error
    return _stacked([_one_run(model, guide, args, kwargs, analytic, None) for _ in range(num_particles)])


def _one_run(
    model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any, analytic: bool, particles: int | None
) -> ELBOTerms:
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
    return ELBOTerms(terms, plate.size if plate is not None else 1, particles)


def _stacked(runs: list[ELBOTerms]) -> ELBOTerms:
    """Return the terms of several runs with a particle dimension on the left."""
    terms = {}
    for name, term in runs[0].terms.items():
        kept = [key for key in ("value", "per_step", "real_steps") if getattr(term, key) is not None]
        stacked: dict[str, Any] = {key: torch.stack([getattr(run.terms[name], key) for run in runs]) for key in kept}
        terms[name] = replace(term, pair=None, **stacked)
    return ELBOTerms(terms, runs[0].num_sequences, len(runs))


def _max_plate_nesting(model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any) -> int:
    """Run both once, without touching the random state, to find the leftmost plate."""
    with kept_random_state(), torch.no_grad(), poutine.block():
        return num_plates(*(sample_sites(trace) for trace in run_both(model, guide, args, kwargs)))
