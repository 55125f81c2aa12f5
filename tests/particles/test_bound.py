"""The filter's log-evidence as an objective: against the filter, the ELBO, the Kalman filter; its ledger; training."""

import functools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from models import StateSpace, normal
from particle_models import MASK, NAMES, Ragged, programs
from small_runs import losses, run
from strategies import Tensors, mask_of, seeds
from torch import nn
from torch.testing import assert_close

from seqdisent import AnnealingSchedule, DecomposedELBO, IndependentSteps, LinearGaussianChain, MarkovChain, elbo_terms
from seqdisent.chains import LinearEmission
from seqdisent.particles import filter
from seqdisent.training import ELBOTraining

near = functools.partial(assert_close, rtol=1e-8, atol=1e-8)
each_program = pytest.mark.parametrize("name", NAMES)
K = 5


def gradients(value, parameters):
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def learnt(name):
    model, guide, x, parameters, _ = programs(name)
    for parameter in parameters:
        parameter.requires_grad_()
    return model, guide, x, parameters


def fivo(*programs_and_args, num_particles=K, seed=5, **options):
    torch.manual_seed(seed)
    return elbo_terms(*programs_and_args, objective="fivo", num_particles=num_particles, **options)


# ---------------------------------------------------------------------------------------------------------------------
# The bound
# ---------------------------------------------------------------------------------------------------------------------


@each_program
def test_bound_and_gradient_are_the_filter_s(name):
    model, guide, x, parameters = learnt(name)
    terms = fivo(model, guide, x, MASK)
    torch.manual_seed(5)
    found = filter(model, guide, x, MASK, num_particles=K)
    assert (found.ancestors != torch.arange(K)[:, None, None]).any()
    near(terms.bound(), found.log_evidence)
    near(gradients(terms.bound().sum(), parameters), gradients(found.log_evidence.sum(), parameters))


@each_program
def test_one_particle_is_the_elbo(name):
    model, guide, x, parameters = learnt(name)
    terms = fivo(model, guide, x, MASK, num_particles=1)
    torch.manual_seed(5)
    plain = elbo_terms(model, guide, x, MASK, kl="monte-carlo")
    assert terms.num_particles is None
    near(terms.bound(), plain.bound())
    near(gradients(terms.bound().sum(), parameters), gradients(plain.bound().sum(), parameters))
    same_ledger(terms, plain)
    assert fivo(model, guide, x, MASK, num_particles=1, vectorize_particles=True).kl["z"].shape == (1, 3)


def same_ledger(terms, plain):
    assert list(terms.terms) == list(plain.terms)
    for site, wanted in plain.terms.items():
        term = terms.terms[site]
        near(term.value, wanted.value)
        assert (term.kind, term.how, term.in_plate, term.is_scaled) == (wanted.kind, wanted.how, True, False)
        if wanted.per_step is not None:
            near(term.per_step, wanted.per_step)
            assert torch.equal(term.real_steps, wanted.real_steps)


@each_program
def test_before_any_resampling_the_ledger_is_that_of_the_importance_weighted_bound(name):
    """Of two particles, of which the effective number is never below one."""
    model, guide, x, _ = learnt(name)
    terms = fivo(model, guide, x, MASK, num_particles=2)
    torch.manual_seed(5)
    plain = elbo_terms(model, guide, x, MASK, objective="iwae", num_particles=2, vectorize_particles=True)
    same_ledger(terms, plain)
    near(terms.bound(), plain.bound())
    assert terms.num_particles == plain.num_particles == 2


@each_program
@given(seed=seeds())
@settings(max_examples=4)
def test_the_terms_between_two_resamplings_make_up_the_bound(name, seed):
    """A log-evidence is the sum, over the stretches without resampling, of their importance-weighted bounds."""
    model, guide, x, _, _ = programs(name)
    with torch.no_grad():
        terms = fivo(model, guide, x, MASK, seed=seed)
        torch.manual_seed(seed)
        found = filter(model, guide, x, MASK, num_particles=K)
    signed = sum(terms.log_likelihood_per_step.values()) - sum(terms.kl_per_step.values())
    assert signed.shape == (K, *MASK.shape)
    signed[:, :, 0] += sum((-terms.kl[site] for site in terms.kl if site not in terms.kl_per_step), start=0.0)
    for b in range(len(MASK)):
        total, since = 0.0, torch.zeros(K).double()
        for t in range(MASK.shape[1]):
            if (found.ancestors[:, b, t] != torch.arange(K)).any():
                total, since = total + since.logsumexp(0) - math.log(K), torch.zeros(K).double()
            since = since + signed[:, b, t]
        near(terms.bound()[b], total + since.logsumexp(0) - math.log(K))
    assert (terms.elbo() <= terms.bound() + 1e-9).all()
    for term in terms.terms.values():
        assert term.value.shape == (K, 3)
        if term.per_step is not None:
            assert (term.per_step[:, ~MASK] == 0).all()
            assert torch.equal(term.real_steps, MASK.expand(K, -1, -1))
            near(term.per_step.sum(-1), term.value)


