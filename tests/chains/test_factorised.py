"""IndependentSteps: a loop over steps, padding that changes nothing, and what counts as a trajectory."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from models import LinearChain, normal
from strategies import Tensors, batch_shapes, mask_of, masks, num_steps, padding, seeds
from torch.testing import assert_close

from seqdisent import IndependentSteps, MarkovChain, elbo_terms
from seqdisent.chains import Chain
from seqdisent.chains.factorised import as_chain

exact = functools.partial(assert_close, rtol=1e-9, atol=1e-9)

FAMILIES = {
    "normals": lambda x: normal(x, 0.3 + x.abs()),
    "bernoullis of pictures": lambda x: dist.Bernoulli(logits=x.unsqueeze(-1).expand(*x.shape, 3)).to_event(2),
    "dense": lambda x: dist.MultivariateNormal(x, scale_tril=torch.eye(2, dtype=x.dtype)),
    "numbers": lambda x: dist.Laplace(x[..., 0], 1.0),
}


@pytest.mark.parametrize("family", FAMILIES)
@given(seed=seeds(), mask=masks(largest=4, max_rows=3), content=padding(), sample_shape=batch_shapes(1, 2))
def test_it_is_a_loop_over_real_steps(family, seed, mask, content, sample_shape):
    x = Tensors(seed).normal(*mask.shape, 2).requires_grad_()

    def made():
        return IndependentSteps(FAMILIES[family](x), mask)

    steps = made()
    torch.manual_seed(seed)
    drawn = steps.sample(sample_shape)
    event_dims = drawn.ndim - len(sample_shape) - 2
    real = mask.reshape(mask.shape + (1,) * event_dims)
    first = drawn.narrow(len(sample_shape) + 1, 0, 1)
    assert torch.equal(drawn, torch.where(real, drawn, first))  # padding repeats the first step
    results = []
    for filling in (0.5, content):
        value = torch.where(real, drawn, filling).requires_grad_()
        per_step = made().log_prob_per_step(value)
        results.append((per_step, *torch.autograd.grad(per_step.sum(), [x, value])))
    for clean, padded in zip(*results, strict=True):
        assert torch.equal(clean, padded)
    per_step, gradient, _ = results[1]
    exact(steps.log_prob(drawn), per_step.sum(-1))
    assert (per_step[..., ~mask] == 0).all()
    assert (gradient[~mask] == 0).all()
    for b, t in mask.nonzero().tolist():
        one = FAMILIES[family](x[b, t])
        for index in [()] if not sample_shape else [(i,) for i in range(*sample_shape)]:
            exact(per_step[(*index, b, t)], one.log_prob(drawn[(*index, b, t)]))


def test_a_step_for_all_is_that_of_each():
    x = Tensors(0).normal(3, 4, 2)
    one = IndependentSteps(normal(x[:, :1], 1.0), mask_of([4, 2, 3]))
    exact(one.log_prob(x), IndependentSteps(normal(x[:, :1].expand(3, 4, 2), 1.0), mask_of([4, 2, 3])).log_prob(x))


def test_moments_support_and_plates_are_those_of_the_steps():
    loc = Tensors(0).normal(3, 4, 2)
    steps = IndependentSteps(normal(loc, 0.5), mask_of([4, 2, 3]))
    assert torch.equal(steps.mean, loc)
    exact(steps.variance, torch.full((3, 4, 2), 0.25, dtype=torch.float64))
    assert steps.support.check(loc).shape == (3,)
    with pyro.plate("particles", 5, dim=-2), pyro.plate("sequences", 3):
        assert pyro.sample("x", steps).shape == (5, 3, 4, 2)
    assert steps.expand((5, 3)).step_mask.shape == (5, 3, 4)
    assert steps.has_rsample
    assert not IndependentSteps(dist.Poisson(loc.exp()).to_event(1)).has_rsample


def test_a_subclass_stays_one_with_a_larger_batch():
    class Named(IndependentSteps):
        pass

    assert type(Named(normal(torch.zeros(3, 4, 2), 1.0)).expand((5, 3))) is Named


@pytest.mark.parametrize(
    ("step", "mask", "message"),
    [
        (normal(torch.zeros(2), 1.0), None, "^step: "),
        (normal(torch.zeros(3, 4, 2), 1.0), torch.ones(3, 3, dtype=torch.bool), "^mask: .*T=4"),
        (normal(torch.zeros(1, 2, 2), 1.0), torch.tensor([[False, True]]), "^mask: .*first step"),
    ],
)
def test_arguments_that_are_refused(step, mask, message):
    with pytest.raises(ValueError, match=message):
        IndependentSteps(step, mask)


@given(seeds(), batch_shapes(2, 3), num_steps(), batch_shapes(1, 3))
def test_it_is_a_chain_that_ignores_the_step_before(seed, batch_shape, steps, sample_shape):
    tensors = Tensors(seed)
    loc, scale = tensors.normal(*batch_shape, steps, 2), 0.3 + tensors.uniform(*batch_shape, steps, 2)
    chain = IndependentSteps(normal(loc, scale, 1))
    assert isinstance(chain, Chain)
    assert chain.step_mask is None
    path = tensors.normal(*sample_shape, *batch_shape, steps, 2)
    exact(chain.log_prob_per_step(path), normal(loc, scale, 1).log_prob(path))
    initial, later = chain.conditionals(path)
    exact(chain.conditionals(path).log_prob_per_step(path), chain.log_prob_per_step(path))
    exact(initial.mean, loc[..., 0, :])
    if steps == 1:
        assert later is None
    else:
        assert later.batch_shape == (steps - 1, *sample_shape, *batch_shape)
    exact(chain.mean_path(), loc)


@given(seeds(), masks(largest=4, max_rows=3), padding())
def test_its_steps_may_be_masked_and_then_it_is_a_masked_chain(seed, mask, content):
    tensors = Tensors(seed)
    loc, path = (tensors.normal(*mask.shape, 2) for _ in range(2))
    path[~mask] = content
    chain = as_chain(normal(loc, 0.5).mask(mask).to_event(1))
    assert (chain.step_mask == mask).all()
    found = chain.log_prob_per_step(path)
    exact(found[mask], normal(loc, 0.5).log_prob(path)[mask])
    assert (found[~mask] == 0).all()


def test_a_masked_normal_and_a_masked_chain_can_be_compared():
    loc, mask = Tensors(0).normal(2, 3, 2), mask_of([3, 1])

    def kl_per_step(mask):
        def model():
            with pyro.plate("sequences", 2):
                z = pyro.sample(
                    "z", MarkovChain(normal(0 * loc[:, 0], 1.0), lambda z: normal(z / 2, 1.0), 3, mask=mask)
                )
                pyro.sample("x", normal(z[:, 0], 1.0), obs=loc[:, 0])

        def guide():
            with pyro.plate("sequences", 2):
                step = normal(loc, 0.5)
                pyro.sample("z", (step if mask is None else step.mask(mask)).to_event(1))

        torch.manual_seed(1)
        terms = elbo_terms(model, guide)
        assert terms.monte_carlo == frozenset()
        return terms.kl_per_step["z"]

    exact(kl_per_step(mask), torch.where(mask, kl_per_step(None), 0.0))


def test_it_continues_with_its_own_steps():
    tensors = Tensors(0)
    loc, mask = tensors.normal(2, 5, 2), mask_of([1, 3])
    chain = IndependentSteps(normal(loc, 0.5))
    prefix = tensors.normal(2, 3, 2)
    extended = chain.extend(prefix, 2, sample=False)
    exact(extended, torch.cat([prefix, loc[:, 3:]], 1))
    ragged = chain.extend(prefix, 2, mask=mask, sample=False)
    exact(ragged[0], torch.cat([prefix[0, :1], loc[0, 1:]]))
    exact(ragged[1], extended[1])
    drawn = chain.extend(prefix.expand(4, 2, 3, 2), 2)
    exact(drawn[..., :3, :], prefix.expand(4, 2, 3, 2))
    assert len(drawn[:, 0, 4, 0].unique()) == 4  # every sample has its own noise
    with pytest.raises(ValueError, match="^num_steps: "):
        chain.extend(prefix, 3)


def test_what_counts_as_a_chain():
    parts = LinearChain(0, (3,), 4, 2)
    chain = parts.chain()
    assert as_chain(chain) is chain
    assert as_chain(chain.mask(torch.tensor(True))) is chain
    assert as_chain(normal(torch.zeros(3, 4, 2), 1.0, 1)) is None  # steps in the batch
    of_sequences = normal(torch.zeros(3, 4, 2), 1.0, 0).mask(torch.ones(3, 4, 2, dtype=torch.bool)).to_event(2)
    assert as_chain(of_sequences) is None  # a mask of coordinates
    twice = normal(torch.zeros(3, 4, 2), 1.0).mask(torch.ones(4).bool()).mask(torch.ones(3, 1).bool()).to_event(1)
    assert as_chain(twice).step_mask.all()
    assert as_chain(normal(torch.zeros(3, 4, 2), 1.0, 2)) is None  # as many rows as steps, but nothing says so
    vector = normal(torch.zeros(3, 4), 1.0, 0).mask(torch.ones(3, 4, dtype=torch.bool)).to_event(1)
    assert as_chain(vector) is None  # a mask of coordinates
    assert as_chain(dist.Laplace(torch.zeros(3, 4, 2), 1.0).to_event(2)) is None
    assert as_chain(dist.MultivariateNormal(torch.zeros(3, 4, 2), torch.eye(2)).to_event(1)) is None


def test_a_class_with_the_protocol_is_a_chain():
    class Mine:
        step_mask = None

        def conditionals(self, path): ...
        def log_prob_per_step(self, path): ...
        def mean_path(self): ...
        def extend(self, prefix, num_steps, *, mask=None, sample=True): ...

    mine = Mine()
    assert as_chain(mine) is mine


def test_steps_without_rsample_continue_too():
    steps = IndependentSteps(dist.Poisson(torch.full((2, 5, 1), 3.0)).to_event(1))
    assert steps.extend(torch.ones(2, 3, 1), 2).shape == (2, 5, 1)
