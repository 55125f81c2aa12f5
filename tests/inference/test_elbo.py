"""The ledger: Pyro's own bounds, term by term; exact where the truth is known; loud where it would be wrong."""

import functools
import math
import pickle
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import (
    PROGRAMS,
    StateSpace,
    WhoWhat,
    chain,
    check_finite_on_rank,
    emission,
    factorised,
    ledger_with,
    no_plate,
    normal,
    ragged_chain,
    subsampled,
    with_global_site,
    without_padding,
)
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from strategies import Tensors, lengths, mask_of, num_steps, padding, seeds
from torch import nn
from torch.testing import assert_close

from seqdisent import DecomposedELBO, ELBOTerms, IndependentSteps, MarkovChain, elbo_terms
from seqdisent.chains import Conditionals

exact = functools.partial(assert_close, rtol=1e-9, atol=1e-9)
CLOSED_FORM = [build for build in PROGRAMS if build(0, 2, 2).closed_form]
programs = pytest.mark.parametrize("build", PROGRAMS, ids=lambda build: build.__name__)


def seeded(function, *args, **kwargs):
    torch.manual_seed(0)
    return function(*args, **kwargs)


def ledger(program, **options):
    return seeded(elbo_terms, program.model, program.guide, *program.args, **program.kwargs, **options)


def gradients(value, parameters):
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def assert_same_bound(program, pyro_elbo, **options):
    """The ledger's bound and its gradient are those of one of Pyro's, on the same noise."""
    for parameter in program.parameters:
        parameter.requires_grad_()
    terms = ledger(program, **options)
    loss = seeded(pyro_elbo.differentiable_loss, program.model, program.guide, *program.args)
    exact(terms.elbo().sum(), -loss)
    ours = gradients(terms.elbo().sum(), program.parameters)
    theirs = gradients(-loss, program.parameters)
    for a, b in zip(ours, theirs, strict=True):
        exact(a, b)
    return terms


# ---------------------------------------------------------------------------------------------------------------------
# Pyro's own bounds
# ---------------------------------------------------------------------------------------------------------------------


@programs
@given(seed=seeds(), num_sequences=st.integers(1, 4), num_steps=num_steps(4))
def test_with_unit_weights_it_is_trace_elbo(build, seed, num_sequences, num_steps):
    program = build(seed, num_sequences, num_steps)
    terms = assert_same_bound(program, Trace_ELBO(max_plate_nesting=program.nesting), kl="monte-carlo")
    assert terms.monte_carlo == set(terms.kl)
    assert set(terms.log_likelihood) | set(terms.kl) == set(program.sites)
    assert set(terms.kl_per_step) == set(terms.conditionals) & set(program.chains) == set(program.chains)


@pytest.mark.parametrize("build", CLOSED_FORM, ids=lambda build: build.__name__)
@given(seed=seeds(), num_sequences=st.integers(1, 4), num_steps=num_steps(4))
def test_with_closed_forms_it_is_trace_mean_field_elbo(build, seed, num_sequences, num_steps):
    program = build(seed, num_sequences, num_steps)
    terms = assert_same_bound(program, TraceMeanField_ELBO(max_plate_nesting=program.nesting))
    assert terms.monte_carlo == frozenset()


@given(seeds(), lengths(4, 3))
def test_sites_beside_a_chain_are_those_of_trace_mean_field_elbo(seed, row_lengths):
    """Pyro knows no closed form for a chain, so there z is Monte Carlo; s and d are closed in both."""
    what, mask = WhoWhat(seed), mask_of(row_lengths)
    frames = Tensors(seed + 1).normal(*mask.shape, 4)
    terms = seeded(elbo_terms, what.model, what.guide, frames, mask)
    sampled = seeded(elbo_terms, what.model, what.guide, frames, mask, kl="monte-carlo")
    bound = terms.log_likelihood["x"] - terms.kl["s"] - terms.kl["d"] - sampled.kl["z"]
    pyro_elbo = TraceMeanField_ELBO(max_plate_nesting=1)
    loss = seeded(pyro_elbo.differentiable_loss, what.model, what.guide, frames, mask)
    exact(bound.sum(), -loss)


@pytest.mark.parametrize(
    ("build", "kl"),
    [(build, "monte-carlo") for build in PROGRAMS] + [(build, "analytic") for build in CLOSED_FORM],
    ids=lambda value: getattr(value, "__name__", value),
)
@given(seed=seeds(), num_sequences=st.integers(1, 3), num_steps=num_steps(3))
def test_particles_are_trace_elbo_too_in_a_loop_and_in_a_plate(build, kl, seed, num_sequences, num_steps):
    program = build(seed, num_sequences, num_steps)
    pyro_elbo = Trace_ELBO if kl == "monte-carlo" else TraceMeanField_ELBO
    for vectorised in (False, True):
        options = {"num_particles": 3, "vectorize_particles": vectorised}
        reference_elbo = pyro_elbo(max_plate_nesting=program.nesting, **options)
        terms = assert_same_bound(program, reference_elbo, kl=kl, **options)
        shape = (program.num_sequences,) if program.nesting else ()
        assert terms.elbo().shape == shape
        for name, term in {**terms.log_likelihood, **terms.kl}.items():
            assert term.shape == ((3,) if name in program.outside else (3, *shape))


@programs
def test_particles_in_a_loop_are_single_runs_stacked(build):
    program = build(5, 3, 3)
    terms = ledger(program, num_particles=2)
    torch.manual_seed(0)
    runs = [elbo_terms(program.model, program.guide, *program.args) for _ in range(2)]
    for kind in ("log_likelihood", "kl", "kl_per_step"):
        for name, term in getattr(terms, kind).items():
            exact(term, torch.stack([getattr(run, kind)[name] for run in runs]))
    exact(terms.elbo(), (runs[0].elbo() + runs[1].elbo()) / 2)
    assert terms.conditionals == {}


@programs
@pytest.mark.parametrize("kl", ["analytic", "monte-carlo"])
def test_a_particle_is_a_sample_like_any_other(build, kl):
    """One particle in a plate draws the noise of a plain run, so that every term is the same."""
    program = build(7, 2, 2)
    plain, particle = ledger(program, kl=kl), ledger(program, kl=kl, num_particles=1, vectorize_particles=True)
    for kind in ("log_likelihood", "kl", "kl_per_step"):
        for name, term in getattr(plain, kind).items():
            exact(getattr(particle, kind)[name], term.unsqueeze(0))
    exact(particle.elbo(), plain.elbo())


@given(seeds(), st.integers(1, 3), num_steps(3))
def test_the_search_for_plates_leaves_the_random_state_and_the_gradient_alone(seed, num_sequences, steps):
    program = ragged_chain(seed, num_sequences, steps)
    calls = []

    def guide(*args):
        calls.append(torch.get_rng_state())
        program.guide(*args)

    torch.manual_seed(seed)
    elbo_terms(program.model, guide, *program.args, num_particles=2, vectorize_particles=True)
    assert len(calls) == 2
    assert torch.equal(*calls)


# ---------------------------------------------------------------------------------------------------------------------
# The terms
# ---------------------------------------------------------------------------------------------------------------------


def test_each_term_is_the_density_of_its_site():
    program = factorised(3, 4, 2)
    terms = ledger(program, kl="monte-carlo")
    torch.manual_seed(0)
    guide = poutine.trace(program.guide).get_trace(*program.args)
    model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(*program.args)
    for trace in (guide, model):
        trace.compute_log_prob()
    for name in ("x", "label"):
        exact(terms.log_likelihood[name], model.nodes[name]["log_prob"])
    for name in ("s", "r"):
        exact(terms.kl[name], guide.nodes[name]["log_prob"] - model.nodes[name]["log_prob"])
        q, p = terms.conditionals[name]
        assert q is guide.nodes[name]["fn"] or torch.equal(q.mean, guide.nodes[name]["fn"].mean)
        exact(p.mean, model.nodes[name]["fn"].mean)


