"""Steps that are independent of each other: the emission of every step, or a latent without memory."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from typing_extensions import Self

from seqdisent._checks import check_positive
from seqdisent.chains.draws import Draw, is_flow
from seqdisent.chains.protocol import Chain, Conditionals
from seqdisent.masks import check_mask, fill_padding, overwrite_padding


class IndependentSteps(TorchDistribution):
    r"""The steps of a sequence, independent of each other, as one distribution: :math:`\prod_t p(x_t)` over real steps.

    An emission is such a distribution, given the latents, and so is a latent without memory. The ledger has the term
    of such a site step by step too.

    Args:
        step: the distribution of every step, batch (\*B, T), event E. With T = 1, every step of what is observed has
            that one distribution.
        mask: (\*B, T) bool, True where a step is real, padding on the right; None if all are. What stands in padding
            reaches no value and no gradient.

    Shape:
        - batch \*B, event (T, \*E)

    Raises:
        TypeError: a mask that is not bool.
        ValueError: a step without a batch dimension for time, or a mask of another shape or with a hole.

    Example:
        >>> step = dist.Normal(torch.zeros(2, 3, 4), 1.0).to_event(1)
        >>> x = IndependentSteps(step, torch.tensor([[True, True, True], [True, False, False]]))
        >>> x.batch_shape, x.event_shape, x.log_prob_per_step(torch.zeros(2, 3, 4))
        (torch.Size([2]), torch.Size([3, 4]), tensor([[-3.6758, -3.6758, -3.6758],
                [-3.6758,  0.0000,  0.0000]]))
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, step: TorchDistribution, mask: Tensor | None = None) -> None:
        if not step.batch_shape:
            raise ValueError(
                f"step: has batch shape (), expected (*B, T): the last batch dimension of a {type(step).__name__} with "
                f"event {tuple(step.event_shape)} is time"
            )
        if mask is not None:
            num_steps = step.batch_shape[-1]
            if num_steps == 1 and isinstance(mask, Tensor) and mask.ndim:
                num_steps = mask.shape[-1]
                step = step.expand((*step.batch_shape[:-1], num_steps))
            mask = check_mask(mask, step.batch_shape[:-1], num_steps)
        self._set(step, mask)

    def _set(self, step_distribution: TorchDistribution, mask: Tensor | None) -> None:
        self.step_distribution, self._step_mask = step_distribution, mask
        *batch, num_steps = step_distribution.batch_shape
        event_shape = torch.Size((num_steps, *step_distribution.event_shape))
        super().__init__(torch.Size(batch), event_shape, validate_args=False)

    @classmethod
    def _of(cls, step: TorchDistribution, mask: Tensor | None) -> Self:
        """Return steps under any mask; one of a program of the user's own may have holes."""
        made = cls.__new__(cls)
        made._set(step, mask)
        return made

    @property
    def step_mask(self) -> Tensor | None:
        r"""Which steps are real, bool (\*B, T), or None if all are."""
        return self._step_mask

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether the steps can be reparameterised."""
        return bool(self.step_distribution.has_rsample)

    @property
    def support(self) -> constraints.Constraint:
        """That of the step, at every step."""
        return constraints.independent(self.step_distribution.support, 1)

    @property
    def mean(self) -> Tensor:
        r"""The means of the steps (\*B, T, \*E)."""
        mean: Tensor = self.step_distribution.mean
        return mean

    @property
    def variance(self) -> Tensor:
        r"""The variances of the steps (\*B, T, \*E)."""
        variance: Tensor = self.step_distribution.variance
        return variance

    def expand(self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: object = None) -> Self:
        """Return these steps with a larger batch; a plate calls it."""
        num_steps = self.step_distribution.batch_shape[-1]
        mask = None if self._step_mask is None else self._step_mask.expand(*batch_shape, num_steps)
        return type(self)._of(self.step_distribution.expand((*batch_shape, num_steps)), mask)

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        r"""Draw all steps (\*sample_shape, \*B, T, \*E), reparameterised; padding repeats the first."""
        return self._filled(self.step_distribution.rsample(torch.Size(sample_shape)))

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        r"""Draw all steps (\*sample_shape, \*B, T, \*E) without gradient; padding repeats the first."""
        with torch.no_grad():
            return self._filled(self.step_distribution.sample(torch.Size(sample_shape)))

    def rsample_with_conditionals(
        self,
        sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size(),  # noqa: B008
    ) -> Draw:
        r"""Draw all steps as :meth:`rsample` does, and hand over their densities where they are flows.

        Args:
            sample_shape: S.

        Returns:
            The :class:`~seqdisent.chains.Draw`, without conditionals.
        """
        path = self.step_distribution.rsample(torch.Size(sample_shape))
        log_prob = self.step_distribution.log_prob(path) if is_flow(self.step_distribution) else None
        return Draw(self._filled(path), None, log_prob)

    def log_prob_per_step(self, path: Tensor) -> Tensor:
        r"""Return the log-density (\*S, \*B, T) of each step of `path` (\*S, \*B, T, \*E), in nats; 0 at padding."""
        log_prob: Tensor = self.step_distribution.log_prob(self._filled(path))
        return log_prob if self._step_mask is None else overwrite_padding(log_prob, self._step_mask, event_dims=0)

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Return the log-density (\*S, \*B) of sequences (\*S, \*B, T, \*E), in nats."""
        return self.log_prob_per_step(value).sum(-1)

    def conditionals(self, path: Tensor) -> Conditionals:
        r"""Return each step as if it were drawn after the one before, beside another chain; `path` (\*S, \*B, T, D).

        Raises:
            NotImplementedError: the steps are no diagonal Normals.
        """
        loc, scale = self._normal()
        initial = _normal(loc[..., 0, :], scale[..., 0, :])
        if loc.shape[-2] == 1:
            return Conditionals(initial, None)
        # the sample dimensions of the path stand between time and the batch
        ones = (1,) * (path.ndim - loc.ndim)
        shape = (loc.shape[-2] - 1, *path.shape[:-2], path.shape[-1])
        loc, scale = (
            x[..., 1:, :].movedim(-2, 0).reshape(x.shape[-2] - 1, *ones, *x.shape[:-2], x.shape[-1]).expand(shape)
            for x in (loc, scale)
        )
        return Conditionals(initial, _normal(loc, scale))

    def mean_path(self) -> Tensor:
        r"""Return the means of the steps (\*B, T, \*E); padding repeats the first."""
        return self._filled(self.mean)

    def extend(self, prefix: Tensor, num_steps: int, *, mask: Tensor | None = None, sample: bool = True) -> Tensor:
        r"""Return `prefix` (\*S, \*B, T', \*E) followed by this distribution's own steps after it.

        Args:
            prefix: at least one step.
            num_steps: how many steps to add; the distribution must have T' + num_steps.
            mask: (\*B, T') bool, which steps of the prefix are real; a shorter row goes on after its own last step.
            sample: draw each step, or take its mean.

        Raises:
            ValueError: the distribution has fewer steps.
        """
        check_positive(num_steps=num_steps)
        event_dims = len(self.event_shape) - 1
        time = prefix.ndim - event_dims - 1
        length, total = prefix.shape[time], prefix.shape[time] + num_steps
        if self.event_shape[0] < total:
            raise ValueError(f"num_steps: the distribution has {self.event_shape[0]} steps, expected {total}")
        step = self.step_distribution.expand((*prefix.shape[:time], self.event_shape[0]))
        path: Tensor = (step.rsample() if self.has_rsample else step.sample()) if sample else step.mean
        path = path.narrow(time, 0, total)
        is_known = torch.arange(total, device=prefix.device) < length
        if mask is not None:
            is_known = torch.cat([mask, mask.new_zeros(*mask.shape[:-1], num_steps)], -1)
        known = torch.cat([prefix, path.narrow(time, length, num_steps)], time)
        return torch.where(is_known.reshape(is_known.shape + (1,) * event_dims), known, path)

    def _filled(self, path: Tensor) -> Tensor:
        mask, event_dims = self._step_mask, len(self.event_shape)
        if mask is None:
            return path
        batch_shape = torch.broadcast_shapes(path.shape[: path.ndim - event_dims], self.batch_shape)
        return fill_padding(
            path.expand(*batch_shape, *path.shape[path.ndim - event_dims :]), mask, event_dims=event_dims - 1
        )

    @property
    def is_normal(self) -> bool:
        """Whether the steps are diagonal Normals, which compare with another chain's in closed form."""
        step = self.step_distribution
        base = step.base_dist if type(step) is dist.Independent else None
        return type(base) is dist.Normal and len(self.event_shape) == 2

    def _normal(self) -> tuple[Tensor, Tensor]:
        if not self.is_normal:
            raise NotImplementedError(
                f"the steps are {type(self.step_distribution).__name__}, expected diagonal Normals"
            )
        return self.step_distribution.base_dist.loc, self.step_distribution.base_dist.scale


