"""MarkovChain: one batched call scores what a loop and a dense Gaussian score; padding changes nothing."""

import functools
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import LinearChain, normal
from pyro.distributions.transforms import affine_autoregressive
from strategies import Tensors, batch_shapes, dimensions, lengths, mask_of, num_steps, padding, seeds
from torch import nn
from torch.testing import assert_close

from seqdisent import GatedTransition, MarkovChain

exact = functools.partial(assert_close, rtol=1e-9, atol=1e-9)


def ragged_chain(seed, row_lengths, size=2, extra_steps=1):
    mask = mask_of(row_lengths, extra_steps)
    return LinearChain(seed, mask.shape[:1], mask.shape[1], size, mask)


def never(z_prev, inputs=None):
    raise AssertionError("the transition was called")


def same_noise(function, *args):
    torch.manual_seed(0)
    return function(*args)


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------


@given(seeds(), lengths(), dimensions(3), batch_shapes(2, 2), st.integers(0, 1))
def test_scoring_is_the_loop_and_the_dense_gaussian(seed, row_lengths, size, sample_shape, extra_steps):
    parts = ragged_chain(seed, row_lengths, size, extra_steps)
    path = Tensors(seed + 1).normal(*sample_shape, len(row_lengths), parts.num_steps, size)
    log_prob, per_step = parts.chain().log_prob(path), parts.chain().log_prob_per_step(path)
    assert log_prob.shape == path.shape[:-2]
    assert per_step.shape == path.shape[:-1]
    exact(per_step.sum(-1), log_prob)
    for i, length in enumerate(row_lengths):
        mean, covariance, steps = parts.of_row(i, length=length)
        dense = reference.dense_chain(mean, covariance, steps)
        for path_i, steps_i, total in zip(
            path[..., i, :, :].reshape(-1, parts.num_steps, size),
            per_step[..., i, :].reshape(-1, parts.num_steps),
            log_prob[..., i].flatten(),
            strict=True,
        ):
            exact(total, reference.gaussian_log_prob(path_i[:length].flatten(), *dense))
            exact(steps_i[0], reference.diagonal_normal_log_prob(path_i[0], mean, parts.first_scale[i]))
            for t, (matrix, offset, _) in enumerate(steps, start=1):
                loc = matrix @ path_i[t - 1] + offset
                exact(steps_i[t], reference.diagonal_normal_log_prob(path_i[t], loc, parts.scale))
            assert (steps_i[length:] == 0).all()


@given(seeds(), batch_shapes(2, 3), num_steps(), batch_shapes(1, 3))
def test_any_batch_and_sample_shape(seed, batch_shape, steps, sample_shape):
    parts = LinearChain(seed, batch_shape, steps, 2)
    chain = parts.chain()
    assert (chain.batch_shape, chain.event_shape) == (batch_shape, (steps, 2))
    path = same_noise(chain.rsample, sample_shape)
    assert path.shape == (*sample_shape, *batch_shape, steps, 2)
    assert path.dtype == torch.float64
    exact(same_noise(chain.sample, sample_shape), path)
    log_prob = chain.log_prob(path)
    for row in itertools.product(*(range(n) for n in batch_shape)):
        dense = reference.dense_chain(*parts.of_row(*row))
        for path_i, value in zip(
            path[(..., *row, slice(None), slice(None))].reshape(-1, steps * 2), log_prob[(..., *row)].flatten(),
            strict=True,
        ):  # fmt: skip
            exact(value, reference.gaussian_log_prob(path_i, *dense))


def test_scoring_calls_the_transition_once_and_sampling_once_a_step():
    parts = LinearChain(0, (3,), 6, 2)
    chain = parts.chain()
    path = chain.rsample((4,))
    assert parts.calls == [(4, 3, 2)] * 5
    parts.calls.clear()
    chain.log_prob(path)
    assert parts.calls == [(5, 4, 3, 2)]
    parts.calls.clear()
    chain.conditionals(path)
    assert parts.calls == [(5, 4, 3, 2)]


@given(seeds(), lengths(), batch_shapes(2, 2), st.integers(0, 1))
def test_a_draw_hands_over_the_conditionals_of_its_path_with_their_gradients(
    seed, row_lengths, sample_shape, extra_steps
):
    parts = ragged_chain(seed, row_lengths, 2, extra_steps)
    weight, read = parts.loc.new_tensor(0.7).requires_grad_(), parts.inputs.clone().requires_grad_()

    def transition(z_prev, inputs):
        parts.calls.append(z_prev.shape)
        return dist.Normal(weight * z_prev + inputs, weight.exp()).to_event(1)

    chain = MarkovChain(parts.initial, transition, parts.num_steps, inputs=read, mask=parts.mask)
    torch.manual_seed(seed)
    path, drawn, log_prob = chain.rsample_with_conditionals(sample_shape)
    assert len(parts.calls) == parts.num_steps - 1
    assert log_prob is None
    torch.manual_seed(seed)
    exact(path, chain.rsample(sample_shape))
    fresh = chain.conditionals(path)
    if fresh.steps is None:
        assert drawn.steps is None
        return
    assert (drawn.steps.batch_shape, drawn.steps.event_shape) == (fresh.steps.batch_shape, fresh.steps.event_shape)
    real = parts.mask[:, 1:].T.reshape(-1, *(1,) * len(sample_shape), len(row_lengths), 1)
    results = []
    for conditionals in (drawn, fresh):
        terms = torch.where(real, conditionals.steps.mean.square() + conditionals.steps.stddev.log(), 0.0)
        results.append((terms, *torch.autograd.grad(terms.sum(), (weight, read), retain_graph=True)))
    for mine, theirs in zip(*results, strict=True):
        exact(mine, theirs)


