"""Sequences with holes: the evidence, whatever stands in the holes; imputation and joint draws of the future."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import StateSpace, normal
from strategies import Tensors, dimensions, lengths, mask_of, num_steps, padding, seeds
from torch import nn
from torch.testing import assert_close

from seqdisent import (
    IndependentSteps,
    MarkovChain,
    NormalHead,
    RecurrentChain,
    Seq2SeqDynamicsEncoder,
    StaticEncoder,
    elbo_terms,
    feedback,
    forecast,
    impute,
    mark_missing,
    read_backward,
    reconstruct,
    steps_after,
    swap,
)

exact = functools.partial(assert_close, rtol=1e-9, atol=1e-9)
near = functools.partial(assert_close, rtol=1e-8, atol=1e-8)
by = st.sampled_from(("step", "coordinate"))


def holes(seed, values, by):
    """What is observed of values (B, T, X): about two thirds, by step or by coordinate."""
    shape = values.shape[:2] if by == "step" else values.shape
    return Tensors(seed).uniform(*shape) < 0.67


class Latent(nn.Module):
    """A static latent, seen through all the blocks that read sequences with holes."""

    def __init__(self, seed, frame_dim, by="coordinate"):
        super().__init__()
        torch.manual_seed(seed)
        self.read = nn.Linear(frame_dim + (1 if by == "step" else frame_dim), 5)
        self.static, self.dynamics = StaticEncoder(5, 2), Seq2SeqDynamicsEncoder(5, 2, hidden_dim=3, num_layers=2)
        self.future, self.head = nn.GRU(5, 4, batch_first=True), NormalHead(4, 2)
        self.emit = nn.Linear(6, frame_dim)
        self.double()

    def model(self, x=None, mask=None, observed=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = (num_sequences, num_steps) if x is None else x.shape[:2]
        prior = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)
        with pyro.plate("sequences", num_sequences):
            latents = [pyro.sample(name, prior) for name in "sdf"]
            loc = self.emit(torch.cat(latents, -1)).unsqueeze(-2)
            step = normal(loc.expand(*loc.shape[:-2], num_steps, -1), 0.3)
            pyro.sample("x", IndependentSteps(step, mask, observed), obs=x)

    def guide(self, x, mask=None, observed=None):
        features = self.read(x if observed is None else mark_missing(x, observed, mask))
        steps = observed if observed is None or observed.ndim == 2 else observed.any(-1)
        with pyro.plate("sequences", len(x)):
            pyro.sample("s", self.static(features, mask, steps))
            pyro.sample("d", self.dynamics(features, mask, steps))
            pyro.sample("f", self.head(read_backward(self.future, features, mask, steps)[..., 0, :]))


def bound_and_gradient(network, *args):
    torch.manual_seed(3)
    bound = elbo_terms(network.model, network.guide, *args).elbo()
    found = torch.autograd.grad(bound.sum(), list(network.parameters()), allow_unused=True)
    return bound, [gradient for gradient in found if gradient is not None]  # d is not unrolled here


@given(seeds(), lengths(4, 3), dimensions(3), dimensions(3), by)
def test_with_the_exact_posterior_the_bound_is_the_kalman_evidence_of_what_was_seen(
    seed, row_lengths, latent_dim, frame_dim, by
):
    system, mask = StateSpace(seed, latent_dim, frame_dim), mask_of(row_lengths, 1)
    frames = Tensors(seed + 1).normal(*mask.shape, frame_dim)
    observed = holes(seed + 2, frames, by)
    evidence = system.log_evidence(torch.where(reference.by_coordinate(observed, frames), frames, math.nan), mask)
    options = {"kl": "monte-carlo", "num_particles": 4, "vectorize_particles": True}
    terms = elbo_terms(system.model, system.exact_guide, frames, mask, observed=observed, **options)
    bound = terms.log_likelihood["x"] - terms.kl["z"]
    near(bound, evidence.expand_as(bound))
    near(terms.log_likelihood_per_step["x"].sum(-1), terms.log_likelihood["x"])


@given(seeds(), lengths(4, 3), dimensions(3), by, padding())
def test_what_stands_in_a_hole_reaches_no_value_and_no_gradient(seed, row_lengths, frame_dim, by, filler):
    mask = mask_of(row_lengths, 1)
    frames = Tensors(seed).normal(*mask.shape, frame_dim)
    observed, network = holes(seed + 1, frames, by), Latent(seed % 100, frame_dim, by)
    seen = reference.by_coordinate(observed, frames) & mask.unsqueeze(-1)
    bound, gradient = bound_and_gradient(network, torch.where(seen, frames, 0.3), mask, observed)
    with_filler, its_gradient = bound_and_gradient(network, torch.where(seen, frames, filler), mask, observed)
    exact(with_filler, bound)
    for found, wanted in zip(its_gradient, gradient, strict=True):
        exact(found, wanted)
        assert found.isfinite().all()


@given(seeds(), lengths(4, 3), dimensions(3), by)
def test_without_a_hole_the_numbers_are_those_without_observed(seed, row_lengths, frame_dim, by):
    mask = mask_of(row_lengths)
    frames = Tensors(seed).normal(*mask.shape, frame_dim)
    everything = torch.ones(mask.shape if by == "step" else frames.shape, dtype=torch.bool)
    network, marked = Latent(seed % 100, frame_dim, by), mark_missing(frames, everything, mask)
    steps = mask.new_ones(mask.shape)
    features = network.read(marked)
    exact(network.static(features, mask, steps).mean, network.static(features, mask).mean)
    exact(network.dynamics(features, mask, steps).mean, network.dynamics(features, mask).mean)
    exact(read_backward(network.future, features, mask, steps), read_backward(network.future, features, mask))
    step = normal(Tensors(seed + 1).normal(*frames.shape), 0.3)
    exact(
        IndependentSteps(step, mask, everything).log_prob_per_step(frames),
        IndependentSteps(step, mask).log_prob_per_step(frames),
    )


EMISSIONS = {
    "normal": (lambda p: dist.Normal(p, 0.5), lambda p: p),
    "log-normal": (lambda p: dist.LogNormal(p, 0.5), lambda p: p.exp()),
    "bernoulli": (lambda p: dist.Bernoulli(logits=p), lambda p: (p > 0).to(p)),
    "poisson": (lambda p: dist.Poisson(p.exp()), lambda p: p.abs().round()),
    "uniform": (lambda p: dist.Uniform(2.0, 3.0 + p.exp()), lambda p: 2 + p.sigmoid()),
    "mixture": (
        lambda p: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.Gamma(torch.stack([p.exp(), 2 * p.exp()], -1), 1.0)
        ),
        lambda p: p.exp(),
    ),
    "transformed": (
        lambda p: dist.TransformedDistribution(dist.Exponential(p.exp()), [dist.transforms.AffineTransform(1.0, 2.0)]),
        lambda p: 1 + p.exp(),
    ),
    "beta": (lambda p: dist.Beta(p.exp(), 2.0), lambda p: p.sigmoid()),
}


@pytest.mark.parametrize("kind", EMISSIONS)
@given(seeds(), lengths(4, 3), dimensions(3), by, st.sampled_from((math.nan, -7.5)))
def test_an_emission_counts_what_was_observed(kind, seed, row_lengths, frame_dim, by, filler):
    """Value by value; the distribution still checks what it is asked about, and no filler is outside its support."""
    make, value_of = EMISSIONS[kind]
    mask, tensors = mask_of(row_lengths, 1), Tensors(seed)
    p, values = tensors.normal(*mask.shape, frame_dim).requires_grad_(), tensors.normal(*mask.shape, frame_dim)
    values, observed = value_of(values), holes(seed + 1, values, by)
    seen = reference.by_coordinate(observed, values) & mask.unsqueeze(-1)
    found = IndependentSteps(make(p).to_event(1), mask, observed).log_prob_per_step(torch.where(seen, values, filler))
    wanted = torch.zeros(mask.shape).double()
    for i, t, x in seen.nonzero().tolist():
        wanted[i, t] = wanted[i, t] + make(p[i, t, x]).log_prob(values[i, t, x])
    exact(found, wanted)
    if seen.any():
        exact(*(torch.autograd.grad(term.sum(), p)[0] for term in (found, wanted)))


@pytest.mark.parametrize("particles", [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}])
@pytest.mark.parametrize("num_coordinates", [1, 3])
@pytest.mark.parametrize("is_constant", [False, True])
def test_holes_belong_to_their_row_where_sizes_coincide(particles, num_coordinates, is_constant):
    """Three particles of three sequences of three steps with three coordinates, or one distribution for all steps."""
    x = Tensors(0).normal(3, 3, num_coordinates)
    for observed in (Tensors(1).uniform(*x.shape) < 0.5, Tensors(1).uniform(3, 3) < 0.5):

        def model(x, observed=observed):
            with pyro.plate("sequences", 3):
                z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
                loc = z[..., None, None].expand(*z.shape, 1 if is_constant else 3, num_coordinates)
                pyro.sample("x", IndependentSteps(normal(loc, 1.0), None, observed), obs=x)

        def guide(x):
            with pyro.plate("sequences", 3):
                pyro.sample("z", dist.Delta(torch.arange(3.0).double()))

        found = elbo_terms(model, guide, x, kl="monte-carlo", **particles).log_likelihood["x"]
        each = dist.Normal(torch.arange(3.0).double()[:, None, None], 1.0).log_prob(x)
        exact(found, (each * reference.by_coordinate(observed, x)).sum((1, 2)).expand_as(found))


@given(seeds(), num_steps(4))
def test_classes_are_observed_by_the_step(seed, num_steps):
    logits = Tensors(seed).normal(2, num_steps, 3)
    classes = dist.OneHotCategorical(logits=logits).sample()
    observed = Tensors(seed + 1).uniform(2, num_steps) < 0.5
    given_ = torch.where(observed.unsqueeze(-1), classes, math.nan)
    found = IndependentSteps(dist.OneHotCategorical(logits=logits), None, observed).log_prob_per_step(given_)
    exact(found, torch.where(observed, dist.OneHotCategorical(logits=logits).log_prob(classes), 0.0))
    with pytest.raises(ValueError, match="by coordinate needs independent ones .* OneHotCategorical"):
        IndependentSteps(dist.OneHotCategorical(logits=logits), None, observed.unsqueeze(-1).expand(2, num_steps, 3))


def test_a_step_without_an_observation_is_left_out_of_the_average():
    torch.manual_seed(0)
    encoder = StaticEncoder(4, 2).double()
    features, observed = (
        Tensors(1).normal(3, 5, 4),
        torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]) > 0,
    )
    found = encoder(features, observed=observed).mean
    for row in (0, 1):
        exact(found[row], encoder(features[row][observed[row]]).mean)
    exact(found[2], encoder.head(torch.zeros(128).double()).mean)


def test_a_step_without_an_observation_is_read_as_zero():
    torch.manual_seed(0)
    dynamics, future = Seq2SeqDynamicsEncoder(4, 2, hidden_dim=3, num_layers=2).double(), nn.GRU(4, 3).double()
    features, observed = Tensors(1).normal(2, 5, 4), torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 1, 1]]) > 0
    mask = mask_of([5, 3])
    zeros = torch.where(observed.unsqueeze(-1), features, 0.0)
    holes = torch.where(observed.unsqueeze(-1), features, math.nan)
    exact(dynamics(holes, mask, observed).mean, dynamics(zeros, mask).mean)
    exact(read_backward(future, holes, mask, observed), read_backward(future, zeros, mask))


# ---------------------------------------------------------------------------------------------------------------------
# Imputation, futures
# ---------------------------------------------------------------------------------------------------------------------


def smoothed(system, frames):
    """Return mean and covariance of one sequence's observations (T X) given those that are not NaN."""
    loc, covariance, step, (matrix, offset, noise) = system._parts()
    mean, spread = reference.dense_chain(*reference.posterior_chain(
        loc, covariance, [step] * (len(frames) - 1), (matrix, offset, noise), frames
    ))  # fmt: skip
    decode = torch.block_diag(*[matrix] * len(frames))
    x_spread = decode @ spread @ decode.T + torch.block_diag(*[noise] * len(frames))
    return decode @ mean + offset.repeat(len(frames)), x_spread


