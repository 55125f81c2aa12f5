"""The particle filter against Kalman filters, sums over all paths, quadrature, and the importance-weighted bound.

`runs` copies of a sequence are a batch: each is a run of its own. An estimate whose exponential is unbiased is held to
its mean over runs; so is what it weights, E[exp(log_evidence) * sum_k W_k h(z_k)] = p(x) E[h(z) | x].
"""

import functools
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import reference
import torch
from models import StateSpace, normal
from particle_models import MASK, NAMES, RUNS, Classes, Ragged, programs, within
from strategies import Tensors, mask_of
from torch.testing import assert_close

from seqdisent import IndependentSteps, LinearGaussianChain, MarkovChain, elbo_terms
from seqdisent.chains import LinearEmission
from seqdisent.particles import filter, filtering

near = functools.partial(assert_close, rtol=1e-8, atol=1e-8)
SCHEMES = ("systematic", "stratified", "residual", "multinomial")


@pytest.mark.parametrize("by", ["step", "coordinate"])
@pytest.mark.parametrize(
    ("guide", "options"),
    [
        *[("bootstrap", {"resampling": scheme, "threshold": 1.0}) for scheme in SCHEMES],
        ("bootstrap", {}), ("reading", {}), ("reading", {"threshold": 1.0}), ("factorised", {}), ("posterior", {}),
    ],
)  # fmt: skip
def test_evidence_and_moments_are_those_of_the_kalman_filter(by, guide, options):
    system = Ragged(by)
    with torch.no_grad():
        found = filter(system.model, getattr(system, guide), *system.given, num_particles=10, **options)
    assert found.runs == "step"
    filtered, smoothed = system.exact
    log_ratio = (found.log_evidence_per_step - filtered.log_evidence).cumsum(-1)
    within(system.by_run(log_ratio.exp()), 1.0)  # also until each step
    near(found.log_evidence, found.log_evidence_per_step.sum(-1))
    weights = (found.log_weights_per_step + log_ratio).exp().unsqueeze(-1)
    real = system.mask.unsqueeze(-1)
    means = torch.where(real, (weights * found.draws["z"]).sum(0), 0.0)
    within(system.by_run(means), system.by_run(torch.where(real, filtered.loc, 0.0))[0])
    weights = (found.log_weights + log_ratio[:, -1]).exp()[..., None, None]
    means = torch.where(real, (weights * found.paths["z"]).sum(0), 0.0)
    within(system.by_run(means), system.by_run(torch.where(real, smoothed.loc, 0.0))[0])


def test_padding_changes_nothing():
    system = Ragged(runs=2)
    found = filter(system.model, system.bootstrap, *system.given, num_particles=6, threshold=1.0)
    padding = ~system.mask
    assert (found.log_evidence_per_step[padding] == 0).all()
    same = torch.arange(6)[:, None].expand(-1, int(padding.sum()))
    assert torch.equal(found.ancestors[:, padding], same)
    assert (found.ancestors[:, system.mask] != torch.arange(6)[:, None]).any()
    for b, length in enumerate(system.mask.sum(1).tolist()):
        last = found.log_weights_per_step[:, b, length - 1]
        assert (found.log_weights_per_step[:, b, length:] == last[:, None]).all()
        path = found.paths["z"][:, b]
        assert (path[:, length:] == path[:, :1]).all()
    near(found.log_weights.exp().sum(0), torch.ones(6).double())
    near(found.effective_sample_sizes, 1 / found.log_weights_per_step.exp().square().sum(0))


def test_ancestors_lead_to_the_paths():
    system = Ragged(runs=1)
    found = filter(system.model, system.bootstrap, *system.given, num_particles=6, threshold=1.0)
    for k, b in itertools.product(range(6), range(3)):
        now = k
        for t in reversed(range(int(system.mask[b].sum()))):
            assert torch.equal(found.paths["z"][k, b, t], found.draws["z"][now, b, t])
            now = found.ancestors[now, b, t]


def test_under_the_exact_posterior_the_evidence_is_exact():
    system = Ragged(runs=1)
    with torch.no_grad():
        found = filter(system.model, system.posterior, *system.given, num_particles=3, threshold=0.0)
    near(found.log_evidence, system.exact[0].log_evidence.sum(-1))
    near(found.effective_sample_sizes[:, -1], torch.full((3,), 3.0).double())


# ---------------------------------------------------------------------------------------------------------------------
# The importance-weighted bound, and both ways of taking a step
# ---------------------------------------------------------------------------------------------------------------------