@given(seeds(), lengths(4, 3), st.sampled_from(["analytic", "monte-carlo"]))
def test_steps_sum_to_the_term_and_padding_has_none(seed, row_lengths, kl):
    system, mask = StateSpace(seed), mask_of(row_lengths, 1)
    frames = Tensors(seed + 1).normal(*mask.shape, 2)
    terms = seeded(elbo_terms, system.model, system.guide, frames, mask, kl=kl)
    per_step = terms.kl_per_step["z"]
    assert per_step.shape == mask.shape
    assert (per_step[~mask] == 0).all()
    exact(per_step.sum(-1), terms.kl["z"])
    particles = elbo_terms(
        system.model, system.guide, frames, mask, kl=kl, num_particles=2, vectorize_particles=True
    ).kl_per_step["z"]
    assert particles.shape == (2, *mask.shape)
    assert (particles[:, ~mask] == 0).all()


@given(seeds(), lengths(4, 3))
def test_a_chain_s_closed_form_is_the_sum_over_its_steps_by_hand(seed, row_lengths):
    system, mask = StateSpace(seed), mask_of(row_lengths)
    frames = Tensors(seed + 1).normal(*mask.shape, 2)
    terms = seeded(elbo_terms, system.model, system.guide, frames, mask)
    torch.manual_seed(0)
    path = poutine.trace(system.guide).get_trace(frames, mask).nodes["z"]["value"]
    q_spread, p_spread = torch.diag(system.guide_scale**2), torch.diag(system.scale**2)
    for i, length in enumerate(row_lengths):
        features = frames[i] @ system.encode.T
        first = reference.gaussian_kl(features[0], q_spread, system.loc, torch.diag(system.first_scale**2))
        exact(terms.kl_per_step["z"][i, 0], first)
        for t in range(1, length):
            q_loc = system.carry * path[i, t - 1] + features[t]
            p_loc = system.matrix @ path[i, t - 1] + system.offset
            exact(terms.kl_per_step["z"][i, t], reference.gaussian_kl(q_loc, q_spread, p_loc, p_spread))
    q, p = terms.conditionals["z"]
    exact(q.log_prob_per_step(path)[mask] - p.log_prob_per_step(path)[mask],
          ledger_at(system, frames, mask).kl_per_step["z"][mask])  # fmt: skip


def ledger_at(system, frames, mask):
    return seeded(elbo_terms, system.model, system.guide, frames, mask, kl="monte-carlo")


@given(seeds(), lengths(4, 3), padding())
def test_padding_of_the_frames_changes_no_term_and_no_gradient(seed, row_lengths, filling):
    mask = mask_of(row_lengths, 1)
    drawn = Tensors(seed + 1).normal(*mask.shape, 2)
    for kl in ("analytic", "monte-carlo"):
        results = []
        for value in (0.0, filling):
            system = StateSpace(seed)
            frames = torch.where(mask.unsqueeze(-1), drawn, value).requires_grad_()
            for parameter in system.parameters():
                parameter.requires_grad_()
            terms = seeded(elbo_terms, system.model, system.guide, frames, mask, kl=kl)
            results.append([terms.elbo(), *gradients(terms.elbo().sum(), [frames, *system.parameters()])])
        for clean, padded in zip(*results, strict=True):
            assert torch.equal(clean, padded)


@given(seeds(), lengths(4, 3))
def test_padding_outside_the_support_of_a_chain_changes_nothing(seed, row_lengths):
    """A log-normal chain, whose density is not finite at its padding, 0, is the Normal chain of its logarithms."""
    system, mask = StateSpace(seed), mask_of(row_lengths, 1)
    frames = Tensors(seed + 1).normal(*mask.shape, 2)
    scale = (0.5 * torch.ones(2, dtype=torch.float64)).requires_grad_()

    def model(frames, exponential):
        with pyro.plate("sequences", len(frames)):
            z = pyro.sample("z", log_normal_walk(torch.zeros_like(frames), 1.0 + scale, mask, exponential))
            z = torch.where(mask.unsqueeze(-1), z, 1.0).log() if exponential else z
            pyro.sample("x", emission(without_padding(z, mask), 1.0, mask), obs=frames)

    def guide(frames, exponential):
        with pyro.plate("sequences", len(frames)):
            pyro.sample("z", log_normal_walk(frames @ system.encode.T, scale, mask, exponential))

    bounds = []
    for exponential in (True, False):
        terms = seeded(elbo_terms, model, guide, frames, exponential, kl="monte-carlo")
        bounds.append([terms.elbo(), terms.kl_per_step["z"], *gradients(terms.elbo().sum(), [scale])])
    for exponential, plain in zip(*bounds, strict=True):
        exact(exponential, plain)


def log_normal_walk(drift, scale, mask, exponential):
    """A random walk with drift, or its exponential."""
    if not exponential:
        return MarkovChain(normal(drift[:, 0], scale), lambda z, u: normal(z / 2 + u, scale), mask.shape[1],
                           inputs=drift, mask=mask)  # fmt: skip

    def exponential_of(base):
        return dist.TransformedDistribution(base, [dist.transforms.ExpTransform()])

    return MarkovChain(
        exponential_of(normal(drift[:, 0], scale)),
        lambda z, u: exponential_of(normal(z.log() / 2 + u, scale)),
        mask.shape[1],
        inputs=drift,
        mask=mask,
    )


@given(seeds(), lengths(4, 3))
def test_a_row_of_the_ledger_does_not_see_its_neighbours(seed, row_lengths):
    """The guide's noise differs from batch to batch, so both are given the same path: q and p at that path."""
    system, mask = StateSpace(seed), mask_of(row_lengths)
    frames = Tensors(seed + 1).normal(*mask.shape, 2)
    torch.manual_seed(0)
    path = poutine.trace(system.guide).get_trace(frames, mask).nodes["z"]["value"]
    together = seeded(elbo_terms, system.model, system.guide, frames, mask)
    for i, length in enumerate(row_lengths):
        given_path = poutine.trace(lambda i=i, n=length: pyro.sample("z", dist.Delta(path[i : i + 1, :n], event_dim=2)))
        guide = poutine.replay(system.guide, trace=given_path.get_trace())
        alone = elbo_terms(system.model, guide, frames[i : i + 1, :length])
        exact(alone.elbo(), together.elbo()[i : i + 1])
        exact(alone.kl_per_step["z"], together.kl_per_step["z"][i : i + 1, :length])
        assert alone.real_steps["z"].all()
        assert together.real_steps["z"][i].tolist() == mask[i].tolist()


@pytest.mark.parametrize("particles", [{}, {"num_particles": 2}, {"num_particles": 2, "vectorize_particles": True}])
def test_the_ledger_says_which_steps_are_real(particles):
    system, mask = StateSpace(0), mask_of([2, 4, 3])
    terms = elbo_terms(system.model, system.guide, torch.zeros(3, 4, 2).double(), mask, **particles)
    assert terms.real_steps["z"].dtype == torch.bool
    assert torch.equal(terms.real_steps["z"], mask.expand(terms.kl_per_step["z"].shape))
    without = (
        poutine.mask(program, mask=torch.tensor([True, False, True])) for program in (system.model, system.guide)
    )
    terms = elbo_terms(*without, torch.zeros(3, 4, 2).double(), mask, **particles)
    assert terms.real_steps["z"].sum(-1).tolist() == torch.tensor([2, 0, 3]).expand(terms.kl["z"].shape).tolist()


