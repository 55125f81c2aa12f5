"""What a chain is to the rest of the library: its conditionals, its protocol, and a factorised Normal seen as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor


class Conditionals(NamedTuple):
    r"""The conditionals of a chain at a given path.

    Attributes:
        initial: distribution of the first step, batch \*B, event (D,).
        steps: distribution of each later step given the one before, batch (T - 1, \*S, \*B), event (D,); None if T = 1.

    Example:
        >>> initial = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> steps = dist.Normal(torch.zeros(4, 2), 1.0).to_event(1)
        >>> Conditionals(initial, steps).log_prob_per_step(torch.zeros(5, 2))  # minus log(2 pi) each
        tensor([-1.8379, -1.8379, -1.8379, -1.8379, -1.8379])
    """

    initial: Any
    steps: Any

    def log_prob_per_step(self, path: Tensor) -> Tensor:
        r"""Return the log-density (\*S, \*B, T) of each step of `path` (\*S, \*B, T, D), in nats."""
        first = self.initial.log_prob(path[..., 0, :])
        if self.steps is None:
            return first.unsqueeze(-1)  # type: ignore[no-any-return]
        later = self.steps.log_prob(path[..., 1:, :].movedim(-2, 0)).movedim(0, -1)
        return torch.cat([first.unsqueeze(-1), later], -1)


class Drawn(NamedTuple):
    """A flow, or several side by side, known by the log-density of what was drawn from it.

    A flow knows the inverse of its last draw alone; for any other value, an autoregressive one needs a call for each
    coordinate.
    """

    density: Tensor

    def log_prob(self, _: Tensor) -> Tensor:  # noqa: D102
        return self.density


def as_drawn(step: Any, value: Tensor) -> Any:
    """Return what is kept of a distribution that `value` was just drawn from: itself, unless it is a flow."""
    return Drawn(step.log_prob(value)) if type(step) is dist.TransformedDistribution else step


def side_by_side(steps: Sequence[Any]) -> Any | None:
    """Return what `as_drawn` kept of each step as one with the steps on the left of the batch, or None.

    Diagonal Normals are one such Normal, flows are one :class:`Drawn`; there is none of anything else.
    """
    if all(isinstance(step, Drawn) for step in steps):
        return Drawn(torch.stack([step.density for step in steps]))
    bases = [step.base_dist for step in steps if type(step) is dist.Independent and step.reinterpreted_batch_ndims == 1]
    if len(bases) < len(steps) or not all(type(base) is dist.Normal for base in bases):
        return None  # not even a subclass, whose density may be another
    return _normal(torch.stack([base.loc for base in bases]), torch.stack([base.scale for base in bases]))


@runtime_checkable
class Chain(Protocol):
    """What the ledger and the interventions know a chain by; a class of your own may have just these.

    If it also has ``kept_conditionals(path)``, as :class:`~seqdisent.MarkovChain` has, the ledger asks there first. In
    the path that `conditionals` gets, padding repeats the first step, whatever was drawn there. A chain inside a plate
    also needs an ``expand`` that returns a chain: Pyro's own wraps it in something that is none.

    Example:
        >>> from seqdisent import MarkovChain
        >>> start = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> isinstance(MarkovChain(start, lambda z_prev: dist.Normal(z_prev, 0.1).to_event(1), 5), Chain)
        True
        >>> isinstance(start, Chain)
        False
    """

    @property
    def step_mask(self) -> Tensor | None:
        r"""Which steps are real, bool (\*B, T), or None if all are."""

    def conditionals(self, path: Tensor) -> Conditionals:
        r"""Return every step's conditional distribution at `path` (\*S, \*B, T, D)."""

    def log_prob_per_step(self, path: Tensor) -> Tensor:
        r"""Return every step's log-density (\*S, \*B, T) at `path` (\*S, \*B, T, D), in nats, 0 at padding."""

    def mean_path(self) -> Tensor:
        r"""Return the path (\*B, T, D) on which every step is its conditional's mean."""

    def extend(self, prefix: Tensor, num_steps: int, *, mask: Tensor | None = None, sample: bool = True) -> Tensor:
        r"""Return `prefix` (\*S, \*B, T', D) followed by `num_steps` further steps: (\*S, \*B, T' + num_steps, D).

        Args:
            prefix: at least one step.
            num_steps: how many to add.
            mask: (\*B, T') bool, which steps of the prefix are real; a shorter row goes on from its own last step.
            sample: draw each step, or take its conditional's mean.
        """


