"""Sequences with holes, filled by the posterior predictive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from seqdisent.inference.programs import drawn_at_once, emit, inferred, values_of
from seqdisent.masks import check_observed


class Imputed(NamedTuple):
    r"""What a model says of one emission site where it was not observed.

    Attributes:
        distribution: the posterior predictive given the latents: at their posterior means, or at S draws, which are a
            dimension on the left of its batch.
        values: (B, T, \*E), or (S, B, T, \*E): the sequences, with the distribution's mean, or draws, in the holes.
    """

    distribution: TorchDistribution
    values: Tensor


def impute(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    observed: Tensor,
    num_samples: int | None = None,
    **inputs: Any,
) -> dict[str, Imputed]:
    r"""Fill holes by the posterior predictive: infer latents from what was observed, decode all steps.

    Args:
        model: a Pyro model with an argument `observed`.
        guide: its guide, with one too.
        *args: sequences (B, T, \*E), NaN or anything in their holes, and a mask where they are ragged.
        observed: (B, T) or (B, T, \*E) bool, True where measured.
        num_samples: S, how many joint draws of latents and observations; they are drawn at once, in a plate on the
            left of the programs' own. None for the latents' means and the mean of what was missing.
        **inputs: further arguments of both.

    Returns:
        {emission site with the shape of the sequences: :class:`~seqdisent.inference.Imputed`}. The mean of an emission
        is no interval: quantiles of draws are.

    Raises:
        TypeError: as :func:`reconstruct`; `observed` is not bool.
        ValueError: as there; `observed` of another shape, or no emission site has the sequences' shape.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from seqdisent import IndependentSteps
        >>> def model(x=None, mask=None, observed=None, *, num_sequences=None, num_steps=None):
        ...     with pyro.plate("sequences", num_sequences):
        ...         level = pyro.sample("level", dist.Normal(0.0, 1.0))
        ...         step = dist.Normal(level.unsqueeze(-1).expand(*level.shape, num_steps), 0.1)
        ...         pyro.sample("x", IndependentSteps(step, mask, observed), obs=x)
        >>> def guide(x, mask=None, observed=None):
        ...     with pyro.plate("sequences", len(x)):
        ...         pyro.sample("level", dist.Normal(x.nanmean(-1), 0.1))
        >>> x = torch.tensor([[1.0, 3.0, torch.nan]])
        >>> impute(model, guide, x, observed=~x.isnan())["x"].values
        tensor([[1., 3., 2.]])
        >>> impute(model, guide, x, observed=~x.isnan(), num_samples=7)["x"].values.shape
        torch.Size([7, 1, 3])
    """
    guide, model = drawn_at_once(model, guide, args, num_samples, {"observed": observed, **inputs})
    sample = num_samples is not None
    frames, mask, sites, read = inferred(guide, args, sample, False, {"observed": observed, **inputs})
    emitted = emit(model, values_of(sites), frames.shape[:2], mask, sample, read)[0]
    emitted = {name: fn for name, fn in emitted.items() if fn.event_shape == frames.shape[1:]}
    if not emitted:
        raise ValueError(
            f"model: has no emission with event shape {tuple(frames.shape[1:])}, that of the sequences to be filled"
        )
    observed = check_observed(observed, frames.shape[:2], frames.shape[2:])
    observed = observed.reshape(observed.shape + (1,) * (frames.ndim - observed.ndim))
    return {
        name: Imputed(fn, torch.where(observed, frames, fn.sample() if sample else fn.mean))
        for name, fn in emitted.items()
    }
