"""Clips in memory: sequences that are held as bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from seqdisent.datasets._batches import Indices
from seqdisent.datasets._checks import check_count, check_frames
from seqdisent.datasets.batch import Batch
from seqdisent.datasets.renderer import Renderer
from seqdisent.datasets.sequences import Sequences


class Clips(Sequences):
    r"""A data set of clips, held as bytes; batches are float and in [0, 1].

    Every draw depends on the generator it is given and on nothing else. Treat the attributes as read-only.

    Args:
        frames: The clips, uint8, padded on the right; what the padding holds does not matter. A frame, or step, has
            any shape E: (C, H, W) for pictures, (88,) for piano rolls.
        scale: The byte that stands for 1.0 in a batch: 255 for pictures, 1 for what is there or not, such as a note.
        lengths: Real frames of each clip, 1 to T; by default all of them.
        observed: True where measured, by frame or by value; by default everywhere.
        covariates: Known inputs of each frame, as of :class:`Sequences`.
        identity: Who each clip shows, any whole numbers; by default every clip is its own identity.
        labels: Ground-truth factors, each with values from 0.
        step_labels: Labels of each frame, any whole numbers.
        factor_names: What the values of a factor are called; by default their numbers.
        static_factors: The labels that belong to the identity; they may not differ between clips of one identity.
        motion_factors: The labels that belong to the motion.
        names: What the clips are called; by default their positions.
        source: The row of each clip in the data that `renderer` knows; by default their positions.
        renderer: Renders true swaps and continuations, where the data has such a thing.

    Shape:
        - frames: (N, T, \*E)
        - observed: (N, T) or (N, T, \*E)
        - covariates: (N, T or more, X)
        - lengths, identity, source and each of labels: (N,)
        - each of step_labels: (N, T)

    Raises:
        TypeError: `frames` is not uint8, `observed` is not bool, `covariates` is not floating point, or another tensor
            does not hold whole numbers.
        ValueError: Shapes, lengths, label values or names that do not fit together; a measured byte above `scale`; a
            clip in which nothing was measured, or whose covariates end before it does.

    Example:
        >>> frames = torch.arange(6, dtype=torch.uint8).reshape(3, 2, 1, 1, 1)
        >>> clips = Clips(frames, lengths=torch.tensor([2, 1, 2]), identity=torch.tensor([0, 0, 1]))
        >>> clips
        Clips(3 clips of 1 to 2 frames, 1x1x1, 2 identities)
        >>> clips.batch([1, 2]).mask
        tensor([[ True, False],
                [ True,  True]])
    """

    _unit: ClassVar[str] = "clip"
    _step: ClassVar[str] = "frame"

    def __init__(
        self,
        frames: Tensor,
        *,
        scale: int = 255,
        lengths: Tensor | None = None,
        observed: Tensor | None = None,
        covariates: Tensor | None = None,
        identity: Tensor | None = None,
        labels: Mapping[str, Tensor] | None = None,
        step_labels: Mapping[str, Tensor] | None = None,
        factor_names: Mapping[str, Sequence[str]] | None = None,
        static_factors: Sequence[str] = (),
        motion_factors: Sequence[str] = (),
        names: Sequence[str] | None = None,
        source: Tensor | None = None,
        renderer: Renderer | None = None,
    ) -> None:
        check_count(scale=scale)
        self.scale = int(scale)
        super().__init__(
            frames,
            lengths=lengths,
            observed=observed,
            covariates=covariates,
            identity=identity,
            labels=labels,
            step_labels=step_labels,
            factor_names=factor_names,
            static_factors=static_factors,
            motion_factors=motion_factors,
            names=names,
        )
        positions = torch.arange(len(self), device=frames.device)
        self.source = positions if source is None else self._whole("source", source)
        self.renderer = renderer
        real = self.mask if self.observed is None else self.observed
        if self.scale < 255 and (brightest := int(frames[real].max())) > self.scale:
            raise ValueError(f"frames: got values up to {brightest}, expected at most scale={self.scale}")

    @property
    def frames(self) -> Tensor:
        r"""(N, T, \*E) uint8, the clips as they were given: the same tensor as `values`."""
        return self.values

    def as_sequences(self) -> Sequences:
        r"""The clips as numbers, their bytes over `scale`, with all that is known of them but the renderer.

        Returns:
            The same sequences with holes, covariates, labels and names, float32.

        Example:
            >>> clips = Clips(torch.full((2, 3, 4), 51, dtype=torch.uint8), lengths=torch.tensor([3, 2]))
            >>> data = clips.as_sequences()
            >>> data, data.values[1, :, 0]
            (Sequences(2 sequences of 2 to 3 steps, 4, 2 identities), tensor([0.2000, 0.2000, 0.0000]))
        """
        rows = torch.arange(len(self), device=self.frames.device)
        kept = self._by_step(lambda tensor: tensor, lambda tensor: tensor)
        options = super()._options(rows)
        return Sequences(self._floats(self.values), lengths=self.lengths, **options, **kept)

    def draw_clips(self, batch_size: int, generator: torch.Generator, *, num_steps: int | None = None) -> Batch:
        """Random clips, all different while there are enough: another name of `draw_windows`.

        Args:
            batch_size: How many.
            generator: Decides everything that is random here.
            num_steps: Most frames of a clip; longer clips give a random window. None keeps whole clips.

        Returns:
            The batch, as long as its longest window.

        Raises:
            ValueError: `batch_size` or `num_steps` below 1.
            TypeError: One of them is no int.
        """
        return self.draw_windows(batch_size, generator, num_steps=num_steps)

    def true_swap(self, content: int | Indices, motion: int | Indices, *, num_steps: int | None = None) -> Tensor:
        r"""What a perfect model shows when one clip's identity does what another clip does.

        Args:
            content: The clip, or clips, whose identity is shown.
            motion: The clip, or clips, whose motion is shown; as many as `content`.
            num_steps: How many frames; by default as many as these clips have. A pendulum goes on for ever.

        Shape:
            - content, motion: int or (M,)
            - Output: (T, \*E) or (M, T, \*E), uint8

        Returns:
            The true frames.

        Raises:
            ValueError: The data has no renderer, an index is out of range, or the renderer does not know so many steps.
        """
        if self.renderer is None:
            raise ValueError("true_swap: these clips have no renderer, so their true swaps are not known")
        content, motion = torch.as_tensor(content), torch.as_tensor(motion)
        single = content.dim() == motion.dim() == 0
        source = self._rows("content", torch.atleast_1d(content))
        donor = self._rows("motion", torch.atleast_1d(motion))
        if len(source) != len(donor):
            raise ValueError(f"motion: got {len(donor)} clips, expected {len(source)}, one for each clip of content")
        if num_steps is not None:
            check_count(num_steps=num_steps)
        frames = self.renderer(self.source[source], self.source[donor], num_steps)
        return frames[0] if single else frames

    def true_clip(self, index: int | Indices, num_steps: int) -> Tensor:
        r"""The true frames 0 to `num_steps` - 1 of a clip, beyond its end where the renderer knows how it goes on.

        Args:
            index: The clip, or clips.
            num_steps: How many frames, from the clip's first one.

        Shape:
            - index: int or (M,)
            - Output: (num_steps, \*E) or (M, num_steps, \*E), uint8

        Returns:
            The true frames.

        Raises:
            ValueError: As `true_swap`.
        """
        return self.true_swap(index, index, num_steps=num_steps)

    @override
    def _check(self, values: Tensor) -> None:
        check_frames(values)

    @override
    def _floats(self, values: Tensor) -> Tensor:
        return values.to(torch.float32).div_(float(self.scale))

    @override
    def _options(self, rows: Tensor) -> dict[str, Any]:
        own = {"scale": self.scale, "source": self.source[rows], "renderer": self.renderer}
        return super()._options(rows) | own

    @override
    def _cut(self, rows: Tensor, starts: Tensor, lengths: Tensor, num_known: int | None = None) -> Self:
        part = super()._cut(rows, starts, lengths, num_known)
        part.renderer = None  # it renders clips from their first frame on
        return part
