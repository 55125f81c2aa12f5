"""A whole latent trajectory as one random variable."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from seqdisent._checks import check_positive
from seqdisent._dropout import call_and_watch, modules_that_drop_out
from seqdisent._masking import check_mask, overwrite_padding, repeat_first_step
from seqdisent._random import kept_random_state
from seqdisent.chains import Conditionals, as_drawn, side_by_side

_Result = TypeVar("_Result")


class MarkovChain(TorchDistribution):
    r"""A Markov chain in continuous space, :math:`p(z_1) \prod_{t=2}^T p(z_t \mid z_{t-1}, u_t)`, as one distribution.

    Sampling walks through time. Scoring does not: given a path, all conditionals come from **one** call of the
    transition on a batch (T - 1, \*S, \*B), time on the left, so that a static context of shape (\*B, C) broadcasts.

    Args:
        initial: distribution of z_1, batch \*B, event (D,).
        transition: a function of z_prev, or of z_prev and inputs_t if `inputs` are given, that returns the
            distribution of z_t with the leading dimensions of z_prev as batch. It must be deterministic (dropout in
            training mode is refused: sampling and scoring would differ) and must treat leading dimensions alike.
        num_steps: T.
        inputs: (\*B, T, I), what each step reads beside z_prev. inputs[..., 0, :] is never read: `initial` is built
            by the caller. inputs_t reaches the transition with exactly the leading dimensions of z_prev.
        mask: (\*B, T) bool, True where a step is real, padding on the right. Padded steps are 0 in a sample, have
            log-density 0, and neither their inputs nor their values reach any value or gradient.

    Shape:
        - batch \*B, event (T, D)
        - a path: (\*S, \*B, T, D)

    Raises:
        TypeError: `transition` cannot be called, or the mask is not bool.
        ValueError: an initial distribution whose event is not a vector or whose batch is empty, inputs or mask of
            another shape, dropout (where it is out of sight, say in a function that `transition` calls, then when a
            path is first drawn or scored).

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
            raise ValueError(
                f"initial: has event shape {tuple(initial.event_shape)}, expected a vector (D,); add .to_event(1)"
            )
        if not callable(transition):
            raise TypeError(f"transition: got {type(transition).__name__}, expected a function of z_prev")
        batch_shape = initial.batch_shape
        if 0 in batch_shape:
            raise ValueError(f"initial: has batch shape {tuple(batch_shape)}, expected at least one sequence")
        if inputs is not None:
            if inputs.ndim < 2 or inputs.shape[-2] != num_steps:
                raise ValueError(f"inputs: has shape {tuple(inputs.shape)}, expected (*B, T, I) with T={num_steps}")
            try:
                inputs = inputs.expand(*batch_shape, *inputs.shape[-2:])
            except RuntimeError as error:
                raise ValueError(
                    f"inputs: has shape {tuple(inputs.shape)}, expected the batch {tuple(batch_shape)} of `initial`"
                ) from error
        if mask is not None:
            mask = check_mask(mask, batch_shape, num_steps)
            if inputs is not None:
                inputs = overwrite_padding(inputs, mask)
        self.initial = initial
        self.transition = transition
        self.num_steps = int(num_steps)
        self._inputs = inputs
        self._step_mask = mask
        self._drawn: _Draw | None = None
        self._watched: set[str] = set()  # the functions that were called and dropped nothing
        super().__init__(batch_shape, torch.Size((num_steps, *initial.event_shape)), validate_args=False)
        self._refuse_dropout("transition", transition)

    @property
    def step_mask(self) -> Tensor | None:
        r"""Which steps are real, bool (\*B, T), or None if all are."""
        return self._step_mask

    @property
    def support(self) -> constraints.Constraint:
        """The support of the initial distribution at every step."""
        return constraints.independent(self.initial.support, 1)

    @functools.cached_property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether every conditional can be reparameterised (one call of the transition finds out)."""
        if not self.initial.has_rsample or self.num_steps == 1:
            return bool(self.initial.has_rsample)
        step = self._trial_step()
        return bool(self.initial.has_rsample) if step is None else bool(step.has_rsample)

    def expand(self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: object = None) -> MarkovChain:
        """Return this chain with a larger batch; a particle plate calls it."""
        batch_shape = torch.Size(batch_shape)
        inputs, mask = self._inputs, self._step_mask
        if inputs is not None:
            inputs = inputs.expand(*batch_shape, *inputs.shape[-2:])
        if mask is not None:
            mask = mask.expand(*batch_shape, self.num_steps)
        chain = type(self)  # of a subclass too
        return chain(self.initial.expand(batch_shape), self.transition, self.num_steps, inputs=inputs, mask=mask)

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        r"""Draw paths (\*sample_shape, \*B, T, D), reparameterised."""
        first = self.initial.rsample(torch.Size(sample_shape))
        kept = [as_drawn(self.initial, first)]
        path = self._walk_unpadded(first, "rsample", kept)
        if not path.is_inference():  # such a tensor does not tell whether it was changed
            self._drawn = _Draw(path, path._version, kept, torch.is_grad_enabled())
        return path

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        r"""Draw paths (\*sample_shape, \*B, T, D) without gradient."""
        with torch.no_grad():
            return self._walk_unpadded(self.initial.sample(torch.Size(sample_shape)), "sample")

    def mean_path(self) -> Tensor:
        r"""Return the path (\*B, T, D) on which every step is its conditional's mean given the step before.

        It is the mean of the chain only where the transition is linear in z_prev.
        """
        return self._walk_unpadded(self._initial_mean(), "mean")

    def extend(self, prefix: Tensor, num_steps: int, *, mask: Tensor | None = None, sample: bool = True) -> Tensor:
        r"""Continue a path.

        Args:
            prefix: (\*S, \*B, T', D), at least one step.
            num_steps: how many steps to add. If the chain has inputs, they must cover T' + num_steps steps.
            mask: (\*B, T') bool, which steps of the prefix are real; a shorter row is continued from its own last step.
            sample: draw each step, or take its conditional's mean.

        Returns:
            (\*S, \*B, T' + num_steps, D), the prefix first.

        Raises:
            ValueError: a prefix of length 0 or another size, or inputs that end too early.
        """
        check_positive(num_steps=num_steps)
        if prefix.ndim < 2 or prefix.shape[-2] == 0 or prefix.shape[-1:] != self.initial.event_shape:
            raise ValueError(
                f"prefix: has shape {tuple(prefix.shape)}, expected (*B, T, {self.event_shape[-1]}) with T >= 1"
            )
        length = prefix.shape[-2]
        total = length + num_steps
        if self._inputs is not None and self._inputs.shape[-2] < total:
            raise ValueError(
                f"num_steps: the chain has inputs for {self._inputs.shape[-2]} steps, expected "
                f"{length} of the prefix + {num_steps}; build it with num_steps={total} and as many inputs"
            )
        how = ("rsample" if self.has_rsample else "sample") if sample else "mean"
        if mask is None:
            return self._walk(list(prefix.unbind(-2)), total, how)
        mask = check_mask(mask, prefix.shape[:-2], length)
        return self._walk([prefix[..., 0, :]], total, how, known=(prefix, mask))

    def conditionals(self, path: Tensor) -> Conditionals:
        r"""Return every conditional at `path` (\*S, \*B, T, D), from one batched call of the transition."""
        return self._conditionals(self._check_path(path))

    def kept_conditionals(self, path: Tensor) -> Conditionals | None:
        r"""Return the conditionals that `path` was drawn from: for the ledger, which scores a path once it is drawn.

        They are those of :meth:`conditionals` without another call of the transition, but as it was at the draw, and
        their gradients flow through the draw and not through `path`. None unless `path` is the very tensor that
        `rsample` returned last, unchanged since, under the same gradient mode, and its steps are all diagonal Normals,
        or all flows; or if a subclass has conditionals of its own. Of flows only the log-density of the path is kept.
        """
        drawn = self._drawn
        if drawn is None or path is not drawn.path or path._version != drawn.version:
            return None
        if drawn.with_gradient != torch.is_grad_enabled() or type(self).conditionals is not MarkovChain.conditionals:
            return None
        initial, *steps = drawn.kept
        later = side_by_side(steps) if steps else None
        return None if steps and later is None else Conditionals(initial, later)

    def log_prob_per_step(self, path: Tensor) -> Tensor:
        r"""Return the log-density (\*S, \*B, T) of each step of `path` given the one before, in nats; 0 at padding."""
        path = self._check_path(path)
        log_prob = self._conditionals(path).log_prob_per_step(path)
        if self._step_mask is None:
            return log_prob
        return overwrite_padding(log_prob, self._step_mask, event_dims=0)

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Return the log-density (\*S, \*B) of paths (\*S, \*B, T, D), in nats."""
        return self.log_prob_per_step(value).sum(-1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_drawn": None}  # part of a graph, which is not copied

    def _conditionals(self, path: Tensor) -> Conditionals:
        if self.num_steps == 1:
            return Conditionals(self.initial, None)
        z_prev = path[..., :-1, :]
        if self._step_mask is not None:  # nor may the step after the last one overflow
            z_prev = torch.where(self._step_mask[..., 1:, None], z_prev, path[..., :1, :].detach())
        inputs = self._inputs_along(path)
        if inputs is not None:
            inputs = inputs[..., 1:, :].movedim(-2, 0)
        return Conditionals(self.initial, self._step(z_prev.movedim(-2, 0), inputs))

    def _inputs_along(self, path: Tensor) -> Tensor | None:
        r"""Return what every step reads beside z_prev, (\*S, \*B, T, I)."""
        return None if self._inputs is None else self._inputs.expand(*path.shape[:-2], *self._inputs.shape[-2:])

    def _trial_step(self) -> TorchDistribution | None:
        """Return some second step, for what does not depend on the path.

        None if the transition cannot be called yet: its static context has the batch of a plate that will expand this
        chain, and the expanded chain asks again.
        """
        with torch.no_grad():
            try:
                z_prev = self._initial_mean()
            except NotImplementedError:  # a flow, say
                with kept_random_state():
                    z_prev = self.initial.sample()
            try:
                return self._stepper([z_prev])(z_prev, 1)
            except (RuntimeError, ValueError, NameError):  # NameError: a local that is defined later
                return None

    def _refuse_dropout(self, name: str, function: Callable[..., Any]) -> None:
        """Raise if the function calls a module that drops units; one that it could reach but does not is no harm."""
        suspects = modules_that_drop_out(function)
        if not suspects or self.num_steps == 1:
            return
        called: list[str] = []
        note = lambda module, _: called.append(type(module).__name__)  # noqa: E731
        handles = [module.register_forward_pre_hook(note) for module in suspects]
        try:
            self._trial_step()
        finally:
            for handle in handles:
                handle.remove()
        if called:
            raise ValueError(_drops(name, called[0]))

    def _call(self, name: str, function: Callable[..., _Result], z_prev: Tensor, *others: Any) -> _Result:
        """Call the function; raise if it drops units, which the first call tells, also where they are out of sight."""
        if name in self._watched or torch.compiler.is_compiling():
            return function(z_prev, *others)
        result, dropped = call_and_watch(functools.partial(function, z_prev, *others), z_prev.device)
        if dropped is not None:
            raise ValueError(_drops(name, dropped))
        self._watched.add(name)
        return result

    def _check_path(self, path: Tensor) -> Tensor:
        try:
            batch_shape = torch.broadcast_shapes(path.shape[:-2], self.batch_shape)
        except RuntimeError:
            batch_shape = None
        if batch_shape is None or path.shape[-2:] != self.event_shape:
            raise ValueError(
                f"path: has shape {tuple(path.shape)}, expected (*S, *B, T, D) ending in "
                f"{(*self.batch_shape, *self.event_shape)}"
            )
        path = path.expand(*batch_shape, *self.event_shape)
        if self._step_mask is None:
            return path
        return repeat_first_step(path, self._step_mask)

    def _initial_mean(self) -> Tensor:
        return self.initial.mean.expand(*self.batch_shape, *self.initial.event_shape)

    def _stepper(self, path: list[Tensor]) -> Callable[[Tensor, int], TorchDistribution]:
        """Return the function of z_prev and t that gives the conditional of a step after those of `path`, in turn."""
        # unbound once: indexing inputs inside the loop makes the backward pass quadratic in T
        inputs = self._inputs_along(path[0].unsqueeze(-2))
        unbound = None if inputs is None else inputs.unbind(-2)
        return lambda z_prev, t: self._step(z_prev, None if unbound is None else unbound[t])

    def _step(self, z_prev: Tensor, inputs: Tensor | None) -> TorchDistribution:
        conditional = self._call("transition", self.transition, z_prev, *(() if inputs is None else (inputs,)))
        wanted = (z_prev.shape[:-1], self.initial.event_shape)
        if (conditional.batch_shape, conditional.event_shape) != wanted:
            raise ValueError(
                f"transition: returned batch {tuple(conditional.batch_shape)} and event "
                f"{tuple(conditional.event_shape)} for z_prev of shape {tuple(z_prev.shape)}, expected "
                f"{tuple(wanted[0])} and {tuple(wanted[1])}; .to_event(1) makes the last dimension the event"
            )
        return conditional

    def _walk(
        self,
        path: list[Tensor],
        num_steps: int,
        how: str,
        *,
        known: tuple[Tensor, Tensor] | None = None,
        hidden: Tensor | None = None,
        kept: list[Any] | None = None,
    ) -> Tensor:
        """Lengthen `path` to `num_steps`, keeping steps that are `known`; steps that are `hidden` follow the first.

        What is kept of the conditionals that the steps are drawn from is added to `kept`.
        """
        step = self._stepper(path)
        for t in range(len(path), num_steps):
            z_prev = path[-1]
            if hidden is not None:  # a walk that goes on through padding may overflow, and 0 * inf is a NaN gradient
                z_prev = torch.where(hidden[..., t, None], z_prev, path[0].detach())
            conditional = step(z_prev, t)
            z = conditional.mean if how == "mean" else getattr(conditional, how)()
            if kept is not None:
                kept.append(as_drawn(conditional, z))
            if known is not None and t < known[0].shape[-2]:
                z = torch.where(known[1][..., t, None], known[0][..., t, :], z)
            path.append(z)
        return torch.stack(path, -2)

    def _walk_unpadded(self, first: Tensor, how: str, kept: list[Any] | None = None) -> Tensor:
        mask = self._step_mask
        path = self._walk([first], self.num_steps, how, hidden=mask, kept=kept)
        return path if mask is None else overwrite_padding(path, mask)


def _drops(name: str, module: str) -> str:
    return (
        f"{name}: {module} drops units at random, so a path would be scored under another transition than the one that "
        "drew it; remove it or call .eval()"
    )


class _Draw(NamedTuple):
    """The path that a chain drew last, and what each of its steps was drawn from."""

    path: Tensor
    version: int  # of the path: in-place changes count it up
    kept: list[Any]
    with_gradient: bool