def test_subsampling_scales_every_term():
    program = subsampled(0, 4, 2)
    terms = ledger(program)
    torch.manual_seed(0)
    guide = poutine.trace(program.guide).get_trace(*program.args)
    model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(*program.args)
    exact(terms.log_likelihood["x"], 3 * model.nodes["x"]["fn"].log_prob(model.nodes["x"]["value"]))
    exact(terms.kl["s"], 3 * torch.distributions.kl_divergence(guide.nodes["s"]["fn"], model.nodes["s"]["fn"]))
    assert terms.num_sequences == 4


def test_a_site_outside_the_plate_is_shared_out_and_counted_once():
    program = with_global_site(0, 4, 2)
    for options in ({}, {"num_particles": 4}, {"num_particles": 4, "vectorize_particles": True}):
        terms = ledger(program, **options)
        assert terms.kl["g"].shape == ((4,) if options else ())
        inside = terms.elbo({"g": 0.0})
        exact(terms.elbo(), inside - terms.kl["g"].mean() / 4)
        exact(terms.elbo().sum(), inside.sum() - terms.kl["g"].mean())


def test_a_weight_may_be_a_tensor_of_one_for_each_sequence():
    program = with_global_site(0, 4, 2)
    terms, weight = ledger(program), torch.arange(4.0)
    exact(terms.elbo({"x": weight}) - terms.elbo({"x": 0.0}), weight * terms.log_likelihood["x"])
    exact(terms.elbo({"x": torch.tensor(2.0)}), terms.elbo({"x": 2.0}))
    with pytest.raises(ValueError, match=r"^weights\['x'\]: "):
        terms.elbo({"x": weight[:3]})


def test_without_a_plate_there_is_one_sequence():
    program = no_plate(0, 1, 2)
    assert ledger(program).num_sequences == 1
    assert ledger(program, num_particles=2).monte_carlo == frozenset()
    assert ledger(program, num_particles=2, kl="monte-carlo").monte_carlo == {"s"}


@pytest.mark.parametrize("options", [{}, {"num_particles": 2}, {"num_particles": 2, "vectorize_particles": True}])
def test_keyword_arguments_reach_both_programs(options):
    def model(x, *, shift=0.0):
        with pyro.plate("sequences", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(shift, 1.0)), 1.0), obs=x)

    def guide(x, *, shift=0.0):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", dist.Normal(shift + loc, 0.5))

    x, loc = torch.tensor([1.0, 2.0]), torch.tensor(0.25, requires_grad=True)
    # the same noise, all moved by 3: the same bound
    exact(seeded(elbo_terms, model, guide, x + 3, shift=3.0, **options).elbo(),
          seeded(elbo_terms, model, guide, x, **options).elbo(), rtol=1e-5, atol=1e-5)  # fmt: skip
    elbo = DecomposedELBO(**options)
    for loss in (elbo.differentiable_loss, elbo.loss, elbo.loss_and_grads):
        moved, still = seeded(loss, model, guide, x + 3, shift=3.0), seeded(loss, model, guide, x)
        assert_close(*(torch.as_tensor(value).detach() for value in (moved, still)), rtol=1e-5, atol=1e-5)
    guide_trace, model_trace = reversed(elbo._get_trace(model, guide, (x + 3,), {"shift": 3.0}))
    assert model_trace.nodes["z"]["value"] is guide_trace.nodes["z"]["value"]
    exact(model_trace.nodes["z"]["fn"].mean, torch.full((2,), 3.0))
    exact(guide_trace.nodes["z"]["fn"].mean, torch.full((2,), 3.25))


def test_a_ledger_is_frozen():
    terms = ledger_with(torch.zeros(2))
    with pytest.raises(AttributeError):
        terms.kl = {}


def test_what_a_guide_records_is_no_term():
    program = factorised(0, 3, 2)
    plain = ledger(program)

    def guide(*args):
        pyro.deterministic("summary", args[0].mean(1), event_dim=1)
        program.guide(*args)

    terms = seeded(elbo_terms, program.model, guide, *program.args)
    assert set(terms.kl) == {"s", "r"}
    exact(terms.elbo(), plain.elbo())


def test_deterministic_sites_are_no_terms_and_do_not_count_as_observed():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("picture", 2 * z)

    with pytest.raises(ValueError, match="^model: observes"):
        elbo_terms(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))


# ---------------------------------------------------------------------------------------------------------------------
# Closed form and Monte Carlo
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [factorised, chain, ragged_chain], ids=lambda build: build.__name__)
def test_closed_form_and_monte_carlo_agree_in_expectation(build):
    """4,000 particles; the difference of the two, on the same particles, is 0 within 5 of its own standard errors."""
    program = build(11, 2, 3)
    options = {"num_particles": 4000, "vectorize_particles": True}
    analytic, sampled = ledger(program, **options), ledger(program, kl="monte-carlo", **options)
    for name in analytic.kl:
        difference = analytic.kl[name] - sampled.kl[name]
        assert difference.std() > 0.05
        assert (difference.mean(0).abs() < 5 * difference.std(0) / math.sqrt(4000)).all()
    for name, per_step in analytic.kl_per_step.items():
        difference = per_step - sampled.kl_per_step[name]
        assert (difference.mean(0).abs() <= 5 * difference.std(0) / math.sqrt(4000)).all()


def test_a_site_that_the_guide_draws_before_what_the_model_reads_is_monte_carlo():
    """p(z) p(a | z) and q(a) q(z | a): given z, a is no longer spread as q(a) is, as KL(q(a) || p(a | z)) takes it."""

    def model():
        with pyro.plate("sequences", 20_000):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0))
            a = pyro.sample("a", dist.Normal(z, 0.2))
            pyro.sample("x", dist.Normal(a, 1.0), obs=torch.zeros(20_000, dtype=torch.float64))

    def guide():
        with pyro.plate("sequences", 20_000):
            a = pyro.sample("a", dist.Normal(torch.zeros(1, dtype=torch.float64), 0.7))
            pyro.sample("z", dist.Normal(a, 0.3))

    torch.manual_seed(0)
    terms = elbo_terms(model, guide)
    assert terms.monte_carlo == {"a"}
    # E[log q(a) - log p(a | z)], with a - z spread by 0.3 whatever a is; the closed form would have 0.7 too
    exact = math.log(0.2 / 0.7) - 0.5 + 0.5 * (0.3 / 0.2) ** 2
    assert terms.kl["a"].mean().item() == pytest.approx(exact, abs=0.05)


@given(seeds(), lengths(4, 3), st.booleans())
def test_a_guide_that_is_the_prior_costs_nothing(seed, row_lengths, is_chain):
    system, mask = StateSpace(seed), mask_of(row_lengths)
    frames = Tensors(seed).normal(*mask.shape, 2)

    def prior(frames, mask=None):
        poutine.block(system.model, hide=["x"])(mask=mask, num_sequences=len(frames), num_steps=frames.shape[1])

    for kl in ("analytic", "monte-carlo"):
        terms = elbo_terms(system.model, prior, frames, mask, kl=kl)
        exact(terms.kl_per_step["z"], torch.zeros(mask.shape, dtype=torch.float64))


@programs
@given(seed=seeds(), num_sequences=st.integers(1, 4), num_steps=num_steps(4))
def test_a_closed_form_is_never_negative(build, seed, num_sequences, num_steps):
    terms = ledger(build(seed, num_sequences, num_steps))
    assert terms.monte_carlo == frozenset()
    for term in [*terms.kl.values(), *terms.kl_per_step.values()]:
        assert (term >= -1e-12).all()


