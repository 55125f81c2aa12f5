"""The evidence lower bound of any Pyro model and guide, as a ledger of named terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from seqdisent._checks import check_positive
from seqdisent._masking import overwrite_padding, repeat_first_step
from seqdisent._sites import sample_sites
from seqdisent.distributions import Chain, Conditionals, as_chain

_PARTICLES = "_seqdisent_particles"


@dataclass(frozen=True, eq=False)
class ELBOTerms:
    r"""The evidence lower bound, term by term, in nats, neither weighted nor reduced over the batch.

    Every term is (B,), one value a sequence; (K, B) with K particles; () or (K,) for a site outside the sequences'
    plate.

    Attributes:
        log_likelihood: {observed site: :math:`\log p(x \mid z)`}
        kl: {latent site: its KL term at the sample}. With ``kl="monte-carlo"``, :math:`\log q - \log p`.
        kl_per_step: {chain site: (..., B, T), the same term step by step, 0 at padding}
        conditionals: {latent site: (q, p)}, the distributions that the term compares; for a chain, each is its
            :class:`~seqdisent.distributions.Conditionals` at the sampled path. Empty with several particles in a loop.
        monte_carlo: the latent sites whose term is a Monte Carlo estimate: all of them, or those without closed form.
        num_sequences: B, or 1 without a plate.
    """

    log_likelihood: dict[str, Tensor]
    kl: dict[str, Tensor]
    kl_per_step: dict[str, Tensor]
    conditionals: dict[str, tuple[Any, Any]]
    monte_carlo: frozenset[str]
    num_sequences: int
    _in_plate: frozenset[str]
    _num_particles: int | None  # None: terms have no particle dimension
    _wholly_monte_carlo: bool

    def elbo(self, weights: Mapping[str, float | Tensor] | None = None) -> Tensor:
        """Return the bound of each sequence, averaged over particles.

        Args:
            weights: {site: weight of its term}; a site that is not named counts 1. Both latent and observed sites may
                be named.

        Returns:
            (B,), or () without a plate. A term outside the sequences' plate is shared out equally, so that the sum
            over the batch counts it once.

        Raises:
            ValueError: `weights` names a site that the ledger does not have.

        Example:
            >>> import pyro.distributions as dist
            >>> def model(x):
            ...     with pyro.plate("sequences", len(x)):
            ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
            ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            >>> def guide(x):
            ...     with pyro.plate("sequences", len(x)):
            ...         pyro.sample("z", dist.Normal(x / 2, 0.7))
            >>> terms = elbo_terms(model, guide, torch.ones(3))
            >>> sorted(terms.log_likelihood), sorted(terms.kl), terms.elbo({"z": 0.5}).shape
            (['x'], ['z'], torch.Size([3]))
        """
        weights = dict(weights or {})
        unknown = set(weights) - set(self.log_likelihood) - set(self.kl)
        if unknown:
            raise ValueError(
                f"weights: no site {sorted(unknown)} in the ledger, expected some of "
                f"{sorted(self.kl)} (latent) and {sorted(self.log_likelihood)} (observed)"
            )
        total = sum(
            (self._shared_out(name, term) * weights.get(name, 1.0) for name, term in self.log_likelihood.items()),
            start=torch.zeros(()),
        )
        for name, term in self.kl.items():
            total = total - self._shared_out(name, term) * weights.get(name, 1.0)
        return total if self._num_particles is None else total.mean(0)

    def importance_weighted(self) -> Tensor:
        r"""Return the importance-weighted bound :math:`\log \frac1K \sum_k p(x, z_k) / q(z_k)` of each sequence, (B,).

        Raises:
            ValueError: the terms are not all Monte Carlo estimates (``elbo_terms(..., kl="monte-carlo")``), or a site
                lies outside the sequences' plate, so that the weights do not factorise over sequences.

        References:
            Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016.
        """
        if not self._wholly_monte_carlo:
            raise ValueError(
                'importance_weighted: the KL terms are analytic, expected elbo_terms(..., kl="monte-carlo")'
            )
        outside = sorted({*self.kl, *self.log_likelihood} - self._in_plate)
        if outside and self._in_plate:
            raise ValueError(
                f"importance_weighted: {outside} lie outside the sequences' plate; their weights are shared"
            )
        terms = [*self.log_likelihood.values(), *(-term for term in self.kl.values())]
        log_weights = sum(terms[1:], start=terms[0])
        if self._num_particles is None:
            return log_weights
        return torch.logsumexp(log_weights, 0) - math.log(self._num_particles)

    def check_finite(self, step: int | None = None) -> None:
        """Raise unless every term is finite; under torch.distributed all ranks raise together.

        Args:
            step: the training step, for the message.

        Raises:
            FloatingPointError: names the first term that is not finite, its sequence and its time step.
        """
        terms = {**self.log_likelihood, **self.kl}
        finite = torch.stack([term.detach().isfinite().all() for term in terms.values()]).all()
        everywhere = finite.to(torch.int32)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
        if everywhere:
            return
        when = "" if step is None else f" at training step {step}"
        if finite:
            raise FloatingPointError(f"a term of the ELBO is not finite{when} on another process")
        name, term = next((name, term) for name, term in terms.items() if not term.isfinite().all())
        kind = "log_likelihood" if name in self.log_likelihood else "kl"
        if name in self.kl_per_step and not self.kl_per_step[name].isfinite().all():
            kind, term = "kl_per_step", self.kl_per_step[name]
        where = tuple((~term.isfinite()).nonzero()[0].tolist())
        axes = [*(["particle"] if self._num_particles is not None else [])]
        axes += ["sequence"] if name in self._in_plate else []
        axes += ["time step"] if kind == "kl_per_step" else []
        place = ", ".join(f"{axis} {i}" for axis, i in zip(axes, where, strict=False))
        raise FloatingPointError(f"{kind}[{name!r}] is {term[where].item()}{when}" + (f" ({place})" if place else ""))

    def _shared_out(self, name: str, term: Tensor) -> Tensor:
        if name in self._in_plate or not self._in_plate:
            return term
        return (term / self.num_sequences).unsqueeze(-1)


def elbo_terms(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    kl: Literal["analytic", "monte-carlo"] = "analytic",
    num_particles: int = 1,
    vectorize_particles: bool = False,
    **kwargs: Any,
) -> ELBOTerms:
    r"""Run guide and model once and return every term of the evidence lower bound under its site's name.

    .. math:: \log p(x) \ge \mathbb E_q \Big[ \sum_i \log p(x_i \mid \cdot) \Big]
        - \sum_j \mathbb E_q \, \mathrm{KL}\big(q(z_j \mid \cdot) \,\|\, p(z_j \mid \cdot)\big)

    For VDSM these are the terms of the paper's equation 4, and of equation 7 at its first stage. With
    ``kl="analytic"`` a term is a closed-form KL divergence; for a chain, :math:`\sum_t \mathrm{KL}(q(z_t | z_{t-1}) \|
    p(z_t | z_{t-1}))`, each in closed form at the sampled path: the expectation of :math:`\log q - \log p`, usually
    with a lower variance. A pair without closed form (a flow) is Monte Carlo, and named in ``monte_carlo``. With
    ``kl="monte-carlo"`` and unit weights the ledger is Pyro's ``Trace_ELBO`` on the same sample.

    The sequences' plate is the leftmost plate of the observed sites (batch first); a term is summed over everything
    else. Scales of plates and ``poutine.mask`` count in every term.

    Args:
        model: a Pyro model; its observed sites give the likelihoods.
        guide: a Pyro guide with the same latent sites, all of them reparameterised.
        *args: given to both.
        kl: closed form where there is one, or Monte Carlo for every site.
        num_particles: K samples of the guide.
        vectorize_particles: draw them in one run, in a plate to the left of all others.
        **kwargs: given to both.

    Raises:
        ValueError: a latent site of the model that the guide lacks, or the reverse; a guide site without `rsample` or
            with enumeration (its gradient would be silently wrong); scales, masks or shapes of a site that differ
            between model and guide; a model that observes nothing; an unknown `kl`.

    Example:
        See :meth:`ELBOTerms.elbo`.
    """
    if kl not in ("analytic", "monte-carlo"):
        raise ValueError(f'kl: got {kl!r}, expected "analytic" or "monte-carlo"')
    check_positive(num_particles=num_particles)
    if num_particles == 1 and not vectorize_particles:
        return _one_run(model, guide, args, kwargs, kl, None)
    if vectorize_particles:
        dim = -1 - _max_plate_nesting(model, guide, args, kwargs)
        model, guide = (_in_particle_plate(fn, num_particles, dim) for fn in (model, guide))
        return _one_run(model, guide, args, kwargs, kl, num_particles)
    runs = [_one_run(model, guide, args, kwargs, kl, None) for _ in range(num_particles)]

    def stack(name: str) -> dict[str, Tensor]:
        return {site: torch.stack([getattr(run, name)[site] for run in runs]) for site in getattr(runs[0], name)}

    return ELBOTerms(
        stack("log_likelihood"), stack("kl"), stack("kl_per_step"), {}, runs[0].monte_carlo, runs[0].num_sequences,
        runs[0]._in_plate, num_particles, runs[0]._wholly_monte_carlo,
    )  # fmt: skip


class DecomposedELBO(ELBO):  # type: ignore[misc]
    """The ledger as a loss for ``pyro.infer.SVI``: minus the weighted bound, summed over the batch.

    Args:
        weights: {site: weight of its term}; 1 for the others. To anneal, build one for each step.
        kl: closed form where there is one, or Monte Carlo for every site.
        num_particles: samples of the guide that are averaged.
        vectorize_particles: draw them in one run.

    Raises:
        ValueError: as :func:`elbo_terms` and :meth:`ELBOTerms.elbo`.

    Example:
        >>> DecomposedELBO(weights={"z": 0.1}).num_particles
        1
    """

    def __init__(
        self,
        *,
        weights: Mapping[str, float] | None = None,
        kl: Literal["analytic", "monte-carlo"] = "analytic",
        num_particles: int = 1,
        vectorize_particles: bool = False,
    ) -> None:
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        self.weights = dict(weights or {})
        self.kl: Literal["analytic", "monte-carlo"] = kl

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return minus the bound, summed over the batch, with its gradient."""
        options: dict[str, Any] = {"num_particles": self.num_particles, "vectorize_particles": self.vectorize_particles}
        return -elbo_terms(model, guide, *args, kl=self.kl, **options, **kwargs).elbo(self.weights).sum()

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Return minus the bound, summed over the batch."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Return the loss and add its gradient to the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[poutine.Trace, poutine.Trace]:
        """Return the traces of model and guide, as Pyro's base class wants them."""
        return _traces(model, guide, args, kwargs)


