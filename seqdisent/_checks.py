"""Argument checks that several blocks share; each raises an error that names the argument."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

_AT_ONCE = frozenset({"cpu"})  # device types


def reads_at_once(tensor: Tensor) -> bool:
    """Return whether the values of `tensor` can be read: no device is waited for, and no graph is being traced."""
    return tensor.device.type in _AT_ONCE and not torch.compiler.is_compiling()


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether `value` is a whole number of any library, such as NumPy; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_positive(**sizes: int) -> None:
    """Raise ValueError unless every size is an integer of at least 1.

    Example:
        >>> check_positive(num_experts=0)
        Traceback (most recent call last):
        ValueError: num_experts: got 0, expected an integer >= 1
    """
    for name, size in sizes.items():
        if not is_integer(size) or size < 1:
            raise ValueError(f"{name}: got {size!r}, expected an integer >= 1")


def check_context_dim(context_dim: int) -> None:
    """Raise ValueError unless `context_dim` is an integer of at least 0, which is no context."""
    if not is_integer(context_dim) or context_dim < 0:
        raise ValueError(f"context_dim: got {context_dim!r}, expected an integer >= 0")


def check_scale(**scales: float) -> None:
    """Raise ValueError unless every scale is a positive finite number."""
    for name, scale in scales.items():
        if not 0 < scale < math.inf:
            raise ValueError(f"{name}: got {scale!r}, expected a positive finite number")


def check_weights(weights: Mapping[str, Any], num_sequences: int) -> None:
    """Raise unless every weight of a term is a finite number, or a tensor of one or of `num_sequences` of them."""
    for site, weight in weights.items():
        if isinstance(weight, Tensor):
            if weight.ndim > 1 or (weight.ndim == 1 and len(weight) != num_sequences):
                raise ValueError(
                    f"weights[{site!r}]: has shape {tuple(weight.shape)}, expected () or ({num_sequences},) by sequence"
                )
        elif not isinstance(weight, numbers.Real):
            raise TypeError(f"weights[{site!r}]: got {type(weight).__name__}, expected a number, or a tensor of them")
        elif not math.isfinite(weight):
            raise ValueError(f"weights[{site!r}]: got {weight}, expected a finite number")


def check_last_dim(name: str, tensor: Tensor, size: int, wanted: str, *, ndim: int = 1) -> None:
    """Raise ValueError unless `tensor` has at least `ndim` dimensions and its last one is `size`."""
    if tensor.ndim < ndim:
        raise ValueError(f"{name}: has shape {tuple(tensor.shape)}, expected at least {ndim} dimensions")
    if tensor.shape[-1] != size:
        raise ValueError(f"{name}: last dimension is {tensor.shape[-1]}, expected {wanted}={size}")


def check_kind(name: str, tensor: Tensor, parameter: Tensor) -> None:
    """Raise unless `tensor` is where `parameter` is, and of its dtype where autocast does not see to that.

    Raises:
        ValueError: another device.
        TypeError: another dtype.

    Example:
        >>> check_kind("frames", torch.zeros(2, dtype=torch.float64), torch.nn.Linear(2, 1).weight)
        Traceback (most recent call last):
        TypeError: frames: has dtype torch.float64, expected torch.float32, that of the parameters
    """
    if tensor.device != parameter.device:
        raise ValueError(f"{name}: is on {tensor.device}, expected {parameter.device}, where the parameters are")
    if tensor.dtype != parameter.dtype and not torch.is_autocast_enabled(tensor.device.type):
        raise TypeError(f"{name}: has dtype {tensor.dtype}, expected {parameter.dtype}, that of the parameters")


def drops_out(module: nn.Module) -> str | None:
    """Return the type of a part of a module that drops units at random as it is now, or None.

    Example:
        >>> drops_out(nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1)))
        'Dropout'
    """
    for part in module.modules():
        has_rate = isinstance(part, nn.RNNBase | nn.MultiheadAttention)
        rate = part.dropout if has_rate else getattr(part, "p", 0)
        if part.training and rate and (has_rate or isinstance(part, nn.modules.dropout._DropoutNd)):
            return type(part).__name__
    return None


def check_recurrence(recurrence: nn.RNNBase, *, may_drop: bool = False) -> None:
    """Raise unless `recurrence` is a recurrent network of torch in one direction (without dropout)."""
    if not isinstance(recurrence, nn.GRU | nn.LSTM | nn.RNN):
        raise TypeError(f"recurrence: got {type(recurrence).__name__}, expected an nn.GRU, nn.LSTM or nn.RNN")
    if recurrence.bidirectional or recurrence.proj_size:
        raise ValueError("recurrence: has two directions or projections, expected one direction and none")
    if not may_drop and drops_out(recurrence):
        raise ValueError(
            "recurrence: drops units at random, so a path would be scored under another state than the one that drew "
            "it; remove the dropout or call .eval()"
        )


def check_steps(name: str, sequences: Tensor) -> None:
    r"""Raise ValueError unless sequences (\*B, T, D) have a step."""
    if sequences.shape[-2] == 0:
        raise ValueError(f"{name}: has length 0, expected at least one step")


def check_not_empty(name: str, batch_shape: Sequence[int], wanted: str = "sequence") -> None:
    """Raise ValueError if a batch shape holds nothing; `wanted` is what one of the batch is called."""
    if 0 in batch_shape:
        raise ValueError(f"{name}: has batch shape {tuple(batch_shape)}, expected at least one {wanted}")


def check_pixel_dtype(frames: Tensor) -> None:
    """Raise TypeError unless frames are floating point."""
    if not frames.is_floating_point():
        raise TypeError(f"frames: has dtype {frames.dtype}, expected floating point (pixels in [0, 1])")


def expand_to(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return `tensor` expanded to `shape`.

    Raises:
        ValueError: it does not expand to that.

    Example:
        >>> expand_to("context", torch.zeros(5, 2), (3, 2))
        Traceback (most recent call last):
        ValueError: context: has shape (5, 2), expected one that expands to (3, 2)
    """
    try:
        return tensor.expand(shape)
    except RuntimeError as error:
        raise ValueError(f"{name}: has shape {tuple(tensor.shape)}, expected one that expands to {shape}") from error


