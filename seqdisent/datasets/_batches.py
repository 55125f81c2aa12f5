"""The batches of a data set: chosen ones, and random ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from seqdisent.datasets._checks import check_count, check_positions
from seqdisent.datasets._draws import draw_partners, draw_positions, draw_samples, draw_starts
from seqdisent.datasets._real import beside, measured_steps
from seqdisent.datasets.batch import Batch

Indices = Tensor | Sequence[int]
"""Which sequences: int positions, or a bool tensor with one entry per sequence."""


class Batches:
    """What draws batches; a data set brings the tensors."""

    values: Tensor
    lengths: Tensor
    observed: Tensor | None
    covariates: Tensor | None
    _known: Tensor
    """(N,), for how many steps the covariates are known."""
    names: list[str]
    identity: Tensor
    labels: dict[str, Tensor]
    step_labels: dict[str, Tensor]
    static_factors: tuple[str, ...]
    _unit: ClassVar[str] = "sequence"
    _step: ClassVar[str] = "step"

    def __len__(self) -> int:
        """The number of sequences."""
        return self.values.shape[0]

    @property
    def mask(self) -> Tensor:
        """(N, T) bool, True where a step is real."""
        return torch.arange(self.values.shape[1], device=self.values.device) < self.lengths[:, None]

    @cached_property
    def num_identities(self) -> int:
        """How many different identities there are."""
        return int(self._owner.max()) + 1

    @cached_property
    def _owner(self) -> Tensor:
        """(N,) int64, the identities numbered from 0 in their order."""
        owner: Tensor = torch.unique(self.identity, return_inverse=True)[1]
        return owner

    def batch(self, indices: Indices) -> Batch:
        """The sequences at `indices` as one batch, as long as the longest of them; its padding is zero.

        Raises:
            ValueError: No index, or one out of range (also a negative one).
        """
        rows = self._rows("indices", indices)
        lengths = self.lengths[rows]
        steps = torch.arange(int(lengths.max()), device=self.values.device)
        return self._batch(rows[:, None] * self.values.shape[1] + steps, lengths, rows)

    def draw_windows(self, batch_size: int, generator: torch.Generator, *, num_steps: int | None = None) -> Batch:
        """Random sequences, all different while there are enough, or a random window of each.

        A window in which nothing was measured is not drawn.

        Args:
            batch_size: How many.
            generator: Decides everything that is random here.
            num_steps: Most steps of a window; longer sequences give a random window. None keeps whole sequences.

        Returns:
            The batch, as long as its longest window.

        Raises:
            ValueError: `batch_size` or `num_steps` below 1.
            TypeError: One of them is no int.

        Example:
            >>> from seqdisent.datasets import Sequences
            >>> data = Sequences(torch.arange(12.0).reshape(2, 6, 1))
            >>> data.draw_windows(2, torch.Generator().manual_seed(0), num_steps=3).values[..., 0]
            tensor([[2., 3., 4.],
                    [7., 8., 9.]])
        """
        check_count(batch_size=batch_size)
        rows = draw_positions(len(self), batch_size, generator).to(self.values.device)
        if num_steps is None:
            return self.batch(rows)
        check_count(num_steps=num_steps)
        lengths = self.lengths[rows].clamp(max=num_steps)
        seen = self.mask[rows] if self.observed is None else measured_steps(self.observed[rows])
        starts = draw_starts(seen, self.lengths[rows], lengths, generator)
        steps = torch.arange(int(lengths.max()), device=self.values.device)
        window = (starts[:, None] + steps).clamp(max=self.values.shape[1] - 1)  # what runs over the end is padding
        return self._batch(rows[:, None] * self.values.shape[1] + window, lengths, rows)

    def draw_groups(self, num_groups: int, frames_per_group: int, generator: torch.Generator) -> Batch:
        """Groups of frames, each of one identity, for a model of still frames (paper, equation 7).

        A group's frames (steps) are measured ones from all sequences of its identity, in no order; none comes twice
        unless the identity has too few. Identities are all different while there are enough, and as even as possible
        otherwise.

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
        pool, first, count = self._steps_by_identity
        groups = draw_positions(len(count), num_groups, generator).to(self.values.device)
        picks = draw_samples(count[groups], frames_per_group, generator)
        chosen = pool[first[groups, None] + picks]
        rows = chosen[:, 0] // self.values.shape[1]
        lengths = rows.new_full((num_groups,), frames_per_group)
        return self._batch(chosen, lengths, rows, self.static_factors)

    def draw_pairs(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Two whole sequences of one identity, one after the other: in Sprites, 16 frames of a character's two actions.

        The first sequences are all different while there are enough; the second is any of the same identity's, the
        first one included. VDSM's released code pairs actions in this way for its first stage.

        Args:
            batch_size: How many pairs.
            generator: Decides everything that is random here.

        Returns:
            The batch, as long as its longest pair; of the labels it has the static factors alone.

        Raises:
            ValueError: `batch_size` below 1.

        Example:
            >>> from seqdisent.datasets import Sequences
            >>> data = Sequences(torch.arange(6.0).reshape(3, 2, 1), identity=torch.tensor([0, 0, 1]))
            >>> data.draw_pairs(3, torch.Generator().manual_seed(1)).frames.shape
            torch.Size([3, 4, 1])
        """
        check_count(batch_size=batch_size)
        first = draw_positions(len(self), batch_size, generator).to(self.values.device)
        second = draw_partners(self._owner, first, generator)
        until, lengths = self.lengths[first, None], self.lengths[first] + self.lengths[second]
        steps = torch.arange(int(lengths.max()), device=self.values.device)
        rows = torch.where(steps < until, first[:, None], second[:, None])
        steps = torch.where(steps < until, steps, steps - until).clamp(max=self.values.shape[1] - 1)
        return self._batch(rows * self.values.shape[1] + steps, lengths, first, self.static_factors)

    def draw_partners(self, indices: Indices, generator: torch.Generator) -> Tensor:
        """For each sequence at `indices` the position of any one of the same identity, itself included, (M,) int64.

        Args:
            indices: Which sequences.
            generator: Decides everything that is random here.

        Raises:
            ValueError: No index, or one out of range (also a negative one).
        """
        return draw_partners(self._owner, self._rows("indices", indices), generator)

    def future_covariates(self, indices: Indices, num_steps: int) -> Tensor:
        """The known inputs of the steps that follow the last step of each sequence, of which a forecast is made.

        Args:
            indices: Which sequences.
            num_steps: How many steps.

        Returns:
            (M, num_steps, X), for ``forecast(..., future={"covariates": ...})``.

        Raises:
            ValueError: A sequence whose known future is shorter, or data without covariates; `num_steps` below 1; no
                index, or one out of range (also a negative one).
            TypeError: `num_steps` is no int.

        Example:
            >>> from seqdisent.datasets import Sequences
            >>> values, hours = [torch.zeros(3, 1), torch.zeros(2, 1)], torch.arange(5.0)[:, None]
            >>> data = Sequences.from_arrays(values, covariates=[hours, hours])
            >>> data.future_covariates([0, 1], 2)[..., 0]
            tensor([[3., 4.],
                    [2., 3.]])
        """
        check_count(num_steps=num_steps)
        rows = self._rows("indices", indices)
        if self.covariates is None:
            raise ValueError(f"future_covariates: these {self._unit}s have no covariates, expected some")
        ahead = self._known[rows] - self.lengths[rows]
        if bool((ahead < num_steps).any()):
            short = int((ahead < num_steps).nonzero()[0])
            row = int(rows[short])
            raise ValueError(
                f"num_steps: got {num_steps}, expected at most {int(ahead[short])}, the known future of {self._unit} "
                f"{row} ({self.names[row]!r})"
            )
        steps = self.lengths[rows, None] + torch.arange(num_steps, device=rows.device)
        return self.covariates[rows[:, None], steps]

    @cached_property
    def _steps_by_identity(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of measured steps sorted by identity, where each identity's begin, and how many it has."""
        seen = self.mask if self.observed is None else measured_steps(self.observed)
        real = seen.flatten().nonzero().squeeze(1)
        owner = self._owner[real // seen.shape[1]]
        count = owner.bincount()
        return real[owner.argsort(stable=True)], count.cumsum(0) - count, count

    def _floats(self, values: Tensor) -> Tensor:
        """Stored values as a batch hands them out, in memory of their own."""
        return values

    def _rows(self, argument: str, indices: Indices) -> Tensor:
        return check_positions(argument, indices, len(self), self._unit).to(self.values.device)

    def _batch(self, positions: Tensor, lengths: Tensor, rows: Tensor, factors: Sequence[str] | None = None) -> Batch:
        mask = torch.arange(positions.shape[1], device=positions.device) < lengths[:, None]
        ragged = not bool(mask.all())
        values = self._floats(self.values.flatten(0, 1)[positions])
        observed = None if self.observed is None else self.observed.flatten(0, 1)[positions]
        if observed is not None:
            observed &= beside(mask, observed)
        if ragged or observed is not None:
            values.masked_fill_(~beside(mask if observed is None else observed, values), 0.0)
        covariates = None
        if self.covariates is not None:
            last = positions.gather(1, lengths[:, None] - 1)
            real = torch.where(mask, positions, last)
            covariates = self.covariates[real // self.values.shape[1], real % self.values.shape[1]]
        labels = {name: self.labels[name][rows] for name in (self.labels if factors is None else factors)}
        of_steps = {name: label.flatten()[positions].where(mask, 0) for name, label in self.step_labels.items()}
        return Batch(
            values, mask, self.identity[rows], labels, positions, ragged, observed, covariates, of_steps or None
        )
