"""The log-evidence of a particle filter as a bound to train on, with the ledger of its particles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from seqdisent.inference.terms import ELBOTerms, Term
from seqdisent.particles.filtering import Walk, walk
from seqdisent.particles.programs import Programs, examined


def filtered_terms(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any],
    *, num_particles: int, is_stacked: bool,
) -> ELBOTerms:  # fmt: skip
    """Run a particle filter; return its log-evidence, and the terms of each site at what each step drew.

    Args:
        model: a Pyro model.
        guide: its guide, the proposal.
        args: of both.
        kwargs: likewise.
        num_particles: K.
        is_stacked: whether the terms have the particles as their first dimension; False for one particle alone.
    """
    programs = examined(model, guide, args, kwargs, num_particles, reparameterised=True)
    particles, steps = walk(programs, refuses=False)
    terms = {name: _term(name, programs, steps, is_stacked=is_stacked) for name in programs.counted}
    k = num_particles if is_stacked else None
    return ELBOTerms(terms, len(programs.real), k, "fivo", log_evidence=particles.log_evidence)


def _term(name: str, programs: Programs, steps: Walk, *, is_stacked: bool) -> Term:
    real = programs.real

    def of_steps(by_step: list[dict[str, Tensor]]) -> list[Tensor]:
        shape = programs.num_particles, len(real)
        found = [torch.where(real[:, t], of[name], 0.0).expand(shape) for t, of in enumerate(by_step) if name in of]
        return found if is_stacked else [term[0] for term in found]

    log_p = of_steps(steps.log_p)
    if name in programs.observed:
        per_step = torch.stack(log_p, -1)
        return _of_trajectory(name, "log_likelihood", per_step, programs)
    by_step = [q - p for q, p in zip(of_steps(steps.log_q), log_p, strict=True)]
    if name in programs.static:
        return Term(name, "kl", by_step[0], None, None, None, "monte carlo", in_plate=True, is_scaled=False)
    return _of_trajectory(name, "kl", torch.stack(by_step, -1), programs)


def _of_trajectory(name: str, kind: Any, per_step: Tensor, programs: Programs) -> Term:
    real_steps = (programs.real & programs.counted[name]).expand(per_step.shape)
    how: Any = "density" if kind == "log_likelihood" else "monte carlo"
    return Term(name, kind, per_step.sum(-1), per_step, real_steps, None, how, in_plate=True, is_scaled=False)
