"""The objectives: each estimator's gradient against an exact one, and against Pyro's own densities, draw by draw."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    PROGRAMS,
    StateSpace,
    emission,
    normal,
    ragged_chain,
    recurrent_chain,
    with_global_site,
    without_padding,
)
from pyro import poutine
from pyro.distributions.transforms import AffineAutoregressive
from pyro.nn import AutoRegressiveNN
from strategies import Tensors, lengths, mask_of, seeds
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from seqdisent import DecomposedELBO, MarkovChain, elbo_terms

exact = functools.partial(assert_close, rtol=1e-9, atol=1e-9)
MEAN_OF = {"elbo": "elbo", "stl": "elbo", "iwae": "iwae", "dreg": "iwae"}
objectives = pytest.mark.parametrize("objective", MEAN_OF)


def gradient(value, parameters):
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, parameters, strict=True)]
    )


# ---------------------------------------------------------------------------------------------------------------------
# The exact gradient
# ---------------------------------------------------------------------------------------------------------------------


class SharedChain:
    """A static s beside a chain z, one coordinate each, linear and Gaussian, with padding.

    The guide draws s, then z given s and the frames. `a` and `b` are parameters of model and guide alike.
    """

    NAMES = ("a", "b", "c", "s_loc", "q_s_of_x", "q_z_of_x", "log_scale", "q_log_scale")

    def __init__(self, lengths, seed=0):
        tensors = Tensors(seed)
        values = [0.7, 0.5, 0.9, 0.3, 0.4, 0.6, -0.4, -0.5]
        self.parameters = {
            name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
            for name, value in zip(self.NAMES, values, strict=True)
        }
        self.mask = mask_of(lengths)
        self.frames = torch.where(self.mask.unsqueeze(-1), tensors.normal(*self.mask.shape, 1), torch.nan)

    def __getattr__(self, name):
        return self.__dict__["parameters"][name]

    def model(self, frames, mask):
        zeros = frames.new_zeros(len(frames), 1)
        with pyro.plate("sequences", len(frames)):
            s = pyro.sample("s", normal(self.s_loc + zeros, 1.0))
            initial = normal(self.b * s, self.log_scale.exp())

            def step(z_prev):
                return normal(self.a * z_prev + self.b * s, self.log_scale.exp())

            z = pyro.sample("z", MarkovChain(initial, step, frames.shape[1], mask=mask))
            pyro.sample("x", emission(self.c * z, 0.5, mask), obs=without_padding(frames, mask))

    def guide(self, frames, mask):
        frames = without_padding(frames, mask)
        with pyro.plate("sequences", len(frames)):
            s = pyro.sample("s", normal(self.q_s_of_x * frames[:, 0], self.q_log_scale.exp()))
            initial = normal(self.q_z_of_x * frames[:, 0] + self.b * s, self.q_log_scale.exp())

            def step(z_prev, frame):
                return normal(self.a * z_prev + self.q_z_of_x * frame + self.b * s, self.q_log_scale.exp())

            pyro.sample("z", MarkovChain(initial, step, frames.shape[1], inputs=frames, mask=mask))

    def factors(self, x):
        """The same for one sequence x (T,): (parents {index: weight}, offset, scale) of p and q; s is 0, z_t t."""
        p = [({}, self.s_loc, torch.ones(()))]
        q = [({}, self.q_s_of_x * x[0], self.q_log_scale.exp())]
        for t in range(1, len(x) + 1):
            parents = {0: self.b} if t == 1 else {0: self.b, t - 1: self.a}
            p.append((parents, torch.zeros(()), self.log_scale.exp()))
            q.append((parents, self.q_z_of_x * x[t - 1], self.q_log_scale.exp()))
        return p, q

    def dense(self, factors):
        """Return the joint Gaussian of factors: v = A v + b + e."""
        size = len(factors)
        matrix = torch.zeros(size, size, dtype=torch.float64)
        for i, (parents, _, _) in enumerate(factors):
            for j, weight in parents.items():
                matrix = matrix.index_put((torch.tensor(i), torch.tensor(j)), weight)
        inverse = torch.linalg.inv(torch.eye(size, dtype=torch.float64) - matrix)
        offset, scale = (torch.stack([factor[i].double() for factor in factors]) for i in (1, 2))
        return inverse @ offset, inverse @ torch.diag(scale**2) @ inverse.T

    def exact_elbo(self):
        """Return the sum of the bounds: E_q log p(x | z) - KL(q, p) of dense Gaussians."""
        total = torch.zeros(())
        for frames, real in zip(self.frames, self.mask, strict=True):
            x = frames[real, 0]
            (p_mean, p_cov), (q_mean, q_cov) = (self.dense(of) for of in self.factors(x))
            error = (x - self.c * q_mean[1:]) ** 2 + self.c**2 * q_cov.diagonal()[1:]
            log_p = (-0.5 * error / 0.5**2 - math.log(0.5) - 0.5 * math.log(2 * math.pi)).sum()
            total = total + log_p - reference.gaussian_kl(q_mean, q_cov, p_mean, p_cov)
        return total

    def exact_iwae(self, num_points):
        """Return the sum of the bounds of 2 particles, by Gauss-Hermite quadrature over their noise."""
        points, weights = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(num_points))
        weights = weights / weights.sum()
        total = torch.zeros(())
        for frames, real in zip(self.frames, self.mask, strict=True):
            x = frames[real, 0]
            p, q = self.factors(x)
            grids = torch.meshgrid([points] * len(q), indexing="ij")
            noise = [grid.flatten() for grid in grids]
            v, log_w = [], torch.zeros(())
            for i in range(len(q)):
                (parents, offset, scale), (p_parents, p_offset, p_scale) = q[i], p[i]
                v.append(offset + sum((w * v[j] for j, w in parents.items()), start=0.0) + scale * noise[i])
                p_loc = p_offset + sum((w * v[j] for j, w in p_parents.items()), start=0.0)
                log_w = log_w - 0.5 * ((v[i] - p_loc) / p_scale) ** 2 - p_scale.log()
                log_w = log_w + 0.5 * noise[i] ** 2 + scale.log()
                if i > 0:
                    log_w = log_w - 0.5 * ((x[i - 1] - self.c * v[i]) / 0.5) ** 2
                    log_w = log_w - math.log(0.5) - 0.5 * math.log(2 * math.pi)
            weight = torch.stack([w.flatten() for w in torch.meshgrid([weights] * len(q), indexing="ij")]).prod(0)
            both = torch.logaddexp(log_w[:, None], log_w) - math.log(2)
            total = total + weight @ both @ weight
        return total


def sampled(model, guide, args, parameters, objective, *, num_particles, runs):
    """Return mean and standard error of the gradient of the summed bound, over `runs` runs."""
    found = []
    for run in range(runs):
        torch.manual_seed(run)
        options = {"num_particles": num_particles, "vectorize_particles": num_particles > 1}
        terms = elbo_terms(model, guide, *args, objective=objective, kl="monte-carlo", **options)
        found.append(gradient(terms.bound().sum(), parameters))
    found = torch.stack(found)
    return found.mean(0), found.std(0) / runs**0.5


def repeated(args, times):
    """Return the same sequences so many times, for many draws in one run."""
    return tuple(arg.repeat(times, *[1] * (arg.ndim - 1)) for arg in args)


@objectives
def test_its_mean_is_the_exact_gradient(objective):
    """Within 4 standard errors, for parameters of model, guide and both. 50 runs of 400 draws of each sequence."""
    made = SharedChain([2, 1])
    parameters, times = list(made.parameters.values()), 400
    bound = made.exact_elbo() if MEAN_OF[objective] == "elbo" else made.exact_iwae(14)
    wanted = gradient(bound, parameters)
    args = repeated((made.frames, made.mask), times)
    particles = 1 if MEAN_OF[objective] == "elbo" else 2
    mean, error = sampled(made.model, made.guide, args, parameters, objective, num_particles=particles, runs=50)
    assert (error / times < 0.1).all()  # the gradient's norm is 7
    assert ((mean / times - wanted).abs() < 4 * error / times).all()


def test_the_quadrature_has_converged():
    """To a small part of the standard errors that it is compared within."""
    made = SharedChain([2, 1])
    parameters = list(made.parameters.values())
    assert_close(*(gradient(made.exact_iwae(n), parameters) for n in (12, 14)), rtol=0, atol=2e-3)


class Flow(AffineAutoregressive):
    """Pyro's, whose own inverse starts from zeros in float32 and fails in float64."""

    def _inverse(self, y):
        x = torch.zeros_like(y)
        for _ in range(y.shape[-1]):  # with each turn, one more coordinate is right
            mean, log_scale = self.arn(x)
            x = (y - mean) * (-log_scale).exp()
        self._cached_log_scale = log_scale
        return x


