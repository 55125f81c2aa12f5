"""Frames, mask, observed and covariates by position; a swap whose sides have holes and covariates of their own."""

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
from models import normal
from strategies import Tensors, mask_of, num_steps, seeds
from torch.testing import assert_close

from seqdisent import IndependentSteps, elbo_terms, forecast, impute, infer, reconstruct, swap

exact = functools.partial(assert_close, rtol=1e-9, atol=1e-9)
near = functools.partial(assert_close, rtol=1e-8, atol=1e-8)
NOISE = 0.6  # standard deviation of what is seen
NAMES = ("mask", "observed", "covariates")


class Level:
    """A level s ~ N(0, 1) and free steps z_t ~ N(c_t, 1), seen as x_t = (s, z_t + 2 c_t) + noise, all by coordinate."""

    @staticmethod
    def model(x=None, mask=None, observed=None, covariates=None, *, num_sequences=None, num_steps=None):
        if x is not None:
            num_sequences, num_steps = x.shape[:2]
        shift = torch.zeros(num_sequences, num_steps, 1).double() if covariates is None else covariates
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", normal(torch.zeros(num_sequences, 1).double(), 1.0))
            z = pyro.sample("z", IndependentSteps(normal(shift, 1.0), mask))
            level = s.unsqueeze(-2).expand(*s.shape[:-1], num_steps, 1)
            step = normal(torch.cat([level, z + 2 * shift], -1), NOISE)
            pyro.sample("x", IndependentSteps(step, mask, observed), obs=x)

    @staticmethod
    def guide(x, mask=None, observed=None, covariates=None):
        """The exact posterior."""
        known = torch.ones_like(x).bool() if observed is None else reference.by_coordinate(observed, x)
        known = known if mask is None else known & mask.unsqueeze(-1)
        shift = torch.zeros(*x.shape[:2], 1).double() if covariates is None else covariates
        if mask is not None:
            shift = torch.where(mask.unsqueeze(-1), shift, 0.0)
        x = torch.where(known, x, 0.0)
        count = known[..., 0].double().sum(1, keepdim=True)
        precision = 1 + known[..., 1:].double() / NOISE**2
        with pyro.plate("sequences", len(x)):
            loc, scale = x[..., 0].sum(1, keepdim=True) / (count + NOISE**2), (1 + count / NOISE**2) ** -0.5
            pyro.sample("s", normal(loc, scale))
            seen = torch.where(known[..., 1:], x[..., 1:] - 2 * shift, 0.0)
            pyro.sample("z", IndependentSteps(normal((shift + seen / NOISE**2) / precision, precision**-0.5), mask))


def dense_posterior(x, covariates):
    """Return E[s] and E[z] (T, 1) of one sequence x (T, 2), by Gaussian conditioning on what is not NaN."""
    length = len(x)
    prior = torch.cat([torch.zeros(1).double(), covariates[:, 0]])
    decode, offset = torch.zeros(length, 2, length + 1).double(), torch.zeros(length, 2).double()
    for t in range(length):
        decode[t, 0, 0] = decode[t, 1, t + 1] = 1
        offset[t, 1] = 2 * covariates[t, 0]
    seen = ~x.isnan().flatten()
    decode, rest = decode.flatten(0, 1)[seen], (x - offset).flatten()[seen]
    spread = decode @ decode.T + NOISE**2 * torch.eye(len(rest)).double()
    mean = prior + decode.T @ torch.linalg.solve(spread, rest - decode @ prior)
    return mean[:1], mean[1:, None]


def sequences(seed, row_lengths, by="coordinate"):
    """Return frames with NaN in holes and padding, mask, observed and covariates."""
    tensors, mask = Tensors(seed), mask_of(row_lengths)
    x, covariates = tensors.normal(*mask.shape, 2), tensors.normal(*mask.shape, 1)
    observed = tensors.uniform(*(x.shape if by == "coordinate" else mask.shape)) < 0.6
    known = reference.by_coordinate(observed, x) & mask.unsqueeze(-1)
    return torch.where(known, x, math.nan), mask, observed, covariates


@pytest.mark.parametrize("present", list(itertools.product((False, True), repeat=3)), ids=str)
def test_what_comes_by_position_is_what_comes_by_name(present):
    """A batch as it is, None where it lacks something, trailing parts left out or not."""
    x, *rest = sequences(0, [4, 2, 3])
    x = torch.where(rest[1], x.nan_to_num(0.3), math.nan) if present[1] else x.nan_to_num(0.3)
    rest = [part if there else None for part, there in zip(rest, present, strict=True)]
    named = {name: part for name, part in zip(NAMES, rest, strict=True) if part is not None}
    shorter = list(rest)
    while shorter and shorter[-1] is None:
        shorter.pop()
    model, guide = Level.model, Level.guide
    future = {"future": {"covariates": torch.ones(3, 2, 1).double()}} if present[2] else {}
    ahead = functools.partial(forecast, model, guide, num_steps=2, sample=False, **future)
    for given_ in (rest, shorter):
        for site, found in infer(guide, x, *given_).items():
            exact(found.value, infer(guide, x, **named)[site].value)
        exact(reconstruct(model, guide, x, *given_)["x"].mean, reconstruct(model, guide, x, **named)["x"].mean)
        exact(ahead(x, *given_)["x"].mean, ahead(x, **named)["x"].mean)
        if present[1]:
            exact(impute(model, guide, x, *given_).values, impute(model, guide, x, **named).values)
        for one, other in zip(terms_of(x, *given_), terms_of(x, **named), strict=True):
            exact(one, other)