class _FactorisedChain:
    """A diagonal Normal with event (T, D), seen as a chain whose steps ignore the step before."""

    def __init__(self, loc: Tensor, scale: Tensor, step_mask: Tensor | None) -> None:
        self.loc, self.scale, self.step_mask = loc, scale, step_mask

    def conditionals(self, path: Tensor) -> Conditionals:
        initial = _normal(self.loc[..., 0, :], self.scale[..., 0, :])
        if self.loc.shape[-2] == 1:
            return Conditionals(initial, None)
        # the sample dimensions of the path stand between time and the batch
        num_sample_dims = path.ndim - self.loc.ndim
        loc, scale = (
            x[..., 1:, :].movedim(-2, 0).reshape(x.shape[-2] - 1, *(1,) * num_sample_dims, *x.shape[:-2], x.shape[-1])
            for x in (self.loc, self.scale)
        )
        shape = (self.loc.shape[-2] - 1, *path.shape[:-2], path.shape[-1])
        return Conditionals(initial, _normal(loc.expand(shape), scale.expand(shape)))

    def log_prob_per_step(self, path: Tensor) -> Tensor:
        log_prob: Tensor = _normal(self.loc, self.scale).log_prob(path)
        return log_prob if self.step_mask is None else torch.where(self.step_mask, log_prob, 0.0)

    def mean_path(self) -> Tensor:
        return self.loc

    def extend(self, prefix: Tensor, num_steps: int, *, mask: Tensor | None = None, sample: bool = True) -> Tensor:
        total = prefix.shape[-2] + num_steps
        if self.loc.shape[-2] < total:
            raise ValueError(f"num_steps: the distribution has {self.loc.shape[-2]} steps, expected {total}")
        shape = (*prefix.shape[:-2], total, prefix.shape[-1])
        normal = _normal(self.loc[..., :total, :].expand(shape), self.scale[..., :total, :].expand(shape))
        path: Tensor = normal.rsample() if sample else normal.mean
        known = torch.cat([prefix, prefix.new_zeros(*prefix.shape[:-2], num_steps, prefix.shape[-1])], -2)
        is_known = torch.arange(total, device=prefix.device) < prefix.shape[-2]
        if mask is not None:
            is_known = torch.cat([mask, mask.new_zeros(*mask.shape[:-1], num_steps)], -1)
        return torch.where(is_known.unsqueeze(-1), known, path)


def _normal(loc: Tensor, scale: Tensor) -> Any:
    return dist.Normal(loc, scale, validate_args=False).to_event(1)


def is_factorised(chain: Chain) -> bool:
    """Say whether a chain is a Normal that :func:`as_chain` sees as one."""
    return isinstance(chain, _FactorisedChain)


def as_chain(distribution: TorchDistribution) -> Chain | None:
    """Return `distribution` as a chain: itself if it has the protocol, a view of a factorised Normal, or None.

    The Normal's steps may be masked: ``Normal(loc, scale).to_event(1).mask(mask).to_event(1)``.
    """
    while isinstance(distribution, dist.MaskedDistribution):
        distribution = distribution.base_dist
    if isinstance(distribution, Chain):
        return distribution
    if len(distribution.event_shape) != 2:
        return None
    base, mask = distribution, None
    while isinstance(base, dist.Independent | dist.MaskedDistribution):
        if isinstance(base, dist.MaskedDistribution):
            if mask is not None or base.event_dim != 1 or not isinstance(base._mask, Tensor):
                return None  # no mask of steps
            mask = base._mask
        base = base.base_dist
    if not isinstance(base, dist.Normal) or base.event_shape:
        return None
    return _FactorisedChain(base.loc, base.scale, None if mask is None else mask.expand(base.loc.shape[:-1]))