@pytest.mark.parametrize("objective", ["stl", "dreg"])
def test_its_mean_is_that_of_the_plain_gradient_under_a_flow(objective):
    """Of a chain whose guide is an inverse autoregressive flow, with padding: within 4 standard errors of both."""
    system, (flow,) = StateSpace(1), Tensors(3).build(lambda: nn.ModuleList([Flow(AutoRegressiveNN(2, [4]))]))
    mask = mask_of([3, 1, 2])
    frames = torch.where(mask.unsqueeze(-1), Tensors(2).normal(3, 3, 2), torch.nan)

    def guide(frames, mask):
        features = without_padding(frames, mask) @ system.encode.T

        def step(z_prev, features):
            base = normal(system.carry * z_prev + features, system.guide_scale)
            return dist.TransformedDistribution(base, [flow])

        with pyro.plate("sequences", len(frames)):
            initial = dist.TransformedDistribution(normal(features[:, 0], system.guide_scale), [flow])
            pyro.sample("z", MarkovChain(initial, step, frames.shape[1], inputs=features, mask=mask))

    parameters = [p.requires_grad_() for p in system.parameters()] + list(flow.parameters())
    args, particles = repeated((frames, mask), 60), 1 if objective == "stl" else 3
    draws = {"num_particles": particles, "runs": 40}
    mean, error = sampled(system.model, guide, args, parameters, objective, **draws)
    plain, plain_error = sampled(system.model, guide, args, parameters, MEAN_OF[objective], **draws)
    assert ((mean - plain).abs() <= 4 * (error**2 + plain_error**2).sqrt() + 1e-9).all()
    size = sum(p.numel() for p in system.parameters())
    assert (error[size:] > 0).any()  # the flow's own parameters are among them


