"""Clips in memory, and the batches drawn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from seqdisent.datasets._checks import check_count, check_per_clip, check_positions, check_tensor
from seqdisent.datasets._draws import draw_below, draw_positions

Indices = Tensor | Sequence[int]
"""Which clips: int positions, or a bool tensor with one entry per clip."""


class Batch(NamedTuple):
    """Clips as a model takes them; a named tuple, so that Lightning moves it to devices by itself."""

    frames: Tensor
    """(B, T, C, H, W) float32 in [0, 1], zero where padding."""
    mask: Tensor
    """(B, T) bool, True where a frame is real; padding on the right."""
    identity: Tensor
    """(B,) int64."""
    labels: dict[str, Tensor]
    """Ground-truth factors, each (B,) int64; for evaluation only."""
    positions: Tensor
    """(B, T) int64, where each frame stands in `Clips.frames.flatten(0, 1)`: what was computed for it once is found."""


class Renderer(Protocol):
    """Knows the true frames of any identity doing any motion.

    It is called with rows of the data set as it was made (`Clips.source`), so it outlives `Clips.subset`. Make it a
    class at module level: clips are pickled when they go to another process.
    """

    def __call__(self, content: Tensor, motion: Tensor, num_steps: int | None) -> Tensor:
        """The identity of rows `content` (M,) doing what rows `motion` (M,) do, uint8 (M, num_steps, C, H, W)."""
        ...


class Clips:
    """A data set of clips, held as bytes; batches are float and in [0, 1].

    Every draw depends on the generator it is given and on nothing else. Treat the attributes as read-only.

    Args:
        frames: The clips, uint8, padded on the right; what the padding holds does not matter.
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
        - frames: (N, T, C, H, W)
        - lengths, identity, source and each of labels: (N,)

    Raises:
        TypeError: `frames` is not uint8, or another tensor does not hold whole numbers.
        ValueError: Shapes, lengths, label values or names that do not fit together.

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
        check_tensor("frames", frames, "uint8")
        if frames.dim() != 5 or 0 in frames.shape:
            raise ValueError(f"frames: shape is {tuple(frames.shape)}, expected (N, T, C, H, W) with nothing empty")
        count, num_steps = frames.shape[:2]
        positions = torch.arange(count, device=frames.device)
        self.frames = frames
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
        self._check(factor_names or {})

    def _check(self, factor_names: Mapping[str, Sequence[str]]) -> None:
        low, high = int(self.lengths.min()), int(self.lengths.max())
        if low < 1 or high > self.frames.shape[1]:
            raise ValueError(f"lengths: got values from {low} to {high}, expected 1 to {self.frames.shape[1]}")
        if len(self.names) != len(self):
            raise ValueError(f"names: got {len(self.names)}, expected one for each of {len(self)} clips")
        for argument, factors in (
            ("factor_names", factor_names),
            ("static_factors", self.static_factors),
            ("motion_factors", self.motion_factors),
        ):
            for name in factors:
                if name not in self.labels:
                    raise ValueError(f"{argument}: {name!r} is not among the labels {sorted(self.labels)}")
        for name, label in self.labels.items():
            low, high, known = int(label.min()), int(label.max()), len(self.factor_names[name])
            if low < 0 or high >= known:
                raise ValueError(f"labels[{name!r}]: got values from {low} to {high}, expected 0 to {known - 1}")
        for name in self.static_factors:
            if torch.unique(torch.stack([self.identity, self.labels[name]]), dim=1).shape[1] != self.num_identities:
                raise ValueError(
                    f"static_factors: {name!r} differs between clips of one identity, expected one value each"
                )

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
        return int(torch.unique(self.identity).numel())

    def subset(self, indices: Indices) -> Clips:
        """Some of the clips, in the order given.

        Args:
            indices: Which clips; no negative positions.

        Returns:
            New clips (a copy of the frames) with the same factors and the same renderer.

        Raises:
            ValueError: No index, or one out of range.
        """
        rows = self._rows("indices", indices)
        return Clips(
            self.frames[rows],
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
        """These clips as one batch, as long as the longest of them.

        Args:
            indices: Which clips; no negative positions.

        Returns:
            The batch; its padding is zero.

        Raises:
            ValueError: No index, or one out of range.
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
        check_count("batch_size", batch_size)
        rows = draw_positions(len(self), batch_size, generator).to(self.frames.device)
        if num_steps is None:
            return self.batch(rows)
        lengths = self.lengths[rows].clamp(max=check_count("num_steps", num_steps))
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
        check_count("num_groups", num_groups)
        check_count("frames_per_group", frames_per_group)
        pool, first, count = self._frames_by_identity
        groups = draw_positions(len(count), num_groups, generator).to(self.frames.device)
        first, count = first[groups, None], count[groups, None]
        # The frames with the largest of independent uniform keys are a sample without replacement, in random order.
        width = max(int(count.max()), frames_per_group)
        keys = torch.rand(num_groups, width, generator=generator, device=generator.device).to(self.frames.device)
        keys = keys.masked_fill(torch.arange(width, device=keys.device) >= count, -1.0)
        picks = keys.topk(frames_per_group, dim=1).indices
        if bool((count < frames_per_group).any()):
            repeats = draw_below(count, (num_groups, frames_per_group), generator)
            picks = torch.where(count < frames_per_group, repeats, picks)
        chosen = pool[first + picks]
        rows = chosen[:, 0] // self.frames.shape[1]
        lengths = rows.new_full((num_groups,), frames_per_group)
        return self._batch(chosen, lengths, rows, self.static_factors)

    @cached_property
    def _frames_by_identity(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of real frames sorted by identity, where each identity's begin, and how many it has."""
        real = self.mask.flatten().nonzero().squeeze(1)
        owner = torch.unique(self.identity, return_inverse=True)[1].repeat_interleave(self.lengths)
        count = owner.bincount()
        return real[owner.argsort(stable=True)], count.cumsum(0) - count, count

    def split_by_identity(self, held_out: float, seed: int) -> tuple[Clips, Clips]:
        """Training clips and clips of identities that training never sees.

        Args:
            held_out: How many identities to hold out: an int, or a float for a fraction of them (at least one goes and
                one stays).
            seed: Decides which identities.

        Returns:
            The training clips and the held-out clips, each in the order of this data set.

        Raises:
            ValueError: Fewer than two identities, or `held_out` leaves one side empty.

        Example:
            >>> clips = Clips(torch.zeros(6, 1, 1, 1, 1, dtype=torch.uint8), identity=torch.tensor([0, 0, 1, 1, 2, 2]))
            >>> train, held_out = clips.split_by_identity(1, seed=0)
            >>> len(train), len(held_out), held_out.num_identities
            (4, 2, 1)
        """
        identities = torch.unique(self.identity)
        total = len(identities)
        if total < 2:
            raise ValueError(f"split_by_identity: got clips of {total} identity, expected at least 2")
        if isinstance(held_out, int):
            count = check_count("held_out", held_out)
            if count >= total:
                raise ValueError(f"held_out: got {count} of {total} identities, expected at most {total - 1}")
        elif 0.0 < held_out < 1.0:
            count = min(max(round(held_out * total), 1), total - 1)
        else:
            raise ValueError(f"held_out: got {held_out}, expected a fraction between 0 and 1, or an int")
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        chosen = torch.isin(self.identity, identities[order[:count].to(identities.device)])
        return self.subset(~chosen), self.subset(chosen)

    def true_swap(self, content: int | Indices, motion: int | Indices, *, num_steps: int | None = None) -> Tensor:
        """What a perfect model shows when one clip's identity does what another clip does.

        Args:
            content: The clip, or clips, whose identity is shown.
            motion: The clip, or clips, whose motion is shown; as many as `content`.
            num_steps: How many frames; by default as many as these clips have. A pendulum goes on for ever.

        Shape:
            - content, motion: int or (M,)
            - Output: (T, C, H, W) or (M, T, C, H, W), uint8

        Returns:
            The true frames.

        Raises:
            ValueError: The data has no renderer, an index is out of range, or the renderer does not know so many steps.
        """
        if self.renderer is None:
            raise ValueError("true_swap: these clips have no renderer, so their true swaps are not known")
        single = isinstance(content, int) and isinstance(motion, int)
        source = self._rows("content", [content] if isinstance(content, int) else content)
        donor = self._rows("motion", [motion] if isinstance(motion, int) else motion)
        if len(source) != len(donor):
            raise ValueError(f"motion: got {len(donor)} clips, expected {len(source)}, one for each clip of content")
        if num_steps is not None:
            check_count("num_steps", num_steps)
        frames = self.renderer(self.source[source], self.source[donor], num_steps)
        return frames[0] if single else frames

    def true_clip(self, index: int | Indices, num_steps: int) -> Tensor:
        """The true frames 0 to `num_steps` - 1 of a clip, beyond its end where the renderer knows how it goes on.

        Args:
            index: The clip, or clips.
            num_steps: How many frames, from the clip's first one.

        Shape:
            - index: int or (M,)
            - Output: (num_steps, C, H, W) or (M, num_steps, C, H, W), uint8

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
        pixels = self.frames.flatten(0, 1)[positions].to(torch.float32).div_(255.0)
        if not bool(mask.all()):
            pixels.masked_fill_(~mask[:, :, None, None, None], 0.0)
        labels = {name: self.labels[name][rows] for name in (self.labels if factors is None else factors)}
        return Batch(pixels, mask, self.identity[rows], labels, positions)
