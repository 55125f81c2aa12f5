"""Sequences with holes, filled by the posterior predictive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from seqdisent.chains import IndependentSteps
from seqdisent.chains.factorised import as_chain, as_steps, coordinates
from seqdisent.inference.arguments import taken_apart
from seqdisent.inference.programs import Used, drawn_at_once, emit, inferred, values_of
from seqdisent.masks import expand_observed


class Imputed(NamedTuple):
    r"""What a model says of sequences where they were not observed.

    Attributes:
        distribution: the emission, given the latents: at their posterior means, or at S draws, which are a dimension on
            the left of its batch.
        values: (B, T, \*E), or (S, B, T, \*E): the sequences, with the distribution's mean, or draws of it, in holes
            and in padding.
    """

    distribution: TorchDistribution
    values: Tensor


def impute(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    observed: Tensor | None = None,
    num_samples: int | None = None,
    emission: str | None = None,
    history: bool = False,
    **inputs: Any,
) -> Imputed:
    r"""Fill holes by the posterior predictive: infer latents from what was observed, decode all steps.

    Args:
        model: a Pyro model with an argument `observed`, whose steps are independent given the latents.
        guide: its guide, with that argument too.
        *args: sequences (B, T, \*E), NaN or anything in their holes, and, by position, a mask where they are ragged,
            `observed` and covariates.
        observed: (B, T) or (B, T, \*E) bool, True where measured.
        num_samples: S, how many joint draws of latents and observations; they are drawn at once, in a plate on the
            left of the programs' own. None for the latents' means and the mean of what was missing.
        emission: the model's site that emits the sequences; None for the only one of their shape.
        history: give the model ``history=(sequences, known)``; in holes it reads what it makes itself.
        **inputs: further arguments of both.

    Returns:
        :class:`~seqdisent.inference.Imputed`. A mean is no interval: quantiles of draws are. A draw has a gradient
        where the emission has an ``rsample``.

    Raises:
        TypeError: as :func:`reconstruct`; `observed` is not bool, or missing.
        ValueError: as there; `observed` of another shape; no or several emissions of the sequences' shape; one whose
            steps are not independent, or not its coordinates where these were observed in part, or that has another
            batch than the sequences; without `num_samples`, one that has no mean.
        RuntimeError: a program that fails with draws on the left of its own dimensions.

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
        >>> impute(model, guide, x, observed=~x.isnan()).values
        tensor([[1., 3., 2.]])
        >>> impute(model, guide, x, observed=~x.isnan(), num_samples=7).values.shape
        torch.Size([7, 1, 3])
    """
    sample = num_samples is not None
    given = taken_apart("args", args, inputs if observed is None else {"observed": observed, **inputs})
    frames, mask, observed = given.frames, given.mask, given.inputs.get("observed")
    if observed is None:
        raise TypeError("observed: got None, expected a bool tensor, True where measured: ~values.isnan(), say")

    def use(model: Callable[..., Any], guide: Callable[..., Any]) -> Used:
        sites, read = inferred(guide, given, sample, history)
        return Used(*emit(model, values_of(sites), frames.shape[:2], mask, sample, read), sites)

    emitted = drawn_at_once(use, model, guide, num_samples).emitted
    known = expand_observed(observed, frames.shape[:2], frames.shape[2:], frames.device)
    fn = _emission(emitted, emission, frames, num_samples, by_coordinate=known.ndim > 2)
    known = known if mask is None else known & mask.reshape(mask.shape + (1,) * (known.ndim - 2))
    known = known.reshape(known.shape + (1,) * (frames.ndim - known.ndim))
    drawn = (fn.rsample() if fn.has_rsample else fn.sample()) if sample else _mean(fn)
    return Imputed(fn, torch.where(known, frames, drawn))


def _emission(
    emitted: dict[str, TorchDistribution],
    name: str | None,
    frames: Tensor,
    num_samples: int | None,
    *,
    by_coordinate: bool,
) -> TorchDistribution:
    """Return the emission of the sequences, if each of its holes can be filled by itself."""
    fitting = [site for site, fn in emitted.items() if fn.event_shape == frames.shape[1:]]
    if name is None and len(fitting) == 1:
        name = fitting[0]
    if name not in fitting:
        raise ValueError(
            f"emission: got {name!r}, expected one of {fitting}, the model's emissions with event shape "
            f"{tuple(frames.shape[1:])}, that of the sequences"
        )
    fn = emitted[name]
    steps = as_chain(fn) or as_steps(fn)
    if not isinstance(steps, IndependentSteps):
        raise ValueError(f"emission: {name!r} is a {type(fn).__name__}, expected IndependentSteps given the latents")
    if by_coordinate and frames.ndim > 2 and coordinates(steps.step_distribution) is None:
        raise ValueError(
            f"emission: {name!r} has steps whose coordinates depend on each other, expected `observed` (B, T) for it"
        )
    wanted = frames.shape[:1] if num_samples is None else torch.Size([num_samples, len(frames)])
    if fn.batch_shape != wanted:
        raise ValueError(f"emission: {name!r} has batch shape {tuple(fn.batch_shape)}, expected {tuple(wanted)}")
    return fn


def _mean(fn: TorchDistribution) -> Tensor:
    try:
        mean: Tensor = fn.mean
    except NotImplementedError:
        mean = torch.full((1,), torch.nan)
    if mean.isnan().all():
        raise ValueError("num_samples: got None, expected a number of draws: this emission has no mean")
    return mean
