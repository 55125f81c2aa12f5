"""A continuous chain whose dynamics switch between regimes, with the regimes summed out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from typing_extensions import Self

from seqdisent.chains.forward_sums import IMPOSSIBLE, forward_sums
from seqdisent.chains.hidden_markov import HiddenMarkovChain
from seqdisent.chains.markov import MarkovChain
from seqdisent.chains.protocol import ChainState, Conditionals


class SwitchingChain(MarkovChain):
    r"""A chain in continuous space whose step depends on a regime, with the regimes summed out exactly.

    .. math:: p(z_{1:T}) = \sum_{k_{1:T}} p(k_1) \, p(z_1 \mid k_1) \prod_{t=2}^T p(k_t \mid k_{t-1}, z_{t-1}) \,
        p(z_t \mid z_{t-1}, k_t)

    Given the path z, the regimes are a hidden Markov chain, so that this sum takes T steps and no regime is a site. A
    step's conditional, :math:`p(z_t \mid z_{<t})`, is a mixture over the regimes. The chain draws, extends and is
    scored as a :class:`~seqdisent.MarkovChain`; its KL is a Monte Carlo term, since a mixture has no closed form.

    Args:
        initial: distribution of z_1 given each regime, batch (\*B, K), event (D,).
        transition: a function of z_prev (\*S, \*B, D), or of z_prev and inputs_t, that returns the distribution of z_t
            given each regime: batch (\*S, \*B, K), event (D,). As of :class:`~seqdisent.MarkovChain`.
        num_steps: T.
        initial_logits: (\*B, K) or (K,), of the first regime.
        transition_logits: (K, K) or (\*B, K, K), row i of the regime after regime i; or a function of z_prev that
            returns (\*S, \*B, K, K) or what broadcasts with it: then regimes end where the path is, as in a recurrent
            SLDS. -inf forbids a transition.
        inputs: (\*B, T, I), what each step reads beside z_prev; those of the first step are never read.
        mask: (\*B, T) bool, True where a step is real, padding on the right.

    Shape:
        - batch \*B, event (T, D)

    Raises:
        ValueError: distributions or logits of another shape, and what :class:`~seqdisent.MarkovChain` refuses.
        TypeError: as there.

    Example:
        A walk that goes up or down, and rarely turns.

        >>> _ = torch.manual_seed(0)
        >>> drift = torch.tensor([[-1.0], [1.0]])
        >>> def step(z_prev):
        ...     return dist.Normal(z_prev.unsqueeze(-2) + drift, 0.5).to_event(1)
        >>> rarely = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        >>> start = dist.Normal(torch.zeros(1, 2, 1), 1.0).to_event(1)
        >>> chain = SwitchingChain(start, step, 4, initial_logits=torch.zeros(2), transition_logits=rarely)
        >>> path = torch.tensor([[[0.0], [1.0], [2.0], [1.0]]])
        >>> chain.log_prob_per_step(path)
        tensor([[-0.9189, -0.9186, -0.3314, -2.5251]])
        >>> chain.regimes(path).viterbi().argmax(-1)
        tensor([[1, 1, 1, 0]])

    References:
        Linderman et al., "Bayesian learning and inference in recurrent switching linear dynamical systems", AISTATS
        2017, for regimes that depend on the path. Dong, Seybold, Murphy and Bui, "Collapsed amortized variational
        inference for switching nonlinear dynamical systems", ICML 2020, and Ansari et al., "Deep explicit duration
        switching models for time series", NeurIPS 2021, for summing them out given a path drawn by a guide.
    """

    def __init__(
        self,
        initial: TorchDistribution,
        transition: Callable[..., TorchDistribution],
        num_steps: int,
        *,
        initial_logits: Tensor,
        transition_logits: Tensor | Callable[[Tensor], Tensor],
        inputs: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        if not initial.batch_shape or len(initial.event_shape) != 1:
            raise ValueError(
                f"initial: has batch shape {tuple(initial.batch_shape)} and event shape {tuple(initial.event_shape)}, "
                "expected batch (*B, K), a distribution for each regime, and a vector (D,) as event"
            )
        size = initial.batch_shape[-1]
        known = transition_logits if isinstance(transition_logits, Tensor) else initial_logits.new_zeros(size, size)
        try:
            initial_logits = initial_logits.expand(initial.batch_shape)
        except RuntimeError as error:
            raise ValueError(
                f"initial_logits: has shape {tuple(initial_logits.shape)}, expected one that expands to "
                f"{tuple(initial.batch_shape)}, the batch (*B, K) of `initial`"
            ) from error
        prior = HiddenMarkovChain(initial_logits, known, 1)  # which checks the logits
        self._first, self._moves = prior._first, prior._moves.squeeze(-3)
        self._initial, self._logits = initial, (initial_logits, transition_logits)
        super().__init__(_mixture(self._first, initial), transition, num_steps, inputs=inputs, mask=mask)

    def expand(self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: object = None) -> Self:
        """Return this chain with a larger batch; a particle plate calls it."""
        (initial_logits, transition_logits), size = self._logits, self._initial.batch_shape[-1]
        if isinstance(transition_logits, Tensor) and transition_logits.ndim > 2:
            transition_logits = transition_logits.expand(*batch_shape, size, size)
        return type(self)(
            self._initial.expand(torch.Size((*batch_shape, size))), self.transition, self.num_steps,
            initial_logits=initial_logits.expand(*batch_shape, size), transition_logits=transition_logits,
            inputs=self._by_step.get("inputs"), mask=self._step_mask,
        )  # fmt: skip

    def step(
        self, z_prev: Tensor | None = None, state: ChainState | None = None, *, inputs: Tensor | None = None
    ) -> tuple[Any, ChainState]:
        r"""Return the conditional of the next step, a mixture over the regimes, and the state after it.

        Args:
            z_prev: the step before, (\*S, \*B, D); None for the first.
            state: what this function returned beside the step before; None at the start.
            inputs: as of :meth:`MarkovChain.step`.

        Raises:
            ValueError: as there.
        """
        if z_prev is None or state is None:
            initial, start = super().step(z_prev, state)
            return initial, start._replace(carried=(self._first, self._initial, None, None))
        predicted, regimes, _, _ = state.carried
        filtered = (predicted + _of_each(regimes, z_prev)).log_softmax(-1)
        predicted = torch.logsumexp(filtered.unsqueeze(-1) + self._moves_at(z_prev), -2)
        reads = self._reads_at(z_prev, state, inputs=inputs)
        regimes = self._regimes_at(z_prev, reads.get("inputs"))
        carried = predicted, regimes, z_prev, reads.get("inputs")
        return _mixture(predicted, regimes), ChainState(state.num_steps + 1, state.reads, carried)

    @property
    def is_markov(self) -> bool:
        """False: what is known of the regimes comes from the whole path."""
        return False

    def gather_state(self, state: ChainState, index: Tensor) -> ChainState:
        r"""Return the state of chosen particles, from which this chain goes on.

        Args:
            state: of K particles, what :meth:`step` returned.
            index: (K, \*B) int64, for each particle the one that it goes on from.
        """

        def chosen(values: Tensor) -> Tensor:
            rows = index.unsqueeze(-1).expand(*index.shape, values.shape[-1])
            return values.gather(0, rows)

        gathered = self._state_at(state.num_steps)
        predicted, _, z_prev, inputs = state.carried
        if z_prev is None:  # before the first step is known, all particles are in the same state
            return gathered._replace(carried=(self._first, self._initial, None, None))
        predicted, z_prev = chosen(predicted.expand(*z_prev.shape[:-1], -1)), chosen(z_prev)
        inputs = None if inputs is None else chosen(inputs)
        return gathered._replace(carried=(predicted, self._regimes_at(z_prev, inputs), z_prev, inputs))

    def state_after(self, path: Tensor) -> ChainState:
        r"""Return the state after real steps `path` (\*S, \*B, T', D); :meth:`step` goes on with the last of them."""
        _, state = self.step()
        for z_prev in path[..., :-1, :].unbind(-2):
            _, state = self.step(z_prev, state)
        return state

    def conditionals(self, path: Tensor) -> Conditionals:
        r"""Return every step's mixture at `path` (\*S, \*B, T, D), from one batched call of the transition."""
        path = self._check_path(path)
        if self.num_steps == 1:
            return Conditionals(self.initial, None)
        regimes, moves, log_likelihoods = self._given(path)
        predicted = forward_sums(self._first, moves, log_likelihoods).predicted
        return Conditionals(self.initial, _mixture(predicted[..., 1:, :].movedim(-2, 0), regimes))

    def regimes(self, path: Tensor) -> HiddenMarkovChain:
        r"""Return :math:`p(k_{1:T} \mid z_{1:T})` at `path` (\*S, \*B, T, D), a chain: its marginals, draws, best path.

        Raises:
            ValueError: a path of another shape, or one that is impossible.
            TypeError: as :meth:`HiddenMarkovChain.posterior`.
        """
        path = self._check_path(path)
        if self.num_steps == 1:
            moves, log_likelihoods = self._moves.unsqueeze(-3), _of_each(self._initial, path[..., 0, :]).unsqueeze(-2)
        else:
            _, moves, log_likelihoods = self._given(path)
        batch, size = log_likelihoods.shape[:-2], log_likelihoods.shape[-1]
        later = moves.expand(*batch, self.num_steps - 1, size, size)
        moves = torch.cat([moves.new_zeros(*batch, 1, size, size), later], -3)
        prior = HiddenMarkovChain(self._first.expand(*batch, size), moves, self.num_steps, mask=self._step_mask)
        return prior.posterior(log_likelihoods)

    def _given(self, path: Tensor) -> tuple[Any, Tensor, Tensor]:
        r"""Return the regimes' later steps (T - 1, \*S, \*B, K), moves (\*S, \*B, T - 1, K, K) and log-likelihoods."""
        z_prev = path[..., :-1, :]
        if self._step_mask is not None:  # nor may the step after the last one overflow
            z_prev = torch.where(self._step_mask[..., 1:, None], z_prev, path[..., :1, :].detach())
        z_prev, inputs = z_prev.movedim(-2, 0), self._inputs_along(path)
        regimes = self._regimes_at(z_prev, None if inputs is None else inputs[..., 1:, :].movedim(-2, 0))
        first = _of_each(self._initial, path[..., 0, :]).unsqueeze(-2)
        later = _of_each(regimes, path[..., 1:, :].movedim(-2, 0)).movedim(0, -2)
        log_likelihoods = torch.cat([first.expand(*later.shape[:-2], 1, -1), later], -2)
        if self._step_mask is not None:
            log_likelihoods = torch.where(self._step_mask.unsqueeze(-1), log_likelihoods, 0.0)
        return regimes, self._moves_at(z_prev).movedim(0, -3), log_likelihoods.clamp(min=IMPOSSIBLE)

    def _regimes_at(self, z_prev: Tensor, inputs: Tensor | None) -> Any:
        regimes = self.transition(z_prev) if inputs is None else self.transition(z_prev, inputs)
        wanted = torch.Size((*z_prev.shape[:-1], self._first.shape[-1])), self.event_shape[1:]
        if (regimes.batch_shape, regimes.event_shape) != wanted:
            raise ValueError(
                f"transition: returned batch {tuple(regimes.batch_shape)} and event {tuple(regimes.event_shape)} for "
                f"z_prev of shape {tuple(z_prev.shape)}, expected {tuple(wanted[0])}, a regime on the right, and "
                f"{tuple(wanted[1])}"
            )
        return regimes

    def _moves_at(self, z_prev: Tensor) -> Tensor:
        r"""Return log p(k_t | k_{t-1}, z_{t-1}) with the leading dimensions of z_prev, (\*S, \*B, K, K)."""
        size, (_, logits) = self._first.shape[-1], self._logits
        shape = (*z_prev.shape[:-1], size, size)
        if isinstance(logits, Tensor):
            return self._moves.expand(shape)
        found = logits(z_prev)
        try:
            found = found.expand(shape)
        except RuntimeError as error:
            raise ValueError(
                f"transition_logits: the function returned shape {tuple(found.shape)} for z_prev of shape "
                f"{tuple(z_prev.shape)}, expected one that expands to {shape}"
            ) from error
        return found.clamp(min=IMPOSSIBLE).log_softmax(-1)


def _mixture(log_probs: Tensor, regimes: Any) -> Any:
    classes = dist.Categorical(logits=log_probs, validate_args=False)
    return dist.MixtureSameFamily(classes, regimes, validate_args=False)


def _of_each(regimes: Any, z: Tensor) -> Tensor:
    r"""Return the log-density of z (\*S, \*B, D) under each regime, (\*S, \*B, K)."""
    log_prob: Tensor = regimes.log_prob(z.unsqueeze(-2))
    return log_prob