each_program = pytest.mark.parametrize("name", NAMES)


@each_program
@pytest.mark.parametrize("whole", [False, True])
def test_without_resampling_it_is_the_importance_weighted_bound(name, whole, monkeypatch):
    model, guide, x, parameters, runs = programs(name)
    if whole:
        monkeypatch.setattr(filtering, "runs_alone", lambda _: False)
    for parameter in parameters:
        parameter.requires_grad_()
    torch.manual_seed(5)
    found = filter(model, guide, x, MASK, num_particles=7, threshold=0.0)
    assert found.runs == ("sequence" if whole else runs)
    torch.manual_seed(5)
    terms = elbo_terms(model, guide, x, MASK, kl="monte-carlo", num_particles=7, vectorize_particles=True)
    near(found.log_evidence, terms.importance_weighted())
    gradients = [
        torch.autograd.grad(bound.sum(), parameters, allow_unused=True)
        for bound in (found.log_evidence, terms.importance_weighted())
    ]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            near(one, other)


@each_program
def test_both_ways_of_taking_a_step_agree(name, monkeypatch):
    model, guide, x, _, runs = programs(name)
    results = []
    for alone in (runs == "step", False):
        monkeypatch.setattr(filtering, "runs_alone", lambda _, alone=alone: alone)
        torch.manual_seed(5)
        with torch.no_grad():
            results.append(filter(model, guide, x, MASK, num_particles=5, threshold=0.9))
    one, other = results
    assert one.runs == runs
    assert other.runs == "sequence"
    assert torch.equal(one.ancestors, other.ancestors)
    assert (one.ancestors != torch.arange(5)[:, None, None]).any()
    near(one.log_evidence_per_step, other.log_evidence_per_step)
    near(one.log_weights_per_step, other.log_weights_per_step)
    for field in ("draws", "paths", "static"):
        assert getattr(one, field).keys() == getattr(other, field).keys()
        for site, value in getattr(one, field).items():
            near(value, getattr(other, field)[site])
    for site, value in one.static.items():
        assert value.shape[:2] == (5, 3), site


@each_program
def test_resampling_leaves_the_evidence_unbiased(name):
    """Two estimates of one number, without and with it: their means over runs agree."""
    model, guide, x, _, _ = programs(name)
    x, mask = x.repeat_interleave(500, 0), MASK.repeat_interleave(500, 0)
    with torch.no_grad():
        estimates = [
            filter(model, guide, x, mask, num_particles=20, threshold=threshold).log_evidence for threshold in (0, 1)
        ]
        level = torch.stack(estimates).unflatten(1, (3, 500)).logsumexp((0, 2)) - math.log(1000)
    plain, resampled = ((found.unflatten(0, (3, 500)).T - level).exp() for found in estimates)
    within(plain - resampled, 0.0)


@each_program
def test_the_gradient_is_that_with_constant_ancestors(name):
    model, guide, x, parameters, _ = programs(name)
    for parameter in parameters:
        parameter.requires_grad_()

    def evidence():
        torch.manual_seed(5)
        found = filter(model, guide, x, MASK, num_particles=5, threshold=1.0)
        return found.log_evidence.sum(), found.ancestors

    value, ancestors = evidence()
    assert (ancestors != torch.arange(5)[:, None, None]).any()
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    direction = [torch.randn_like(parameter) for parameter in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)
    moved = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter += step * d
            value, again = evidence()
        assert torch.equal(again, ancestors)
        moved.append(value)
    assert_close((moved[0] - moved[1]) / 2e-5, slope, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Exact sums, quadrature
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_a_chain_of_classes_is_summed_exactly(threshold):
    classes = Classes()
    total, marginals = classes.exact()
    with torch.no_grad():
        found = filter(classes.model, classes.guide, classes.x.expand(RUNS, -1), num_particles=8, threshold=threshold)
    ratio = found.log_evidence.exp() / total
    within(ratio, 1.0)
    within(ratio[:, None, None] * (found.log_weights.exp()[..., None, None] * found.paths["z"]).sum(0), marginals)


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_a_static_latent_is_integrated_out(threshold):
    """A drift s that does not change, z_t = 0.8 z_{t-1} + s + noise, x_t = z_t + noise: Kalman filters over a grid."""
    x = Tensors(4).normal(5, 1) + 1

    def model(x):
        with pyro.plate("sequences", len(x)):
            s = pyro.sample("s", normal(x.new_zeros(1), 1.0))
            chain = MarkovChain(normal(x.new_zeros(len(x), 1), 1.0), lambda z: normal(0.8 * z + s, 0.5), x.shape[1])
            z = pyro.sample("z", chain)
            pyro.sample("x", IndependentSteps(normal(z, 0.7)), obs=x)

    def guide(x):
        with pyro.plate("sequences", len(x)):
            s = pyro.sample("s", normal(x.new_full((1,), 0.3), 1.1))
            step = lambda z, x: normal(0.5 * (0.8 * z + s + x), 0.6)  # noqa: E731
            pyro.sample("z", MarkovChain(normal(x[:, 0] / 2, 0.8), step, x.shape[1], inputs=x))

    one = lambda value: torch.full((1, 1), value, dtype=torch.float64)  # noqa: E731
    grid, none = torch.linspace(-6, 6, 401).double(), torch.zeros(1).double()
    seen = one(1.0), none, one(0.49)
    density = torch.stack([
        reference.kalman_log_evidence(none, one(1.0), [(one(0.8), s[None], one(0.25))] * 4, seen, x) for s in grid
    ]).exp() * torch.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])  # fmt: skip
    with torch.no_grad():
        found = filter(model, guide, x.expand(RUNS, -1, -1), num_particles=30, threshold=threshold)
    assert found.runs == "step"
    assert found.static["s"].shape == (30, RUNS, 1)
    ratio = found.log_evidence.exp() / density.sum()
    within(ratio, 1.0)
    mean = (found.log_weights.exp() * found.static["s"].squeeze(-1)).sum(0)
    within(ratio * mean, (grid * density).sum() / density.sum())


