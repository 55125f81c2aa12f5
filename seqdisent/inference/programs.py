"""Running model and guide: traced as they are, or with some sites given, continued, or at their means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from seqdisent._checks import check_positive
from seqdisent._random import kept_random_state
from seqdisent.chains import Chain, IndependentSteps
from seqdisent.chains.factorised import as_chain, as_steps
from seqdisent.inference.arguments import Given
from seqdisent.inference.plates import Site, by_row, check_plates, in_particle_plate, num_plates, sequences_plate
from seqdisent.masks import expand_observed


def batch_sizes(
    frames: Tensor | None, num_sequences: int | None = None, num_steps: int | None = None, **inputs: Tensor | None
) -> tuple[int, int]:
    r"""Return how many sequences of how many steps a program has: as the frames, or as asked where there are none.

    Args:
        frames: (B, T, \*E), or None where nothing is observed.
        num_sequences: B, without frames.
        num_steps: T, without frames.
        **inputs: what has a value at each step, (B, T, \*X), such as `covariates`, to be checked; None for none.

    Returns:
        B and T.

    Raises:
        ValueError: neither frames nor both numbers, or an input that has not B sequences of T steps.

    Example:
        >>> batch_sizes(torch.zeros(4, 20, 8)), batch_sizes(None, 2, 30)
        ((4, 20), (2, 30))
        >>> batch_sizes(torch.zeros(4, 20, 8), covariates=torch.zeros(4, 19, 1))
        Traceback (most recent call last):
        ValueError: covariates: has shape (4, 19, 1), expected (4, 20, ...), a value for each step
    """
    if frames is not None:
        num_sequences, num_steps = frames.shape[:2]
    if num_sequences is None or num_steps is None:
        raise ValueError("num_sequences, num_steps: got None without frames, expected both")
    for name, values in inputs.items():
        if values is not None and values.shape[:2] != (num_sequences, num_steps):
            raise ValueError(
                f"{name}: has shape {tuple(values.shape)}, expected ({num_sequences}, {num_steps}, ...), a value for "
                "each step"
            )
    return num_sequences, num_steps


def sample_sites(trace: poutine.Trace) -> dict[str, Any]:
    """Return {name: sample site} without a plate's subsample and without what is a function of other sites.

    Such are what ``pyro.deterministic`` records, and what Pyro's reparametrisations leave of a site.
    """
    return {name: site for name, site in trace.nodes.items() if is_sample(site) and not is_deterministic(site)}


def is_sample(msg: Any) -> bool:
    """Say whether a message is that of a sample statement."""
    return bool(msg["type"] == "sample" and not site_is_subsample(msg))


def is_deterministic(site: Any) -> bool:
    """Say whether a sample site is a function of other sites."""
    fn = site["fn"]
    left = site["is_observed"] and isinstance(fn, dist.MaskedDistribution) and fn._mask is False
    return bool((site["infer"] or {}).get("_deterministic") or left)


def run_both(
    model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[poutine.Trace, poutine.Trace]:
    """Run the guide, then the model on the guide's sample; return both traces, the model's first."""
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    check_guide(guide_trace)
    return run_on(model, guide_trace, args, kwargs), guide_trace


def run_on(model: Callable[..., Any], guide_trace: poutine.Trace, args: Any, kwargs: Any) -> poutine.Trace:
    """Run the model on the guide's sample and return its trace."""
    with poutine.replay(trace=guide_trace):  # wrapped around the model, it takes its arguments `fn` and `context`
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    for name, site in sample_sites(trace).items():
        check_plates("model", name, site)
    return trace


def is_auxiliary(site: Site) -> bool:
    """Say whether a site is marked as one that the other program need not have, as Pyro's automatic guides do."""
    return bool((site["infer"] or {}).get("is_auxiliary"))


def check_guide(trace: poutine.Trace) -> None:
    """Raise if a guide observes anything, or has a batch dimension without a plate."""
    for name, site in sample_sites(trace).items():
        if site["is_observed"]:
            raise ValueError(f"guide: site {name!r} is observed, expected a sample")
        check_plates("guide", name, site)


