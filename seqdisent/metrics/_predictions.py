"""Predictions and labels: checks, and conversion to class numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seqdisent._checks import check_positive


def as_tensor(argument: str, values: object) -> Tensor:
    """Return a tensor, or an array or list of numbers, as a tensor.

    Raises:
        TypeError: anything else.
    """
    try:
        return values if isinstance(values, Tensor) else torch.tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{argument}: got {type(values).__name__}, expected a tensor, or an array or list of numbers ({error})"
        ) from error


def check_classes(num_classes: Mapping[str, int]) -> dict[str, int]:
    """Check and return {factor: number of classes}."""
    if not num_classes:
        raise ValueError("num_classes: is empty, expected at least one factor")
    check_positive(**{f"num_classes[{name!r}]": count for name, count in num_classes.items()})
    return dict(num_classes)


def check_factor(argument: str, values: Mapping[str, object], name: str, num_classes: Mapping[str, int]) -> None:
    """Raise ValueError unless `values` has the factor `name` of `num_classes`."""
    if name not in values:
        raise ValueError(f"{argument}: has no factor {name!r}, expected all of {sorted(num_classes)}")


def class_numbers(
    argument: str,
    values: Mapping[str, Tensor],
    num_classes: Mapping[str, int],
    *,
    device: torch.device,
    count: int | None = None,
) -> dict[str, Tensor]:
    """Return the class numbers (N,) of each factor, from class numbers or logits (N, K).

    Args:
        argument: name of the values, for the message.
        values: {factor: class numbers or logits}; factors that are not in `num_classes` are ignored.
        num_classes: {factor: K}.
        device: device of the result.
        count: the expected N; None for any, the same for all factors.

    Raises:
        TypeError: a factor's values are not numbers.
        ValueError: a factor that is missing, or has another shape, a value out of range or a logit that is NaN.
    """
    numbers = {}
    for name, size in num_classes.items():
        check_factor(argument, values, name, num_classes)
        what = f"{argument}[{name!r}]"
        value = as_tensor(what, values[name]).detach()
        if value.is_floating_point():
            value = check_logits(what, value, size).argmax(-1)
        if value.ndim != 1 or value.dtype == torch.bool:
            raise ValueError(
                f"{what}: has shape {tuple(value.shape)} and dtype {value.dtype}, expected class numbers (N,) or "
                f"floating-point logits (N, {size})"
            )
        count = len(value) if count is None else count
        if len(value) != count:
            raise ValueError(f"{what}: has {len(value)} values, expected {count}, as many as the others")
        if count and not 0 <= int(value.min()) <= int(value.max()) < size:
            raise ValueError(
                f"{what}: has values from {int(value.min())} to {int(value.max())}, expected 0 to {size - 1}"
            )
        numbers[name] = value.to(device, torch.long)
    return numbers


def check_logits(what: str, logits: Tensor, size: int) -> Tensor:
    """Check and return logits (N, size), without NaN and +inf, and with a finite one in each row."""
    if not logits.is_floating_point() or logits.ndim != 2 or logits.shape[-1] != size:
        raise ValueError(
            f"{what}: has shape {tuple(logits.shape)} and dtype {logits.dtype}, expected floating-point logits "
            f"(N, {size})"
        )
    if bool((logits.isnan() | logits.isposinf()).any()) or bool(logits.isneginf().all(-1).any()):
        raise ValueError(f"{what}: has a row with NaN, inf or nothing but -inf, expected logits of a distribution")
    return logits


def shares(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the accuracy of counts (target, prediction), and that of the best constant prediction."""
    total = table.sum()
    return table.diagonal().sum() / total, table.sum(1).max() / total


def tabulate(target: Tensor, predicted: Tensor, size: int) -> Tensor:
    """Return the confusion matrix (size, size), with targets in rows and predictions in columns."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    table: Tensor = multiclass_confusion_matrix(predicted, target, size, validate_args=False)
    return table