Site = dict[str, Any]


def _one_run(
    model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any, kl: str, num_particles: int | None
) -> ELBOTerms:
    model_trace, guide_trace = _traces(model, guide, args, kwargs)
    guide_sites = sample_sites(guide_trace)
    model_sites = sample_sites(model_trace)
    observed = {name: site for name, site in model_sites.items() if site["is_observed"]}
    latent = {name: site for name, site in model_sites.items() if not site["is_observed"]}
    _check_sites(observed, latent, guide_sites)
    plate = _sequences_plate(observed)

    log_likelihood, kl_terms, kl_per_step, conditionals = {}, {}, {}, {}
    monte_carlo, in_plate = set(), set()
    for name, site in observed.items():
        term = scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])
        log_likelihood[name] = _per_sequence(term, site, plate)
    for name, site in latent.items():
        term, per_step, pair, closed_form = _kl(name, guide_sites[name], site, analytic=kl == "analytic")
        kl_terms[name] = _per_sequence(term, site, plate)
        conditionals[name] = pair
        if per_step is not None:
            kl_per_step[name] = _per_sequence(per_step, site, plate, event_dims=1)
        if not closed_form:
            monte_carlo.add(name)
    for name, site in model_sites.items():
        if plate is not None and any(frame.name == plate.name for frame in site["cond_indep_stack"]):
            in_plate.add(name)
    return ELBOTerms(
        log_likelihood, kl_terms, kl_per_step, conditionals, frozenset(monte_carlo),
        plate.size if plate is not None else 1, frozenset(in_plate), num_particles, kl == "monte-carlo",
    )  # fmt: skip


