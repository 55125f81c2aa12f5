"""Swapped clips against the truth, where the data has a renderer: no judge, and nothing to game."""

from __future__ import annotations

import torch
from torch import Tensor

from seqdisent.metrics._predictions import as_tensor


def pick_donors(identity: Tensor, motion: Tensor | None = None, *, seed: int) -> Tensor:
    """Pair every clip with a fixed donor of another identity, and of another motion where there is one.

    Arrays and lists of numbers are taken as tensors are.

    Args:
        identity: who each clip shows.
        motion: what it shows, as one number each; None if unknown.
        seed: decides which donor.

    Shape:
        - identity, motion: (N,)
        - output: (N,) positions

    Raises:
        TypeError: labels that are no numbers.
        ValueError: a clip has no donor since all show the same identity.

    Example:
        >>> pick_donors(torch.tensor([0, 0, 1]), seed=0)
        tensor([2, 2, 1])
    """
    identity = as_tensor("identity", identity)
    allowed = identity[:, None] != identity[None, :]
    if not allowed.any(1).all():
        raise ValueError("identity: all clips show the same one, expected at least two")
    if motion is not None:
        motion = as_tensor("motion", motion)
        differs = allowed & (motion[:, None] != motion[None, :])
        allowed = torch.where(differs.any(1, keepdim=True), differs, allowed)
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(allowed.shape, generator=generator)
    return keys.masked_fill(~allowed.cpu(), -1.0).argmax(1).to(identity.device)


def squared_error(predicted: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return each clip's mean squared error of pixels in [0, 1], over its real frames.

    Args:
        predicted: uint8, or floating point in [0, 1]; up to 0.5 beyond, since the mean of a Gaussian may be.
        truth: the same.
        mask: which frames are real; None for all.

    Shape:
        - predicted, truth: (N, T, C, H, W)
        - mask: (N, T) bool
        - output: (N,)

    Raises:
        TypeError: frames that are neither uint8 nor floating point.
        ValueError: shapes that differ, pixels of another range, or a clip without a real frame.

    Example:
        >>> squared_error(torch.full((1, 2, 1, 1, 1), 0.5), torch.zeros(1, 2, 1, 1, 1))
        tensor([0.2500])
    """
    predicted, truth = as_tensor("predicted", predicted), as_tensor("truth", truth)
    if predicted.shape != truth.shape:
        raise ValueError(f"truth: has shape {tuple(truth.shape)}, expected that of predicted, {tuple(predicted.shape)}")
    if mask is not None:
        mask = as_tensor("mask", mask)
        if mask.shape != predicted.shape[:2] or mask.dtype != torch.bool or not mask.any(-1).all():
            raise ValueError(
                f"mask: has shape {tuple(mask.shape)} and dtype {mask.dtype}, expected bool "
                f"{tuple(predicted.shape[:2])} with at least one real frame in each row"
            )
    error = (
        (pixels("predicted", predicted, mask) - pixels("truth", truth, mask, true=True)).square().flatten(2).mean(-1)
    )
    if mask is None:
        return error.mean(-1)
    return torch.where(mask, error, 0.0).sum(-1) / mask.sum(-1)


def nearest_clip(predicted: Tensor, candidates: Tensor, *, batch_size: int = 256) -> Tensor:
    """Return, for each predicted clip, the position of the candidate with the smallest squared error.

    Args:
        predicted: uint8, or floating point in [0, 1]; up to 0.5 beyond, since the mean of a Gaussian may be.
        candidates: every true clip there is, the same.
        batch_size: candidates compared at once.

    Shape:
        - predicted: (N, T, C, H, W)
        - candidates: (M, T, C, H, W)
        - output: (N,)

    Raises:
        TypeError: clips that are neither uint8 nor floating point.
        ValueError: clips of another shape, or pixels of another range.

    Example:
        >>> candidates = torch.eye(3).reshape(3, 1, 1, 1, 3)
        >>> nearest_clip(candidates * 0.8, candidates)
        tensor([0, 1, 2])
    """
    predicted, candidates = as_tensor("predicted", predicted), as_tensor("candidates", candidates)
    if predicted.shape[1:] != candidates.shape[1:]:
        raise ValueError(
            f"candidates: have shape {tuple(candidates.shape[1:])} each, expected {tuple(predicted.shape[1:])}"
        )
    flat = pixels("predicted", predicted).flatten(1)
    distances = []
    for chunk in candidates.split(batch_size):
        chunk = pixels("candidates", chunk, true=True).to(flat).flatten(1)
        distances.append(chunk.square().sum(1) - 2 * flat @ chunk.T)
    return torch.cat(distances, 1).argmin(1)


def pixels(argument: str, frames: Tensor, mask: Tensor | None = None, *, true: bool = False) -> Tensor:
    """Return frames in floating point, bytes as shares of 255.

    Raises:
        TypeError: another dtype.
        ValueError: a mean further than 0.5 from [0, 1], or in `true` frames any value that is, such as pixels in 0 to
            255. Of predicted ones a few pixels may be anywhere: a forecast that diverges is a result.
    """
    if frames.dtype == torch.uint8:
        return frames.float() / 255
    if not frames.is_floating_point():
        raise TypeError(f"{argument}: has dtype {frames.dtype}, expected uint8, or floating point in [0, 1]")
    real = (frames if mask is None else frames[mask]).detach()
    if real.numel():
        low, high = map(float, real.aminmax() if true else (real.mean(),) * 2)
        if low < -0.5 or high > 1.5:
            what = f"from {low:g} to {high:g}" if true else f"of mean {low:g}"
            raise ValueError(f"{argument}: has values {what}, expected pixels in [0, 1], or uint8")
    return frames
