r"""What training maximises, by name: a bound, and an estimator of its gradient.

Let :math:`z_k` be draws of the guide, :math:`\log w_k = \log p(x, z_k) - \log q(z_k)` and :math:`\tilde w_k = w_k /
\sum_j w_j`. Reparameterised, the gradient of :math:`\log w_k` has three parts:

.. math:: \underbrace{\partial_z \log w_k \, \mathrm d z_k}_{\text{path}}
    + \underbrace{\partial \log p(x, z_k)}_{\text{model}} - \underbrace{\partial \log q(z_k)}_{\text{score}},

the last two at fixed :math:`z_k`. The score has mean 0, and is left out by ``"stl"``; ``"dreg"`` turns it into a path.
Model and guide may share parameters, and a guide's site may read another one, so no parameter and no sample can simply
be detached. Instead guide (and model) run a second time on the same draws, held fixed: what that run gives has the
second and third part as its gradient, and nothing else.

``"fivo"`` draws in another way, step by step with a resampling in between; its terms come from a particle filter.

A further objective has a name in :data:`Objective` and a function in :func:`bound_of`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from seqdisent._random import kept_random_state
from seqdisent.inference.kl import Score
from seqdisent.inference.plates import Site
from seqdisent.inference.programs import bare, sample_sites
from seqdisent.inference.scoring import Scores, score, score_guide

if TYPE_CHECKING:
    from seqdisent.inference.terms import ELBOTerms

Objective = Literal["elbo", "iwae", "stl", "dreg", "fivo"]
KL = Literal["analytic", "monte-carlo"]
OF_ALL_DRAWS = {"iwae": "iwae", "dreg": "iwae", "fivo": "fivo"}  # {objective without weights of terms: its bound}


def check_objective(objective: Any) -> None:
    """Raise ValueError unless `objective` is the name of one."""
    if objective not in get_args(Objective):
        raise ValueError(f"objective: got {objective!r}, expected one of {', '.join(map(repr, get_args(Objective)))}")


def check_kl(objective: Objective, kl: KL | None) -> KL:
    """Return how KL terms are computed; raise ValueError where that is not known or does not fit the objective."""
    if kl not in (None, *get_args(KL)):
        raise ValueError(f'kl: got {kl!r}, expected "analytic" or "monte-carlo"')
    if objective == "elbo":
        return kl or "analytic"
    if kl == "analytic":
        raise ValueError(
            f'kl: got "analytic" with objective={objective!r}, which needs the density of the sample itself; expected '
            'kl="monte-carlo" (or None), or objective="elbo"'
        )
    return "monte-carlo"


def check_unweighted(objective: Any, weights: Mapping[str, Any] | None) -> None:
    """Raise ValueError if terms are weighted that make up an importance weight."""
    if weights and objective in OF_ALL_DRAWS:
        raise ValueError(
            f"weights: got {sorted(weights)} with objective={objective!r}, whose importance weights are densities and "
            'cannot be weighted by term; expected none, or objective="elbo" or "stl"'
        )


class Held(NamedTuple):
    """What model and guide say of the draws when these are held fixed; only its gradient counts.

    Attributes:
        log_q: {latent site: (B,), (K, B), () or (K,)}, of the guide; without those that are points.
        log_weights: (B,) or (K, B), of all sites; None where no objective needs them.
    """

    log_q: dict[str, Tensor]
    log_weights: Tensor | None


def bound_of(terms: ELBOTerms, weights: Mapping[str, float | Tensor] | None) -> Tensor:
    """Return the bound of each sequence under the ledger's objective, with its estimate of the gradient."""
    check_unweighted(terms.objective, weights)
    if terms.log_evidence is not None:
        return terms.log_evidence
    if terms.objective == "iwae":
        return terms.importance_weighted()
    if terms.objective == "stl":
        return _without_score(terms).elbo(weights)
    if terms.objective == "dreg":
        return _doubly_reparameterised(terms)
    return terms.elbo(weights)


