"""Draws of a forecast or an imputation: checks, errors and quantiles, without what is padding or was not observed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from seqdisent.masks import check_mask, expand_observed


class Errors(NamedTuple):
    r"""Errors of draws.

    Attributes:
        errors: draws - target, (S, B, T, \*E), in float32 at least; 0 where nothing is scored.
        scored: (B, T, \*E) bool.
        target: (B, T, \*E), 0 where nothing is scored.
    """

    errors: Tensor
    scored: Tensor
    target: Tensor


def errors_of_draws(draws: Tensor, target: Tensor, mask: Tensor | None, observed: Tensor | None) -> Errors:
    r"""Return draws (S, B, T, \*E) minus their target (B, T, \*E), where steps are real and were observed.

    Raises:
        TypeError: `draws` or `target` is not floating point; `mask` or `observed` is not bool.
        ValueError: fewer than two draws, a shape or device that does not fit, or a scored value that is not finite.
    """
    check_floating("draws", draws)
    check_floating("target", target)
    if draws.ndim < 3 or len(draws) < 2:
        raise ValueError(f"draws: has shape {tuple(draws.shape)}, expected (S, B, T, *E) with at least S=2 draws")
    if target.shape != draws.shape[1:]:
        raise ValueError(
            f"target: has shape {tuple(target.shape)}, expected that of a draw, {tuple(draws.shape[1:])}, of draws "
            f"{tuple(draws.shape)}"
        )
    if target.device != draws.device:
        raise ValueError(f"target: is on {target.device}, expected {draws.device}, where the draws are")
    scored = known_places(target, mask, observed)
    check_finite("target", target, scored)
    check_finite("draws", draws, scored)
    dtype = torch.promote_types(torch.promote_types(draws.dtype, target.dtype), torch.float32)
    target = torch.where(scored, target.to(dtype), 0.0)
    return Errors(torch.where(scored, draws.to(dtype) - target, 0.0), scored, target)


def known_places(values: Tensor, mask: Tensor | None, observed: Tensor | None) -> Tensor:
    r"""Return which of values (B, T, \*E) are real and were observed, bool of their shape.

    Raises:
        TypeError: `mask` or `observed` is not bool.
        ValueError: `mask` or `observed` does not fit the values.
    """
    known = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
    if mask is not None:
        known = check_mask(mask, values.shape[:1], values.shape[1], values.device)
    known = known.reshape(known.shape + (1,) * (values.ndim - 2))
    if observed is not None:
        observed = expand_observed(observed, values.shape[:2], values.shape[2:], values.device)
        known = known & observed.reshape(observed.shape + (1,) * (values.ndim - observed.ndim))
    return known.expand(values.shape)


def check_floating(name: str, values: Tensor) -> None:
    """Raise TypeError unless `values` is floating point."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        found = f"dtype {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name}: got {found}, expected a floating-point tensor")


def check_finite(name: str, values: Tensor, known: Tensor) -> None:
    """Raise ValueError if a value is NaN or infinite where it is known."""
    wrong = int((~values.isfinite() & known).sum())
    if wrong:
        raise ValueError(
            f"{name}: got {wrong} values that are not finite, expected finite ones at all real steps that `observed` "
            "does not leave out"
        )


def check_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """Return the levels as floats.

    Raises:
        ValueError: none, one that is no number in (0, 1), or the same twice.
    """
    found = () if isinstance(levels, numbers.Real) else tuple(levels)
    if any(not isinstance(level, numbers.Real) or not 0 < level < 1 for level in found):
        found = ()
    if not found or len(set(found)) < len(found):
        raise ValueError(f"levels: got {levels!r}, expected different numbers above 0 and below 1, such as (0.5, 0.9)")
    return tuple(float(level) for level in found)


def quantiles(draws: Tensor, levels: Sequence[float]) -> Tensor:
    r"""Return quantiles (L, \*X) of draws (S, \*X), linear between the draws.

    As torch.quantile, which refuses more than 2^24 values in the older releases of torch that this package works with.
    """
    ordered = draws.sort(0).values
    positions = [level * (len(draws) - 1) for level in levels]
    return torch.stack(
        [torch.lerp(ordered[math.floor(at)], ordered[math.ceil(at)], at - math.floor(at)) for at in positions]
    )
