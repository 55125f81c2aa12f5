"""The terms of an evidence lower bound, named, and the bounds that they make."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from seqdisent._checks import check_weights
from seqdisent._distributed import all_processes
from seqdisent.inference.kl import How
from seqdisent.inference.objectives import Held, Objective, bound_of


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
        objective: what :meth:`bound` returns.
        held: the same draws scored once more, held fixed, for the gradient of an objective that needs it; else None.
        log_evidence: (B,), the particle filter's estimate under ``"fivo"``; else None.
        auxiliary_losses: {name: (B,) or (K, B)}, what :meth:`bound` subtracts beside the terms; no part of the ELBO.
    """

    terms: dict[str, Term]
    num_sequences: int
    num_particles: int | None
    objective: Objective = "elbo"
    held: Held | None = None
    log_evidence: Tensor | None = None
    auxiliary_losses: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if twice := sorted(set(self.auxiliary_losses) & set(self.terms)):
            raise ValueError(f"auxiliary_losses: {twice} are sites, expected names of their own")

    def __repr__(self) -> str:
        named = [(f"{term.kind}[{term.name!r}]", term.value) for term in self.terms.values()]
        named += [(f"auxiliary_loss[{name!r}]", value) for name, value in self.auxiliary_losses.items()]
        means = [f"{name}={value.detach().mean().item():.4g}" for name, value in named]
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

    def bound(self, weights: Mapping[str, float | Tensor] | None = None) -> Tensor:
        r"""Return the bound of each sequence under the ledger's objective, for training to maximise.

        =========  ================================================  ============================================
        objective  the bound                                         its gradient
        =========  ================================================  ============================================
        ``elbo``   :meth:`elbo`                                      of the bound as it stands
        ``stl``    :meth:`elbo`                                      without the guide's score, which has mean 0
        ``iwae``   :meth:`importance_weighted`                       of the bound as it stands
        ``dreg``   :meth:`importance_weighted`                       doubly reparameterised
        ``fivo``   the log-evidence of a particle filter             of the bound, the ancestors held constant
        =========  ================================================  ============================================

        Args:
            weights: as of :meth:`elbo`, of auxiliary losses too; of sites, none with ``iwae``, ``dreg`` and ``fivo``.

        Returns:
            (B,), or () without a plate, in nats; less the weighted auxiliary losses.

        Raises:
            ValueError: as :meth:`elbo` and :meth:`importance_weighted`; weights with ``iwae``, ``dreg``
                or ``fivo``.
            TypeError: as :meth:`elbo`.

        Example:
            See :func:`elbo_terms`.

        References:
            Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016 (``iwae``). Roeder, Wu and
            Duvenaud, "Sticking the landing: simple, lower-variance gradient estimators for variational inference",
            NeurIPS 2017 (``stl``, their equation 6). Tucker, Lawson, Gu and Maddison, "Doubly reparameterized gradient
            estimators for Monte Carlo objectives", ICLR 2019 (``dreg``, their equation 8), here also where model and
            guide share parameters. Maddison et al., "Filtering variational objectives", NeurIPS 2017, Naesseth et al.,
            "Variational sequential Monte Carlo", AISTATS 2018, and Le et al., "Auto-encoding sequential Monte Carlo",
            ICLR 2018 (``fivo``, in all three without the term of the resampling).
        """
        weights = dict(weights or {})
        of_losses = {name: weights.pop(name) for name in self.auxiliary_losses if name in weights}
        bound = bound_of(self, weights)
        return bound - self.penalty(of_losses) if self.auxiliary_losses else bound

    def penalty(self, weights: Mapping[str, float | Tensor] | None = None) -> Tensor:
        """Return the weighted sum of the auxiliary losses of each sequence, averaged over particles.

        Args:
            weights: {auxiliary loss: its weight}; 1 for the others.

        Returns:
            (B,), or () without a plate.

        Raises:
            ValueError: `weights` names what is no auxiliary loss, or has another shape or a number that is not finite.
            TypeError: a weight is not a number.
        """
        weights = dict(weights or {})
        if unknown := sorted(set(weights) - set(self.auxiliary_losses)):
            raise ValueError(f"weights: no auxiliary loss {unknown}, expected some of {sorted(self.auxiliary_losses)}")
        check_weights(weights, self.num_sequences)
        losses = [value * weights.get(name, 1.0) for name, value in self.auxiliary_losses.items()]
        if not losses:
            return torch.zeros(self.shape)
        total = sum(losses[1:], start=losses[0])
        return total if self.num_particles is None else total.mean(0)

    def elbo(self, weights: Mapping[str, float | Tensor] | None = None) -> Tensor:
        """Return the bound of each sequence, averaged over particles.

        Under ``"fivo"`` the particles are those of the filter, some of them resampled: their average is no more than
        the filter's log-evidence, but not the bound of the guide alone.

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
        self._check_names(weights, self.terms)
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
        """Raise unless `weights` are those of sites and of auxiliary losses.

        Raises:
            ValueError: as of :meth:`elbo`.
            TypeError: as there.
        """
        self._check_names(weights, {**self.terms, **self.auxiliary_losses})

    def _check_names(self, weights: Mapping[str, float | Tensor], known: Mapping[str, Any]) -> None:
        if unknown := set(weights) - set(known):
            losses = f", or of the auxiliary losses {sorted(self.auxiliary_losses)}" if self.auxiliary_losses else ""
            raise ValueError(
                f"weights: no site {sorted(unknown)} in the ledger, expected some of "
                f"{sorted(self.kl)} (latent) and {sorted(self.log_likelihood)} (observed){losses}"
            )
        check_weights(weights, self.num_sequences)

    def importance_weighted(self) -> Tensor:
        r"""Return the importance-weighted bound :math:`\log \frac1K \sum_k p(x, z_k) / q(z_k)` of each sequence, (B,).

        Raises:
            ValueError: the terms are not all Monte Carlo estimates (``elbo_terms(..., kl="monte-carlo")``), a site
                lies outside the sequences' plate, so that the weights do not factorise over sequences, a site is
                scaled (a subsampling plate), so that its terms are no log-densities of a sequence, or the objective is
                ``"fivo"``, whose particles are resampled between steps.

        References:
            Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016.
        """
        log_weights = self.log_weights()
        if self.num_particles is None:
            return log_weights
        return torch.logsumexp(log_weights, 0) - math.log(self.num_particles)

    def log_weights(self) -> Tensor:
        r"""Return the log importance weights :math:`\log p(x, z_k) - \log q(z_k)`, (K, B), or (B,) of one draw.

        Raises:
            ValueError: as :meth:`importance_weighted`.
        """
        if any(term.kind == "kl" and term.how == "closed form" for term in self.terms.values()):
            raise ValueError(
                'importance_weighted: the KL terms are analytic, expected elbo_terms(..., kl="monte-carlo")'
            )
        if self.log_evidence is not None:
            raise ValueError(
                f"importance_weighted: the particles of objective={self.objective!r} are resampled between steps, so "
                'that their terms make up no weights of whole sequences; expected bound(), or objective="iwae"'
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
        return sum(signed[1:], start=signed[0])

    def is_finite(self) -> Tensor:
        """Say whether every term is finite on this process: (), bool, without waiting for the device."""
        values = [*(term.value for term in self.terms.values()), *self.auxiliary_losses.values()]
        return torch.stack([value.detach().isfinite().all() for value in values]).all()

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
        name, value, axes = next(found for found in self._values() if not found[1].isfinite().all())
        where = tuple((~value.isfinite()).nonzero()[0].tolist())
        place = ", ".join(f"{axis} {i}" for axis, i in zip(axes, where, strict=True))
        raise FloatingPointError(f"{name} is {value[where].item()}{when}" + (f" ({place})" if place else ""))

    def _values(self) -> Iterator[tuple[str, Tensor, list[str]]]:
        """Yield every number of the ledger, those of steps before their sum: its name, its values, their axes."""
        particle = [] if self.num_particles is None else ["particle"]
        for term in self.terms.values():
            axes = [*particle, *(["sequence"] if term.in_plate else [])]
            if term.per_step is not None:
                yield f"{term.kind}_per_step[{term.name!r}]", term.per_step, [*axes, "time step"]
            yield f"{term.kind}[{term.name!r}]", term.value, axes
        for name, value in self.auxiliary_losses.items():
            yield f"auxiliary_loss[{name!r}]", value, [*particle, *(["sequence"] if self._has_plate else [])]

    def _shared_out(self, term: Term) -> Tensor:
        if term.in_plate or not self._has_plate:
            return term.signed
        return (term.signed / self.num_sequences).unsqueeze(-1)

    def _of(self, kind: str) -> list[Term]:
        return [term for term in self.terms.values() if term.kind == kind]
