"""What every data set hands to a model."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Sequences as a model takes them; a named tuple, so that Lightning moves it to devices by itself."""

    frames: Tensor
    r"""(B, T, \*E) floating point, zero in padding and in holes; float32 in [0, 1] if they come from bytes. E is
    (C, H, W) for pictures, (88,) for piano rolls, (X,) for measurements."""
    mask: Tensor
    """(B, T) bool, True where a step is real; padding on the right."""
    identity: Tensor
    """(B,) int64."""
    labels: dict[str, Tensor]
    """Ground-truth factors, each (B,) int64; for evaluation only."""
    positions: Tensor
    """(B, T) int64, where each step stands in `Sequences.values.flatten(0, 1)`: what was computed for it once is
    found."""
    ragged: bool
    """Whether `mask` has padding; known without reading the mask, which may be on an accelerator."""
    observed: Tensor | None = None
    r"""(B, T) bool, or (B, T, \*E) where a step may be measured in part: True where measured, False in padding. None if
    the data set has no holes."""
    covariates: Tensor | None = None
    """(B, T, X) known inputs; padding repeats a row's last real step. None if the data set has none."""
    step_labels: dict[str, Tensor] | None = None
    """Labels of each step, each (B, T) int64, zero in padding. None if the data set has none."""

    @property
    def values(self) -> Tensor:
        r"""(B, T, \*E), the same tensor as `frames`."""
        return self.frames


def frames_and_mask(batch: Any) -> tuple[Tensor | None, ...]:
    """Return what model and guide take from a batch of sequences, by position.

    Args:
        batch: a :class:`~seqdisent.datasets.Batch`, or an object with its `frames` and `mask`; if it has no `ragged`,
            the mask is read, which waits for the device.

    Returns:
        The start of ``(frames, mask, observed, covariates)``, as long as there is something to give: ``(frames,)`` for
        whole clips, ``(frames, mask)`` if there is padding. What is missing in between is None, such as the mask in
        ``(frames, None, observed)``.

    Raises:
        TypeError: `batch` is something else.

    Example:
        >>> from seqdisent.datasets import pendulum
        >>> batch = pendulum(2, seed=0, num_steps=4, image_size=8).batch([0, 1])
        >>> (frames,) = frames_and_mask(batch)
        >>> frames is batch.frames
        True
    """
    if not (hasattr(batch, "frames") and hasattr(batch, "mask")):
        raise TypeError(
            f"draw: the batch is a {type(batch).__name__}, expected clips with `frames` and `mask`; "
            "what model and guide take from anything else is for `arguments` to say"
        )
    ragged = batch.ragged if hasattr(batch, "ragged") else not batch.mask.all()
    given = [batch.frames, batch.mask if ragged else None]
    given += [getattr(batch, "observed", None), getattr(batch, "covariates", None)]
    while given[-1] is None:
        given.pop()
    return tuple(given)
