"""The linear-Gaussian chain: filter, smoother, posterior and evidence against dense Gaussians and a slow filter."""

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

from seqdisent import IndependentSteps, LinearGaussianChain, MarkovChain, elbo_terms
from seqdisent.chains import LinearEmission

near = functools.partial(assert_close, rtol=1e-8, atol=1e-8)
seen_by = st.sampled_from((None, "step", "coordinate"))


class System:
    """A random chain with a random linear emission, a ragged batch of observations, and holes in them.

    With a control, each step of each row has its own offset, NaN where it is not to be read.
    """

    def __init__(self, seed, row_lengths, latent_dim, frame_dim, by=None, controlled=False):
        tensors = Tensors(seed)
        self.mask, self.lengths = mask_of(row_lengths, 1), row_lengths
        num_sequences, self.num_steps = self.mask.shape
        self.loc, self.first_scale = tensors.normal(num_sequences, latent_dim), 0.3 + tensors.uniform(latent_dim)
        self.matrix, self.offset = 0.7 * tensors.normal(latent_dim, latent_dim), tensors.normal(latent_dim)
        self.scale = 0.3 + tensors.uniform(latent_dim)
        self.reading, self.noise = tensors.normal(frame_dim, latent_dim), 0.3 + tensors.uniform(frame_dim)
        self.shift, self.x = tensors.normal(frame_dim), tensors.normal(*self.mask.shape, frame_dim)
        if controlled:
            is_read = self.mask & (torch.arange(self.num_steps) > 0)
            self.offset = tensors.normal(*self.mask.shape, latent_dim).where(is_read.unsqueeze(-1), math.nan)
        shape = self.mask.shape if by == "step" else self.x.shape
        self.observed = None if by is None else tensors.uniform(*shape) < 0.6
        self.seen = self.mask.unsqueeze(-1).expand(self.x.shape)
        if by is not None:
            self.seen = self.seen & reference.by_coordinate(self.observed, self.x)

    def chain(self, **changed):
        options = {"offset": self.offset, "mask": self.mask, **changed}
        return LinearGaussianChain(self.loc, self.first_scale, self.matrix, self.scale, self.num_steps, **options)

    def offset_at(self, t):
        """The offset of a step, of which those in padding do not matter."""
        return self.offset[:, t].nan_to_num(0.3) if self.offset.ndim > 1 else self.offset

    def given(self, filler=math.nan, **changed):
        """The arguments of filter, smooth and posterior."""
        values = torch.where(self.seen, self.x, filler)
        emission = LinearEmission(self.reading, self.noise, self.shift)
        return {"values": values, "emission": emission, "observed": self.observed, **changed}

    def rows(self):
        """Of each sequence: the first step's moments, the later steps, the emission, and the frames, NaN in holes."""
        seen = (self.reading, self.shift, torch.diag(self.noise**2))
        for i, length in enumerate(self.lengths):
            frames = torch.where(self.seen, self.x, math.nan)[i, :length]
            offsets = self.offset.expand(len(self.lengths), self.num_steps, -1)[i, 1:length]
            steps = [(self.matrix, offset, torch.diag(self.scale**2)) for offset in offsets]
            yield self.loc[i], torch.diag(self.first_scale**2), steps, seen, frames


systems = st.builds(System, seeds(), lengths(4, 3), dimensions(3), dimensions(3), seen_by, st.booleans())


@given(systems)
def test_the_evidence_is_that_of_a_slow_filter(system):
    found = system.chain().filter(**system.given()).log_evidence
    for row, wanted in zip(found, system.rows(), strict=True):
        near(row.sum(), reference.kalman_log_evidence(*wanted))
    assert (found[~system.mask] == 0).all()
    for i, length in enumerate(system.lengths):  # step by step: what a shorter sequence has
        for t in range(1, length):
            mean, covariance, steps, emission, frames = list(system.rows())[i]
            near(found[i, :t].sum(), reference.kalman_log_evidence(mean, covariance, steps, emission, frames[:t]))