def terms_of(*args, **options):
    torch.manual_seed(1)
    terms = elbo_terms(Level.model, Level.guide, *args, **options)
    return [term.value for term in terms.terms.values()]


def test_what_is_none_needs_no_argument():
    """Programs without `observed` take a batch without holes."""

    def model(x=None, mask=None, *, covariates=None, num_sequences=None, num_steps=None):
        Level.model(x, mask, None, covariates, num_sequences=num_sequences, num_steps=num_steps)

    def guide(x, mask=None, *, covariates=None):
        Level.guide(x, mask, None, covariates)

    x, mask, _, covariates = sequences(0, [3, 2])
    x = x.nan_to_num(0.3)
    wanted = reconstruct(Level.model, Level.guide, x, mask, covariates=covariates)["x"].mean
    exact(reconstruct(model, guide, x, mask, None, covariates)["x"].mean, wanted)
    exact(reconstruct(model, guide, x, mask, covariates=covariates, observed=None)["x"].mean, wanted)


def test_infer_hands_on_arguments_as_they_are():
    """A guide may have a third argument of its own, as it may in training."""
    guide = lambda x, mask, scale: pyro.sample("s", dist.Normal(x.sum() * scale, 1.0))  # noqa: E731
    assert infer(guide, torch.ones(2, 3), None, 0.5)["s"].value == 3


@pytest.mark.parametrize(
    ("sites", "keep"), [(["z"], []), (["s"], []), (["s", "z"], []), (["z"], ["s"]), (["s"], ["z"])], ids="+".join
)
@given(seed=seeds(), data=st.data(), by=st.sampled_from(("step", "coordinate")))
def test_a_swap_with_holes_is_that_of_the_exact_posteriors(sites, keep, seed, data, by):
    """Holes and covariates of either side; the model reads the covariates of the side that gives the length."""
    lengths_of = st.lists(num_steps(4), min_size=2, max_size=2)
    of_source, of_donor = data.draw(lengths_of, "source"), data.draw(lengths_of, "donor")
    source, donor = sequences(seed, of_source, by), sequences(seed + 1, of_donor, by)
    found = swap(Level.model, Level.guide, source, donor, sites=sites, keep=keep)["x"]
    lengths = of_donor if "z" in sites else of_source
    for i, length in enumerate(lengths):
        rows = {
            name: (x[i, : lengths_[i]], covariates[i, : lengths_[i]])
            for name, (x, _, _, covariates), lengths_ in (("source", source, of_source), ("donor", donor, of_donor))
        }
        posteriors = {name: dense_posterior(*row) for name, row in rows.items()}
        s = posteriors["donor" if "s" in sites else "source"][0]
        leader = "donor" if "z" in sites else "source"
        z, covariates = posteriors[leader][1], rows[leader][1]
        near(found.mean[i, :length], torch.cat([s.expand(length, 1), z + 2 * covariates], -1))
    observed = (donor if "z" in sites else source)[2]
    assert torch.equal(found.observed, observed)


def test_what_both_sides_share_comes_by_name():
    x, mask, _, covariates = sequences(0, [3, 3])
    x = x.nan_to_num(0.3)
    one = swap(Level.model, Level.guide, x, x.flip(0), sites=["z"], covariates=covariates)["x"].mean
    side = (x, None, None, covariates), (x.flip(0), mask, None, covariates)
    exact(one, swap(Level.model, Level.guide, *side, sites=["z"])["x"].mean)
    exact(one, swap(Level.model, Level.guide, *side, sites=["z"], mask=None, observed=None)["x"].mean)


X = torch.zeros(2, 3, 2).double()
ALL = torch.ones(2, 3).bool()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *args, **named: reconstruct(Level.model, Level.guide, *args, **named), "args"),
        (lambda *args, **named: forecast(Level.model, Level.guide, *args, num_steps=1, **named), "args"),
        (lambda *args, **named: impute(Level.model, Level.guide, *args, **named), "args"),
        (lambda *args, **named: swap(Level.model, Level.guide, args, X, sites=["z"], **named), "source"),
    ],
)
def test_arguments_that_are_refused(call, message):
    with pytest.raises(TypeError, match=rf"^{message}: got 5 arguments, expected at most four"):
        call(X, ALL, ALL, X, X)
    with pytest.raises(TypeError, match="^covariates: got one by position and one by name"):
        call(X, ALL, ALL, X[..., :1], covariates=X[..., :1])
    for name in ("mask", "observed"):
        with pytest.raises(TypeError, match=f"^{name}: "):
            call(X, ALL, ALL, **{name: ALL})


def test_to_impute_takes_what_was_observed():
    with pytest.raises(TypeError, match="^observed: got None"):
        impute(Level.model, Level.guide, X)
    exact(impute(Level.model, Level.guide, X, ALL, observed=ALL).values, X)
