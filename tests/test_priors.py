"""Learnt priors against their formulas, and the last stage that fits them to a posterior."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from contracts import Contract
from hypothesis import given
from hypothesis import strategies as st
from reference import gaussian_log_prob, softplus
from strategies import Tensors, dimensions, seeds
from torch import nn

from seqdisent import FlowPrior, MarkovChain, MixturePrior, VampPrior, elbo_terms

CONTRACTS = {
    "MixturePrior": Contract(
        lambda: MixturePrior(3, 4, context_dim=2, hidden_dim=5), ((2,),), (3,), "3, context_dim=2"
    ),
    "FlowPrior": Contract(lambda: FlowPrior(3, num_layers=2, context_dim=2), ((2,),), (3,), "3, context_dim=2"),
}


def log_sum_exp(values):
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))


@given(seeds(), dimensions(), dimensions(), st.booleans(), st.booleans())
def test_a_mixture_is_its_formula(seed, latent_dim, num_components, full, has_context):
    tensors = Tensors(seed)
    prior = tensors.build(
        lambda: MixturePrior(latent_dim, num_components, context_dim=2 * has_context, full=full, min_scale=0.1)
    )
    context, z = tensors.normal(3, 2) if has_context else None, tensors.normal(3, latent_dim)
    found = prior(context).log_prob(z)
    for b in range(3):
        logits, loc, raw = prior.logits, prior.loc, prior.raw_scale
        if has_context:
            more = prior.context(context[b])
            logits = logits + more[:num_components]
            more_loc, more_raw = more[num_components:].reshape(2, num_components, latent_dim)
            loc, raw = loc + more_loc, raw + more_raw
        densities = []
        for k in range(num_components):
            scale = softplus(raw[k]) + 0.1
            factor = torch.eye(latent_dim, dtype=torch.float64)
            if full:
                factor = factor + torch.tril(prior.lower[k], -1)
            factor = factor * scale
            log_prob = gaussian_log_prob(z[b], loc[k], factor @ factor.T).item()
            densities.append(log_prob + logits[k].item() - log_sum_exp(logits.tolist()))
        assert found[b].item() == pytest.approx(log_sum_exp(densities), rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("full", [False, True])
def test_a_mixture_starts_from_samples_as_they_are_distributed(full):
    torch.manual_seed(0)
    loc = torch.tensor([[-5.0, 0.0], [5.0, 2.0]])
    factor = torch.tensor([[[1.0, 0.0], [0.8, 0.5]], [[0.3, 0.0], [-0.2, 0.4]]])
    if not full:
        factor = torch.diag_embed(factor.diagonal(dim1=-2, dim2=-1))
    true = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.25, 0.75])), dist.MultivariateNormal(loc, scale_tril=factor)
    )
    prior = MixturePrior(2, 2, full=full)
    prior.start(true.sample((20_000,)).reshape(100, 200, 2))
    fresh = true.sample((20_000,))
    lost = (true.log_prob(fresh) - prior().log_prob(fresh)).mean()  # KL(true, prior)
    assert 0 - 2e-3 < lost < 2e-3


@given(seeds(), st.integers(2, 4), st.integers(1, 3), st.booleans())
def test_the_density_of_a_flow_is_that_of_its_map(seed, latent_dim, num_layers, has_context):
    tensors = Tensors(seed)
    prior = tensors.build(
        lambda: FlowPrior(latent_dim, num_layers=num_layers, context_dim=3 * has_context, hidden_dim=4)
    )
    context, noise = tensors.normal(3) if has_context else None, tensors.normal(latent_dim)

    def walk(value):
        for transform in prior(context).transforms:
            value = transform(value)
        return value

    jacobian = torch.autograd.functional.jacobian(walk, noise)
    log_noise = -0.5 * (noise**2).sum() - 0.5 * latent_dim * math.log(2 * math.pi)
    expected = log_noise - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(prior(context).log_prob(walk(noise).detach()), expected)


def test_a_flow_starts_at_the_moments_of_samples():
    torch.manual_seed(0)
    prior = FlowPrior(3)
    samples = torch.randn(50, 40, 3) * torch.tensor([0.1, 1.0, 5.0]) + torch.tensor([1.0, -2.0, 3.0])
    prior.start(samples)
    draws = prior().sample((50_000,))
    torch.testing.assert_close(draws.mean(0), samples.flatten(0, 1).mean(0), rtol=0.05, atol=0.01)
    torch.testing.assert_close(draws.std(0), samples.flatten(0, 1).std(0), rtol=0.05, atol=0.01)


@pytest.mark.parametrize("build", [lambda: MixturePrior(2, 3, context_dim=1), lambda: FlowPrior(2, context_dim=1)])
def test_a_trained_prior_can_be_started_again(build):
    torch.manual_seed(0)
    prior, fresh, samples = build(), build(), torch.randn(200, 2) * 3
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += torch.randn(parameter.shape)
    prior.start(samples)
    fresh.start(samples)
    context, z = torch.randn(5, 1), torch.randn(5, 2)
    torch.testing.assert_close(prior(context).log_prob(z), fresh(context).log_prob(z))


def test_a_pseudo_input_at_its_bound_can_come_back():
    prior = VampPrior(torch.zeros(1, 1), bounds=(0.0, 1.0))
    optimiser = torch.optim.SGD(prior.parameters(), lr=0.1)
    for aim in (-1.0, 0.8):
        for _ in range(100):
            optimiser.zero_grad()
            (-prior(lambda u: dist.Normal(u, 1.0).to_event(1)).log_prob(torch.tensor([aim]))).backward()
            optimiser.step()
    assert prior.pseudo_inputs.clamp(0, 1).item() == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("full", [False, True])
def test_a_large_smallest_scale_is_only_a_floor(full):
    torch.manual_seed(0)
    assert MixturePrior(2, 3, full=full, min_scale=2.0)().log_prob(torch.zeros(2)).isfinite()


@given(seeds(), dimensions(), dimensions())
def test_a_vamp_prior_is_a_mixture_of_posteriors(seed, num_inputs, latent_dim):
    tensors = Tensors(seed)
    encoder = tensors.build(lambda: nn.Linear(6, latent_dim))
    prior = VampPrior(tensors.normal(num_inputs, 2, 3).clamp(-0.5, 0.5), bounds=(-0.5, 0.5)).double()
    with torch.no_grad():
        prior.logits += tensors.normal(num_inputs)
    z = tensors.normal(latent_dim)
    found = prior(lambda clips: dist.Normal(encoder(clips.flatten(1)), 0.3).to_event(1)).log_prob(z)
    densities = []
    for k in range(num_inputs):
        loc = encoder(prior.pseudo_inputs[k].clamp(-0.5, 0.5).flatten())
        log_weight = prior.logits[k].item() - log_sum_exp(prior.logits.tolist())
        densities.append(
            gaussian_log_prob(z, loc, 0.09 * torch.eye(latent_dim, dtype=torch.float64)).item() + log_weight
        )
    assert found.item() == pytest.approx(log_sum_exp(densities), rel=1e-8)
    found.backward()
    assert prior.logits.grad is not None
    assert encoder.weight.grad is not None


def test_the_ledger_estimates_the_kl_to_a_mixture_without_bias():
    torch.manual_seed(0)
    prior = MixturePrior(1, 3).double()

    def model(x):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5).to_event(1))

    x = torch.tensor([0.3], dtype=torch.float64).expand(100_000, 1)
    term = elbo_terms(model, guide, x).terms["z"]
    assert term.how == "monte carlo"
    q, grid = dist.Normal(x[0], 0.5), torch.linspace(-5, 5, 20_001, dtype=torch.float64).unsqueeze(-1)
    log_q = q.log_prob(grid).squeeze(-1)
    expected = torch.trapezoid(log_q.exp() * (log_q - prior().log_prob(grid)), grid.squeeze(-1))
    error = term.value.std() / len(x) ** 0.5
    assert abs(term.value.mean() - expected) < 4 * error


def test_a_vamp_prior_is_evaluated_twice_in_one_graph_and_unchanged_by_evaluation():
    prior = VampPrior(torch.full((2, 1), 0.5), bounds=(0.0, 1.0)).double()
    with torch.no_grad():
        prior.pseudo_inputs.fill_(1.5)

    def encode(inputs):
        return dist.Normal(inputs, 1.0).to_event(1)

    prior.eval()
    at_the_bound = prior(encode).log_prob(torch.ones(1).double())
    assert (prior.pseudo_inputs == 1.5).all()
    torch.testing.assert_close(at_the_bound.exp(), torch.tensor(1 / math.sqrt(2 * math.pi)).double())
    prior.train()
    (prior(encode).log_prob(torch.zeros(1)) + prior(encode).log_prob(-torch.ones(1))).backward()
    assert (prior.pseudo_inputs == 1.0).all()
    torch.testing.assert_close(prior.pseudo_inputs.grad, torch.full((2, 1), -1.5).double())  # (-1 - 2) / 2 each


def test_a_mixture_has_no_more_components_than_different_samples():
    samples = torch.arange(4.0).repeat(10).unsqueeze(-1)
    MixturePrior(1, 4).start(samples)
    with pytest.raises(ValueError, match="samples: got 4 different ones, expected 5 or more"):
        MixturePrior(1, 5).start(samples)


@pytest.mark.parametrize("build", [lambda: MixturePrior(2, 3, context_dim=4), lambda: FlowPrior(2, context_dim=4)])
def test_a_learnt_prior_can_start_a_chain(build):
    torch.manual_seed(0)
    prior, context = build(), torch.randn(5, 4)

    def chain():
        return MarkovChain(prior(context), lambda z: dist.Normal(z, 0.1).to_event(1), 6)

    def model(x):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", chain())
            pyro.sample("x", dist.Normal(z, 1.0).to_event(2), obs=x)

    def guide(x):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5).to_event(2))

    terms = elbo_terms(model, guide, torch.randn(5, 6, 2))
    path = terms.kl_per_step["z"]
    assert path.shape == (5, 6)
    path[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in prior.parameters())
    assert chain().sample().shape == (5, 6, 2)
