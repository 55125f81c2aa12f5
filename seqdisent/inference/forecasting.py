"""Sequences continued by a model, under inputs of the steps to come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro.distributions import TorchDistribution
from torch import Tensor

from seqdisent._checks import check_positive
from seqdisent.chains.factorised import as_chain
from seqdisent.inference.arguments import continued, taken_apart
from seqdisent.inference.programs import Used, carries_on, drawn_at_once, emit, inferred, past_of, values_of


def forecast(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_steps: int,
    num_samples: int | None = None,
    sample: bool = True,
    history: bool = False,
    future: Mapping[str, Tensor] | None = None,
    **inputs: Any,
) -> dict[str, TorchDistribution]:
    r"""Continue sequences by `num_steps` steps of the model's prior.

    The future of a shorter sequence begins right after its own last step: of row b with T_b real steps, the forecast is
    steps T_b ... T_b + num_steps - 1, counted from 0. What follows them in that row is no forecast.

    Args:
        model: a Pyro model whose trajectories are chains (a :class:`~seqdisent.MarkovChain`, say).
        guide: its guide.
        *args: as of :func:`reconstruct`, one frame or more.
        num_steps: how many steps to add.
        num_samples: S, how many futures of each sequence; they are drawn at once, in a plate on the left of the
            programs' own. None for one.
        sample: draw the latents, or feed each conditional's mean forward.
        history: give the model ``history=(frames, known)``.
        future: {input: its values at the steps to come, (B, num_steps, \*X)}, for inputs that have a value for each
            step, (B, T, \*X), such as covariates. The guide reads what was given for T steps, the model all
            T + num_steps: the future of row b stands right after the row's own last step, and its last value is
            repeated behind it. Covariates that are given must be in it; None in the place of their values if both
            programs read them as they are, such as one vector a sequence.
        **inputs: further arguments of both, given to both as they are.

    Returns:
        {emission site: its distribution} over T + num_steps steps, those of the given frames first; with `num_samples`,
        its batch is (S, B). Its mean leaves out the emission's noise: ``.sample()`` draws observations, whose quantiles
        are intervals.

    Raises:
        TypeError: as :func:`reconstruct`; `future` is no mapping to tensors.
        ValueError: as there; fewer than one step to add; covariates without a `future`; a `future` that names no input
            that was given for T steps, or has another shape, dtype or device; inputs of the model that end too early; a
            model in which no latent and no `history` carries the frames into the future, or frames that are a chain;
            `num_samples` with means.
        RuntimeError: a program that fails with draws on the left of its own dimensions.

    Example:
        The chain that doubles, continued from two frames.

        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from seqdisent import MarkovChain
        >>> def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        ...     with pyro.plate("sequences", num_sequences):
        ...         start = dist.Normal(torch.zeros(num_sequences, 1), 1.0).to_event(1)
        ...         double = lambda z_prev: dist.Normal(2 * z_prev, 0.1).to_event(1)
        ...         z = pyro.sample("z", MarkovChain(start, double, num_steps))
        ...         pyro.sample("x", dist.Normal(z.squeeze(-1), 0.1).to_event(1), obs=frames)
        >>> def guide(frames, mask=None):
        ...     with pyro.plate("sequences", len(frames)):
        ...         pyro.sample("z", dist.Normal(frames.unsqueeze(-1), 0.1).to_event(2))
        >>> forecast(model, guide, torch.tensor([[1.0, 2.0]]), num_steps=2, sample=False)["x"].mean
        tensor([[1., 2., 4., 8.]])

        What is done at each step moves a level; two futures of the same past.

        >>> def driven(frames=None, mask=None, observed=None, covariates=None, *, num_sequences=None, num_steps=None):
        ...     move = lambda z_prev, done: dist.Normal(z_prev + done, 0.1).to_event(1)
        ...     with pyro.plate("sequences", num_sequences):
        ...         start = dist.Normal(torch.zeros(num_sequences, 1), 1.0).to_event(1)
        ...         z = pyro.sample("z", MarkovChain(start, move, num_steps, inputs=covariates))
        ...         pyro.sample("x", dist.Normal(z.squeeze(-1), 0.1).to_event(1), obs=frames)
        >>> def driven_guide(frames, mask=None, observed=None, covariates=None):
        ...     with pyro.plate("sequences", len(frames)):
        ...         pyro.sample("z", dist.Normal(frames.unsqueeze(-1), 0.1).to_event(2))
        >>> given = torch.tensor([[0.0, 1.0]]), None, None, torch.ones(1, 2, 1)
        >>> for done in (torch.ones(1, 3, 1), -torch.ones(1, 3, 1)):
        ...     future = {"covariates": done}
        ...     print(forecast(driven, driven_guide, *given, num_steps=3, future=future, sample=False)["x"].mean)
        tensor([[0., 1., 2., 3., 4.]])
        tensor([[ 0.,  1.,  0., -1., -2.]])
    """
    check_positive(num_steps=num_steps)
    if num_samples is not None and not sample:
        raise ValueError(f"num_samples: got {num_samples} with sample=False, expected None for means")

    given = taken_apart("args", args, inputs)
    frames, longer = given.frames, continued(given, future, num_steps)

    def use(model: Callable[..., Any], guide: Callable[..., Any]) -> Used:
        sites, read = inferred(guide, given, sample, history)
        read = {name: value for name, value in read.items() if name != "observed"} | longer  # nothing is, of the future
        total, past = frames.shape[1] + num_steps, past_of(sites, len(frames), dict.fromkeys(sites, given.mask))
        return Used(*emit(model, values_of(sites), (len(frames), total), None, sample, read, past), sites)

    emitted, trace, sites = drawn_at_once(use, model, guide, num_samples)
    for name, fn in emitted.items():
        if not history and as_chain(fn) is not None and carries_on(fn):
            raise ValueError(
                f"site {name!r}: is a chain of frames, whose forecast would not follow the given ones; expected "
                f"independent steps, or go on with extend(frames, num_steps) of the chain that `reconstruct` returns"
            )
    if not history and not any(carries_on(trace[name]["fn"]) for name in values_of(sites)):
        raise ValueError(
            "model: has no latent that carries the frames into the future, so the forecast would ignore them; expected "
            "a chain or a static latent, or history=True for a model that reads its own frames"
        )
    return emitted