# ---------------------------------------------------------------------------------------------------------------------
# Draw by draw, against Pyro's own densities
# ---------------------------------------------------------------------------------------------------------------------


def held(program, guide_trace):
    """Return a trace of a guide with the draws of another, through which no gradient flows."""
    fixed = poutine.trace(program.guide).get_trace(*program.args)
    for name in guide_trace.stochastic_nodes:
        fixed.nodes[name]["value"] = guide_trace.nodes[name]["value"].detach()
    return fixed


def by_pyro(program, objective, num_particles):
    """Return value and gradient of the bound of one sequence, from traces whose densities Pyro sums."""
    log_w, held_q, held_p = [], [], []
    for _ in range(num_particles):
        guide_trace = poutine.trace(program.guide).get_trace(*program.args)
        trace = poutine.trace(poutine.replay(program.model, trace=guide_trace)).get_trace(*program.args)
        log_w.append(trace.log_prob_sum() - guide_trace.log_prob_sum())
        with torch.random.fork_rng([]):
            fixed = held(program, guide_trace)
            for densities, fn in ((held_q, program.guide), (held_p, program.model)):
                densities.append(poutine.trace(poutine.replay(fn, trace=fixed)).get_trace(*program.args).log_prob_sum())
    of_w, of_q, of_p = (gradients_of(each, program.parameters) for each in (log_w, held_q, held_p))
    log_w = torch.stack(log_w).detach()
    weights = log_w.softmax(0)[:, None]
    path, score = of_w - (of_p - of_q), of_q
    if objective in ("elbo", "stl"):
        found = (path + of_p - (score if objective == "elbo" else 0)).mean(0)
        return log_w.mean(), found
    bound = log_w.logsumexp(0) - math.log(num_particles)
    if objective == "iwae":
        return bound, (weights * of_w).sum(0)
    return bound, (weights**2 * path + weights * of_p).sum(0)


def gradients_of(values, parameters):
    return torch.stack([gradient(value, parameters) for value in values])


