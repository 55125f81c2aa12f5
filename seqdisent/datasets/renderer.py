"""What a data set knows of the truth."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Renderer(Protocol):
    """Knows the true frames of any identity doing any motion.

    It is called with rows of the data set as it was made (`Clips.source`), so it outlives `Clips.subset`. Make it a
    class at module level: clips are pickled when they go to another process.
    """

    def __call__(self, content: Tensor, motion: Tensor, num_steps: int | None) -> Tensor:
        r"""The identity of rows `content` (M,) doing what rows `motion` (M,) do, uint8 (M, num_steps, \*E)."""
        ...
