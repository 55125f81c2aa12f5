"""What of a data set's tensors is real: filler in holes and padding is replaced where the data come in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqdisent.datasets._checks import check_tensor


def beside(steps: Tensor, values: Tensor) -> Tensor:
    r"""Return `steps` (N, T), or what has the values' shape already, so that it broadcasts with values (N, T, \*E)."""
    return steps.reshape(steps.shape + (1,) * (values.dim() - steps.dim()))


def measured_steps(observed: Tensor) -> Tensor:
    r"""Return at which steps (N, T) something was measured, of observed (N, T) or (N, T, \*E)."""
    return observed.flatten(2).any(dim=2) if observed.dim() > 2 else observed


def settle_observed(observed: Tensor | None, values: Tensor, mask: Tensor, names: Sequence[str]) -> Tensor | None:
    r"""Check and return what was measured, False in padding; derived from NaN where it is not given.

    Args:
        observed: (N, T) or (N, T, \*E), or None.
        values: (N, T, \*E).
        mask: (N, T) bool.
        names: of the sequences.

    Returns:
        Bool (N, T), or (N, T, \*E) where a step may be measured in part; None if it was not given and nothing is NaN.
    """
    if observed is None:
        if not values.is_floating_point() or not bool((values.isnan() & beside(mask, values)).any()):
            return None
        observed = ~values.isnan()
        whole = observed.flatten(2).all(dim=2)
        if torch.equal(observed.flatten(2).any(dim=2), whole):
            observed = whole
    elif not isinstance(observed, Tensor) or observed.dtype != torch.bool:
        kind = observed.dtype if isinstance(observed, Tensor) else type(observed).__name__
        raise TypeError(f"observed: got {kind}, expected a tensor of bool")
    elif observed.shape not in (values.shape[:2], values.shape):
        raise ValueError(
            f"observed: shape is {tuple(observed.shape)}, expected {tuple(values.shape[:2])} or {tuple(values.shape)}"
        )
    observed = observed.to(values.device)
    observed = observed & beside(mask, observed)
    _check_each(observed.flatten(1).any(dim=1), names, "observed: nothing was measured in", "at least one value")
    return observed


def settle_values(values: Tensor, real: Tensor, names: Sequence[str]) -> Tensor:
    r"""Check and return floating point values (N, T, \*E), 0 where nothing is `real`, (N, T) or of their shape."""
    real = beside(real, values)
    finite = values.isfinite()
    _check_each(
        (finite | ~real).flatten(1).all(dim=1), names, "values: not finite in", "finite values where it was measured"
    )
    return values if bool(real.all()) else torch.where(real, values, values.new_zeros(()))


def settle_times(times: Tensor, mask: Tensor, names: Sequence[str]) -> Tensor:
    """Check and return when each step (N, T) was, 0 in padding."""
    check_tensor("times", times, "floating")
    if times.shape != mask.shape:
        raise ValueError(f"times: shape is {tuple(times.shape)}, expected {tuple(mask.shape)}, one for each step")
    times = times.to(mask.device)
    _check_each((times.isfinite() | ~mask).all(dim=1), names, "times: not finite in", "a number in each real step")
    later = (times.diff(dim=1) > 0) | ~mask[:, 1:]
    _check_each(later.all(dim=1), names, "times: do not increase in", "each real step later than the one before")
    return torch.where(mask, times, times.new_zeros(()))


def settle_covariates(
    covariates: Tensor, values: Tensor, lengths: Tensor, names: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Check and return known inputs (N, T + H, X), and for how many steps they are known, (N,).

    They are known up to the first step that is not finite; from there on, the last one before is repeated. A row of T
    steps that are all finite is known up to its own length: what follows is padding. H is the longest known future.
    Their dtype becomes that of the batches.
    """
    check_tensor("covariates", covariates, "floating")
    count, num_steps = values.shape[:2]
    if covariates.dim() != 3 or len(covariates) != count or covariates.shape[1] < num_steps or 0 in covariates.shape:
        raise ValueError(
            f"covariates: shape is {tuple(covariates.shape)}, expected ({count}, {num_steps} or more, X), not empty"
        )
    covariates = covariates.to(values.device, values.dtype if values.is_floating_point() else torch.float32)
    known = covariates.isfinite().all(dim=2).cumprod(dim=1).sum(dim=1)
    _check_each(known >= lengths, names, "covariates: end early in", "finite values in each of its real steps")
    if covariates.shape[1] == num_steps:
        known = known.where(known < num_steps, lengths)
    if int(known.min()) == covariates.shape[1]:
        return covariates, known
    steps = torch.arange(max(num_steps, int(known.max())), device=values.device).minimum(known[:, None] - 1)
    return covariates.gather(1, steps[:, :, None].expand(-1, -1, covariates.shape[2])), known


def mark_unknown(covariates: Tensor, known: Tensor) -> Tensor:
    """Return covariates with one step more, NaN from step `known` (N,) on, as the constructor reads it."""
    longer = torch.cat([covariates, covariates[:, :1]], dim=1)
    beyond = torch.arange(longer.shape[1], device=known.device) >= known[:, None]
    return longer.masked_fill(beyond[:, :, None], torch.nan)


def _check_each(good: Tensor, names: Sequence[str], what: str, wanted: str) -> None:
    """Raise ValueError with the first sequence that is not `good` (N,)."""
    if not bool(good.all()):
        row = int((~good).nonzero()[0])
        raise ValueError(f"{what} sequence {row} ({names[row]!r}), expected {wanted}")