WITH_WEIGHTS = [  # whose sites are densities of a sequence
    build for build in PROGRAMS if not build(0, 1, 2).outside and build.__name__ not in ("subsampled", "scaled")
]


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize(
    ("build", "objective"),
    [(build, "stl") for build in PROGRAMS] + [(b, o) for b in WITH_WEIGHTS for o in ("elbo", "iwae", "dreg")],
    ids=lambda value: getattr(value, "__name__", value),
)
@settings(max_examples=5)  # several traces each, of every program
@given(seed=seeds())
def test_it_is_what_pyros_densities_say(build, objective, num_particles, seed):
    program = build(seed, 1, 3)
    for parameter in program.parameters:
        parameter.requires_grad_()
    torch.manual_seed(seed)
    options = {"num_particles": num_particles, "objective": objective, "kl": "monte-carlo"}
    bound = elbo_terms(program.model, program.guide, *program.args, **program.kwargs, **options).bound().sum()
    found = gradient(bound, program.parameters)
    torch.manual_seed(seed)
    wanted_bound, wanted = by_pyro(program, objective, num_particles)
    exact(bound, wanted_bound)
    exact(found, wanted)


@given(seed=seeds(), weight=st.floats(0.1, 2.0))
@settings(max_examples=10)
def test_a_weight_counts_for_the_score_too(seed, weight):
    """Of g, outside the sequences' plate, and s, within: the weighted bound without the weighted score."""
    program = with_global_site(seed, 3, 2)
    for parameter in program.parameters:
        parameter.requires_grad_()
    torch.manual_seed(seed)
    terms = elbo_terms(program.model, program.guide, *program.args, objective="stl")
    torch.manual_seed(seed)
    guide_trace = poutine.trace(program.guide).get_trace(*program.args)
    again = poutine.trace(poutine.replay(program.guide, trace=held(program, guide_trace))).get_trace(*program.args)
    again.compute_log_prob()
    score = weight * again.nodes["g"]["log_prob_sum"] + again.nodes["s"]["log_prob_sum"]
    weights = {"g": weight}
    exact(terms.bound(weights), terms.elbo(weights))
    found = gradient(terms.bound(weights).sum(), program.parameters)
    exact(found, gradient(terms.elbo(weights).sum() + score, program.parameters))


# ---------------------------------------------------------------------------------------------------------------------
# What follows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "num_particles"), [("stl", 1), ("stl", 3), ("dreg", 1), ("dreg", 3)])
@given(seed=seeds(), row_lengths=lengths(3, 3))
@settings(max_examples=10)  # the exact posterior is built row by row
def test_at_the_exact_posterior_the_guide_has_no_gradient(objective, num_particles, seed, row_lengths):
    """Whatever was drawn; the plain gradient is noise."""
    system, guide = StateSpace(seed), StateSpace(seed)
    mask = mask_of(row_lengths)
    frames = torch.where(mask.unsqueeze(-1), Tensors(seed + 1).normal(*mask.shape, 2), torch.nan)
    parameters = [p.requires_grad_() for p in guide.parameters()][:8]  # those of the posterior
    found = {}
    for name in (objective, MEAN_OF[objective]):
        torch.manual_seed(seed)
        options = {"num_particles": num_particles, "vectorize_particles": num_particles > 1, "kl": "monte-carlo"}
        terms = elbo_terms(system.model, guide.exact_guide, frames, mask, objective=name, **options)
        found[name] = gradient(terms.bound().sum(), parameters)
    assert_close(found[objective], torch.zeros_like(found[objective]), rtol=0, atol=1e-7)
    assert found[MEAN_OF[objective]].abs().max() > 1e-2


@pytest.mark.parametrize("vectorised", [False, True])
@pytest.mark.parametrize(("one", "other"), [("iwae", "elbo"), ("dreg", "stl")])
@given(seed=seeds())
@settings(max_examples=5)
def test_one_particle_is_the_elbo(one, other, vectorised, seed):
    program = ragged_chain(seed, 3, 3)
    for parameter in program.parameters:
        parameter.requires_grad_()
    found = []
    for objective in (one, other):
        torch.manual_seed(seed)
        options = {"objective": objective, "kl": "monte-carlo", "vectorize_particles": vectorised}
        bound = elbo_terms(program.model, program.guide, *program.args, **options).bound()
        found.append((bound, gradient(bound.sum(), program.parameters)))
    exact(*found)


