"""Every site scored at its sample statement, while its program runs: afterwards, what it was made from has changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from seqdisent.chains import Draw, IndependentSteps
from seqdisent.chains.factorised import as_chain
from seqdisent.inference.checks import (
    check_gradient,
    check_observed,
    check_sites,
    check_steps_masked,
    is_auxiliary,
    no_rsample,
    unmasked,
)
from seqdisent.inference.kl import Score, over_steps, site_kl
from seqdisent.inference.plates import Site
from seqdisent.inference.programs import check_guide, is_deterministic, is_sample, run_on, sample_sites, without_mask
from seqdisent.masks import fill_padding


@dataclass
class Scores:
    """The sites of a model's run on a guide's sample, and what each has in the ledger."""

    sites: dict[str, Site] = field(default_factory=dict)
    observed: dict[str, Score] = field(default_factory=dict)
    latent: dict[str, Score] = field(default_factory=dict)


def score(model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any, *, analytic: bool) -> Scores:
    """Run the guide, then the model on its sample, and score every site."""
    guide_scores = _GuideDraws()
    with guide_scores:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    check_guide(guide_trace)
    guide_sites = sample_sites(guide_trace)
    model_scores = _ModelScores(guide_sites, guide_scores.draws, analytic)
    with model_scores:
        model_trace = run_on(model, guide_trace, args, kwargs)
    sites = sample_sites(model_trace)
    observed = {name: site for name, site in sites.items() if site["is_observed"]}
    latent = {name: site for name, site in sites.items() if not site["is_observed"]}
    check_sites(observed, latent, guide_sites)
    for name, site in observed.items():
        check_observed(name, site)
    for name, site in guide_sites.items():
        check_gradient(name, site)
    guide_scores.check()
    model_scores.check()
    found = model_scores.scores
    check_steps_masked(observed, latent)
    found.sites = sites
    for name, site in guide_sites.items():
        if name not in sites and is_auxiliary(site):
            found.latent[name] = Score(_log_prob(site), "monte carlo")
            found.sites[name] = site
    return found


class _Scorer(Messenger):
    """Keeps the first error of a score until the run is over, when its reason may be named."""

    error: Exception | None = None

    def check(self) -> None:
        """Raise that error, if there was one."""
        if self.error is not None:
            raise self.error

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_sample(msg) and not is_deterministic(msg) and self.error is None:
            try:
                self._score(msg)
            except Exception as error:
                self.error = error

    def _score(self, msg: Any) -> None:
        raise NotImplementedError


class _GuideDraws(_Scorer):
    """Draws every chain of a guide together with the conditionals that it is drawn from."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: dict[str, Draw] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not is_sample(msg) or msg["is_observed"] or msg["done"] or msg["value"] is not None:
            return
        chain = without_mask(msg["fn"])
        if not hasattr(chain, "rsample_with_conditionals") or not chain.has_rsample:
            return
        try:
            draw = chain.rsample_with_conditionals(*msg["args"], **msg["kwargs"])
        except NotImplementedError as error:
            self.error = self.error or ValueError(no_rsample(msg["name"], chain, str(error)))
            return
        self.draws[msg["name"]], msg["value"] = draw, draw.path

    def _score(self, msg: Any) -> None:
        chain = as_chain(msg["fn"])
        if chain is None or isinstance(chain, IndependentSteps) or msg["name"] in self.draws:
            return
        path = msg["value"]  # drawn by a chain that hands over nothing, or given by a handler
        if chain.step_mask is not None:
            path = fill_padding(path, chain.step_mask)
        self.draws[msg["name"]] = Draw(msg["value"], chain.conditionals(path))


class _ModelScores(_Scorer):
    def __init__(self, guide_sites: dict[str, Site], draws: dict[str, Draw], analytic: bool) -> None:
        super().__init__()
        self.guide_sites, self.draws, self.analytic = guide_sites, draws, analytic
        self.drawn_before = {name: set(list(guide_sites)[:i]) for i, name in enumerate(guide_sites)}
        self.scores = Scores()

    def _score(self, msg: Any) -> None:
        name = msg["name"]
        if msg["is_observed"]:
            self.scores.observed[name] = _likelihood(msg)
        elif name in self.guide_sites:
            # a closed form is right where all that p may condition on was drawn without looking at this site
            analytic = self.analytic and self.drawn_before[name].issuperset(self.scores.latent)
            draw = self.draws.get(name)
            self.scores.latent[name] = site_kl(name, self.guide_sites[name], msg, analytic=analytic, draw=draw)


def _log_prob(site: Site) -> Tensor:
    term: Tensor = scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])
    return term


def _likelihood(site: Site) -> Score:
    fn, mask = unmasked(site)
    chain = as_chain(fn)
    if chain is None:
        return Score(_log_prob(site), "density")
    per_step, real = over_steps(chain.log_prob_per_step(site["value"]), chain.step_mask, site["scale"], mask)
    return Score(per_step.sum(-1), "density", None, per_step, real)
