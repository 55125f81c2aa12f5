"""Standardised measurements, and the way back to their units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from typing_extensions import Self

from seqdisent.datasets._real import beside

if TYPE_CHECKING:
    from seqdisent.datasets.sequences import Sequences


class Scaler(nn.Module):
    r"""Standardise values by coordinate, :math:`(x - \mathrm{loc}) / \mathrm{scale}`.

    Both are buffers: as a submodule of a model, a scaler is saved with it and moves to its device.

    Args:
        loc: What becomes 0, of a shape that broadcasts to the shape E of a step, with as many dimensions.
        scale: What becomes 1, positive, of the same shape.

    Shape:
        - values: (\*B, T, \*E)
        - output: the same

    Raises:
        TypeError: `loc` or `scale` is no tensor of floating point.
        ValueError: They differ in shape, or are not finite, or `scale` is not positive; values whose steps have another
            shape.

    Example:
        >>> from seqdisent.datasets import Sequences
        >>> train = Sequences(torch.tensor([[[1.0, 5.0], [3.0, 5.0], [torch.nan, 5.0]]]))
        >>> scaler = Scaler.fit(train)
        >>> scaler
        Scaler(2)
        >>> scaler(torch.tensor([[3.0, 5.0]]))
        tensor([[1., 0.]])
        >>> draws = torch.zeros(4, 1, 3, 2)
        >>> scaler.undo(draws)[0, 0, 0]
        tensor([2., 5.])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        for name, tensor in (("loc", loc), ("scale", scale)):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name}: got {kind}, expected a tensor of floating point")
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name}: got values that are not finite, expected numbers")
        if scale.shape != loc.shape:
            raise ValueError(f"scale: shape is {tuple(scale.shape)}, expected that of loc, {tuple(loc.shape)}")
        if not bool((scale > 0).all()):
            raise ValueError(f"scale: got {float(scale.min())}, expected positive numbers")
        self.register_buffer("loc", loc.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

    @classmethod
    def fit(cls, sequences: Sequences, *, dims: Sequence[int] | None = None) -> Self:
        """Take mean and standard deviation of what was measured; a coordinate that never changes keeps its scale, 1.

        Args:
            sequences: The training part, and no more.
            dims: Which dimensions of a step, counted from 0, have a mean and scale for each of their coordinates; the
                others share them: ``dims=[0]`` of (C, H, W) is by colour, ``dims=[]`` one for all. By default all of
                them.

        Raises:
            TypeError: The sequences are bytes.
            ValueError: `dims` is out of range, or a coordinate was never measured.
        """
        values = sequences.values
        if not values.is_floating_point():
            raise TypeError(f"sequences: hold {values.dtype}, expected floating point values")
        num_dims = values.dim() - 2
        own = set(range(num_dims) if dims is None else dims)
        if not own <= set(range(num_dims)):
            raise ValueError(f"dims: got {sorted(own)}, expected some of 0 to {num_dims - 1}, the dimensions of a step")
        real = beside(sequences.mask if sequences.observed is None else sequences.observed, values).expand_as(values)
        shared = [0, 1, *(dim + 2 for dim in range(num_dims) if dim not in own)]
        count = real.sum(dim=shared, keepdim=True)
        if not bool(count.all()):
            where = (count[0, 0] == 0).nonzero()[0].tolist()
            raise ValueError(f"sequences: coordinate {where} was never measured, expected at least one value")
        mean = values.sum(dim=shared, keepdim=True, dtype=torch.float64) / count  # holes and padding are 0
        squares = torch.where(real, values.double() - mean, 0.0).square().sum(dim=shared, keepdim=True)
        low = torch.where(real, values, torch.inf).amin(dim=shared, keepdim=True)
        high = torch.where(real, values, -torch.inf).amax(dim=shared, keepdim=True)
        scale = torch.where(low == high, 1.0, (squares / count).sqrt())
        return cls(mean[0, 0].to(values.dtype), scale[0, 0].to(values.dtype))

    def extra_repr(self) -> str:
        """The shape of the statistics."""
        return "x".join(str(n) for n in self.loc.shape)

    def forward(self, values: Tensor) -> Tensor:
        """Standardise."""
        self._check(values)
        return (values - self.loc.to(values.dtype)) / self.scale.to(values.dtype)

    def undo(self, values: Tensor) -> Tensor:
        r"""Return values (\*S, \*B, T, \*E) in their units: a mean, or draws. A standard deviation takes `scale` alone.

        Raises:
            ValueError: Values whose steps have another shape.
        """
        self._check(values)
        return values * self.scale.to(values.dtype) + self.loc.to(values.dtype)

    def _check(self, values: Tensor) -> None:
        step = values.shape[values.dim() - self.loc.dim() :]
        if values.dim() <= self.loc.dim() or any(
            mine not in (1, n) for mine, n in zip(self.loc.shape, step, strict=True)
        ):
            raise ValueError(
                f"values: shape is {tuple(values.shape)}, expected (*B, T, *E) with steps E of {tuple(self.loc.shape)} "
                "(1 is any size)"
            )