@given(systems)
def test_filtered_and_smoothed_moments_are_those_of_a_dense_gaussian(system):
    filtered, smoothed = (getattr(system.chain(), name)(**system.given()) for name in ("filter", "smooth"))
    size = system.loc.shape[-1]
    for i, (mean, covariance, steps, emission, frames) in enumerate(system.rows()):
        for t in range(len(frames)):
            for found, until in ((filtered, t + 1), (smoothed, len(frames))):
                dense = reference.dense_chain(*reference.posterior_chain(
                    mean, covariance, steps[: until - 1], emission, frames[:until]
                ))  # fmt: skip
                now = slice(t * size, (t + 1) * size)
                near(found.loc[i, t], dense[0][now])
                near(found.covariance[i, t], dense[1][now, now])


@given(systems)
def test_the_posterior_is_the_exact_chain(system):
    posterior = system.chain().posterior(**system.given())
    assert isinstance(posterior, MarkovChain)
    near(posterior.mean_path()[system.mask], system.chain().smooth(**system.given()).loc[system.mask])
    path = Tensors(0).normal(*posterior.batch_shape, *posterior.event_shape)
    found = posterior.log_prob(path)
    for i, (*prior, frames) in enumerate(system.rows()):
        mean, covariance = reference.dense_chain(*reference.posterior_chain(*prior, frames))
        near(found[i], reference.gaussian_log_prob(path[i, : len(frames)].flatten(), mean, covariance))


@given(systems)
def test_as_prior_and_guide_the_bound_is_the_evidence(system):
    def model(x):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", system.chain())
            step = dist.Normal(z @ system.reading.T + system.shift, system.noise).to_event(1)
            pyro.sample("x", IndependentSteps(step, system.mask, system.observed), obs=x)

    def guide(x):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", system.chain().posterior(**system.given()))

    x = system.given()["values"]
    wanted = system.chain().filter(**system.given()).log_evidence.sum(-1)
    terms = elbo_terms(model, guide, x, kl="monte-carlo")
    near(terms.elbo(), wanted)
    many = elbo_terms(model, guide, x, kl="monte-carlo", num_particles=3, vectorize_particles=True)
    near(many.log_likelihood["x"] - many.kl["z"], wanted.expand(3, -1))
    assert elbo_terms(model, guide, x).monte_carlo == frozenset()  # the KL has a closed form


@given(systems, padding())
def test_what_stands_in_padding_and_holes_reaches_no_value_and_no_gradient(system, filler):
    parameters = [system.loc, system.first_scale, system.matrix, system.scale, system.offset]
    parameters += [system.reading, system.noise, system.shift]
    for parameter in parameters:
        parameter.requires_grad_()

    def everything(filler):
        chain, given_ = system.chain(), system.given(filler)
        filtered, smoothed, posterior = chain.filter(**given_), chain.smooth(**given_), chain.posterior(**given_)
        found = [filtered.log_evidence, filtered.loc[system.mask], smoothed.covariance[system.mask]]
        found.append(posterior.log_prob(torch.zeros(posterior.shape()).double()))
        return [*found, *torch.autograd.grad(sum(part.sum() for part in found), parameters, allow_unused=True)]

    for found, wanted in zip(everything(filler), everything(0.3), strict=True):
        near(found, wanted)
        assert found.isfinite().all()


def test_observations_may_have_more_dimensions_on_the_left():
    """Particles of what is observed, as where a guide draws the codes."""
    system = System(3, [3, 2], 2, 2, "coordinate")
    given_ = system.given()
    several = torch.stack([given_["values"], given_["values"] + 1.0])
    for found, wanted in zip(
        (
            system.chain().filter(**{**given_, "values": several}),
            system.chain().smooth(**{**given_, "values": several}),
        ),
        (system.chain().filter(**given_), system.chain().smooth(**given_)),
        strict=True,
    ):
        assert found.loc.shape == (2, *wanted.loc.shape)
        near(found.loc[0], wanted.loc)
        assert (found.loc[1] - wanted.loc).abs().max() > 0.01
    posterior = system.chain().posterior(**{**given_, "values": several})
    near(posterior.mean_path()[0], system.chain().posterior(**given_).mean_path())


