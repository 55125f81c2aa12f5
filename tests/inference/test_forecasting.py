"""Futures under covariates of their own, and frames that are drawn and read back."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import normal
from strategies import Tensors, lengths, mask_of, padding, seeds
from torch import nn
from torch.testing import assert_close

from seqdisent import IndependentSteps, MarkovChain, RecurrentChain, feedback, forecast, generate, impute, reconstruct

exact = functools.partial(assert_close, rtol=1e-9, atol=1e-9)

# ---------------------------------------------------------------------------------------------------------------------
# Covariates of the steps to come
# ---------------------------------------------------------------------------------------------------------------------


class Driven:
    """z_t = A z_{t-1} + U c_t, x_t = C z_t + V c_t, and a guide whose z_t is W x_t + R c_t."""

    def __init__(self, seed):
        tensors = Tensors(seed)
        self.matrix, self.drive, self.decode = tensors.normal(2, 2), tensors.normal(2, 3), tensors.normal(2, 2)
        self.shift, self.encode, self.read = tensors.normal(2, 3), tensors.normal(2, 2), tensors.normal(2, 3)

    def model(self, x=None, mask=None, observed=None, covariates=None, *, num_sequences=None, num_steps=None):
        if x is not None:
            num_sequences, num_steps = x.shape[:2]

        def step(z_prev, c):
            return normal(z_prev @ self.matrix.T + c @ self.drive.T, 0.5)

        with pyro.plate("sequences", num_sequences):
            start = normal(torch.zeros(num_sequences, 2).double(), 1.0)
            z = pyro.sample("z", MarkovChain(start, step, num_steps, inputs=covariates, mask=mask))
            loc = z @ self.decode.T + covariates @ self.shift.T
            pyro.sample("x", IndependentSteps(normal(loc, 0.3), mask, observed), obs=x)

    def guide(self, x, mask=None, observed=None, covariates=None):
        assert covariates.shape[:2] == x.shape[:2]  # of the steps that were seen, and no others
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", IndependentSteps(normal(x @ self.encode.T + covariates @ self.read.T, 0.4), mask))

    def by_hand(self, x, past, future):
        """Continue one sequence (T, 2), a step at a time."""
        z = [self.encode @ x_t + self.read @ c for x_t, c in zip(x, past, strict=True)]
        for c in future:
            z.append(self.matrix @ z[-1] + self.drive @ c)
        return torch.stack([self.decode @ z_t + self.shift @ c for z_t, c in zip(z, [*past, *future], strict=True)])


@given(seeds(), lengths(4, 3), st.integers(1, 5), padding())
def test_the_future_of_each_row_follows_its_own_last_step(seed, row_lengths, more, filler):
    driven, tensors, mask = Driven(seed), Tensors(seed + 1), mask_of(row_lengths)
    x, past = tensors.normal(*mask.shape, 2), tensors.normal(*mask.shape, 3)
    future = tensors.normal(len(x), more, 3)
    x, past = (torch.where(mask.unsqueeze(-1), values, filler) for values in (x, past))
    how = {"num_steps": more, "sample": False, "future": {"covariates": future}}
    found = forecast(driven.model, driven.guide, x, mask, None, past, **how)["x"].mean
    assert found.shape == (len(x), mask.shape[1] + more, 2)
    assert found.isfinite().all()
    for i, length in enumerate(row_lengths):
        exact(found[i, : length + more], driven.by_hand(x[i, :length], past[i, :length], future[i]))


def test_futures_under_covariates_are_drawn_at_once():
    """20,000 futures of a sequence: mean and variance of the first step to come within 5 standard errors."""
    driven, tensors = Driven(0), Tensors(1)
    x, past, future = tensors.normal(2, 3, 2), tensors.normal(2, 3, 3), tensors.normal(2, 2, 3)
    torch.manual_seed(0)
    how = {"num_steps": 2, "num_samples": 20_000, "future": {"covariates": future}}
    drawn = forecast(driven.model, driven.guide, x, mask_of([3, 2]), None, past, **how)["x"].sample()
    assert drawn.shape == (20_000, 2, 5, 2)
    for i, length in enumerate([3, 2]):
        mean = driven.by_hand(x[i, :length], past[i, :length], future[i])[length]
        path = driven.decode @ driven.matrix
        spread = 0.16 * path @ path.T + 0.25 * driven.decode @ driven.decode.T + 0.09 * torch.eye(2).double()
        at = drawn[:, i, length]
        assert ((at.mean(0) - mean).abs() < 5 * (spread.diag() / 20_000).sqrt()).all()
        assert ((at.var(0) - spread.diag()).abs() < 5 * spread.diag() * math.sqrt(2 / 20_000)).all()


def test_a_future_changes_nothing_before_it():
    driven, tensors = Driven(0), Tensors(1)
    x, past = tensors.normal(2, 3, 2), tensors.normal(2, 3, 3)
    reconstructed = reconstruct(driven.model, driven.guide, x, covariates=past)["x"].mean
    for seed in (2, 3):
        future = {"covariates": Tensors(seed).normal(2, 2, 3)}
        ahead = forecast(driven.model, driven.guide, x, covariates=past, num_steps=2, sample=False, future=future)
        exact(ahead["x"].mean[:, :3], reconstructed)


PAST, X = torch.zeros(2, 3, 3).double(), torch.zeros(2, 3, 2).double()


@pytest.mark.parametrize(
    ("future", "inputs", "error", "message"),
    [
        ({"covariates": PAST[:, :1]}, {"covariates": PAST}, ValueError, r"'covariates' .*\(2, 1, 3\), .*\(2, 2, 3\)"),
        ({"covariates": PAST}, {"covariates": PAST}, ValueError, r"'covariates' .*\(2, 3, 3\), .*\(2, 2, 3\)"),
        ({"covariates": PAST[:, :2, :2]}, {"covariates": PAST}, ValueError, r"\(2, 2, 2\), expected \(2, 2, 3\)"),
        ({"covariates": PAST[:1, :2]}, {"covariates": PAST}, ValueError, r"\(1, 2, 3\), expected \(2, 2, 3\)"),
        ({"actions": PAST[:, :2]}, {"controls": PAST}, ValueError, r"got 'actions', expected .*\['controls'\]"),
        (
            {"covariates": PAST[:, :2].float()},
            {"covariates": PAST},
            ValueError,
            "torch.float32 on cpu, expected torch.float64",
        ),
        ({"covariates": PAST[:, :2]}, {}, ValueError, r"got 'covariates', expected some of \[\]"),
        ({"covariates": [1.0]}, {"covariates": PAST}, TypeError, "'covariates' is list, expected a tensor"),
        (PAST[:, :2], {"covariates": PAST}, TypeError, "got Tensor, expected {name: "),
    ],
)
def test_futures_that_are_refused(future, inputs, error, message):
    with pytest.raises(error, match="^future: .*" + message):
        forecast(Driven(0).model, Driven(0).guide, X, num_steps=2, future=future, **inputs)


def test_covariates_need_a_future_or_none_by_name():
    def model(x=None, mask=None, observed=None, covariates=None, *, num_sequences=None, num_steps=None):
        with pyro.plate("sequences", num_sequences):
            level = pyro.sample("level", dist.Normal(torch.zeros(num_sequences), 1.0))
            step = (level + covariates[:, 0]).unsqueeze(-1).expand(-1, num_steps)
            pyro.sample("x", dist.Normal(step, 0.1).to_event(1), obs=x)

    def guide(x, mask=None, observed=None, covariates=None):
        with pyro.plate("sequences", len(x)):
            pyro.sample("level", dist.Normal(x.mean(-1), 0.1))

    given = torch.ones(2, 1), None, None, torch.full((2, 3), 5.0)
    with pytest.raises(ValueError, match="^future: got no 'covariates', expected those of the steps to come"):
        forecast(model, guide, *given, num_steps=2)
    with pytest.raises(ValueError, match="^future: got no 'covariates'"):
        forecast(model, guide, *given, num_steps=2, future={})
    ahead = forecast(model, guide, *given, num_steps=2, sample=False, future={"covariates": None})["x"].mean
    assert torch.equal(ahead, torch.full((2, 3), 6.0))


def test_an_input_that_has_no_value_for_each_step_has_no_future():
    for wrong in (PAST[:, 0, :2], PAST[:1], PAST[:, :2]):
        with pytest.raises(ValueError, match=r"^covariates: has shape .*, expected \(2, 3, ...\), .*`future`"):
            forecast(Driven(0).model, Driven(0).guide, X, num_steps=1, covariates=wrong, future={"covariates": X})


# ---------------------------------------------------------------------------------------------------------------------
# Frames that are drawn and read back
# ---------------------------------------------------------------------------------------------------------------------


class Autoregressive:
    """x_t = 0.8 x_{t-1} + z_t + noise, z_t ~ N(0, b^2), in a network whose state is what it read: relu(x), relu(-x)."""

    a, b, s = 0.8, 0.5, 0.6

    def __init__(self, *, draws=True):
        self.draws = draws
        self.network = nn.RNN(1, 2, nonlinearity="relu", bias=False).double()
        with torch.no_grad():
            self.network.weight_ih_l0.copy_(torch.tensor([[1.0], [-1.0]]))
            self.network.weight_hh_l0.zero_()

    def loc(self, z, h):
        return z + self.a * (h[..., :1] - h[..., 1:])

    def model(self, x=None, mask=None, observed=None, *, num_sequences=None, num_steps=None, history=None):
        noise = None
        with pyro.plate("sequences", num_sequences):
            if self.draws:
                noise = normal(torch.zeros(num_steps, 1).double(), 1.0, 2)
                noise = pyro.sample("noise", noise, infer={"is_auxiliary": True})
            read = feedback(lambda z, h, e=0.0: self.loc(z, h) + self.s * e, history, noise=noise)
            start = normal(torch.zeros(num_sequences, 1).double(), self.b)
            chain = RecurrentChain(
                start, lambda z_prev, _: normal(torch.zeros_like(z_prev), self.b), num_steps,
                recurrence=self.network, inputs=read, reads_latent=False, mask=mask,
            )  # fmt: skip
            z = pyro.sample("z", chain)
            loc = self.loc(z, chain.states(z))
            drawn = loc + self.s * noise if self.draws else None
            pyro.sample("x", IndependentSteps(normal(loc, self.s), mask, observed, drawn), obs=x)

    def guide(self, x, mask=None, observed=None):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", IndependentSteps(normal(torch.full_like(x, 0.3), 0.1), mask))

    def variance(self, num_steps):
        """That of x_1 ... x_T, from x_0 = 0."""
        return torch.tensor([(self.b**2 + self.s**2) * sum(self.a ** (2 * k) for k in range(t + 1))
                             for t in range(num_steps)]).double()  # fmt: skip


def within(drawn, variance):
    """Whether draws (N, T) with mean 0 have these variances, within 5 standard errors."""
    return ((drawn.square().mean(0) - variance).abs() < 5 * variance * math.sqrt(2 / len(drawn))).all()


@torch.no_grad()
def test_generated_draws_have_the_variance_of_the_process():
    """20,000 sequences; with means fed back they have not."""
    process = Autoregressive()
    torch.manual_seed(0)
    how = {"num_sequences": 20_000, "num_steps": 6}
    drawn = generate(process.model, **how)["x"].sample().squeeze(-1)
    assert within(drawn, process.variance(6))
    means = generate(Autoregressive(draws=False).model, **how)["x"].sample().squeeze(-1)
    assert not within(means, process.variance(6))


@torch.no_grad()
@pytest.mark.parametrize("num_samples", [None, 7])
def test_the_draws_that_are_returned_were_read(num_samples):
    """Each step's mean is that given the very frame before it, and the frame is that mean and its noise."""
    process = Autoregressive()
    if num_samples is None:
        sites = generate(
            process.model, num_sequences=5, num_steps=4, emissions=["x"], given={"z": torch.zeros(5, 4, 1)}
        )
    else:
        x = Tensors(0).normal(5, 2, 1)
        guide = lambda x: pyro.sample("z", dist.Delta(torch.zeros(5, 2, 1).double(), event_dim=2))  # noqa: E731

        def alone(**options):
            process.b = 1e-12  # as good as no z
            process.model(**options)

        def in_plate(x):
            with pyro.plate("sequences", 5):
                guide(x)

        sites = forecast(alone, in_plate, x, num_steps=2, num_samples=num_samples, history=True)
    emission = sites["x"]
    frames = emission.sample()
    assert list(sites) == ["x"]
    assert frames.shape == (() if num_samples is None else (7,)) + (5, 4, 1)
    assert torch.equal(frames, emission.sample())
    read = frames if num_samples is None else torch.cat([x.expand(7, -1, -1, -1), frames[..., 2:, :]], -2)
    exact(emission.mean[..., 1:, :], process.a * read[..., :-1, :])
    assert torch.unique(frames).numel() == frames.numel()