@given(seeds(), lengths(4, 3), dimensions(2), by)
def test_imputed_means_are_the_smoothers(seed, row_lengths, frame_dim, by):
    system, mask = StateSpace(seed, 2, frame_dim), mask_of(row_lengths)
    frames = Tensors(seed + 1).normal(*mask.shape, frame_dim)
    observed = holes(seed + 2, frames, by)
    with_holes = torch.where(reference.by_coordinate(observed, frames), frames, math.nan)
    found = impute(system.model, system.exact_guide, with_holes, mask, observed=observed)
    for i, length in enumerate(row_lengths):
        wanted = smoothed(system, with_holes[i, :length])[0].reshape(length, frame_dim)
        is_hole = with_holes[i, :length].isnan()
        near(found.values[i, :length][is_hole], wanted[is_hole])
        exact(found.values[i, :length][~is_hole], frames[i, :length][~is_hole])
    assert found.distribution.batch_shape == (len(row_lengths),)


def test_imputed_draws_have_the_posterior_predictive_moments():
    """20,000 seeded draws at once: mean and covariance of a sequence's holes within 5 standard errors."""
    system, frames = StateSpace(3), Tensors(4).normal(2, 4, 2)
    observed = torch.ones(2, 4, 2, dtype=torch.bool)
    observed[0, 1:3], observed[1, 3, 0] = False, False
    torch.manual_seed(0)
    with_holes = torch.where(observed, frames, math.nan)
    found = impute(system.model, system.exact_guide, with_holes, observed=observed, num_samples=20_000)
    assert found.values.shape == (20_000, 2, 4, 2)
    for i in range(2):
        hole = ~observed[i].flatten()
        mean, spread = smoothed(system, with_holes[i])
        drawn, spread = found.values[:, i].flatten(1)[:, hole], spread[hole][:, hole]
        errors = (spread.diag() / 20_000).sqrt()
        assert ((drawn.mean(0) - mean[hole]).abs() < 5 * errors).all()
        tolerance = 5 * ((spread.diag().outer(spread.diag()) + spread**2) / 20_000).sqrt()
        assert ((drawn.T.cov(correction=0) - spread).abs() < tolerance).all()
        exact(found.values[:, i][:, observed[i]], frames[i][observed[i]].expand(20_000, -1))


