"""Sequences in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from seqdisent.datasets._batches import Batches, Indices
from seqdisent.datasets._checks import check_count, check_factors, check_lengths, check_values, check_whole
from seqdisent.datasets._draws import draw_held_out
from seqdisent.datasets._ragged import as_whole, check_number, pad_arrays, pad_beside
from seqdisent.datasets._real import mark_unknown, measured_steps, settle_covariates, settle_observed, settle_values
from seqdisent.datasets._windows import count_held_out, lay_windows, take_steps
from seqdisent.datasets.scaler import Scaler


class Sequences(Batches):
    r"""A data set of sequences: measurements with holes, of different lengths, with known inputs and labels.

    What stands in holes and padding is replaced by 0 and reaches no batch. Every draw depends on the generator it is
    given and on nothing else. Treat the attributes as read-only.

    Args:
        values: The sequences, float32 or float64, padded on the right; what the padding holds does not matter. A step
            has any shape E, such as (X,). Where `observed` is not given, NaN means that this was not measured.
        lengths: Real steps of each sequence, 1 to T; by default all of them.
        observed: True where measured, by step or by value; where it is given, what stands in holes does not matter. By
            default, what is not NaN: by value if some step is measured in part, else by step, and None without NaN.
        covariates: Known inputs of each step, such as the hour, the time since the last step, or a control, finite in
            every real step. They may go on after the values (the known future), up to their first step that is not
            finite; from there on, `covariates` repeats the last step before. In a tensor of T steps, what follows a
            shorter sequence is padding, no future, unless it ends with NaN. `future_covariates` hands out the future.
        identity: Who each sequence shows, any whole numbers; by default every sequence is its own identity.
        labels: Ground-truth factors, each with values from 0.
        step_labels: Labels of each step, any whole numbers, such as the phoneme that is spoken.
        factor_names: What the values of a factor are called; by default their numbers.
        static_factors: The labels that belong to the identity; they may not differ between sequences of one identity.
        motion_factors: The labels that belong to the motion.
        names: What the sequences are called; by default their positions.

    Shape:
        - values: (N, T, \*E)
        - observed: (N, T) or (N, T, \*E)
        - covariates: (N, T or more, X)
        - lengths, identity and each of labels: (N,)
        - each of step_labels: (N, T)

    Raises:
        TypeError: `values` is neither float32 nor float64, `observed` is not bool, `covariates` is not floating point,
            or another tensor does not hold whole numbers.
        ValueError: Shapes, lengths, label values or names that do not fit together; a value that is infinite (or NaN
            where `observed` says that it was measured), a sequence in which nothing was measured, or one whose
            covariates end before it does.

    Example:
        >>> values = torch.tensor([[[1.0], [torch.nan], [3.0]], [[4.0], [5.0], [torch.nan]]])
        >>> data = Sequences(values, lengths=torch.tensor([3, 2]))
        >>> data
        Sequences(2 sequences of 2 to 3 steps, 1, 2 identities)
        >>> batch = data.batch([1, 0])
        >>> batch.values[..., 0]
        tensor([[4., 5., 0.],
                [1., 0., 3.]])
        >>> batch.observed
        tensor([[ True,  True, False],
                [ True, False,  True]])
    """

    def __init__(
        self,
        values: Tensor,
        *,
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
    ) -> None:
        self._check(values)
        count, num_steps = values.shape[:2]
        positions = torch.arange(count, device=values.device)
        self.values = values
        self.lengths = positions.new_full((count,), num_steps) if lengths is None else self._whole("lengths", lengths)
        self.identity = positions if identity is None else self._whole("identity", identity)
        self.labels = {name: self._whole(f"labels[{name!r}]", label) for name, label in (labels or {}).items()}
        self.factor_names = {
            name: tuple((factor_names or {}).get(name) or (str(value) for value in range(int(label.max()) + 1)))
            for name, label in self.labels.items()
        }
        self.static_factors = tuple(static_factors)
        self.motion_factors = tuple(motion_factors)
        self.names = [str(position) for position in range(count)] if names is None else list(names)
        check_lengths(self.lengths, num_steps)
        check_factors(self, factor_names or {})
        self.step_labels = {
            name: self._whole(f"step_labels[{name!r}]", label, 2).where(self.mask, 0)
            for name, label in (step_labels or {}).items()
        }
        self.observed = settle_observed(observed, values, self.mask, self.names)
        if values.is_floating_point():
            self.values = settle_values(values, self.mask if self.observed is None else self.observed, self.names)
        self.covariates, self._known = (
            (None, self.lengths)
            if covariates is None
            else settle_covariates(covariates, values, self.lengths, self.names)
        )

    @classmethod
    def from_arrays(
        cls,
        arrays: Sequence[Any],
        *,
        observed: Sequence[Any] | None = None,
        covariates: Sequence[Any] | None = None,
        identity: Any = None,
        labels: Mapping[str, Any] | None = None,
        step_labels: Mapping[str, Sequence[Any]] | None = None,
        **options: Any,
    ) -> Self:
        r"""Pad arrays of different lengths; what belongs to their steps comes in lists, too.

        Args:
            arrays: The sequences, (T_i, \*E) each: NumPy's arrays or tensors, whose dtype is kept.
            observed: For each sequence what was measured, (T_i,) or (T_i, \*E).
            covariates: For each sequence its known inputs, (T_i or more, X).
            identity: One whole number for each sequence.
            labels: {name: one whole number for each sequence}.
            step_labels: {name: for each sequence whole numbers (T_i,)}.
            **options: Further arguments of the constructor, such as `names`.

        Raises:
            TypeError: As the constructor; or arrays of different dtypes, or that hold no numbers.
            ValueError: As the constructor; or arrays that do not fit together or with the lengths of the sequences.

        Example:
            >>> Sequences.from_arrays([torch.zeros(3, 2), torch.ones(5, 2)], identity=[0, 0])
            Sequences(2 sequences of 3 to 5 steps, 2, 1 identities)
        """
        values, lengths = pad_arrays("arrays", arrays)
        known = None
        if covariates is not None:
            check_number("covariates", covariates, lengths)
            known = pad_arrays("covariates", covariates, filler=math.nan, num_steps=values.shape[1] + 1)[0]
        return cls(
            values,
            lengths=lengths,
            observed=None if observed is None else pad_beside("observed", observed, lengths),
            covariates=known,
            identity=None if identity is None else as_whole(identity),
            labels={name: as_whole(label) for name, label in (labels or {}).items()},
            step_labels={
                name: pad_beside(f"step_labels[{name!r}]", label, lengths)
                for name, label in (step_labels or {}).items()
            },
            **options,
        )

    def __repr__(self) -> str:
        """How many sequences of what."""
        low, high = int(self.lengths.min()), int(self.lengths.max())
        steps = str(high) if low == high else f"{low} to {high}"
        size = "x".join(str(n) for n in self.values.shape[2:])
        what = f"{len(self)} {self._unit}s of {steps} {self._step}s, {size}, {self.num_identities} identities"
        return f"{type(self).__name__}({what})"

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

    def map_values(self, function: Callable[[Tensor], Tensor]) -> Self:
        r"""The data set with other values: units changed, a logarithm taken.

        Args:
            function: From values (N, T, \*E), 0 in holes and padding, to values (N, T, \*F); what it makes of holes and
                padding does not matter. Where holes are by value, they stay where they are, so each coordinate must
                stay in its place. Of clips, from bytes to bytes.

        Raises:
            TypeError: `function` returns no tensor of the right dtype.
            ValueError: It returns another number of sequences or steps, values that are not finite, or steps of a shape
                that does not fit `observed` by value.

        Example:
            >>> data = Sequences(torch.tensor([[[1.0], [torch.nan], [100.0]]]))
            >>> data.map_values(torch.log10).values.flatten().tolist()
            [0.0, 0.0, 2.0]
        """
        values = function(self.values)
        if isinstance(values, Tensor) and values.shape[:2] != self.values.shape[:2]:
            wanted = ", ".join(map(str, self.values.shape[:2]))
            raise ValueError(f"function: returned shape {tuple(values.shape)}, expected ({wanted}, *E)")
        rows = torch.arange(len(self), device=self.values.device)
        kept = self._by_step(lambda tensor: tensor, lambda tensor: tensor)
        kept["observed"] = self.mask if self.observed is None else self.observed  # so that a NaN of its own is an error
        mapped = type(self)(values, lengths=self.lengths, **self._options(rows), **kept)
        mapped.observed = self.observed
        return mapped

    def scaled(self, scaler: Scaler) -> Self:
        """The data set standardised.

        Args:
            scaler: As fitted to the training part.

        Raises:
            TypeError: Clips are bytes, and stay so.
            ValueError: The scaler is of steps of another shape.

        Example:
            >>> train, test = Sequences(torch.tensor([[[3.0], [5.0], [8.0]]])).split(1, by="time")
            >>> scaler = Scaler.fit(train)
            >>> test.scaled(scaler).values.flatten().tolist()
            [4.0]
        """
        return self.map_values(scaler)

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

    def _check(self, values: Tensor) -> None:
        check_values(values)

    def _by_step(self, take: Callable[[Tensor], Tensor], take_known: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The constructor's arguments that have steps, beside the values, as taken from (N, T, ...)."""
        return {
            "observed": None if self.observed is None else take(self.observed),
            "covariates": (None if self.covariates is None else take_known(mark_unknown(self.covariates, self._known))),
            "step_labels": {name: take(label) for name, label in self.step_labels.items()},
        }

    def _options(self, rows: Tensor) -> dict[str, Any]:
        """The constructor's arguments that have no steps, for the sequences at `rows`."""
        return {
            "identity": self.identity[rows],
            "labels": {name: label[rows] for name, label in self.labels.items()},
            "factor_names": self.factor_names,
            "static_factors": self.static_factors,
            "motion_factors": self.motion_factors,
            "names": [self.names[row] for row in rows.tolist()],
        }

    def _whole(self, name: str, numbers: Tensor, dims: int = 1) -> Tensor:
        unit = self._unit if dims == 1 else self._step
        return check_whole(name, numbers, self.values.shape[:dims], self.values.device, unit)
