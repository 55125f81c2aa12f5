r"""Inference with a trained model: infer, reconstruct, swap, generate, forecast; for any model and guide, by site name.

Models and guides are Pyro programs of this form:

.. code-block:: python

    model(frames=None, mask=None, *, num_sequences=None, num_steps=None, **inputs)   # frames=None: nothing is observed
    guide(frames, mask=None, **inputs)

Two inputs have a place of their own, after the mask, and reach the programs by name where they are not None:

- `observed`, where sequences have holes: bool (B, T) or (B, T, \*E). :func:`~seqdisent.impute` fills holes.
- `covariates`, what is known of each step beside the frames: (B, T, X). Where a model reads them to make the frames,
  `forecast` needs those of the steps to come, ``future={"covariates": (B, num_steps, X)}``.

So ``reconstruct(model, guide, frames, mask, observed, covariates)`` takes a batch as it is, up to any of these.
:func:`~seqdisent.elbo_terms` and `infer` hand on all arguments as they are; they take such a batch too if the programs
have these arguments in this order:
``model(frames=None, mask=None, observed=None, covariates=None, *, num_sequences=None, num_steps=None)``.

A model whose steps read the frames before them (a VRNN) has one more argument, `history`. With ``history=True``,
`reconstruct`, `impute` and `forecast` give it ``(frames, known)``, which it reads in place of its own frames; `known`
is the mask, without what was not observed. Elsewhere, and in `generate` and `swap`, it reads what it makes itself:
:func:`~seqdisent.feedback` makes such inputs, and says how draws, and not means, are fed back.

A site of the model that is marked ``infer={"is_auxiliary": True}`` is no emission.

No function here changes a mode or a gradient: call ``.eval()`` and use ``torch.no_grad()`` as with a module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pyro.distributions import TorchDistribution
from torch import Tensor

from seqdisent._checks import check_positive
from seqdisent.chains.factorised import as_chain
from seqdisent.inference.arguments import taken_apart
from seqdisent.inference.plates import Site
from seqdisent.inference.programs import check_means, emit, inferred, past_of, run, values_of, without_factors


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
        *args: what the guide takes, handed on as it is: frames, a mask (\*B, T) where they are ragged, `observed` and
            covariates where it has them.
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
        *args: frames (B, T, ...), and, by position, a mask (B, T) where they are ragged, `observed` and covariates.
        sample: draw the latents, or use their means.
        history: give the model ``history=(frames, known)``.
        **inputs: further arguments of both.

    Returns:
        {emission site: its distribution}. The emission sites are those of the model that the guide does not have; a
        distribution's mean is the picture, in the unit of the frames.

    Raises:
        TypeError: no frames, more than four arguments by position, one by position and by name, a mask that is not
            bool, or `history` of a model without that argument.
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
    given = taken_apart("args", args, inputs)
    sites, read = inferred(guide, given, sample, history)
    return emit(model, values_of(sites), given.frames.shape[:2], given.mask, sample, read)[0]


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
        source: frames, or (frames, mask, observed, covariates) up to any of these.
        donor: likewise, as many sequences as the source. The guide reads of each side its own. The model reads mask,
            `observed` and covariates of the side that gives the length.
        sites: latents that follow the donor. If a trajectory (a chain, or :class:`~seqdisent.IndependentSteps`) is
            among them, the donor gives the length, and other trajectories, which are the source's, are cut to it
            or continued by the model. Else the source gives it.
        keep: latents that stay the source's though they depend on a swapped one.
        sample: draw the latents, or use their means.
        **inputs: further arguments of both programs, the same for source and donor.

    Returns:
        {emission site: its distribution}

    Raises:
        TypeError: source or donor is neither frames nor a tuple that begins with them, a mask is not bool, or a mask or
            `observed` by name.
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
    for name in ("mask", "observed"):
        if inputs.get(name) is not None:
            raise TypeError(f"{name}: source and donor have one each, expected (frames, mask, observed) of either")
    of_source, of_donor = taken_apart("source", source, inputs), taken_apart("donor", donor, inputs)
    num_sequences = len(of_source.frames)
    if num_sequences != len(of_donor.frames):
        raise ValueError(
            f"donor: has {len(of_donor.frames)} sequences, expected as many as the source, {num_sequences}"
        )
    donor_sites = run(guide, {}, sample, of_donor.args, of_donor.inputs)
    _check_names("sites", sites, "guide", donor_sites)
    _check_names("keep", keep, "guide", donor_sites)
    if not sites:
        raise ValueError(f"sites: is empty, expected at least one of {sorted(donor_sites)}")
    if both := sorted(set(sites) & set(keep)):
        raise ValueError(f"keep: {both} are in `sites` too, expected each site in one of the two")
    source_values = values_of(run(guide, {}, sample, of_source.args, of_source.inputs)) if keep else {}
    latents = {name: donor_sites[name]["value"] for name in sites} | {name: source_values[name] for name in keep}
    trajectories = [name for name in sites if as_chain(donor_sites[name]["fn"]) is not None]
    if set(latents) != set(donor_sites):  # something is left to infer, given these
        latents = values_of(run(guide, latents, sample, of_source.args, of_source.inputs))
    past, shown = None, of_source
    if trajectories:  # the source's are cut to the donor's length, or continued by the model
        followers = dict.fromkeys(set(latents) - set(sites), of_source.mask)
        past, shown = past_of(donor_sites, num_sequences, followers), of_donor
    return emit(model, latents, shown.frames.shape[:2], shown.mask, sample, shown.inputs, past)[0]


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


def _check_names(argument: str, names: Sequence[str], program: str, sites: Mapping[str, Site]) -> None:
    """Raise unless `names` are sites of a program."""
    if isinstance(names, str):
        raise ValueError(f"{argument}: got the string {names!r}, expected a sequence of site names such as [{names!r}]")
    if unknown := sorted(set(names) - set(sites)):
        raise ValueError(f"{argument}: the {program} has no site {unknown}, expected some of {sorted(sites)}")