def bare(fn: Any) -> Any:
    """Return a distribution without what `.to_event(...)` and `.mask(...)` put around it."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


class Past(NamedTuple):
    """What is known of a run that another one continues.

    Attributes:
        masks: {site: which of its steps are real, (B, T'), or None for all}. Of these sites, rows that end early are
            continued too, and steps beyond the run's are cut off.
        trajectories: the sites that the guide says are trajectories; the model may have any steps there.
        plate: that of the sequences.
    """

    masks: Mapping[str, Tensor | None] = {}
    trajectories: frozenset[str] = frozenset()
    plate: Any = None


class Fill(Messenger):
    """Give sites their chosen values and other sites their means or samples.

    With `num_steps`, that of the run, the values of trajectories are made to fit: one that is too short is continued.
    """

    def __init__(self, chosen: Mapping[str, Tensor], sample: bool, num_steps: int | None, past: Past) -> None:
        super().__init__()
        self.chosen, self.sample, self.num_steps, self.past = chosen, sample, num_steps, past

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or site_is_subsample(msg):
            return
        if msg["name"] in self.chosen:
            value = self.chosen[msg["name"]]
            msg["value"] = value if self.num_steps is None else self._fitted(msg, value)
        elif not self.sample:
            msg["value"] = _mean(msg["name"], msg["fn"])

    def _fitted(self, msg: Any, given: Tensor) -> Tensor:
        fn, name, value = msg["fn"], msg["name"], given
        chain = as_chain(fn)
        if chain is None and name in self.past.trajectories:
            chain = as_steps(fn)
        batch = value.shape[: value.ndim - fn.event_dim]
        fits = value.ndim >= fn.event_dim and _covers(batch, fn.batch_shape)
        if fits and chain is not None:
            value = self._continued(msg, chain, value)
        if not fits or value.shape[value.ndim - fn.event_dim :] != fn.event_shape:
            is_plain = chain is None and fn.event_dim > 1 and value.shape[-fn.event_dim + 1 :] == fn.event_shape[1:]
            hint = " (IndependentSteps or a chain is a trajectory, whose length may change)" if is_plain else ""
            raise ValueError(
                f"site {name!r}: the value has shape {tuple(given.shape)}, expected {tuple(fn.shape())}{hint}"
            )
        return value

    def _continued(self, msg: Any, chain: Chain, path: Tensor) -> Tensor:
        fn, known = msg["fn"], self.past.masks.get(msg["name"])
        time = path.ndim - fn.event_dim
        if msg["name"] in self.past.masks:
            path = path.narrow(time, 0, min(path.shape[time], fn.event_shape[0]))
        if known is not None:
            known = by_row(known[:, : path.shape[time]], msg, self.past.plate, time)
        missing = fn.event_shape[0] - path.shape[time]
        if missing < 0:
            return path
        if missing > 0:
            return chain.extend(path, missing, mask=known, sample=self.sample)
        if known is not None and path.shape[time] > 1:
            short = ~known if chain.step_mask is None else chain.step_mask & ~known
            if short.any():  # only some rows are too short
                before = path.narrow(time, 0, path.shape[time] - 1)
                longer = chain.extend(before, 1, mask=known[..., :-1], sample=self.sample)
                return torch.where(short.reshape(short.shape + (1,) * (fn.event_dim - 1)), longer, path)
        return path


def _covers(batch: torch.Size, wanted: torch.Size) -> bool:
    try:
        return bool(torch.broadcast_shapes(batch, wanted) == batch)
    except RuntimeError:
        return False


def carries_on(fn: TorchDistribution) -> bool:
    """Say whether a latent of the past bears on the future: a chain, or what does not change, but no free steps."""
    return not isinstance(as_chain(fn), IndependentSteps)


def _mean(name: str, fn: TorchDistribution) -> Tensor:
    chain = as_chain(fn)
    try:
        return fn.mean if chain is None else chain.mean_path()
    except NotImplementedError:
        _refuse_mean(name, fn)


def check_means(sites: Mapping[str, Site]) -> None:
    """Raise if the value of a latent is the NaN that torch has for the mean of a class, or of a Cauchy."""
    for name, site in sites.items():
        value = site["value"]
        if not site["is_observed"] and value.is_floating_point() and value.numel() and value.isnan().all():
            _refuse_mean(name, site["fn"])


def _refuse_mean(name: str, fn: Any) -> NoReturn:
    raise ValueError(f"sample: site {name!r} ({type(bare(fn)).__name__}) has no mean, expected sample=True for it")


def run(
    program: Callable[..., Any],
    chosen: Mapping[str, Tensor],
    sample: bool,
    args: Sequence[Any],
    inputs: Mapping[str, Any],
    *,
    num_steps: int | None = None,
    past: Past | None = None,
) -> dict[str, Site]:
    """Run a program with some sites given, the others at their means or sampled; return its sample sites."""
    traced = poutine.trace(program)
    with Fill(chosen, sample, num_steps, past or Past()):
        try:
            traced(*args, **inputs)
        except ValueError:  # torch refuses a distribution of NaN, and cannot say whose mean it was
            if not sample:
                check_means(sample_sites(traced.trace))
            raise
    sites = sample_sites(traced.trace)
    if num_steps is None and not sample:  # a guide's; of a model's, nobody looks at the mean of an emission
        check_means(sites)
    return sites


def emit(
    model: Callable[..., Any],
    latents: Mapping[str, Tensor],
    sizes: Sequence[int],
    mask: Tensor | None,
    sample: bool,
    inputs: Mapping[str, Any],
    past: Past | None = None,
) -> tuple[dict[str, TorchDistribution], dict[str, Site]]:
    """Run the model on given latents, B sequences of T steps, nothing observed; return what it emits, and all sites."""
    num_sequences, num_steps = sizes
    arguments = {"mask": mask, "num_sequences": num_sequences, "num_steps": num_steps, **inputs}
    trace = run(model, latents, sample, (), arguments, num_steps=num_steps, past=past)
    if missing := sorted(set(latents) - set(trace)):
        raise ValueError(f"model: has no site {missing}, which the guide samples")
    return {name: trace[name]["fn"] for name in without_factors(trace) if name not in latents}, trace


def past_of(guide_sites: Mapping[str, Site], num_sequences: int, masks: Mapping[str, Tensor | None]) -> Past:
    """Return what is known of a run of the guide, for the model to continue; `masks` as of :class:`Past`."""
    trajectories = frozenset(name for name, site in guide_sites.items() if as_chain(site["fn"]) is not None)
    return Past(masks, trajectories, sequences_plate(guide_sites, num_sequences))


def without_factors(sites: Mapping[str, Site]) -> list[str]:
    """Return the sites that are not ``pyro.factor``, which has no picture, nor marked as auxiliary."""
    return [name for name, site in sites.items() if not isinstance(site["fn"], dist.Unit) and not is_auxiliary(site)]


class Used(NamedTuple):
    """What model and guide were used for: what is emitted, the sites of the model's run, and those of the guide's."""

    emitted: dict[str, TorchDistribution]
    trace: dict[str, Site]
    inferred: dict[str, Site]


def values_of(sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """Return the values of a guide's sites that the model has too."""
    return {name: site["value"] for name, site in sites.items() if not is_auxiliary(site)}


def inferred(
    guide: Callable[..., Any], given: Given, sample: bool, history: bool
) -> tuple[dict[str, Site], dict[str, Any]]:
    """Run the guide on sequences; return its sites and the further inputs of the model."""
    sites = run(guide, {}, sample, given.args, given.inputs)
    if not history:
        return sites, given.inputs
    frames, mask, known = given.frames, given.mask, given.mask
    if (observed := given.inputs.get("observed")) is not None:
        known = expand_observed(observed, frames.shape[:2], frames.shape[2:])
        known = known if mask is None else known & mask.reshape(mask.shape + (1,) * (known.ndim - 2))
    return sites, {"history": (frames, known), **given.inputs}


def drawn_at_once(
    use: Callable[[Callable[..., Any], Callable[..., Any]], Used],
    model: Callable[..., Any],
    guide: Callable[..., Any],
    num_samples: int | None,
) -> Used:
    """Return `use(model, guide)`, with `num_samples` values of each site as a dimension on the left of their own."""
    if num_samples is None:
        return use(model, guide)
    check_positive(num_samples=num_samples)
    with kept_random_state(), torch.no_grad():  # where their own dimensions end, and whether the arguments are right
        once = use(model, guide)
    nesting = num_plates(once.inferred, once.trace)
    model, guide = (in_particle_plate(program, num_samples, nesting) for program in (model, guide))
    try:
        return use(model, guide)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"num_samples: model or guide failed with {num_samples} draws as a dimension on the left of their own; "
            f"expected programs that broadcast what they read of a latent: {error}"
        ) from error
