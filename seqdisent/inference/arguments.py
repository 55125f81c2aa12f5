"""What a call is given: sequences, their mask and further inputs, and the inputs of steps to come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqdisent.masks import check_mask, expand_observed

_OF_A_BATCH = "; of a Batch, seqdisent.training.frames_and_mask(batch)"
_AFTER_FRAMES = ("mask", "observed", "covariates")  # by position, as a batch has them


class Given(NamedTuple):
    """Sequences as programs take them.

    Attributes:
        args: frames, and the mask if one was given: the guide's positional arguments.
        frames: (B, T, ...).
        mask: (B, T), or None for no padding.
        inputs: the programs' arguments by name.
    """

    args: tuple[Any, ...]
    frames: Tensor
    mask: Tensor | None
    inputs: dict[str, Any]


def _by_name(name: str, given: Sequence[Any], inputs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return frames and mask as positional arguments, and the others by name: `observed`, `covariates`, the inputs.

    What is None is left out, so that programs need not have an argument for it.
    """
    if len(given) > 1 + len(_AFTER_FRAMES):
        raise TypeError(
            f"{name}: got {len(given)} arguments, expected at most four, (frames, mask, observed, covariates)"
            + _OF_A_BATCH
        )
    named = {key: value for key, value in zip(_AFTER_FRAMES, given[1:], strict=False) if value is not None}
    if both := [key for key in named if inputs.get(key) is not None]:
        raise TypeError(f"{both[0]}: got one by position and one by name, expected one of them")
    inputs = {key: value for key, value in inputs.items() if key not in _AFTER_FRAMES or value is not None} | named
    mask = inputs.pop("mask", None)
    return (*given[:1], mask) if mask is not None or len(given) > 1 else tuple(given), inputs


def taken_apart(name: str, given: Any, inputs: Mapping[str, Any]) -> Given:
    """Return sequences that are frames, or (frames, mask, observed, covariates) up to any of these, and check them."""
    args = (given,) if isinstance(given, Tensor) else given
    if not isinstance(args, tuple | list) or not args:
        raise TypeError(f"{name}: got {type(given).__name__}, expected frames or (frames, mask)")
    if not isinstance(args[0], Tensor):
        raise TypeError(
            f"{name}: got {type(args[0]).__name__}, expected frames (B, T, ...), and a mask (B, T) after them where "
            f"they are ragged{_OF_A_BATCH}"
        )
    args, inputs = _by_name(name, args, inputs)
    frames, mask, observed = args[0], args[1] if len(args) > 1 else None, inputs.get("observed")
    if frames.ndim < 2 or 0 in frames.shape[:2]:
        raise ValueError(
            f"{name}: frames have shape {tuple(frames.shape)}, expected (B, T, ...) with at least one frame"
        )
    if mask is not None:
        mask = check_mask(mask, frames.shape[:1], frames.shape[1])
    seen = frames
    if observed is not None:
        observed = expand_observed(observed, frames.shape[:2], frames.shape[2:], frames.device)
        observed = observed.reshape(observed.shape + (1,) * (frames.ndim - observed.ndim))
        seen = torch.where(observed, frames, 0.0)
    if not torch.isfinite(seen if mask is None else seen[mask]).all():
        hint = "; what was not measured is for `observed` to say" if observed is None else " where `observed` is True"
        raise ValueError(f"{name}: frames have real steps that are not finite, expected numbers{hint}")
    return Given(args, frames, mask, inputs)


def continued(given: Given, future: Mapping[str, Tensor] | None, num_steps: int) -> dict[str, Tensor]:
    """Return {input: its values over T + num_steps steps} for each input that `future` continues.

    The future of a row comes right after its own last step. Steps behind it repeat the last one.
    """
    if future is not None and not isinstance(future, Mapping):
        raise TypeError(
            f"future: got {type(future).__name__}, expected {{name: (B, num_steps, ...)}} of inputs by step"
        )
    future = future or {}
    if given.inputs.get("covariates") is not None and "covariates" not in future:
        raise ValueError(
            "future: got no 'covariates', expected those of the steps to come, (B, num_steps, X), or None if model and "
            "guide read those given as they are"
        )
    return {name: _continued(name, given, values, num_steps) for name, values in future.items() if values is not None}


def _continued(name: str, given: Given, future: Any, num_steps: int) -> Tensor:
    past, (num_sequences, length) = given.inputs.get(name), given.frames.shape[:2]
    if not isinstance(past, Tensor):
        known = sorted(key for key, value in given.inputs.items() if isinstance(value, Tensor))
        raise ValueError(f"future: got {name!r}, expected some of {known}, the inputs of the steps before")
    if past.shape[:2] != (num_sequences, length):
        raise ValueError(
            f"{name}: has shape {tuple(past.shape)}, expected ({num_sequences}, {length}, ...), a value for each of "
            "the steps that `future` continues"
        )
    if not isinstance(future, Tensor):
        raise TypeError(f"future: {name!r} is {type(future).__name__}, expected a tensor")
    wanted = (num_sequences, num_steps, *past.shape[2:])
    if future.shape != wanted:
        raise ValueError(f"future: {name!r} has shape {tuple(future.shape)}, expected {wanted}")
    if (future.dtype, future.device) != (past.dtype, past.device):
        raise ValueError(
            f"future: {name!r} is {future.dtype} on {future.device}, expected {past.dtype} on {past.device}, as before"
        )
    whole = torch.cat([past, future], 1)
    if given.mask is None:
        return whole
    steps, own = torch.arange(length + num_steps, device=whole.device), given.mask.sum(1, keepdim=True)
    places = torch.where(steps < own, steps, length + (steps - own).clamp(max=num_steps - 1))
    return whole[torch.arange(num_sequences, device=whole.device).unsqueeze(-1), places]
