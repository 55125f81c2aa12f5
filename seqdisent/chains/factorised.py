"""Steps that are independent of each other: the emission of every step, or a latent without memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import constraints, transform_to
from typing_extensions import Self

from seqdisent._checks import check_positive, expand_to
from seqdisent.chains.draws import Draw, is_flow
from seqdisent.chains.protocol import Chain, Conditionals, fill_path, overwrite_steps
from seqdisent.masks import check_mask, expand_observed, is_by_coordinate


class IndependentSteps(TorchDistribution):
    r"""The steps of a sequence, independent of each other, as one distribution: :math:`\prod_t p(x_t)` over real steps.

    An emission is such a distribution, given the latents, and so is a latent without memory. The ledger has the term
    of such a site step by step too.

    Args:
        step: the distribution of every step, batch (\*B, T), event E. With T = 1, every step of what is observed has
            that one distribution.
        mask: (\*B, T) bool, True where a step is real, padding on the right; None if all are.
        observed: of an emission, what of it was measured: (\*B, T) bool, or (\*B, T, \*E) for each coordinate of steps
            whose coordinates are independent; None for all. The rest counts nothing. It has no bearing on draws.
        drawn: (\*B, T, \*E), a draw that was made beforehand, of frames that a model fed back to itself
            (:func:`~seqdisent.feedback`): drawing returns it. None to draw anew.

    What stands in padding or in a hole, NaN say, reaches no value and no gradient.

    Shape:
        - batch \*B, event (T, \*E)

    Raises:
        TypeError: a mask or `observed` that is not bool.
        ValueError: a step without a batch dimension for time, a mask of another shape or with a hole, `observed` or
            `drawn` of another shape, `observed` by coordinates where these are not independent.

    Example:
        >>> step = dist.Normal(torch.zeros(2, 3, 4), 1.0).to_event(1)
        >>> x = IndependentSteps(step, torch.tensor([[True, True, True], [True, False, False]]))
        >>> x.batch_shape, x.event_shape, x.log_prob_per_step(torch.zeros(2, 3, 4))
        (torch.Size([2]), torch.Size([3, 4]), tensor([[-3.6758, -3.6758, -3.6758],
                [-3.6758,  0.0000,  0.0000]]))

        Two numbers a step, of which one was not measured at the second step.

        >>> values = torch.tensor([[0.0, 0.0], [torch.nan, 0.0]])
        >>> step = dist.Normal(torch.zeros(2, 2), 1.0).to_event(1)
        >>> IndependentSteps(step, observed=~values.isnan()).log_prob_per_step(values)
        tensor([-1.8379, -0.9189])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        step: TorchDistribution,
        mask: Tensor | None = None,
        observed: Tensor | None = None,
        drawn: Tensor | None = None,
    ) -> None:
        if not step.batch_shape:
            raise ValueError(
                f"step: has batch shape (), expected (*B, T): the last batch dimension of a {type(step).__name__} with "
                f"event {tuple(step.event_shape)} is time"
            )
        num_steps = step.batch_shape[-1]
        if num_steps == 1:  # one distribution for every step of what is observed
            num_steps = _num_steps(step, mask, observed)
            step = step.expand((*step.batch_shape[:-1], num_steps)) if num_steps > 1 else step
        if mask is not None:
            mask = check_mask(mask, step.batch_shape[:-1], num_steps)
        if observed is not None:
            observed = expand_observed(observed, step.batch_shape, step.event_shape)
            if observed.ndim > len(step.batch_shape) and coordinates(step) is None:
                raise ValueError(
                    f"observed: has shape {tuple(observed.shape)}, expected {tuple(step.batch_shape)}: by coordinate "
                    f"needs independent ones in `.to_event({len(step.event_shape)})`, not a {type(step).__name__}"
                )
        self.step_distribution, self._step_mask, self._observed = step, mask, observed
        self._drawn = None if drawn is None else expand_to("drawn", drawn, step.shape())
        event_shape = torch.Size((step.batch_shape[-1], *step.event_shape))
        super().__init__(step.batch_shape[:-1], event_shape, validate_args=False)

    @property
    def step_mask(self) -> Tensor | None:
        r"""Which steps are real, bool (\*B, T), or None if all are."""
        return self._step_mask

    @property
    def observed(self) -> Tensor | None:
        r"""What was measured, bool (\*B, T) or (\*B, T, \*E), or None if all was."""
        return self._observed

    @property
    def observed_steps(self) -> Tensor | None:
        r"""Of which steps anything was measured, bool (\*B, T), or None if all was."""
        if self._observed is None or self._observed.ndim == len(self.batch_shape) + 1:
            return self._observed
        return self._observed.flatten(len(self.batch_shape) + 1).any(-1)

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
        shape = (*batch_shape, self.event_shape[0])
        steps = type(self)(self.step_distribution.expand(shape))
        steps._step_mask = None if self._step_mask is None else self._step_mask.expand(shape)
        if self._observed is not None:
            by_coordinate = self._observed.shape[len(self.batch_shape) + 1 :]
            steps._observed = self._observed.expand(shape + by_coordinate)
        steps._drawn = None if self._drawn is None else self._drawn.expand(*batch_shape, *self.event_shape)
        return steps

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        r"""Draw all steps (\*sample_shape, \*B, T, \*E), reparameterised; padding repeats the first.

        Raises:
            ValueError: a `sample_shape` for what was drawn beforehand.
        """
        return fill_path(self, self._draw(sample_shape, self.step_distribution.rsample))

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        r"""Draw all steps (\*sample_shape, \*B, T, \*E) without gradient; padding repeats the first.

        Raises:
            ValueError: as :meth:`rsample`.
        """
        with torch.no_grad():
            return fill_path(self, self._draw(sample_shape, self.step_distribution.sample)).detach()

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
        path = self._draw(sample_shape, self.step_distribution.rsample)
        log_prob = self.step_distribution.log_prob(path) if is_flow(self.step_distribution) else None
        return Draw(fill_path(self, path), None, log_prob)

    def log_prob_per_step(self, path: Tensor) -> Tensor:
        r"""Return the log-density (\*S, \*B, T) of each step of `path` (\*S, \*B, T, \*E), in nats; 0 at padding.

        Of what was not measured, it is 0 too.
        """
        if self._observed is None:
            return overwrite_steps(self, self.step_distribution.log_prob(fill_path(self, path)))
        counted, num_coordinates = self._observed, self._observed.ndim - len(self.batch_shape) - 1
        if self._step_mask is not None:
            counted = counted & self._step_mask.reshape(self._step_mask.shape + (1,) * num_coordinates)
        path = path.expand(torch.broadcast_shapes(path.shape, self.batch_shape + self.event_shape))
        # to leave a hole out is not enough: the gradient of what is left out may be 0 * NaN
        is_known = counted.reshape(counted.shape + (1,) * (len(self.event_shape) - 1 - num_coordinates))
        path = torch.where(is_known, path, _inside(self.step_distribution, path))
        step = coordinates(self.step_distribution) if num_coordinates else self.step_distribution
        per_step: Tensor = sum_rightmost(torch.where(counted, step.log_prob(path), 0.0), num_coordinates)
        return per_step

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Return the log-density (\*S, \*B) of sequences (\*S, \*B, T, \*E), in nats."""
        return self.log_prob_per_step(value).sum(-1)

    def conditionals(self, path: Tensor) -> Conditionals:
        r"""Return each step as if it were drawn after the one before, beside another chain; `path` (\*S, \*B, T, D).

        Raises:
            NotImplementedError: the steps are no diagonal Normals.
        """
        if not self.is_normal:
            raise NotImplementedError(
                f"the steps are {type(self.step_distribution).__name__}, expected diagonal Normals"
            )
        loc, scale = self.step_distribution.base_dist.loc, self.step_distribution.base_dist.scale
        initial = _normal(loc[..., 0, :], scale[..., 0, :])
        if loc.shape[-2] == 1:
            return Conditionals(initial, None)
        loc, scale = (x.expand(path.shape)[..., 1:, :].movedim(-2, 0) for x in (loc, scale))
        return Conditionals(initial, _normal(loc, scale))

    def mean_path(self) -> Tensor:
        r"""Return the means of the steps (\*B, T, \*E); padding repeats the first."""
        return fill_path(self, self.mean)

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

    def _draw(self, sample_shape: Sequence[int], anew: Callable[[torch.Size], Tensor]) -> Tensor:
        if self._drawn is None:
            return anew(torch.Size(sample_shape))
        if tuple(sample_shape):
            raise ValueError(
                f"sample_shape: got {tuple(sample_shape)}, expected (): frames that were fed back are one draw, and "
                "`num_sequences` or `num_samples` ask for more"
            )
        return self._drawn

    @property
    def is_normal(self) -> bool:
        """Whether the steps are diagonal Normals, which compare with another chain's in closed form."""
        step = self.step_distribution
        base = step.base_dist if type(step) is dist.Independent else None
        return type(base) is dist.Normal and len(self.event_shape) == 2