@given(seeds(), num_steps(4))
def test_a_factorised_normal_is_a_chain_of_the_same_normals(seed, steps):
    """As q, as p and as both: written as a MarkovChain whose transition reads its inputs, it has the same terms."""
    tensors = Tensors(seed)
    x, q_scale, p_scale = tensors.normal(3, steps, 2), 0.3 + tensors.uniform(2), 0.3 + tensors.uniform(2)
    p_loc = tensors.normal(steps, 2)

    def as_factors(loc, scale):
        return IndependentSteps(normal(loc, scale))

    def as_chain(loc, scale):
        return MarkovChain(normal(loc[..., 0, :], scale), lambda z, loc: normal(loc, scale), steps, inputs=loc)

    def build(q_form, p_form):
        def model(x):
            with pyro.plate("sequences", 3):
                z = pyro.sample("z", p_form(p_loc.expand(3, -1, -1), p_scale))
                pyro.sample("x", normal(z, 1.0, 2), obs=x)

        def guide(x):
            with pyro.plate("sequences", 3):
                pyro.sample("z", q_form(0.5 * x, q_scale))

        return model, guide

    for kl in ("analytic", "monte-carlo"):
        sampled = []
        for q_form in (as_factors, as_chain):
            for p_form in (as_factors, as_chain):
                # the noise of the two forms is laid out differently, so the path is fixed
                model, guide = build(q_form, p_form)
                path = poutine.trace(lambda: pyro.sample("z", dist.Delta(Tensors(1).normal(3, steps, 2), event_dim=2)))
                replayed = poutine.replay(guide, trace=path.get_trace())
                sampled.append(elbo_terms(model, replayed, x, kl=kl))
        for terms in sampled:
            assert terms.kl_per_step["z"].shape == terms.real_steps["z"].shape == (3, steps)
            assert ("z" in terms.monte_carlo) == (kl == "monte-carlo")
            exact(terms.kl_per_step["z"], sampled[0].kl_per_step["z"])
            exact(terms.elbo(), sampled[0].elbo())


def flow(loc, scale):
    """A Normal, written as a flow, of which nobody knows a closed-form KL to a Normal."""
    return dist.TransformedDistribution(normal(loc, scale), [dist.transforms.AffineTransform(0.1, 2.0, event_dim=1)])


def test_a_flow_falls_back_to_monte_carlo_and_is_named():
    """The flow is affine, so that its density is a Normal's: z is log q - log p, and s keeps its closed form."""
    x = Tensors(0).normal(3, 4, 2)

    def build(step):
        def model(x):
            with pyro.plate("sequences", 3):
                s = pyro.sample("s", normal(x.new_zeros(2), 1.0))
                z = pyro.sample("z", MarkovChain(normal(x.new_zeros(3, 2), 1.0), step, 4))
                pyro.sample("x", normal(z + s.unsqueeze(-2), 1.0, 2), obs=x)

        return model

    def guide(x):
        with pyro.plate("sequences", 3):
            pyro.sample("s", normal(x.mean(1), 0.5))
            pyro.sample("z", MarkovChain(normal(x[:, 0], 0.5), lambda z, x: normal(0.5 * z + x, 0.5), 4, inputs=x))

    with_flow, plain = build(lambda z: flow(0.3 * z, 0.4)), build(lambda z: normal(0.6 * z + 0.1, 0.8))
    terms, expected = seeded(elbo_terms, with_flow, guide, x), seeded(elbo_terms, plain, guide, x, kl="monte-carlo")
    analytic = seeded(elbo_terms, plain, guide, x)
    assert terms.monte_carlo == {"z"}
    exact(terms.kl["s"], analytic.kl["s"])
    exact(terms.kl_per_step["z"][:, 1:], expected.kl_per_step["z"][:, 1:])
    exact(terms.kl_per_step["z"][:, 0], analytic.kl_per_step["z"][:, 0])  # its first step is Normal in both
    with pytest.raises(ValueError, match="^importance_weighted: .*analytic"):
        terms.importance_weighted()
    assert ledger_of_flow(with_flow, guide, x).monte_carlo == {"s", "z"}


def ledger_of_flow(model, guide, x):
    return elbo_terms(model, guide, x, kl="monte-carlo")


def test_a_static_flow_falls_back_alone():
    x = Tensors(0).normal(3, 2)

    def model(x):
        with pyro.plate("sequences", 3):
            s = pyro.sample("s", normal(x.new_zeros(2), 1.0))
            r = pyro.sample("r", normal(x.new_zeros(2), 1.0))
            pyro.sample("x", normal(s + r, 1.0), obs=x)

    def guide(x):
        with pyro.plate("sequences", 3):
            pyro.sample("s", flow(x, 0.5))
            pyro.sample("r", normal(x, 0.5))

    terms, sampled = seeded(elbo_terms, model, guide, x), seeded(elbo_terms, model, guide, x, kl="monte-carlo")
    assert terms.monte_carlo == {"s"}
    exact(terms.kl["s"], sampled.kl["s"])
    assert not torch.equal(terms.kl["r"], sampled.kl["r"])


# ---------------------------------------------------------------------------------------------------------------------
# Evidence
# ---------------------------------------------------------------------------------------------------------------------


@given(seeds(), lengths(4, 3), st.integers(1, 2), st.integers(1, 3))
def test_with_the_exact_posterior_every_sample_gives_the_kalman_evidence(seed, row_lengths, latent_dim, frame_dim):
    system, mask = StateSpace(seed, latent_dim, frame_dim), mask_of(row_lengths, 1)
    frames = Tensors(seed + 1).normal(*mask.shape, frame_dim)
    evidence = system.log_evidence(frames, mask)
    options = {"kl": "monte-carlo", "num_particles": 4, "vectorize_particles": True}
    terms = elbo_terms(system.model, system.exact_guide, frames, mask, **options)
    bound = terms.log_likelihood["x"] - terms.kl["z"]
    assert bound.shape == (4, len(row_lengths))
    near = functools.partial(assert_close, rtol=1e-8, atol=1e-8)
    near(bound, evidence.expand_as(bound))
    near(terms.elbo(), evidence)
    near(terms.importance_weighted(), evidence)


def test_with_the_exact_posterior_the_closed_form_is_the_evidence_in_expectation():
    """4,000 particles, within 5 standard errors; unlike Monte Carlo, the closed form has noise at the optimum."""
    system, mask = StateSpace(5, dense=True), mask_of([4, 2])
    frames = Tensors(6).normal(*mask.shape, 2)
    options = {"num_particles": 4000, "vectorize_particles": True}
    terms = elbo_terms(system.model, system.exact_guide, frames, mask, **options)
    assert terms.monte_carlo == frozenset()
    bound = terms.log_likelihood["x"] - terms.kl["z"]
    errors = bound.std(0) / math.sqrt(4000)
    assert (errors > 0).all()
    assert ((bound.mean(0) - system.log_evidence(frames, mask)).abs() < 5 * errors).all()


def test_importance_weighting_goes_from_the_bound_to_the_evidence():
    """20,000 particles, seeded: within 0.05 nats of the evidence, where the bound is more than 0.5 below it."""
    system = StateSpace(3)
    frames = Tensors(4).normal(3, 2, 2)
    evidence = system.log_evidence(frames)
    options = {"kl": "monte-carlo", "num_particles": 20_000, "vectorize_particles": True}
    terms = elbo_terms(system.model, system.guide, frames, **options)
    bound, weighted = terms.elbo(), terms.importance_weighted()
    assert (bound < evidence - 0.5).all()
    assert ((weighted - evidence).abs() < 0.05).all()
    # fewer particles lie in between: the mean over 200 groups of 100 is a bound too, and tighter than one particle's
    log_weights = terms.log_likelihood["x"] - terms.kl["z"]
    groups = log_weights.reshape(200, 100, 3).logsumexp(1) - math.log(100)
    assert (groups.mean(0) > bound).all()
    assert (groups.mean(0) < weighted + 5 * groups.std(0) / math.sqrt(200)).all()