def test_a_forecast_is_a_hole_at_the_end():
    """The moments of the future: the last filtered ones, carried on by hand."""
    system = System(0, [3, 3], 2, 2)
    system.mask = None
    longer = system.chain(mask=None)
    observed = torch.tensor([[True] * 3 + [False]] * 2)
    found = longer.smooth(**system.given(observed=observed))
    filtered = longer.filter(**system.given(observed=observed))
    loc = filtered.loc[:, 2] @ system.matrix.T + system.offset
    near(found.loc[:, 3], loc)
    near(
        found.covariance[:, 3],
        system.matrix @ filtered.covariance[:, 2] @ system.matrix.T + torch.diag(system.scale**2),
    )


def test_samples_have_the_moments_of_the_chain():
    """20,000 seeded paths: means and covariances within 5 standard errors."""
    system = System(1, [3], 2, 1)
    chain = system.chain(mask=None)
    torch.manual_seed(0)
    paths = chain.rsample((20_000,))[:, 0].flatten(1)
    step = (system.matrix, system.offset, torch.diag(system.scale**2))
    mean, spread = reference.dense_chain(system.loc[0], torch.diag(system.first_scale**2), [step] * 3)
    assert ((paths.mean(0) - mean).abs() < 5 * (spread.diag() / 20_000).sqrt()).all()
    tolerance = 5 * ((spread.diag().outer(spread.diag()) + spread**2) / 20_000).sqrt()
    assert ((paths.T.cov(correction=0) - spread).abs() < tolerance).all()


def test_a_hundred_steps_in_single_precision_stay_near_double():
    """Little noise, nearly deterministic dynamics: the hardest case for the covariances."""
    system = System(2, [100, 60], 4, 3, "step")
    angle = torch.tensor(0.3).double()
    turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]]).double()
    system.matrix, system.scale = torch.block_diag(turn, turn.T), torch.full((4,), 1e-2).double()
    wanted = system.chain().filter(**system.given()), system.chain().smooth(**system.given())
    for name in ("loc", "first_scale", "matrix", "scale", "offset", "reading", "noise", "shift", "x"):
        setattr(system, name, getattr(system, name).float())
    found = system.chain().filter(**system.given()), system.chain().smooth(**system.given())
    assert_close(found[0].log_evidence.double(), wanted[0].log_evidence, rtol=1e-3, atol=1e-3)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a.loc[system.mask].double(), b.loc[system.mask], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"first_scale": torch.ones(3)}, "first_scale: last dimension is 3, expected the size of `loc`=2"),
        ({"scale": torch.ones(1)}, "scale: last dimension is 1, expected"),
        ({"offset": torch.ones(3)}, "offset: last dimension is 3, expected"),
        ({"offset": torch.ones(1, 3, 1)}, "offset: last dimension is 1, expected"),
        ({"offset": torch.ones(1, 2, 2)}, r"offset: has shape \(1, 2, 2\), expected one that expands to \(1, 3, 2\)"),
        ({"offset": torch.ones(2, 3, 2)}, r"offset: has shape \(2, 3, 2\), expected one that expands to \(1, 3, 2\)"),
        ({"matrix": torch.ones(2, 3)}, r"matrix: has shape \(2, 3\), expected \(2, 2\)"),
    ],
)
def test_sizes_that_differ_are_refused(changed, message):
    sizes = {"loc": torch.zeros(1, 2), "first_scale": torch.ones(2), "matrix": torch.eye(2), "scale": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        LinearGaussianChain(**{**sizes, **changed}, num_steps=3)


@pytest.mark.parametrize("method", ["filter", "smooth", "posterior"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"matrix": torch.ones(1, 3)}, ValueError, r"matrix: has shape \(1, 3\), expected \(X, 2\)"),
        ({"scale": torch.ones(2)}, ValueError, "scale: last dimension is 2, expected X=1"),
        ({"offset": torch.ones(2)}, ValueError, "offset: last dimension is 2, expected X=1"),
        ({"values": torch.zeros(1, 4, 1)}, ValueError, r"values: has shape \(1, 4, 1\), expected \(\*B, 3, 1\)"),
        (
            {"values": torch.full((1, 3, 1), math.nan)},
            ValueError,
            "^values: not all finite, expected numbers; what was",
        ),
        ({"observed": torch.ones(1, 3)}, TypeError, "observed: got dtype"),
        ({"observed": torch.ones(1, 2) > 0}, ValueError, r"observed: has shape \(1, 2\), expected \(1, 3\)"),
    ],
)
def test_observations_that_do_not_fit_are_refused(method, changed, error, message):
    chain = LinearGaussianChain(torch.zeros(1, 2), torch.ones(2), torch.eye(2), torch.ones(2), 3)
    given_ = {
        "values": torch.zeros(1, 3, 1),
        "observed": None,
        "matrix": torch.ones(1, 2),
        "scale": torch.ones(1),
        **changed,
    }
    emission = LinearEmission(given_["matrix"], given_["scale"], given_.get("offset"))
    with pytest.raises(error, match=message):
        getattr(chain, method)(given_["values"], emission, given_.get("observed"))


