"""Running a model or guide with some of its sites given: what every intervention is made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from seqdisent._sites import sample_sites
from seqdisent.chains import as_chain


class Fill(Messenger):
    """Give sites their chosen values; `fit` continues trajectories that are too short; other sites get their means.

    `prefixes` are {trajectory: its real steps (B, T')}, of those whose rows may end before the others.
    """

    def __init__(
        self, chosen: Mapping[str, Tensor], sample: bool, fit: bool, prefixes: Mapping[str, Tensor] | None
    ) -> None:
        super().__init__()
        self.chosen, self.sample, self.fit, self.prefixes = chosen, sample, fit, prefixes or {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or site_is_subsample(msg):
            return
        fn = msg["fn"]
        if msg["name"] in self.chosen:
            value = self.chosen[msg["name"]]
            msg["value"] = self._fitted(msg["name"], fn, value) if self.fit else value
        elif not self.sample:
            chain = as_chain(fn)
            try:
                msg["value"] = fn.mean if chain is None else chain.mean_path()
            except NotImplementedError as error:
                raise ValueError(
                    f"sample: site {msg['name']!r} ({type(fn).__name__}) has no mean, expected sample=True for it"
                ) from error

    def _fitted(self, name: str, fn: TorchDistribution, value: Tensor) -> Tensor:
        chain, known = as_chain(fn), self.prefixes.get(name)
        if chain is not None and value.ndim >= 2:
            if known is not None:  # outside the sequences' plate there are no rows; other plates stand before time
                known = None if value.ndim < 3 else known.reshape(len(known), *(1,) * (value.ndim - 3), -1)
            missing = fn.event_shape[0] - value.shape[-2]
            if missing > 0:
                value = chain.extend(value, missing, mask=known, sample=self.sample)
            elif missing == 0 and known is not None:
                short = ~known if chain.step_mask is None else chain.step_mask & ~known
                if short.any():  # only some rows are too short
                    longer = chain.extend(value[..., :-1, :], 1, mask=known[..., :-1], sample=self.sample)
                    value = torch.where(short.unsqueeze(-1), longer, value)
        try:
            fits = torch.broadcast_shapes(value.shape, fn.shape()) == value.shape
        except RuntimeError:
            fits = False
        if not fits or value.shape[value.ndim - fn.event_dim :] != fn.event_shape:
            raise ValueError(f"site {name!r}: the value has shape {tuple(value.shape)}, expected {tuple(fn.shape())}")
        return value


def run(
    program: Callable[..., Any],
    chosen: Mapping[str, Tensor],
    sample: bool,
    args: Sequence[Any],
    inputs: Mapping[str, Any],
    *,
    fit: bool = False,
    prefixes: Mapping[str, Tensor] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run a program and return its sample sites."""
    with Fill(chosen, sample, fit, prefixes):
        trace = poutine.trace(program).get_trace(*args, **inputs)
    return sample_sites(trace)


def emit(
    model: Callable[..., Any],
    latents: Mapping[str, Tensor],
    num_sequences: int,
    num_steps: int,
    mask: Tensor | None,
    sample: bool,
    inputs: Mapping[str, Any],
    prefixes: Mapping[str, Tensor] | None = None,
) -> dict[str, TorchDistribution]:
    """Run the model on given latents with nothing observed; return the sites that are not among them."""
    arguments = {"mask": mask, "num_sequences": num_sequences, "num_steps": num_steps, **inputs}
    trace = run(model, latents, sample, (), arguments, fit=True, prefixes=prefixes)
    if missing := sorted(set(latents) - set(trace)):
        raise ValueError(f"model: has no site {missing}, which the guide samples")
    return {name: trace[name]["fn"] for name in without_factors(trace) if name not in latents}


def with_history(
    model: Callable[..., Any], inputs: Mapping[str, Any], frames: Tensor, mask: Tensor | None
) -> Mapping[str, Any]:
    return {"history": (frames, mask), **inputs} if _takes_history(model) else inputs


def _takes_history(program: Callable[..., Any]) -> bool:
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