def test_importance_weighting_by_its_formula():
    program = ragged_chain(0, 3, 3)
    for options in ({}, {"num_particles": 1, "vectorize_particles": True}):
        terms = ledger(program, kl="monte-carlo", **options)
        exact(terms.importance_weighted(), terms.elbo())
    for vectorised in (False, True):
        terms = ledger(program, kl="monte-carlo", num_particles=5, vectorize_particles=vectorised)
        weights = (terms.log_likelihood["x"] - terms.kl["z"]).exp()
        exact(terms.importance_weighted(), (sum(weights) / 5).log())
        assert (terms.importance_weighted() > terms.elbo()).all()


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


@programs
@given(seed=seeds(), beta=st.floats(-2, 5), gamma=st.floats(-2, 5))
def test_the_bound_is_linear_in_its_weights(build, seed, beta, gamma):
    program = build(seed, 3, 3)
    terms = ledger(program, num_particles=2)
    share = {name: terms.num_sequences if name in program.outside and program.nesting else 1 for name in program.sites}
    for name in program.sites:
        term = (terms.log_likelihood[name] if name in terms.log_likelihood else -terms.kl[name]) / share[name]
        exact(terms.elbo({name: beta}), terms.elbo() + (beta - 1) * term.mean(0))
    everything = dict.fromkeys(program.sites, beta) | {program.sites[0]: gamma}
    first = terms.elbo({name: float(name == program.sites[0]) for name in program.sites})
    exact(terms.elbo(everything), beta * terms.elbo() + (gamma - beta) * first)
    as_tensors = {name: torch.tensor(weight, dtype=torch.float64) for name, weight in everything.items()}
    exact(terms.elbo(everything), terms.elbo(as_tensors))
    exact(terms.elbo({}), terms.elbo(None))


def test_a_misspelt_weight_is_an_error():
    terms = ledger(factorised(0, 2, 2))
    with pytest.raises(ValueError, match=r"^weights: .*\['Z', 'zz'\]"):
        terms.elbo({"s": 0.5, "zz": 0.1, "Z": 1.0})


@pytest.mark.parametrize("which", ["model", "guide"])
@pytest.mark.parametrize("factor", [0.5, torch.tensor([0.5, 1.0])], ids=["number", "per sequence"])
def test_a_weight_in_the_model_or_the_guide_alone_is_an_error(which, factor):
    program = ragged_chain(0, 2, 3)
    setattr(program, which, poutine.scale(getattr(program, which), scale=factor))
    with pytest.raises(ValueError, match="^site 'z': .*scaled"):
        ledger(program)


def test_the_same_weight_as_a_number_and_as_a_tensor_is_no_error():
    program = ragged_chain(0, 2, 3)
    expected = ledger(program)
    program.model = poutine.scale(program.model, scale=0.5)
    program.guide = poutine.scale(program.guide, scale=torch.tensor(0.5))
    exact(ledger(program).elbo(), 0.5 * expected.elbo())


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def small(latents=("z",), observed=("x",), **fns):
    """A program without plates, with a standard normal or `fns[name]` at each site."""

    def run():
        for name in latents:
            pyro.sample(name, fns.get(name, dist.Normal(0.0, 1.0)))
        for name in observed:
            pyro.sample(name, dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    return run


class WithoutRsample(dist.Normal):
    has_rsample = False


THIRDS = torch.full((3,), 1 / 3)
RELAXED = dist.RelaxedOneHotCategoricalStraightThrough(torch.tensor(0.5), THIRDS)


@pytest.mark.parametrize(
    ("model", "guide", "options", "message"),
    [
        (small(("a", "b", "z")), small(("z",), ()), {}, r"^guide: .*\['a', 'b'\]"),
        (small(("z",)), small(("a", "z"), ()), {}, r"^model: .*\['a'\].*\['z'\]"),
        (small(("z",)), small(("x", "z"), ()), {}, r"^model: .*\['x'\]"),
        (small(("z",)), small((), ("z",)), {}, "^guide: site 'z' .*observed"),
        (small(("z",)), lambda: pyro.factor("f", torch.zeros(()), has_rsample=True), {}, "^guide: site 'f' .*observed"),
        (small(("z",), ()), small(("z",), ()), {}, "^model: observes"),
        (small(), small(observed=(), z=WithoutRsample(0.0, 1.0)), {}, "^guide: site 'z' .*rsample .*WithoutRsample"),
        (small(z=dist.Poisson(1.0)), small(observed=(), z=dist.Poisson(1.0)), {}, "^guide: site 'z' .*rsample"),
        (small(), small(observed=(), z=normal(torch.zeros(2), 1.0)), {}, r"^site 'z': .*\(2,\)"),
        (small(z=dist.OneHotCategorical(THIRDS)), small(observed=(), z=dist.OneHotCategorical(THIRDS)), {},
         "^guide: site 'z' .*rsample .*OneHotCategoricalStraightThrough"),
        (small(z=dist.OneHotCategorical(THIRDS)), small(observed=(), z=RELAXED), {},
         "^site 'z': .*RelaxedOneHotCategoricalStraightThrough"),
        (small(), small(observed=(), z=dist.Normal(torch.zeros(2), 1.0)), {},
         "^guide: site 'z' .*plate .*-1"),
        (small(z=dist.Normal(torch.zeros(2), 1.0)), small(observed=()), {},
         "^model: site 'z' .*plate .*-1"),
        (small(), small(observed=()), {"kl": "exact"}, "^kl: "),
        (small(), small(observed=()), {"num_particles": 0}, "^num_particles: "),
        (small(), small(observed=()), {"num_particles": 1.5}, "^num_particles: "),
    ],
)  # fmt: skip
def test_programs_that_are_refused(model, guide, options, message):
    with pytest.raises(ValueError, match=message):
        elbo_terms(model, guide, **options)
    if "num_particles" not in options:
        with pytest.raises(ValueError, match=message):
            elbo_terms(model, guide, **options, num_particles=2, vectorize_particles=True)


def test_time_among_the_batch_dimensions_is_refused():
    """As many steps as sequences, so that every shape fits, and the terms of steps would be taken for sequences'."""

    def model(x):
        with pyro.plate("sequences", 4):
            pyro.sample("z", dist.Normal(torch.zeros(4, 4, 2), 1.0).to_event(2))
            pyro.sample("x", dist.Normal(torch.zeros(4, 4, 3), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("sequences", 4):
            pyro.sample("z", dist.Normal(torch.zeros(4, 4, 2), 1.0).to_event(2))

    with pytest.raises(ValueError, match="^model: site 'x' .*plate .*-2"):
        elbo_terms(model, guide, torch.zeros(4, 4, 3))


ROWS = torch.ones(2, 1, 1, dtype=torch.bool)
ONE_ROW = torch.tensor([[[True]], [[False]]])


def masked_coordinates(q_mask, p_mask, by_step=False):
    """A guide and a model of three steps of one coordinate, whose KL is 0."""

    def z(mask, by_step):
        normal = dist.Laplace(torch.ones(2, 3, 1), 1.0)  # no chain
        if mask is None:
            return normal.to_event(2)
        return normal.to_event(1).mask(mask.squeeze(-1)).to_event(1) if by_step else normal.mask(mask).to_event(2)

    def model():
        with pyro.plate("sequences", 2):
            pyro.sample("z", z(p_mask, by_step))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(2))

    def guide():
        with pyro.plate("sequences", 2):
            pyro.sample("z", z(q_mask, False))

    return model, guide


@pytest.mark.parametrize("masks", [(ROWS, ONE_ROW), (ONE_ROW, ROWS), (ONE_ROW, None), (None, ONE_ROW)])
@pytest.mark.parametrize("kl", ["analytic", "monte-carlo"])
def test_coordinates_with_different_masks_are_refused(kl, masks):
    with pytest.raises(ValueError, match="^site 'z': coordinates .*masks"):
        elbo_terms(*masked_coordinates(*masks), kl=kl)


@pytest.mark.parametrize("masks", [(ROWS, ROWS), (ONE_ROW, ONE_ROW), (ROWS, None), (None, None)])
@pytest.mark.parametrize("by_step", [False, True])
def test_the_same_coordinates_may_be_masked_in_another_way(masks, by_step):
    exact(elbo_terms(*masked_coordinates(*masks, by_step=by_step), kl="monte-carlo").kl["z"], torch.zeros(2))


def test_a_masked_posterior_that_is_no_chain_fits_a_masked_chain():
    mask = mask_of([3, 1])

    def model():
        with pyro.plate("sequences", 2):
            start = normal(torch.zeros(2, 1), 1.0)
            pyro.sample("z", MarkovChain(start, lambda z: normal(z, 1.0), 3, mask=mask))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(2))

    def guide(mask=mask):
        with pyro.plate("sequences", 2):
            step = dist.Laplace(torch.ones(2, 3, 1), 1.0).to_event(1)
            pyro.sample("z", step.mask(mask).to_event(1))

    assert elbo_terms(model, guide).kl["z"].isfinite().all()
    with pytest.raises(ValueError, match="^site 'z': .*chains .*masks"):
        elbo_terms(model, functools.partial(guide, mask=mask_of([3, 2])))


# ---------------------------------------------------------------------------------------------------------------------
# Classes and plates
# ---------------------------------------------------------------------------------------------------------------------


def classes(q, order=("k", "z")):
    """A class and a number, in plates of two, observed as their sum; `order` is the guide's."""

    def model():
        with pyro.plate("sequences", 2):
            k = pyro.sample("k", dist.OneHotCategorical(THIRDS))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(k[..., 0] + z, 1.0), obs=torch.zeros(2))

    def guide():
        with pyro.plate("sequences", 2):
            for name in order:
                pyro.sample(name, q if name == "k" else dist.Normal(0.0, 1.0))

    return model, guide