# One observation at a time -------------------------------------------------------------------------------------------


def filtered_online(chain, given_, system):
    """Every step by `filter_step`, each from the state that the one before returned."""
    found, state, observed = [], None, given_["observed"]
    for t in range(system.num_steps):
        now, offset = None if observed is None else observed[:, t], system.offset_at(t)
        state = chain.filter_step(given_["values"][:, t], given_["emission"], now, offset=offset, state=state)
        found.append(state)
    return found


@given(systems)
def test_one_observation_at_a_time_is_the_batch_filter(system):
    chain, given_ = system.chain(), system.given()
    if system.observed is None:  # the mask's part: a sequence that has ended is observed no more
        given_["observed"] = system.mask
    else:
        given_["observed"] = system.seen if system.observed.ndim == 3 else system.mask & system.observed
    one_step = LinearGaussianChain(
        system.loc, system.first_scale, system.matrix, system.scale, 1
    )  # neither the number of steps nor the mask is read, nor an offset where the step has its own
    wanted = chain.filter(**system.given())
    for found in (filtered_online(each, given_, system) for each in (chain, one_step)):
        for t, step in enumerate(found):
            real = system.mask[:, t] if system.offset.ndim > 1 else slice(None)  # what an offset is in padding is open
            near(step.loc[real], wanted.loc[real, t])
            near(step.covariance, wanted.covariance[:, t])
            near(step.log_evidence, wanted.log_evidence[:, t])


@given(systems)
def test_steps_without_an_observation_forecast_as_a_hole_at_the_end(system):
    """Three of them, after all that was observed, and one observation more."""
    given_, length = system.given(observed=system.seen), system.num_steps
    last = torch.ones_like(given_["values"][:, :1])
    values = torch.cat([given_["values"], last.expand(-1, 3, -1) * math.nan, last], 1)
    observed = torch.cat([system.seen, ~values[:, length:].isnan()], 1)
    if system.offset.ndim > 1:  # four steps more
        system.offset = torch.cat([system.offset.nan_to_num(0.3), Tensors(1).normal(*system.offset[:, :1].shape)], 1)
        system.offset = torch.cat([system.offset, system.offset[:, -1:].expand(-1, 3, -1)], 1)
    longer = LinearGaussianChain(
        system.loc, system.first_scale, system.matrix, system.scale, length + 4, offset=system.offset
    )
    wanted = longer.filter(values, given_["emission"], observed)
    state = filtered_online(longer, given_, system)[-1]
    for t in range(length, length + 4):
        values, offset = last[:, 0] if t == length + 3 else None, system.offset_at(t)
        state = longer.filter_step(values, given_["emission"], offset=offset, state=state)
        near(state.loc, wanted.loc[:, t])
        near(state.covariance, wanted.covariance[:, t])
        near(state.log_evidence, wanted.log_evidence[:, t])


