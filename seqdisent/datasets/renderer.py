"""What a data set knows of the truth."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Renderer(Protocol):
    """Knows the true frames of any identity doing any motion.

    It is called with rows of the data set as it was made (`Clips.source`), so it outlives `Clips.subset`. Make it a
    class at module level: clips are pickled when they go to another process.

    Example:
        The identity is a grey level, the motion a speed at which it darkens.

        >>> import torch
        >>> from seqdisent.datasets import Clips
        >>> level, speed = torch.tensor([200, 100]), torch.tensor([1, 10])
        >>> def render(content, motion, num_steps):
        ...     steps = torch.arange(3 if num_steps is None else num_steps)
        ...     light = (level[content, None] - speed[motion, None] * steps).clamp(0, 255)
        ...     return light.to(torch.uint8)[..., None, None, None]
        >>> rows = torch.arange(2)
        >>> clips = Clips(render(rows, rows, None), renderer=render)
        >>> clips.true_swap(content=0, motion=1).flatten().tolist()
        [200, 190, 180]
    """

    def __call__(self, content: Tensor, motion: Tensor, num_steps: int | None) -> Tensor:
        r"""The identity of rows `content` (M,) doing what rows `motion` (M,) do.

        Returns:
            uint8 (M, num_steps, \*E); None stands for as many steps as a clip has.
        """
        ...