@torch.no_grad()
def test_futures_have_the_variance_of_the_process():
    """20,000 futures from known frames, one of them of a shorter row."""
    process, x = Autoregressive(), Tensors(0).normal(2, 3, 1)
    torch.manual_seed(0)
    how = {"num_steps": 3, "num_samples": 20_000, "history": True}
    drawn = forecast(process.model, process.guide, x, mask_of([3, 2]), **how)["x"].sample().squeeze(-1)
    decay = process.a ** torch.arange(1, 4).double()
    for i, length in enumerate((3, 2)):
        future = drawn[:, i, length : length + 3] - decay * x[i, length - 1]
        assert within(future, process.variance(3))
        assert future.mean(0).abs().max() < 5 * (process.variance(3).max() / 20_000).sqrt()


@torch.no_grad()
def test_without_draws_the_mean_is_read():
    """As without noise: the path along the means, and its reconstruction."""
    x = Tensors(0).normal(2, 3, 1)
    process, other = Autoregressive(), Autoregressive(draws=False)
    for call in (
        lambda process: generate(process.model, num_sequences=2, num_steps=4, sample=False),
        lambda process: forecast(process.model, process.guide, x, num_steps=3, sample=False, history=True),
        lambda process: reconstruct(process.model, process.guide, x, history=True),
    ):
        exact(call(process)["x"].mean, call(other)["x"].mean)
        exact(call(process)["x"].sample(), call(other)["x"].mean)  # what was read