@given(seed=seeds(), lengths=lengths(3, 4))
def test_a_control_of_the_emission_is_an_offset_of_each_step(seed, lengths):
    system = System(seed, lengths, 2, 3)
    control = Tensors(seed + 1).normal(*system.x.shape)
    shifted = LinearEmission(system.reading, system.noise, system.shift + control)
    emission = LinearEmission(system.reading, system.noise, system.shift)
    chain = system.chain()
    found, wanted = chain.filter(system.x + control, shifted), chain.filter(system.x, emission)
    for one, other in zip(found, wanted, strict=True):
        near(one, other)
    near(chain.smooth(system.x + control, shifted).loc, chain.smooth(system.x, emission).loc)


@given(systems)
def test_the_chain_itself_is_a_dense_gaussian(system):
    path = Tensors(0).normal(*system.chain().batch_shape, *system.chain().event_shape)
    for chain in (system.chain(), system.chain().expand([2, len(system.lengths)])):
        found = chain.log_prob(path)
        for i, (mean, covariance, steps, *_) in enumerate(system.rows()):
            mean, covariance = reference.dense_chain(mean, covariance, steps)
            wanted = reference.gaussian_log_prob(path[i, : 1 + len(steps)].flatten(), mean, covariance)
            near(found[..., i], wanted.expand(found.shape[:-1]))
            near(chain.mean_path()[..., i, : 1 + len(steps), :].flatten(-2), mean.expand(*found.shape[:-1], -1))


@pytest.mark.parametrize("shape", [(2, 3, 2), (3, 2), (1, 3, 2), (2, 1, 2)])
def test_an_offset_of_each_step_may_lack_dimensions_on_the_left(shape):
    system = System(0, [3, 3], 2, 2)
    system.num_steps, system.mask, system.x, system.seen = 3, None, system.x[:, :3], system.seen[:, :3]
    offset = Tensors(1).normal(*shape)
    found = system.chain(offset=offset).smooth(**system.given())
    near(found.loc, system.chain(offset=offset.expand(2, 3, 2).clone()).smooth(**system.given()).loc)


def test_an_offset_of_all_steps_is_the_same_at_each():
    system = System(0, [3, 2], 2, 2, "coordinate")
    of_each = system.offset.expand(*system.mask.shape, -1)
    for found, wanted in zip(
        (system.chain(offset=of_each).filter(**system.given()), system.chain(offset=of_each).smooth(**system.given())),
        (system.chain().filter(**system.given()), system.chain().smooth(**system.given())),
        strict=True,
    ):
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)


def test_a_control_moves_a_forecast():
    """Two futures of the same past: their means differ by what the control does, carried on by the dynamics."""
    system = System(0, [3, 3], 2, 2)
    control = torch.zeros(2, 5, 2).double()
    control[1, 3] = torch.tensor([1.0, -2.0])
    chain = LinearGaussianChain(system.loc[:1].expand(2, -1), system.first_scale, system.matrix, system.scale, 5,
                                offset=system.offset + control)  # fmt: skip
    values = system.x[:1, :3].expand(2, -1, -1)
    values = torch.cat([values, torch.zeros(2, 2, 2).double()], 1)
    loc = chain.smooth(values, system.given()["emission"], torch.tensor([[True] * 3 + [False] * 2] * 2)).loc
    near(loc[1, :3], loc[0, :3])
    near(loc[1, 3] - loc[0, 3], control[1, 3])
    near(loc[1, 4] - loc[0, 4], system.matrix @ control[1, 3])
    near(chain.extend(values[:, :3], 2, sample=False)[1, 4] - chain.extend(values[:, :3], 2, sample=False)[0, 4],
         system.matrix @ control[1, 3])  # fmt: skip