def _traces(
    model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[poutine.Trace, poutine.Trace]:
    """Run the guide, then the model on the guide's sample."""
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    for name, site in sample_sites(guide_trace).items():
        if site["is_observed"]:
            raise ValueError(f"guide: site {name!r} is observed, expected a sample")
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return model_trace, guide_trace


def _kl(name: str, q_site: Site, p_site: Site, *, analytic: bool) -> tuple[Tensor, Tensor | None, Any, bool]:
    """Return a site's term, the term per step if it is a chain, the pair (q, p), and whether it is in closed form."""
    value = q_site["value"]
    q, q_mask = _unmasked(q_site)
    p, p_mask = _unmasked(p_site)
    _check_agreement(name, q_site, p_site, q_mask, p_mask)
    if q.event_shape != p.event_shape:
        raise ValueError(
            f"site {name!r}: has event shape {tuple(q.event_shape)} in the guide, "
            f"expected the model's {tuple(p.event_shape)}"
        )
    q_chain, p_chain = as_chain(q), as_chain(p)
    if q_chain is not None and p_chain is not None:
        per_step, pair, closed_form = _chain_kl(name, q_chain, p_chain, value, analytic)
        per_step = scale_and_mask(per_step, _to_step(q_site["scale"]), _to_step(q_mask))
        return per_step.sum(-1), per_step, pair, closed_form
    term, closed_form = _pair_kl(q, p, value, analytic)
    return scale_and_mask(term, q_site["scale"], q_mask), None, (q, p), closed_form


def _chain_kl(
    name: str, q: Chain, p: Chain, path: Tensor, analytic: bool
) -> tuple[Tensor, tuple[Conditionals, Conditionals], bool]:
    mask = q.step_mask
    if not _same(mask, p.step_mask):
        raise ValueError(
            f"site {name!r}: the chains of guide and model have different masks, expected the same real steps in both"
        )
    if mask is not None:
        path = repeat_first_step(path, mask)
    q_at, p_at = q.conditionals(path), p.conditionals(path)
    per_step, closed_form = _pair_kl(q_at.initial, p_at.initial, path[..., 0, :], analytic)
    per_step = per_step.unsqueeze(-1)
    if q_at.steps is not None:
        later, later_closed_form = _pair_kl(q_at.steps, p_at.steps, path[..., 1:, :].movedim(-2, 0), analytic)
        later = later.movedim(0, -1)
        closed_form = closed_form and later_closed_form
        per_step = torch.cat([per_step.expand(*later.shape[:-1], 1), later], -1)
    if mask is not None:
        per_step = overwrite_padding(per_step, mask, event_dims=0)
    return per_step, (q_at, p_at), closed_form


def _pair_kl(q: Any, p: Any, value: Tensor, analytic: bool) -> tuple[Tensor, bool]:
    if analytic:
        try:
            return kl_divergence(q, p), True
        except NotImplementedError:
            pass  # no closed form: the caller names the site in `monte_carlo`
    return q.log_prob(value) - p.log_prob(value), False


def _check_sites(observed: dict[str, Site], latent: dict[str, Site], guide_sites: dict[str, Site]) -> None:
    if not observed:
        raise ValueError("model: observes nothing, expected at least one site with obs=...")
    missing, extra = sorted(set(latent) - set(guide_sites)), sorted(set(guide_sites) - set(latent))
    if missing:
        raise ValueError(
            f"guide: has no site {missing}, which the model samples; expected one site for each latent of the model"
        )
    if extra:
        raise ValueError(
            f"model: has no latent site {extra}, which the guide samples; expected the sites {sorted(latent)}"
        )
    for name, site in guide_sites.items():
        if site["infer"].get("enumerate"):
            raise ValueError(
                f"guide: site {name!r} is enumerated, which the ledger does not support; "
                "expected a reparameterised sample"
            )
        if not site["fn"].has_rsample:
            raise ValueError(
                f"guide: site {name!r} has no rsample ({type(site['fn']).__name__}), so the gradient of its parameters "
                "would be silently wrong; expected a reparameterised distribution"
            )


def _check_agreement(name: str, q_site: Site, p_site: Site, q_mask: Any, p_mask: Any) -> None:
    if not _same(q_site["scale"], p_site["scale"]):
        raise ValueError(
            f"site {name!r}: is scaled by {p_site['scale']} in the model and by {q_site['scale']} in the guide, "
            "expected the same; put the weight of a term into ELBOTerms.elbo(weights)"
        )
    if not _same(q_mask, p_mask):
        raise ValueError(f"site {name!r}: has different masks in model and guide, expected the same")


def _unmasked(site: Site) -> tuple[Any, Any]:
    """Return a site's distribution without `.mask(...)` around it, and all its masks in one."""
    fn, mask = site["fn"], site["mask"]
    while isinstance(fn, dist.MaskedDistribution):
        mask = fn._mask if mask is None else mask & fn._mask
        fn = fn.base_dist
    return fn, mask


def _same(a: Any, b: Any) -> bool:
    if a is b or a is None or b is None:
        return a is b
    try:
        return bool(torch.as_tensor(a == b).all())
    except RuntimeError:  # shapes that do not broadcast
        return False


def _to_step(factor: Any) -> Any:
    return factor.unsqueeze(-1) if isinstance(factor, Tensor) and factor.ndim else factor


def _sequences_plate(observed: dict[str, Site]) -> Any:
    frames = [
        frame
        for site in observed.values()
        for frame in site["cond_indep_stack"]
        if frame.vectorized and frame.name != _PARTICLES
    ]
    return min(frames, key=lambda frame: frame.dim, default=None)


def _per_sequence(term: Tensor, site: Site, plate: Any, *, event_dims: int = 0) -> Tensor:
    """Sum a term over all batch dimensions but the particles' and the sequences'."""
    event_shape = term.shape[term.ndim - event_dims :]
    term = term.expand(
        torch.broadcast_shapes(term.shape[: term.ndim - event_dims], site["fn"].batch_shape) + event_shape
    )
    kept = {
        frame.dim
        for frame in site["cond_indep_stack"]
        if frame.vectorized and (frame.name == _PARTICLES or (plate is not None and frame.name == plate.name))
    }
    summed = [dim - event_dims for dim in range(-(term.ndim - event_dims), 0) if dim not in kept]
    return term.sum(summed) if summed else term


def _in_particle_plate(fn: Callable[..., Any], num_particles: int, dim: int) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(_PARTICLES, num_particles, dim=dim):
            return fn(*args, **kwargs)

    return run


def _max_plate_nesting(model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any) -> int:
    """Run both once, without touching the random state, to find the leftmost plate."""
    with torch.random.fork_rng(), torch.no_grad(), poutine.block():
        traces = _traces(model, guide, args, kwargs)
    frames = [f for trace in traces for s in sample_sites(trace).values() for f in s["cond_indep_stack"]]
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)