class Shifted(dist.Normal):
    """A Normal by inheritance, not by density."""

    def log_prob(self, value):
        return super().log_prob(value - 1)


@pytest.mark.parametrize("step", [lambda z: Shifted(z, 1.0).to_event(1), lambda z: dist.LogNormal(z, 1.0).to_event(1)])
def test_other_steps_are_evaluated_again_at_the_path(step):
    chain = MarkovChain(dist.Normal(torch.zeros(3, 2), 1.0).to_event(1), step, 4)
    path, conditionals, _ = chain.rsample_with_conditionals()
    exact(conditionals.log_prob_per_step(path), chain.log_prob_per_step(path))


def test_a_subclass_hands_over_its_own_conditionals():
    class Mine(MarkovChain):
        def conditionals(self, path):
            return super().conditionals(path.detach())

    chain = Mine(dist.Normal(torch.zeros(3, 2), 1.0).to_event(1), lambda z: dist.Normal(z, 1.0).to_event(1), 4)
    path = chain.rsample().requires_grad_()
    _, conditionals, _ = chain.rsample_with_conditionals()
    assert not conditionals.steps.mean.requires_grad
    assert not chain.conditionals(path).steps.mean.requires_grad


def test_conditionals_have_the_steps_on_the_left_and_score_the_path():
    parts = LinearChain(0, (3,), 4, 2)
    path = parts.chain().rsample((5,))
    initial, steps = parts.chain().conditionals(path)
    assert (initial.batch_shape, initial.event_shape) == ((3,), (2,))
    assert (steps.batch_shape, steps.event_shape) == ((3, 5, 3), (2,))
    exact(parts.chain().conditionals(path).log_prob_per_step(path), parts.chain().log_prob_per_step(path))


@given(seeds(), batch_shapes(1, 3))
def test_one_step_never_calls_the_transition(seed, batch_shape):
    parts = LinearChain(seed, batch_shape, 1, 2)
    inputs = torch.full((*batch_shape, 1, 2), float("nan"))
    for options in ({}, {"inputs": inputs}, {"mask": torch.ones(*batch_shape, 1, dtype=torch.bool)}):
        chain = MarkovChain(parts.initial, never, 1, **options)
        assert chain.has_rsample
        path = chain.expand((4, *batch_shape)).rsample()
        exact(chain.log_prob(path), parts.initial.log_prob(path[..., 0, :]))
        exact(chain.mean_path(), parts.loc.unsqueeze(-2))
        assert chain.conditionals(path).steps is None


