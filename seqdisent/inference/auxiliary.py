"""Losses beside the bound: contrast, consistency, a prediction of what the frames show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from seqdisent.inference.interventions import Inferred

AuxiliaryLosses = Mapping[str, Callable[..., Tensor]]


def auxiliary_losses(
    functions: AuxiliaryLosses,
    drawn: Mapping[str, Inferred],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    shape: torch.Size,
    num_particles: int | None,
) -> dict[str, Tensor]:
    """Call each function with what the guide drew and the programs' arguments; return its values a sequence.

    Args:
        functions: {name: function}.
        drawn: {latent site: the guide's distribution, and what was drawn from it}.
        args: of model and guide.
        kwargs: likewise.
        shape: of the bound, (B,) or ().
        num_particles: K, or None where it has no particle dimension.

    Raises:
        ValueError: a function that returns another shape.
    """
    shapes = [shape] if num_particles is None else [torch.Size([num_particles, *shape]), shape]
    found = {}
    for name, function in functions.items():
        with poutine.block():  # what it draws is no site of the programs
            value = function(drawn, *args, **kwargs)
        if not isinstance(value, Tensor) or value.shape not in shapes:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            wanted = " or ".join(str(tuple(one)) for one in shapes)
            raise ValueError(
                f"auxiliary_losses[{name!r}]: returned {got}, expected {wanted}, a value for each sequence"
            )
        found[name] = value.expand(shapes[0])
    return found


def check_auxiliary_losses(functions: AuxiliaryLosses | None, objective: Any) -> AuxiliaryLosses:
    """Return {name: function}, empty for None.

    Raises:
        TypeError: one that cannot be called.
        ValueError: with ``"fivo"``, whose particles come from several runs.
    """
    functions = functions or {}
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(
                f"auxiliary_losses[{name!r}]: got {type(function).__name__}, expected a function of what the guide "
                "drew and of what model and guide are given"
            )
    if functions and objective == "fivo":
        raise ValueError(
            f'auxiliary_losses: got {sorted(functions)} with objective="fivo", whose particles are resampled between '
            "steps, expected another objective"
        )
    return functions
