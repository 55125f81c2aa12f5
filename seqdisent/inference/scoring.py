"""Every site scored at its sample statement, while its program runs: afterwards, what it was made from has changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger

from seqdisent.chains import Draw
from seqdisent.chains.factorised import as_chain, as_steps, without_mask
from seqdisent.inference.checks import (
    FILLS,
    check_density,
    check_drawn,
    check_gradient,
    check_left_out,
    check_numbers,
    check_observed,
    check_sites,
    check_steps_masked,
    is_overridden,
    no_rsample,
)
from seqdisent.inference.kl import (
    How,
    Score,
    conditionals_at,
    has_plain_parameters,
    log_q_per_step,
    over_steps,
    site_kl,
    whole_density,
)
from seqdisent.inference.plates import Site
from seqdisent.inference.programs import (
    check_guide,
    is_auxiliary,
    is_deterministic,
    is_sample,
    run_on,
    sample_sites,
)


@dataclass
class Scores:
    """The sites of a model's run on a guide's sample, and what each has in the ledger."""

    guide_trace: poutine.Trace
    sites: dict[str, Site] = field(default_factory=dict)
    observed: dict[str, Score] = field(default_factory=dict)
    latent: dict[str, Score] = field(default_factory=dict)
    log_q: dict[str, Score] = field(default_factory=dict)  # of the guide alone, where it was asked for


def score(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Any,
    kwargs: Any,
    *,
    analytic: bool,
    with_log_q: bool = False,
) -> Scores:
    """Run the guide, then the model on its sample, and score every site."""
    of_guide = _GuideDraws(with_log_q=with_log_q)
    guide_trace = of_guide.run(lambda: poutine.trace(guide).get_trace(*args, **kwargs))
    check_guide(guide_trace)
    guide_sites = sample_sites(guide_trace)
    of_model = _ModelScores(guide_sites, of_guide.draws, analytic)
    try:
        sites = sample_sites(of_model.run(lambda: run_on(model, guide_trace, args, kwargs)))
    except ValueError:  # of a distribution that validates its arguments, say
        check_drawn(guide_sites)
        raise
    observed = {name: site for name, site in sites.items() if site["is_observed"]}
    latent = {name: site for name, site in sites.items() if not site["is_observed"]}
    check_sites(observed, latent, guide_sites)
    for name, site in observed.items():
        check_observed(name, site)
        check_left_out(name, site)
    for name, site in guide_sites.items():
        check_gradient(name, site)
    of_guide.check()
    of_model.check()
    check_steps_masked(observed, latent)
    auxiliary = {name: found for name, found in of_guide.auxiliary.items() if name not in sites}
    sites |= {name: guide_sites[name] for name in auxiliary}
    return Scores(guide_trace, sites, of_model.observed, {**of_model.latent, **auxiliary}, of_guide.log_q)


def score_guide(guide: Callable[..., Any], args: Any, kwargs: Any) -> tuple[dict[str, Score], poutine.Trace]:
    """Run the guide alone; return the log-density of every site, and its trace."""
    of_guide = _GuideDraws(with_log_q=True)
    trace = of_guide.run(lambda: poutine.trace(guide).get_trace(*args, **kwargs))
    of_guide.check()
    return of_guide.log_q, trace


class _Scorer(Messenger):
    """Scores sites, and keeps the first error until the run is over, when there may be a better reason to name."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None
        self.with_gradient = torch.is_grad_enabled()

    def run(self, program: Callable[[], Any]) -> Any:
        """Run a program; if it fails after an error was kept, that one is the cause."""
        try:
            with self:
                return program()
        except Exception as error:
            if self.error is None:
                raise
            raise self.error from error

    def check(self) -> None:
        """Raise the error that was kept, if there was one."""
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
    """Draws every chain of a guide with its conditionals, and takes the densities that may be others later."""

    def __init__(self, *, with_log_q: bool) -> None:
        super().__init__()
        self.with_log_q = with_log_q
        self.draws: dict[str, Draw] = {}
        self.auxiliary: dict[str, Score] = {}
        self.log_q: dict[str, Score] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not is_sample(msg) or msg["is_observed"] or msg["done"] or msg["value"] is not None:
            return
        chain, _ = without_mask(msg["fn"])
        hands_over = hasattr(chain, "rsample_with_conditionals") and chain.has_rsample
        if not hands_over or is_overridden(chain, "rsample", beside="rsample_with_conditionals"):
            return
        try:
            draw = chain.rsample_with_conditionals(*msg["args"], **msg["kwargs"])
        except NotImplementedError as error:
            self.error = self.error or ValueError(no_rsample(msg["name"], chain, str(error)))
            return
        self.draws[msg["name"]], msg["value"] = draw, draw.path

    def _score(self, msg: Any) -> None:
        name, value = msg["name"], msg["value"]
        fn, _ = without_mask(msg["fn"])
        if name not in self.draws or self.draws[name].path is not value:  # or another handler gave the value
            at, log_prob = conditionals_at(name, as_chain(fn), value), None
            if at is None and not has_plain_parameters(fn):
                steps = as_steps(fn)  # the model may say that these are steps
                log_prob = fn.log_prob(value) if steps is None else steps.log_prob_per_step(value)
            self.draws[name] = Draw(value, at, log_prob)
        check_density(name, fn)
        if is_auxiliary(msg):
            self.auxiliary[name] = _density(msg, self.draws[name], "monte carlo")
        if self.with_log_q:
            self.log_q[name] = _density(msg, self.draws[name], "monte carlo")


class _ModelScores(_Scorer):
    """Scores every site of a model; gradients are recorded as around the ledger, not as around the statement."""

    def __init__(self, guide_sites: dict[str, Site], draws: dict[str, Draw], analytic: bool) -> None:
        super().__init__()
        self.guide_sites, self.draws, self.analytic = guide_sites, draws, analytic
        self.drawn_before = {name: set(list(guide_sites)[:i]) for i, name in enumerate(guide_sites)}
        self.observed: dict[str, Score] = {}
        self.latent: dict[str, Score] = {}

    def _score(self, msg: Any) -> None:
        name = msg["name"]
        if msg["is_observed"]:
            self.observed[name] = self._likelihood(msg)
        elif name in self.guide_sites:
            # a closed form is right where all that p may condition on was drawn without looking at this site
            analytic = self.analytic and self.drawn_before[name].issuperset(self.latent)
            self.latent[name] = site_kl(
                name, self.guide_sites[name], msg, self.draws[name], analytic=analytic, with_gradient=self.with_gradient
            )

    def _likelihood(self, site: Site) -> Score:
        value = site["value"]
        at = conditionals_at(site["name"], as_chain(site["fn"]), value)  # the transition runs as in the program
        with torch.set_grad_enabled(self.with_gradient):
            try:
                return _density(site, Draw(value, at), "density")
            except ValueError:  # of a distribution that validates its arguments, which names no site
                check_numbers(site["name"], site)
                raise


def _density(site: Site, draw: Draw, how: How) -> Score:
    """Score a site by the density of its distribution at its value."""
    fn, mask = without_mask(site["fn"], site["mask"])
    chain = as_chain(fn)
    if chain is None:
        log_prob = whole_density(fn, draw)
        return Score(scale_and_mask(fn.log_prob(draw.path) if log_prob is None else log_prob, site["scale"], mask), how)
    per_step, real = over_steps(log_q_per_step(chain, draw), chain.step_mask, site["scale"], mask)
    observed = chain.observed_steps if isinstance(chain, FILLS) else None
    real = real if observed is None else real & observed
    return Score(per_step.sum(-1), how, None, per_step, real)
