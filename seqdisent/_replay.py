"""Running a model or guide with some of its sites given: what every intervention is made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from seqdisent._sites import bare, sample_sites
from seqdisent.chains import as_chain, is_factorised


class Fill(Messenger):
    """Give sites their chosen values and other sites their means or samples.

    With `num_steps`, that of the run, the values of trajectories are made to fit: one that is too short is continued.
    `prefixes` are {site: which of its steps are real, (B, T'), or None for all}: of these, rows that end early are
    continued too, and steps beyond the run's are cut off.
    """

    def __init__(
        self,
        chosen: Mapping[str, Tensor],
        sample: bool,
        num_steps: int | None,
        prefixes: Mapping[str, Tensor | None] | None,
    ) -> None:
        super().__init__()
        self.chosen, self.sample, self.num_steps, self.prefixes = chosen, sample, num_steps, prefixes or {}

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
        if is_trajectory(fn, self.num_steps) and value.ndim >= 2:
            value = self._continued(msg, value)
        try:
            fits = torch.broadcast_shapes(value.shape, fn.shape()) == value.shape
        except RuntimeError:
            fits = False
        if not fits or value.shape[value.ndim - fn.event_dim :] != fn.event_shape:
            raise ValueError(f"site {name!r}: the value has shape {tuple(given.shape)}, expected {tuple(fn.shape())}")
        return value

    def _continued(self, msg: Any, path: Tensor) -> Tensor:
        chain, known = as_chain(msg["fn"]), self.prefixes.get(msg["name"])
        if msg["name"] in self.prefixes:
            path = path[..., : msg["fn"].event_shape[0], :]
        if known is not None:
            known = _by_row(known[:, : path.shape[-2]], msg["cond_indep_stack"], path.ndim - 2)
        missing = msg["fn"].event_shape[0] - path.shape[-2]
        if chain is None:
            return path
        if missing > 0:
            return chain.extend(path, missing, mask=known, sample=self.sample)
        if missing == 0 and known is not None:
            short = ~known if chain.step_mask is None else chain.step_mask & ~known
            if short.any():  # only some rows are too short
                longer = chain.extend(path[..., :-1, :], 1, mask=known[..., :-1], sample=self.sample)
                return torch.where(short.unsqueeze(-1), longer, path)
        return path


def is_trajectory(fn: TorchDistribution, num_steps: int | None) -> bool:
    """Say whether a site is a chain, or has a vector for each step of a run; a matrix of another height is neither."""
    chain = as_chain(fn)
    if chain is not None and not is_factorised(chain):
        return True
    return fn.event_dim == 2 and fn.event_shape[0] == num_steps


def _by_row(mask: Tensor, stack: Sequence[Any], batch_dims: int) -> Tensor | None:
    """Return a mask (B, T) with B where the sequences' plate, the leftmost of that size, stands; None outside of it."""
    plates = [frame.dim for frame in stack if frame.vectorized and frame.size == len(mask) and -frame.dim <= batch_dims]
    if not plates:
        return None
    shape = [1] * batch_dims
    shape[min(plates)] = len(mask)
    return mask.reshape(*shape, -1)


def _mean(name: str, fn: TorchDistribution) -> Tensor:
    chain = as_chain(fn)
    try:
        return fn.mean if chain is None else chain.mean_path()
    except NotImplementedError:
        _refuse_mean(name, fn)


def check_means(sites: Mapping[str, Mapping[str, Any]]) -> None:
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
    prefixes: Mapping[str, Tensor | None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run a program and return its sample sites."""
    with Fill(chosen, sample, num_steps, prefixes):
        trace = poutine.trace(program).get_trace(*args, **inputs)
    sites = sample_sites(trace)
    if num_steps is None and not sample:  # a guide's; of a model's, nobody looks at the mean of an emission
        check_means(sites)
    return sites


def emit(
    model: Callable[..., Any],
    latents: Mapping[str, Tensor],
    num_sequences: int,
    num_steps: int,
    mask: Tensor | None,
    sample: bool,
    inputs: Mapping[str, Any],
    prefixes: Mapping[str, Tensor | None] | None = None,
) -> dict[str, TorchDistribution]:
    """Run the model on given latents with nothing observed; return the sites that are not among them."""
    arguments = {"mask": mask, "num_sequences": num_sequences, "num_steps": num_steps, **inputs}
    trace = run(model, latents, sample, (), arguments, num_steps=num_steps, prefixes=prefixes)
    if missing := sorted(set(latents) - set(trace)):
        raise ValueError(f"model: has no site {missing}, which the guide samples")
    return {name: trace[name]["fn"] for name in without_factors(trace) if name not in latents}


def with_history(
    model: Callable[..., Any], inputs: Mapping[str, Any], frames: Tensor, mask: Tensor | None
) -> Mapping[str, Any]:
    return {"history": (frames, mask), **inputs} if _takes_history(model) else inputs


def _takes_history(program: Callable[..., Any]) -> bool:
    if isinstance(program, nn.Module):  # also a compiled one
        return _takes_history(getattr(program, "_orig_mod", program).forward)
    if isinstance(program, partial):  # also what Pyro's handlers make of a program
        return any(_takes_history(part) for part in (program.func, *program.args) if callable(part))
    try:
        return "history" in inspect.signature(program).parameters
    except (TypeError, ValueError):  # it cannot tell what it takes
        return False


def without_factors(sites: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the sites that are not ``pyro.factor``, which has no picture."""
    return [name for name, site in sites.items() if not isinstance(site["fn"], dist.Unit)]


def values(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    return {name: site["value"] for name, site in sites.items()}
