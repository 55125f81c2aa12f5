"""Programs whose ledger or intervention was once silently wrong, or refused for a reason that was not theirs."""

import functools
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import StateSpace, WhoWhat, normal
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from strategies import Tensors, mask_of
from torch import nn
from torch.testing import assert_close

from seqdisent import (
    IndependentSteps,
    MarkovChain,
    RecurrentChain,
    elbo_terms,
    fill_padding,
    forecast,
    generate,
    reconstruct,
    swap,
)
from seqdisent.inference.kl import closed_form

exact = functools.partial(assert_close, rtol=1e-9, atol=1e-9)
START = normal(torch.zeros(2, 1, dtype=torch.float64), 1.0)


def plated(program):
    """A guide of the program's sites."""

    def guide():
        with pyro.plate("sequences", 2):
            program()

    return guide


def observing(program):
    """A model of the program's sites, and x."""

    def model():
        with pyro.plate("sequences", 2):
            observe(*program())

    return model


def observe(*latents):
    total = sum(z.sum(-1).sum(-1) for z in latents)
    pyro.sample("x", dist.Normal(total, 1.0), obs=torch.zeros(2, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# A chain is scored while its program runs
# ---------------------------------------------------------------------------------------------------------------------

STEPS = {"normal": normal, "laplace": lambda loc, scale: dist.Laplace(loc, scale).to_event(1)}


@pytest.mark.parametrize("kl", ["analytic", "monte-carlo"])
@pytest.mark.parametrize("family", STEPS)
def test_a_closure_that_is_bound_late_scores_its_own_step(family, kl):
    """Guide and prior are the same program, so every KL is 0; the transition reads the loop's variable."""
    factors = [0.5, 2.0]

    def program():
        paths = []
        for k in range(2):
            chain = MarkovChain(START, lambda z: STEPS[family](factors[k] * z, 1.0), 3)  # noqa: B023
            paths.append(pyro.sample(f"z{k}", chain))
        return paths

    terms = elbo_terms(observing(program), plated(program), kl=kl)
    for k in range(2):
        exact(terms.kl[f"z{k}"], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("make", [MarkovChain, RecurrentChain])
def test_a_local_that_is_used_again_and_weights_that_change_are_those_of_the_draw(make):
    network = nn.RNN(1, 1).double()
    options = {} if make is MarkovChain else {"recurrence": network}

    def program(afterwards):
        weight = {"factor": 0.5}
        chain = make(START, lambda z, *_: dist.Laplace(weight["factor"] * z, 1.0).to_event(1), 3, **options)
        z = pyro.sample("z", chain)
        weight["factor"] = afterwards
        return [z]

    for guides, models in [(100.0, 0.5), (0.5, 100.0)]:
        guide, model = functools.partial(program, guides), functools.partial(program, models)
        exact(elbo_terms(observing(model), plated(guide)).kl["z"], torch.zeros(2, dtype=torch.float64))


def test_parameters_of_a_functional_call_are_those_of_the_call():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self):
            with pyro.plate("sequences", 2):
                z = pyro.sample("z", MarkovChain(START, lambda z: normal(self.weight * z, 1.0), 3))
                observe(z)

    def guide():
        with pyro.plate("sequences", 2):
            pyro.sample("z", MarkovChain(START, lambda z: normal(2.0 * z, 1.0), 3))

    model = Model()
    given = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    terms = elbo_terms(lambda: torch.func.functional_call(model, {"weight": given}, ()), guide)
    exact(terms.kl["z"], torch.zeros(2, dtype=torch.float64))
    terms.kl["z"].sum().backward()
    assert given.grad is not None
    assert model.weight.grad is None


def test_weights_that_a_pyro_module_samples_are_those_of_the_run():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = PyroSample(dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))

        def forward(self):
            weight = self.weight
            with pyro.plate("sequences", 2):
                z = pyro.sample("z", MarkovChain(START, lambda z: dist.Laplace(self.weight * z, 1.0).to_event(1), 3))
                observe(z)
            return weight

    def guide():
        weight = pyro.sample("weight", dist.Normal(torch.tensor(0.3, dtype=torch.float64), 0.1))
        with pyro.plate("sequences", 2):
            pyro.sample("z", MarkovChain(START, lambda z: dist.Laplace(weight * z, 1.0).to_event(1), 3))

    exact(elbo_terms(Model(), guide).kl["z"], torch.zeros(2, dtype=torch.float64))


def test_no_gradient_is_recorded_where_the_program_records_none():
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def model(frozen):
        with pyro.plate("sequences", 2):
            with torch.set_grad_enabled(not frozen):
                z = pyro.sample("z", MarkovChain(START, lambda z: normal(weight * z, weight.exp()), 3))
            observe(z)

    def guide(frozen):
        with pyro.plate("sequences", 2):
            pyro.sample("z", MarkovChain(START, lambda z: normal(0.1 * z, 1.0), 3))

    assert elbo_terms(model, guide, False).kl["z"].requires_grad
    assert not elbo_terms(model, guide, True).kl["z"].requires_grad


def test_a_path_that_is_changed_in_place_is_scored_as_it_was_drawn():
    """`.data` does not count as a change, so nothing that is remembered of a tensor can be trusted."""

    def model():
        with pyro.plate("sequences", 2):
            z = pyro.sample("z", MarkovChain(START, lambda z: normal(0.5 * z, 1.0), 3))
            observe(z)

    def guide(change):
        with pyro.plate("sequences", 2):
            z = pyro.sample("z", MarkovChain(START, lambda z: normal(0.1 * z, 1.0), 3))
        if change:
            z.data.mul_(1.0)

    values = []
    for change in (False, True):
        torch.manual_seed(0)
        values.append(elbo_terms(model, functools.partial(guide, change)).kl["z"])
    exact(*values)


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms
# ---------------------------------------------------------------------------------------------------------------------


def test_the_density_of_a_point_counts():
    log_density = torch.tensor([0.3, -1.0], requires_grad=True)

    def model():
        with pyro.plate("sequences", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(2))

    def guide():
        with pyro.plate("sequences", 2):
            pyro.sample("z", dist.Delta(torch.tensor([0.5, 0.1]), log_density=log_density))

    terms = elbo_terms(model, guide)
    wanted = log_density - dist.Normal(0.0, 1.0).log_prob(torch.tensor([0.5, 0.1]))
    exact(terms.kl["z"], wanted)
    exact(torch.autograd.grad(terms.kl["z"].sum(), log_density)[0], torch.ones(2))
    assert terms.monte_carlo == frozenset()
    exact(-terms.elbo().sum(), torch.tensor(Trace_ELBO().loss(model, guide)))


class Shifted(dist.Normal):
    """A Normal by inheritance, not by density."""

    def log_prob(self, value):
        return super().log_prob(value - 1)


def affine(scale):
    return dist.TransformedDistribution(
        dist.Normal(torch.zeros(1), torch.ones(1)), [dist.transforms.AffineTransform(0.0, scale)]
    )


WITHOUT_FORMULA = {
    "a subclass with a density of its own": (Shifted(0.0, 1.0), dist.Normal(0.5, 2.0)),
    "folded": (dist.FoldedDistribution(dist.Normal(1.0, 1.0)), dist.FoldedDistribution(dist.Normal(0.0, 1.0))),
    "transformed": (affine(torch.ones(1)), affine(torch.ones(1))),
    "transformed, in an event": (affine(torch.ones(1)).to_event(1), affine(torch.ones(1)).to_event(1)),
}


@pytest.mark.parametrize("case", WITHOUT_FORMULA)
def test_no_formula_is_borrowed_from_another_class(case):
    q, p = WITHOUT_FORMULA[case]
    assert closed_form(q, p) is None


def test_a_transform_with_parameters_keeps_its_gradient():
    scale = torch.tensor([2.0], requires_grad=True)

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    terms = elbo_terms(model, lambda: pyro.sample("z", affine(scale).to_event(1)))
    assert terms.monte_carlo == {"z"}
    assert torch.autograd.grad(terms.kl["z"], scale)[0].abs() > 0.01


def positive(*shape):
    return 0.5 + Tensors(1).uniform(*shape)


def probabilities(seed):
    return torch.softmax(Tensors(seed).normal(3, 4), -1)


TRIL = torch.tensor([[1.0, 0.0], [0.4, 0.7]], dtype=torch.float64)
KNOWN = {
    "Normal": (dist.Normal(Tensors(0).normal(3), positive(3)), dist.Normal(Tensors(2).normal(3), positive(3))),
    "LogNormal": (dist.LogNormal(Tensors(0).normal(3), positive(3)), dist.LogNormal(Tensors(2).normal(3), 0.8)),
    "Laplace": (dist.Laplace(Tensors(0).normal(3), positive(3)), dist.Laplace(Tensors(2).normal(3), positive(3))),
    "Gamma": (dist.Gamma(positive(3), 2 * positive(3)), dist.Gamma(2 * positive(3), positive(3))),
    "Beta": (dist.Beta(1 + positive(3), positive(3)), dist.Beta(positive(3), 1 + positive(3))),
    "Dirichlet": (dist.Dirichlet(1 + positive(3, 2)), dist.Dirichlet(2 * positive(3, 2))),
    "Exponential": (dist.Exponential(positive(3)), dist.Exponential(2 * positive(3))),
    "HalfNormal": (dist.HalfNormal(positive(3)), dist.HalfNormal(1.5 * positive(3))),
    "Gumbel": (dist.Gumbel(Tensors(0).normal(3), positive(3)), dist.Gumbel(Tensors(2).normal(3), 1 + positive(3))),
    "Cauchy": (dist.Cauchy(Tensors(0).normal(3), positive(3)), dist.Cauchy(Tensors(2).normal(3), positive(3))),
    "Uniform": (dist.Uniform(positive(3), 2 + positive(3)), dist.Uniform(0.0, 4 + positive(3))),
    "MultivariateNormal": (
        dist.MultivariateNormal(Tensors(0).normal(3, 2), scale_tril=TRIL),
        dist.MultivariateNormal(Tensors(2).normal(3, 2), scale_tril=2 * TRIL),
    ),
    "Normals against MultivariateNormal": (
        dist.Normal(Tensors(0).normal(3, 2), positive(3, 2)).to_event(1),
        dist.MultivariateNormal(Tensors(2).normal(3, 2), scale_tril=TRIL),
    ),
    "Normals in two event dimensions": (
        dist.Normal(Tensors(0).normal(3, 2, 2), positive(3, 2, 2)).to_event(2),
        dist.Normal(Tensors(2).normal(3, 2, 2), positive(3, 2, 2)).to_event(2),
    ),
    "Bernoulli": (dist.Bernoulli(0.2 + 0.3 * positive(3)), dist.Bernoulli(0.4 + 0.2 * positive(3))),
    "Categorical": (dist.Categorical(probabilities(0)), dist.Categorical(probabilities(1))),
    "OneHotCategorical": (
        dist.OneHotCategoricalStraightThrough(probabilities(0)),
        dist.OneHotCategorical(probabilities(1)),
    ),
    "Poisson": (dist.Poisson(positive(3)), dist.Poisson(2 * positive(3))),
    "Geometric": (dist.Geometric(0.2 + 0.3 * positive(3)), dist.Geometric(0.4 + 0.2 * positive(3))),
}


@pytest.mark.parametrize("family", KNOWN)
def test_a_known_formula_is_the_average_of_log_q_less_log_p(family):
    """200,000 draws from seed 0: every KL within 5 of its standard errors."""
    torch.manual_seed(0)
    q, p = KNOWN[family]
    found = closed_form(q, p)
    assert found is not None
    with torch.no_grad():
        x = q.sample((200_000,))
        difference = q.log_prob(x) - p.log_prob(x)
    errors = difference.std(0) / math.sqrt(len(x))
    assert found.shape == difference.shape[1:]
    assert ((difference.mean(0) - found).abs() < 5 * errors + 1e-9).all()


# ---------------------------------------------------------------------------------------------------------------------
# Padding
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filling", [0.0, 1e6, float("nan"), -1.0])
@pytest.mark.parametrize("lengths", [[4, 2], [4, 1], [1, 1]])
@pytest.mark.parametrize("make", ["markov", "recurrent"])
def test_padding_stays_inside_the_domain_of_a_transition(filling, lengths, make):
    """The transition takes sqrt and log of what it reads; 0 there gives an infinite gradient times 0."""
    mask = mask_of(lengths, 1)
    positive_inputs = 0.5 + Tensors(3).uniform(*mask.shape, 1)
    network = nn.GRU(1, 2, batch_first=True).double()
    results = []
    for content in (1.0, filling):
        inputs = torch.where(mask.unsqueeze(-1), positive_inputs, content)
        inputs[:, 0] = 0.0  # the first is never read: no time has passed before it
        inputs.requires_grad_()
        rate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

        def transition(z_prev, read, rate=rate):
            dt = read[..., -1:]
            return normal(z_prev * torch.exp(-rate * dt) + dt.log(), rate * dt.sqrt())

        def program(transition=transition, inputs=inputs):
            reads = {"inputs": inputs}
            if make == "recurrent":
                reads = {"recurrence": network, "context": inputs}
            chain = {"markov": MarkovChain, "recurrent": RecurrentChain}[make]
            return pyro.sample("z", chain(START, transition, mask.shape[1], mask=mask, **reads))

        def model(program=program):
            with pyro.plate("sequences", 2):
                z = program()
                # the emission takes a logarithm of the path, whose padding is a real step
                step = normal((z * z + 0.1).log(), 1.0)
                pyro.sample("x", IndependentSteps(step, mask), obs=torch.ones(*mask.shape, 1, dtype=torch.float64))

        def guide(inputs=inputs):
            with pyro.plate("sequences", 2):
                chain = MarkovChain(START, lambda z, u: normal(0.1 * z + u.log(), 1.0), mask.shape[1], mask=mask,
                                    inputs=inputs)  # fmt: skip
                pyro.sample("z", chain)

        torch.manual_seed(0)
        bound = elbo_terms(model, guide).elbo().sum()
        gradients = torch.autograd.grad(bound, [rate, inputs], allow_unused=True)
        results.append([bound.detach(), *(torch.zeros(()) if g is None else g for g in gradients)])
    for clean, padded in zip(*results, strict=True):
        assert padded.isfinite().all()
        assert torch.equal(clean, padded)


def test_what_fills_padding_is_of_the_same_row_and_has_no_gradient():
    values = torch.tensor([[[1.0], [2.0]], [[3.0], [float("nan")]]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    filled = fill_padding(values, mask)
    exact(filled.detach(), torch.tensor([[[1.0], [2.0]], [[3.0], [3.0]]]))
    exact(torch.autograd.grad(filled.sum(), values)[0], torch.tensor([[[1.0], [1.0]], [[1.0], [0.0]]]))


def test_an_observed_site_that_counts_padding_is_refused():
    mask = mask_of([3, 1])

    def model(x, emission):
        with pyro.plate("sequences", 2):
            z = pyro.sample("z", MarkovChain(START, lambda z: normal(z, 1.0), 3, mask=mask))
            pyro.sample("x", emission(normal(z, 1.0)), obs=x)

    def guide(x, emission):
        with pyro.plate("sequences", 2):
            pyro.sample("z", MarkovChain(START, lambda z: normal(0.5 * z, 1.0), 3, mask=mask))

    x = torch.zeros(2, 3, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="^site 'x': .*'z'"):
        elbo_terms(model, guide, x, lambda step: step.to_event(1))
    for emission in (lambda step: IndependentSteps(step, mask), lambda step: step.mask(mask).to_event(1)):
        terms = elbo_terms(model, guide, x, emission)
        per_step = terms.log_likelihood_per_step["x"]
        exact(per_step.sum(-1), terms.log_likelihood["x"])
        assert (per_step[~mask] == 0).all()
        assert torch.equal(terms.real_steps["x"], mask)
    elbo_terms(model, guide, x, lambda step: step.to_event(1).mask(True))  # says that it knows


# ---------------------------------------------------------------------------------------------------------------------
# Pyro's own programs
# ---------------------------------------------------------------------------------------------------------------------


def conjugate():
    with pyro.plate("sequences", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([1.0, 0.0, 2.0]))


@pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal])
def test_automatic_guides_have_pyros_own_bound(auto):
    guide = auto(conjugate)
    guide()  # makes its parameters
    torch.manual_seed(0)
    terms = elbo_terms(conjugate, guide)
    torch.manual_seed(0)
    assert_close(terms.elbo().sum(), -Trace_ELBO().differentiable_loss(conjugate, guide))
    assert len(terms.kl) == 2  # of z, and of what it was made from
    assert terms.monte_carlo >= set(terms.kl) - {"z"}
    pyro.clear_param_store()


def test_an_auxiliary_site_is_a_term_of_its_own():
    def guide():
        with pyro.plate("sequences", 3):
            helper = pyro.sample("helper", dist.Normal(0.0, 2.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(2 * helper, log_density=torch.tensor(-math.log(2))))

    torch.manual_seed(0)
    terms = elbo_terms(conjugate, guide)
    torch.manual_seed(0)
    exact(terms.elbo().sum(), -Trace_ELBO().differentiable_loss(conjugate, guide))


def test_a_reparametrised_latent_is_no_emission():
    def program(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        num_sequences = num_sequences if frames is None else len(frames)
        with pyro.plate("sequences", num_sequences):
            z = pyro.sample("z", dist.Normal(torch.full((num_sequences,), 3.0), 2.0))
            pyro.sample("x", dist.Normal(z, 1.0).expand([num_sequences]), obs=None if frames is None else frames[:, 0])

    def guide(frames, mask=None):
        with pyro.plate("sequences", len(frames)):
            pyro.sample("z_decentered", dist.Normal(frames[:, 0], 1.0))

    model = poutine.reparam(program, {"z": LocScaleReparam(0.0)})
    frames = torch.ones(2, 1)
    assert list(reconstruct(model, guide, frames)) == ["x"]
    terms = elbo_terms(model, guide, frames)
    assert (sorted(terms.kl), sorted(terms.log_likelihood)) == (["z_decentered"], ["x"])
    torch.manual_seed(0)
    bound = elbo_terms(model, guide, frames, kl="monte-carlo").elbo().sum()
    torch.manual_seed(0)
    assert_close(bound, -Trace_ELBO().differentiable_loss(model, guide, frames))


def test_a_hidden_markov_model_of_scalars_may_be_observed():
    initial, transition = torch.tensor([0.6, 0.4]).log(), torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()
    x = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])

    def model(x):
        with pyro.plate("sequences", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            logits = torch.stack([z - 1, z + 1], -1).unsqueeze(-2)
            pyro.sample("x", dist.DiscreteHMM(initial, transition, dist.Bernoulli(logits=logits)), obs=x)

    def guide(x):
        with pyro.plate("sequences", 2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    torch.manual_seed(0)
    terms = elbo_terms(model, guide, x)
    torch.manual_seed(0)
    z = dist.Normal(torch.zeros(2), 1.0).rsample()
    for row in range(2):
        total = torch.tensor(0.0)
        for first, *states in itertools.product((0, 1), repeat=4):  # Pyro's first observation follows a transition
            density, before = initial[first], first
            for t, state in enumerate(states):
                density, before = density + transition[before, state], state
                logit = z[row] + (2 * state - 1)
                density = density + dist.Bernoulli(logits=logit).log_prob(x[row, t])
            total = total + density.exp()
        assert_close(terms.log_likelihood["x"][row], total.log())


def test_particles_in_one_run_say_what_a_program_must_do():
    def model(x):
        with pyro.plate("sequences", 2):
            z = pyro.sample("z", normal(torch.zeros(2, 1), 1.0))
            pyro.sample("x", normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("sequences", 2):
            z = pyro.sample("z", normal(x, 1.0))
            torch.cat([z, x], -1)

    assert elbo_terms(model, guide, torch.zeros(2, 1), num_particles=3).elbo().shape == (2,)
    with pytest.raises(RuntimeError, match="^vectorize_particles: "):
        elbo_terms(model, guide, torch.zeros(2, 1), num_particles=3, vectorize_particles=True)


def test_a_class_as_the_start_of_a_chain_is_told_what_it_is_as_a_vector():
    with pytest.raises(ValueError, match="^initial: .*OneHotCategorical"):
        MarkovChain(dist.Categorical(torch.ones(3)), lambda z: normal(z, 1.0), 3)


# ---------------------------------------------------------------------------------------------------------------------
# Interventions
# ---------------------------------------------------------------------------------------------------------------------


def test_clips_of_different_lengths_are_swapped_where_nothing_is_left_to_infer():
    """The guide of w reads z, so it cannot run on the source with a z of the donor's length; it need not."""

    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        if frames is not None:
            num_sequences, num_steps = frames.shape[:2]
        with pyro.plate("sequences", num_sequences):
            start = normal(torch.zeros(num_sequences, 1), 1.0)
            z = pyro.sample("z", MarkovChain(start, lambda z: normal(z, 1.0), num_steps))
            w = pyro.sample("w", MarkovChain(start, lambda w: normal(w, 1.0), num_steps))
            pyro.sample("x", IndependentSteps(normal(z + 10 * w, 1.0)), obs=frames)

    def guide(frames, mask=None):
        with pyro.plate("sequences", len(frames)):
            z = pyro.sample("z", IndependentSteps(normal(frames, 1.0)))
            pyro.sample("w", IndependentSteps(normal(frames + 0 * z, 1.0)))

    source, donor = torch.full((1, 3, 1), 1.0), torch.full((1, 5, 1), 2.0)
    exact(swap(model, guide, source, donor, sites=["z", "w"])["x"].mean, torch.full((1, 5, 1), 22.0))
    swapped = swap(model, guide, source, donor, sites=["z"], keep=["w"])["x"].mean
    exact(swapped, torch.full((1, 5, 1), 12.0))  # w goes on after its third step


def test_a_static_latent_with_as_many_rows_as_steps_is_no_trajectory():
    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        if frames is not None:
            num_sequences, num_steps = frames.shape[:2]
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", normal(torch.zeros(3, 2), 1.0, 2))
            start = normal(torch.zeros(num_sequences, 1), 1.0)
            z = pyro.sample("z", MarkovChain(start, lambda z: normal(z, 1.0), num_steps))
            pyro.sample("x", IndependentSteps(normal(z + s.sum((-1, -2))[..., None, None], 1.0)), obs=frames)

    def guide(frames, mask=None):
        with pyro.plate("sequences", len(frames)):
            pyro.sample("s", normal(frames.mean((1, 2))[:, None, None].expand(-1, 3, 2), 1.0, 2))
            pyro.sample("z", IndependentSteps(normal(frames, 1.0)))

    frames = torch.full((2, 3, 1), 1.0)  # three steps, as many as s has rows
    exact(forecast(model, guide, frames, num_steps=2, sample=False)["x"].mean, torch.full((2, 5, 1), 7.0))
    donor = torch.full((2, 4, 1), 2.0)
    assert swap(model, guide, frames, donor, sites=["s"])["x"].mean.shape == (2, 3, 1)
    terms = elbo_terms(model, guide, frames)
    assert list(terms.kl_per_step) == ["z"]


def without_memory(frames=None, mask=None, *, num_sequences=None, num_steps=None):
    if frames is not None:
        num_sequences, num_steps = frames.shape[:2]
    with pyro.plate("sequences", num_sequences):
        z = pyro.sample("z", IndependentSteps(normal(torch.zeros(num_sequences, num_steps, 1), 1.0)))
        pyro.sample("x", IndependentSteps(normal(z, 1.0)), obs=frames)


def copied(frames, mask=None):
    with pyro.plate("sequences", len(frames)):
        pyro.sample("z", IndependentSteps(normal(frames, 1.0)))


def test_a_forecast_that_would_ignore_the_frames_is_refused():
    with pytest.raises(ValueError, match="^model: .*future"):
        forecast(without_memory, copied, torch.zeros(2, 3, 1), num_steps=2)

    def no_latents(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        with pyro.plate("sequences", num_sequences):
            pyro.sample("x", normal(torch.zeros(num_sequences, num_steps, 1), 1.0, 2), obs=frames)

    with pytest.raises(ValueError, match="^model: .*future"):
        forecast(no_latents, lambda frames, mask=None: None, torch.zeros(2, 3, 1), num_steps=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_frames_that_are_not_finite_are_refused_unless_they_are_padding(value):
    what, mask = WhoWhat(0), mask_of([3, 2])
    frames = Tensors(0).normal(2, 3, 4)
    frames[~mask] = value
    assert reconstruct(what.model, what.guide, frames, mask)["x"].mean[mask].isfinite().all()
    frames[0, 1] = value
    calls = {
        "args": [
            lambda: reconstruct(what.model, what.guide, frames, mask),
            lambda: forecast(what.model, what.guide, frames, mask, num_steps=1),
        ],
        "source": [lambda: swap(what.model, what.guide, (frames, mask), (frames, mask), sites=["z"])],
    }
    for name, each in calls.items():
        for call in each:
            with pytest.raises(ValueError, match=f"^{name}: .*finite"):
                call()


def test_a_model_without_sites_is_named():
    with pytest.raises(ValueError, match="^model: .*sample site"):
        generate(lambda frames=None, mask=None, **sizes: None, num_sequences=1, num_steps=2)


def test_the_ledger_of_the_exact_posterior_is_still_the_evidence():
    """The foundation under all of this: with holes in nothing, the Kalman filter's evidence whatever is drawn."""
    system, mask = StateSpace(0), mask_of([4, 2])
    frames = Tensors(1).normal(2, 4, 2)
    terms = elbo_terms(system.model, system.exact_guide, frames, mask, kl="monte-carlo")
    assert_close(terms.elbo(), system.log_evidence(frames, mask), rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# What a review found: guides whose densities change, handlers, masks of several kinds
# ---------------------------------------------------------------------------------------------------------------------


class Scale(torch.distributions.Transform):
    """y = x exp(w), with w read whenever it is asked, and nothing remembered."""

    domain = codomain = dist.constraints.real
    bijective = True

    def __init__(self, owner):
        super().__init__(cache_size=0)
        self.owner = owner

    def _call(self, x):
        return x * self.owner.w.exp()

    def _inverse(self, y):
        return y * (-self.owner.w).exp()

    def log_abs_det_jacobian(self, x, y):
        return self.owner.w.expand(x.shape)


def test_a_flow_of_the_guide_has_the_parameters_of_the_guides_call():
    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            with pyro.plate("sequences", 2):
                pyro.sample("z", dist.TransformedDistribution(dist.Normal(x, 1.0), [Scale(self)]).to_event(1))

    def model(x):
        with pyro.plate("sequences", 2):
            z = pyro.sample("z", normal(torch.zeros(2, 1), 1.0))
            pyro.sample("x", normal(z, 1.0), obs=x)

    guide, x, w = Guide(), torch.ones(2, 1), torch.tensor(-1.0, requires_grad=True)
    torch.manual_seed(0)
    terms = elbo_terms(model, lambda x: torch.func.functional_call(guide, {"w": w}, (x,)), x)
    torch.manual_seed(0)
    z = (x + torch.randn(2, 1)) * w.exp()
    exact_kl = normal(x * w.exp(), w.exp()).log_prob(z) - normal(torch.zeros(2, 1), 1.0).log_prob(z)
    assert_close(terms.kl["z"], exact_kl)
    assert guide.w.grad is None
    found, wanted = (torch.autograd.grad(term.sum(), w)[0] for term in (terms.kl["z"], exact_kl))
    assert_close(found, wanted)


@pytest.mark.parametrize("masked", [False, True])
def test_one_flow_at_two_sites_has_the_density_of_each_draw(masked):
    """A planar flow has no inverse but that of its last draw."""
    flow = Tensors(0, torch.float32).build(lambda: dist.transforms.planar(1))
    mask = mask_of([3, 2])

    def guide(x):
        with pyro.plate("sequences", 2):
            for name in ("a", "b"):
                base = normal(x, 1.0) if masked else normal(x[:, 0], 1.0)
                q = dist.TransformedDistribution(base, [flow])
                pyro.sample(name, IndependentSteps(q, mask) if masked else q)

    def model(x):
        with pyro.plate("sequences", 2):
            for name in ("a", "b"):
                zeros = torch.zeros(2, 3, 1) if masked else torch.zeros(2, 1)
                pyro.sample(name, IndependentSteps(normal(zeros, 1.0), mask) if masked else normal(zeros, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(2))

    x = Tensors(1, torch.float32).normal(2, 3, 1)
    torch.manual_seed(0)
    terms = elbo_terms(model, guide, x)
    torch.manual_seed(0)
    for name in ("a", "b"):
        base = normal(x, 1.0) if masked else normal(x[:, 0], 1.0)
        drawn = base.rsample()
        y = flow(drawn)
        term = base.log_prob(drawn) - flow.log_abs_det_jacobian(drawn, y) - normal(torch.zeros_like(y), 1.0).log_prob(y)
        assert_close(terms.kl[name], torch.where(mask, term, 0.0).sum(-1) if masked else term)


def test_an_auxiliary_chain_is_scored_as_it_was_drawn():
    def guide(afterwards):
        weight = 0.9
        with pyro.plate("sequences", 2):
            chain = MarkovChain(START, lambda z: normal(weight * z, 0.7), 3)
            a = pyro.sample("a", chain, infer={"is_auxiliary": True})
            weight = afterwards
            pyro.sample("z", dist.Delta(a[..., -1, :], event_dim=1))

    def model(_):
        with pyro.plate("sequences", 2):
            z = pyro.sample("z", normal(torch.zeros(2, 1, dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.zeros(2, dtype=torch.float64))

    values = []
    for afterwards in (0.9, -5.0):
        torch.manual_seed(0)
        values.append(elbo_terms(model, guide, afterwards).kl["a"])
    exact(*values)


def test_a_prior_under_no_grad_leaves_the_guide_its_gradient():
    loc = torch.tensor([0.3, -0.2], requires_grad=True)

    def model(frozen):
        with pyro.plate("sequences", 2):
            with torch.set_grad_enabled(not frozen):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(2))

    def guide(_):
        with pyro.plate("sequences", 2):
            pyro.sample("z", dist.Normal(loc, 0.5))

    for kl in ("analytic", "monte-carlo"):
        gradients = []
        for frozen in (False, True):
            torch.manual_seed(0)
            gradients.append(torch.autograd.grad(elbo_terms(model, guide, frozen, kl=kl).elbo().sum(), loc)[0])
        exact(*gradients)


def test_a_handler_around_the_ledger_is_scored_with_the_value_that_it_gives():
    def guide():
        with pyro.plate("sequences", 2):
            pyro.sample("z", MarkovChain(START, lambda z: normal(0.1 * z, 1.0), 3))

    def model():
        with pyro.plate("sequences", 2):
            observe(pyro.sample("z", MarkovChain(START, lambda z: normal(0.5 * z, 1.0), 3)))

    trace = poutine.trace(guide).get_trace()
    inside = elbo_terms(poutine.replay(model, trace=trace), poutine.replay(guide, trace=trace), kl="monte-carlo")
    with poutine.replay(trace=trace):
        around = elbo_terms(model, guide, kl="monte-carlo")
    exact(around.kl["z"], inside.kl["z"])


def test_a_forecast_of_frames_that_are_a_chain_is_refused():
    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", normal(torch.zeros(num_sequences, 1), 1.0))
            start = normal(torch.zeros(num_sequences, 1), 1.0)
            pyro.sample("x", MarkovChain(start, lambda x: normal(x + s, 0.1), num_steps), obs=frames)

    def guide(frames, mask=None):
        with pyro.plate("sequences", len(frames)):
            pyro.sample("s", normal(frames[:, 1] - frames[:, 0], 1.0))

    frames = torch.tensor([[[50.0], [51.0], [52.0]]])
    with pytest.raises(ValueError, match="site 'x': is a chain of frames"):
        forecast(model, guide, frames, num_steps=2, sample=False)
    ahead = reconstruct(model, guide, frames)["x"].extend(frames, 2, sample=False)
    exact(ahead.flatten(), torch.tensor([50.0, 51.0, 52.0, 53.0, 54.0]))
    terms = elbo_terms(functools.partial(model, num_sequences=1, num_steps=3), guide, frames)
    assert terms.log_likelihood_per_step["x"].shape == (1, 3)


def test_classes_beside_a_chain_of_classes_are_refused_where_the_gradient_would_be_wrong():
    logits = torch.zeros(2, 3, 4, requires_grad=True)

    def model():
        with pyro.plate("sequences", 2):
            start = dist.OneHotCategorical(logits=torch.zeros(2, 4))
            z = pyro.sample("z", MarkovChain(start, lambda z: dist.OneHotCategorical(logits=2 * z), 3))
            pyro.sample("x", dist.Normal(z.sum((-1, -2)), 1.0), obs=torch.zeros(2))

    def guide():
        with pyro.plate("sequences", 2):
            pyro.sample("z", IndependentSteps(dist.OneHotCategoricalStraightThrough(logits=logits)))

    with pytest.raises(ValueError, match="site 'z': is discrete and has no closed form here"):
        elbo_terms(model, guide)


def test_means_of_padding_repeat_the_first_step():
    step = normal(torch.tensor([[[1.0], [float("nan")]]]), 1.0)
    steps = IndependentSteps(step, torch.tensor([[True, False]]))
    exact(steps.mean_path(), torch.ones(1, 2, 1))


def test_an_observed_site_with_more_real_steps_than_a_latent_is_refused():
    def model(x):
        with pyro.plate("sequences", 2):
            z = pyro.sample("z", MarkovChain(START, lambda z: normal(z, 1.0), 3, mask=mask_of([3, 1])))
            pyro.sample("x", IndependentSteps(normal(z, 1.0), mask_of([3, 2])), obs=x)

    def guide(x):
        with pyro.plate("sequences", 2):
            pyro.sample("z", MarkovChain(START, lambda z: normal(z, 1.0), 3, mask=mask_of([3, 1])))

    with pytest.raises(ValueError, match="site 'x': counts steps that are padding in 'z'"):
        elbo_terms(model, guide, torch.zeros(2, 3, 1, dtype=torch.float64))


def test_masks_inside_the_steps_of_two_trajectories_are_compared():
    coordinates = torch.tensor([True, False])

    def program(mask):
        step = dist.Normal(torch.ones(2, 3, 2), 1.0)
        pyro.sample("z", IndependentSteps((step if mask is None else step.mask(mask)).to_event(1)))

    def model():
        with pyro.plate("sequences", 2):
            program(None)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(2))

    with pytest.raises(ValueError, match="site 'z': coordinates have different masks"):
        elbo_terms(model, plated(functools.partial(program, coordinates)))


def test_a_subclass_with_half_of_a_density_is_refused_and_one_that_draws_in_its_own_way_is_heard():
    class Half(MarkovChain):
        def log_prob_per_step(self, path):
            return super().log_prob_per_step(path) - 1

    class Draws(MarkovChain):
        def rsample(self, sample_shape=()):
            return torch.full((*sample_shape, *self.shape()), 7.0, dtype=torch.float64)

    def program(make):
        return [pyro.sample("z", make(START, lambda z: normal(z, 1.0), 3))]

    base = functools.partial(program, MarkovChain)
    with pytest.raises(ValueError, match="site 'z': Half has its own log_prob_per_step and inherits `conditionals`"):
        elbo_terms(observing(base), plated(functools.partial(program, Half)))
    assert (pyro.sample("z", Draws(START, lambda z: normal(z, 1.0), 3)) == 7).all()
    terms = elbo_terms(observing(base), plated(functools.partial(program, Draws)), kl="monte-carlo")
    exact(terms.kl["z"], torch.zeros(2, dtype=torch.float64))


def test_a_ragged_chain_continues_from_its_own_last_steps():
    chain = MarkovChain(normal(torch.zeros(2, 1), 1.0), lambda z: normal(z + 1, 1.0), 3, mask=mask_of([3, 2]))
    exact(chain.extend(chain.mean_path(), 1, sample=False).squeeze(-1), torch.tensor([[0.0, 1, 2, 3]]).expand(2, 4))


def test_whole_numbers_as_inputs_stay_whole_numbers():
    embedding, mask = nn.Embedding(5, 1), mask_of([3, 2])
    inputs = torch.tensor([[[0], [1], [2]], [[3], [4], [999]]])
    start = normal(torch.zeros(2, 1), 1.0)
    chain = MarkovChain(start, lambda z, u: normal(z + embedding(u.squeeze(-1)), 1.0), 3, inputs=inputs, mask=mask)
    assert chain.log_prob(chain.rsample()).isfinite().all()


def test_one_step_for_all_may_be_a_number():
    def model(x):
        with pyro.plate("sequences", 2):
            rate = pyro.sample("rate", dist.LogNormal(torch.zeros(2), 1.0))
            pyro.sample("x", IndependentSteps(dist.Poisson(rate.unsqueeze(-1))), obs=x)

    def guide(x):
        with pyro.plate("sequences", 2):
            pyro.sample("rate", dist.LogNormal(torch.zeros(2), 1.0))

    assert elbo_terms(model, guide, torch.ones(2, 4)).log_likelihood_per_step["x"].shape == (2, 4)


def test_a_mask_that_is_all_true_is_as_good_as_none():
    def program(mask):
        return [pyro.sample("z", MarkovChain(START, lambda z: normal(z, 1.0), 3, mask=mask))]

    whole = torch.ones(2, 3, dtype=torch.bool)
    for q, p in [(whole, None), (None, whole)]:
        terms = elbo_terms(observing(functools.partial(program, p)), plated(functools.partial(program, q)))
        exact(terms.kl["z"], torch.zeros(2, dtype=torch.float64))


def test_automatic_guides_infer_and_reconstruct():
    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        if frames is not None:
            num_sequences, num_steps = frames.shape[:2]
        with pyro.plate("sequences", num_sequences):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            line = level[:, None].expand(num_sequences, num_steps)
            pyro.sample("x", IndependentSteps(dist.Normal(line, 1.0)), obs=frames)

    guide, frames = AutoNormal(model), torch.ones(2, 3)
    guide(frames)
    assert reconstruct(model, guide, frames)["x"].mean.shape == (2, 3)
    assert forecast(model, guide, frames, num_steps=1, sample=False)["x"].mean.shape == (2, 4)
    pyro.clear_param_store()


def test_the_first_error_of_a_term_is_told_when_the_model_fails_after_it():
    def model():
        with pyro.plate("sequences", 2):
            z = pyro.sample("z", normal(torch.zeros(2, 2), 1.0))
            pyro.sample("x", dist.Normal(z @ torch.zeros(2), 1.0), obs=torch.zeros(2))

    with pytest.raises(ValueError, match=r"site 'z': has event shape \(1,\) in the guide, expected the model's \(2,\)"):
        elbo_terms(model, plated(lambda: pyro.sample("z", normal(torch.zeros(2, 1), 1.0))))


def test_a_users_own_formula_against_a_class_of_pyro_is_found():
    class Mine(dist.Normal):
        """A class of a user's own."""

    @torch.distributions.register_kl(Mine, dist.Normal)
    def _(q, p):
        return torch.full(q.batch_shape, 42.0)

    assert closed_form(Mine(0.0, 1.0), dist.Normal(0.0, 1.0)) == 42
    assert closed_form(Mine(0.0, 1.0), Mine(0.0, 1.0)) is None


def test_given_trajectories_of_another_batch_are_named():
    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        with pyro.plate("sequences", num_sequences):
            start = normal(torch.zeros(num_sequences, 1), 1.0)
            z = pyro.sample("z", MarkovChain(start, lambda z: normal(z, 1.0), num_steps))
            pyro.sample("x", IndependentSteps(normal(z, 1.0)), obs=frames)

    with pytest.raises(ValueError, match=r"site 'z': the value has shape \(1, 2, 1\), expected \(3, 4, 1\)"):
        generate(model, num_sequences=3, num_steps=4, given={"z": torch.zeros(1, 2, 1)})


@pytest.mark.parametrize("prior", ["chain", "steps", "plain"])
def test_a_flow_over_plain_steps_has_a_density_a_step(prior):
    """Three sequences of three steps: a density a sequence would broadcast over the steps without a word."""
    flow = Scale(nn.ParameterDict({"w": torch.tensor(0.3)}))
    loc = Tensors(0, torch.float32).normal(3, 3, 1)

    def guide():
        with pyro.plate("sequences", 3):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(loc, 1.0), [flow]).to_event(2))

    def model():
        with pyro.plate("sequences", 3):
            zeros = torch.zeros(3, 3, 1)
            made = {
                "chain": lambda: MarkovChain(normal(zeros[:, 0], 1.0), lambda z: normal(0 * z, 1.0), 3),
                "steps": lambda: IndependentSteps(normal(zeros, 1.0)),
                "plain": lambda: normal(zeros, 1.0, 2),
            }
            z = pyro.sample("z", made[prior]())
            pyro.sample("x", dist.Normal(z.sum((-1, -2)), 1.0), obs=torch.zeros(3))

    torch.manual_seed(0)
    terms = elbo_terms(model, guide)
    torch.manual_seed(0)
    z = (loc + torch.randn(3, 3, 1)) * flow.owner.w.exp()
    per_step = normal(loc * flow.owner.w.exp(), flow.owner.w.exp()).log_prob(z) - normal(0 * z, 1.0).log_prob(z)
    assert_close(terms.kl["z"], per_step.sum(-1))
    if prior != "plain":
        assert_close(terms.kl_per_step["z"], per_step)
