"""Latent trajectories beside a recurrent network: chains that carry a deterministic state, and frames fed back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from typing_extensions import Self

from seqdisent._checks import check_last_dim, check_recurrence, expand_to
from seqdisent.chains.markov import MarkovChain
from seqdisent.chains.protocol import ChainState

_Layers = Tensor | tuple[Tensor, Tensor]  # what torch's recurrent networks carry, (layers, N, H); an LSTM has two


class _Known(NamedTuple):
    """The states of a network along a path, known beforehand."""

    path: Tensor
    recurrence: nn.RNNBase
    states: Tensor


_KNOWN: ContextVar[tuple[_Known, ...]] = ContextVar("_KNOWN", default=())


@contextmanager
def known_states(*known: tuple[Tensor, nn.RNNBase, Tensor]) -> Iterator[None]:
    r"""Let :meth:`RecurrentChain.states` return given states (\*S, \*B, T, H) for a path, that very tensor.

    A program that is run on one step alone so finds what its network carries from the steps before.
    """
    token = _KNOWN.set(tuple(_Known(*each) for each in known))
    try:
        yield
    finally:
        _KNOWN.reset(token)


class RecurrentChain(MarkovChain):
    r"""A Markov chain whose steps also read a state that a recurrent network carries along the path.

    .. math:: h_t = f(h_{t-1}, \{z_{t-1}, u_t\}), \qquad z_t \sim p(z_t \mid z_{t-1}, \{h_t, c_t\})

    It is a :class:`~seqdisent.MarkovChain` whose inputs, :math:`\{h_t, c_t\}`, are made as it goes. Sampling walks
    through time. Scoring is one call of the network on all steps, then one of the transition.

    Args:
        initial: distribution of z_1, batch \*B, event (D,): what the caller makes of h_1 (and c_1).
        transition: a function of z_prev and :math:`\{h_t, c_t\}`, concatenated, that returns the distribution of z_t,
            as of :class:`~seqdisent.MarkovChain`. It need not read z_prev.
        num_steps: T, the number of steps.
        recurrence: f, an ``nn.GRU``, ``nn.LSTM`` or ``nn.RNN`` in one direction and without dropout. It reads
            :math:`\{z_{t-1}, u_t\}`, concatenated; h_t is the output of its last layer.
        state: h_1, (\*B, H) or what expands to it, where every layer starts (the cells of an LSTM start at 0); None
            for 0.
        inputs: u_t, (\*B, T, I), known beforehand (actions, or the frame before); or a function of z_prev, h_prev and
            t, counted from 0, that makes u_t as the chain goes, and that must be deterministic (the model's own frame,
            fed back by :func:`feedback`, also with noise that was drawn before). Then scoring walks through time too.
            Those of the first step are never read.
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
        check_recurrence(recurrence)
        if state is None:
            state = next(recurrence.parameters()).new_zeros(recurrence.hidden_size)
        check_last_dim("state", state, recurrence.hidden_size, "the hidden size of `recurrence`")
        known = None if callable(inputs) else inputs
        super().__init__(initial, transition, num_steps, inputs=known, mask=mask)
        self._state = expand_to("state", state, (*initial.batch_shape, recurrence.hidden_size))
        self._recurrence, self._reads_latent = recurrence, reads_latent
        self._feedback = inputs if callable(inputs) else None
        if context is not None:
            self._read_by_step("context", context)
        if self._feedback is None:
            reads = {"z": self.event_shape[-1]} if reads_latent else {}
            reads |= {"inputs": known.shape[-1]} if known is not None else {}
            if recurrence.input_size != sum(reads.values()):
                raise ValueError(
                    f"recurrence: reads {recurrence.input_size} values, expected those of `inputs` and, with "
                    f"reads_latent=True, of z: {reads or 'none'}"
                )

    @property
    def recurrence(self) -> nn.RNNBase:
        """The network, f."""
        return self._recurrence

    @property
    def is_markov(self) -> bool:
        """Whether a step depends on the path through the step before alone: the network does not read z."""
        return not self._reads_latent and self._feedback is None

    def states(self, path: Tensor) -> Tensor:
        r"""Return h_1 ... h_T along `path` (\*S, \*B, T, D), (\*S, \*B, T, H): what an emission may read beside z."""
        for known in _KNOWN.get():
            if known.path is path and known.recurrence is self._recurrence:
                return known.states
        return self._states(self._check_path(path))[0]

    def expand(self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: object = None) -> Self:
        """Return this chain with a larger batch; a particle plate calls it."""
        return type(self)(
            self.initial.expand(torch.Size(batch_shape)), self.transition, self.num_steps,
            recurrence=self._recurrence, state=self._state, inputs=self._feedback or self._by_step.get("inputs"),
            context=self._by_step.get("context"), reads_latent=self._reads_latent, mask=self._step_mask,
        )  # fmt: skip

    def _inputs_along(self, path: Tensor) -> Tensor:
        (states, _), context = self._states(path), self._along("context", path)
        return states if context is None else torch.cat([states, context], -1)

    def step(
        self,
        z_prev: Tensor | None = None,
        state: ChainState | None = None,
        *,
        inputs: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[Any, ChainState]:
        r"""Return the conditional of the next step, and the state from which the chain goes on after it.

        As :meth:`MarkovChain.step`, at the cost of one step of the network and one call of the transition.

        Args:
            z_prev: the step before; None for the first.
            state: what this function returned beside the step before; None at the start.
            inputs: (\*S, \*B, I), what the network reads at this step; None for the chain's own, known or fed back.
            context: (\*S, \*B, C), what the transition reads beside; None for the chain's own.

        Raises:
            ValueError: as there, or a context that has ended or of another batch.
        """
        if z_prev is None or state is None:
            return super().step(z_prev, state)
        reads = self._reads_at(z_prev, state, inputs=inputs, context=context)
        hidden, layers = self._advance(z_prev, state.num_steps, reads.get("inputs"), state.carried)
        read = torch.cat([hidden, reads["context"]], -1) if "context" in reads else hidden
        return self._step(z_prev, read), ChainState(state.num_steps + 1, state.reads, (hidden, layers))

    def state_after(self, path: Tensor) -> ChainState:
        r"""Return the state after real steps `path` (\*S, \*B, T', D), by one call of the network; see :meth:`step`."""
        states, layers = self._states(path)
        return self._state_at(path.shape[-2])._replace(carried=(states[..., -1, :], layers))

    def gather_state(self, state: ChainState, index: Tensor) -> ChainState:
        r"""Return the state of chosen particles, as of a :class:`~seqdisent.MarkovChain`, with what each carries.

        Args:
            state: of K particles, what :meth:`step` returned.
            index: (K, \*B) int64, for each particle the one that it goes on from.
        """
        gathered = self._state_at(state.num_steps)
        if state.carried is None:  # the network has not run yet
            return gathered
        hidden, layers = state.carried
        rows = torch.arange(index.numel(), device=index.device).reshape(index.shape).gather(0, index).flatten()
        carried = tuple(x.index_select(1, rows) for x in (layers if isinstance(layers, tuple) else (layers,)))
        hidden = hidden.flatten(0, -2).index_select(0, rows).reshape(hidden.shape)
        return gathered._replace(carried=(hidden, carried if isinstance(layers, tuple) else carried[0]))

    def _states(self, path: Tensor) -> tuple[Tensor, _Layers]:
        r"""Return the states along `path` (\*S, \*B, T', D), and what the network carries after them."""
        first, layers = self._start(path)
        if self._feedback is not None:
            states = [first]
            for t, z_prev in enumerate(path[..., :-1, :].unbind(-2), 1):
                hidden, layers = self._advance(z_prev, t, None, (states[-1], layers))
                states.append(hidden)
            return torch.stack(states, -2), layers
        if path.shape[-2] == 1:
            return first.unsqueeze(-2), layers
        inputs = self._along("inputs", path)
        if inputs is not None:
            inputs = inputs[..., 1 : path.shape[-2], :]
        later, layers = self._run(path[..., :-1, :], inputs, layers)
        return torch.cat([first.unsqueeze(-2), later], -2), layers

    def _start(self, path: Tensor) -> tuple[Tensor, _Layers]:
        first = self._state.expand(*path.shape[:-2], -1)
        return first, self._layers(first)

    def _advance(
        self, z_prev: Tensor, t: int, inputs: Tensor | None, carried: tuple[Tensor, _Layers] | None
    ) -> tuple[Tensor, _Layers]:
        """Let the network read what stands before step t, counted from 0; return its output and what it carries."""
        hidden, layers = self._start(z_prev.unsqueeze(-2)) if carried is None else carried
        if inputs is None and self._feedback is not None:
            inputs = self._feedback(z_prev, hidden, t)
            if inputs.shape[-1] + self._reads_latent * z_prev.shape[-1] != self._recurrence.input_size:
                raise TypeError(
                    f"inputs: the function returned {inputs.shape[-1]} values, expected as many as `recurrence` "
                    f"reads beside z (it reads {self._recurrence.input_size} in all)"
                )
        output, layers = self._run(z_prev.unsqueeze(-2), None if inputs is None else inputs.unsqueeze(-2), layers)
        return output.squeeze(-2), layers

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


def feedback(
    frame: Callable[..., Tensor],
    history: tuple[Tensor, Tensor | None] | None = None,
    *,
    prepare: Callable[[Tensor], Tensor] | None = None,
    noise: Tensor | None = None,
) -> Callable[[Tensor, Tensor, int], Tensor]:
    r"""Return the `inputs` of a :class:`~seqdisent.RecurrentChain` that reads back the model's own frames.

    Such inputs must be a function of the path, since scoring walks along it again. Without `noise`, `frame` is one by
    itself, the mean say, which leaves out that frames vary. To feed back *draws*, the model first samples the noise of
    all frames, as a site of its own. A frame is then a function of z, h and its noise, the same in every walk. The
    model emits these same frames, the `drawn` of :class:`~seqdisent.IndependentSteps`: ``generate(...)["x"].sample()``,
    and that of `forecast`, are the frames that were fed back. The emission's mean is that given the frames before.

    .. code-block:: python

        with pyro.plate("sequences", num_sequences):
            if frames is None:
                normal = dist.Normal(torch.zeros(num_steps, X), 1.0).to_event(2)
                noise = pyro.sample("noise", normal, infer={"is_auxiliary": True})  # no emission
                inputs = feedback(lambda z, h, noise: loc(z, h) + scale * noise, noise=noise)
            ...
            step = dist.Normal(loc(z, states), scale).to_event(1)
            drawn = None if frames is not None else step.mean + scale * noise
            pyro.sample("x", IndependentSteps(step, mask, drawn=drawn), obs=frames)

    With ``sample=False`` the noise is at its own mean. What is fed back, and what ``.sample()`` returns, is then the
    frame with that noise: the mean if the noise is a Normal's, as here; the keys that are likelier pressed than not,
    where a key is pressed if its probability exceeds a Uniform's noise. Noise of S futures has S on the left, as every
    site has. A step that `history` knows is read from there; what is drawn at it is read nowhere.

    Args:
        frame: a function of z_prev, h_prev and, with `noise`, the noise of that step, that returns the model's frame
            (\*B, X), deterministic.
        history: frames (B, T', X) and which of them are known, (B, T') or (B, T', X) bool, or None for all: they are
            read in place of the model's own, as `reconstruct`, `impute` and `forecast` pass them with
            ``history=True``. None for no such frames.
        prepare: what is made of a frame before the network reads it.
        noise: (\*B, T, N), what `frame` reads at each step; None for nothing.

    Returns:
        A function of z_prev, h_prev and t.

    Raises:
        ValueError: what is returned is called at a step that the noise does not have.

    Example:
        >>> read = feedback(lambda z, h: z + h, (torch.ones(1, 2, 1), None))
        >>> [read(torch.zeros(1, 1), torch.zeros(1, 1), t).item() for t in (1, 2, 3)]
        [1.0, 1.0, 0.0]
        >>> read = feedback(lambda z, h, noise: z + noise, noise=torch.tensor([[[0.5], [-0.5]]]))
        >>> [read(torch.zeros(1, 1), torch.zeros(1, 1), t).item() for t in (1, 2)]
        [0.5, -0.5]
    """

    def inputs(z_prev: Tensor, hidden: Tensor, t: int) -> Tensor:
        if noise is not None and t > noise.shape[-2]:
            raise ValueError(f"noise: has {noise.shape[-2]} steps, expected at least {t}")
        read = frame(z_prev, hidden) if noise is None else frame(z_prev, hidden, noise[..., t - 1, :])
        if history is not None and t <= history[0].shape[1]:
            frames, known = history[0][:, t - 1], None if history[1] is None else history[1][:, t - 1]
            if known is not None:
                frames = torch.where(known if known.ndim == frames.ndim else known.unsqueeze(-1), frames, read)
            read = frames.expand_as(read)
        return read if prepare is None else prepare(read)

    return inputs


def shift_steps(values: Tensor) -> Tensor:
    r"""Return (\*B, T, X) one step late, as the inputs of a chain that reads the frame before; the first repeats.

    Args:
        values: (\*B, T, X).

    Example:
        >>> shift_steps(torch.tensor([[[1.0], [2.0], [3.0]]])).flatten()
        tensor([1., 1., 2.])
    """
    return torch.cat([values[..., :1, :], values[..., :-1, :]], -2)