def test_futures_are_drawn_at_once():
    """20,000 futures of two sequences with holes: the moments of the predictive distribution."""
    system, frames, mask = StateSpace(5), Tensors(6).normal(2, 3, 2), mask_of([3, 2])
    observed = torch.tensor([[True, False, True], [True, True, False]])
    torch.manual_seed(0)
    inputs = {"num_steps": 2, "num_samples": 20_000}
    drawn = forecast(system.model, system.exact_guide, frames, mask, observed=observed, **inputs)["x"].sample()
    assert drawn.shape == (20_000, 2, 5, 2)
    for i, length in enumerate([3, 2]):
        seen = torch.full((length + 2, 2), math.nan).double()
        seen[:length][observed[i, :length]] = frames[i, :length][observed[i, :length]]
        mean, spread = (x[2 * length :] for x in smoothed(system, seen))
        spread = spread[:, 2 * length :]
        future = drawn[:, i, length : length + 2].flatten(1)
        assert ((future.mean(0) - mean).abs() < 5 * (spread.diag() / 20_000).sqrt()).all()
        tolerance = 5 * ((spread.diag().outer(spread.diag()) + spread**2) / 20_000).sqrt()
        assert ((future.T.cov(correction=0) - spread).abs() < tolerance).all()


def test_draws_stand_on_the_left_of_both_programs_dimensions():
    """A guide of a global latent alone has no plate, and the model's sequences keep their place."""

    def model(x=None, mask=None, observed=None, *, num_sequences=None, num_steps=None):
        level = pyro.sample("level", dist.Normal(1.0, 1.0))
        with pyro.plate("sequences", num_sequences if x is None else len(x)):
            loc = level.unsqueeze(-1)
            loc = loc.expand(*torch.broadcast_shapes(loc.shape, (3, num_steps)))
            pyro.sample("x", IndependentSteps(dist.Normal(loc, 1e-6), mask, observed), obs=x)

    def guide(x, mask=None, observed=None):
        pyro.sample("level", dist.Normal(5.0, 1.0))

    x = torch.tensor([[1.0, math.nan], [2.0, math.nan], [3.0, 4.0]])
    torch.manual_seed(0)
    found = impute(model, guide, x, observed=~x.isnan(), num_samples=3).values
    assert found.shape == (3, 3, 2)
    assert_close(found[:, 0, 1], found[:, 1, 1], atol=1e-4, rtol=0)  # one level a draw
    assert torch.pdist(found[:, :1, 1]).min() > 0.01
    future = forecast(model, guide, x[2:].expand(3, 2), num_steps=1, num_samples=5)["x"]
    assert future.batch_shape == (5, 3)


