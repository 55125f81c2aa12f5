"""The ledger as a loss of Pyro's own stochastic variational inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from seqdisent.inference.auxiliary import AuxiliaryLosses, check_auxiliary_losses
from seqdisent.inference.elbo import elbo_terms, guess_max_plate_nesting
from seqdisent.inference.objectives import KL, Objective, check_kl, check_objective, check_unweighted
from seqdisent.inference.programs import run_both


class DecomposedELBO(ELBO):
    """The ledger as a loss for ``pyro.infer.SVI``: minus the weighted bound, summed over the batch.

    Args:
        weights: {site: weight of its term}; 1 for the others. To anneal, build one for each step.
        kl: as of :func:`elbo_terms`.
        objective: likewise; ``"iwae"``, ``"dreg"`` and ``"fivo"`` take no `weights`.
        num_particles: likewise; ``"elbo"`` and ``"stl"`` average their bounds.
        vectorize_particles: likewise; how far the programs' own plates reach is found out once, as by Pyro's bounds.
        auxiliary_losses: likewise; `weights` may name them.

    Raises:
        ValueError: an unknown `objective`, or one that does not fit `kl` or `weights`; as :func:`elbo_terms` and
            :meth:`ELBOTerms.bound`, when it is used.
        TypeError: as these.
        RuntimeError: as these.

    Example:
        Minus the evidence of log N(1; 0, 2), of two sequences.

        >>> import pyro
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
        kl: KL | None = None,
        objective: Objective = "elbo",
        num_particles: int = 1,
        vectorize_particles: bool = False,
        auxiliary_losses: AuxiliaryLosses | None = None,
    ) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            num_particles=num_particles, vectorize_particles=vectorize_particles
        )
        check_objective(objective)
        check_kl(objective, kl)
        self.auxiliary_losses = dict(check_auxiliary_losses(auxiliary_losses, objective))
        check_unweighted(
            objective, {site: w for site, w in (weights or {}).items() if site not in self.auxiliary_losses}
        )
        self.weights = dict(weights or {})
        self.kl, self.objective = kl, objective
        self._own_plates: int | None = None

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return minus the bound of `model` and `guide` at `args` and `kwargs`, summed over the batch, in nats."""
        options: dict[str, Any] = {"num_particles": self.num_particles, "vectorize_particles": self.vectorize_particles}
        options |= {"kl": self.kl, "objective": self.objective, "auxiliary_losses": self.auxiliary_losses}
        if self.vectorize_particles and self.objective != "fivo":
            if self._own_plates is None:
                self._own_plates = guess_max_plate_nesting(model, guide, args, kwargs)
            options["max_plate_nesting"] = self._own_plates
        return -elbo_terms(model, guide, *args, **options, **kwargs).bound(self.weights).sum()

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