def test_a_class_has_a_closed_form_and_no_gradient_without_it():
    logits = torch.tensor([1.0, 0.0, -1.0], requires_grad=True)
    q = dist.OneHotCategoricalStraightThrough(logits=logits)
    kl = elbo_terms(*classes(q)).kl["k"]
    share = torch.softmax(logits, -1)
    torch.testing.assert_close(kl, (share * (3 * share).log()).sum().expand(2))
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (kl[0], (share * (3 * share).log()).sum())))
    for options, order in (({"kl": "monte-carlo"}, ("k", "z")), ({}, ("z", "k"))):
        # a closed form of k holds wherever nothing before it in the model comes after it in the guide
        programs = classes(q, order)
        if options:
            with pytest.raises(ValueError, match="^site 'k': .*discrete"):
                elbo_terms(*programs, **options)
            with torch.no_grad():
                assert elbo_terms(*programs, **options).kl["k"].shape == (2,)
        else:
            torch.testing.assert_close(elbo_terms(*programs).kl["k"], kl)


def test_a_point_may_stand_for_a_class():
    """A hard assignment: a mass of 1 at one class, whose KL is minus the prior's log-probability there."""
    point = dist.Delta(torch.eye(3)[1], event_dim=1)
    torch.testing.assert_close(elbo_terms(*classes(point)).kl["k"], torch.full((2,), math.log(3)))


@pytest.mark.parametrize("which", ["model", "guide"])
def test_a_latent_in_a_plate_of_one_program_alone_is_refused(which):
    def sample(in_plate):
        if in_plate:
            with pyro.plate("own", 3):
                return pyro.sample("z", dist.Normal(0.0, 1.0))
        return pyro.sample("z", dist.Normal(0.0, 1.0))

    def model():
        z = sample(which == "model")
        with pyro.plate("sequences", 3):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

    with pytest.raises(ValueError, match="^site 'z': .*plates"):
        elbo_terms(model, lambda: sample(which == "guide"))


def test_a_mask_with_a_dimension_that_is_no_plate_s_is_refused():
    def program(observed):
        with pyro.plate("sequences", 3), poutine.mask(mask=torch.ones(4, 3, dtype=torch.bool)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            if observed:
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

    with pytest.raises(ValueError, match=r"^site 'x': .*\(4, 3\)"):
        elbo_terms(lambda: program(True), lambda: program(False))


def test_enumeration_is_refused():
    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0), infer={"enumerate": "parallel"})

    with pytest.raises(ValueError, match="^guide: site 'z' .*enumerated"):
        elbo_terms(small(), guide)


def test_a_chain_without_rsample_is_refused():
    def step(z):
        return WithoutRsample(z, 1.0).to_event(1)

    def model(x):
        with pyro.plate("sequences", 2):
            z = pyro.sample("z", MarkovChain(normal(torch.zeros(2, 1), 1.0), lambda z: normal(z, 1.0), 3))
            pyro.sample("x", normal(z, 1.0, 2), obs=x)

    def guide(x):
        with pyro.plate("sequences", 2):
            pyro.sample("z", MarkovChain(normal(torch.zeros(2, 1), 1.0), step, 3))

    with pytest.raises(ValueError, match="^guide: site 'z' .*rsample .*step"):
        elbo_terms(model, guide, torch.zeros(2, 3, 1))


@pytest.mark.parametrize("masks", [(None, [3, 1]), ([3, 1], None), ([3, 2], [3, 1])])
def test_chains_with_different_masks_are_refused(masks):
    system = StateSpace(0)
    of_model, of_guide = (None if row_lengths is None else mask_of(row_lengths) for row_lengths in masks)
    frames = torch.zeros(2, 3, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="^site 'z': .*chains .*masks"):
        elbo_terms(lambda x: system.model(x, of_model), lambda x: system.guide(x, of_guide), frames)


@pytest.mark.parametrize("which", ["model", "guide"])
@pytest.mark.parametrize("is_handler", [True, False])
def test_sites_masked_in_one_program_alone_are_refused(which, is_handler):
    keep = torch.tensor([True, False])
    x = torch.zeros(2)

    def sample(name, masked, **options):
        fn = dist.Normal(torch.zeros(2), 1.0)
        if masked and not is_handler:
            fn = fn.mask(keep)
        with poutine.mask(mask=keep) if masked and is_handler else nullcontext():
            pyro.sample(name, fn, **options)

    def model(x):
        with pyro.plate("sequences", 2):
            sample("z", which == "model")
            pyro.sample("x", dist.Normal(torch.zeros(2), 1.0), obs=x)

    def guide(x):
        with pyro.plate("sequences", 2):
            sample("z", which == "guide")

    with pytest.raises(ValueError, match="^site 'z': .*masks"):
        elbo_terms(model, guide, x)


