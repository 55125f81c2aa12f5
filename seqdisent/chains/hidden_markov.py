"""A hidden Markov chain: classes whose sum over all paths is exact, so that nothing of them needs to be sampled."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from typing_extensions import Self

from seqdisent._checks import expand_to, reads_at_once
from seqdisent.chains.forward_sums import (
    IMPOSSIBLE,
    ForwardSums,
    as_log_prob,
    backward_sums,
    best_path,
    forward_sums,
)
from seqdisent.chains.markov import MarkovChain
from seqdisent.chains.protocol import fill_path, overwrite_steps
from seqdisent.masks import expand_observed


class FilteredClasses(NamedTuple):
    r"""What a hidden Markov chain says after each step; after one step, without T, as `filter_step` returns it.

    Attributes:
        log_probs: (\*B, T, K), the log-probabilities of the classes at t given what was observed until t.
        log_evidence: (\*B, T), the log-density of what was observed at t given all before, in nats; 0 at padding. Its
            sum over time is log p(x).
    """

    log_probs: Tensor
    log_evidence: Tensor


class ClassMarginals(NamedTuple):
    r"""The posterior probabilities of a hidden Markov chain's classes given all observations.

    Attributes:
        probs: (\*B, T, K), of each step's class.
        pair_probs: (\*B, T - 1, K, K), of the classes of each step and of the one after it; 0 where that is padding.
    """

    probs: Tensor
    pair_probs: Tensor


class HiddenMarkovChain(MarkovChain):
    r"""A Markov chain of K classes, :math:`p(k_1) \prod_t p(k_t \mid k_{t-1})`, with exact sums over its paths.

    A class is one-hot, so a path is (T, K) as of every chain. Given the log-likelihoods :math:`\log p(x_t \mid k_t)`,
    the evidence, the filter, the posterior (again such a chain, to draw from) and the best path are exact, by
    forward-backward in log space. A forecast is a hole at the end.

    Args:
        initial_logits: (\*B, K), of the first class, normalised or not; -inf for a class that is impossible.
        transition_logits: (K, K) or (\*B, K, K), row i of the class after class i; or (\*B, T, K, K), one for each
            step, that may depend on covariates, on static latents or on a continuous path. Those of the first step are
            never read. -inf forbids a transition.
        num_steps: T.
        mask: (\*B, T) bool, True where a step is real, padding on the right.

    Shape:
        - batch \*B, event (T, K)

    Raises:
        ValueError: logits of another shape, or with a row that is -inf throughout; a mask that does not fit.
        TypeError: a mask that is not bool.

    Example:
        Two classes that rarely change; the second step says nothing.

        >>> rarely = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        >>> chain = HiddenMarkovChain(torch.zeros(1, 2), rarely, num_steps=3)
        >>> log_likelihoods = torch.tensor([[[0.8, 0.2], [1.0, 1.0], [0.8, 0.2]]]).log()
        >>> chain.filter(log_likelihoods).log_evidence.exp()
        tensor([[0.5000, 1.0000, 0.6152]])
        >>> chain.smooth(log_likelihoods).probs[0, :, 0]
        tensor([0.8999, 0.8901, 0.8999])
        >>> chain.viterbi(log_likelihoods).argmax(-1)
        tensor([[0, 0, 0]])
        >>> _ = torch.manual_seed(0)
        >>> chain.posterior(log_likelihoods).sample().argmax(-1)  # an exact draw
        tensor([[0, 0, 0]])

    References:
        Rabiner, "A tutorial on hidden Markov models and selected applications in speech recognition", 1989. Hassan,
        Sarkka and Garcia-Fernandez, "Temporal parallelization of inference in hidden Markov models", IEEE Transactions
        on Signal Processing 2021, for the sums as an associative scan, which runs where it is faster on a CPU: small
        batches, few classes.
    """

    def __init__(
        self, initial_logits: Tensor, transition_logits: Tensor, num_steps: int, *, mask: Tensor | None = None
    ) -> None:
        if initial_logits.ndim == 0:
            raise ValueError("initial_logits: has shape (), expected (*B, K)")
        *batch_shape, size = initial_logits.shape
        by_step = transition_logits.ndim == len(batch_shape) + 3
        shapes = [(size, size), (*batch_shape, size, size), (*batch_shape, num_steps, size, size)]
        if not any(_expands(transition_logits, shape) for shape in shapes):
            raise ValueError(
                f"transition_logits: has shape {tuple(transition_logits.shape)}, expected (K, K), (*B, K, K) or "
                f"(*B, T, K, K) with the batch {tuple(batch_shape)} and K={size} of `initial_logits` and T={num_steps}"
            )
        self._logits = initial_logits, transition_logits
        first = _normalised("initial_logits", initial_logits)
        inputs = transition_logits.expand(shapes[-1]).flatten(-2) if by_step else None
        initial = dist.OneHotCategorical(logits=as_log_prob(first), validate_args=False)
        super().__init__(initial, self._move, num_steps, inputs=inputs, mask=mask)
        self._first = first
        if by_step:  # what stands in padding was filled
            later = self._by_step["inputs"][..., 1:, :].unflatten(-1, (size, size))
        else:
            later = transition_logits.unsqueeze(-3)
        self._moves = _normalised("transition_logits", later)

    def _move(self, z_prev: Tensor, inputs: Tensor | None = None) -> Any:
        size = z_prev.shape[-1]
        logits = self._moves.squeeze(-3) if inputs is None else inputs.unflatten(-1, (size, size))
        log_probs = logits if inputs is None else logits.clamp(min=IMPOSSIBLE).log_softmax(-1)
        # log(z P), exact for a class, and for probabilities too: then the mean path has those of every step
        hot = z_prev.unsqueeze(-1)
        largest = torch.where(hot > 0, log_probs, IMPOSSIBLE).amax(-2, keepdim=True).detach()
        probs = (hot * (log_probs - largest).clamp(max=60.0).exp()).sum(-2)
        return dist.OneHotCategorical(logits=as_log_prob(probs.log() + largest.squeeze(-2)), validate_args=False)

    def expand(self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: object = None) -> Self:
        """Return this chain with a larger batch; a particle plate calls it."""
        initial_logits, transition_logits = self._logits
        own = transition_logits.shape[len(self.batch_shape) :] if transition_logits.ndim > 2 else None
        if own is not None:
            transition_logits = transition_logits.expand(*batch_shape, *own)
        initial_logits = initial_logits.expand(*batch_shape, self.event_shape[-1])
        return type(self)(initial_logits, transition_logits, self.num_steps, mask=self._step_mask)

    def filter(self, log_likelihoods: Tensor, observed: Tensor | None = None) -> FilteredClasses:
        r"""Return the probabilities of each step's classes given the observations so far, and the evidence.

        Args:
            log_likelihoods: :math:`\log p(x_t \mid k_t)`, (\*S, \*B, T, K), in nats.
            observed: (\*B, T) bool, True where x was measured; None for all real steps.

        Raises:
            ValueError: shapes that do not fit, values that are NaN or inf, or a sequence that is impossible (-inf along
                every path): its first impossible step is named.
            TypeError: `observed` is not bool.
        """
        sums = self.sums(log_likelihoods, observed)
        self._check_possible(sums.log_evidence)
        return FilteredClasses(as_log_prob(sums.filtered), overwrite_steps(self, sums.log_evidence))

    def filter_step(
        self,
        log_likelihoods: Tensor | None,
        *,
        state: FilteredClasses | None = None,
        transition_logits: Tensor | None = None,
    ) -> FilteredClasses:
        r"""Filter one more step: what :meth:`filter` does, while the observations arrive, at the cost of one step.

        Neither the chain's number of steps nor its mask is read.

        Args:
            log_likelihoods: of x_t, (\*S, \*B, K); None where nothing was observed, which forecasts a step.
            state: what this function returned for the step before; None for the first step.
            transition_logits: (K, K) or (\*B, K, K), into this step; None for the chain's own, if they are the same at
                every step. Those of the first step are never read.

        Returns:
            The log-probabilities of k_t given what was observed until now, and the log-evidence of x_t given all
            before, without the dimension T. It is also the state that the next step starts from.

        Raises:
            ValueError: shapes that do not fit, values that are NaN or inf, an observation that is impossible, or
                `transition_logits` missing where they change from step to step.

        Example:
            >>> rarely = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
            >>> chain = HiddenMarkovChain(torch.zeros(1, 2), rarely, num_steps=1)
            >>> state = chain.filter_step(torch.tensor([[0.8, 0.2]]).log())
            >>> state = chain.filter_step(None, state=state)  # nothing was seen
            >>> state.log_probs.exp()
            tensor([[0.7400, 0.2600]])
        """
        predicted = self._first
        if state is not None:
            before = state.log_probs.clamp(min=IMPOSSIBLE)
            predicted = torch.logsumexp(before.unsqueeze(-1) + self._move_into_step(transition_logits), -2)
        if log_likelihoods is None:
            return FilteredClasses(as_log_prob(predicted), torch.zeros_like(predicted[..., 0]))
        joint = predicted + self._checked(log_likelihoods, predicted.shape[-1:])
        log_evidence = as_log_prob(torch.logsumexp(joint, -1))
        self._check_possible(log_evidence.unsqueeze(-1), mask=False)
        return FilteredClasses(as_log_prob(joint.log_softmax(-1)), log_evidence)

    def smooth(self, log_likelihoods: Tensor, observed: Tensor | None = None) -> ClassMarginals:
        r"""Return the posterior probabilities of each step's class, and of each pair, given all observations.

        Args:
            log_likelihoods: (\*S, \*B, T, K), in nats.
            observed: (\*B, T) bool, True where x was measured; None for all real steps.

        Raises:
            ValueError: as :meth:`filter`.
            TypeError: as there.
        """
        sums, later, log_likelihoods = self._both_sums(log_likelihoods, observed)
        probs = fill_path(self, (sums.filtered + later).softmax(-1))
        into = (log_likelihoods + later)[..., 1:, :].unsqueeze(-2)
        pairs = sums.filtered[..., :-1, :].unsqueeze(-1) + self._moves + into
        pair_probs = pairs.flatten(-2).softmax(-1).unflatten(-1, pairs.shape[-2:])
        if self._step_mask is not None:
            pair_probs = torch.where(self._step_mask[..., 1:, None, None], pair_probs, 0.0)
        return ClassMarginals(probs, pair_probs)

    def posterior(self, log_likelihoods: Tensor, observed: Tensor | None = None) -> HiddenMarkovChain:
        r"""Return :math:`p(k_{1:T} \mid x_{1:T})`, again a chain: its draws are exact.

        Args:
            log_likelihoods: (\*S, \*B, T, K), in nats.
            observed: (\*B, T) bool, True where x was measured; None for all real steps.

        Raises:
            ValueError: as :meth:`filter`.
            TypeError: as there.
        """
        _, later, log_likelihoods = self._both_sums(log_likelihoods, observed)
        message = log_likelihoods + later
        transitions = self._moves + message[..., 1:, :].unsqueeze(-2)
        never_read = transitions.new_zeros(*message.shape[:-2], 1, *transitions.shape[-2:])
        transitions = torch.cat([never_read, transitions], -3)
        initial = self._first + message[..., 0, :]
        return HiddenMarkovChain(initial, transitions, self.num_steps, mask=self._step_mask)

    @torch.no_grad()
    def viterbi(self, log_likelihoods: Tensor | None = None, observed: Tensor | None = None) -> Tensor:
        r"""Return the most probable path, one-hot (\*S, \*B, T, K); padding repeats the first step.

        Args:
            log_likelihoods: (\*S, \*B, T, K), in nats; None for the most probable path of the chain itself.
            observed: (\*B, T) bool, True where x was measured; None for all real steps.

        Raises:
            ValueError: as :meth:`filter`.
            TypeError: as there.
        """
        if log_likelihoods is None:
            log_likelihoods = self._first.new_zeros(self.batch_shape + self.event_shape)
        log_likelihoods = self._counted(log_likelihoods, observed)
        self._check_possible(self.sums(log_likelihoods).log_evidence)
        classes = best_path(self._first, self._moves, log_likelihoods, self._step_mask)
        one_hot = torch.nn.functional.one_hot(classes, self.event_shape[-1]).to(self._first.dtype)
        return fill_path(self, one_hot)

    def sums(self, log_likelihoods: Tensor, observed: Tensor | None = None) -> ForwardSums:
        """Return the sums over paths given `log_likelihoods` where `observed`; what is impossible is no error."""
        return forward_sums(self._first, self._moves, self._counted(log_likelihoods, observed))

    def _both_sums(self, log_likelihoods: Tensor, observed: Tensor | None) -> tuple[ForwardSums, Tensor, Tensor]:
        log_likelihoods = self._counted(log_likelihoods, observed)
        sums = forward_sums(self._first, self._moves, log_likelihoods)
        self._check_possible(sums.log_evidence)
        return sums, backward_sums(self._moves, log_likelihoods, self._step_mask), log_likelihoods

    def _counted(self, log_likelihoods: Tensor, observed: Tensor | None) -> Tensor:
        """Return log-likelihoods (*S, *B, T, K) with 0 at padding and in holes, and without -inf."""
        counts = self._step_mask
        if observed is not None:
            steps = torch.Size((*self.batch_shape, self.num_steps))
            observed = expand_observed(observed, steps, torch.Size(), log_likelihoods.device)
            counts = observed if counts is None else counts & observed
        return self._checked(log_likelihoods, self.event_shape, counts)

    def _checked(self, log_likelihoods: Tensor, event_shape: torch.Size, counts: Tensor | None = None) -> Tensor:
        num_batch = max(0, log_likelihoods.ndim - len(event_shape))
        try:
            batch_shape = torch.broadcast_shapes(log_likelihoods.shape[:num_batch], self.batch_shape)
        except RuntimeError:
            batch_shape = None
        if batch_shape is None or log_likelihoods.shape[num_batch:] != event_shape:
            raise ValueError(
                f"log_likelihoods: has shape {tuple(log_likelihoods.shape)}, expected (*B, "
                f"{', '.join(map(str, event_shape))}) with the chain's batch {tuple(self.batch_shape)}"
            )
        log_likelihoods = log_likelihoods.expand(batch_shape + event_shape)
        if counts is not None:
            log_likelihoods = torch.where(counts.unsqueeze(-1), log_likelihoods, 0.0)
        if reads_at_once(log_likelihoods) and not (log_likelihoods < torch.inf).all():
            raise ValueError(
                "log_likelihoods: have NaN or inf, expected numbers or -inf; what was not measured is for `observed` "
                "to say"
            )
        return log_likelihoods.clamp(min=IMPOSSIBLE)

    def _move_into_step(self, transition_logits: Tensor | None) -> Tensor:
        size = self.event_shape[-1]
        if transition_logits is not None:
            expand_to("transition_logits", transition_logits, (*self.batch_shape, size, size))
            return _normalised("transition_logits", transition_logits)
        if "inputs" in self._by_step:
            raise ValueError("transition_logits: got None, expected those of this step: the chain's change over time")
        return self._moves.squeeze(-3)

    def _check_possible(self, log_evidence: Tensor, *, mask: bool = True) -> None:
        """Raise if the evidence (*S, *B, T) of a step is -inf; only where its values are read at once."""
        if not reads_at_once(log_evidence):
            return
        impossible = log_evidence == -torch.inf
        if impossible.any():
            *sequence, step = impossible.nonzero()[0].tolist()
            where = f" (sequence {', '.join(map(str, sequence))})" if sequence else ""
            when = f"step {step} is" if mask else "the observation is"
            raise ValueError(
                f"log_likelihoods: {when} impossible given those before{where}: -inf along every path, expected a "
                "class that explains it"
            )


def _normalised(name: str, logits: Tensor) -> Tensor:
    if reads_at_once(logits) and (logits == -torch.inf).all(-1).any():
        raise ValueError(f"{name}: a row is -inf throughout, expected at least one class that is possible")
    return logits.clamp(min=IMPOSSIBLE).log_softmax(-1)


def _expands(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    return (
        tensor.ndim == len(shape)
        and tensor.shape[-2:] == shape[-2:]
        and all(a in (1, b) for a, b in zip(tensor.shape, shape, strict=True))
    )