def test_padding_is_filled_too():
    network, frames, mask = Latent(0, 2), Tensors(1).normal(2, 4, 2), mask_of([4, 2])
    padded = torch.where(mask.unsqueeze(-1), frames, math.nan)
    everything = torch.ones(2, 4, dtype=torch.bool)
    network.read = nn.Linear(3, 5).double()
    for how in ({}, {"num_samples": 3}):
        values = impute(network.model, network.guide, padded, mask, observed=everything, **how).values
        assert values.isfinite().all()
        assert (values[..., :2, :] == frames[..., :2, :]).all()


def test_the_log_counts_steps_with_an_observation():
    network, frames = Latent(0, 2), Tensors(1).normal(2, 5, 2)
    observed = torch.zeros(2, 5, 2, dtype=torch.bool)
    observed[0, 1, 0] = observed[1, 2:] = True
    real = elbo_terms(network.model, network.guide, frames, observed=observed).real_steps["x"]
    assert real.tolist() == observed.any(-1).tolist()


def test_pictures_get_a_channel_of_what_was_observed():
    frames = torch.rand(2, 4, 3, 4, 4)
    by_step, by_pixel = torch.rand(2, 4) < 0.5, torch.rand(frames.shape) < 0.5
    for observed, more in ((by_step, 1), (by_pixel, 3)):
        seen = reference.by_coordinate(observed, frames)
        marked = mark_missing(torch.where(seen, frames, math.nan), observed, mask_of([4, 2]), event_dims=3)
        assert marked.shape == (2, 4, 3 + more, 4, 4)
        seen = seen & mask_of([4, 2])[..., None, None, None]
        assert (marked[:, :, :3] == torch.where(seen, frames, 0.0)).all()
        assert (marked[:, :, 3:] == seen[:, :, :more]).all()
    everything = torch.ones(frames.shape, dtype=torch.bool)
    assert (mark_missing(frames, None, mask_of([4, 2]), event_dims=3)
            == mark_missing(frames, everything, mask_of([4, 2]), event_dims=3)).all()  # fmt: skip
    with pytest.raises(ValueError, match="observed: has shape"):
        mark_missing(frames, by_step)


