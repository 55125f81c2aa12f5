"""A prior that learns to go on by itself: a chain that scores some sequences on its own roll-outs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from typing_extensions import Self

from seqdisent.chains.protocol import Conditionals
from seqdisent.chains.recurrent import RecurrentChain


class OvershootingChain(RecurrentChain):
    r"""A recurrent chain that scores a part of the sequences as its own means go on, for training a prior.

    One-step predictions can be close while a roll-out drifts, since errors of single steps add up. Here the first
    sequences of a batch are scored step by step after the means that the transition makes of z_1 by itself,
    :math:`p(z_t \mid \bar z_{t-1})`, as many after means from the middle of the sequence on, and the rest on their own
    steps. So whatever else the transition reads (a latent of dynamics) has to tell how the sequence goes on.

    Of the sequences that are rolled out the score is no log-density, and their KL term no part of a bound. Evaluate
    with a :class:`RecurrentChain`: ``kind = OvershootingChain if self.training else RecurrentChain``. Train with it
    once the emission is trained, and frozen: from the start of training, the posterior may collapse.

    Args:
        initial: as of :class:`RecurrentChain`.
        transition: as of :class:`RecurrentChain`.
        num_steps: T, the number of steps.
        part: of the sequences, in [0, 1], that are rolled out: one half from z_1, one half from the middle of the
            sequence, their numbers rounded up. They are the first along the rightmost batch dimension (of one sequence
            alone, that one), so batches should be large and in random order.
        **options: the further arguments of :class:`RecurrentChain`.

    Shape:
        - as of :class:`RecurrentChain`

    Raises:
        ValueError: a `part` outside [0, 1], and what :class:`RecurrentChain` refuses.
        TypeError: as :class:`RecurrentChain`.

    Example:
        >>> import pyro.distributions as dist
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> def step(z_prev, h):
        ...     return dist.Normal(z_prev + 1, 1.0).to_event(1)
        >>> start = dist.Normal(torch.zeros(2, 1), 1.0).to_event(1)
        >>> chain = OvershootingChain(start, step, 4, part=0.5, recurrence=nn.GRU(1, 3))
        >>> path = torch.tensor([[[0.0], [5.0], [5.0], [5.0]]] * 2)
        >>> chain.conditionals(path).steps.mean.squeeze(-1)  # of the first sequence, only z_1 counts
        tensor([[1., 1.],
                [2., 6.],
                [3., 6.]])

    References:
        Hafner et al., "Learning latent dynamics for planning from pixels", ICML 2019, section 4 (latent overshooting,
        over all distances and with samples).
    """

    def __init__(
        self,
        initial: TorchDistribution,
        transition: Callable[..., TorchDistribution],
        num_steps: int,
        *,
        part: float = 0.5,
        **options: Any,
    ) -> None:
        if not 0 <= part <= 1:
            raise ValueError(f"part: got {part}, expected a part of the sequences, in [0, 1]")
        super().__init__(initial, transition, num_steps, **options)
        self.part = part

    def expand(self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: object = None) -> Self:
        """Return this chain with a larger batch; a particle plate calls it."""
        larger = super().expand(batch_shape)
        larger.part = self.part
        return larger

    def conditionals(self, path: Tensor) -> Conditionals:
        r"""Return every conditional at `path` (\*S, \*B, T, D), of some sequences at the means that follow z_1."""
        path = self._check_path(path)
        row = (
            path.new_zeros(()) if path.ndim == 2 else torch.arange(path.shape[-3], device=path.device) / path.shape[-3]
        )
        mask = self._step_mask
        length = torch.full_like(row, self.num_steps, dtype=torch.long) if mask is None else mask.sum(-1)
        known = torch.where(row < self.part, (length // 2).clamp(min=1), length)
        known = torch.where(row < self.part / 2, 1, known)
        walked, state = [path[..., 0, :]], self.state_after(path[..., :1, :])
        for t in range(1, self.num_steps):
            conditional, state = self.step(walked[-1], state)
            is_own = t < known if mask is None else (t < known) | ~mask[..., t]  # padding repeats the first step
            walked.append(torch.where(is_own.unsqueeze(-1), path[..., t, :], conditional.mean))
        return super().conditionals(torch.stack(walked, -2))