@pytest.mark.parametrize("vectorised", [False, True])
@objectives
@given(seed=seeds())
@settings(max_examples=5)
def test_the_terms_are_the_same_for_all(objective, vectorised, seed):
    program = recurrent_chain(seed, 3, 3)
    found = []
    for name in ("elbo", objective):
        torch.manual_seed(seed)
        options = {"kl": "monte-carlo", "num_particles": 3, "vectorize_particles": vectorised}
        found.append(elbo_terms(program.model, program.guide, *program.args, objective=name, **options))
        after = torch.rand(3)
    plain, terms = found
    for name, term in plain.terms.items():
        exact(terms.terms[name].value, term.value)
    exact(terms.bound(), plain.elbo() if MEAN_OF[objective] == "elbo" else plain.importance_weighted())
    torch.manual_seed(seed)
    elbo_terms(program.model, program.guide, *program.args, **options)
    assert torch.equal(torch.rand(3), after)  # nor do the second runs move the random state


@pytest.mark.parametrize("vectorised", [False, True])
def test_the_second_run_drops_out_the_same_units(vectorised):
    """Else the score would be that of another guide than the one that drew, and its mean not 0."""
    dropped = []

    def dropout(value):
        kept = F.dropout(torch.ones_like(value))
        dropped.append(kept)
        return value * kept

    def model(x):
        with pyro.plate("sequences", len(x)):
            s = pyro.sample("s", normal(x.new_zeros(2), 1.0))
            z = pyro.sample("z", normal(dropout(s), 1.0))
            pyro.sample("x", normal(dropout(z), 1.0), obs=x)

    def guide(x):
        with pyro.plate("sequences", len(x)):
            s = pyro.sample("s", normal(dropout(x), 1.0))
            pyro.sample("z", normal(dropout(s), 1.0))

    elbo_terms(model, guide, torch.ones(5, 2), objective="dreg", num_particles=2, vectorize_particles=vectorised)
    dropped = dropped[4:] if vectorised else dropped  # of the run that looks for the place of the particles
    assert len(dropped) == (8 if vectorised else 16)
    for i in range(0, len(dropped), 8):
        for first, again in zip(dropped[i : i + 4], dropped[i + 4 : i + 8], strict=True):
            assert torch.equal(first, again)
    assert not torch.equal(dropped[0], dropped[1])
    after = []
    for objective in ("iwae", "stl", "dreg"):
        torch.manual_seed(0)
        options = {"objective": objective, "num_particles": 2, "vectorize_particles": vectorised}
        elbo_terms(model, guide, torch.ones(5, 2), **options)
        after.append(torch.rand(3))
    assert torch.equal(after[1], after[0])  # of the guide alone, too: the model's noise is not drawn again
    assert torch.equal(after[2], after[0])


@pytest.mark.parametrize(
    ("objective", "num_particles", "with_gradient", "runs"),
    [("elbo", 3, True, (1, 1)), ("iwae", 3, True, (1, 1)), ("stl", 3, True, (2, 1)), ("dreg", 3, True, (2, 2)),
     ("dreg", 1, True, (2, 1)), ("stl", 3, False, (1, 1)), ("dreg", 3, False, (1, 1))],
)  # fmt: skip
def test_a_program_runs_again_only_where_that_is_needed(objective, num_particles, with_gradient, runs):
    system, calls = StateSpace(0), []

    def counted(name, program):
        def run(frames):
            calls.append(name)
            return program(frames)

        return run

    with torch.set_grad_enabled(with_gradient):
        elbo_terms(counted("model", system.model), counted("guide", system.guide), Tensors(1).normal(2, 3, 2),
                   objective=objective, num_particles=num_particles, vectorize_particles=True)  # fmt: skip
    assert (calls.count("guide") - 1, calls.count("model") - 1) == runs  # one looks for the place of the particles