def test_latents_that_read_each_others_later_steps():
    """As in a Kalman VAE: codes a_t of what is seen, and the exact posterior of z given all codes."""
    tensors = Tensors(5)
    x, mask = tensors.normal(1, 4, 1).expand(RUNS, -1, -1), mask_of([4]).expand(RUNS, -1)
    one = torch.ones(1).double()
    read = LinearEmission(one[:, None], 0.5 * one)

    def chain(x):
        return LinearGaussianChain(torch.zeros(len(x), 1).double(), one, 0.9 * one[:, None], 0.6 * one, 4, mask=mask)

    def model(x):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", chain(x))
            a = pyro.sample("a", IndependentSteps(normal(z, 0.5), mask))
            pyro.sample("x", IndependentSteps(normal(a, 0.4), mask), obs=x)

    def guide(x):
        with pyro.plate("sequences", len(x)):
            a = pyro.sample("a", IndependentSteps(normal(0.6 * x, 0.6), mask))
            pyro.sample("z", chain(x).posterior(a, read))

    seen = LinearEmission(one[:, None], (0.25 + 0.16) ** 0.5 * one)
    exact = chain(x).filter(x, seen)
    for threshold in (0.0, 1.0):
        with torch.no_grad():
            found = filter(model, guide, x, num_particles=10, threshold=threshold)
        assert found.runs == "sequence"
        within((found.log_evidence_per_step - exact.log_evidence).cumsum(-1).exp(), 1.0)