def as_chain(distribution: TorchDistribution) -> Chain | None:
    """Return `distribution` as a chain if it says that it is one, else None.

    A distribution says so by having the protocol, or by a mask of its steps:
    ``Normal(loc, scale).to_event(1).mask(mask).to_event(1)``.
    """
    while isinstance(distribution, dist.MaskedDistribution):
        distribution = distribution.base_dist
    if isinstance(distribution, Chain):
        return distribution
    steps = as_steps(distribution)
    says_so = steps is not None and steps.step_mask is not None and steps.step_distribution.event_dim > 0
    return steps if says_so else None


def as_steps(distribution: TorchDistribution) -> IndependentSteps | None:
    """Return a distribution that ends in ``.to_event(n)`` as steps along its leftmost event dimension, else None.

    Only what is known to be a trajectory (from the other program, say) is to be seen so.
    """
    while isinstance(distribution, dist.MaskedDistribution):
        distribution = distribution.base_dist
    if isinstance(distribution, IndependentSteps):
        return distribution
    if type(distribution) is not dist.Independent or not distribution.reinterpreted_batch_ndims:
        return None
    step = distribution.base_dist
    if distribution.reinterpreted_batch_ndims > 1:
        step = step.to_event(distribution.reinterpreted_batch_ndims - 1)
    mask = None
    while isinstance(step, dist.MaskedDistribution) and isinstance(step._mask, Tensor):
        of_steps = step._mask.expand(step.batch_shape)
        mask, step = of_steps if mask is None else mask & of_steps, step.base_dist
    return IndependentSteps._of(step, mask)


def _normal(loc: Tensor, scale: Tensor) -> Any:
    return dist.Normal(loc, scale, validate_args=False).to_event(1)
