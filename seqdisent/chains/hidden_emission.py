"""What is emitted by hidden classes, with the classes summed out: an observed site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from typing_extensions import Self

from seqdisent._checks import check_positive
from seqdisent.chains.factorised import IndependentSteps, coordinates
from seqdisent.chains.hidden_markov import HiddenMarkovChain
from seqdisent.chains.protocol import fill_path, overwrite_steps
from seqdisent.masks import expand_observed


class HiddenMarkovEmission(TorchDistribution):
    r"""What the classes of a hidden Markov chain emit, with the classes summed out, as one distribution.

    .. math:: p(x) = \sum_{k_{1:T}} p(k_{1:T}) \prod_t p(x_t \mid k_t)

    Its :meth:`log_prob` is that sum, exact, so no class is a site of the model and the guide knows nothing of them.
    The ledger has the term by step, :math:`\log p(x_t \mid x_{<t})`.

    Args:
        chain: of the classes; its mask is that of the steps.
        step: the distribution of a step given its class, batch (\*B, T, K) or what ends in K and expands to it, such
            as (K,), event (\*E).
        observed: what was measured, (\*B, T) bool, or (\*B, T, \*E) where the coordinates of a step are independent;
            None for all. It has no bearing on draws, but on what :meth:`extend` reads of a prefix.

    What stands in padding or in a hole, NaN say, reaches no value and no gradient.

    Shape:
        - batch \*B, event (T, \*E)

    Raises:
        ValueError: a `step` or `observed` of another shape, or `observed` by coordinates where these are not
            independent.
        TypeError: `observed` is not bool.

    Example:
        Two classes that rarely change, seen through noise.

        >>> import pyro.distributions as dist
        >>> rarely = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        >>> chain = HiddenMarkovChain(torch.zeros(1, 2), rarely, num_steps=3)
        >>> step = dist.Normal(torch.tensor([[-1.0], [1.0]]), 1.0).to_event(1)
        >>> x = torch.tensor([[[2.0], [torch.nan], [2.0]]])
        >>> emission = HiddenMarkovEmission(chain, step, observed=~x.isnan())
        >>> emission.log_prob_per_step(x)
        tensor([[-2.0939,  0.0000, -1.6272]])
        >>> emission.posterior(x).mean_path()[0, :, 1]
        tensor([0.9957, 0.9836, 0.9957])

    References:
        Rabiner, "A tutorial on hidden Markov models and selected applications in speech recognition", 1989. Dong,
        Seybold, Murphy and Bui, "Collapsed amortized variational inference for switching nonlinear dynamical systems",
        ICML 2020, for summing the classes out inside of the bound.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, chain: HiddenMarkovChain, step: TorchDistribution, observed: Tensor | None = None) -> None:
        wanted = chain.batch_shape + chain.event_shape
        if step.batch_shape[-1:] != wanted[-1:]:  # of one distribution for all classes, none would be told from another
            raise ValueError(
                f"step: has batch shape {tuple(step.batch_shape)}, expected one that ends in K={wanted[-1]}"
            )
        try:
            step = step.expand(wanted)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"step: has batch shape {tuple(step.batch_shape)}, expected one that expands to the chain's "
                f"(*B, T, K), {tuple(wanted)}"
            ) from error
        if observed is not None:
            observed = expand_observed(observed, wanted[:-1], step.event_shape)
            if observed.ndim >= len(wanted) and coordinates(step) is None:
                raise ValueError(
                    f"observed: has shape {tuple(observed.shape)}, expected {tuple(wanted[:-1])}: by coordinate needs "
                    f"independent ones in `.to_event({len(step.event_shape)})`, not a {type(step).__name__}"
                )
        self.chain, self.step_distribution, self._observed = chain, step, observed
        event_shape = torch.Size((chain.num_steps, *step.event_shape))
        super().__init__(chain.batch_shape, event_shape, validate_args=False)

    @property
    def step_mask(self) -> Tensor | None:
        r"""Which steps are real, bool (\*B, T), or None if all are."""
        return self.chain.step_mask

    @property
    def observed(self) -> Tensor | None:
        r"""What was measured, bool (\*B, T) or (\*B, T, \*E), or None if all was."""
        return self._observed

    @property
    def observed_steps(self) -> Tensor | None:
        r"""Of which steps anything was measured, bool (\*B, T), or None if all was."""
        num_batch = len(self.batch_shape) + 1
        if self._observed is None or self._observed.ndim == num_batch:
            return self._observed
        return self._observed.flatten(num_batch).any(-1)

    @property
    def support(self) -> constraints.Constraint:
        """That of the step, at every step."""
        return constraints.independent(self.step_distribution.support, 1)

    @property
    def mean(self) -> Tensor:
        r"""The means of the steps (\*B, T, \*E) over all classes."""
        probs = self.chain.mean_path()
        mean: Tensor = self.step_distribution.mean
        probs = probs.reshape(probs.shape + (1,) * (len(self.event_shape) - 1))
        return (probs * mean).sum(len(self.batch_shape) + 1)

    def expand(self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: object = None) -> Self:
        """Return this distribution with a larger batch; a plate calls it."""
        observed = self._observed
        if observed is not None:
            observed = observed.expand(*batch_shape, *observed.shape[len(self.batch_shape) :])
        return type(self)(self.chain.expand(batch_shape), self.step_distribution, observed)

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        r"""Draw classes, then steps (\*sample_shape, \*B, T, \*E), without gradient; padding repeats the first."""
        with torch.no_grad():
            return fill_path(self, self._emit(self.chain.sample(sample_shape), sample_shape)).detach()

    def log_likelihoods(self, path: Tensor) -> Tensor:
        r"""Return the log-densities (\*S, \*B, T, K) of each step of `path` (\*S, \*B, T, \*E) under each class.

        They are in nats, and 0 at padding and of what was not measured.
        """
        num_events = len(self.event_shape) - 1
        if path.shape[path.ndim - num_events - 1 :] != self.event_shape:
            raise ValueError(
                f"path: has shape {tuple(path.shape)}, expected one that ends in {tuple(self.event_shape)}"
            )
        step_dims = len(self.batch_shape) + 1
        counted = self._observed
        if self.step_mask is not None:
            real = self.step_mask
            if counted is not None:
                real = real.reshape(real.shape + (1,) * (counted.ndim - step_dims))
            counted = real if counted is None else counted & real
        each = IndependentSteps(self.step_distribution)  # the classes of a step, side by side
        if counted is not None:
            counted = counted.unsqueeze(step_dims)
            shape = list(counted.shape)
            shape[step_dims] = self.chain.event_shape[-1]
            each._observed = counted.expand(shape)
        return each.log_prob_per_step(path.unsqueeze(path.ndim - num_events))

    def log_prob_per_step(self, path: Tensor) -> Tensor:
        r"""Return :math:`\log p(x_t \mid x_{<t})` of each step of `path`, (\*S, \*B, T), in nats; 0 at padding."""
        per_step = self.chain.sums(self.log_likelihoods(path)).log_evidence
        per_step = overwrite_steps(self, per_step)
        seen = self.observed_steps
        return per_step if seen is None else torch.where(seen, per_step, 0.0)

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Return the log-density (\*S, \*B) of sequences (\*S, \*B, T, \*E), in nats: the sum over all paths."""
        return self.log_prob_per_step(value).sum(-1)

    def posterior(self, path: Tensor) -> HiddenMarkovChain:
        r"""Return the chain of the classes given what `path` (\*S, \*B, T, \*E) shows where it was measured.

        Raises:
            ValueError: `path` has another shape, or is impossible.
            TypeError: as :meth:`HiddenMarkovChain.posterior`.
        """
        return self.chain.posterior(self.log_likelihoods(path))

    def conditionals(self, path: Tensor) -> Any:
        r"""Say that single steps have no conditionals here: the ledger reads :meth:`log_prob_per_step` of a `path`.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("conditionals: the classes are summed out; log_prob_per_step has the term of a step")

    def mean_path(self) -> Tensor:
        r"""Return the means of the steps (\*B, T, \*E); padding repeats the first."""
        return fill_path(self, self.mean)

    def extend(self, prefix: Tensor, num_steps: int, *, mask: Tensor | None = None, sample: bool = True) -> Tensor:
        r"""Return `prefix` followed by further steps of this distribution, given what was measured of the prefix.

        Args:
            prefix: (\*S, \*B, T', \*E), at least one step.
            num_steps: how many steps to add; the distribution must have T' + num_steps.
            mask: (\*B, T') bool, which steps of the prefix are real; a shorter row goes on after its own last step.
            sample: draw each step, or take its mean over the classes.

        Raises:
            ValueError: the distribution has another number of steps.
            TypeError: as :meth:`HiddenMarkovChain.posterior`.
        """
        check_positive(num_steps=num_steps)
        time = prefix.ndim - len(self.event_shape)
        length = prefix.shape[time]
        if length + num_steps != self.event_shape[0]:
            raise ValueError(
                f"num_steps: the distribution has {self.event_shape[0]} steps, expected {length + num_steps}"
            )
        known = torch.ones(*self.batch_shape, length, dtype=torch.bool, device=prefix.device) if mask is None else mask
        known = torch.cat([known, known.new_zeros(*known.shape[:-1], num_steps)], -1)
        filler = prefix.narrow(time, 0, 1).expand(*prefix.shape[:time], num_steps, *prefix.shape[time + 1 :])
        path = torch.cat([prefix, filler], time)
        chain = HiddenMarkovChain(*self.chain._logits, self.chain.num_steps)
        measured = known
        if self._observed is not None:
            measured = self._observed & known.reshape(known.shape + (1,) * (self._observed.ndim - known.ndim))
        posterior = HiddenMarkovEmission(chain, self.step_distribution, measured).posterior(path)
        future = HiddenMarkovEmission(posterior, self.step_distribution)
        future_path = future.sample() if sample else future.mean
        return torch.where(known.reshape(known.shape + (1,) * (len(self.event_shape) - 1)), path, future_path)

    def _emit(self, classes: Tensor, sample_shape: Sequence[int]) -> Tensor:
        step = self.step_distribution
        of_each: Tensor = step.sample(torch.Size(sample_shape))
        chosen = classes.argmax(-1).reshape(classes.shape[:-1] + (1,) * len(self.event_shape))
        chosen = chosen.expand(*classes.shape[:-1], 1, *step.event_shape)
        return of_each.gather(classes.ndim - 1, chosen).squeeze(classes.ndim - 1)
