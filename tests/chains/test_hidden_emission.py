"""What hidden classes emit, with the classes summed out: the sum over all paths, its draws, and the ledger's term."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer import TraceEnum_ELBO, config_enumerate
from strategies import Tensors, dimensions, lengths, mask_of, padding, seeds
from torch.testing import assert_close

from seqdisent import HiddenMarkovChain, HiddenMarkovEmission, elbo_terms
from seqdisent.chains import Chain

near = functools.partial(assert_close, rtol=1e-8, atol=1e-8)
seen_by = st.sampled_from((None, "step", "coordinate"))


class Emitted:
    """A random chain of classes that emit Normals, and a ragged batch of what they emitted, with holes."""

    def __init__(self, seed, row_lengths, num_classes, size, by=None):
        tensors = Tensors(seed)
        self.mask, self.lengths = mask_of(row_lengths, 1), row_lengths
        self.initial, self.transition = (
            tensors.normal(len(row_lengths), num_classes),
            tensors.normal(*[num_classes] * 2),
        )
        self.loc, self.scale = 2 * tensors.normal(num_classes, size), 0.5 + tensors.uniform(num_classes, size)
        self.x = 2 * tensors.normal(*self.mask.shape, size)
        shape = self.mask.shape if by == "step" else self.x.shape
        self.observed = None if by is None else tensors.uniform(*shape) < 0.6
        self.seen = self.mask.unsqueeze(-1).expand(self.x.shape)
        if by is not None:
            self.seen = self.seen & reference.by_coordinate(self.observed, self.x)

    def chain(self):
        return HiddenMarkovChain(self.initial, self.transition, self.mask.shape[1], mask=self.mask)

    def emission(self):
        return HiddenMarkovEmission(self.chain(), dist.Normal(self.loc, self.scale).to_event(1), self.observed)

    def given(self, filler=math.nan):
        return torch.where(self.seen, self.x, filler)

    def joint(self, i, until):
        """All paths of a sequence up to a step, and the log-probability of each with what was seen."""
        log_likelihoods = self.x.new_zeros(until, len(self.loc))
        for t in range(until):
            for k in range(len(self.loc)):
                for d in range(self.x.shape[-1]):
                    if self.seen[i, t, d]:
                        error = (self.x[i, t, d] - self.loc[k, d]) / self.scale[k, d]
                        log_density = -(error**2) / 2 - self.scale[k, d].log() - math.log(2 * math.pi) / 2
                        log_likelihoods[t, k] = log_likelihoods[t, k] + log_density
        moves = [self.transition.log_softmax(-1)] * (until - 1)
        return reference.class_paths(self.initial[i].log_softmax(-1), moves, log_likelihoods)


systems = st.builds(Emitted, seeds(), lengths(3, 3), st.integers(2, 3), dimensions(3), seen_by)


@given(systems)
def test_the_density_is_the_sum_over_all_paths_step_by_step(system):
    emission = system.emission()
    assert isinstance(emission, Chain)
    per_step = emission.log_prob_per_step(system.given())
    near(emission.log_prob(system.given()), per_step.sum(-1))
    assert (per_step[~system.seen.any(-1)] == 0).all()
    for i, length in enumerate(system.lengths):
        for t in range(length):
            near(per_step[i, : t + 1].sum(), system.joint(i, t + 1)[1].logsumexp(0))
    several = torch.stack([system.given(), system.given() + 1.0])
    near(emission.log_prob_per_step(several)[0], per_step)


@given(systems, padding())
def test_gradients_are_those_of_all_paths_whatever_is_in_padding_and_holes(system, filler):
    parameters = [system.initial, system.transition, system.loc, system.scale]
    for parameter in parameters:
        parameter.requires_grad_()
    found = torch.autograd.grad(system.emission().log_prob(system.given(filler)).sum(), parameters, allow_unused=True)
    total = sum(system.joint(i, length)[1].logsumexp(0) for i, length in enumerate(system.lengths))
    wanted = torch.autograd.grad(total, parameters, allow_unused=True)
    for one, other, parameter in zip(found, wanted, parameters, strict=True):
        near(*(torch.zeros_like(parameter) if g is None else g for g in (one, other)))


@given(systems)
def test_the_posterior_is_that_of_all_paths(system):
    posterior = system.emission().posterior(system.given())
    for i, length in enumerate(system.lengths):
        paths, joint = system.joint(i, length)
        wanted = reference.class_marginals(paths, joint.softmax(0), len(system.loc))
        near(posterior.mean_path()[i, :length], wanted)


def program(system):
    def model(x):
        with pyro.plate("sequences", len(x)):
            pyro.sample("x", system.emission(), obs=x)

    return model


def nothing(x):
    """Guide: there is no latent."""


@given(systems)
def test_the_ledger_has_the_evidence_by_step(system):
    terms = elbo_terms(program(system), nothing, system.given())
    near(terms.elbo(), system.emission().log_prob(system.given()))
    near(terms.log_likelihood_per_step["x"], system.emission().log_prob_per_step(system.given()))
    assert torch.equal(terms.real_steps["x"], system.seen.any(-1) if system.observed is not None else system.mask)


def test_the_bound_is_that_of_pyros_enumeration():
    system = Emitted(0, [4, 4, 4], 3, 2)
    system.mask = torch.ones(3, 4) > 0
    x = system.x[:, :4]

    @config_enumerate
    def looped(x):
        with pyro.plate("sequences", len(x), dim=-1):
            k = pyro.sample("k_0", dist.Categorical(logits=system.initial))
            for t in range(4):
                if t:
                    k = pyro.sample(f"k_{t}", dist.Categorical(logits=system.transition[k]))
                pyro.sample(f"x_{t}", dist.Normal(system.loc[k], system.scale[k]).to_event(1), obs=x[:, t])

    wanted = TraceEnum_ELBO(max_plate_nesting=1).loss(looped, nothing, x)
    near(elbo_terms(program(system), nothing, x).elbo().sum(), torch.tensor(-wanted).double(), rtol=1e-5)


def test_draws_have_the_moments_of_the_mixture():
    """20,000 seeded draws: the mean of each step within 5 standard errors, padding repeats the first step."""
    system = Emitted(2, [3, 1], 3, 2)
    torch.manual_seed(0)
    emission = system.emission()
    drawn = emission.sample((20_000,))
    error = 5 * drawn.std(0) / 20_000**0.5
    assert ((drawn.mean(0) - emission.mean_path()).abs() < error).all()
    assert torch.equal(drawn[:, 1, 1:], drawn[:, 1, :1].expand(-1, 3, -1))
    # neighbouring steps share classes: E[x_1 x_2] is that of the pairs of classes
    first, moves = system.initial[0].softmax(-1), system.transition.softmax(-1)
    wanted = torch.einsum("i,ij,id,jd->d", first, moves, system.loc, system.loc)
    product = drawn[:, 0, 0] * drawn[:, 0, 1]
    assert ((product.mean(0) - wanted).abs() < 5 * product.std(0) / 20_000**0.5).all()


@pytest.mark.parametrize("by", ["step", "coordinate"])
@pytest.mark.parametrize("filler", [0.0, 100.0, math.nan])
def test_a_forecast_does_not_read_what_was_not_measured(by, filler):
    made = Emitted(3, [6, 4, 5], 3, 2, by)
    count, length, size = made.x.shape
    seen = made.seen if by == "coordinate" else made.seen.any(-1)
    chain = HiddenMarkovChain(made.initial, made.transition, length + 2)
    step = dist.Normal(made.loc, made.scale).to_event(1)
    emission = HiddenMarkovEmission(chain, step, torch.cat([seen, seen.new_zeros(count, 2, *seen.shape[2:])], 1))
    found = emission.extend(made.given(filler), 2, sample=False)[:, length:]
    holes = torch.cat([made.given(), made.x.new_full((count, 2, size), math.nan)], 1)
    near(found, emission.posterior(holes).mean_path()[:, length:] @ made.loc)  # a forecast is a hole at the end


def test_a_step_without_a_class_is_refused():
    chain = HiddenMarkovChain(torch.zeros(1, 3), torch.zeros(3, 3), 4)
    with pytest.raises(ValueError, match=r"^step: has batch shape \(\), expected one that ends in K=3"):
        HiddenMarkovEmission(chain, dist.Normal(torch.zeros(2), 1.0).to_event(1))


def test_a_forecast_follows_the_posterior():
    system = Emitted(0, [4], 2, 1)
    system.mask = torch.ones(1, 5) > 0
    emission = system.emission()
    found = emission.extend(system.x[:, :3], 2, sample=False)
    filtered = emission.chain.filter(emission.log_likelihoods(system.x)).log_probs[:, 2].exp()
    for t in (3, 4):
        filtered = filtered @ system.transition.softmax(-1)
        near(found[:, t], filtered @ system.loc)
    assert torch.equal(found[:, :3], system.x[:, :3])
    ragged = emission.extend(system.x[:, :3], 2, mask=torch.tensor([[True, False, False]]), sample=False)
    probs = emission.chain.filter(emission.log_likelihoods(system.x)).log_probs[:, 0].exp()
    near(ragged[:, 1], probs @ system.transition.softmax(-1) @ system.loc)
    torch.manual_seed(0)
    drawn = torch.stack([emission.extend(system.x[:, :3], 2) for _ in range(2_000)])
    error = 5 * drawn[:, :, 3:].std(0) / 2_000**0.5
    assert ((drawn.mean(0) - found)[:, 3:].abs() < error).all()


def test_it_expands_and_takes_pictures_and_classes():
    system = Emitted(0, [3, 2], 2, 2, "coordinate")
    larger = system.emission().expand((4, 2))
    assert larger.batch_shape == (4, 2)
    near(larger.log_prob(system.given()), system.emission().log_prob(system.given()).expand(4, 2))
    assert larger.sample().shape == (4, 2, 4, 2)
    pictures = HiddenMarkovEmission(system.chain(), dist.Bernoulli(logits=torch.zeros(2, 1, 3, 3)).to_event(3))
    assert pictures.mean_path().shape == pictures.sample().shape == (2, 4, 1, 3, 3)
    assert_close(pictures.log_prob(pictures.sample()).float(), torch.tensor([3, 2]) * 9 * torch.tensor(0.5).log())
    numbers = HiddenMarkovEmission(system.chain(), dist.Poisson(torch.ones(2).double()))
    near(numbers.log_prob(torch.zeros(2, 4).double()), torch.tensor([-3.0, -2.0]).double())


@pytest.mark.parametrize(
    ("step", "observed", "error", "message"),
    [
        (dist.Normal(torch.zeros(2, 1), 1.0).to_event(1), None, ValueError, r"^step: has batch shape \(2,\), expected"),
        (dist.Normal(torch.zeros(3, 1), 1.0).to_event(1), torch.ones(2, 4), TypeError, "^observed: got dtype"),
        (
            dist.MultivariateNormal(torch.zeros(3, 2), torch.eye(2)), torch.ones(2, 4, 2) > 0, ValueError,
            r"^observed: has shape \(2, 4, 2\), expected \(2, 4\): by coordinate needs",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(step, observed, error, message):
    with pytest.raises(error, match=message):
        HiddenMarkovEmission(HiddenMarkovChain(torch.zeros(2, 3), torch.zeros(3, 3), 4), step, observed)


def test_values_and_lengths_that_do_not_fit_are_refused():
    emission = Emitted(0, [3, 2], 2, 2).emission()
    with pytest.raises(ValueError, match=r"^path: has shape \(2, 4, 3\)"):
        emission.log_prob(torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="^num_steps: the distribution has 4 steps, expected 5"):
        emission.extend(torch.zeros(2, 3, 2), 2)
    with pytest.raises(NotImplementedError, match="^conditionals: the classes are summed out"):
        emission.conditionals(torch.zeros(2, 4, 2))