def test_reconstruct_takes_holes():
    network, frames = Latent(0, 2), Tensors(1).normal(3, 4, 2)
    observed = holes(2, frames, "coordinate")
    with_holes = torch.where(observed, frames, math.nan)
    found = reconstruct(network.model, network.guide, with_holes, observed=observed)["x"].mean
    exact(found, reconstruct(network.model, network.guide, frames.nan_to_num(), observed=observed)["x"].mean)
    assert found.isfinite().all()


@given(seeds(), lengths(4, 3), by, padding())
def test_a_model_that_reads_its_frames_reads_its_own_in_holes(seed, row_lengths, by, filler):
    """h_t = f(h_{t-1}, z_{t-1}, x_{t-1}), by a loop that replaces each hole by what the model makes there."""
    tensors, mask = Tensors(seed), mask_of(row_lengths)
    network = tensors.build(lambda: nn.GRU(4, 3))
    of_z, of_h, x = tensors.normal(2, 2), tensors.normal(2, 3), tensors.normal(*mask.shape, 2)
    observed = holes(seed + 1, x, by)
    known = reference.by_coordinate(observed, x) & mask.unsqueeze(-1)
    num_sequences, num_steps = mask.shape

    def frame(z, h):
        return (z @ of_z.T + h @ of_h.T).sin()

    def model(frames=None, mask=None, observed=None, *, num_sequences=None, num_steps=None, history=None):
        step = lambda _, h: normal(h[..., :2], 0.1)  # noqa: E731
        start = torch.zeros(num_sequences, 3).double()
        with pyro.plate("sequences", num_sequences):
            chain = RecurrentChain(
                step(None, start), step, num_steps, recurrence=network, state=start, inputs=feedback(frame, history),
                mask=mask,
            )  # fmt: skip
            z = pyro.sample("z", chain)
            pyro.sample("x", IndependentSteps(normal(frame(z, chain.states(z)), 0.1), mask, observed), obs=frames)

    path = tensors.normal(num_sequences, num_steps, 2)

    def guide(frames, mask=None, observed=None):
        with pyro.plate("sequences", num_sequences):
            pyro.sample("z", IndependentSteps(normal(path, 0.1), mask))

    wanted = torch.zeros(num_sequences, num_steps + 2, 2).double()
    for i, length in enumerate(row_lengths):
        h, z_prev, read = torch.zeros(3).double(), None, None
        for t in range(length + 2):
            if t > 0:
                h = network(torch.cat([z_prev, read])[None], h[None])[0][0]
            z_prev = path[i, t] if t < length else h[:2]
            made = frame(z_prev, h)
            read = torch.where(known[i, t], x[i, t], made) if t < length else made
            wanted[i, t] = made
    given_ = torch.where(known, x, filler)
    found = forecast(
        model, guide, given_, mask, num_steps=2, sample=False, history=True, observed=observed
    )["x"].mean  # fmt: skip
    filled = impute(model, guide, given_, mask, observed=observed, history=True).values
    for i, length in enumerate(row_lengths):
        exact(found[i, : length + 2], wanted[i, : length + 2])
        exact(filled[i, :length], torch.where(known, x, wanted[:, :num_steps])[i, :length])


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong says so
# ---------------------------------------------------------------------------------------------------------------------


