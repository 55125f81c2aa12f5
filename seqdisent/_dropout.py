"""Which modules that a function may call would drop units at random."""

from __future__ import annotations

import ctypes
import functools
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

_Result = TypeVar("_Result")


def modules_that_drop_out(function: object) -> list[nn.Module]:
    """Return those that `function` can reach at a glance and that are in training mode; it need not call them."""
    return [module for module in _modules_of(function) if _drops_out(module)]


def call_and_watch(call: Callable[[], _Result], device: torch.device) -> tuple[_Result, str | None]:
    """Return what `call` gives, and the type of a module that dropped units meanwhile, wherever it is hidden, or None.

    A call that takes random numbers is made again with a hook on all modules, and no other: the hook is seen by all
    threads, and a compiled module warns of it. Not found are a function's own dropout, what a compiled function hides,
    and a recurrent network of cuDNN, which takes random numbers at its first call alone.
    """
    before = _random_state(device)
    result = call()
    if before == _random_state(device):
        return result, None
    called: list[str] = []
    thread = threading.get_ident()

    def note(module: nn.Module, _: object) -> None:
        if threading.get_ident() == thread:
            parts = module.modules() if hasattr(module, "_orig_mod") else (module,)  # compiled: no hooks inside
            called.extend(type(part).__name__ for part in parts if _drops_out(part))

    handle = register_module_forward_pre_hook(note)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    finally:
        handle.remove()
    return result, called[0] if called else None


def _random_state(device: torch.device) -> bytes | None:
    """Return the state of the generator of `device`, without waiting for it; None where it cannot be told."""
    if device.type == "cpu":
        state = torch.get_rng_state()
    elif device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        state = torch.cuda.get_rng_state(device)
    else:
        return None
    # as bytes: to compare tensors is an operation, which a mode that counts or fakes operations sees
    return ctypes.string_at(state.data_ptr(), state.nbytes)


def _drops_out(module: nn.Module) -> bool:
    if not module.training:
        return False
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return module.dropout > 0
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


def _modules_of(function: object) -> Iterator[nn.Module]:
    """Find the modules a function can reach: itself, what it is bound to, its arguments, closure and globals."""
    if isinstance(function, nn.Module):
        yield from function.modules()
    elif isinstance(function, functools.partial):
        for part in (function.func, *function.args, *function.keywords.values()):
            yield from _modules_of(part)
    elif isinstance(function, types.MethodType):
        yield from _modules_of(function.__self__)
        yield from _modules_of(function.__func__)
    elif isinstance(function, types.FunctionType):
        for value in _values_in_reach(function):
            if isinstance(value, nn.Module):
                yield from value.modules()


def _values_in_reach(function: types.FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a local that is defined later
            continue
    yield from (function.__globals__.get(name) for name in function.__code__.co_names)
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
