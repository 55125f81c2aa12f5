"""A particle filter for any model and guide whose latents are chains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from seqdisent._checks import check_positive
from seqdisent.masks import fill_padding
from seqdisent.particles.programs import Programs, examined
from seqdisent.particles.resampling import Scheme, check_scheme, effective_sample_size, pick, resample
from seqdisent.particles.steps import SingleSteps, WholeRuns, agree, runs_alone

RESAMPLING: Scheme = "systematic"
THRESHOLD = 0.5  # of the effective sample size, as a part of K


@dataclass(frozen=True, eq=False)
class Particles:
    r"""What a particle filter has found: K particles of each of B sequences.

    Attributes:
        log_evidence_per_step: (B, T), the estimate of :math:`\log p(x_t \mid x_{1:t-1})`, in nats; 0 at padding.
        log_weights_per_step: (K, B, T), normalised, after each step and before any resampling.
        draws: {trajectory: (K, B, T, \*E)}, what was drawn at each step. With `log_weights_per_step`, it is the
            filtering distribution :math:`p(z_t \mid x_{1:t})`.
        static: {site that does not change over time: (K, B, \*E)}, of the particles of the last step.
        effective_sample_sizes: (B, T), :math:`1 / \sum_k (W_t^k)^2`, from 1 to K, before any resampling; at padding
            that of the last real step.
        ancestors: (K, B, T) int64, from which particle of the step before each one went on.
        runs: how the model was run: on one ``"step"`` at a time, or on the whole ``"sequence"`` for each step, which
            costs T times as much.
    """

    log_evidence_per_step: Tensor
    log_weights_per_step: Tensor
    draws: dict[str, Tensor]
    static: dict[str, Tensor]
    effective_sample_sizes: Tensor
    ancestors: Tensor
    runs: Literal["step", "sequence"]
    _real: Tensor = field(repr=False)
    _chains: Mapping[str, Any] | None = field(repr=False)  # the model's

    @property
    def log_evidence(self) -> Tensor:
        r"""The estimate of :math:`\log p(x_{1:T})` of each sequence, (B,), in nats; its exponential is unbiased."""
        return self.log_evidence_per_step.sum(-1)

    @property
    def log_weights(self) -> Tensor:
        """The log-weights of the particles of the last step, (K, B), normalised."""
        return self.log_weights_per_step[..., -1]

    @cached_property
    def paths(self) -> dict[str, Tensor]:
        r"""The ancestral paths of the particles of the last step, {trajectory: (K, B, T, \*E)}.

        With `log_weights`, they are the smoothing distribution, but early steps have few different values. Padding
        repeats the first step.
        """
        return _ancestral_paths(self.draws, self.ancestors, self._real, self.num_particles)

    @property
    def num_particles(self) -> int:
        """K."""
        return self.log_weights_per_step.shape[0]

    def __repr__(self) -> str:
        (num_sequences, num_steps), mean = self.log_evidence_per_step.shape, self.log_evidence.detach().mean().item()
        return (
            f"Particles({self.num_particles} of {num_sequences} sequences of {num_steps} steps, mean "
            f"log_evidence={mean:.4g} nats, a {self.runs} a run)"
        )


def filter(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int,
    resampling: Scheme = RESAMPLING,
    threshold: float = THRESHOLD,
    **kwargs: Any,
) -> Particles:
    r"""Run a particle filter with a model's own steps, and a guide's as its proposal.

    At each step, particle k goes on from :math:`z_{t-1}^k` by a draw of :math:`q(z_t \mid z_{t-1}^k, \cdot)` and has
    its weight multiplied by

    .. math:: \frac{p(x_t \mid z_t^k, \cdot) \, p(z_t^k \mid z_{t-1}^k, \cdot)}{q(z_t^k \mid z_{t-1}^k, \cdot)}.

    Where a sequence's effective sample size falls below `threshold` times K, its particles are drawn anew by their
    weights before the next step. The exponential of the log-evidence is unbiased, so the log-evidence is a lower bound
    in expectation, as the importance-weighted bound is, but its error grows about in proportion to the number of steps,
    and not exponentially. With ``threshold=0`` it is that bound.

    The latents are chains, any number of them, and sites that do not change over time, which are drawn once for each
    particle and resampled with it. Each resampling leaves fewer different values of these, and the effective sample
    size does not show it: with a static code, also try ``threshold=0``, on other sequences than those that count, since
    the larger of two noisy bounds is no bound. After a resampling the guide runs again on the whole sequence, if it has
    a static site. A guide that reads the whole sequence is a proposal with lookahead. One whose latents read each
    other's later steps is allowed too: while step t is drawn, later steps hold placeholders, fresh draws for
    :class:`~seqdisent.IndependentSteps` and copies of step t for a chain. Each step of the *model* may read only
    earlier steps and its own, which is checked on a final path.

    Where a run of the model on one step alone gives the terms that a run on the whole sequence has, which is tried on
    one draw of the guide, the cost of a step does not depend on T; what a :class:`~seqdisent.RecurrentChain` carries is
    known in such a run to ``chain.states(z)``. Any other model is run on the whole sequence for each step. `runs` of
    the result says which it was. Tensor arguments of shape (B, T, ...) are cut to the step.

    With gradients enabled, the log-evidence has a gradient in the parameters, in which the ancestors are constants, as
    in the references. A proposal without ``rsample`` whose parameters have a gradient is an error. To train on it,
    there is ``objective="fivo"`` of :func:`~seqdisent.elbo_terms`, which refuses such a proposal.

    Args:
        model: a Pyro model, as of :func:`~seqdisent.elbo_terms`.
        guide: its guide; its chains can be drawn step by step.
        *args: given to both.
        num_particles: K, at least 1.
        resampling: how particles are drawn anew, as of :func:`~seqdisent.particles.resample`.
        threshold: in [0, 1], the part of K below which the effective sample size makes a sequence resample; 0 for
            never, 1 for nearly always.
        **kwargs: given to both.

    Returns:
        :class:`~seqdisent.particles.Particles`.

    Raises:
        ValueError: `num_particles` below 1, `threshold` outside [0, 1], an unknown `resampling`; a latent that is in
            another plate than that of the sequences, or scaled; a guide's chain without `step`, or a static site after
            a chain in it; an observed site without steps; a model whose step reads later ones, or that draws at random
            what is no site; and what :func:`~seqdisent.elbo_terms` says of sites that do not fit.
        TypeError: a mask that is not bool.
        FloatingPointError: all particles of a sequence have weight 0 at a step, or one has NaN; it names both.
        RuntimeError: a program that fails with a particle dimension on the left of its own.

    Example:
        A random walk seen through noise, with the prior as proposal (the bootstrap filter).

        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from seqdisent import IndependentSteps, LinearGaussianChain
        >>> from seqdisent.chains import LinearEmission
        >>> def walk(x):
        ...     one = torch.ones(1)
        ...     return LinearGaussianChain(torch.zeros(len(x), 1), one, torch.eye(1), one, x.shape[1])
        >>> def guide(x):
        ...     with pyro.plate("sequences", len(x)):
        ...         pyro.sample("z", walk(x))
        >>> def model(x):
        ...     with pyro.plate("sequences", len(x)):
        ...         z = pyro.sample("z", walk(x))
        ...         pyro.sample("x", IndependentSteps(dist.Normal(z, 0.5).to_event(1)), obs=x)
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(1, 20, 1).cumsum(1)
        >>> exact = walk(x).filter(x, LinearEmission(torch.eye(1), torch.full((1,), 0.5))).log_evidence.sum(-1)
        >>> found = filter(model, guide, x, num_particles=1000)
        >>> exact, found.log_evidence, found.paths["z"].shape
        (tensor([-31.69...]), tensor([-31.68...]), torch.Size([1000, 1, 20, 1]))

    References:
        Gordon, Salmond and Smith, "Novel approach to nonlinear/non-Gaussian Bayesian state estimation", IEE Proceedings
        F, 1993. Doucet and Johansen, "A tutorial on particle filtering and smoothing: fifteen years later", 2009. The
        gradient: Maddison et al., "Filtering variational objectives", and Naesseth et al., "Variational sequential
        Monte Carlo", without the term of the resampling.
    """
    check_positive(num_particles=num_particles)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: got {threshold}, expected a part of the particles, in [0, 1]")
    check_scheme("resampling", resampling)
    return walk(examined(model, guide, args, kwargs, num_particles), resampling, threshold)[0]


def walk(
    programs: Programs, resampling: Scheme = RESAMPLING, threshold: float = THRESHOLD, *, refuses: bool = True
) -> tuple[Particles, Walk]:
    """Run the filter; return what it has found and the terms of its steps.

    Args:
        programs: model and guide.
        resampling: as of :func:`filter`.
        threshold: likewise.
        refuses: whether weights that are no numbers are an error. Otherwise they make the log-evidence infinite or NaN,
            and the terms say where.
    """
    alone = runs_alone(programs)
    steps = SingleSteps(programs) if alone else WholeRuns(programs)
    found = _walked(programs, steps, resampling, threshold, refuses=refuses)
    ancestors = torch.stack(found.ancestors, -1)
    draws = {name: torch.stack([step[name] for step in found.draws], 2) for name in programs.trajectories}
    _check_causal(programs, found, draws, steps.static, ancestors)
    particles = Particles(
        torch.stack(found.evidence, -1), torch.stack(found.log_weights, -1), draws, steps.static,
        torch.stack([effective_sample_size(weights) for weights in found.log_weights], -1), ancestors,
        "step" if alone else "sequence", programs.real, steps.chains,
    )  # fmt: skip
    return particles, found


@dataclass
class Walk:
    """The steps of a filter, one entry each; static sites have terms at the first step alone."""

    evidence: list[Tensor] = field(default_factory=list)  # (B,)
    log_weights: list[Tensor] = field(default_factory=list)  # (K, B)
    ancestors: list[Tensor] = field(default_factory=list)  # (K, B)
    draws: list[dict[str, Tensor]] = field(default_factory=list)  # {site: (K, B, *E)}
    log_p: list[dict[str, Tensor]] = field(default_factory=list)  # {site: (K, B)}, latent or observed
    log_q: list[dict[str, Tensor]] = field(default_factory=list)  # {latent site: (K, B)}


def _walked(
    programs: Programs, steps: SingleSteps | WholeRuns, resampling: Scheme, threshold: float, *, refuses: bool
) -> Walk:
    found, num_particles, real = Walk(), programs.num_particles, programs.real
    num_sequences, num_steps = real.shape
    same = torch.arange(num_particles, device=real.device).unsqueeze(-1).expand(-1, num_sequences)
    log_weights: Tensor | None = None
    for t in range(num_steps):
        ancestors = same
        if log_weights is not None:
            is_poor = (effective_sample_size(log_weights) < threshold * num_particles) & real[:, t]
            if is_poor.any():
                ancestors = torch.where(is_poor, resample(log_weights, resampling), same)
                log_weights = torch.where(is_poor, -math.log(num_particles), log_weights)
                steps.reorder(ancestors)
        advance = steps.advance(t)
        terms = [*advance.log_p.values(), *(-log_q for log_q in advance.log_q.values())]
        increment = sum(terms[1:], start=terms[0])
        if log_weights is None:
            log_weights = torch.full_like(increment, -math.log(num_particles)).expand(num_particles, num_sequences)
        joint = log_weights + torch.where(real[:, t], increment, 0.0)
        evidence = torch.where(real[:, t], joint.logsumexp(0), 0.0)
        log_weights = joint - evidence
        if not (is_finite := evidence.isfinite()).all():
            if refuses:
                _refuse(t, evidence, advance.log_p, advance.log_q)
            log_weights = torch.where(is_finite, log_weights, -math.log(num_particles))
        found.evidence.append(evidence)
        found.log_weights.append(log_weights)
        found.ancestors.append(ancestors)
        found.draws.append(advance.values)
        found.log_p.append(advance.log_p)
        found.log_q.append(advance.log_q)
    return found


def _refuse(t: int, evidence: Tensor, log_p: Mapping[str, Tensor], log_q: Mapping[str, Tensor]) -> None:
    """Name the step and the sequence where no particle has a weight that is a number."""
    b = int((~evidence.isfinite()).nonzero()[0])
    terms = [(f"log p of {name!r}", term) for name, term in log_p.items()]
    terms += [(f"log q of {name!r}", term) for name, term in log_q.items()]
    wrong = [name for name, term in terms if not term.expand(-1, len(evidence))[:, b].isfinite().all()]
    is_zero = bool(evidence[b] == -math.inf)
    what = "all particles have weight 0" if is_zero else f"the evidence is {evidence[b].item()}"
    raise FloatingPointError(f"step {t} of sequence {b}: {what}; not finite: {', '.join(wrong) or 'their sum'}")


def _ancestral(values: Tensor, ancestors: Tensor, num_paths: int) -> Tensor:
    r"""Return what the first particles of the last step came from, of values (K, B, T, ...) at each step."""
    index = torch.arange(num_paths, device=ancestors.device).unsqueeze(-1).expand(-1, ancestors.shape[1])
    path = []
    for t in reversed(range(ancestors.shape[-1])):
        path.append(pick(values[:, :, t], index))
        index = ancestors[..., t].gather(0, index)
    return torch.stack(path[::-1], 2)


def _ancestral_paths(draws: Mapping[str, Tensor], ancestors: Tensor, real: Tensor, num_paths: int) -> dict[str, Tensor]:
    paths = {name: _ancestral(values, ancestors, num_paths) for name, values in draws.items()}
    return {name: fill_padding(path, real, event_dims=path.ndim - 3) for name, path in paths.items()}


@torch.no_grad()
def _check_causal(
    programs: Programs, found: Walk, draws: Mapping[str, Tensor], static: Mapping[str, Tensor], ancestors: Tensor
) -> None:
    """Raise unless a run of the model on whole final paths, one a sequence, has the terms that counted."""
    paths = _ancestral_paths(draws, ancestors, programs.real, 1)
    once = {name: value[:1] for name, value in static.items()}
    whole = replace(programs, num_particles=1).score_model({**paths, **once})
    num_particles, num_sequences, num_steps = ancestors.shape
    for name, wanted in whole.items():
        terms = [step[name] for step in found.log_p if name in step]  # of a static site, at the first step alone
        counted = torch.stack(terms, -1).expand(num_particles, num_sequences, num_steps)
        counted = _ancestral(counted, ancestors, 1)
        if name in static:
            counted, wanted = counted[..., :1], wanted.unsqueeze(-1)
        differ = ~agree(counted, wanted.expand(counted.shape))
        if differ.any():
            _, b, t = differ.nonzero()[0].tolist()
            raise ValueError(
                f"model: the log-density of site {name!r} at step {t} of sequence {b} is {counted[0, b, t].item():.6g} "
                f"before later steps are drawn and {wanted[0, b, t].item():.6g} after; expected a model whose steps "
                "read no later ones, and that draws nothing at random but its sites (dropout: call .eval())"
            )