def check_batch_shapes(first: str, first_shape: Sequence[int], second: str, second_shape: Sequence[int]) -> None:
    """Raise ValueError unless both batch shapes are the same: nothing is broadcast silently."""
    if tuple(first_shape) != tuple(second_shape):
        raise ValueError(
            f"{second}: has batch shape {tuple(second_shape)}, expected that of {first}, {tuple(first_shape)}"
        )


def upsampling_channels(image_size: int, channels: Sequence[int] | None, *, first: int) -> tuple[int, ...]:
    """Return one channel count for each doubling between 4 pixels and `image_size`.

    Args:
        image_size: height and width in pixels, 4 * 2**n with n >= 1.
        channels: the counts themselves (n of them), or None for `first`, halved at each doubling.
        first: the count at 4 pixels when `channels` is None.

    Raises:
        ValueError: another image size, or a list of the wrong length.

    Example:
        >>> upsampling_channels(64, None, first=512)
        (512, 256, 128, 64)
    """
    if not is_integer(image_size) or image_size < 8 or image_size & (image_size - 1):
        raise ValueError(
            f"image_size: got {image_size!r}, expected one integer 4 * 2**n for square images (8, 16, 32, 64, 128, ...)"
        )
    num_doublings = int(image_size).bit_length() - 3
    if channels is None:
        channels = [max(1, first // 2**i) for i in range(num_doublings)]
    if len(channels) != num_doublings:
        raise ValueError(
            f"channels: got {len(channels)} values {tuple(channels)}, expected {num_doublings} for "
            f"image_size={image_size} (4 * 2**{num_doublings} pixels)"
        )
    for i, count in enumerate(channels):
        check_positive(**{f"channels[{i}]": count})
    return tuple(channels)