def _num_steps(step: TorchDistribution, mask: Any, observed: Any) -> int:
    if isinstance(mask, Tensor) and mask.ndim:
        return mask.shape[-1]
    if isinstance(observed, Tensor) and observed.ndim:
        by_coordinate = is_by_coordinate(observed, step.batch_shape, step.event_shape)
        return observed.shape[-1 - len(step.event_shape)] if by_coordinate else observed.shape[-1]
    return 1


def coordinates(step: TorchDistribution) -> Any:
    """Return a step's independent coordinates, as many as its event has, or None if it has no such."""
    is_independent = type(step) is dist.Independent and not step.base_dist.event_shape
    return step.base_dist if is_independent and type(step.base_dist) is not dist.MaskedDistribution else None


def _inside(step: Any, values: Tensor) -> Tensor:
    """Return a value that a distribution of a step has a density for; in which class or where does not matter."""
    if isinstance(step, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        return _inside(step.base_dist, values)
    if isinstance(step, torch.distributions.TransformedDistribution):  # its support is said of the last transform alone
        value = _inside(step.base_dist, values)
        for transform in step.transforms:
            value = transform(value)
        return value.detach()
    if isinstance(step, torch.distributions.MixtureSameFamily):
        components: Tensor = _inside(step.component_distribution, values)
        return components.expand(*step.component_distribution.batch_shape, *step.event_shape).select(
            len(step.batch_shape), 0
        )
    zeros = values.new_zeros(step.shape())
    try:
        support = step.support
        if not support.is_discrete:
            return transform_to(support)(zeros).detach()  # type: ignore[no-any-return]
    except NotImplementedError as error:
        raise ValueError(
            f"observed: no value is known for which a {type(step).__name__} has a density, to stand in a hole"
        ) from error
    if step.event_shape:  # one-hot
        zeros[..., 0] = 1
    return zeros


def without_mask(fn: Any, mask: Any = None) -> tuple[Any, Any]:
    """Return a distribution without `.mask(...)` around it, and these masks and `mask` in one; None for no mask."""
    while isinstance(fn, dist.MaskedDistribution):
        mask = fn._mask if mask is None else mask & fn._mask
        fn = fn.base_dist
    return fn, mask


def as_chain(distribution: TorchDistribution) -> Chain | None:
    """Return `distribution` as a chain if it says that it is one, else None.

    A distribution says so by having the protocol, or by a mask of its steps:
    ``Normal(loc, scale).to_event(1).mask(mask).to_event(1)``.
    """
    distribution, _ = without_mask(distribution)
    if isinstance(distribution, Chain):
        return distribution
    steps = as_steps(distribution)
    says_so = steps is not None and steps.step_mask is not None and steps.step_distribution.event_dim > 0
    return steps if says_so else None


def as_steps(distribution: TorchDistribution) -> IndependentSteps | None:
    """Return a distribution that ends in ``.to_event(n)`` as steps along its leftmost event dimension, else None.

    Only what is known to be a trajectory (from the other program, say) is to be seen so.
    """
    distribution, _ = without_mask(distribution)
    if isinstance(distribution, IndependentSteps):
        return distribution
    if type(distribution) is not dist.Independent or not distribution.reinterpreted_batch_ndims:
        return None
    step = distribution.base_dist
    if distribution.reinterpreted_batch_ndims > 1:
        step = step.to_event(distribution.reinterpreted_batch_ndims - 1)
    inner, mask = without_mask(step)
    if not isinstance(mask, Tensor):  # True or False for all of them
        return IndependentSteps(step)
    steps = IndependentSteps(inner)
    steps._step_mask = mask  # unchecked: of a distribution of the user's own, it may have holes
    return steps


def _normal(loc: Tensor, scale: Tensor) -> Any:
    return dist.Normal(loc, scale, validate_args=False).to_event(1)
