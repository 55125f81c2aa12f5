"""Latent trajectories beside a recurrent network: chains that carry a deterministic state, and reading from the end."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from seqdisent._checks import check_last_dim
from seqdisent._dropout import modules_that_drop_out
from seqdisent._masking import check_mask, overwrite_padding
from seqdisent.distributions import MarkovChain

_Layers = Tensor | tuple[Tensor, Tensor]  # what torch's recurrent networks carry, (layers, N, H); an LSTM has two


class RecurrentChain(MarkovChain):
    r"""A Markov chain whose steps also read a state that a recurrent network carries along the path.

    .. math:: h_t = f(h_{t-1}, \{z_{t-1}, u_t\}), \qquad z_t \sim p(z_t \mid z_{t-1}, \{h_t, c_t\})

    It is a :class:`~seqdisent.MarkovChain` whose inputs, :math:`\{h_t, c_t\}`, are made as it goes. Sampling walks
    through time. Scoring is one call of the network on all steps, then one of the transition.

    Args:
        initial: distribution of z_1, batch \*B, event (D,): what the caller makes of h_1 (and c_1).
        transition: a function of z_prev and :math:`\{h_t, c_t\}`, concatenated, that returns the distribution of z_t,
            as of :class:`~seqdisent.MarkovChain`. It need not read z_prev.
        num_steps: T.
        recurrence: f, an ``nn.GRU``, ``nn.LSTM`` or ``nn.RNN`` in one direction and without dropout. It reads
            :math:`\{z_{t-1}, u_t\}`, concatenated; h_t is the output of its last layer.
        state: h_1, (\*B, H) or what expands to it, where every layer starts (the cells of an LSTM start at 0); None
            for 0.
        inputs: u_t, (\*B, T, I), known beforehand (actions, or the frame before); or a function of z_prev, h_prev and
            t, counted from 0, that makes u_t as the chain goes, and that must be deterministic (the model's own frame,
            fed back). Then scoring walks through time too. Those of the first step are never read.
        context: c_t, (\*B, T, C), what the transition reads and the network does not (a guide's features of frames).
            That of the first step is never read.
        reads_latent: whether the network reads z_{t-1}; if not, u_t alone.
        mask: (\*B, T) bool, as of :class:`~seqdisent.MarkovChain`.

    Shape:
        - batch \*B, event (T, D)
        - a path: (\*S, \*B, T, D)

    Raises:
        TypeError: `recurrence` is no such network.
        ValueError: one with dropout or two directions, or that reads another number of values; tensors of another
            shape; and all that :class:`~seqdisent.MarkovChain` refuses.

    Example:
        A prior whose every step remembers all steps before it.

        >>> import pyro.distributions as dist
        >>> _ = torch.manual_seed(0)
        >>> network, head = nn.LSTM(2, 8), nn.Linear(8, 2)
        >>> def step(z_prev, h):
        ...     return dist.Normal(head(h), 1.0).to_event(1)
        >>> initial = step(None, torch.zeros(4, 8))
        >>> chain = RecurrentChain(initial, step, num_steps=5, recurrence=network)
        >>> path = chain.rsample()
        >>> chain.states(path).shape, chain.log_prob(path).shape
        (torch.Size([4, 5, 8]), torch.Size([4]))

    References:
        Chung et al., "A recurrent latent variable model for sequential data", NeurIPS 2015. Hafner et al., "Learning
        latent dynamics for planning from pixels", ICML 2019, section 3.
    """

    def __init__(
        self,
        initial: TorchDistribution,
        transition: Callable[..., TorchDistribution],
        num_steps: int,
        *,
        recurrence: nn.RNNBase,
        state: Tensor | None = None,
        inputs: Tensor | Callable[[Tensor, Tensor, int], Tensor] | None = None,
        context: Tensor | None = None,
        reads_latent: bool = True,
        mask: Tensor | None = None,
    ) -> None:
        _check_recurrence(recurrence)
        if state is None:
            state = next(recurrence.parameters()).new_zeros(recurrence.hidden_size)
        check_last_dim("state", state, recurrence.hidden_size, "the hidden size of `recurrence`")
        self._state = _expanded("state", state, (*initial.batch_shape, recurrence.hidden_size))
        self._context = None
        if context is not None:
            if context.ndim < 2 or context.shape[-2] != num_steps:
                raise ValueError(f"context: has shape {tuple(context.shape)}, expected (*B, T, C) with T={num_steps}")
            self._context = _expanded("context", context, (*initial.batch_shape, *context.shape[-2:]))
            if mask is not None:
                real = check_mask(mask, initial.batch_shape, num_steps, context.device)
                self._context = overwrite_padding(self._context, real)
        self._recurrence, self._reads_latent = recurrence, reads_latent
        self._feedback = inputs if callable(inputs) else None
        known = None if callable(inputs) else inputs
        super().__init__(initial, transition, num_steps, inputs=known, mask=mask)
        if self._feedback is not None:
            self._refuse_dropout("inputs", self._feedback)
        else:
            reads = {"z": self.event_shape[-1]} if reads_latent else {}
            reads |= {"inputs": known.shape[-1]} if known is not None else {}
            if recurrence.input_size != sum(reads.values()):
                raise ValueError(
                    f"recurrence: reads {recurrence.input_size} values, expected those of `inputs` and, with "
                    f"reads_latent=True, of z: {reads or 'none'}"
                )

    def states(self, path: Tensor) -> Tensor:
        r"""Return h_1 ... h_T along `path` (\*S, \*B, T, D), (\*S, \*B, T, H): what an emission may read beside z."""
        return self._states(self._check_path(path))

    def expand(self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: object = None) -> RecurrentChain:
        """Return this chain with a larger batch; a particle plate calls it."""
        return type(self)(
            self.initial.expand(torch.Size(batch_shape)), self.transition, self.num_steps,
            recurrence=self._recurrence, state=self._state, inputs=self._feedback or self._inputs,
            context=self._context, reads_latent=self._reads_latent, mask=self._step_mask,
        )  # fmt: skip

    def extend(self, prefix: Tensor, num_steps: int, *, mask: Tensor | None = None, sample: bool = True) -> Tensor:
        r"""Continue a path, as :meth:`MarkovChain.extend` does; `context` must cover all steps too.

        Raises:
            ValueError: as there, or a context that ends too early.
        """
        if self._context is not None and self._context.shape[-2] < prefix.shape[-2] + num_steps:
            raise ValueError(
                f"num_steps: the chain has context for {self._context.shape[-2]} steps, expected "
                f"{prefix.shape[-2]} of the prefix + {num_steps}"
            )
        return super().extend(prefix, num_steps, mask=mask, sample=sample)

    def _inputs_along(self, path: Tensor) -> Tensor:
        return self._with_context(self._states(path), self._context)

    def _states(self, path: Tensor) -> Tensor:
        first = self._state.expand(*path.shape[:-2], -1)
        if self._feedback is not None:
            z_prev = list(path.unbind(-2))
            walk = self._walk_states(z_prev[:1])
            return torch.stack([first, *(walk(z, t) for t, z in enumerate(z_prev[:-1], 1))], -2)
        if self.num_steps == 1:
            return first.unsqueeze(-2)
        known = None if self._inputs is None else self._inputs.expand(*path.shape[:-2], -1, -1)[..., 1:, :]
        later, _ = self._run(path[..., :-1, :], known, self._layers(first))
        return torch.cat([first.unsqueeze(-2), later], -2)

    def _stepper(self, path: list[Tensor]) -> Callable[[Tensor, int], TorchDistribution]:
        walk = self._walk_states(path)
        contexts = _unbound(self._context, path[0])

        def step(z_prev: Tensor, t: int) -> TorchDistribution:
            state = walk(z_prev, t)
            return self._step(z_prev, self._with_context(state, None if contexts is None else contexts[t]))

        return step

    def _walk_states(self, path: list[Tensor]) -> Callable[[Tensor, int], Tensor]:
        """Return the function of z_prev and t that gives the states after those of `path`, in turn."""
        state = self._state.expand(*path[0].shape[:-1], -1)
        layers, inputs = self._layers(state), _unbound(self._inputs, path[0])

        def walk(z_prev: Tensor, t: int) -> Tensor:
            nonlocal state, layers
            read = None
            if self._feedback is not None:
                read = self._call("inputs", self._feedback, z_prev, state, t)
                if read.shape[-1] + self._reads_latent * z_prev.shape[-1] != self._recurrence.input_size:
                    raise TypeError(
                        f"inputs: the function returned {read.shape[-1]} values, expected as many as `recurrence` "
                        f"reads beside z (it reads {self._recurrence.input_size} in all)"
                    )
                read = read.unsqueeze(-2)
            elif inputs is not None:
                read = inputs[t].unsqueeze(-2)
            output, layers = self._run(z_prev.unsqueeze(-2), read, layers)
            state = output.squeeze(-2)
            return state

        for t, z_prev in enumerate(path[:-1], 1):
            walk(z_prev, t)
        return walk

    def _layers(self, state: Tensor) -> _Layers:
        """Return `state` (*S, *B, H) as what the network carries."""
        flat = state.reshape(-1, state.shape[-1])
        layers = flat.expand(self._recurrence.num_layers, *flat.shape).contiguous()
        return (layers, torch.zeros_like(layers)) if isinstance(self._recurrence, nn.LSTM) else layers

    def _run(self, z_prev: Tensor, inputs: Tensor | None, layers: _Layers) -> tuple[Tensor, _Layers]:
        """Run the network on z (*S, *B, T', D) and inputs (*S, *B, T', I); return its outputs and what it carries."""
        parts = ([z_prev] if self._reads_latent else []) + ([] if inputs is None else [inputs])
        read = torch.cat(parts, -1)
        flat, time = read.reshape(-1, *read.shape[-2:]), 1 if self._recurrence.batch_first else 0
        output, layers = self._recurrence(flat.movedim(1, time), layers)
        return output.movedim(time, 1).reshape(*read.shape[:-1], -1), layers

    @staticmethod
    def _with_context(states: Tensor, context: Tensor | None) -> Tensor:
        if context is None:
            return states
        return torch.cat([states, context.expand(*states.shape[:-1], -1)], -1)


def read_backward(recurrence: nn.RNNBase, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Return what each step may know of itself and of all later ones: the network reads every sequence from its end.

    Args:
        recurrence: an ``nn.GRU``, ``nn.LSTM`` or ``nn.RNN`` in one direction.
        inputs: (\*B, T, I).
        mask: (\*B, T) bool, which steps are real: a shorter sequence is read from its own last step.

    Returns:
        (\*B, T, H), 0 at padding.

    Raises:
        TypeError: `recurrence` is no such network.
        ValueError: one in two directions; inputs or mask of another shape, no sequence, a mask with a hole or on
            another device.

    Example:
        >>> read_backward(nn.GRU(3, 5), torch.zeros(2, 7, 3)).shape
        torch.Size([2, 7, 5])

    References:
        Krishnan, Shalit and Sontag, "Structured inference networks for nonlinear state space models", AAAI 2017 (ST-R).
    """
    _check_recurrence(recurrence, may_drop=True)
    check_last_dim("inputs", inputs, recurrence.input_size, "the input size of `recurrence`")
    if inputs.ndim < 2:
        raise ValueError(f"inputs: has shape {tuple(inputs.shape)}, expected (*B, T, {recurrence.input_size})")
    if 0 in inputs.shape:
        raise ValueError(f"inputs: has shape {tuple(inputs.shape)}, expected at least one sequence and one step")
    num_steps = inputs.shape[-2]
    steps = torch.arange(num_steps, device=inputs.device)
    if mask is not None:
        mask = check_mask(mask, inputs.shape[:-2], num_steps, inputs.device)
        inputs = overwrite_padding(inputs, mask)
    lengths = steps.new_full((*inputs.shape[:-2], 1), num_steps) if mask is None else mask.sum(-1, keepdim=True)
    order = (lengths - 1 - steps) % num_steps  # an involution; padding stays behind what is real

    def reverse(values: Tensor) -> Tensor:
        return values.gather(-2, order.unsqueeze(-1).expand(*values.shape))

    flat, time = reverse(inputs).reshape(-1, *inputs.shape[-2:]), 1 if recurrence.batch_first else 0
    output, _ = recurrence(flat.movedim(1, time))
    futures = reverse(output.movedim(time, 1).reshape(*inputs.shape[:-1], -1))
    return futures if mask is None else overwrite_padding(futures, mask)


def _unbound(values: Tensor | None, like: Tensor) -> tuple[Tensor, ...] | None:
    """Unbind (*B, T, I) once, with the batch of `like`: indexing inside the loop makes the backward quadratic in T."""
    return None if values is None else values.expand(*like.shape[:-1], -1, -1).unbind(-2)


def _expanded(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return tensor.expand(shape)
    except RuntimeError as error:
        raise ValueError(f"{name}: has shape {tuple(tensor.shape)}, expected one that expands to {shape}") from error


def _check_recurrence(recurrence: nn.RNNBase, *, may_drop: bool = False) -> None:
    if not isinstance(recurrence, nn.GRU | nn.LSTM | nn.RNN):
        raise TypeError(f"recurrence: got {type(recurrence).__name__}, expected an nn.GRU, nn.LSTM or nn.RNN")
    if recurrence.bidirectional or recurrence.proj_size:
        raise ValueError("recurrence: has two directions or projections, expected one direction and none")
    if not may_drop and modules_that_drop_out(recurrence):
        raise ValueError(
            "recurrence: drops units at random, so a path would be scored under another state than the one that drew "
            "it; remove the dropout or call .eval()"
        )