@given(seed=seeds())
@settings(max_examples=5)
def test_holes_have_no_effect(seed):
    """A frame that was not observed changes neither bound nor gradient."""
    system = StateSpace(seed)
    frames, observed = Tensors(seed + 1).normal(3, 4, 2), Tensors(seed + 2).uniform(3, 4) < 0.6
    parameters = [p.requires_grad_() for p in system.parameters()]

    def guide(frames, observed):
        system.guide(torch.where(observed.unsqueeze(-1), frames, 0.0))

    def model(frames, observed):
        system.model(frames, None, observed)

    found = []
    for hidden in (0.0, float("nan")):
        torch.manual_seed(seed)
        x = torch.where(observed.unsqueeze(-1), frames, hidden)
        options = {"objective": "dreg", "num_particles": 3, "vectorize_particles": True}
        bound = elbo_terms(model, guide, x, observed, **options).bound()
        found.append((bound, gradient(bound.sum(), parameters)))
    exact(*found)
    assert found[0][1].isfinite().all()


def test_a_point_that_reads_the_latents_alone_is_a_change_of_variables():
    """As in Pyro's automatic guides: the gradient is that of the site itself."""
    loc = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = Tensors(0).normal(4)

    def model(x):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", dist.LogNormal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", dist.LogNormal(loc * x, 0.5))

    def automatic(x):
        with pyro.plate("sequences", len(x)):
            u = pyro.sample("u", dist.Normal(loc * x, 0.5), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.exp(), log_density=-u))

    for objective in MEAN_OF:
        found = []
        for program in (guide, automatic):
            torch.manual_seed(0)
            options = {"kl": "monte-carlo", "num_particles": 3, "vectorize_particles": True}
            bound = elbo_terms(model, program, x, objective=objective, **options).bound()
            found.append((bound, gradient(bound.sum(), [loc])))
        exact(*found)


def test_a_particle_without_weight_has_no_gradient_and_does_no_harm():
    scale = torch.tensor(1.0, requires_grad=True)
    x = torch.tensor([0.1, 0.9])

    def model(x):
        with pyro.plate("sequences", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Uniform(z - 1, z + 1, validate_args=False), obs=x)

    def guide(x):
        with pyro.plate("sequences", 2):
            pyro.sample("z", dist.Normal(0.0, scale).expand([2]))

    torch.manual_seed(0)
    terms = elbo_terms(model, guide, x, objective="dreg", num_particles=20, vectorize_particles=True)
    assert terms.log_weights().isinf().any()
    terms.bound().sum().backward()
    assert terms.bound().isfinite().all()
    assert scale.grad.isfinite()


@objectives
def test_pyros_svi_takes_it(objective):
    program = ragged_chain(0, 3, 3)
    for parameter in program.parameters:
        parameter.requires_grad_()
    options = {"objective": objective, "num_particles": 3, "vectorize_particles": True}
    torch.manual_seed(0)
    bound = elbo_terms(program.model, program.guide, *program.args, **options).bound().sum()
    wanted = gradient(bound, program.parameters)
    torch.manual_seed(0)
    loss = DecomposedELBO(**options).loss_and_grads(program.model, program.guide, *program.args)
    assert loss == pytest.approx(-bound.item())
    exact(torch.cat([p.grad.flatten() for p in program.parameters]), -wanted)
    torch.manual_seed(0)
    assert DecomposedELBO(**options).loss(program.model, program.guide, *program.args) == pytest.approx(loss)


def counted_programs():
    """Model and guide in a plate of their own, and how often each ran."""
    runs = {"model": 0, "guide": 0}

    def model(x):
        runs["model"] += 1
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    loc = torch.zeros(3, requires_grad=True)

    def guide(x):
        runs["guide"] += 1
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    return model, guide, runs


def test_the_place_of_the_particles_is_found_out_once():
    model, guide, runs = counted_programs()
    loss = DecomposedELBO(objective="iwae", num_particles=4, vectorize_particles=True)
    for _ in range(3):
        loss.loss_and_grads(model, guide, torch.ones(3))
    assert runs == {"model": 4, "guide": 4}


def test_the_place_of_the_particles_can_be_said():
    model, guide, runs = counted_programs()
    options = {"objective": "iwae", "num_particles": 4, "vectorize_particles": True}
    torch.manual_seed(0)
    found_out = elbo_terms(model, guide, torch.ones(3), **options)
    torch.manual_seed(0)
    said = elbo_terms(model, guide, torch.ones(3), **options, max_plate_nesting=1)
    assert runs == {"model": 3, "guide": 3}
    exact(said.bound(), found_out.bound())