def test_on_average_it_is_between_the_importance_weighted_bound_and_the_evidence():
    system = StateSpace(0)
    x = Tensors(1).normal(1, 20, 2).expand(300, -1, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        iwae, filtered = (
            elbo_terms(system.model, system.guide, x, objective=name, num_particles=K, vectorize_particles=True).bound()
            for name in ("iwae", "fivo")
        )
        exact = system.log_evidence(x[:1])
    for lower, upper in ((iwae, filtered), (filtered, exact)):
        gap = upper - lower
        assert gap.mean() > 4 * gap.std() / len(gap) ** 0.5


@pytest.mark.parametrize("by", ["step", "coordinate"])
def test_what_was_not_observed_is_no_step_of_the_emission(by):
    system = Ragged(by, runs=1)
    system.observed[0, 1] = False
    terms = fivo(system.model, system.reading, *system.given)
    plain = elbo_terms(system.model, system.reading, *system.given, objective="iwae")
    for site in ("x", "z"):
        assert torch.equal(terms.real_steps[site], plain.real_steps[site].expand(K, -1, -1))
    assert not terms.real_steps["x"][:, system.mask].all()


@pytest.mark.parametrize("filler", [math.nan, 1e6])
def test_padding_changes_nothing(filler):
    system = Ragged(runs=1)
    leaves = [system.matrix, system.scales, system.emission.matrix]
    for leaf in leaves:
        leaf.requires_grad_()

    def everything(filler):
        x = torch.where(system.mask.unsqueeze(-1), system.x, filler)
        terms = fivo(system.model, system.bootstrap, x, *system.given[1:])
        return [terms.bound(), *terms.kl.values(), *gradients(terms.bound().sum(), leaves)]

    near(everything(filler), everything(0.0))
    assert all(found.isfinite().all() for found in everything(filler))


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Walk(nn.Module):
    """z_t = a z_{t-1} + noise, x_t = z_t + noise, float64; the guide reads the frame of its step."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.0).double())
        self.q = nn.Parameter(torch.tensor([0.3, 0.4]).double())

    def prior(self, num_sequences, num_steps):
        one = torch.ones(1).double()
        return LinearGaussianChain(
            torch.zeros(num_sequences, 1).double(), one, self.a * one[:, None], 0.5 * one, num_steps
        )

    def model(self, x):
        with pyro.plate("sequences", len(x)):
            chain = MarkovChain(normal(torch.zeros_like(x[:, 0]), 1.0), lambda z: normal(self.a * z, 0.5), x.shape[1])
            z = pyro.sample("z", chain)
            pyro.sample("x", IndependentSteps(normal(z, 0.7)), obs=x)

    def guide(self, x):
        step = lambda z, x: normal(self.q[0] * z + self.q[1] * x, 0.5)  # noqa: E731
        with pyro.plate("sequences", len(x)):
            first = normal(self.q[1] * x[:, 0], 0.5)
            pyro.sample("z", MarkovChain(first, step, x.shape[1], inputs=x))

    def evidence(self, x):
        one = torch.ones(1).double()
        return self.prior(*x.shape[:2]).filter(x, LinearEmission(one[:, None], 0.7 * one)).log_evidence.sum(-1).mean()


def walked(num_sequences=16, num_steps=8, a=0.95):
    tensors, z, x = Tensors(4), 0.0, []
    for t in range(num_steps):
        z = a * z + (0.5 if t else 1.0) * tensors.normal(num_sequences, 1)
        x.append(z + 0.7 * tensors.normal(num_sequences, 1))
    return torch.stack(x, 1)


def training(network, x, **options):
    options = {"num_particles": 4, "objective": "fivo", "num_steps": 40, **options}
    return ELBOTraining(
        network, network.model, network.guide, lambda _: x, arguments=lambda x: (x,), seed=1,
        learning_rate=AnnealingSchedule.constant(0.05), validation=[x[:5], x[5:]], **options,
    )  # fmt: skip


def test_a_coefficient_is_learnt(tmp_path):
    """The exact evidence rises to within a nat a sequence of the best; the log has the bound beside the terms."""
    network, x = Walk(), walked()
    with torch.no_grad():
        before = network.evidence(x)
        best = max(_evidence_at(a, x) for a in torch.linspace(0, 1.2, 25))
    run(training(network, x), tmp_path)
    after = network.evidence(x).item()
    assert before < best - 4
    assert best - 1 < after <= best + 0.01
    rows = losses(tmp_path)
    row = rows[max(rows)]
    assert float(row["elbo"]) < float(row["fivo"]) < after + 1
    assert float(row["fivo"]) == pytest.approx(-float(row["loss"]) / len(x), rel=1e-5)
    assert {"KL(z)", "log_p(x)", "per_step/KL(z)", "per_step/log_p(x)"} <= set(row)


def _evidence_at(a, x):
    network = Walk()
    network.a.fill_(a)
    return network.evidence(x).item()


def test_the_best_checkpoint_is_chosen_by_it(tmp_path):
    run(training(Walk(), walked(), num_steps=6), tmp_path, validate_every=2)
    found = [float(row["validation/fivo"]) for row in losses(tmp_path, key="validation/fivo").values()]
    assert len(found) == 3
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)
    (state,) = [value for name, value in best["callbacks"].items() if name.startswith("Validation")]
    assert state["best"] == pytest.approx(max(found), rel=1e-5)


def test_pyros_svi_takes_it():
    model, guide, x, parameters = learnt("chain")
    bound = fivo(model, guide, x, MASK).bound().sum()
    torch.manual_seed(5)
    loss = DecomposedELBO(objective="fivo", num_particles=K).loss_and_grads(model, guide, x, MASK)
    assert loss == pytest.approx(-bound.item())
    near([p.grad for p in parameters], [-g for g in gradients(bound, parameters)])


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what is not finite
# ---------------------------------------------------------------------------------------------------------------------


class Broken(dist.Normal):
    """Not a number at 7."""

    def log_prob(self, x):
        return torch.where(x == 7.0, math.nan, super().log_prob(x))


def test_a_term_that_is_not_finite_is_found_in_the_ledger(tmp_path):
    network, x = Walk(), walked()
    x[6, 3] = 7.0

    def model(x):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", network.prior(*x.shape[:2]))
            pyro.sample("x", IndependentSteps(Broken(z, 0.7, validate_args=False).to_event(1)), obs=x)

    said = r"^log_likelihood_per_step\['x'\] is nan.* \(particle 0, sequence 6, time step 3\)"
    terms = fivo(model, network.guide, x)
    assert torch.equal(terms.bound().isnan(), torch.arange(16) == 6)
    with pytest.raises(FloatingPointError, match=said):
        terms.check_finite(0)
    module = training(network, x)
    module.__dict__["model"] = model
    with pytest.raises(FloatingPointError, match=said):
        run(module, tmp_path)


def test_what_is_refused():
    model, guide, x, _ = learnt("chain")
    with pytest.raises(ValueError, match=r"^weights: got \['z'\] with objective='fivo'"):
        fivo(model, guide, x, MASK).bound({"z": 0.5})
    with pytest.raises(ValueError, match="^importance_weighted: the particles of objective='fivo' are resampled"):
        fivo(model, guide, x, MASK).importance_weighted()
    with pytest.raises(ValueError, match="^kl: got \"analytic\" with objective='fivo'"):
        fivo(model, guide, x, MASK, kl="analytic")
    with pytest.raises(ValueError, match=r"^num_particles: "):
        fivo(model, guide, x, MASK, num_particles=0)


def test_a_proposal_without_gradient():
    onehot = partial(dist.OneHotCategorical, validate_args=False)

    def program(x, **_):
        start = onehot(torch.ones(len(x), 3) / 3)
        return pyro.sample("z", MarkovChain(start, lambda z: onehot(0.8 * z + 0.1), x.shape[1]))

    def model(x):
        with pyro.plate("sequences", len(x)):
            z = program(x)
            pyro.sample("x", IndependentSteps(normal(z, 1.0)), obs=x)

    def guide(x):
        with pyro.plate("sequences", len(x)):
            program(x)

    x = Tensors(0).normal(2, 4, 3)
    assert filter(model, guide, x, num_particles=3).log_evidence.isfinite().all()
    with pytest.raises(ValueError, match="^guide: site 'z' has no rsample"):
        fivo(model, guide, x)


def test_a_recurrent_chain_is_run_a_step_at_a_time():
    model, guide, x, _ = learnt("recurrent")
    assert filter(model, guide, x, mask_of([4, 2, 3]), num_particles=K).runs == "step"
