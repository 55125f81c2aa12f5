"""The parts of a data set: chosen sequences, windows, and what is held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from seqdisent.datasets._batches import Batches, Indices
from seqdisent.datasets._checks import check_count
from seqdisent.datasets._draws import draw_held_out
from seqdisent.datasets._real import mark_unknown, measured_steps
from seqdisent.datasets._windows import count_held_out, lay_windows, take_steps


class Parts(Batches):
    """What takes a data set apart; each part is a data set of the same class."""

    factor_names: Mapping[str, Sequence[str]]
    columns: tuple[str, ...] | None
    times: Tensor | None
    motion_factors: tuple[str, ...]

    if TYPE_CHECKING:

        def __init__(self, values: Tensor, **options: Any) -> None: ...

    def subset(self, indices: Indices) -> Self:
        """The sequences at `indices`, in the order given: a copy of the values, with all that belongs to them.

        Raises:
            ValueError: No index, or one out of range (also a negative one).
        """
        rows = self._rows("indices", indices)
        return type(self)(
            self.values[rows],
            lengths=self.lengths[rows],
            **self._options(rows),
            **self._by_step(lambda tensor: tensor[rows], lambda tensor: tensor[rows]),
        )

    def windows(self, num_steps: int, stride: int | None = None) -> Self:
        """All windows of the sequences, one after the other, each with what belongs to it.

        A sequence gives windows from its first step on, until one reaches its end: the last one is shorter where the
        sequence ends before it, and is kept. A window in which nothing was measured is left out. A window is called by
        its sequence and its steps, such as "a[24:48]". Covariates beyond a window are not kept, nor is a renderer.

        Args:
            num_steps: Steps of a window, at most.
            stride: Steps from the start of a window to that of the next; by default `num_steps`, without overlap.

        Returns:
            The windows, a copy of the values.

        Raises:
            ValueError: `num_steps` or `stride` below 1; all windows are left out.
            TypeError: One of them is no int.

        Example:
            >>> from seqdisent.datasets import Sequences
            >>> data = Sequences(torch.arange(5.0).reshape(1, 5, 1))
            >>> windows = data.windows(2)
            >>> windows.names, windows.values[..., 0].tolist()
            (['0[0:2]', '0[2:4]', '0[4:5]'], [[0.0, 1.0], [2.0, 3.0], [4.0, 0.0]])
            >>> data.windows(4, stride=1).values[..., 0].tolist()
            [[0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]]
        """
        stride = num_steps if stride is None else stride
        check_count(num_steps=num_steps, stride=stride)
        rows, starts = lay_windows(self.lengths, num_steps, stride)
        lengths = (self.lengths[rows] - starts).clamp(max=num_steps)
        if self.observed is not None:
            steps = starts[:, None] + torch.arange(int(lengths.max()), device=starts.device)
            measured = measured_steps(self.observed)
            seen = take_steps(measured, rows, steps).any(dim=1)  # what runs over the end repeats the last step
            rows, starts, lengths = rows[seen], starts[seen], lengths[seen]
        if not len(rows):
            raise ValueError(f"windows: nothing was measured in any, got stride={stride}, expected a smaller one")
        part = self._cut(rows, starts, lengths)
        spans = zip(part.names, starts.tolist(), (starts + lengths).tolist(), strict=True)
        part.names = [f"{name}[{start}:{stop}]" for name, start, stop in spans]
        return part

    def split(
        self, held_out: float, seed: int | None = None, *, by: Literal["identity", "sequence", "time"]
    ) -> tuple[Self, Self]:
        """Training sequences, and sequences that training never sees.

        Args:
            held_out: How many identities, sequences or steps to hold out: an int, or a float for a fraction of them (at
                least one goes and one stays).
            seed: Decides which; nothing else does. By time, nothing is random.
            by: What is held out: every sequence of some identities, so that they are new; some of the sequences,
                whoever they show, so that an identity may be on both sides; or, by time, the last steps of each
                sequence. Then the training part keeps all its covariates: the future that is known.

        Returns:
            The training sequences and the held-out ones, each in the order of this data set.

        Raises:
            ValueError: Fewer than two identities or sequences, or a sequence of one step; `held_out` leaves one side
                empty; `by` is none of these; no seed where it decides; by time, a part in which nothing was measured.
            TypeError: `held_out` is no number.

        Example:
            >>> from seqdisent.datasets import Sequences
            >>> data = Sequences(torch.zeros(6, 4, 1), identity=torch.tensor([0, 0, 1, 1, 2, 2]))
            >>> train, held_out = data.split(1, seed=0, by="identity")
            >>> len(train), len(held_out), held_out.num_identities
            (4, 2, 1)
            >>> train, held_out = data.split(1, seed=0, by="sequence")
            >>> len(train), len(held_out), train.num_identities
            (5, 1, 3)
            >>> data.split(0.25, by="time")
            (Sequences(6 sequences of 3 steps, 1, 3 identities), Sequences(6 sequences of 1 steps, 1, 3 identities))
        """
        if by == "time":
            rows = torch.arange(len(self), device=self.values.device)
            later = count_held_out(held_out, self.lengths, self.names)
            starts = self.lengths - later
            known = 1 + (self.values if self.covariates is None else self.covariates).shape[1]  # ends with NaN
            return (
                self._cut(rows, torch.zeros_like(starts), starts, known),
                self._cut(rows, starts, later, known - int(starts.min())),
            )
        if seed is None:
            raise ValueError(f"seed: got None, expected an int, which decides what is held out by {by}")
        chosen = draw_held_out(self._owner, held_out, seed, by)
        return self.subset(~chosen), self.subset(chosen)

    def _cut(self, rows: Tensor, starts: Tensor, lengths: Tensor, num_known: int | None = None) -> Self:
        """Windows (M,) of the sequences at `rows`, with the covariates of `num_known` steps (default: their own)."""
        steps = starts[:, None] + torch.arange(int(lengths.max()), device=starts.device)
        if num_known is None:
            known = steps.minimum((starts + lengths)[:, None] - 1)
        else:
            known = starts[:, None] + torch.arange(num_known, device=starts.device)
        return type(self)(
            take_steps(self.values, rows, steps),
            lengths=lengths,
            **self._options(rows),
            **self._by_step(
                lambda tensor: take_steps(tensor, rows, steps), lambda tensor: take_steps(tensor, rows, known)
            ),
        )

    def _by_step(self, take: Callable[[Tensor], Tensor], take_known: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The constructor's arguments that have steps, beside the values, as taken from (N, T, ...)."""
        beside: dict[str, Any] = {} if self.times is None else {"times": take(self.times)}  # clips have none
        return beside | {
            "observed": None if self.observed is None else take(self.observed),
            "covariates": (None if self.covariates is None else take_known(mark_unknown(self.covariates, self._known))),
            "step_labels": {name: take(label) for name, label in self.step_labels.items()},
        }

    def _options(self, rows: Tensor) -> dict[str, Any]:
        """The constructor's arguments that have no steps, for the sequences at `rows`."""
        named: dict[str, Any] = {} if self.columns is None else {"columns": self.columns}  # clips have none
        return named | {
            "identity": self.identity[rows],
            "labels": {name: label[rows] for name, label in self.labels.items()},
            "factor_names": self.factor_names,
            "static_factors": self.static_factors,
            "motion_factors": self.motion_factors,
            "names": [self.names[row] for row in rows.tolist()],
        }