def test_importance_weighting_that_is_refused():
    with pytest.raises(ValueError, match="^importance_weighted: .*analytic"):
        ledger(factorised(0, 2, 2)).importance_weighted()
    with pytest.raises(ValueError, match=r"^importance_weighted: .*\['g'\]"):
        ledger(with_global_site(0, 2, 2), kl="monte-carlo").importance_weighted()


def test_importance_weighting_with_a_likelihood_outside_the_plate_is_refused():
    def model():
        pyro.factor("penalty", torch.tensor(-1.0))
        with pyro.plate("sequences", 2):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(2))

    with pytest.raises(ValueError, match=r"^importance_weighted: .*\['penalty'\]"):
        elbo_terms(model, lambda: None, kl="monte-carlo").importance_weighted()


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("particles", [{}, {"num_particles": 2}, {"num_particles": 2, "vectorize_particles": True}])
def test_what_is_not_finite_is_named(value, particles):
    system, mask = StateSpace(0), mask_of([2, 4, 3])
    frames = Tensors(1).normal(*mask.shape, 2)
    elbo_terms(system.model, system.guide, frames, mask, **particles).check_finite(3)

    broken = frames.clone()
    broken[1, 2] = value
    place = "particle 0, sequence 1" if particles else "sequence 1"
    with pytest.raises(FloatingPointError, match=rf"log_likelihood\['x'\] is .* at training step 3 \({place}\)$"):
        elbo_terms(system.model, system.guide, broken, mask, **particles).check_finite(3)

    # broken for the guide alone, and at a path that is finite
    path = Tensors(2).normal(*mask.shape, 2)
    paths = [path, path]  # a run for each particle
    if particles.get("vectorize_particles"):  # a run that finds the plates, and one with the particles in theirs
        paths = [path, path.expand(2, *path.shape)]
    known = [poutine.trace(lambda p=p: pyro.sample("z", dist.Delta(p, event_dim=2))).get_trace() for p in paths]

    def guide(frames, mask):
        poutine.replay(system.guide, trace=known.pop(0))(broken, mask)

    with pytest.raises(FloatingPointError, match=rf"^kl_per_step\['z'\] is (inf|nan) \({place}, time step 2\)$"):
        elbo_terms(system.model, guide, frames, mask, **particles).check_finite()


def test_the_message_names_what_it_knows():
    with pytest.raises(FloatingPointError, match=r"^log_likelihood\['x'\] is nan at training step 0 \(sequence 1\)$"):
        ledger_with(torch.tensor([1.0, float("nan"), float("inf")])).check_finite(0)
    with pytest.raises(FloatingPointError, match=r"^log_likelihood\['x'\] is -inf \(sequence 0\)$"):
        ledger_with(torch.tensor([-float("inf"), 1.0])).check_finite()

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Normal(torch.tensor(0.0), torch.tensor(float("inf")), validate_args=False))

    known = poutine.trace(lambda: pyro.sample("z", dist.Delta(torch.tensor(0.5)))).get_trace()
    terms = elbo_terms(model, poutine.replay(guide, trace=known))
    with pytest.raises(FloatingPointError, match=r"^kl\['z'\] is (inf|nan) at training step 5$"):
        terms.check_finite(5)

    def one_sequence():  # a chain without a plate has steps but no sequences
        pyro.sample("z", IndependentSteps(normal(torch.zeros(3, 1), 1.0)))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    def its_guide():
        scale = torch.tensor([1.0, 1.0, float("inf")]).unsqueeze(-1)
        pyro.sample("z", normal(torch.zeros(3, 1), scale, 2))

    with pytest.raises(FloatingPointError, match=r"^kl_per_step\['z'\] is (inf|nan) \(time step 2\)$"):
        elbo_terms(one_sequence, its_guide).check_finite()


def test_all_ranks_raise_together(tmp_path):
    torch.multiprocessing.start_processes(check_finite_on_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    own = "log_likelihood['x'] is nan at training step 7 (sequence 1)"
    others = "a term of the ELBO is not finite at training step 7 on another process"
    assert (tmp_path / "rank-0").read_text().split("\n") == [own, others, "finite"]
    assert (tmp_path / "rank-1").read_text().split("\n") == [others, own, "finite"]


# ---------------------------------------------------------------------------------------------------------------------
# As a loss for SVI
# ---------------------------------------------------------------------------------------------------------------------


@programs
@pytest.mark.parametrize("kl", ["analytic", "monte-carlo"])
def test_the_loss_is_minus_the_bound_and_so_are_its_gradients(build, kl):
    program = build(2, 3, 3)
    for parameter in program.parameters:
        parameter.requires_grad_()
    for options in ({}, {"num_particles": 2}, {"num_particles": 2, "vectorize_particles": True}):
        terms = ledger(program, kl=kl, **options)
        name = program.sites[0]
        loss = DecomposedELBO(kl=kl, weights={name: 0.3}, **options)
        bound = terms.elbo({name: 0.3}).sum()
        arguments = (program.model, program.guide, *program.args)
        assert seeded(loss.loss, *arguments) == pytest.approx(-bound.item(), rel=1e-12)
        exact(seeded(loss.differentiable_loss, *arguments), -bound)
        for parameter in program.parameters:
            parameter.grad = None
        assert seeded(loss.loss_and_grads, *arguments) == pytest.approx(-bound.item(), rel=1e-12)
        for parameter, gradient in zip(program.parameters, gradients(bound, program.parameters), strict=True):
            exact(torch.zeros_like(gradient) if parameter.grad is None else -parameter.grad, gradient)
    assert not pyro.get_param_store().keys()


@programs
def test_with_unit_weights_the_loss_is_that_of_trace_elbo(build):
    program = build(2, 3, 3)
    arguments = (program.model, program.guide, *program.args)
    expected = seeded(Trace_ELBO(max_plate_nesting=program.nesting).loss, *arguments)
    assert seeded(DecomposedELBO(kl="monte-carlo").loss, *arguments) == pytest.approx(expected, rel=1e-12)


def test_a_misspelt_weight_of_the_loss_is_an_error():
    program = chain(0, 2, 2)
    with pytest.raises(ValueError, match=r"^weights: .*\['w'\]"):
        DecomposedELBO(weights={"w": 1.0}).loss(program.model, program.guide, *program.args)


def test_svi_finds_the_posterior_of_a_conjugate_normal():
    """z ~ N(0, 1), x ~ N(z, 0.5): the posterior has mean x / 1.25 and variance 0.2.

    Within 0.03 after 400 steps with a rate that falls to 0.1 %; the last losses have minus the log evidence as mean,
    within 5 of its standard errors.
    """
    x = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)

    def model(x):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: x.new_zeros(3))
        scale = pyro.param("scale", lambda: x.new_ones(3), constraint=dist.constraints.positive)
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    optimiser = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.001 ** (1 / 400)}
    )
    svi = SVI(model, guide, optimiser, loss=DecomposedELBO(num_particles=4, vectorize_particles=True))
    losses = []
    for _ in range(400):
        losses.append(svi.step(x))
        optimiser.step()
    loc, scale = pyro.param("loc").detach(), pyro.param("scale").detach()
    assert sorted(pyro.get_param_store().keys()) == ["loc", "scale"]
    pyro.clear_param_store()  # the user's own: the library put nothing there
    assert_close(loc, x / 1.25, rtol=0, atol=0.03)
    assert_close(scale, torch.full_like(scale, math.sqrt(0.2)), rtol=0, atol=0.03)
    evidence = dist.Normal(torch.zeros(()), math.sqrt(1.25)).log_prob(x).sum()
    last = torch.tensor(losses[-50:])
    assert (last.mean() + evidence).abs() < 5 * last.std() / math.sqrt(50)


