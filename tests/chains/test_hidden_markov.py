"""The hidden Markov chain: evidence, filter, posterior and best path against all paths of classes, one by one."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Tensors, dimensions, lengths, mask_of, seeds
from torch.testing import assert_close

from seqdisent import HiddenMarkovChain, MarkovChain
from seqdisent.chains.forward_sums import forward_sums

near = functools.partial(assert_close, rtol=1e-8, atol=1e-8)
kinds = st.sampled_from(("one", "by sequence", "by step"))


class Classes:
    """A random chain of classes, a ragged batch of log-likelihoods, holes, and transitions that are forbidden."""

    def __init__(self, seed, row_lengths, num_classes, kind="one", has_holes=False, forbids=False):
        tensors = Tensors(seed)
        self.mask, self.lengths, self.num_classes = mask_of(row_lengths, 1), row_lengths, num_classes
        (num_sequences, self.num_steps), self.kind = self.mask.shape, kind
        shape = {"one": (), "by sequence": (num_sequences,), "by step": (num_sequences, self.num_steps)}[kind]
        self.initial = tensors.normal(num_sequences, num_classes)
        self.transition = tensors.normal(*shape, num_classes, num_classes)
        self.log_likelihoods = 3 * tensors.normal(num_sequences, self.num_steps, num_classes)
        if forbids:  # no class goes to the first one, which no sequence starts in
            self.transition[..., 0] = -math.inf
            self.initial[..., 0] = -math.inf
        if forbids and num_classes > 2:  # and the last one explains nothing at first
            self.log_likelihoods[:, 0, -1] = -math.inf
        self.observed = tensors.uniform(*self.mask.shape) < 0.6 if has_holes else None
        self.seen = self.mask if self.observed is None else self.mask & self.observed

    def chain(self, **changed):
        transition = self.transition
        if self.kind == "by step":  # neither the first step's nor padding's are read
            read = self.mask.clone()
            read[:, 0] = False
            transition = torch.where(read[..., None, None], transition, changed.pop("filler", math.nan))
        changed.pop("filler", None)
        return HiddenMarkovChain(self.initial, transition, self.num_steps, **{"mask": self.mask, **changed})

    def given(self, filler=math.nan):
        return torch.where(self.seen[..., None], self.log_likelihoods, filler), self.observed

    def rows(self, until=None):
        """Of each sequence: all paths, the log-probability of each with what was seen until a step, and the length."""
        for i, length in enumerate(self.lengths):
            length = min(length, until or length)
            moves = {"one": [self.transition] * length, "by sequence": [self.transition[i % len(self.transition)]] *
                     length, "by step": list(self.transition[i % len(self.transition), 1:])}[self.kind]  # fmt: skip
            seen = torch.where(self.seen[i, :length, None], self.log_likelihoods[i, :length], 0.0)
            initial, moves = self.initial[i].log_softmax(-1), [move.log_softmax(-1) for move in moves[: length - 1]]
            yield *reference.class_paths(initial, moves, seen), length


systems = st.builds(
    Classes, seeds(), lengths(4, 3), st.integers(2, 3), kinds, has_holes=st.booleans(), forbids=st.booleans()
)


@given(systems)
def test_the_evidence_is_the_sum_over_all_paths(system):
    found = system.chain().filter(*system.given()).log_evidence
    assert (found[~system.mask] == 0).all()
    for t in range(1, system.num_steps):
        for i, (_, joint, length) in enumerate(system.rows(t)):
            near(found[i, :length].sum(), joint.logsumexp(0))


@given(systems)
def test_filtered_and_smoothed_probabilities_are_those_of_all_paths(system):
    filtered, smoothed = system.chain().filter(*system.given()), system.chain().smooth(*system.given())
    for t in range(system.num_steps - 1):
        for i, (paths, joint, length) in enumerate(system.rows(t + 1)):
            if length == t + 1:
                wanted = reference.class_marginals(paths, joint.softmax(0), system.num_classes)
                near(filtered.log_probs[i, t].exp(), wanted[t])
    for i, (paths, joint, length) in enumerate(system.rows()):
        probs = joint.softmax(0)
        near(smoothed.probs[i, :length], reference.class_marginals(paths, probs, system.num_classes))
        near(smoothed.probs[i, length:], smoothed.probs[i, :1].expand(system.num_steps - length, -1))
        pairs = torch.zeros_like(smoothed.pair_probs[i])
        for path, prob in zip(paths, probs, strict=True):
            for t in range(length - 1):
                pairs[t, path[t], path[t + 1]] += prob
        near(smoothed.pair_probs[i], pairs)


@given(systems)
def test_the_posterior_is_the_exact_chain(system):
    posterior = system.chain().posterior(*system.given())
    assert isinstance(posterior, MarkovChain)
    near(posterior.mean_path(), system.chain().smooth(*system.given()).probs)
    for i, (paths, joint, length) in enumerate(system.rows()):
        for path, wanted in zip(paths, joint.log_softmax(0), strict=True):
            one_hot = torch.zeros(system.mask.shape + (system.num_classes,)).double()
            one_hot[..., 0] = 1.0
            one_hot[i, :length] = torch.eye(system.num_classes).double()[list(path)]
            near(posterior.log_prob(one_hot)[i], wanted)


@given(systems)
def test_the_best_path_is_the_best_of_all(system):
    found = system.chain().viterbi(*system.given())
    prior = system.chain().viterbi().argmax(-1)
    for i, (paths, joint, length) in enumerate(system.rows()):
        assert found[i, :length].argmax(-1).tolist() == list(paths[joint.argmax()])
        assert torch.equal(found[i, length:], found[i, :1].expand(system.num_steps - length, -1))
        system.seen = torch.zeros_like(system.mask)
        paths, joint, _ = list(system.rows())[i]
        assert prior[i, :length].tolist() == list(paths[joint.argmax()])
        system.seen = system.mask if system.observed is None else system.mask & system.observed


@given(systems)
def test_step_by_step_and_as_a_scan_the_sums_are_the_same(system):
    chain, found = system.chain(), []
    log_likelihoods = chain._counted(*system.given())
    for scan in (False, True):
        sums = forward_sums(chain._first, chain._moves, log_likelihoods, scan=scan)
        found.append([sums.predicted.exp(), sums.filtered.exp(), sums.log_evidence])
    for one, other in zip(*found, strict=True):
        near(one, other)


@given(systems, st.booleans(), st.sampled_from((math.nan, math.inf, -math.inf, 1e6)))
def test_gradients_are_those_of_all_paths_whatever_is_in_padding_and_holes(system, scan, filler):
    parameters = [system.initial, system.transition, system.log_likelihoods]
    for parameter in parameters:
        parameter.requires_grad_()
    chain = system.chain(filler=filler)
    log_likelihoods = chain._counted(*system.given(filler))
    evidence = forward_sums(chain._first, chain._moves, log_likelihoods, scan=scan).log_evidence
    found = torch.autograd.grad(evidence[system.mask].sum(), parameters, allow_unused=True)
    possible = sum(joint[joint > -math.inf].logsumexp(0) for _, joint, _ in system.rows())
    wanted = torch.autograd.grad(possible, parameters, allow_unused=True)
    for one, other, parameter in zip(found, wanted, parameters, strict=True):
        one, other = (torch.zeros_like(parameter) if g is None else g for g in (one, other))
        assert one.isfinite().all()
        allowed = parameter > -math.inf  # the loop's own gradient for log 0 is none
        near(one[allowed], other[allowed].nan_to_num())


@given(systems)
def test_smoothing_has_finite_gradients(system):
    parameters = [system.initial, system.transition, system.log_likelihoods]
    for parameter in parameters:
        parameter.requires_grad_()

    def gradients(filler):
        chain, given_ = system.chain(filler=filler), system.given(filler)
        smoothed = chain.smooth(*given_)
        posterior = chain.posterior(*given_)
        path = posterior.sample()
        total = smoothed.probs.square().sum() + smoothed.pair_probs.square().sum() + posterior.log_prob(path).sum()
        return torch.autograd.grad(total, parameters, allow_unused=True)

    for found, wanted in zip(*(same_noise(gradients, filler) for filler in (math.nan, 0.3)), strict=True):
        if wanted is not None:
            assert found.isfinite().all()
            near(found, wanted)


def same_noise(function, *args):
    torch.manual_seed(0)
    return function(*args)


def test_gradcheck_of_everything_that_is_differentiable():
    system = Classes(0, [3, 2], 3, "by step")
    inputs, real = [system.initial, system.transition, system.log_likelihoods], system.mask

    def everything(initial, transition, log_likelihoods):
        chain = HiddenMarkovChain(initial, transition, system.num_steps, mask=system.mask)
        filtered, smoothed = chain.filter(log_likelihoods), chain.smooth(log_likelihoods)
        return filtered.log_evidence, filtered.log_probs[real], smoothed.probs[real], chain.mean_path()[real]

    assert torch.autograd.gradcheck(everything, [value.requires_grad_() for value in inputs])


# As a chain ----------------------------------------------------------------------------------------------------------


@given(systems)
def test_as_a_chain_it_has_the_density_and_the_marginals_of_its_paths(system):
    system.seen = torch.zeros_like(system.mask)
    chain, eye = system.chain(), torch.eye(system.num_classes).double()
    for i, (paths, joint, length) in enumerate(system.rows()):
        near(chain.mean_path()[i, :length], reference.class_marginals(paths, joint.exp(), system.num_classes))
        for path, wanted in zip(paths, joint, strict=True):
            one_hot = eye[torch.zeros(system.mask.shape, dtype=torch.int64)]
            one_hot[i, :length] = eye[list(path)]
            near(chain.log_prob(one_hot)[i], wanted)  # -inf where a transition is forbidden
            near(chain.log_prob(one_hot.expand(2, *one_hot.shape))[1, i], wanted)


def test_draws_of_chain_and_posterior_have_their_marginals():
    """20,000 seeded paths: the share of each class at each step within 5 standard errors."""
    system = Classes(1, [4, 2], 3, "by step", has_holes=True)
    chain = system.chain()
    for drawn in (chain, chain.posterior(*system.given())):
        torch.manual_seed(0)
        paths = drawn.sample((20_000,))
        assert set(paths.sum(-1).unique().tolist()) == {1.0}
        probs = drawn.mean_path()
        assert ((paths.mean(0) - probs).abs() <= 5 * (probs * (1 - probs) / 20_000).sqrt()).all()


def test_it_goes_on_as_a_markov_chain():
    chain = HiddenMarkovChain(torch.zeros(2, 3), torch.eye(3).roll(1, 1).log(), 2)  # each class is followed by the next
    prefix = torch.eye(3)[torch.tensor([[0, 1], [2, 0]])]
    assert chain.extend(prefix, 3).argmax(-1).tolist() == [[0, 1, 2, 0, 1], [2, 0, 1, 2, 0]]
    assert chain.extend(prefix, 2, mask=mask_of([2, 1])).argmax(-1).tolist() == [[0, 1, 2, 0], [2, 0, 1, 2]]


def test_a_plate_of_particles_expands_it():
    for kind in ("one", "by sequence", "by step"):
        system = Classes(0, [3, 2], 2, kind)
        with pyro.plate("particles", 4, dim=-2), pyro.plate("sequences", 2):
            path = pyro.sample("k", system.chain())
        assert path.shape == (4, 2, 4, 2)
        near(system.chain().expand((4, 2)).log_prob(path), system.chain().log_prob(path))


@given(systems)
def test_particles_of_what_is_observed_are_taken_one_by_one(system):
    chain, (log_likelihoods, observed) = system.chain(), system.given()
    several = torch.stack([log_likelihoods, log_likelihoods.roll(1, -1)])
    if system.log_likelihoods.isinf().any():
        return  # rolled, some sequences are impossible
    for i in range(2):
        near(chain.filter(several, observed).log_evidence[i], chain.filter(several[i], observed).log_evidence)
        near(chain.smooth(several, observed).probs[i], chain.smooth(several[i], observed).probs)
        found, wanted = (chain.posterior(each, observed).mean_path() for each in (several, several[i]))
        near(found[i], wanted)
        assert torch.equal(chain.viterbi(several, observed)[i], chain.viterbi(several[i], observed))


# Online --------------------------------------------------------------------------------------------------------------


@given(systems)
def test_one_observation_at_a_time_is_the_batch_filter(system):
    chain, wanted = system.chain(mask=None, filler=0.0), system.chain().filter(*system.given())
    state = None
    log_likelihoods = torch.where(system.seen[..., None], system.log_likelihoods, 0.0)
    for t in range(system.num_steps):
        logits = system.transition[:, t] if system.kind == "by step" else None
        state = chain.filter_step(log_likelihoods[:, t], state=state, transition_logits=logits)
        real = system.mask[:, t]
        near(state.log_probs[real], wanted.log_probs[real, t])
        near(state.log_evidence[real], wanted.log_evidence[real, t])


def test_a_step_without_an_observation_is_a_forecast():
    system = Classes(0, [3, 3], 3)
    chain, (log_likelihoods, _) = system.chain(mask=None), system.given(0.0)
    state = chain.filter_step(None)
    near(state.log_probs, system.initial.log_softmax(-1))
    state = chain.filter_step(log_likelihoods[:, 0])
    forecast = chain.filter_step(None, state=state)
    near(forecast.log_probs.exp(), state.log_probs.exp() @ system.transition.softmax(-1))
    assert torch.equal(forecast.log_evidence, torch.zeros(2).double())


# Against Pyro --------------------------------------------------------------------------------------------------------


@given(seeds(), dimensions(4), st.integers(2, 4), st.integers(1, 6))
def test_the_evidence_and_its_gradient_are_those_of_pyros_hidden_markov_model(seed, rows, num_classes, num_steps):
    tensors = Tensors(seed)
    initial, transition = tensors.normal(rows, num_classes), tensors.normal(rows, num_steps, num_classes, num_classes)
    loc, x = tensors.normal(num_classes), tensors.normal(rows, num_steps)
    found = []
    parameters = [initial.requires_grad_(), transition.requires_grad_(), loc.requires_grad_()]
    # in Pyro the first transition is before the first observation, here there is none
    start = initial.log_softmax(-1)
    still = torch.eye(num_classes).double().log().clamp(min=-1e30).expand(rows, 1, -1, -1)
    moves = torch.cat([still, transition[:, 1:].log_softmax(-1)], 1)
    theirs = dist.DiscreteHMM(start, moves, dist.Normal(loc, 1.0), validate_args=False).log_prob(x)
    ours = HiddenMarkovChain(initial, transition, num_steps)
    ours = ours.filter(dist.Normal(loc, 1.0).log_prob(x.unsqueeze(-1))).log_evidence.sum(-1)
    near(ours, theirs)
    for each in (ours, theirs):
        found.append(torch.autograd.grad(each.sum(), parameters, allow_unused=True, retain_graph=True))
    for one, other in zip(*found, strict=True):
        near(torch.zeros(()) if one is None else one, torch.zeros(()) if other is None else other, check_dtype=False)


# Extremes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
def test_a_thousand_steps_of_very_unequal_likelihoods_in_single_precision(scan):
    """Thousands of nats between classes at each step, where sums in probability space would be 0."""
    tensors = Tensors(0)
    first, moves = tensors.normal(2, 4).log_softmax(-1), (5 * tensors.normal(2, 1, 4, 4)).log_softmax(-1)
    log_likelihoods = 1e3 * tensors.normal(2, 1000, 4)
    wanted = forward_sums(first, moves, log_likelihoods, scan=False)
    found = forward_sums(first.float(), moves.float(), log_likelihoods.float(), scan=scan)
    assert_close(found.log_evidence.double(), wanted.log_evidence, rtol=1e-4, atol=0.1)
    assert_close(found.filtered.exp().double(), wanted.filtered.exp(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_impossible_has_no_evidence_and_no_nan(scan):
    first, moves = torch.zeros(1, 2).log_softmax(-1).requires_grad_(), torch.eye(2)[None, None].log().clamp(min=-1e30)
    log_likelihoods = torch.tensor([[[0.0, -1e30], [-1e30, 0.0], [0.0, 0.0]]])
    sums = forward_sums(first, moves, log_likelihoods, scan=scan)
    assert sums.log_evidence[0].isinf().tolist() == [False, True, False]
    assert torch.autograd.grad(sums.log_evidence[0, 0], first)[0].isfinite().all()


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(()), torch.zeros(2, 2)), r"^initial_logits: has shape \(\), expected \(\*B, K\)"),
        ((torch.zeros(3, 2), torch.zeros(3, 3)), r"^transition_logits: has shape \(3, 3\), .* K=2 of"),
        ((torch.zeros(3, 2), torch.zeros(4, 2, 2)), r"^transition_logits: has shape \(4, 2, 2\), .* batch \(3,\)"),
        ((torch.zeros(3, 2), torch.zeros(3, 4, 2, 2)), r"^transition_logits: has shape \(3, 4, 2, 2\), .* T=5"),
        ((torch.full((3, 2), -math.inf), torch.zeros(2, 2)), "^initial_logits: a row is -inf throughout"),
        ((torch.zeros(3, 2), torch.full((2, 2), -math.inf)), "^transition_logits: a row is -inf throughout"),
    ],
)
def test_logits_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HiddenMarkovChain(*arguments, 5)


@pytest.mark.parametrize("method", ["filter", "smooth", "posterior", "viterbi"])
@pytest.mark.parametrize(
    ("log_likelihoods", "observed", "error", "message"),
    [
        (torch.zeros(2, 4, 3), None, ValueError, r"^log_likelihoods: has shape \(2, 4, 3\), expected \(\*B, 3, 3\)"),
        (torch.zeros(4, 3, 3), None, ValueError, r"^log_likelihoods: .* the chain's batch \(2,\)"),
        (torch.full((2, 3, 3), math.nan), None, ValueError, "^log_likelihoods: have NaN or inf, expected numbers"),
        (torch.full((2, 3, 3), math.inf), None, ValueError, "^log_likelihoods: have NaN or inf, expected numbers"),
        (torch.zeros(2, 3, 3), torch.ones(2, 3), TypeError, "^observed: got dtype"),
        (torch.zeros(2, 3, 3), torch.ones(2, 2) > 0, ValueError, r"^observed: has shape \(2, 2\), expected \(2, 3\)"),
        (
            torch.tensor([[[0.0] * 3] * 3, [[0.0] * 3, [-math.inf] * 3, [0.0] * 3]]), None, ValueError,
            r"^log_likelihoods: step 1 is impossible given those before \(sequence 1\): -inf along every path",
        ),
    ],
)  # fmt: skip
def test_likelihoods_that_do_not_fit_are_refused(method, log_likelihoods, observed, error, message):
    chain = HiddenMarkovChain(torch.zeros(2, 3), torch.zeros(3, 3), 3)
    with pytest.raises(error, match=message):
        getattr(chain, method)(log_likelihoods, observed)


def test_one_step_that_does_not_fit_is_refused():
    chain = HiddenMarkovChain(torch.zeros(2, 3), torch.zeros(2, 4, 3, 3), 4)
    state = chain.filter_step(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="^transition_logits: got None, expected those of this step"):
        chain.filter_step(torch.zeros(2, 3), state=state)
    with pytest.raises(ValueError, match=r"^transition_logits: has shape \(3, 2\), expected one that expands"):
        chain.filter_step(torch.zeros(2, 3), state=state, transition_logits=torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"^log_likelihoods: has shape \(2, 2\), expected \(\*B, 3\)"):
        chain.filter_step(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"^log_likelihoods: the observation is impossible .* \(sequence 0\)"):
        chain.filter_step(torch.full((2, 3), -math.inf))