def test_independent_steps_keep_what_was_drawn_before():
    """Where a step of the model reads all before it, other values there would be other terms at the end."""
    model, _, x, _, _ = programs("all steps before")
    x = x.repeat_interleave(300, 0)
    with torch.no_grad():
        found, plain = (
            filter(model, StateSpace(0).factorised_guide, x, None, num_particles=20, threshold=threshold)
            for threshold in (1.0, 0.0)
        )
    assert found.runs == "sequence"
    level = plain.log_evidence.unflatten(0, (3, 300)).logsumexp(1, keepdim=True) - math.log(300)
    one, other = ((each.log_evidence.unflatten(0, (3, 300)) - level).exp().T for each in (found, plain))
    within(one - other, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what must not change
# ---------------------------------------------------------------------------------------------------------------------


def test_the_random_state_moves_by_the_draws_alone(monkeypatch):
    model, guide, x, _, _ = programs("chain")
    states = []
    for tried in (True, False):
        if not tried:
            monkeypatch.setattr(filtering, "runs_alone", lambda _: True)
        torch.manual_seed(0)
        filter(model, guide, x, MASK, num_particles=2)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("filler", [math.nan, 1e6])
def test_what_stands_in_padding_reaches_no_value_and_no_gradient(filler):
    system = Ragged(runs=1)
    leaves = [system.matrix, system.scales, system.emission.matrix]
    for leaf in leaves:
        leaf.requires_grad_()

    def everything(filler):
        torch.manual_seed(1)
        x = torch.where(system.mask.unsqueeze(-1), system.x, filler)
        found = filter(system.model, system.bootstrap, x, *system.given[1:], num_particles=4, threshold=0.9)
        return [found.log_evidence, *torch.autograd.grad(found.log_evidence.sum(), leaves)]

    for found, wanted in zip(everything(filler), everything(0.0), strict=True):
        near(found, wanted)
        assert found.isfinite().all()


def test_without_gradients_nothing_is_kept():
    system = Ragged(runs=1)
    system.matrix.requires_grad_()
    with torch.no_grad():
        assert not filter(system.model, system.bootstrap, *system.given, num_particles=4).log_evidence.requires_grad


@pytest.mark.parametrize(
    "read", [lambda z: z.flip(-2), lambda z: z.mean(-2, keepdim=True) + z, lambda z: z.roll(-1, -2)]
)
def test_a_model_that_reads_later_steps(read):
    system = Ragged(runs=1)

    def model(x, mask, observed):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", system.prior(None, *x.shape[:2]))
            pyro.sample("x", IndependentSteps(normal(read(z), 1.0)), obs=x)

    guide = lambda x, mask, observed: system.bootstrap(x, None, None)  # noqa: E731
    with pytest.raises(ValueError, match=r"^model: the log-density of site 'x' at step \d of sequence 0"):
        filter(model, guide, torch.zeros(3, 5, 2).double(), None, None, num_particles=4)


@pytest.mark.parametrize(("value", "said"), [(-math.inf, "weight 0"), (math.nan, "the evidence is nan")])
def test_weights_that_are_all_zero_or_no_numbers(value, said):
    system = Ragged(runs=1)

    class Broken(dist.Normal):
        def log_prob(self, x):
            return torch.where(x == 7.0, value, super().log_prob(x))

    def model(x):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", system.prior(None, *x.shape[:2]))
            pyro.sample("x", IndependentSteps(Broken(z, 1.0, validate_args=False).to_event(1)), obs=x)

    x = torch.zeros(3, 5, 2).double()
    x[1, 3] = 7.0
    with pytest.raises(FloatingPointError, match=f"^step 3 of sequence 1: .*{said}.*log p of 'x'"):
        filter(model, lambda x: system.bootstrap(x, None, None), x, num_particles=4)


def test_a_particle_of_weight_zero_is_no_error():
    """A uniform emission: most particles of the prior cannot have made what was seen."""

    def model(x):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", MarkovChain(normal(torch.zeros(len(x), 1), 1.0), lambda z: normal(z, 1.0), x.shape[1]))
            pyro.sample("x", IndependentSteps(dist.Uniform(z - 1, z + 1, validate_args=False).to_event(1)), obs=x)

    def guide(x):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", MarkovChain(normal(torch.zeros(len(x), 1), 1.0), lambda z: normal(z, 1.0), x.shape[1]))

    found = filter(model, guide, torch.zeros(2, 4, 1), num_particles=100)
    assert found.log_evidence.isfinite().all()
    assert (found.log_weights == -math.inf).any()


def test_the_arguments():
    model, guide, x, _, _ = programs("chain")
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match="^num_particles: "):
            filter(model, guide, x, num_particles=wrong)
    for wrong in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="^threshold: "):
            filter(model, guide, x, num_particles=2, threshold=wrong)
    with pytest.raises(ValueError, match="^resampling: got 'best'"):
        filter(model, guide, x, num_particles=2, resampling="best")


def test_a_gradient_that_would_be_wrong_is_refused():
    logits = torch.zeros(2, requires_grad=True)

    def guide(x):
        start = dist.OneHotCategorical(logits=logits.expand(1, 2))
        with pyro.plate("sequences", 1):
            pyro.sample("z", MarkovChain(start, lambda z: dist.OneHotCategorical(logits=logits + 0 * z), 3))

    def model(x):
        start = dist.OneHotCategorical(logits=torch.zeros(1, 2))
        with pyro.plate("sequences", 1):
            z = pyro.sample("z", MarkovChain(start, lambda z: dist.OneHotCategorical(logits=0 * z), 3))
            pyro.sample("x", IndependentSteps(dist.Normal(z @ torch.eye(2), 1.0).to_event(1)), obs=x)

    with pytest.raises(ValueError, match="^guide: a step is a OneHotCategorical, whose draws have no gradient"):
        filter(model, guide, torch.zeros(1, 3, 2), num_particles=3)
    with torch.no_grad():
        assert filter(model, guide, torch.zeros(1, 3, 2), num_particles=3).log_evidence.isfinite().all()
