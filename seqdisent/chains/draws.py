"""What a chain hands over when it draws: the path, and the conditionals that its steps were drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from seqdisent.chains.protocol import Conditionals


class DrawnStep(NamedTuple):
    """A step of a draw: its conditional, what was drawn, and the log-density where only a draw has it cheaply."""

    conditional: Any
    value: Tensor
    log_prob: Tensor | None


def drawn_step(conditional: Any, value: Tensor) -> DrawnStep:
    """Return what is kept of a step, right after its draw: a flow remembers the inverse of its last one alone."""
    return DrawnStep(conditional, value, conditional.log_prob(value) if is_flow(conditional) else None)


class Draw(NamedTuple):
    r"""A path and what it was drawn from: what a chain hands over to the ledger.

    Attributes:
        path: (\*S, \*B, T, D).
        conditionals: the chain's :class:`~seqdisent.chains.Conditionals` at the path; None of independent steps.
        log_prob_per_step: (\*S, \*B, T), in nats, where the density of a draw costs less than that of a given path (an
            autoregressive flow knows the inverse of its own draw); else None.

    Example:
        See :meth:`seqdisent.MarkovChain.rsample_with_conditionals`.
    """

    path: Tensor
    conditionals: Any
    log_prob_per_step: Tensor | None = None


def conditionals_at_draw(drawn: Sequence[DrawnStep]) -> Conditionals | None:
    """Return the conditionals of a path from the steps that drew it: diagonal Normals, or flows; None of others."""
    initial, *steps = [step.conditional for step in drawn]
    if not steps:
        return Conditionals(initial, None)
    if all(is_flow(step) for step in steps):
        return Conditionals(initial, _Flows(steps))
    bases = [step.base_dist for step in steps if type(step) is dist.Independent and step.reinterpreted_batch_ndims == 1]
    if len(bases) < len(steps) or not all(type(base) is dist.Normal for base in bases):
        return None  # not even a subclass, whose density may be another
    loc, scale = torch.stack([base.loc for base in bases]), torch.stack([base.scale for base in bases])
    return Conditionals(initial, dist.Normal(loc, scale, validate_args=False).to_event(1))


def log_prob_at_draw(drawn: Sequence[DrawnStep]) -> Tensor | None:
    """Return the log-density of each step at what it drew if there are flows among them, else None."""
    if all(step.log_prob is None for step in drawn):
        return None
    each = [step.conditional.log_prob(step.value) if step.log_prob is None else step.log_prob for step in drawn]
    return torch.stack(each, -1)


class _Flows:
    """Flows, each with parameters of its own, as one distribution with time on the left of the batch."""

    def __init__(self, steps: Sequence[TorchDistribution]) -> None:
        self.steps = steps

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.stack([step.log_prob(z) for step, z in zip(self.steps, value, strict=True)])


def is_flow(step: Any) -> bool:
    """Say whether a distribution is a flow, whose density at its last draw is cheap."""
    return type(step) is dist.TransformedDistribution