def _without_score(terms: ELBOTerms) -> ELBOTerms:
    """Return the same terms without the score of the guide in their gradient."""
    if terms.held is None:
        return terms
    changed = {
        name: replace(terms.terms[name], value=terms.terms[name].value - _gradient_of(log_q))
        for name, log_q in terms.held.log_q.items()
    }
    return replace(terms, terms={**terms.terms, **changed})


def _doubly_reparameterised(terms: ELBOTerms) -> Tensor:
    r"""Return the importance-weighted bound with the gradient of Tucker et al.

    The draws being reparameterised, the mean of :math:`\tilde w_k` times the score is that of :math:`(\tilde w_k -
    \tilde w_k^2)` times the path. So the gradient is :math:`\sum_k \tilde w_k^2` path + :math:`\tilde w_k` model.
    """
    bound = terms.importance_weighted()
    if terms.held is None:
        return bound
    if terms.held.log_weights is None:  # of one draw, the weight is 1
        return _without_score(terms).importance_weighted()
    log_q = sum(terms.held.log_q.values(), start=torch.zeros(()))
    log_p = terms.held.log_weights + log_q
    log_weights = terms.log_weights()
    weights = log_weights.detach().softmax(0)
    counts = weights > 0  # 0 times minus infinity would be NaN
    path_and_model = weights**2 * torch.where(counts, log_weights + log_q, 0.0)
    of_model = (weights - weights**2) * torch.where(counts, log_p, 0.0)
    return bound.detach() + _gradient_of((path_and_model + of_model).sum(0))


def _gradient_of(value: Tensor) -> Tensor:
    """Return 0 that has the gradient of `value`."""
    return value - value.detach()


def score_twice(
    model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any, *, with_model: bool
) -> tuple[Scores, dict[str, Score], Scores | None]:
    """Score every site, and once more on the same draws held fixed: log q by site and, `with_model`, every site."""
    noise = _Noise()
    with noise.noted():
        scores = score(model, guide, args, kwargs, analytic=False)
    fixed = poutine.replay(guide, trace=_held(scores.guide_trace))
    with kept_random_state(), noise.again():
        if with_model:
            again = score(model, fixed, args, kwargs, analytic=False, with_log_q=True)
            log_q, trace = again.log_q, again.guide_trace
        else:
            again, (log_q, trace) = None, score_guide(fixed, args, kwargs)
    sites = sample_sites(trace)
    _check_points(sites, with_model=with_model)
    return scores, {name: found for name, found in log_q.items() if not _is_point(sites[name])}, again


def _held(trace: poutine.Trace) -> poutine.Trace:
    """Return a trace with the same draws, through which no gradient flows."""
    held = trace.copy()
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and isinstance(site["value"], Tensor):
            held.nodes[name] = {**site, "value": site["value"].detach()}
    return held


def _is_point(site: Site) -> bool:
    return isinstance(bare(site["fn"]), dist.Delta)


def _check_points(sites: Mapping[str, Site], *, with_model: bool) -> None:
    """Raise if the score of a point would be missed, or the path to it be scaled as if it were drawn.

    With the draws held fixed, what still has a gradient reads parameters of its own.
    """
    for name, site in sites.items():
        if not _is_point(site):
            continue
        point = bare(site["fn"])
        if point.log_density.requires_grad or (with_model and point.v.requires_grad):
            objective = "dreg" if with_model else "stl"
            raise ValueError(
                f"guide: site {name!r} is a point (Delta) with parameters of its own, so the gradient of "
                f'objective={objective!r} would be silently wrong; expected a density, or objective="elbo" or "iwae"'
            )


class _Noise(Messenger):
    """Gives a second run the noise of the first, so that dropout leaves the same units out.

    The second run does not draw what is held fixed. So after every site the generators are put where they stood there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.states: list[Any] = []
        self.next: Iterator[Any] | None = None

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        self.states = [_random_state()]
        with self:
            yield

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        self.next = iter(self.states)
        _set_random_state(next(self.next))
        with self:
            yield

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.next is None:
            self.states.append(_random_state())
        elif (state := next(self.next, None)) is not None:
            _set_random_state(state)


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