@given(seeds(), lengths())
def test_the_first_input_is_never_read(seed, row_lengths):
    parts = ragged_chain(seed, row_lengths)
    path = Tensors(seed + 1).normal(len(row_lengths), parts.num_steps, 2)
    read = parts.inputs.clone().requires_grad_()
    unread = parts.inputs.clone()
    unread[:, 0] = float("nan")
    unread.requires_grad_()
    results = []
    for inputs in (read, unread):
        chain = parts.chain(inputs=inputs)
        torch.manual_seed(0)
        sample = chain.rsample()
        value = chain.log_prob(path).sum() + sample.square().sum() + chain.mean_path().sum()
        results.append((value, sample, torch.autograd.grad(value, inputs)[0]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert (results[0][2][:, 0] == 0).all()


@given(seeds(), lengths(), padding(), st.booleans())
def test_padding_changes_no_value_and_no_gradient(seed, row_lengths, filling, positive):
    """`positive`: a log-normal chain, whose density is NaN at a negative or zero step."""
    parts = ragged_chain(seed, row_lengths)
    parameters = [parameter.requires_grad_() for parameter in parts.parameters()]

    def exponentiated(*args):
        return dist.TransformedDistribution(parts.transition(args[0].log(), args[1]), [exp()])

    def build(inputs):
        if not positive:
            return parts.chain(inputs=inputs)
        initial = dist.TransformedDistribution(parts.initial, [exp()])
        return MarkovChain(initial, exponentiated, parts.num_steps, inputs=inputs, mask=parts.mask)

    drawn = Tensors(seed + 1).normal(len(row_lengths), parts.num_steps, 2)
    real = parts.mask.unsqueeze(-1)
    results = []
    for value in (1.0, filling):
        path = torch.where(real, drawn.exp() if positive else drawn, value).requires_grad_()
        inputs = torch.where(real, parts.inputs, value).requires_grad_()
        chain = build(inputs)
        torch.manual_seed(0)
        sample = chain.rsample()
        per_step = chain.log_prob_per_step(path)
        total = chain.log_prob(path).sum() + chain.log_prob(sample).sum() + sample.sin().sum()
        gradients = torch.autograd.grad(total, [path, inputs, *parameters], allow_unused=True)
        results.append((sample, per_step, total, *(g if g is not None else torch.zeros(()) for g in gradients)))
    for clean, padded in zip(*results, strict=True):
        assert torch.isfinite(padded).all()
        assert torch.equal(clean, padded)
    sample, per_step, _, path_gradient, input_gradient, *_ = results[1]
    assert torch.equal(sample, torch.where(real, sample, sample[:, :1]))
    assert (per_step[~parts.mask] == 0).all()
    assert (path_gradient[~parts.mask] == 0).all()
    assert (input_gradient[~parts.mask] == 0).all()


def test_a_chain_that_would_overflow_in_its_padding_keeps_its_gradient():
    # z = 1, exp(3), exp(3 exp(3)), inf: the step after the last real one already overflows
    slope = torch.tensor(3.0, requires_grad=True)
    mask = mask_of([2, 3], 20)
    initial = normal(torch.ones(2, 1), 0.1)
    chain = MarkovChain(initial, lambda z: normal((slope * z).exp(), 0.1), mask.shape[1], mask=mask)
    for path in (chain.rsample(), chain.mean_path()):
        assert path.isfinite().all()
        (gradient,) = torch.autograd.grad(path.sum(), slope)
        assert gradient.isfinite()
        assert gradient > 0
    path = path.detach().requires_grad_()
    for gradient in torch.autograd.grad(chain.log_prob(path).sum(), [path, slope]):
        assert gradient.isfinite().all()


@given(seeds(), lengths(4, 3), batch_shapes(1, 3))
def test_a_row_does_not_see_its_neighbours(seed, row_lengths, sample_shape):
    parts = ragged_chain(seed, row_lengths)
    path = Tensors(seed + 1).normal(*sample_shape, len(row_lengths), parts.num_steps, 2)
    together = parts.chain().log_prob_per_step(path)
    for i, length in enumerate(row_lengths):
        context = parts.context[i]

        def transition(z, u, context=context):
            return normal(z @ parts.matrix.T + u @ parts.read.T + context @ parts.shift.T, parts.scale)

        alone = MarkovChain(
            normal(parts.loc[i], parts.first_scale[i]), transition, length, inputs=parts.inputs[i, :length]
        )
        exact(alone.log_prob_per_step(path[..., i, :length, :]), together[..., i, :length])


def test_a_path_with_fewer_dimensions_than_the_batch_is_scored_for_every_row():
    # T - 1 = B: a context (B, C) must not meet the steps where it stands for the batch
    parts = LinearChain(0, (3,), 4, 2)
    path = Tensors(1).normal(4, 2)
    exact(parts.chain().log_prob(path), parts.chain().log_prob(path.expand(3, 4, 2)))


@given(seeds())
def test_float32_stays(seed):
    initial = normal(Tensors(seed, torch.float32).normal(2, 3), 1.0)
    chain = MarkovChain(initial, lambda z: normal(0.5 * z, 0.1), 3, mask=mask_of([3, 1]))
    assert chain.rsample().dtype == chain.log_prob(chain.rsample()).dtype == chain.mean_path().dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


@given(seeds(), lengths())
def test_a_sample_and_its_gradient_are_those_of_the_explicit_loop(seed, row_lengths):
    parts = ragged_chain(seed, row_lengths)
    parameters = [parameter.requires_grad_() for parameter in [*parts.parameters(), parts.inputs]]
    torch.manual_seed(0)
    path = parts.chain().rsample()
    torch.manual_seed(0)
    z = parts.initial.rsample()
    steps = [z]
    for t in range(1, parts.num_steps):
        z = parts.transition(z, parts.inputs[:, t]).rsample()
        steps.append(z)
    looped = torch.where(parts.mask.unsqueeze(-1), torch.stack(steps, -2), steps[0].unsqueeze(-2).detach())
    exact(path, looped)
    weights = Tensors(seed + 1).normal(*path.shape)
    gradients = torch.autograd.grad((path * weights).sin().sum(), parameters, allow_unused=True)
    looped_gradients = torch.autograd.grad((looped * weights).sin().sum(), parameters, allow_unused=True)
    for a, b, parameter in zip(gradients, looped_gradients, parameters, strict=True):
        exact(torch.zeros_like(parameter) if a is None else a, torch.zeros_like(parameter) if b is None else b)


def test_gradients_are_those_of_finite_differences():
    parts = ragged_chain(3, [3, 2])
    path = Tensors(4).normal(2, parts.num_steps, 2).requires_grad_()
    parameters = [parts.matrix, parts.scale, parts.loc, parts.first_scale, parts.context, parts.inputs]

    def sampled(*values):
        parts.matrix, parts.scale, parts.loc, parts.first_scale, parts.context, inputs = values
        torch.manual_seed(0)
        return parts.chain(inputs=inputs).rsample()[parts.mask]  # no gradient flows through padding

    def scored(path, *values):
        parts.matrix, parts.scale, parts.loc, parts.first_scale, parts.context, inputs = values
        return parts.chain(inputs=inputs).log_prob_per_step(path)

    parameters = [parameter.clone().requires_grad_() for parameter in parameters]
    assert torch.autograd.gradcheck(sampled, parameters)
    assert torch.autograd.gradcheck(scored, [path, *parameters])


def test_a_sample_without_gradient_has_none():
    parts = LinearChain(0, (2,), 3, 2)
    parts.matrix.requires_grad_()
    assert parts.chain().rsample().requires_grad
    assert not parts.chain().sample().requires_grad
    recorded = []

    def transition(z):
        recorded.append(torch.is_grad_enabled())
        return normal(z, 1.0)

    MarkovChain(parts.initial, transition, 3).sample()
    assert recorded == [False, False]


def test_samples_have_the_moments_of_the_dense_gaussian():
    """20,000 paths; every mean and every second moment within 5 of its own standard errors."""
    parts = LinearChain(0, (2,), 3, 2)
    paths = parts.chain().sample((20_000,)).flatten(-2)
    for i in range(2):
        mean, covariance = reference.dense_chain(*parts.of_row(i))
        centred = paths[:, i] - mean
        assert (centred.mean(0).abs() < 5 * (covariance.diag() / len(paths)).sqrt()).all()
        products = centred.unsqueeze(-1) * centred.unsqueeze(-2)
        errors = products.std(0) / math.sqrt(len(paths))
        assert ((products.mean(0) - covariance).abs() < 5 * errors).all()


@given(seeds(), lengths())
def test_the_mean_path_of_a_linear_chain_is_its_mean(seed, row_lengths):
    parts = ragged_chain(seed, row_lengths)
    path = parts.chain().mean_path()
    for i, length in enumerate(row_lengths):
        mean, _ = reference.dense_chain(*parts.of_row(i, length=length))
        exact(path[i, :length].flatten(), mean)
        assert torch.equal(path[i, length:], path[i, :1].expand(len(path[i, length:]), -1))


# ---------------------------------------------------------------------------------------------------------------------
# In Pyro
# ---------------------------------------------------------------------------------------------------------------------


@given(seeds(), lengths(4, 3), dimensions(3))
def test_expanding_is_expanding_the_parts(seed, row_lengths, num_particles):
    parts = ragged_chain(seed, row_lengths)
    expanded = parts.chain().expand((num_particles, len(row_lengths)))
    assert isinstance(expanded, MarkovChain)
    assert (expanded.batch_shape, expanded.event_shape) == (
        (num_particles, len(row_lengths)), (parts.num_steps, 2),
    )  # fmt: skip
    by_hand = MarkovChain(
        parts.initial.expand((num_particles, len(row_lengths))),
        parts.transition,
        parts.num_steps,
        inputs=parts.inputs.expand(num_particles, -1, -1, -1),
        mask=parts.mask.expand(num_particles, -1, -1),
    )
    path = same_noise(expanded.rsample)
    exact(path, same_noise(by_hand.rsample))
    assert num_particles == 1 or not torch.equal(path[0], path[1])
    exact(expanded.log_prob(path), parts.chain().log_prob(path))
    exact(expanded.mean_path(), parts.chain().mean_path().expand_as(path))
    exact(expanded.step_mask, parts.mask.expand(num_particles, -1, -1))


@given(seeds(), lengths(4, 3))
def test_in_a_plate_and_a_particle_plate(seed, row_lengths):
    parts = ragged_chain(seed, row_lengths)

    def program():
        with pyro.plate("particles", 3, dim=-2), pyro.plate("sequences", len(row_lengths), dim=-1):
            return pyro.sample("z", parts.chain())

    trace = pyro.poutine.trace(program).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["z"]
    assert site["value"].shape == (3, len(row_lengths), parts.num_steps, 2)
    assert site["log_prob"].shape == (3, len(row_lengths))
    exact(site["log_prob"], parts.chain().log_prob(site["value"]))


def test_the_support_is_that_of_the_steps():
    chain = LinearChain(0, (3,), 4, 2).chain()
    assert chain.support.check(torch.zeros(3, 4, 2)).tolist() == [True] * 3
    positive = MarkovChain(dist.LogNormal(torch.zeros(3, 2), 1.0).to_event(1), never, 4)
    path = torch.ones(3, 4, 2)
    path[1, 3, 0] = -1.0
    assert positive.support.check(path).tolist() == [True, False, True]


def test_one_chain_becomes_a_plate_of_independent_ones():
    start = normal(torch.zeros(2), 1.0)
    with pyro.plate("sequences", 4):
        path = pyro.sample("z", MarkovChain(start, lambda z: normal(z, 0.1), 3))
    assert path.shape == (4, 3, 2)
    assert len(path[:, 0, 0].unique()) == 4


def test_masking_a_site_still_works():
    parts = LinearChain(0, (3,), 4, 2)
    path = parts.chain().rsample()
    keep = torch.tensor([True, False, True])
    exact(parts.chain().mask(keep).log_prob(path), parts.chain().log_prob(path) * keep)


# ---------------------------------------------------------------------------------------------------------------------
# Going on from a prefix
# ---------------------------------------------------------------------------------------------------------------------


@given(seeds(), lengths(4, 3), st.integers(1, 3), batch_shapes(1, 2))
def test_continuing_is_the_loop_from_each_row_s_own_last_step(seed, row_lengths, more, sample_shape):
    mask = mask_of(row_lengths)
    length = mask.shape[1]
    parts = LinearChain(seed, (len(row_lengths),), length + more, 2)
    drawn = Tensors(seed + 1).normal(*sample_shape, *mask.shape, 2)
    prefix = torch.where(mask.unsqueeze(-1), drawn, float("nan"))
    extended = parts.chain().extend(prefix, more, mask=mask, sample=False)
    assert extended.shape == (*sample_shape, len(row_lengths), length + more, 2)
    for i, row_length in enumerate(row_lengths):
        *_, steps = parts.of_row(i)
        paths = extended[..., i, :, :].reshape(-1, length + more, 2)
        for path, start in zip(paths, drawn[..., i, :, :].reshape(-1, length, 2), strict=True):
            assert torch.equal(path[:row_length], start[:row_length])
            for t in range(row_length, length + more):
                matrix, offset, _ = steps[t - 1]
                exact(path[t], matrix @ path[t - 1] + offset)


@given(seeds(), num_steps(4), st.integers(1, 3))
def test_a_whole_prefix_needs_no_mask(seed, length, more):
    parts = LinearChain(seed, (2,), length + more, 2)
    prefix = Tensors(seed + 1).normal(2, length, 2)
    whole = torch.ones(2, length, dtype=torch.bool)
    for sample in (True, False):
        extended = same_noise(lambda sample=sample: parts.chain().extend(prefix, more, sample=sample))
        assert torch.equal(extended[:, :length], prefix)
    exact(extended, parts.chain().extend(prefix, more, mask=whole, sample=False))


def test_padding_of_a_prefix_reaches_no_gradient():
    mask = mask_of([1, 3])
    parts = LinearChain(0, (2,), 5, 2)
    prefix = torch.where(mask.unsqueeze(-1), Tensors(1).normal(2, 3, 2), float("nan")).requires_grad_()
    (gradient,) = torch.autograd.grad(parts.chain().extend(prefix, 2, mask=mask, sample=False).sum(), prefix)
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()
    assert (gradient[0, 0] != 0).all()


def test_sampled_continuations_have_the_conditional_moments():
    """20,000 continuations of 2 steps; every mean and second moment within 5 of its own standard errors."""
    parts = LinearChain(0, (1,), 4, 2)
    prefix = Tensors(1).normal(1, 2, 2)
    paths = parts.chain().extend(prefix.expand(20_000, 1, 2, 2), 2)[:, 0, 2:].flatten(-2)
    *_, steps = parts.of_row(0)
    (matrix, offset, noise), last = steps[1], steps[2]
    mean, covariance = reference.dense_chain(matrix @ prefix[0, -1] + offset, noise, [last])
    centred = paths - mean
    assert (centred.mean(0).abs() < 5 * (covariance.diag() / len(paths)).sqrt()).all()
    products = centred.unsqueeze(-1) * centred.unsqueeze(-2)
    assert ((products.mean(0) - covariance).abs() < 5 * products.std(0) / math.sqrt(len(paths))).all()


@pytest.mark.parametrize("sample", [True, False])
def test_a_continuation_is_reparameterised(sample):
    loc = torch.zeros((), requires_grad=True)
    chain = MarkovChain(normal(torch.zeros(3, 2), 1.0), lambda z: normal(z / 2 + loc, 1.0), 4)
    path = chain.extend(torch.ones(3, 1, 2), 2, sample=sample)
    (gradient,) = torch.autograd.grad(path[:, -1].sum(), loc)
    assert gradient == 6 * (1 + 1 / 2)  # of six coordinates, each by its own step and half of the step before


def test_without_inputs_there_is_no_limit_to_a_continuation():
    chain = MarkovChain(normal(torch.ones(1), 1.0), lambda z: normal(0.5 * z, 0.1), 2)
    extended = chain.extend(torch.ones(1, 1), 50, sample=False)
    exact(extended[:, 0], torch.tensor([0.5**t for t in range(51)]))


# ---------------------------------------------------------------------------------------------------------------------
# Transitions that are not Normal
# ---------------------------------------------------------------------------------------------------------------------


def exp():
    return dist.transforms.ExpTransform()


@given(seeds(), lengths())
def test_a_chain_of_flows_is_the_transformed_dense_gaussian(seed, row_lengths):
    parts = ragged_chain(seed, row_lengths)
    chain = MarkovChain(
        dist.TransformedDistribution(parts.initial, [exp()]),
        lambda z, u: dist.TransformedDistribution(parts.transition(z.log(), u), [exp()]),
        parts.num_steps,
        inputs=parts.inputs,
        mask=parts.mask,
    )
    assert chain.has_rsample
    path = same_noise(chain.rsample)
    exact(path[parts.mask], same_noise(parts.chain().rsample)[parts.mask].exp())
    log_prob = chain.log_prob(path)
    for i, length in enumerate(row_lengths):
        log_path = path[i, :length].log().flatten()
        dense = reference.dense_chain(*parts.of_row(i, length=length))
        exact(log_prob[i], reference.gaussian_log_prob(log_path, *dense) - log_path.sum())
    with pytest.raises(NotImplementedError):
        chain.mean_path()


class WithoutRsample(dist.Normal):
    """A Normal that can be drawn but not reparameterised."""

    has_rsample = False

    def rsample(self, sample_shape=()):
        raise NotImplementedError


@pytest.mark.parametrize("first", [dist.Normal, WithoutRsample])
@pytest.mark.parametrize("later", [dist.Normal, WithoutRsample])
def test_a_chain_is_drawn_by_the_means_of_each_step(first, later):
    chain = MarkovChain(first(torch.zeros(3, 2), 1.0).to_event(1), lambda z: later(z, 1.0).to_event(1), 3)
    assert chain.has_rsample == (first is dist.Normal)
    assert chain.expand((4, 3)).has_rsample == chain.has_rsample
    path = pyro.sample("z", chain)  # calls sample where a step has no rsample
    assert path.shape == (3, 3, 2)
    assert chain.extend(path[:, :1], 4).shape == (3, 5, 2)
    if first is later is dist.Normal:
        assert chain.rsample().shape == (3, 3, 2)
    else:
        with pytest.raises(NotImplementedError, match="rsample"):
            chain.rsample()


def test_an_error_of_the_transition_is_its_own():
    def transition(z):
        raise ValueError("mine")

    chain = MarkovChain(normal(torch.zeros(3, 2), 1.0), transition, 3)
    for use in (chain.rsample, chain.sample, chain.mean_path, lambda: chain.log_prob(torch.zeros(3, 3, 2))):
        with pytest.raises(ValueError, match="^mine$"):
            use()


# ---------------------------------------------------------------------------------------------------------------------
# Step by step
# ---------------------------------------------------------------------------------------------------------------------


@given(seeds(), batch_shapes(2, 2), st.integers(1, 5), batch_shapes(1, 2))
def test_going_on_step_by_step_is_the_chain(seed, batch_shape, steps, sample_shape):
    parts = LinearChain(seed, batch_shape, steps, 2)
    chain = parts.chain()
    torch.manual_seed(seed)
    path = chain.rsample(sample_shape)
    torch.manual_seed(seed)
    conditional, state = chain.step()
    z, log_prob = conditional.rsample(sample_shape), []
    for t in range(steps):
        if t:
            parts.calls.clear()
            conditional, state = chain.step(z, state)
            assert len(parts.calls) == 1
            z = conditional.rsample()
        exact(z, path[..., t, :])
        log_prob.append(conditional.log_prob(z))
        assert state.num_steps == t + 1
    exact(torch.stack(log_prob, -1), chain.log_prob_per_step(path))
    with pytest.raises(ValueError, match=f"^state: .*{steps}"):
        chain.step(z, state)


def test_a_chain_goes_on_after_a_path():
    parts = LinearChain(0, (3,), 6, 2)
    chain = parts.chain()
    path = chain.rsample()
    conditional, state = chain.step(path[:, 3], chain.state_after(path[:, :4]))
    exact(conditional.mean, chain.conditionals(path).steps.mean[3])
    assert state.num_steps == 5
    for wrong in ({"z_prev": path[:, 0]}, {"state": state}):
        with pytest.raises(ValueError, match="^state: "):
            chain.step(**wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------------------------------


START = normal(torch.zeros(3, 2), 1.0)


class Step(nn.Module):
    """One step through `layer`."""

    def __init__(self, layer):
        super().__init__()
        self.linear, self.layer = nn.Linear(2, 2), layer

    def forward(self, z_prev, context=None):
        return normal(self.layer(self.linear(z_prev)), 1.0)

    def step(self, z_prev):
        return self(z_prev)


class Recurrent(nn.Module):
    """A recurrent network over one step, with dropout between its layers."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(2, 2, num_layers=2, dropout=0.5)

    def forward(self, x):
        return self.gru(x.reshape(1, -1, 2))[0].reshape(x.shape)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.AlphaDropout(0.1), Recurrent()], ids=lambda x: type(x).__name__)
def test_a_module_with_dropout_is_refused_in_training_and_fine_in_evaluation(layer):
    step = Step(layer)
    with pytest.raises(ValueError, match="^transition: .*at random"):
        MarkovChain(START, step, 3)
    assert MarkovChain(START, step.eval(), 3).rsample().shape == (3, 3, 2)


def test_dropout_with_probability_zero_is_fine():
    assert MarkovChain(START, Step(nn.Dropout(0.0)), 3).rsample().shape == (3, 3, 2)


def test_what_a_method_does_not_call_is_no_harm():
    network = Step(nn.Dropout(0.5))
    network.transition = nn.Linear(2, 2)
    assert MarkovChain(START, lambda z: normal(network.transition(z), 1.0), 3).rsample().shape == (3, 3, 2)


def test_dropout_inside_a_function_is_scored_as_it_was_drawn():
    """The ledger has the steps that drew the path, so the density is that of the draw."""
    step = Step(nn.Dropout(0.5))
    path, conditionals, _ = MarkovChain(START, lambda z: step(z), 5).rsample_with_conditionals()
    again = MarkovChain(START, lambda z: step(z), 5).conditionals(path)
    assert not torch.equal(conditionals.steps.mean, again.steps.mean)
    torch.manual_seed(3)
    chain = MarkovChain(START, lambda z: step(z), 5)
    path, conditionals, _ = chain.rsample_with_conditionals()
    torch.manual_seed(3)
    z = [START.rsample()]
    means = []
    for _ in range(4):
        conditional = step(z[-1])
        means.append(conditional.mean)
        z.append(conditional.rsample())
    exact(conditionals.steps.mean, torch.stack(means))


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def walk(z_prev, inputs=None):
    return normal(z_prev, 1.0)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.tensor([[1, 1], [1, 0], [1, 1]]), TypeError, "^mask: "),
        (torch.tensor([[1, 0, 1], [1, 1, 1], [1, 1, 0]]).bool(), ValueError, "^mask: .*T=2"),
        (torch.tensor([[1, 1], [0, 0], [1, 0]]).bool(), ValueError, "^mask: .*first step"),
        (torch.tensor([[1, 1], [0, 1], [1, 0]]).bool(), ValueError, "^mask: .*first step"),
        (torch.ones(4, 2).bool(), ValueError, r"^mask: .*\(4, 2\)"),
        (torch.tensor(True), ValueError, r"^mask: .*\(\)"),
    ],
)
def test_masks_that_are_refused(mask, error, message):
    with pytest.raises(error, match=message):
        MarkovChain(START, walk, 2, mask=mask)


def test_a_mask_with_a_hole_is_refused():
    with pytest.raises(ValueError, match="^mask: .*hole"):
        MarkovChain(START, walk, 3, mask=torch.tensor([True, False, True]))
    prefix = torch.zeros(3, 3, 2)
    with pytest.raises(ValueError, match="^mask: .*hole"):
        MarkovChain(START, walk, 4).extend(prefix, 1, mask=torch.tensor([True, False, True]))


def test_one_mask_for_all_rows_is_expanded():
    chain = MarkovChain(START, walk, 3, mask=torch.tensor([True, True, False]))
    assert chain.step_mask.shape == (3, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((START, walk, 0), {}, ValueError, "^num_steps: "),
        ((START, walk, 2.0), {}, ValueError, "^num_steps: "),
        (
            (dist.Normal(torch.zeros(3, 2), 1.0), walk, 2),
            {},
            ValueError,
            r"^initial: .*\.to_event\(1\)",
        ),
        ((normal(torch.zeros(3, 2), 1.0, 2), walk, 2), {}, ValueError, r"^initial: .*\(3, 2\)"),
        ((START, 0.5, 2), {}, TypeError, "^transition: "),
        ((START, walk, 2), {"inputs": torch.zeros(3, 4, 1)}, ValueError, "^inputs: .*T=2"),
        ((START, walk, 2), {"inputs": torch.zeros(2)}, ValueError, "^inputs: .*T=2"),
        ((START, walk, 2), {"inputs": torch.zeros(4, 2, 1)}, ValueError, r"^inputs: .*\(3,\)"),
    ],
)
def test_arguments_that_are_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        MarkovChain(*arguments, **options)


@pytest.mark.parametrize(
    "transition",
    [lambda z: dist.Normal(z, 1.0), lambda z: normal(z[..., :1], 1.0), lambda z: normal(z.sum(0), 1.0)],
    ids=["no event", "another size", "another batch"],
)
def test_a_transition_that_returns_another_shape_is_named(transition):
    chain = MarkovChain(START, transition, 4)
    message = r"^transition: .*\.to_event\(1\)"
    with pytest.raises(ValueError, match=message):
        chain.rsample()
    with pytest.raises(ValueError, match=message):
        chain.log_prob(torch.zeros(3, 4, 2))


@pytest.mark.parametrize("shape", [(2,), (3, 4, 1), (3, 3, 2), (2, 4, 2)])
def test_a_path_of_another_shape_is_refused(shape):
    chain = MarkovChain(START, walk, 4)
    for score in (chain.log_prob, chain.log_prob_per_step, chain.conditionals):
        with pytest.raises(ValueError, match="^path: "):
            score(torch.zeros(shape))


def test_continuations_that_are_refused():
    chain = MarkovChain(START, walk, 4, inputs=torch.zeros(3, 4, 1))
    with pytest.raises(ValueError, match="^num_steps: .*num_steps=5"):
        chain.extend(torch.zeros(3, 3, 2), 2)
    with pytest.raises(ValueError, match=r"^prefix: .*\(3, 0, 2\)"):
        chain.extend(torch.zeros(3, 0, 2), 1)
    with pytest.raises(ValueError, match=r"^prefix: .*\(3, 2, 5\)"):
        chain.extend(torch.zeros(3, 2, 5), 1)
    with pytest.raises(ValueError, match="^num_steps: .*0"):
        chain.extend(torch.zeros(3, 2, 2), 0)
    with pytest.raises(ValueError, match="^mask: .*T=2"):
        chain.extend(torch.zeros(3, 2, 2), 1, mask=torch.ones(3, 3, dtype=torch.bool))


def test_a_static_context_of_the_plates_batch_works_before_the_chain_is_expanded():
    d = torch.randn(4, 3, dtype=torch.float64)
    transition = GatedTransition(2, 5, context_dim=3).double()
    start = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    with pyro.plate("particles", 2, dim=-2), pyro.plate("sequences", 4):
        path = pyro.sample("z", MarkovChain(start, lambda z: transition(z, d), 5))
    assert path.shape == (2, 4, 5, 2)


def test_expanding_a_subclass_keeps_it():
    class Chain(MarkovChain):
        pass

    chain = Chain(dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda z: dist.Normal(z, 1.0).to_event(1), 3)
    expanded = chain.expand([4])
    assert type(expanded) is Chain
    assert expanded.batch_shape == (4,)
    assert expanded.expand([4]) is expanded  # a plate of the same size pays for no other one


def test_a_flow_is_inverted_once_a_step():
    flow = affine_autoregressive(2, [3])
    calls = []
    flow.arn.register_forward_hook(lambda *_: calls.append(1))

    def flowing(loc):
        return dist.TransformedDistribution(dist.Normal(loc, 1.0).to_event(1), [flow])

    MarkovChain(flowing(torch.zeros(3, 2)), flowing, 5).rsample_with_conditionals()
    assert len(calls) == 5


@pytest.mark.parametrize(("num_steps", "mask"), [(1, None), (3, None), (3, mask_of([3, 1]))])
def test_flows_hand_over_the_density_of_their_draw(num_steps, mask):
    """What was computed at the draw against the flow's own inverse, which needs a call for each coordinate."""
    tensors = Tensors(0)
    flow = tensors.build(lambda: affine_autoregressive(2, [3]))
    matrix, loc = tensors.normal(2, 2).requires_grad_(), tensors.normal(2, 2).requires_grad_()
    parameters = [matrix, loc, *flow.parameters()]

    def flowing(loc):
        return dist.TransformedDistribution(dist.Normal(loc, 1.0).to_event(1), [flow])

    torch.set_default_dtype(torch.float64)  # of the zeros from which Pyro's inverse starts
    try:
        chain = MarkovChain(flowing(loc), lambda z_prev: flowing(z_prev @ matrix), num_steps, mask=mask)
        path, conditionals, kept = chain.rsample_with_conditionals()
        kept = kept if mask is None else torch.where(mask, kept, 0.0)
        scored = chain.log_prob_per_step(path)
        shifted = path.detach() + 0.1  # of another value, the conditionals have the density of that value
        elsewhere = conditionals.log_prob_per_step(shifted)[..., 0]
        torch.testing.assert_close(elsewhere, flowing(loc).log_prob(shifted[..., 0, :]))
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(kept, scored)
    found, wanted = (
        torch.autograd.grad(x.sum(), parameters, retain_graph=True, allow_unused=True) for x in (kept, scored)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
