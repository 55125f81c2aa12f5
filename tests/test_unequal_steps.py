"""The Ornstein-Uhlenbeck transition: against dense Gaussians at irregular times, in float64."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Tensors, batch_shapes, dimensions, dtypes, lengths, mask_of, padding, seeds
from torch.testing import assert_close

from seqdisent import MarkovChain, OrnsteinUhlenbeckTransition

CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # float64


def process(tensors, latent_dim):
    """A transition with random parameters: its mean, its time scale and its stationary scale differ by coordinate."""
    return tensors.build(lambda: OrnsteinUhlenbeckTransition(latent_dim), noise=0.7)


def irregular_times(tensors, *shape):
    """Times in order; the last dimension is that of the steps."""
    return (0.05 + 2 * tensors.uniform(*shape)).cumsum(-1)


def steps_between(times):
    return torch.diff(times, dim=-1, prepend=times[..., :1]).unsqueeze(-1)


def chain_of(transition, dt, mask=None):
    initial = transition.stationary().expand(dt.shape[:-2])
    return MarkovChain(initial, transition, dt.shape[-2], inputs=dt, mask=mask)


def dense_covariance(times, time_scale, scale):
    """sigma^2 exp(-|t - t'| / tau) of one coordinate, entry by entry."""
    rows = [[scale**2 * math.exp(-abs(a - b) / time_scale) for b in times.tolist()] for a in times.tolist()]
    return torch.tensor(rows, dtype=times.dtype)


@given(seeds(), dimensions(), lengths(6, 3))
def test_a_chain_at_irregular_times_is_a_dense_gaussian(seed, latent_dim, row_lengths):
    tensors = Tensors(seed)
    transition, mask = process(tensors, latent_dim), mask_of(row_lengths)
    times = irregular_times(tensors, *mask.shape)
    found = chain_of(transition, steps_between(times), mask)
    path = tensors.normal(*mask.shape, latent_dim)
    time_scale, scale = transition.log_time_scale.exp().tolist(), transition.log_scale.exp().tolist()
    for i, length in enumerate(row_lengths):
        wanted = torch.zeros((), dtype=torch.float64)
        for d in range(latent_dim):
            covariance = dense_covariance(times[i, :length], time_scale[d], scale[d])
            mean = transition.loc[d].expand(length)
            wanted = wanted + reference.gaussian_log_prob(path[i, :length, d], mean, covariance)
        assert_close(found.log_prob(path)[i], wanted, **CLOSE)


@given(seeds(), dimensions(), batch_shapes(), st.floats(0.01, 0.99))
def test_two_steps_in_turn_are_one_step_of_their_sum(seed, latent_dim, batch_shape, share):
    """Chapman and Kolmogorov: the moments after both, the step between marginalised by hand."""
    tensors = Tensors(seed)
    transition, z = process(tensors, latent_dim), tensors.normal(*batch_shape, latent_dim)
    dt = 0.1 + 3 * tensors.uniform(*batch_shape, 1)
    whole, first = transition(z, dt), transition(z, share * dt)
    second = transition(first.mean, (1 - share) * dt)
    slope = (
        transition(torch.ones_like(z), (1 - share) * dt).mean - transition(torch.zeros_like(z), (1 - share) * dt).mean
    )
    assert_close(second.mean, whole.mean, **CLOSE)
    assert_close(slope**2 * first.variance + second.variance, whole.variance, **CLOSE)


@given(seeds(), dimensions(), batch_shapes())
def test_the_stationary_distribution_stays(seed, latent_dim, batch_shape):
    tensors = Tensors(seed)
    transition = process(tensors, latent_dim)
    stationary, dt = transition.stationary(), 0.1 + 3 * tensors.uniform(*batch_shape, 1)
    after = transition(stationary.mean.expand(*batch_shape, -1), dt)
    slope = torch.exp(-dt / transition.log_time_scale.exp())
    assert_close(after.mean, stationary.mean.expand_as(after.mean), **CLOSE)
    assert_close(slope**2 * stationary.variance + after.variance, stationary.variance.expand_as(slope), **CLOSE)


def test_drawn_paths_have_the_covariance_of_the_process():
    """20,000 seeded paths: means and covariances within 5 standard errors."""
    transition, times = process(Tensors(3), 1), irregular_times(Tensors(4), 5)
    torch.manual_seed(0)
    paths = chain_of(transition, steps_between(times)).rsample((20_000,))[..., 0].detach()
    mean, wanted = transition.loc.item(), dense_covariance(
        times, transition.log_time_scale.exp().item(), transition.log_scale.exp().item()
    )  # fmt: skip
    assert ((paths.mean(0) - mean).abs() < 5 * (wanted.diag() / 20_000).sqrt()).all()
    tolerance = 5 * ((wanted.diag().outer(wanted.diag()) + wanted**2) / 20_000).sqrt()
    assert ((paths.T.cov(correction=0) - wanted).abs() < tolerance).all()


@given(seeds(), dtypes(), st.sampled_from((0.0, 1e-30, 1e-6, 1e6, 1e30, 3e38)), st.sampled_from((1e-3, 1.0, 1e3)))
def test_values_and_gradients_are_finite_however_long_the_step(seed, dtype, dt, time_scale):
    tensors = Tensors(seed, dtype)
    transition = tensors.build(lambda: OrnsteinUhlenbeckTransition(2, initial_time_scale=time_scale))
    z_prev = tensors.normal(3, 2).requires_grad_()
    steps = torch.full((3, 1), dt, dtype=dtype, requires_grad=True)
    step = transition(z_prev, steps)
    assert (step.stddev >= 1e-4 * (1 - 1e-6)).all()
    step.log_prob(step.rsample().detach() + 1e-4).sum().backward()
    for tensor in (step.mean, step.stddev, z_prev.grad, steps.grad, *(p.grad for p in transition.parameters())):
        assert tensor.isfinite().all()
    if dt == 0:  # a repeated measurement
        assert torch.equal(step.mean, z_prev)
    if dt >= 1e6:
        stationary = transition.stationary()
        assert_close(step.mean, stationary.mean.expand(3, 2))
        assert_close(step.stddev, stationary.stddev.expand(3, 2))


def test_short_steps_keep_their_digits_in_single_precision():
    """1 - exp(-x), computed as written, would be 0 here."""
    transition = OrnsteinUhlenbeckTransition(1, min_scale=1e-8)
    dt = 1e-9
    scale = transition(torch.zeros(1), torch.tensor([dt])).stddev
    assert_close(scale.item(), math.sqrt(2 * dt), rtol=1e-5, atol=0.0)


@given(seeds(), lengths(4, 3), padding())
def test_steps_in_padding_and_before_the_first_reach_no_value_and_no_gradient(seed, row_lengths, filler):
    tensors = Tensors(seed)
    transition, mask = process(tensors, 2), mask_of(row_lengths, 1)
    times = irregular_times(tensors, *mask.shape)
    path = tensors.normal(*mask.shape, 2)

    def found(filler, values):
        dt = torch.where(mask[..., None], steps_between(times), filler)
        dt[:, 0] = filler
        chain = chain_of(transition, dt.requires_grad_(), mask)
        per_step = chain.log_prob_per_step(torch.where(mask[..., None], path, values))
        torch.manual_seed(0)
        drawn = chain.rsample()
        loss = per_step.sum() + drawn[mask].square().sum()
        gradients = torch.autograd.grad(loss, [dt, *transition.parameters()])
        return [per_step, drawn, *gradients]

    for one, other in zip(found(filler, filler), found(0.3, 0.0), strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


@given(seeds(), batch_shapes(3), dimensions())
def test_a_step_may_lack_its_last_dimension(seed, batch_shape, latent_dim):
    tensors = Tensors(seed)
    transition = process(tensors, latent_dim)
    z_prev, dt = tensors.normal(*batch_shape, latent_dim), tensors.uniform(*batch_shape, 1).squeeze(-1)
    found, wanted = transition(z_prev, dt), transition(z_prev, dt.unsqueeze(-1))
    assert torch.equal(found.mean, wanted.mean)
    assert torch.equal(found.stddev, wanted.stddev)
    on_the_left = z_prev.expand(2, *z_prev.shape)  # a path to be scored, with one step for all times
    assert torch.equal(transition(on_the_left, dt.unsqueeze(-1)).mean, wanted.mean.expand_as(on_the_left))


@pytest.mark.parametrize(
    ("z_prev", "dt", "error", "message"),
    [
        (torch.zeros(2, 4), torch.ones(2, 1), ValueError, "^z_prev: last dimension is 4, expected latent_dim=3"),
        (torch.zeros(2, 3), torch.ones(2, 2), ValueError, "^dt: last dimension is 2, expected the size"),
        (torch.zeros(2, 3), torch.ones(4, 1), ValueError, r"^dt: has shape \(4, 1\), expected .* \(2, 1\)"),
        (torch.zeros(2, 3), torch.ones(()), ValueError, r"^dt: has shape \(\), expected at least 1 dimensions"),
        (torch.zeros(2, 3), None, ValueError, "^dt: got None, expected a tensor"),
        (torch.zeros(2, 3), torch.tensor([[1.0], [-0.5]]), ValueError, "^dt: got -0.5, expected .* at least 0"),
        (torch.zeros(2, 3), torch.ones(2, 1).double(), TypeError, "^dt: has dtype torch.float64"),
        (torch.zeros(2, 3).double(), torch.ones(2, 1), TypeError, "^z_prev: has dtype torch.float64"),
        (torch.zeros(2, 3), torch.ones(2, 1, device="meta"), ValueError, "^dt: is on meta, expected cpu"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(z_prev, dt, error, message):
    with pytest.raises(error, match=message):
        OrnsteinUhlenbeckTransition(3)(z_prev, dt)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"latent_dim": 0}, "latent_dim"),
        ({"initial_time_scale": 0.0}, "initial_time_scale"),
        ({"initial_scale": -1.0}, "initial_scale"),
        ({"min_scale": math.inf}, "min_scale"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        OrnsteinUhlenbeckTransition(**{"latent_dim": 2, **options})


def test_training_starts_at_the_scales_that_are_given():
    transition = OrnsteinUhlenbeckTransition(2, initial_time_scale=3.0, initial_scale=0.2)
    assert_close(transition.stationary().stddev, torch.full((2,), 0.2))
    assert_close(transition(torch.ones(1, 2), torch.tensor([[3.0]])).mean, torch.full((1, 2), math.exp(-1.0)))


def test_float32_under_autocast():
    transition, z_prev, dt = OrnsteinUhlenbeckTransition(2), torch.randn(3, 2), torch.rand(3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = [transition(z_prev, dt), transition(z_prev.bfloat16(), dt)]
    assert torch.equal(found[0].mean, transition(z_prev, dt).mean)
    assert all(step.mean.dtype == step.stddev.dtype == torch.float32 for step in found)
    with pytest.raises(TypeError, match="^parameters: "):
        transition.bfloat16().stationary()