def test_observed_of_another_kind_is_refused():
    step, values = normal(torch.zeros(2, 3, 4), 1.0), torch.zeros(2, 3, 4)
    for wrong in (torch.ones(2, 3), [[True]]):
        with pytest.raises(TypeError, match="observed: got .*, expected a bool tensor"):
            IndependentSteps(step, None, wrong)
    for shape in ((3, 2), (2, 3, 3), (2, 4), (5, 2, 3, 4), ()):
        with pytest.raises(ValueError, match=r"observed: has shape .*, expected \(2, 3\) or \(2, 3, 4\)"):
            IndependentSteps(step, None, torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"observed: has shape \(3, 3\), expected \(2, 3\)"):
        StaticEncoder(4, 2)(values, observed=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"values: has shape \(3,\), expected \(\*B, T\) and 1 more"):
        mark_missing(torch.zeros(3), torch.ones(3, dtype=torch.bool))


@given(seed=seeds(), lengths=lengths(), sample=st.integers(0, 2), event_dims=st.integers(0, 2))
def test_each_row_has_the_steps_after_its_own(seed, lengths, sample, event_dims):
    mask = mask_of(lengths)
    values = Tensors(seed).normal(*(4,) * sample, len(lengths), mask.shape[1] + 3, *(2,) * event_dims)
    ahead = steps_after(values, mask, 3, event_dims=event_dims)
    for row, length in enumerate(lengths):
        wanted = values.movedim(sample, 0)[row].narrow(sample, length, 3)
        assert torch.equal(ahead.movedim(sample, 0)[row], wanted)


def test_infinities_that_were_observed_are_refused():
    network, frames = Latent(0, 2), torch.full((1, 3, 2), math.inf).double()
    with pytest.raises(ValueError, match="not finite, expected numbers where `observed` is True"):
        reconstruct(network.model, network.guide, frames, observed=torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="what was not measured is for `observed` to say"):
        reconstruct(network.model, network.guide, frames)