def test_modules_train_without_pyro_s_store():
    """Four encoders of the same names, one ledger: nothing is registered anywhere, every weight has its gradient."""
    x = Tensors(0).normal(4, 3, 2)
    encoder = nn.Linear(2, 2).double()

    def model(x):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", MarkovChain(normal(x.new_zeros(len(x), 2), 1.0), lambda z: normal(z, 1.0), 3))
            pyro.sample("x", emission(z, 1.0, None), obs=x)

    def guide(x):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", normal(encoder(x), 1.0, 2))

    (-elbo_terms(model, guide, x).elbo().mean()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in encoder.parameters())
    assert not pyro.get_param_store().keys()


def test_the_loss_can_be_pickled():
    loss = pickle.loads(pickle.dumps(DecomposedELBO(weights={"z": 0.1}, num_particles=2)))
    assert (loss.weights, loss.num_particles, loss.kl) == ({"z": 0.1}, 2, None)


def test_the_ledger_is_exported():
    assert isinstance(ledger(chain(0, 1, 1)), ELBOTerms)


def test_importance_weighted_refuses_scaled_terms():
    data = torch.zeros(20)

    def model():
        with pyro.plate("sequences", 20, subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[rows])

    def guide():
        with pyro.plate("sequences", 20, subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    terms = elbo_terms(model, guide, kl="monte-carlo", num_particles=3)
    with pytest.raises(ValueError, match=r"^importance_weighted: .*\['x', 'z'\]"):
        terms.importance_weighted()


class OwnChain(dist.TorchDistribution):
    """Has the protocol of a chain and nothing else of `MarkovChain`; its samples hold `filling` where padding is."""

    arg_constraints = {}
    has_rsample = True

    def __init__(self, chain, filling):
        self.chain, self.filling = chain, filling
        super().__init__(chain.batch_shape, chain.event_shape, validate_args=False)
        for name in ("log_prob_per_step", "mean_path", "extend", "log_prob"):
            setattr(self, name, getattr(chain, name))

    @property
    def step_mask(self):
        return self.chain.step_mask

    def conditionals(self, path):
        return Conditionals(self.chain.initial, self.chain.transition(path[..., :-1, :].movedim(-2, 0)))

    def expand(self, batch_shape, _instance=None):
        return OwnChain(self.chain.expand(batch_shape), self.filling)

    def rsample(self, sample_shape=()):
        return torch.where(self.step_mask.unsqueeze(-1), self.chain.rsample(sample_shape), self.filling)


@pytest.mark.parametrize("filling", [1e6, float("nan")])
def test_a_chain_of_ones_own_may_draw_anything_where_padding_is(filling):
    mask = torch.tensor([[True, True, True], [True, False, False]])
    results = []
    for own in (False, True):
        weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

        def steps(z_prev, weight=weight):
            return dist.Normal(weight * z_prev, 1 + weight**2, validate_args=False).to_event(1)

        def walk(transition):
            return MarkovChain(dist.Normal(torch.zeros(2, 2).double(), 1.0).to_event(1), transition, 3, mask=mask)

        def model():
            with pyro.plate("sequences", 2):
                z = pyro.sample("z", walk(lambda z_prev: dist.Normal(z_prev, 1.0).to_event(1)))
                z = torch.where(mask.unsqueeze(-1), z, 0.0)
                x = IndependentSteps(dist.Normal(z, 1.0).to_event(1), mask)
                pyro.sample("x", x, obs=torch.ones(2, 3, 2).double())

        def guide(own=own, steps=steps):
            with pyro.plate("sequences", 2):
                drawn = walk(steps)
                pyro.sample("z", OwnChain(drawn, filling) if own else drawn)

        torch.manual_seed(0)
        bound = elbo_terms(model, guide).elbo().sum()
        results.append((bound, torch.autograd.grad(bound, weight)[0]))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_ledger_shows_the_mean_of_each_term():
    terms = ledger_with(torch.tensor([1.0, 2.0]))
    assert repr(terms) == "ELBOTerms(log_likelihood['x']=1.5; means over 2 sequences, in nats)"


@pytest.mark.parametrize("name", ["context", "fn"])
def test_programs_may_name_their_arguments_as_pyros_handlers_do(name):
    def model(**options):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=options[name])

    def guide(**options):
        pyro.sample("z", dist.Normal(options[name] / 2, 0.5**0.5))

    found = elbo_terms(model, guide, kl="monte-carlo", **{name: torch.tensor(1.0)}).elbo()
    torch.testing.assert_close(found, dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0)))


def test_plain_steps_of_the_model_are_compared_step_by_step_with_a_guides_chain():
    start = dist.Normal(torch.ones(2, 3), 0.5).to_event(1)

    def model():
        with pyro.plate("sequences", 2):
            pyro.sample("z", dist.Normal(torch.zeros(2, 4, 3), 1.0).to_event(2))
            pyro.sample("x", dist.Normal(torch.zeros(2), 1.0), obs=torch.zeros(2))

    def guide():
        with pyro.plate("sequences", 2):
            pyro.sample("z", MarkovChain(start, lambda z_prev: dist.Normal(0 * z_prev + 2, 0.5).to_event(1), 4))

    term = elbo_terms(model, guide).terms["z"]
    assert term.how == "closed form"
    prior = dist.Normal(0.0, 1.0)
    first, later = (3 * torch.distributions.kl_divergence(dist.Normal(loc, 0.5), prior) for loc in (1.0, 2.0))
    torch.testing.assert_close(term.per_step, torch.stack([first, later, later, later]).expand(2, 4))


def test_coordinates_under_one_mask_have_a_closed_form():
    mask = torch.tensor([[True, False, True], [True, True, True]])

    def latent(loc):
        pyro.sample("z", dist.Normal(torch.full((2, 3), loc), 1.0).mask(mask).to_event(1))

    def guide():
        with pyro.plate("sequences", 2):
            latent(2.0)

    def model():
        with pyro.plate("sequences", 2):
            latent(0.0)
            pyro.sample("x", dist.Normal(torch.zeros(2), 1.0), obs=torch.zeros(2))

    term = elbo_terms(model, guide).terms["z"]
    assert term.how == "closed form"
    torch.testing.assert_close(term.value, torch.tensor([4.0, 6.0]))  # (2 - 0)^2 / 2 a coordinate that counts


def test_a_chain_with_its_own_rsample_is_drawn_by_it():
    class Shifted(MarkovChain):
        def rsample(self, sample_shape=()):
            return super().rsample(sample_shape) + 100

    def walk(kind):
        return kind(dist.Normal(torch.zeros(2, 1), 1.0).to_event(1), lambda z: dist.Normal(z, 1.0).to_event(1), 3)

    def guide():
        with pyro.plate("sequences", 2):
            pyro.sample("z", walk(Shifted))

    def model():
        with pyro.plate("sequences", 2):
            z = pyro.sample("z", walk(MarkovChain))
            assert (z > 50).all()
            pyro.sample("x", dist.Normal(z.sum((1, 2)), 1.0), obs=torch.zeros(2))

    terms = elbo_terms(model, guide)
    assert terms.terms["x"].how == "density"


def test_an_observed_chain_with_another_density_is_named():
    class Heavier(MarkovChain):
        def log_prob(self, value):
            return 2 * super().log_prob(value)

    def model():
        walk = Heavier(dist.Normal(torch.zeros(1), 1.0).to_event(1), lambda z: dist.Normal(z, 1.0).to_event(1), 3)
        pyro.sample("frames", walk, obs=torch.zeros(3, 1))

    with pytest.raises(ValueError, match="^site 'frames': Heavier has its own log_prob and inherits `conditionals`"):
        elbo_terms(model, lambda: None)
