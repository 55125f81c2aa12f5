"""What every data set hands to a model."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Clips as a model takes them; a named tuple, so that Lightning moves it to devices by itself."""

    frames: Tensor
    r"""(B, T, \*E) float32 in [0, 1], zero where padding; E is (C, H, W) for pictures, (88,) for piano rolls."""
    mask: Tensor
    """(B, T) bool, True where a frame is real; padding on the right."""
    identity: Tensor
    """(B,) int64."""
    labels: dict[str, Tensor]
    """Ground-truth factors, each (B,) int64; for evaluation only."""
    positions: Tensor
    """(B, T) int64, where each frame stands in `Clips.frames.flatten(0, 1)`: what was computed for it once is found."""
    ragged: bool
    """Whether `mask` has padding; known without reading the mask, which may be on an accelerator."""


def frames_and_mask(batch: Any) -> tuple[Tensor, ...]:
    """Return what model and guide take from a batch of clips; the mask only if there is padding.

    Args:
        batch: a :class:`~seqdisent.datasets.Batch`, or an object with its `frames` and `mask`; if it has no `ragged`,
            the mask is read, which waits for the device.

    Returns:
        ``(frames,)`` or ``(frames, mask)``.

    Raises:
        TypeError: `batch` is something else.

    Example:
        >>> from seqdisent.datasets import pendulum
        >>> [part.shape for part in frames_and_mask(pendulum(2, seed=0, num_steps=4, image_size=8).batch([0, 1]))]
        [torch.Size([2, 4, 3, 8, 8])]
    """
    if not (hasattr(batch, "frames") and hasattr(batch, "mask")):
        raise TypeError(
            f"draw: the batch is a {type(batch).__name__}, expected clips with `frames` and `mask`; "
            "what model and guide take from anything else is for `arguments` to say"
        )
    ragged = batch.ragged if hasattr(batch, "ragged") else not batch.mask.all()
    return (batch.frames, batch.mask) if ragged else (batch.frames,)
