"""Sequences in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from seqdisent.datasets._checks import check_columns, check_factors, check_lengths, check_values, check_whole
from seqdisent.datasets._parts import Parts
from seqdisent.datasets._ragged import as_whole, check_number, pad_arrays, pad_beside
from seqdisent.datasets._real import settle_covariates, settle_observed, settle_times, settle_values
from seqdisent.datasets.scaler import Scaler


class Sequences(Parts):
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
        columns: What the X coordinates of a step of shape (X,) are called, such as the columns of a table.
        times: When each step was, increasing, floating point, in any unit. Batches do not have them: a model reads the
            time since the last step as a covariate.

    Shape:
        - values: (N, T, \*E)
        - observed: (N, T) or (N, T, \*E)
        - covariates: (N, T or more, X)
        - lengths, identity and each of labels: (N,)
        - times and each of step_labels: (N, T)

    Raises:
        TypeError: `values` is neither float32 nor float64, `observed` is not bool, `covariates` or `times` is not
            floating point, or another tensor does not hold whole numbers.
        ValueError: Shapes, lengths, label values or names that do not fit together; a value that is infinite (or NaN
            where `observed` says that it was measured), a sequence in which nothing was measured, one whose covariates
            end before it does, or one whose times do not increase.

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
        columns: Sequence[str] | None = None,
        times: Tensor | None = None,
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
        self.columns = None if columns is None else tuple(columns)
        check_columns(self.columns, values.shape[2:])
        check_lengths(self.lengths, num_steps)
        check_factors(self, factor_names or {})
        self.step_labels = {
            name: self._whole(f"step_labels[{name!r}]", label, 2).where(self.mask, 0)
            for name, label in (step_labels or {}).items()
        }
        self.observed = settle_observed(observed, values, self.mask, self.names)
        if values.is_floating_point():
            self.values = settle_values(values, self.mask if self.observed is None else self.observed, self.names)
        self.times = None if times is None else settle_times(times, self.mask, self.names)
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
        times: Sequence[Any] | None = None,
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
            times: For each sequence when its steps were, (T_i,).
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
        if times is not None:
            options["times"] = pad_beside("times", times, lengths)
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

    def map_values(self, function: Callable[[Tensor], Tensor]) -> Self:
        r"""The data set with other values: units changed, a logarithm taken.

        Args:
            function: From values (N, T, \*E), 0 in holes and padding, to values (N, T, \*F); what it makes of holes and
                padding does not matter. Where holes are by value, they stay where they are, so each coordinate must
                stay in its place. Of clips, from bytes to bytes. Where F is not E, `columns` are dropped.

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
        options = self._options(rows)
        if isinstance(values, Tensor) and values.shape[2:] != self.values.shape[2:]:
            options.pop("columns", None)
        mapped = type(self)(values, lengths=self.lengths, **options, **kept)
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

    def _check(self, values: Tensor) -> None:
        check_values(values)

    def _whole(self, name: str, numbers: Tensor, dims: int = 1) -> Tensor:
        unit = self._unit if dims == 1 else self._step
        return check_whole(name, numbers, self.values.shape[:dims], self.values.device, unit)
