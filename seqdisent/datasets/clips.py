"""Clips in memory, and the batches drawn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from seqdisent.datasets._checks import check_clips, check_count, check_frames, check_per_clip, check_positions
from seqdisent.datasets._draws import draw_below, draw_held_out, draw_partners, draw_positions, draw_samples
from seqdisent.datasets.batch import Batch
from seqdisent.datasets.renderer import Renderer

Indices = Tensor | Sequence[int]
"""Which clips: int positions, or a bool tensor with one entry per clip."""


class Clips:
    r"""A data set of clips, held as bytes; batches are float and in [0, 1].

    Every draw depends on the generator it is given and on nothing else. Treat the attributes as read-only.

    Args:
        frames: The clips, uint8, padded on the right; what the padding holds does not matter. A frame, or step, has
            any shape E: (C, H, W) for pictures, (88,) for piano rolls.
        scale: The byte that stands for 1.0 in a batch: 255 for pictures, 1 for what is there or not, such as a note.
        lengths: Real frames of each clip, 1 to T; by default all of them.
        identity: Who each clip shows, any whole numbers; by default every clip is its own identity.
        labels: Ground-truth factors, each with values from 0.
        factor_names: What the values of a factor are called; by default their numbers.
        static_factors: The labels that belong to the identity; they may not differ between clips of one identity.
        motion_factors: The labels that belong to the motion.
        names: What the clips are called; by default their positions.
        source: The row of each clip in the data that `renderer` knows; by default their positions.
        renderer: Renders true swaps and continuations, where the data has such a thing.

    Shape:
        - frames: (N, T, \*E)
        - lengths, identity, source and each of labels: (N,)

    Raises:
        TypeError: `frames` is not uint8, or another tensor does not hold whole numbers.
        ValueError: Shapes, lengths, label values or names that do not fit together; a frame has a byte above `scale`.

    Example:
        >>> frames = torch.arange(6, dtype=torch.uint8).reshape(3, 2, 1, 1, 1)
        >>> clips = Clips(frames, lengths=torch.tensor([2, 1, 2]), identity=torch.tensor([0, 0, 1]))
        >>> clips
        Clips(3 clips of 1 to 2 frames, 1x1x1, 2 identities)
        >>> clips.batch([1, 2]).mask
        tensor([[ True, False],
                [ True,  True]])
    """

    def __init__(
        self,
        frames: Tensor,
        *,
        scale: int = 255,
        lengths: Tensor | None = None,
        identity: Tensor | None = None,
        labels: Mapping[str, Tensor] | None = None,
        factor_names: Mapping[str, Sequence[str]] | None = None,
        static_factors: Sequence[str] = (),
        motion_factors: Sequence[str] = (),
        names: Sequence[str] | None = None,
        source: Tensor | None = None,
        renderer: Renderer | None = None,
    ) -> None:
        check_frames(frames)
        count, num_steps = frames.shape[:2]
        positions = torch.arange(count, device=frames.device)
        self.frames = frames
        check_count(scale=scale)
        self.scale = int(scale)
        self.lengths = (
            positions.new_full((count,), num_steps) if lengths is None else check_per_clip("lengths", lengths, frames)
        )
        self.identity = positions if identity is None else check_per_clip("identity", identity, frames)
        self.source = positions if source is None else check_per_clip("source", source, frames)
        self.labels = {
            name: check_per_clip(f"labels[{name!r}]", label, frames) for name, label in (labels or {}).items()
        }
        self.factor_names = {
            name: tuple((factor_names or {}).get(name) or (str(value) for value in range(int(label.max()) + 1)))
            for name, label in self.labels.items()
        }
        self.static_factors = tuple(static_factors)
        self.motion_factors = tuple(motion_factors)
        self.names = [str(position) for position in range(count)] if names is None else list(names)
        self.renderer = renderer
        check_clips(self, factor_names or {})

    def __len__(self) -> int:
        """The number of clips."""
        return self.frames.shape[0]

    def __repr__(self) -> str:
        """How many clips of what."""
        low, high = int(self.lengths.min()), int(self.lengths.max())
        steps = str(high) if low == high else f"{low} to {high}"
        size = "x".join(str(n) for n in self.frames.shape[2:])
        return f"Clips({len(self)} clips of {steps} frames, {size}, {self.num_identities} identities)"

    @property
    def mask(self) -> Tensor:
        """(N, T) bool, True where a frame is real."""
        return torch.arange(self.frames.shape[1], device=self.frames.device) < self.lengths[:, None]

    @cached_property
    def num_identities(self) -> int:
        """How many different identities there are."""
        return int(self._owner.max()) + 1

    @cached_property
    def _owner(self) -> Tensor:
        """(N,) int64, the identities numbered from 0 in their order."""
        owner: Tensor = torch.unique(self.identity, return_inverse=True)[1]
        return owner

    def subset(self, indices: Indices) -> Clips:
        """The clips at `indices`, in the order given: a copy of the frames, with the same factors and renderer.

        Raises:
            ValueError: No index, or one out of range (also a negative one).
        """
        rows = self._rows("indices", indices)
        return Clips(
            self.frames[rows],
            scale=self.scale,
            lengths=self.lengths[rows],
            identity=self.identity[rows],
            labels={name: label[rows] for name, label in self.labels.items()},
            factor_names=self.factor_names,
            static_factors=self.static_factors,
            motion_factors=self.motion_factors,
            names=[self.names[row] for row in rows.tolist()],
            source=self.source[rows],
            renderer=self.renderer,
        )

    def batch(self, indices: Indices) -> Batch:
        """The clips at `indices` as one batch, as long as the longest of them; its padding is zero.

        Raises:
            ValueError: No index, or one out of range (also a negative one).
        """
        rows = self._rows("indices", indices)
        lengths = self.lengths[rows]
        steps = torch.arange(int(lengths.max()), device=self.frames.device)
        return self._batch(rows[:, None] * self.frames.shape[1] + steps, lengths, rows)

    def draw_clips(self, batch_size: int, generator: torch.Generator, *, num_steps: int | None = None) -> Batch:
        """Random clips, all different while there are enough.

        Args:
            batch_size: How many.
            generator: Decides everything that is random here.
            num_steps: Most frames of a clip; longer clips give a random window. None keeps whole clips.

        Returns:
            The batch, as long as its longest window.

        Raises:
            ValueError: `batch_size` or `num_steps` below 1.
        """
        check_count(batch_size=batch_size)
        rows = draw_positions(len(self), batch_size, generator).to(self.frames.device)
        if num_steps is None:
            return self.batch(rows)
        check_count(num_steps=num_steps)
        lengths = self.lengths[rows].clamp(max=num_steps)
        starts = draw_below(self.lengths[rows] - lengths + 1, (batch_size,), generator)
        steps = torch.arange(int(lengths.max()), device=self.frames.device)
        window = (starts[:, None] + steps).clamp(max=self.frames.shape[1] - 1)  # what runs over the end is padding
        return self._batch(rows[:, None] * self.frames.shape[1] + window, lengths, rows)

    def draw_groups(self, num_groups: int, frames_per_group: int, generator: torch.Generator) -> Batch:
        """Groups of frames, each of one identity, for a model of still frames (paper, equation 7).

        A group's frames come from all clips of its identity, in no order; none comes twice unless the identity has too
        few. Identities are all different while there are enough, and as even as possible otherwise.

        Args:
            num_groups: How many groups, the batch's B.
            frames_per_group: Frames in each, the batch's T.
            generator: Decides everything that is random here.

        Returns:
            The batch; all frames are real, and of the labels it has the static factors alone.

        Raises:
            ValueError: `num_groups` or `frames_per_group` below 1.
        """
        check_count(num_groups=num_groups, frames_per_group=frames_per_group)
        pool, first, count = self._frames_by_identity
        groups = draw_positions(len(count), num_groups, generator).to(self.frames.device)
        picks = draw_samples(count[groups], frames_per_group, generator)
        chosen = pool[first[groups, None] + picks]
        rows = chosen[:, 0] // self.frames.shape[1]
        lengths = rows.new_full((num_groups,), frames_per_group)
        return self._batch(chosen, lengths, rows, self.static_factors)

    def draw_pairs(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Two whole clips of one identity, one after the other: in Sprites, 16 frames of a character's two actions.

        The first clips are all different while there are enough; the second is any of the same identity's, the first
        one included. VDSM's released code pairs actions in this way for its first stage.

        Args:
            batch_size: How many pairs.
            generator: Decides everything that is random here.

        Returns:
            The batch, as long as its longest pair; of the labels it has the static factors alone.

        Raises:
            ValueError: `batch_size` below 1.

        Example:
            >>> clips = Clips(torch.arange(6, dtype=torch.uint8).reshape(3, 2, 1), identity=torch.tensor([0, 0, 1]))
            >>> clips.draw_pairs(3, torch.Generator().manual_seed(1)).frames.shape
            torch.Size([3, 4, 1])
        """
        check_count(batch_size=batch_size)
        first = draw_positions(len(self), batch_size, generator).to(self.frames.device)
        second = draw_partners(self._owner, first, generator)
        until, lengths = self.lengths[first, None], self.lengths[first] + self.lengths[second]
        steps = torch.arange(int(lengths.max()), device=self.frames.device)
        rows = torch.where(steps < until, first[:, None], second[:, None])
        steps = torch.where(steps < until, steps, steps - until).clamp(max=self.frames.shape[1] - 1)
        return self._batch(rows * self.frames.shape[1] + steps, lengths, first, self.static_factors)

    def draw_partners(self, indices: Indices, generator: torch.Generator) -> Tensor:
        """For each clip at `indices` the position of any clip of the same identity, itself included, (M,) int64.

        Args:
            indices: Which clips.
            generator: Decides everything that is random here.

        Raises:
            ValueError: No index, or one out of range (also a negative one).
        """
        return draw_partners(self._owner, self._rows("indices", indices), generator)

    @cached_property
    def _frames_by_identity(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of real frames sorted by identity, where each identity's begin, and how many it has."""
        real = self.mask.flatten().nonzero().squeeze(1)
        owner = self._owner.repeat_interleave(self.lengths)
        count = owner.bincount()
        return real[owner.argsort(stable=True)], count.cumsum(0) - count, count

    def split(self, held_out: float, seed: int, *, by: Literal["identity", "sequence"]) -> tuple[Clips, Clips]:
        """Training clips, and clips that training never sees.

        Args:
            held_out: How many identities or sequences to hold out: an int, or a float for a fraction of them (at least
                one goes and one stays).
            seed: Decides which; nothing else does.
            by: What is held out: every clip of some identities, so that they are new, or some of the clips (sequences)
                whoever they show, so that an identity may be on both sides.

        Returns:
            The training clips and the held-out clips, each in the order of this data set.

        Raises:
            ValueError: Fewer than two identities or sequences, `held_out` leaves one side empty, or `by` is neither.

        Example:
            >>> clips = Clips(torch.zeros(6, 1, 1, 1, 1, dtype=torch.uint8), identity=torch.tensor([0, 0, 1, 1, 2, 2]))
            >>> train, held_out = clips.split(1, seed=0, by="identity")
            >>> len(train), len(held_out), held_out.num_identities
            (4, 2, 1)
            >>> train, held_out = clips.split(1, seed=0, by="sequence")
            >>> len(train), len(held_out), train.num_identities
            (5, 1, 3)
        """
        chosen = draw_held_out(self._owner, held_out, seed, by)
        return self.subset(~chosen), self.subset(chosen)

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

    def _rows(self, argument: str, indices: Indices) -> Tensor:
        return check_positions(argument, indices, len(self)).to(self.frames.device)

    def _batch(self, positions: Tensor, lengths: Tensor, rows: Tensor, factors: Sequence[str] | None = None) -> Batch:
        mask = torch.arange(positions.shape[1], device=positions.device) < lengths[:, None]
        frames = self.frames.flatten(0, 1)[positions].to(torch.float32).div_(float(self.scale))
        ragged = not bool(mask.all())
        if ragged:
            frames.masked_fill_(~mask.reshape(*mask.shape, *[1] * (frames.dim() - 2)), 0.0)
        labels = {name: self.labels[name][rows] for name in (self.labels if factors is None else factors)}
        return Batch(frames, mask, self.identity[rows], labels, positions, ragged)
