r"""Inference with a trained model: infer, reconstruct, swap, generate, forecast; for any model and guide, by site name.

Models and guides are Pyro programs of this form:

.. code-block:: python

    model(frames=None, mask=None, *, num_sequences=None, num_steps=None, **inputs)   # frames=None: nothing is observed
    guide(frames, mask=None, **inputs)

A model whose steps read the frames before them (a VRNN) has one more argument, `history`. With ``history=True``,
`reconstruct` and `forecast` give it ``(frames, known)``, which it reads in place of its own frames; `known` is the
mask, without what was not observed. Elsewhere, and in `generate` and `swap`, it reads what it makes itself
(:func:`~seqdisent.feedback` makes such inputs).

Where sequences have holes, pass ``observed=`` to `infer`, `reconstruct` and `forecast`, bool (B, T) or (B, T, \*E):
guide and model have that argument too. :func:`~seqdisent.impute` fills holes.

No function here changes a mode or a gradient: call ``.eval()`` and use ``torch.no_grad()`` as with a module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pyro.distributions import TorchDistribution
from torch import Tensor

from seqdisent._checks import check_positive
from seqdisent.chains.factorised import as_chain
from seqdisent.inference.plates import Site
from seqdisent.inference.programs import (
    Used,
    carries_on,
    check_means,
    drawn_at_once,
    emit,
    inferred,
    past_of,
    run,
    taken_apart,
    values_of,
    without_factors,
)


class Inferred(NamedTuple):
    """What a guide says of one latent site.

    Attributes:
        distribution: the posterior, given the values of the sites before it.
        value: its mean (for a chain, every conditional's mean in turn), or a sample.
    """

    distribution: TorchDistribution
    value: Tensor


def infer(guide: Callable[..., Any], *args: Any, sample: bool = False, **inputs: Any) -> dict[str, Inferred]:
    r"""Run the guide and return {site: its distribution and value}.

    Args:
        guide: a Pyro guide.
        *args: frames, and a mask (\*B, T) where they are ragged.
        sample: draw every site, or feed each conditional's mean forward.
        **inputs: further arguments of the guide.

    Returns:
        {site: :class:`~seqdisent.inference.Inferred`}, in the guide's order.

    Raises:
        ValueError: without `sample`, a site that has no mean (a flow); so do the other functions here.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> def guide(frames, mask=None):
        ...     with pyro.plate("sequences", len(frames)):
        ...         return pyro.sample("s", dist.Normal(frames.mean(1), 1.0))
        >>> infer(guide, torch.ones(2, 3))["s"].value
        tensor([1., 1.])
    """
    return {name: Inferred(site["fn"], site["value"]) for name, site in run(guide, {}, sample, args, inputs).items()}


def reconstruct(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    sample: bool = False,
    history: bool = False,
    **inputs: Any,
) -> dict[str, TorchDistribution]:
    """Encode and decode: return {emission site: its distribution given the inferred latents}.

    Args:
        model: a Pyro model.
        guide: its guide.
        *args: frames, and a mask where they are ragged.
        sample: draw the latents, or use their means.
        history: give the model ``history=(frames, known)``.
        **inputs: further arguments of both.

    Returns:
        {emission site: its distribution}. The emission sites are those of the model that the guide does not have; a
        distribution's mean is the picture, in the unit of the frames.

    Raises:
        TypeError: no frames, a mask that is not bool, or `history` of a model without that argument.
        ValueError: frames without a step or with real steps that are not finite, a mask with a hole, or a site of the
            guide that the model does not have.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        ...     with pyro.plate("sequences", num_sequences):
        ...         level = pyro.sample("level", dist.Normal(0.0, 1.0))
        ...         x = dist.Normal(level.unsqueeze(-1).expand(-1, num_steps), 0.1).to_event(1)
        ...         pyro.sample("x", x, obs=frames)
        >>> def guide(frames, mask=None):
        ...     with pyro.plate("sequences", len(frames)):
        ...         pyro.sample("level", dist.Normal(frames.mean(-1), 0.1))
        >>> reconstruct(model, guide, torch.tensor([[1.0, 2.0, 6.0]]))["x"].mean
        tensor([[3., 3., 3.]])
    """
    frames, mask, sites, read = inferred(guide, args, sample, history, inputs)
    return emit(model, values_of(sites), frames.shape[:2], mask, sample, read)[0]


def swap(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    source: Tensor | Sequence[Any],
    donor: Tensor | Sequence[Any],
    *,
    sites: Sequence[str],
    keep: Sequence[str] = (),
    sample: bool = False,
    **inputs: Any,
) -> dict[str, TorchDistribution]:
    """Decode the source with some sites taken from a donor.

    `sites` come from the donor, `keep` from the source, and every other latent is inferred again from the source given
    those: in VDSM as in the paper, swapping d alone gives the poses z that the donor's dynamics imply; where q(z) reads
    frames too, as in the presets ``cpu``, name both. The guide then reads the
    source's mask: where it sums over a trajectory of the donor that has other real steps, name the site of the sum in
    `sites` or `keep`.

    Args:
        model: a Pyro model.
        guide: its guide.
        source: frames, or (frames, mask).
        donor: frames, or (frames, mask), as many sequences as the source.
        sites: latents that follow the donor. If a trajectory (a chain, or :class:`~seqdisent.IndependentSteps`) is
            among them, the result has the donor's length, and other trajectories, which are the source's, are cut to it
            or continued by the model.
        keep: latents that stay the source's though they depend on a swapped one.
        sample: draw the latents, or use their means.
        **inputs: further arguments of both programs.

    Returns:
        {emission site: its distribution}

    Raises:
        TypeError: source or donor is neither frames nor (frames, mask), or a mask is not bool.
        ValueError: a site that the guide does not have, one in both lists, none at all, or batches that differ.

    Example:
        Lines x_t = level + slope t; the source's level with the donor's slope.

        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        ...     with pyro.plate("sequences", num_sequences):
        ...         level = pyro.sample("level", dist.Normal(0.0, 1.0))
        ...         slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        ...         line = level[..., None] + slope[..., None] * torch.arange(num_steps)
        ...         pyro.sample("x", dist.Normal(line, 0.1).to_event(1), obs=frames)
        >>> def guide(frames, mask=None):
        ...     with pyro.plate("sequences", len(frames)):
        ...         pyro.sample("level", dist.Normal(frames[:, 0], 0.1))
        ...         pyro.sample("slope", dist.Normal(frames[:, 1] - frames[:, 0], 0.1))
        >>> source, donor = torch.tensor([[7.0, 7.0, 7.0]]), torch.tensor([[0.0, 2.0, 4.0]])
        >>> swap(model, guide, source, donor, sites=["slope"])["x"].mean
        tensor([[ 7.,  9., 11.]])
    """
    if "mask" in inputs:
        raise TypeError("mask: source and donor have one each, expected (frames, mask) for the ragged ones")
    if "observed" in inputs:
        raise TypeError("observed: source and donor would have one each, expected sequences without holes")
    source_args, frames, mask = taken_apart("source", source)
    donor_args, donor_frames, donor_mask = taken_apart("donor", donor)
    if len(frames) != len(donor_frames):
        raise ValueError(f"donor: has {len(donor_frames)} sequences, expected as many as the source, {len(frames)}")
    donor_sites = run(guide, {}, sample, donor_args, inputs)
    _check_names("sites", sites, "guide", donor_sites)
    _check_names("keep", keep, "guide", donor_sites)
    if not sites:
        raise ValueError(f"sites: is empty, expected at least one of {sorted(donor_sites)}")
    if both := sorted(set(sites) & set(keep)):
        raise ValueError(f"keep: {both} are in `sites` too, expected each site in one of the two")
    source_values = values_of(run(guide, {}, sample, source_args, inputs)) if keep else {}
    latents = {name: donor_sites[name]["value"] for name in sites} | {name: source_values[name] for name in keep}
    trajectories = [name for name in sites if as_chain(donor_sites[name]["fn"]) is not None]
    if set(latents) != set(donor_sites):  # something is left to infer, given these
        latents = values_of(run(guide, latents, sample, source_args, inputs))
    if not trajectories:
        return emit(model, latents, frames.shape[:2], mask, sample, inputs)[0]
    followers = dict.fromkeys(set(latents) - set(sites), mask)  # cut to the donor's length, or continued by the model
    past = past_of(donor_sites, len(frames), followers)
    return emit(model, latents, donor_frames.shape[:2], donor_mask, sample, inputs, past)[0]


def generate(
    model: Callable[..., Any],
    *,
    num_sequences: int,
    num_steps: int,
    given: Mapping[str, Tensor] | None = None,
    emissions: Sequence[str] | None = None,
    sample: bool = True,
    **inputs: Any,
) -> dict[str, TorchDistribution]:
    """Draw from the prior, at any length.

    The mean of what is returned leaves out the emission's noise; ``.sample()`` has it. Lengths are no part of the
    model: pass a mask for ragged sequences.

    Args:
        model: a Pyro model.
        num_sequences: how many.
        num_steps: how long; nothing ties it to the length of training clips.
        given: {site: value} of latents to hold fixed. A trajectory that is shorter than `num_steps` is continued.
        emissions: the sites to return; None for the model's last one.
        sample: draw the latents, or use each conditional's mean.
        **inputs: further arguments of the model.

    Returns:
        {emission site: its distribution}

    Raises:
        ValueError: `given` or `emissions` names a site that the model does not have, a value has another shape than
            its site, or the model has no site.
        TypeError: a value is no tensor.

    Example:
        A chain that doubles, from a given first step.

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
        >>> given = {"z": torch.tensor([[[3.0]]])}
        >>> generate(model, num_sequences=1, num_steps=4, given=given, sample=False)["x"].mean
        tensor([[ 3.,  6., 12., 24.]])
    """
    check_positive(num_sequences=num_sequences, num_steps=num_steps)
    given = dict(given or {})
    if wrong := [name for name, value in given.items() if not isinstance(value, Tensor)]:
        raise TypeError(f"given: {wrong[0]!r} is {type(given[wrong[0]]).__name__}, expected a tensor")
    arguments = {"num_sequences": num_sequences, "num_steps": num_steps, **inputs}
    trace = run(model, given, sample, (), arguments, num_steps=num_steps)
    _check_names("given", list(given), "model", trace)
    _check_names("emissions", emissions or (), "model", trace)
    shown = without_factors(trace)
    if not shown:
        raise ValueError("model: has no sample site, expected at least one that it emits")
    emitted = emissions or [shown[-1]]
    if not sample:
        check_means({name: site for name, site in trace.items() if name not in emitted})
    return {name: trace[name]["fn"] for name in emitted}


def forecast(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_steps: int,
    num_samples: int | None = None,
    sample: bool = True,
    history: bool = False,
    **inputs: Any,
) -> dict[str, TorchDistribution]:
    """Continue sequences by `num_steps` steps of the model's prior.

    Args:
        model: a Pyro model whose trajectories are chains (a :class:`~seqdisent.MarkovChain`, say).
        guide: its guide.
        *args: one frame or more, (B, T, ...), and a mask where they are ragged: a shorter sequence is continued from
            its own last frame.
        num_steps: how many steps to add.
        num_samples: S, how many futures of each sequence; they are drawn at once, in a plate on the left of the
            programs' own. None for one.
        sample: draw the latents, or feed each conditional's mean forward.
        history: give the model ``history=(frames, known)``.
        **inputs: further arguments of both; what the model reads step by step must cover T + num_steps.

    Returns:
        {emission site: its distribution} over T + num_steps steps, those of the given frames first; with `num_samples`,
        its batch is (S, B). Its mean leaves out the emission's noise: ``.sample()`` draws observations, whose quantiles
        are intervals.

    Raises:
        TypeError: as :func:`reconstruct`.
        ValueError: as there; fewer than one step to add, inputs of the model that end too early, a model in which no
            latent and no `history` carries the frames into the future, or frames that are a chain; `num_samples` with
            means.
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
    """
    check_positive(num_steps=num_steps)
    if num_samples is not None and not sample:
        raise ValueError(f"num_samples: got {num_samples} with sample=False, expected None for means")

    def use(model: Callable[..., Any], guide: Callable[..., Any]) -> Used:
        frames, mask, sites, read = inferred(guide, args, sample, history, dict(inputs))
        read = {name: value for name, value in read.items() if name != "observed"}  # nothing is, of the future
        total, past = frames.shape[1] + num_steps, past_of(sites, len(frames), dict.fromkeys(sites, mask))
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


def _check_names(argument: str, names: Sequence[str], program: str, sites: Mapping[str, Site]) -> None:
    """Raise unless `names` are sites of a program."""
    if isinstance(names, str):
        raise ValueError(f"{argument}: got the string {names!r}, expected a sequence of site names such as [{names!r}]")
    if unknown := sorted(set(names) - set(sites)):
        raise ValueError(f"{argument}: the {program} has no site {unknown}, expected some of {sorted(sites)}")