@torch.no_grad()
def test_draws_fill_holes_that_later_steps_have_read():
    """x_2 is missing: x_3's mean is given the frame that fills it."""
    process, x = Autoregressive(), Tensors(0).normal(3, 3, 1)
    observed = torch.tensor([True, False, True]).expand(3, 3)
    found = impute(process.model, process.guide, x, observed=observed, num_samples=5, history=True)
    assert torch.equal(found.values[..., ::2, :], x[:, ::2].expand(5, -1, -1, -1))
    z = found.distribution.mean[..., 2, :] - process.a * found.values[..., 1, :]
    assert ((z - 0.3).abs() < 0.6).all()  # z_3 ~ N(0.3, 0.01): the rest of the mean is the frame before
    assert found.values[..., 1, :].std(0).min() > 0.1


def test_one_draw_is_all_that_there_is():
    step = normal(torch.zeros(2, 3, 1), 1.0)
    steps = IndependentSteps(step, drawn=torch.arange(6.0).reshape(2, 3, 1))
    assert steps.rsample().flatten().tolist() == list(range(6))
    assert steps.expand([4, 2]).sample().shape == (4, 2, 3, 1)
    exact(steps.log_prob(torch.zeros(2, 3, 1)), step.to_event(1).log_prob(torch.zeros(2, 3, 1)))
    reparameterised = IndependentSteps(step, drawn=torch.ones(2, 3, 1, requires_grad=True))
    assert reparameterised.rsample().requires_grad
    assert not reparameterised.sample().requires_grad
    masked = IndependentSteps(step, mask_of([3, 1]), drawn=torch.arange(6.0).reshape(2, 3, 1))
    assert masked.sample()[1].flatten().tolist() == [3, 3, 3]
    for draw in (steps.sample, steps.rsample):
        with pytest.raises(ValueError, match=r"^sample_shape: got \(2,\), expected \(\)"):
            draw((2,))
    with pytest.raises(ValueError, match=r"^drawn: has shape \(2, 4, 1\)"):
        IndependentSteps(step, drawn=torch.zeros(2, 4, 1))
    with pytest.raises(ValueError, match="^noise: has 2 steps, expected at least 3"):
        feedback(lambda z, h, e: e, noise=torch.zeros(1, 2, 1))(torch.zeros(1, 1), torch.zeros(1, 1), 3)