def test_nan_is_counted_where_it_counts():
    """Two real steps of three and three of three, of which some coordinates were measured; six NaN, one a hole."""
    mask = torch.tensor([[True, True, False], [True, True, True]])
    observed = torch.ones(2, 3, 2, dtype=torch.bool)
    observed[1, 2, 0] = False
    x = torch.zeros(2, 3, 2)
    x[0, 1:], x[1, 2] = math.nan, math.nan

    def elbo(*given, emission=IndependentSteps):
        def model():
            with pyro.plate("sequences", 2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                step = dist.Normal(z[:, None, None].expand(2, 3, 2), 1.0, validate_args=True).to_event(1)
                pyro.sample("x", emission(step, *given), obs=x)

        def guide():
            with pyro.plate("sequences", 2):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        return elbo_terms(model, guide)

    for given_, count in (((), 6), ((mask,), 4), ((mask, observed), 3), ((mask, observed.all(-1)), 2)):
        with pytest.raises(ValueError, match=f"^site 'x': what is observed has {count} NaN"):
            elbo(*given_)
    with pytest.raises(ValueError, match="^site 'x': what is observed has 6 NaN"):
        elbo(emission=lambda step: step.to_event(1))
    assert elbo(mask, ~x.isnan()).elbo().isfinite().all()


def test_nan_under_a_mask_is_refused():
    """The term would be finite, and its gradient NaN."""
    loc = torch.zeros((), requires_grad=True)

    def model(x, emission):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", emission(x), obs=x)

    def guide(x, emission):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    def by_coordinate(x):
        return dist.Normal(loc.expand(x.shape), 1.0, validate_args=False).mask(~x.isnan()).to_event(x.ndim - 1)

    def by_step(x):
        return (
            dist.Normal(loc.expand(x.shape), 1.0, validate_args=False).to_event(1).mask(~x[..., 0].isnan()).to_event(1)
        )

    x = torch.tensor([[[1.0], [math.nan], [2.0]], [[math.nan], [1.0], [1.0]]])
    for emission in (by_coordinate, by_step):
        with pytest.raises(ValueError, match="'x': what is observed has NaN or infinity under a mask"):
            elbo_terms(model, guide, x, emission)
        with torch.no_grad():
            elbo_terms(model, guide, x, emission)
        elbo_terms(model, guide, x.nan_to_num(), emission)
    padded = torch.tensor([[[1.0], [math.nan]]])
    (gradient,) = torch.autograd.grad(elbo_terms(model, guide, padded, by_step).log_likelihood["x"].sum(), loc)
    exact(gradient, torch.tensor(1.0))


def test_holes_and_masks_beside_them_are_taken():
    """Under a mask of its own, an emission with holes is right, and what is not under a mask says so itself."""
    loc = torch.zeros(2, requires_grad=True)
    x, observed = torch.tensor([[1.0, math.nan], [2.0, 3.0]]), torch.tensor([[True, False], [True, True]])

    def term(emission, x=x):
        def model(x):
            with pyro.plate("sequences", 2):
                pyro.sample("z", dist.Normal(0.0, 1.0))
                emission(x)

        def guide(x):
            with pyro.plate("sequences", 2):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        return elbo_terms(model, guide, x).log_likelihood["x"]

    def holes_in(x):
        return IndependentSteps(dist.Normal(loc.unsqueeze(-1).expand(2, 2), 1.0, validate_args=False), None, observed)

    def outer(x, kept):
        pyro.sample("x", holes_in(x).mask(torch.tensor(kept)), obs=x)

    def handler(x, kept):
        with pyro.poutine.mask(mask=torch.tensor(kept)):
            pyro.sample("x", holes_in(x), obs=x)

    def switched_off(x):
        with pyro.poutine.mask(mask=False):
            step = dist.Normal(loc.unsqueeze(-1).expand(2, 2), 1.0, validate_args=False)
            pyro.sample("x", step.mask(observed).to_event(1), obs=x)

    for emission in (outer, handler):
        for kept, wanted in (([True, False], [1.0, 0.0]), ([False, True], [0.0, 5.0])):
            (gradient,) = torch.autograd.grad(term(functools.partial(emission, kept=kept)).sum(), loc)
            assert gradient.tolist() == wanted
    term(switched_off)

    def inner(x):
        step = dist.Normal(loc[:, None, None], 1.0, validate_args=False).expand((2, 2, 1))
        step = step.mask(~x.isnan().unsqueeze(-1)).to_event(1)
        pyro.sample("x", IndependentSteps(step), obs=x.unsqueeze(-1))

    def infinite(x):
        step = dist.Normal(loc.unsqueeze(-1).expand(2, 2), 1.0, validate_args=False)
        pyro.sample("x", step.mask(observed).to_event(1), obs=x.nan_to_num(math.inf))

    for emission in (inner, infinite):
        with pytest.raises(ValueError, match="NaN or infinity under a mask"):
            term(emission)


def test_a_latent_has_no_holes():
    def model(x):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", IndependentSteps(normal(torch.zeros(2, 3, 1), 1.0), None, torch.ones(2, 3) > 0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", IndependentSteps(normal(torch.zeros(2, 3, 1), 1.0)))

    with pytest.raises(ValueError, match="'z': is latent and has `observed`"):
        elbo_terms(model, guide, torch.zeros(2))


