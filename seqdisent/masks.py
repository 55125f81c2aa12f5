"""Masks of ragged batches, and what was observed of their steps.

A mask is bool (B, T), True where a step is real, with padding on the right. `observed` says what was measured: bool
(B, T), or (B, T, *E) where a step may be measured in part. What stands in padding or in a hole, NaN or anything else,
reaches no value and no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqdisent._checks import check_positive, expand_to, reads_at_once


def check_mask(mask: Tensor, batch_shape: torch.Size, num_steps: int, device: torch.device | None = None) -> Tensor:
    """Return `mask` expanded to (*batch_shape, num_steps), or say what is wrong with it.

    Its values are looked at only where that waits for no device.

    Raises:
        TypeError: the mask is no tensor of bool.
        ValueError: wrong shape, a hole (padding must be on the right), a row without a real step, or another device.
    """
    _check_bool(mask)
    if mask.ndim < 1 or mask.shape[-1] != num_steps:
        raise ValueError(f"mask: has shape {tuple(mask.shape)}, expected (*B, T) with T={num_steps} steps")
    if device is not None and mask.device != device:
        raise ValueError(f"mask: is on {mask.device}, expected {device}, where the values are that it is the mask of")
    if reads_at_once(mask):
        check_mask_values(mask)
    return expand_to("mask", mask, (*batch_shape, num_steps))


def check_mask_values(mask: Tensor) -> None:
    """Raise ValueError if a row of a mask (*B, T) has no real step, or a hole."""
    if not mask[..., 0].all():
        raise ValueError("mask: a row has no real first step; every sequence needs at least one, padding on the right")
    if (mask[..., 1:] & ~mask[..., :-1]).any():
        raise ValueError("mask: a row has a hole; real steps come first, padding on the right")


def fill_padding(values: Tensor, mask: Tensor, *, event_dims: int = 1) -> Tensor:
    r"""Return `values` with the first step of each row wherever `mask` is False: for what comes into a program.

    To leave padding out of the likelihood is not enough, since the gradient of what is left out may be 0 * NaN. A real
    step of the same row is in the domain of whatever reads it (a logarithm, a division by a time step), and 0 may not
    be. No gradient flows into the first step from there.

    Args:
        values: (\*S, \*B, T, \*E).
        mask: (\*B, T) bool, True where a step is real.
        event_dims: dimensions to the right of time: 1 for vectors, 3 for pictures, 0 for one number a step.

    Returns:
        A tensor of the same shape.

    Raises:
        TypeError: the mask is no tensor of bool.
        ValueError: a mask that does not fit the values. A hole is not looked for, since that would wait for the device.

    Example:
        >>> fill_padding(torch.tensor([[3.0, torch.nan]]), torch.tensor([[True, False]]), event_dims=0)
        tensor([[3., 3.]])
    """
    _check_fits(values, mask, event_dims)
    first = values.narrow(values.ndim - event_dims - 1, 0, 1).detach()
    return torch.where(mask.reshape(mask.shape + (1,) * event_dims), values, first)


def overwrite_padding(values: Tensor, mask: Tensor, *, event_dims: int = 1) -> Tensor:
    r"""Return `values` with 0 wherever `mask` is False: what is done with terms and features that go out.

    Args:
        values: (\*S, \*B, T, \*E).
        mask: (\*B, T) bool, True where a step is real.
        event_dims: dimensions to the right of time: 1 for vectors, 3 for pictures, 0 for one number a step.

    Returns:
        A tensor of the same shape.

    Raises:
        TypeError: as :func:`fill_padding`.
        ValueError: as there.

    Example:
        >>> overwrite_padding(torch.tensor([[1.0, torch.nan]]), torch.tensor([[True, False]]), event_dims=0)
        tensor([[1., 0.]])
    """
    _check_fits(values, mask, event_dims)
    return torch.where(mask.reshape(mask.shape + (1,) * event_dims), values, values.new_zeros(()))


def steps_after(values: Tensor, mask: Tensor, num_steps: int, *, event_dims: int = 1) -> Tensor:
    r"""Return the steps that follow each row's own last real step: of a forecast of ragged sequences, the future.

    Args:
        values: (\*S, \*B, T', \*E), such as draws of a forecast, where row b with T_b real steps has its future at
            steps T_b ... T_b + num_steps - 1, counted from 0.
        mask: (\*B, T) bool, of what was given.
        num_steps: how many steps.
        event_dims: dimensions to the right of time: 1 for vectors, 3 for pictures, 0 for one number a step.

    Returns:
        (\*S, \*B, num_steps, \*E).

    Raises:
        TypeError: a mask that is not bool.
        ValueError: `num_steps` below 1, a mask of another batch or device, one with a hole or a row without a real
            step, or values that end too early.

    Example:
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> steps_after(torch.arange(8).reshape(2, 4), mask, 2, event_dims=0)
        tensor([[2, 3],
                [5, 6]])
    """
    check_positive(num_steps=num_steps)
    _check_bool(mask)
    time = values.ndim - event_dims - 1
    batch = mask.shape[:-1]
    if mask.ndim < 1 or time < len(batch) or values.shape[time - len(batch) : time] != batch:
        raise ValueError(
            f"mask: has shape {tuple(mask.shape)}, expected the batch of values {tuple(values.shape)} with "
            f"event_dims={event_dims} to the right of time (1 for vectors, 3 for pictures)"
        )
    lengths = check_mask(mask, batch, mask.shape[-1], values.device).sum(-1, keepdim=True)
    if int(lengths.max()) + num_steps > values.shape[time]:
        raise ValueError(
            f"values: have {values.shape[time]} steps, expected at least {int(lengths.max()) + num_steps}, those of "
            f"the longest row and {num_steps} more"
        )
    places = (lengths + torch.arange(num_steps, device=mask.device)).reshape(*batch, num_steps, *(1,) * event_dims)
    return values.gather(time, places.expand(*values.shape[:time], num_steps, *values.shape[time + 1 :]))


def expand_observed(
    observed: Tensor, batch_shape: torch.Size, event_shape: torch.Size, device: torch.device | None = None
) -> Tensor:
    r"""Return `observed` as bool (\*B, T), or (\*B, T, \*E) where it says so of each coordinate.

    Args:
        observed: bool, of one of these shapes; particles on the left of (B, T) may be missing.
        batch_shape: (\*B, T).
        event_shape: E.
        device: where it should be.

    Raises:
        TypeError: no bool tensor.
        ValueError: a shape that is neither, or another device.
    """
    if not isinstance(observed, Tensor) or observed.dtype != torch.bool:
        found = f"dtype {observed.dtype}" if isinstance(observed, Tensor) else type(observed).__name__
        raise TypeError(f"observed: got {found}, expected a bool tensor, True where measured: ~values.isnan(), say")
    if device is not None and observed.device != device:
        raise ValueError(f"observed: is on {observed.device}, expected {device}, where the values are")
    own = min(2, len(batch_shape))  # (B, T), or () of one step: these may not be missing
    by_coordinate = is_by_coordinate(observed, batch_shape, event_shape)
    wanted = batch_shape + event_shape if by_coordinate else batch_shape
    num_own = own + (len(event_shape) if by_coordinate else 0)
    rest, more = observed.shape[: observed.ndim - num_own], wanted[: len(wanted) - num_own]
    fits = observed.ndim >= num_own and observed.shape[-num_own:] == wanted[-num_own:] and len(rest) <= len(more)
    if fits and all(a in (1, b) for a, b in zip(rest[::-1], more[::-1], strict=False)):
        return observed.expand(wanted)
    or_by_coordinate = f" or {tuple(batch_shape + event_shape)}" if event_shape else ""
    raise ValueError(f"observed: has shape {tuple(observed.shape)}, expected {tuple(batch_shape)}{or_by_coordinate}")


def is_by_coordinate(observed: Tensor, batch_shape: torch.Size, event_shape: torch.Size) -> bool:
    r"""Say whether `observed` is (\*B, T, \*E) rather than (\*B, T), by its number of dimensions."""
    num_batch = observed.ndim - len(event_shape)
    return len(event_shape) > 0 and num_batch >= min(2, len(batch_shape)) and observed.shape[num_batch:] == event_shape


def mark_missing(values: Tensor, observed: Tensor | None, mask: Tensor | None = None, *, event_dims: int = 1) -> Tensor:
    r"""Return what a network reads of sequences with holes: 0 in each hole, and beside the values what was observed.

    Args:
        values: (\*B, T, X), or pictures (\*B, T, C, H, W); NaN or any filler where `observed` is False.
        observed: (\*B, T) bool, or of the values' shape, True where measured; None for all values, by coordinate.
        mask: (\*B, T) bool, which steps are real; padding is no observation.
        event_dims: dimensions to the right of time: 1 for vectors, 3 for pictures.

    Returns:
        (\*B, T, X + 1), or (\*B, T, 2 X) if `observed` says so of each coordinate or is None; of pictures, as many more
        channels.

    Raises:
        TypeError: `observed` or `mask` is no tensor of bool.
        ValueError: `observed` or `mask` does not fit the values.

    Example:
        >>> values = torch.tensor([[[3.0, 4.0], [torch.nan, 5.0]]])
        >>> mark_missing(values, ~values.isnan())
        tensor([[[3., 4., 1., 1.],
                 [0., 5., 0., 1.]]])
    """
    if event_dims < 1 or values.ndim <= event_dims:
        raise ValueError(f"values: has shape {tuple(values.shape)}, expected (*B, T) and {max(1, event_dims)} more")
    steps, event_shape = values.shape[: values.ndim - event_dims], values.shape[values.ndim - event_dims :]
    if observed is None:
        observed = torch.ones_like(values, dtype=torch.bool)
    observed = expand_observed(observed, steps, event_shape, values.device)
    if observed.ndim < values.ndim:
        observed = observed.reshape(steps + (1,) * event_dims).expand(*steps, 1, *event_shape[1:])
    if mask is not None:
        mask = check_mask(mask, steps[:-1], steps[-1], values.device)
        observed = observed & mask.reshape(mask.shape + (1,) * event_dims)
    return torch.cat([torch.where(observed, values, values.new_zeros(())), observed.to(values.dtype)], -event_dims)


def observed_steps(observed: Tensor | None, mask: Tensor | None, values: Tensor) -> Tensor | None:
    r"""Return which of the steps of values (\*B, T, X) are real and were observed, (\*B, T); None for all of them."""
    if observed is None:
        return mask
    observed = expand_observed(observed, values.shape[:-1], torch.Size(), values.device)
    return observed if mask is None else observed & mask


def fill_inputs(inputs: Tensor, mask: Tensor) -> Tensor:
    r"""Return inputs (\*B, T, I) of a chain with those of the second step in padding; the first's are never read.

    A row without a second step takes those of another row.
    """
    if inputs.shape[-2] < 2:
        return inputs
    second, has_second = inputs[..., 1, :].detach(), mask[..., 1]
    flat = has_second.flatten()
    another = second.reshape(len(flat), -1).index_select(0, flat.int().argmax().reshape(1)).squeeze(0)
    inside = another.new_full((), 0.5)  # where no later step is real: a value that roots and logarithms take
    another = torch.where(flat.any(), another, inside)
    filler = torch.where(has_second.unsqueeze(-1), second, another)
    return torch.where(mask.unsqueeze(-1), inputs, filler.unsqueeze(-2))


def _check_fits(values: Tensor, mask: Tensor, event_dims: int) -> None:
    _check_bool(mask)
    steps = values.shape[: max(0, values.ndim - event_dims)]
    if mask.ndim > len(steps) or any(m not in (1, s) for m, s in zip(mask.shape[::-1], steps[::-1], strict=False)):
        raise ValueError(
            f"mask: has shape {tuple(mask.shape)}, expected one that fits values {tuple(values.shape)} with "
            f"event_dims={event_dims} to the right of time (1 for vectors, 3 for pictures)"
        )


def _check_bool(mask: Tensor) -> None:
    hint = "True where a step is real; of lengths: torch.arange(T) < lengths[:, None]"
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: got {type(mask).__name__}, expected a bool tensor (*B, T), {hint}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: has dtype {mask.dtype}, expected torch.bool ({hint})")