def test_the_first_step_may_be_without_an_observation():
    system = System(0, [3, 3], 2, 2)
    state = system.chain().filter_step(None, system.given()["emission"])
    near(state.loc, system.loc)
    near(state.covariance, torch.diag(system.first_scale**2).expand(2, 2, 2))
    assert torch.equal(state.log_evidence, torch.zeros(2).double())


def test_one_sequence_without_a_batch_is_filtered_too():
    system = System(0, [3], 2, 2, "step")
    given_ = system.given()
    chain = LinearGaussianChain(system.loc[0], system.first_scale, system.matrix, system.scale, 4, offset=system.offset)
    wanted = chain.filter(given_["values"][0], given_["emission"], given_["observed"][0])
    state = None
    for t in range(4):
        state = chain.filter_step(given_["values"][0, t], given_["emission"], given_["observed"][0, t], state=state)
        near(state.loc, wanted.loc[t])
        near(state.log_evidence, wanted.log_evidence[t])


def test_particles_of_one_observation_are_filtered_too():
    system = System(3, [3, 2], 2, 2)
    given_, state = system.given(observed=system.mask), None
    several = torch.stack([given_["values"], given_["values"] + 1.0])
    wanted = system.chain(mask=None).filter(several, given_["emission"], system.mask)
    for t in range(system.num_steps):
        seen = system.mask[:, t].expand(2, -1)
        state = system.chain().filter_step(several[:, :, t], given_["emission"], seen, state=state)
        near(state.loc, wanted.loc[:, :, t])
        near(state.log_evidence, wanted.log_evidence[:, :, t])
    forecast = system.chain().filter_step(None, given_["emission"], state=state)
    near(forecast.loc, state.loc @ system.matrix.T + system.offset)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"emission": LinearEmission(torch.ones(1, 3), torch.ones(1))}, ValueError, r"^matrix: has shape \(1, 3\)"),
        ({"values": torch.zeros(2, 3)}, ValueError, r"^values: has shape \(2, 3\), expected \(\*B, 1\)"),
        ({"values": torch.zeros(3, 1)}, ValueError, r"^values: has shape \(3, 1\), .* the chain's batch \(2,\)"),
        ({"values": torch.full((2, 1), math.inf)}, ValueError, "^values: not all finite, expected numbers; what was"),
        ({"observed": torch.ones(2)}, TypeError, "^observed: got dtype"),
        ({"observed": False}, TypeError, "^observed: got bool, expected a bool tensor"),
        ({"observed": torch.ones(3) > 0}, ValueError, r"^observed: has shape \(3,\), expected \(2,\) or \(2, 1\)"),
        (
            {"offset": torch.ones(3, 2), "later": True},
            ValueError,
            r"^offset: has shape \(3, 2\), expected one that expan",
        ),
        ({"offset": torch.ones(2, 1)}, ValueError, "^offset: last dimension is 1, expected the size of `loc`=2"),
        ({"by_step": True, "later": True}, ValueError, r"^offset: got None, expected \(\*B, D\) of this step"),
        ({"several": True}, ValueError, r"^state.loc: has shape \(2, 3, 2\), expected one that expands to \(2, 2\)"),
    ],
)
def test_one_observation_that_does_not_fit_is_refused(changed, error, message):
    given_ = {"emission": LinearEmission(torch.ones(1, 2), torch.ones(1)), "values": torch.zeros(2, 1), **changed}
    offset = torch.zeros(3, 2) if given_.pop("by_step", False) else None
    chain = LinearGaussianChain(torch.zeros(2, 2), torch.ones(2), torch.eye(2), torch.ones(2), 3, offset=offset)
    if given_.pop("later", False):
        given_["state"] = chain.filter_step(None, given_["emission"])
    if given_.pop("several", False):  # all steps of a batch, where a state is one step
        given_["state"] = chain.filter(torch.zeros(2, 3, 1), given_["emission"])
    with pytest.raises(error, match=message):
        chain.filter_step(**given_)