def test_nothing_to_fill_is_refused():
    network = Latent(0, 2)
    with pytest.raises(ValueError, match="num_samples: got 0"):
        impute(
            network.model, network.guide, torch.zeros(1, 3, 2).double(), observed=torch.ones(1, 3, 2) > 0, num_samples=0
        )
    with pytest.raises(ValueError, match="num_samples: got 3 with sample=False"):
        forecast(network.model, network.guide, torch.zeros(1, 3, 2).double(), num_steps=1, num_samples=3, sample=False)

    def summary(x=None, mask=None, observed=None, *, num_sequences=None, num_steps=None):
        with pyro.plate("sequences", 1):
            for name in "sdf":
                pyro.sample(name, dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("mean", dist.Normal(0.0, 1.0), obs=None if x is None else x.nanmean((1, 2)))

    with pytest.raises(
        ValueError, match=r"emission: got None, expected one of \[\], the model's emissions with event shape \(3, 2\)"
    ):
        impute(summary, network.guide, torch.zeros(1, 3, 2).double(), observed=torch.ones(1, 3, 2) > 0)


def test_what_cannot_be_filled_hole_by_hole_is_refused():
    x = torch.tensor([[[5.0, 1.0], [math.nan, 2.0], [5.0, 3.0]]])

    def guide(x, mask=None, observed=None):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def model_of(*emissions):
        def model(x=None, mask=None, observed=None, *, num_sequences=None, num_steps=None):
            with pyro.plate("sequences", 1):
                pyro.sample("z", dist.Normal(0.0, 1.0))
                for name, fn in zip("xy", emissions, strict=False):
                    pyro.sample(name, fn, obs=x)

        return model

    steps = IndependentSteps(normal(torch.zeros(1, 3, 2), 1.0))
    chain = MarkovChain(normal(torch.zeros(1, 2), 1.0), lambda z_prev: normal(z_prev, 1.0), 3)
    correlated = IndependentSteps(dist.MultivariateNormal(torch.zeros(1, 3, 2), torch.eye(2)))
    heavy = IndependentSteps(dist.Cauchy(torch.zeros(1, 3, 2), 1.0).to_event(1))
    by_coordinate, by_step = ~x.isnan(), ~x.isnan().any(-1)

    def views(x=None, mask=None, observed=None, *, num_sequences=None, num_steps=None):
        with pyro.plate("sequences", 1):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("views", 2, dim=-2):
                pyro.sample("x", IndependentSteps(normal(torch.zeros(2, 1, 3, 2), 1.0)))

    for how in ({}, {"num_samples": 2}):
        with pytest.raises(ValueError, match=r"emission: 'x' has batch shape .*, expected \("):
            impute(views, guide, x, observed=by_step, **how)
    for model, observed, message in (
        (model_of(chain), by_step, "emission: 'x' is a MarkovChain, expected IndependentSteps"),
        (model_of(correlated), by_coordinate, "emission: 'x' has steps whose coordinates depend on each other"),
        (model_of(steps, steps), by_step, r"emission: got None, expected one of \['x', 'y'\]"),
        (model_of(heavy), by_step, "num_samples: got None, expected a number of draws"),
    ):
        with pytest.raises(ValueError, match=message):
            impute(model, guide, x, observed=observed)
    assert impute(model_of(correlated), guide, x, observed=by_step).values[0, 1].tolist() == [0.0, 0.0]
    assert impute(model_of(steps, steps), guide, x, observed=by_step, emission="y").values.isfinite().all()
    assert impute(model_of(heavy), guide, x, observed=by_step, num_samples=2).values.isfinite().all()


def test_holes_are_refused_where_nobody_leaves_them_out():
    network, frames = Latent(0, 2), torch.zeros(1, 3, 2).double()
    observed = torch.ones(1, 3, 2, dtype=torch.bool)
    with pytest.raises(TypeError, match="observed: source and donor have one each"):
        swap(network.model, network.guide, frames, frames, sites=["s"], observed=observed)
    with pytest.raises(ValueError, match="args: frames have real steps that are not finite"):
        forecast(network.model, network.guide, torch.full_like(frames, math.nan), num_steps=1, num_samples=2)
    with pytest.raises(TypeError, match="args: got tuple, expected frames"):
        impute(network.model, network.guide, observed=observed, num_samples=2)

    class Odd(dist.TorchDistribution):
        has_rsample, arg_constraints = False, {}
        support = property(lambda self: (_ for _ in ()).throw(NotImplementedError))

        def log_prob(self, value):
            return value

    odd = IndependentSteps(Odd(torch.Size([1, 3]), validate_args=False), None, observed.all(-1))
    with pytest.raises(ValueError, match="observed: no value is known for which a Odd has a density"):
        odd.log_prob(torch.zeros(1, 3))
