"""A chain that switches between regimes: against all paths of regimes, one by one, and as any other chain."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Tensors, dimensions, lengths, mask_of, padding, seeds
from torch.testing import assert_close

from seqdisent import IndependentSteps, MarkovChain, SwitchingChain, elbo_terms, forecast
from seqdisent.chains import Chain
from seqdisent.particles import filter, smooth

near = functools.partial(assert_close, rtol=1e-8, atol=1e-8)


class Regimes:
    """Random linear dynamics for each regime, recurrent or not, and a ragged batch of paths."""

    def __init__(self, seed, row_lengths, num_regimes, size, is_recurrent=False, has_inputs=False):
        tensors = Tensors(seed)
        self.mask, self.lengths = mask_of(row_lengths, 1), row_lengths
        rows, self.num_steps = self.mask.shape
        self.initial, self.transition = tensors.normal(num_regimes), 2 * tensors.normal(num_regimes, num_regimes)
        self.matrices, self.offsets = tensors.normal(num_regimes, size, size), tensors.normal(num_regimes, size)
        self.scale, self.starts = 0.5 + tensors.uniform(num_regimes, size), tensors.normal(num_regimes, size)
        self.boundary = 2 * tensors.normal(size, num_regimes) if is_recurrent else None
        self.inputs = tensors.normal(rows, self.num_steps, size) if has_inputs else None
        self.path = tensors.normal(rows, self.num_steps, size)

    def start(self):
        return dist.Normal(self.starts, self.scale).to_event(1)

    def step(self, z_prev, inputs=None):
        loc = (self.matrices @ z_prev[..., None, :, None]).squeeze(-1) + self.offsets
        loc = loc if inputs is None else loc + inputs.unsqueeze(-2)
        return dist.Normal(loc, self.scale).to_event(1)

    def logits(self, z_prev):
        return self.transition + (z_prev @ self.boundary).unsqueeze(-2)

    def chain(self, filler=math.nan, **changed):
        inputs = None if self.inputs is None else torch.where(self.mask[..., None], self.inputs, filler)
        options = {"inputs": inputs, "mask": self.mask, **changed}
        return SwitchingChain(
            self.start().expand((len(self.path), len(self.initial))), self.step, self.num_steps,
            initial_logits=self.initial, transition_logits=self.transition if self.boundary is None else self.logits,
            **options,
        )  # fmt: skip

    def joint(self, i, until):
        """All paths of regimes of a sequence up to a step, and the log-density of each with the path so far."""
        z, moves = self.path[i], []
        log_likelihoods = []
        for t in range(until):
            row = []
            for k in range(len(self.initial)):
                loc = self.starts[k]
                if t:
                    loc = self.matrices[k] @ z[t - 1] + self.offsets[k]
                    loc = loc if self.inputs is None else loc + self.inputs[i, t]
                row.append(reference.diagonal_normal_log_prob(z[t], loc, self.scale[k]))
            log_likelihoods.append(torch.stack(row))
            if t:
                logits = self.transition
                logits = logits if self.boundary is None else logits + z[t - 1] @ self.boundary
                moves.append(logits.log_softmax(-1))
        return reference.class_paths(self.initial.log_softmax(-1), moves, torch.stack(log_likelihoods))

    def parameters(self):
        parts = [self.initial, self.transition, self.matrices, self.offsets, self.scale, self.starts, self.path]
        return [p.requires_grad_() for p in (*parts, *(p for p in (self.boundary, self.inputs) if p is not None))]


systems = st.builds(Regimes, seeds(), lengths(3, 3), st.integers(1, 3), dimensions(2), st.booleans(), st.booleans())


@given(systems)
def test_the_density_is_the_sum_over_all_paths_of_regimes_step_by_step(system):
    chain = system.chain()
    assert isinstance(chain, Chain)
    per_step = chain.log_prob_per_step(system.path)
    near(chain.log_prob(system.path), per_step.sum(-1))
    assert (per_step[~system.mask] == 0).all()
    for i, length in enumerate(system.lengths):
        for t in range(length):
            near(per_step[i, : t + 1].sum(), system.joint(i, t + 1)[1].logsumexp(0))
    several = torch.stack([system.path, system.path + 1.0])
    near(chain.log_prob_per_step(several)[0], per_step)


@given(systems, padding())
def test_gradients_are_those_of_all_paths_whatever_is_in_padding(system, filler):
    parameters = system.parameters()
    path = torch.where(system.mask[..., None], system.path, filler)
    found = torch.autograd.grad(system.chain(filler).log_prob(path).sum(), parameters, allow_unused=True)
    total = sum(system.joint(i, length)[1].logsumexp(0) for i, length in enumerate(system.lengths))
    wanted = torch.autograd.grad(total, parameters, allow_unused=True)
    for one, other, parameter in zip(found, wanted, parameters, strict=True):
        near(*(torch.zeros_like(parameter) if g is None else g for g in (one, other)))


@given(systems)
def test_the_regimes_given_a_path_are_those_of_all_paths(system):
    regimes = system.chain().regimes(system.path)
    best = regimes.viterbi().argmax(-1)
    for i, length in enumerate(system.lengths):
        paths, joint = system.joint(i, length)
        wanted = reference.class_marginals(paths, joint.softmax(0), len(system.initial))
        near(regimes.mean_path()[i, :length], wanted)
        assert best[i, :length].tolist() == list(paths[joint.argmax()])


@given(systems)
def test_step_by_step_it_has_the_same_mixtures(system):
    chain, found, state = system.chain(), [], None
    for t in range(system.num_steps):
        conditional, state = chain.step(system.path[:, t - 1] if state else None, state)
        found.append(conditional.log_prob(system.path[:, t]))
        after = chain.state_after(system.path[:, : t + 1])
        near(after.carried[0].expand_as(state.carried[0]), state.carried[0])
    near(torch.stack(found, -1)[system.mask], chain.log_prob_per_step(system.path)[system.mask])


def test_draws_and_what_follows_a_path_have_the_density():
    """20,000 seeded paths: E[f(z)] of draws is the integral of the density over a grid, 5 standard errors."""
    system = Regimes(0, [2], 2, 1, is_recurrent=True)
    system.num_steps, system.path, system.mask = 2, system.path[:, :2], system.mask[:, :2]
    chain = system.chain()
    torch.manual_seed(0)
    drawn = chain.sample((20_000,))[:, 0, :, 0]
    grid = torch.linspace(-12, 12, 401).double()
    pairs = torch.cartesian_prod(grid, grid)
    density = chain.log_prob(pairs[:, None, :, None])[:, 0].exp() * (grid[1] - grid[0]) ** 2
    assert density.sum().item() == pytest.approx(1, abs=1e-4)
    for f in (lambda a, b: a * b, lambda a, b: b, lambda a, b: b**2, lambda a, b: (b - a).tanh()):
        values = f(*drawn.T)
        assert abs(values.mean() - (f(*pairs.T) * density).sum()) < 5 * values.std() / 20_000**0.5
    longer = chain.extend(system.path[:, :1].expand(20_000, 1, 1), 1)[:, 1, 0]
    conditional = chain.conditionals(system.path).steps
    assert abs(longer.mean() - conditional.mean[0, 0, 0]) < 5 * longer.std() / 20_000**0.5
    near(chain.extend(system.path[:, :1], 1, sample=False)[:, 1], conditional.mean[0])
    near(chain.mean_path()[:, 0], (system.initial.softmax(-1)[:, None] * system.starts).sum(0, keepdim=True))


def model_and_guide(system, drawn):
    """Programs whose prior is the chain of `system`; what the guide drew is noted."""

    def model(x=None, mask=None, *, num_sequences=None, num_steps=None):
        if x is None:
            system.num_steps = num_steps
        with pyro.plate("sequences", len(system.path)):
            z = pyro.sample("z", system.chain(mask=mask))
            drawn.append(z)
            step = dist.Normal(z, 0.5, validate_args=False).to_event(1)
            pyro.sample("x", IndependentSteps(step, mask), obs=x)

    def guide(x, mask=None):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", proposal(system, x, mask))

    return model, guide


def proposal(system, x, mask):
    start = dist.Normal(system.path[:, 0], 1.0).to_event(1)
    step = lambda z, u: dist.Normal(0.5 * z + u, 0.3).to_event(1)  # noqa: E731
    return MarkovChain(start, step, x.shape[1], inputs=x, mask=mask)


@given(seeds(), lengths(3, 3), st.booleans(), st.booleans())
def test_as_a_prior_its_term_is_the_difference_of_the_densities(seed, row_lengths, is_recurrent, vectorize):
    system, drawn = Regimes(seed, row_lengths, 2, 2, is_recurrent), []
    x = torch.where(system.mask[..., None], system.path, math.nan)
    terms = elbo_terms(*model_and_guide(system, drawn), x, system.mask, num_particles=2, vectorize_particles=vectorize)
    assert terms.monte_carlo == {"z"}
    z = drawn[-1] if vectorize else torch.stack(drawn)
    wanted = proposal(system, x, system.mask).log_prob_per_step(z) - system.chain().log_prob_per_step(z)
    near(terms.kl_per_step["z"], wanted)
    assert terms.elbo().isfinite().all()


@torch.no_grad()
def test_a_particle_filter_goes_on_with_the_regimes_of_the_particles_that_are_left():
    system = Regimes(0, [7, 5], 2, 1, is_recurrent=True, has_inputs=True)
    torch.manual_seed(1)
    x = system.chain().sample() + torch.randn_like(system.path)

    def guide(x):
        with pyro.plate("sequences", 2):
            pyro.sample("z", system.chain())

    def model(x):
        with pyro.plate("sequences", 2):
            z = pyro.sample("z", system.chain())
            pyro.sample("x", IndependentSteps(dist.Normal(z, 1.0).to_event(1), system.mask), obs=x)

    torch.manual_seed(0)
    wanted = filter(model, guide, x, num_particles=20_000, threshold=0).log_evidence
    found = torch.stack([filter(model, guide, x, num_particles=500).log_evidence for _ in range(20)])
    likely = found.logsumexp(0) - math.log(20)
    assert_close(likely, wanted, rtol=0, atol=0.15)
    with pytest.raises(ValueError, match="on whole sequences|each of whose steps depends on all"):
        smooth(filter(model, guide, x, num_particles=5), 1)


def test_a_forecast_goes_on_with_it():
    system = Regimes(0, [3, 3], 2, 2, is_recurrent=True)
    drawn, length = [], system.path.shape[1]
    found = forecast(*model_and_guide(system, drawn), system.path, num_steps=3, sample=False)["x"].mean
    z, chain = drawn[-1], system.chain(mask=None)
    near(found, z)
    _, state = chain.step()
    for t in range(1, length + 3):
        conditional, state = chain.step(z[:, t - 1], state)
        if t >= length:
            near(z[:, t], conditional.mean)


def test_a_plate_of_particles_expands_it():
    for is_recurrent in (False, True):
        system = Regimes(0, [3, 2], 2, 2, is_recurrent, has_inputs=True)
        larger = system.chain().expand((4, 2))
        path = larger.sample()
        assert path.shape == (4, 2, 4, 2)
        near(larger.log_prob(path), system.chain().log_prob(path))
    by_sequence = SwitchingChain(
        system.start().expand((2, 2)), system.step, 4, initial_logits=system.initial, mask=system.mask,
        transition_logits=torch.zeros(2, 2, 2).double(), inputs=torch.zeros(2, 4, 2).double(),
    )  # fmt: skip
    near(by_sequence.expand((4, 2)).log_prob(path), by_sequence.log_prob(path))


def normal(*batch_shape):
    return dist.Normal(torch.zeros(*batch_shape, 2), 1.0).to_event(1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"initial": normal()}, r"^initial: has batch shape \(\) and event shape \(2,\), expected batch \(\*B, K\)"),
        ({"initial": dist.Normal(torch.zeros(4, 3), 1.0)}, r"^initial: has batch shape \(4, 3\) and event shape \(\)"),
        ({"initial_logits": torch.zeros(2)}, r"^initial_logits: has shape \(2,\), expected one that expands to \(4, 3"),
        ({"transition_logits": torch.zeros(2, 2)}, r"^transition_logits: has shape \(2, 2\), .* K=3"),
        ({"transition_logits": lambda z: torch.zeros(2, 2)}, r"^transition_logits: the function returned shape \(2, 2"),
        ({"transition": lambda z: normal(*z.shape[:-1])}, r"^transition: returned batch \(4, 4\) and event \(2,\)"),
        ({"path": torch.zeros(4, 5, 3)}, r"^path: has shape \(4, 5, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    options = {
        "initial": normal(4, 3), "transition": lambda z: normal(*z.shape[:-1], 3), "path": torch.zeros(4, 5, 2),
        "initial_logits": torch.zeros(3), "transition_logits": torch.zeros(3, 3), **changed,
    }  # fmt: skip
    path = options.pop("path")
    with pytest.raises(ValueError, match=message):
        SwitchingChain(options.pop("initial"), options.pop("transition"), 5, **options).log_prob(path)
