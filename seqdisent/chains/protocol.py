"""What a chain is to the rest of the library: what it draws, its conditionals, how it goes on."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from seqdisent.masks import fill_padding, overwrite_padding


class Conditionals(NamedTuple):
    r"""The conditionals of a chain at a given path.

    Attributes:
        initial: distribution of the first step, batch \*B, event (D,).
        steps: distribution of each later step given the one before, batch (T - 1, \*S, \*B), event (D,); None if T = 1.

    Example:
        >>> import pyro.distributions as dist
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
        return torch.cat([first.unsqueeze(-1).expand(*later.shape[:-1], 1), later], -1)


class ChainState(NamedTuple):
    """Where a chain stands: what ``step`` returns beside each conditional, and takes to go on.

    Attributes:
        num_steps: how many steps it has behind it.
        reads: {name: what is read beside the path, one tensor a step}.
        carried: what a recurrent network carries; None for a Markov chain.

    Example:
        See :meth:`seqdisent.MarkovChain.step`.
    """

    num_steps: int
    reads: Any = None
    carried: Any = None


@runtime_checkable
class Chain(Protocol):
    """What the ledger and the interventions know a chain by; a class of your own may have just these.

    If it also has ``rsample_with_conditionals()``, which returns a :class:`~seqdisent.chains.Draw`, the ledger draws a
    guide's path by it and does not ask for the conditionals a second time. In the path that `conditionals` gets,
    padding repeats the first step, whatever was drawn there. A guide's chain that has ``step`` and ``state_after`` too,
    as :class:`~seqdisent.MarkovChain` has, can be drawn step by step by a particle filter. A chain inside a plate also
    needs an ``expand`` that returns a chain: Pyro's own wraps it in something that is none.

    Example:
        >>> import pyro.distributions as dist
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


def fill_path(chain: Any, path: Tensor) -> Tensor:
    """Return a path with the batch of a chain's mask, whose padding repeats the first step."""
    if chain.step_mask is None:
        return path
    event_dims = len(chain.event_shape) if hasattr(chain, "event_shape") else 2
    batch, event = path.shape[: path.ndim - event_dims], path.shape[path.ndim - event_dims :]
    path = path.expand(torch.broadcast_shapes(batch, chain.step_mask.shape[:-1]) + event)
    return fill_padding(path, chain.step_mask, event_dims=event_dims - 1)


def overwrite_steps(chain: Any, per_step: Tensor) -> Tensor:
    r"""Return a term (\*S, \*B, T) of a chain with 0 at padding."""
    return per_step if chain.step_mask is None else overwrite_padding(per_step, chain.step_mask, event_dims=0)
