"""Errors against true sequences; of swapped clips, where the data set has a renderer. No judge is involved."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from seqdisent._checks import check_positive
from seqdisent.heads import full_precision
from seqdisent.masks import expand_observed
from seqdisent.metrics._predictions import as_tensor

_PIXELS_AT_ONCE = 2048  # pixels per clip that nearest_clip converts to float64 at once


def pick_donors(identity: Tensor, motion: Tensor | None = None, *, seed: int) -> Tensor:
    """Choose a donor for every clip: of another identity and, if there is one, of another motion.

    Args:
        identity: label of the identity of each clip; a tensor, array or list.
        motion: label of the motion of each clip; None if unknown.
        seed: seed of the random choice.

    Shape:
        - identity, motion: (N,)
        - output: (N,) positions

    Raises:
        TypeError: labels that are not numbers.
        ValueError: all clips have the same identity, or labels of another shape or with NaN.

    Example:
        >>> pick_donors(torch.tensor([0, 0, 1]), seed=0)
        tensor([2, 2, 1])
    """
    identity = as_tensor("identity", identity)
    if identity.ndim != 1 or bool(identity.isnan().any()):
        raise ValueError(f"identity: has shape {tuple(identity.shape)} or NaN, expected one label for each clip, (N,)")
    allowed = identity[:, None] != identity[None, :]
    if not allowed.any(1).all():
        raise ValueError("identity: all clips show the same one, expected at least two")
    if motion is not None:
        motion = as_tensor("motion", motion).to(identity.device)
        if motion.shape != identity.shape or bool(motion.isnan().any()):
            raise ValueError(
                f"motion: has shape {tuple(motion.shape)} or NaN, expected {tuple(identity.shape)}, that of identity"
            )
        differs = allowed & (motion[:, None] != motion[None, :])
        allowed = torch.where(differs.any(1, keepdim=True), differs, allowed)
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(allowed.shape, generator=generator)
    return keys.masked_fill(~allowed.cpu(), -1.0).argmax(1).to(identity.device)


def squared_error(
    predicted: Tensor,
    truth: Tensor,
    mask: Tensor | None = None,
    observed: Tensor | None = None,
    *,
    are_pixels: bool = True,
) -> Tensor:
    r"""Return the mean squared error of each sequence, over what is real and was observed.

    Args:
        predicted: pixels, uint8 or floating point in [0, 1], of which a mean up to 0.5 outside is accepted, as a
            Gaussian may have; or measurements, floating point.
        truth: the true sequences, uint8 or floating point in [0, 1], or measurements.
        mask: True where a step is real; None if all are.
        observed: True where measured, by step or by value; None if everything was. What stands in holes has no effect.
        are_pixels: whether values are checked to be pixels. False for measurements, which may have any unit.

    Shape:
        - predicted, truth: (N, T, \*E), (C, H, W) for pictures
        - mask: (N, T) bool
        - observed: (N, T) or (N, T, \*E) bool
        - output: (N,)

    Returns:
        Errors in the square of the unit of the values; of bytes, in pixels in [0, 1].

    Raises:
        TypeError: values that are neither uint8 nor floating point, or measurements that are not floating point;
            `observed` that is not bool.
        ValueError: shapes that differ, pixels outside [0, 1], true measurements that are not finite, a sequence without
            a real step, or one in which nothing real was observed.

    Example:
        >>> squared_error(torch.full((1, 2, 1, 1, 1), 0.5), torch.zeros(1, 2, 1, 1, 1))
        tensor([0.2500])
        >>> truth = torch.tensor([[[10.0], [torch.nan]]])
        >>> squared_error(torch.full((1, 2, 1), 13.0), truth, observed=~truth.isnan(), are_pixels=False)
        tensor([9.])
    """
    predicted, truth = as_tensor("predicted", predicted), as_tensor("truth", truth)
    if predicted.shape != truth.shape:
        raise ValueError(f"truth: has shape {tuple(truth.shape)}, expected that of predicted, {tuple(predicted.shape)}")
    known = None if mask is None else _frame_mask(mask, predicted)
    if observed is not None:
        known = _known(observed, known, predicted)
    if are_pixels:
        difference = pixels("predicted", predicted, known) - pixels("truth", truth, known, true=True)
    else:
        difference = _measurements("predicted", predicted) - _measurements("truth", truth, known, true=True)
    difference = (difference.unsqueeze(-1) if difference.ndim == 2 else difference).flatten(2)
    if known is None:
        return difference.square().mean((1, 2))
    # before the square, so that what stands in padding and in holes does not affect the gradient
    if known.ndim == 2:
        difference = torch.where(known.unsqueeze(-1), difference, 0.0)
        return difference.square().mean(-1).sum(-1) / known.sum(-1)
    known = known.flatten(2)
    return torch.where(known, difference, 0.0).square().sum((1, 2)) / known.sum((1, 2))


def _known(observed: Tensor, mask: Tensor | None, values: Tensor) -> Tensor:
    """Return which steps (N, T), or which values of these, are real and were observed."""
    known = expand_observed(observed, values.shape[:2], values.shape[2:], values.device)
    if mask is not None:
        known = known & mask.reshape(mask.shape + (1,) * (known.ndim - 2))
    if not known.flatten(1).any(1).all():
        raise ValueError("observed: has a row in which nothing real was measured, expected something in each")
    return known


def _measurements(argument: str, values: Tensor, known: Tensor | None = None, *, true: bool = False) -> Tensor:
    if not values.is_floating_point():
        raise TypeError(f"{argument}: has dtype {values.dtype}, expected floating-point measurements")
    if true and not (values if known is None else values[known]).isfinite().all():
        raise ValueError(f"{argument}: has measurements that are not finite, expected numbers where they are compared")
    return full_precision(values)


def _frame_mask(mask: Tensor, predicted: Tensor) -> Tensor:
    mask = as_tensor("mask", mask).to(predicted.device)
    if mask.shape != predicted.shape[:2] or mask.dtype != torch.bool or not mask.any(-1).all():
        raise ValueError(
            f"mask: has shape {tuple(mask.shape)} and dtype {mask.dtype}, expected bool {tuple(predicted.shape[:2])} "
            "with at least one real frame in each row"
        )
    return mask


def nearest_clip(
    predicted: Tensor, candidates: Tensor, mask: Tensor | None = None, *, batch_size: int = 1024
) -> Tensor:
    """Return the position of the candidate with the smallest squared error, for each predicted clip.

    Args:
        predicted: uint8, or floating point in [0, 1]; a mean up to 0.5 outside is accepted, as a Gaussian may have.
        candidates: all true clips, uint8 or floating point in [0, 1].
        mask: True where a frame of a predicted clip is real; only these are compared. None if all are real.
        batch_size: number of predicted clips, and of candidates, that are compared at once.

    Shape:
        - predicted: (N, T, C, H, W)
        - candidates: (M, T, C, H, W)
        - mask: (N, T) bool
        - output: (N,)

    Returns:
        Positions in `candidates`; of equally near candidates, the first. Squared errors are computed in float64 for
        every dtype. They are exact if both sides are uint8.

    Raises:
        TypeError: clips that are neither uint8 nor floating point.
        ValueError: clips or a mask of another shape, no candidate, or pixels outside [0, 1] or not finite.

    Example:
        >>> candidates = torch.eye(3).reshape(3, 1, 1, 1, 3)
        >>> nearest_clip(candidates * 0.8, candidates)
        tensor([0, 1, 2])
    """
    predicted, candidates = as_tensor("predicted", predicted).detach(), as_tensor("candidates", candidates).detach()
    if predicted.shape[1:] != candidates.shape[1:]:
        raise ValueError(
            f"candidates: have shape {tuple(candidates.shape[1:])} each, expected {tuple(predicted.shape[1:])}"
        )
    if len(candidates) == 0:
        raise ValueError("candidates: is empty, expected at least one clip")
    check_positive(batch_size=batch_size)
    mask = predicted.new_ones(predicted.shape[:2], dtype=torch.bool) if mask is None else _frame_mask(mask, predicted)
    check_pixels("predicted", predicted, mask)
    check_pixels("candidates", candidates, true=True)
    all_bytes = predicted.dtype == candidates.dtype == torch.uint8

    def shares(bytes_or_shares: Tensor) -> Tensor:
        values = bytes_or_shares.to(predicted.device, torch.float64)
        return values if all_bytes or bytes_or_shares.dtype != torch.uint8 else values / 255

    predicted, candidates = predicted.flatten(2), candidates.flatten(2)
    nearest = []
    for some, real in zip(predicted.split(batch_size), mask.split(batch_size), strict=True):
        error = torch.zeros(len(some), len(candidates), dtype=torch.float64, device=predicted.device)
        for step, first in product(range(some.shape[1]), range(0, some.shape[2], _PIXELS_AT_ONCE)):
            part = slice(first, first + _PIXELS_AT_ONCE)
            origin = shares(candidates[:1, step, part])  # the common background then costs no digits
            rows = torch.where(real[:, step, None], shares(some[:, step, part]) - origin, 0.0)
            for start in range(0, len(candidates), batch_size):
                columns = shares(candidates[start : start + batch_size, step, part]) - origin
                # |p - c|^2 without |p|^2, which is the same for all candidates
                squares = real[:, step, None] * torch.linalg.vecdot(columns, columns)
                error[:, start : start + batch_size] += squares.addmm_(rows, columns.T, alpha=-2)
        if not bool(error.isfinite().all()):
            raise ValueError("predicted: has clips with NaN or infinite pixels, to which no candidate is nearest")
        nearest.append(error.argmin(1))
    return torch.cat(nearest)


def pixels(argument: str, frames: Tensor, mask: Tensor | None = None, *, true: bool = False) -> Tensor:
    """Check frames and return them in float32 or float64, with bytes divided by 255."""
    check_pixels(argument, frames, mask, true=true)
    return frames.float() / 255 if frames.dtype == torch.uint8 else full_precision(frames)


def check_pixels(argument: str, frames: Tensor, mask: Tensor | None = None, *, true: bool = False) -> None:
    """Check that frames are uint8, or floating point in [0, 1] approximately.

    Raises:
        TypeError: another dtype.
        ValueError: a mean more than 0.5 outside [0, 1]; with `true`, any value that is, or NaN. Single pixels of
            predicted frames may have any value, since a forecast may diverge.
    """
    if frames.dtype == torch.uint8:
        return
    if not frames.is_floating_point():
        raise TypeError(f"{argument}: has dtype {frames.dtype}, expected uint8, or floating point in [0, 1]")
    real = (frames if mask is None else frames[mask]).detach()
    if real.numel():
        low, high = map(float, real.aminmax() if true else (full_precision(real).mean(),) * 2)
        if low < -0.5 or high > 1.5 or (true and math.isnan(low)):
            what = f"from {low:g} to {high:g}" if true else f"of mean {low:g}"
            raise ValueError(f"{argument}: has values {what}, expected pixels in [0, 1], or uint8")
