"""Resampling: expected numbers of offspring, how far each scheme varies around them, and what it refuses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Tensors, seeds

from seqdisent.particles import resample
from seqdisent.particles.resampling import effective_sample_size

SCHEMES = ("systematic", "stratified", "residual", "multinomial")
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def offspring(log_weights, scheme, runs):
    """Return the numbers of offspring (K, runs) of one set of weights (K,)."""
    ancestors = resample(log_weights.unsqueeze(-1).expand(-1, runs), scheme)
    return torch.stack([(ancestors == k).sum(0) for k in range(len(log_weights))]).double()


@each_scheme
def test_the_expected_number_of_offspring_is_the_weight(scheme):
    weights = torch.tensor([0.03, 0.0, 0.4, 0.27, 0.2, 0.1], dtype=torch.float64)
    counts = offspring(weights.log() + 3, scheme, 20_000)  # they need not be normalised
    assert (counts.sum(0) == 6).all()
    error = counts.std(1) / 20_000**0.5
    assert ((counts.mean(1) - 6 * weights).abs() <= 4 * error + 1e-12).all()
    assert (counts[1] == 0).all()


@given(seeds(), st.integers(1, 9))
def test_how_far_the_schemes_vary(seed, num_particles):
    torch.manual_seed(seed)
    log_weights = Tensors(seed).normal(num_particles)
    wanted = num_particles * log_weights.softmax(0).unsqueeze(-1)
    assert ((offspring(log_weights, "systematic", 30) - wanted).abs() < 1).all()
    assert ((offspring(log_weights, "stratified", 30) - wanted).abs() < 2).all()
    assert (offspring(log_weights, "residual", 30) >= (wanted - 1e-9).floor()).all()


@each_scheme
def test_one_particle_with_all_the_weight_is_all_ancestors(scheme):
    log_weights = torch.full((5, 2), -torch.inf)
    log_weights[2, 0] = log_weights[4, 1] = -1e4
    assert torch.equal(resample(log_weights, scheme), torch.tensor([[2, 4]] * 5))


@pytest.mark.parametrize("scheme", ["systematic", "stratified"])
@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_a_particle_without_weight_is_not_found_at_either_end(scheme, number, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, number, dtype=torch.float64))
    log_weights = torch.tensor([0.0, 0.5, 0.5, 0.0]).log().unsqueeze(-1)
    assert set(resample(log_weights, scheme).flatten().tolist()) == {1, 2}


@each_scheme
def test_under_equal_weights_every_particle_is_kept_but_by_independent_draws(scheme):
    counts = offspring(torch.zeros(8), scheme, 50)
    assert (counts == 1).all() or scheme == "multinomial"


@pytest.mark.parametrize("num_particles", [8, 49, 98, 100])
def test_certain_offspring_are_not_lost_to_rounding(num_particles):
    equal = torch.full((num_particles, 1), -math.log(num_particles))
    assert len(resample(equal, "residual").unique()) == num_particles


@each_scheme
def test_sequences_are_independent_and_a_generator_repeats(scheme):
    log_weights = Tensors(0).normal(50, 1).expand(-1, 3)
    first, again = (resample(log_weights, scheme, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.dtype == torch.int64
    assert (first[:, 0] != first[:, 1]).any()
    assert resample(log_weights.reshape(50, 3, 1).expand(-1, 3, 2), scheme).shape == (50, 3, 2)


def test_the_effective_sample_size():
    log_weights = torch.tensor([[0.5, 1.0], [0.5, 0.0]]).log()
    torch.testing.assert_close(effective_sample_size(log_weights), torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_none(wrong):
    log_weights = torch.zeros(3, 2)
    log_weights[:, 1] = wrong
    with pytest.raises(ValueError, match="^log_weights: "):
        resample(log_weights)


def test_an_unknown_scheme():
    with pytest.raises(ValueError, match="^scheme: got 'best'"):
        resample(torch.zeros(3, 2), "best")
    with pytest.raises(ValueError, match="^log_weights: has shape"):
        resample(torch.zeros(0, 2))
