"""What every data set hands to a model."""

from __future__ import annotations

from typing import NamedTuple

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
