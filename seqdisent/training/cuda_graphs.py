"""Training steps recorded as CUDA graphs: a walk through time is hundreds of small kernels, launched all at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from seqdisent.inference import ELBOTerms, Term

Computation = Callable[..., tuple[ELBOTerms, Tensor]]

_WARM_UP = 3  # runs before a recording, in which libraries allocate what they need
_MOST = 50  # recordings, each with memory of its own


class StepGraphs:
    """Forward and backward passes of training steps, recorded once for each shape of what they read, then replayed.

    Args:
        network: whose parameters the gradients are of.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._recordings: dict[Any, _Recording] = {}

    def __call__(self, compute: Computation, *read: Any) -> tuple[ELBOTerms, Tensor]:
        """Return what ``compute(*read)`` returns, ledger and loss, with noise from the current random state.

        Tensors and floats in `read`, a tree of tuples, lists and dicts, may change from step to step; anything else
        makes a recording of its own.

        Raises:
            ValueError: a tensor that is not on a CUDA device or has a gradient, mixed precision, or hooks of
                parameters, which would run twice.
            RuntimeError: `compute` cannot be recorded, since what it does depends on the value of a tensor, or there
                are too many shapes.
        """
        if torch.is_autocast_enabled("cuda"):
            raise ValueError("cuda_graph: got mixed precision, expected a precision such as 32-true")
        leaves, tree = pytree.tree_flatten(read)
        # a recording holds for parameters at their places, those that are trained, and modules in their modes
        parameters = ((parameter.data_ptr(), parameter.requires_grad) for parameter in self.network.parameters())
        modes = (module.training for module in self.network.modules())
        key = (repr(tree), *map(_kind, leaves), *parameters, *modes)
        if key not in self._recordings:
            if len(self._recordings) == _MOST:
                raise RuntimeError(
                    f"cuda_graph: got batches of more than {_MOST} shapes, or a number (int) that changes from step to "
                    "step; expected few shapes, and what changes as tensors"
                )
            self._recordings[key] = _Recording(compute, leaves, tree, self.network)
        recording = self._recordings[key]
        recording.replay(leaves)
        return recording.terms, _Loss.apply(recording, *recording.parameters)  # type: ignore[no-untyped-call]


class _Recording:
    """One step's computation at fixed places in memory, where `replay` puts what it reads and finds what it returns."""

    def __init__(self, compute: Computation, leaves: list[Any], tree: pytree.TreeSpec, network: nn.Module) -> None:
        self.places = [_place(leaf, next(network.parameters()).device) for leaf in leaves]
        read = pytree.tree_unflatten(self.places, tree)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if any(parameter._backward_hooks for parameter in trained):
            raise ValueError("cuda_graph: parameters have hooks, which would run twice; expected none")

        def run() -> tuple[ELBOTerms, Tensor, list[Tensor | None]]:
            terms, loss = compute(*read)
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            return _detached(terms), loss.detach(), list(gradients)

        buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.random.fork_rng([torch.cuda.current_device()]), torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                run()
        current.wait_stream(aside)
        for buffer, before in buffers:
            buffer.copy_(before)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.stream(current),  # also after a failure
                pyro.validation_enabled(False),
                torch.cuda.graph(self.graph, capture_error_mode="thread_local"),
            ):
                self.terms, self.loss, gradients = run()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                "cuda_graph: the step cannot be recorded; expected model, guide and objective to do the same whatever "
                f"the values of tensors, and not to wait for them (.item(), if, nonzero): {error.__context__ or error}"
            ) from error
        found = [(p, gradient) for p, gradient in zip(trained, gradients, strict=True) if gradient is not None]
        self.parameters, self.gradients = [p for p, _ in found], [gradient for _, gradient in found]

    def replay(self, leaves: list[Any]) -> None:
        """Compute anew from these leaves, with noise from the current random state."""
        for place, leaf in zip(self.places, leaves, strict=True):
            if isinstance(leaf, Tensor):
                place.copy_(leaf)
            elif isinstance(leaf, float):
                place.fill_(leaf)
        self.graph.replay()


class _Loss(torch.autograd.Function):
    """The loss of a replayed step, whose gradient is already known: to an optimiser it is like any other."""

    @staticmethod
    @override
    def forward(ctx: Any, recording: _Recording, *parameters: Tensor) -> Tensor:
        ctx.gradients = recording.gradients
        return recording.loss.clone()

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, *torch._foreach_mul(ctx.gradients, grad)


def _detached(terms: ELBOTerms) -> ELBOTerms:
    """Return the ledger without the graph that it was computed by, which would tie the parameters to this stream."""

    def values_of(term: Term) -> Term:
        per_step = None if term.per_step is None else term.per_step.detach()
        return replace(term, value=term.value.detach(), per_step=per_step, pair=None)

    return replace(
        terms,
        terms={name: values_of(term) for name, term in terms.terms.items()},
        held=None,
        auxiliary_losses={name: loss.detach() for name, loss in terms.auxiliary_losses.items()},
    )


def _kind(leaf: Any) -> Any:
    """Return what has to be the same for a recording to be replayed."""
    if not isinstance(leaf, Tensor):
        return float if isinstance(leaf, float) else (type(leaf), leaf)  # True is no 1
    if not leaf.is_cuda:
        raise ValueError(f"cuda_graph: model and guide are given a tensor on {leaf.device}, expected a CUDA device")
    if leaf.requires_grad:
        raise ValueError("cuda_graph: model and guide are given a tensor with a gradient, expected data")
    return leaf.shape, leaf.dtype, leaf.device


def _place(leaf: Any, device: torch.device) -> Any:
    """Return a place of its own in the device's memory for what changes from step to step."""
    if isinstance(leaf, Tensor):
        return leaf.clone()
    wide = torch.promote_types(torch.get_default_dtype(), torch.float32)  # in half precision, 0.999 is 1
    return torch.tensor(leaf, device=device, dtype=wide) if isinstance(leaf, float) else leaf
