"""A whole latent trajectory as one random variable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from typing_extensions import Self

from seqdisent._checks import check_not_empty, check_positive, drops_out, expand_to, reads_at_once
from seqdisent.chains.draws import Draw, DrawnStep, conditionals_at_draw, drawn_step, log_prob_at_draw
from seqdisent.chains.protocol import ChainState, Conditionals, fill_path, overwrite_steps
from seqdisent.masks import check_mask, fill_inputs

Mode = Literal["rsample", "draw", "mean"]  # what a step is, given its conditional


class MarkovChain(TorchDistribution):
    r"""A Markov chain in continuous space, :math:`p(z_1) \prod_{t=2}^T p(z_t \mid z_{t-1}, u_t)`, as one distribution.

    Sampling walks through time. Scoring does not: given a path, all conditionals come from **one** call of the
    transition on a batch (T - 1, \*S, \*B), time on the left, so that a static context of shape (\*B, C) broadcasts.

    Args:
        initial: distribution of z_1, batch \*B, event (D,).
        transition: a function of z_prev, or of z_prev and inputs_t if `inputs` are given, that returns the
            distribution of z_t with the leading dimensions of z_prev as batch. It must treat leading dimensions alike
            and be deterministic: with dropout, :meth:`log_prob` scores a path under another transition than the one
            that drew it. A module in training mode that has dropout is refused; dropout inside a function is not seen.
        num_steps: T, the number of steps.
        inputs: (\*B, T, I), what each step reads beside z_prev. inputs[..., 0, :] is never read: `initial` is built
            by the caller. inputs_t reaches the transition with exactly the leading dimensions of z_prev.
        mask: (\*B, T) bool, True where a step is real, padding on the right. In a sample, padding repeats the first
            step; it has log-density 0, and neither its inputs nor its values reach any value or gradient.

    Shape:
        - batch \*B, event (T, D)
        - a path: (\*S, \*B, T, D)

    Raises:
        TypeError: `transition` cannot be called, or the mask is not bool.
        ValueError: an initial distribution whose event is not a vector or whose batch is empty, inputs or mask of
            another shape, a transition that is a module with dropout in training mode.

    Example:
        A random walk of two coordinates.

        >>> import pyro.distributions as dist
        >>> _ = torch.manual_seed(0)
        >>> def step(z_prev):
        ...     return dist.Normal(z_prev, 0.1).to_event(1)
        >>> walk = MarkovChain(dist.Normal(torch.zeros(4, 2), 1.0).to_event(1), step, num_steps=5)
        >>> path = walk.rsample()
        >>> walk.batch_shape, walk.event_shape, walk.log_prob(path).shape
        (torch.Size([4]), torch.Size([5, 2]), torch.Size([4]))

    References:
        Krishnan, Shalit and Sontag, "Structured inference networks for nonlinear state space models", AAAI 2017, for
        the factorisation; ``MarkovChain`` of TensorFlow Probability for the idea of one distribution.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        initial: TorchDistribution,
        transition: Callable[..., TorchDistribution],
        num_steps: int,
        *,
        inputs: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        check_positive(num_steps=num_steps)
        if len(initial.event_shape) != 1:
            how = ".to_event(1) makes the last batch dimension the event"
            if isinstance(initial, dist.Categorical):
                how = "a class is a vector as OneHotCategorical"
            raise ValueError(f"initial: has event shape {tuple(initial.event_shape)}, expected a vector (D,); {how}")
        if not callable(transition):
            raise TypeError(f"transition: got {type(transition).__name__}, expected a function of z_prev")
        if isinstance(transition, nn.Module) and (dropout := drops_out(transition)):
            raise ValueError(
                f"transition: {dropout} drops units at random, so a path would be scored under another transition than "
                "the one that drew it; remove it or call .eval()"
            )
        check_not_empty("initial", initial.batch_shape)
        super().__init__(initial.batch_shape, torch.Size((num_steps, *initial.event_shape)), validate_args=False)
        self.initial = initial
        self.transition = transition
        self.num_steps = int(num_steps)
        if mask is not None:
            mask = check_mask(mask, initial.batch_shape, num_steps, None if inputs is None else inputs.device)
        self._step_mask = mask
        self._by_step: dict[str, Tensor] = {}
        if inputs is not None:
            self._read_by_step("inputs", inputs)

    @property
    def step_mask(self) -> Tensor | None:
        r"""Which steps are real, bool (\*B, T), or None if all are."""
        return self._step_mask

    @property
    def is_markov(self) -> bool:
        """Whether a step depends on the path through the step before alone."""
        return True

    @property
    def support(self) -> constraints.Constraint:
        """The support of the initial distribution at every step."""
        return constraints.independent(self.initial.support, 1)

    @property
    def mean(self) -> Tensor:
        """Not known in general: a chain has a :meth:`mean_path`."""
        raise NotImplementedError("mean: is not known of a chain; mean_path() feeds the mean of every step forward")

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether the initial distribution can be reparameterised; :meth:`rsample` asks every later step."""
        return bool(self.initial.has_rsample)

    def expand(self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: object = None) -> Self:
        """Return this chain with a larger batch; a plate calls it, also where the batch is the same."""
        if torch.Size(batch_shape) == self.batch_shape:
            return self  # another chain would fill the padding of its inputs again
        return type(self)(
            self.initial.expand(torch.Size(batch_shape)), self.transition, self.num_steps,
            inputs=self._by_step.get("inputs"), mask=self._step_mask,
        )  # fmt: skip

    def __call__(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw as ``pyro.sample`` does: every step that can be reparameterised is."""
        if type(self).rsample is not MarkovChain.rsample:  # a subclass draws in its own way
            path: Tensor = super().__call__(sample_shape)
            return path
        return self._whole_path(sample_shape, "draw")

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        r"""Draw paths (\*sample_shape, \*B, T, D), reparameterised.

        Raises:
            NotImplementedError: a step has no `rsample`.
        """
        return self._whole_path(sample_shape, "rsample")

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        r"""Draw paths (\*sample_shape, \*B, T, D) without gradient."""
        with torch.no_grad():
            return self._whole_path(sample_shape, "draw")

    def rsample_with_conditionals(
        self,
        sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size(),  # noqa: B008
    ) -> Draw:
        r"""Draw paths as :meth:`rsample` does, and hand over the conditionals that they were drawn from.

        The conditionals are those of :meth:`conditionals` at the path. Of diagonal Normals and of flows they are the
        very steps of the draw, so the transition is not called again; of others it is, once.

        Args:
            sample_shape: S, the shape of independent draws.

        Returns:
            The :class:`~seqdisent.chains.Draw`.

        Raises:
            NotImplementedError: a step has no `rsample`.

        Example:
            >>> _ = torch.manual_seed(0)
            >>> start = dist.Normal(torch.zeros(4, 2), 1.0).to_event(1)
            >>> chain = MarkovChain(start, lambda z_prev: dist.Normal(z_prev, 0.1).to_event(1), 5)
            >>> path, conditionals, _ = chain.rsample_with_conditionals()
            >>> torch.equal(conditionals.steps.mean, path[:, :-1].movedim(1, 0))
            True
        """
        drawn: list[DrawnStep] = []
        path = self._whole_path(sample_shape, "rsample", drawn)
        if type(self).conditionals is MarkovChain.conditionals:  # else a subclass has its own
            found = conditionals_at_draw(drawn)
            if found is not None:
                return Draw(path, found, log_prob_at_draw(drawn))
        return Draw(path, self.conditionals(path))

    def mean_path(self) -> Tensor:
        r"""Return the path (\*B, T, D) on which every step is its conditional's mean given the step before.

        It is the mean of the chain only where the transition is linear in z_prev.

        Raises:
            NotImplementedError: a step has no mean (a flow).
        """
        return self._whole_path((), "mean")

    def step(
        self, z_prev: Tensor | None = None, state: ChainState | None = None, *, inputs: Tensor | None = None
    ) -> tuple[Any, ChainState]:
        r"""Return the conditional of the next step, and the state from which the chain goes on after it.

        Drawing, extending and forecasting are this one function, at the cost of one call of the transition. Online,
        where a step's inputs arrive as it goes, hand them over as `inputs`, to a chain of any number of steps.

        Args:
            z_prev: the step before, (\*S, \*B, D); None for the first.
            state: what this function returned beside the step before, or :meth:`state_after` a path; None at the start.
            inputs: (\*S, \*B, I) or what expands to it, what this step reads; None for the chain's own inputs. Those of
                the first step are never read.

        Returns:
            The distribution of the step, batch (\*S, \*B), event (D,), and the next state.

        Raises:
            ValueError: one of z_prev and state without the other, a chain whose inputs have ended, or inputs of another
                batch.

        Example:
            >>> start = dist.Normal(torch.zeros(4, 1), 1.0).to_event(1)
            >>> chain = MarkovChain(start, lambda z_prev: dist.Normal(2 * z_prev, 0.1).to_event(1), num_steps=3)
            >>> conditional, state = chain.step()
            >>> conditional, state = chain.step(torch.ones(4, 1), state)
            >>> conditional.mean.squeeze(-1), state.num_steps
            (tensor([2., 2., 2., 2.]), 2)
        """
        if z_prev is None or state is None:
            if z_prev is not None or state is not None:
                raise ValueError("state: got one of z_prev and state without the other, expected both or neither")
            return self.initial, self._state_at(1)
        reads = self._reads_at(z_prev, state, inputs=inputs)
        return self._step(z_prev, reads.get("inputs")), ChainState(state.num_steps + 1, state.reads)

    def state_after(self, path: Tensor) -> ChainState:
        r"""Return the state after real steps `path` (\*S, \*B, T', D); :meth:`step` goes on with the last of them."""
        return self._state_at(path.shape[-2])

    def gather_state(self, state: ChainState, index: Tensor) -> ChainState:
        r"""Return the state of chosen particles, from which this chain goes on: what resampling does to a state.

        Args:
            state: of K particles, what :meth:`step` of this chain, or of one with other inputs, returned.
            index: (K, \*B) int64, for each particle the one that it goes on from.

        Raises:
            NotImplementedError: the state carries what this function does not know how to choose from.
        """
        if state.carried is not None:
            raise NotImplementedError(
                f"state: a {type(self).__name__} carries more than its last step, expected a `gather_state` of its own"
            )
        return self._state_at(state.num_steps)

    def extend(self, prefix: Tensor, num_steps: int, *, mask: Tensor | None = None, sample: bool = True) -> Tensor:
        r"""Continue a path.

        Args:
            prefix: (\*S, \*B, T', D), at least one step.
            num_steps: how many steps to add. What the chain reads step by step must cover T' + num_steps steps.
            mask: (\*B, T') bool, which steps of the prefix are real; a shorter row is continued from its own last step.
                None for those of the chain.
            sample: draw each step, or take its conditional's mean.

        Returns:
            (\*S, \*B, T' + num_steps, D), the prefix first.

        Raises:
            ValueError: a prefix of length 0 or another size, or inputs or context that end too early.
            NotImplementedError: without `sample`, a step has no mean (a flow).
        """
        check_positive(num_steps=num_steps)
        if prefix.ndim < 2 or prefix.shape[-2] == 0 or prefix.shape[-1:] != self.initial.event_shape:
            raise ValueError(
                f"prefix: has shape {tuple(prefix.shape)}, expected (*B, T, {self.event_shape[-1]}) with T >= 1"
            )
        length = prefix.shape[-2]
        total = length + num_steps
        if self._by_step and total > self.num_steps:
            names = " and ".join(self._by_step)
            raise ValueError(
                f"num_steps: the chain has {names} for {self.num_steps} steps, expected {length} of the prefix + "
                f"{num_steps}; build it with num_steps={total} and as many {names}"
            )
        mode: Mode = "draw" if sample else "mean"
        if mask is not None:
            mask = check_mask(mask, prefix.shape[:-2], length)
        elif self._step_mask is not None and length <= self.num_steps:
            mask = self._step_mask[..., :length]
        shortest = length  # up to the end of the shortest row, nothing is drawn in any
        if mask is not None and length > 1:
            shortest = int(mask.sum(-1).min()) if reads_at_once(mask) else 1
        known = prefix[..., :shortest, :]
        path, state = list(known.unbind(-2)), self.state_after(known)
        for t in range(shortest, total):
            conditional, state = self.step(path[-1], state)
            z = _choose(conditional, mode)
            if mask is not None and t < length:
                z = torch.where(mask[..., t, None], prefix[..., t, :], z)
            path.append(z)
        return torch.stack(path, -2)

    def conditionals(self, path: Tensor) -> Conditionals:
        r"""Return every conditional at `path` (\*S, \*B, T, D), from one batched call of the transition."""
        path = self._check_path(path)
        if self.num_steps == 1:
            return Conditionals(self.initial, None)
        z_prev = path[..., :-1, :]
        if self._step_mask is not None:  # nor may the step after the last one overflow
            z_prev = torch.where(self._step_mask[..., 1:, None], z_prev, path[..., :1, :].detach())
        inputs = self._inputs_along(path)
        if inputs is not None:
            inputs = inputs[..., 1:, :].movedim(-2, 0)
        return Conditionals(self.initial, self._step(z_prev.movedim(-2, 0), inputs))

    def log_prob_per_step(self, path: Tensor) -> Tensor:
        r"""Return the log-density (\*S, \*B, T) of each step of `path` given the one before, in nats; 0 at padding."""
        path = self._check_path(path)
        return overwrite_steps(self, self.conditionals(path).log_prob_per_step(path))

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Return the log-density (\*S, \*B) of paths (\*S, \*B, T, D), in nats."""
        return self.log_prob_per_step(value).sum(-1)

    def _read_by_step(self, name: str, values: Tensor) -> None:
        r"""Let each step read its own of `values`, which expand to (\*B, T, I)."""
        if values.ndim < 2 or values.shape[-2] != self.num_steps:
            letter = name[0].upper()
            raise ValueError(
                f"{name}: has shape {tuple(values.shape)}, expected (*B, T, {letter}) with T={self.num_steps}"
            )
        try:
            values = values.expand(*self.batch_shape, *values.shape[-2:])
        except RuntimeError as error:
            raise ValueError(
                f"{name}: has shape {tuple(values.shape)}, expected the batch {tuple(self.batch_shape)} of `initial`"
            ) from error
        self._by_step[name] = values if self._step_mask is None else fill_inputs(values, self._step_mask)

    def _reads_at(self, z_prev: Tensor, state: ChainState, **given: Tensor | None) -> dict[str, Tensor]:
        """Return what the next step reads, by name, with the leading dimensions of z_prev; what is given, first."""
        t, now = state.num_steps, {name: x for name, x in given.items() if x is not None}
        for name, values in state.reads.items():
            if name in now and len(values) and now[name].shape[-1] != (size := values[0].shape[-1]):
                raise ValueError(f"{name}: has last dimension {now[name].shape[-1]}, expected {size}, the chain's own")
            if name not in now:
                if t >= len(values):
                    raise ValueError(
                        f"state: {t} steps are done, expected fewer: the chain has {name} for {len(values)}; "
                        f"step(..., {name}=) takes those of a further step"
                    )
                now[name] = values[t]
        batch = z_prev.shape[:-1]
        return {n: x if x.shape[:-1] == batch else expand_to(n, x, (*batch, x.shape[-1])) for n, x in now.items()}

    def _along(self, name: str, path: Tensor) -> Tensor | None:
        r"""Return what the steps read under this name, with the leading dimensions of `path`, (\*S, \*B, T, I)."""
        values = self._by_step.get(name)
        return None if values is None else values.expand(*path.shape[:-2], *values.shape[-2:])

    def _inputs_along(self, path: Tensor) -> Tensor | None:
        r"""Return what the transition reads beside z_prev at every step, (\*S, \*B, T, I)."""
        return self._along("inputs", path)

    def _check_path(self, path: Tensor) -> Tensor:
        wanted = self.batch_shape + self.event_shape
        try:
            shape = torch.broadcast_shapes(path.shape, wanted)
        except RuntimeError:
            shape = None
        if shape is None or path.shape[-2:] != self.event_shape:
            raise ValueError(f"path: has shape {tuple(path.shape)}, expected (*S, *B, T, D) ending in {tuple(wanted)}")
        return fill_path(self, path.expand(shape))

    def _state_at(self, num_steps: int) -> ChainState:
        # unbound once: indexing inputs inside the loop makes the backward pass quadratic in T
        return ChainState(num_steps, {name: values.unbind(-2) for name, values in self._by_step.items()})

    def _step(self, z_prev: Tensor, inputs: Tensor | None) -> TorchDistribution:
        conditional = self.transition(z_prev) if inputs is None else self.transition(z_prev, inputs)
        wanted = (z_prev.shape[:-1], self.initial.event_shape)
        if (conditional.batch_shape, conditional.event_shape) != wanted:
            raise ValueError(
                f"transition: returned batch {tuple(conditional.batch_shape)} and event "
                f"{tuple(conditional.event_shape)} for z_prev of shape {tuple(z_prev.shape)}, expected "
                f"{tuple(wanted[0])} and {tuple(wanted[1])}; .to_event(1) makes the last dimension the event"
            )
        return conditional

    def _whole_path(self, sample_shape: Sequence[int], mode: Mode, drawn: list[DrawnStep] | None = None) -> Tensor:
        """Take a whole path, step by step, and note each step in `drawn`."""
        path: list[Tensor] = []
        state = None
        for t in range(self.num_steps):
            z_prev = path[-1] if path else None
            if z_prev is not None and self._step_mask is not None:
                # a walk that goes on through padding may overflow, and 0 * inf is a NaN gradient
                z_prev = torch.where(self._step_mask[..., t, None], z_prev, path[0].detach())
            conditional, state = self.step(z_prev, state)
            path.append(_choose(conditional, mode, () if path else sample_shape))
            if drawn is not None:
                drawn.append(drawn_step(conditional, path[-1]))
        return fill_path(self, torch.stack(path, -2))


def _choose(conditional: TorchDistribution, mode: Mode, sample_shape: Sequence[int] = ()) -> Tensor:
    """Take a step: draw it, or take its mean."""
    if mode == "mean":
        mean: Tensor = conditional.mean
        return mean.expand(conditional.shape())
    if conditional.has_rsample:
        return conditional.rsample(torch.Size(sample_shape))
    if mode == "rsample":
        raise NotImplementedError(f"a step is a {type(conditional).__name__}, which has no rsample")
    return conditional.sample(torch.Size(sample_shape))
