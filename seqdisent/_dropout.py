"""Which modules that a function may call would drop units at random."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator

from torch import nn


def modules_that_drop_out(function: object) -> list[nn.Module]:
    """Return those that `function` can reach and that are in training mode; it need not call them."""
    return [module for module in _modules_of(function) if module.training and _drops_out(module)]


def _drops_out(module: nn.Module) -> bool:
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
        names = inspect.getclosurevars(function)
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        for value in (*names.nonlocals.values(), *names.globals.values(), *defaults):
            if isinstance(value, nn.Module):
                yield from value.modules()
