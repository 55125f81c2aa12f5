"""Fuzzing: random programs and chains against loops over one sequence and one step at a time, and against Pyro.

`HYPOTHESIS_PROFILE=thorough` draws thousands of them; docs/reliability.md says how many were run.
"""

import copy
import functools
import itertools

import pyro
import pytest
import reference
import torch
from by_hand import ByHand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import normal
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from random_programs import NUM_INPUTS, conditional_of, factors, random_programs
from strategies import Tensors, batch_shapes, dimensions, mask_of, num_steps, padding, seeds
from torch.testing import assert_close

from seqdisent import MarkovChain, RecurrentChain, elbo_terms, forecast, generate, infer, reconstruct, swap

exact = functools.partial(assert_close, rtol=1e-8, atol=1e-8)
# a program is dozens of draws, which hypothesis counts as large; that is what is wanted here
fuzzing = settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
)


def seeded(function, *args, **kwargs):
    torch.manual_seed(0)
    return function(*args, **kwargs)


def arguments(program, filling):
    """Return frames, mask and inputs, with `filling` in all padding."""
    if program.mask is None:
        return program.frames, None, program.inputs
    mask = program.mask.reshape(*program.mask.shape, *(1,) * (program.frames.ndim - 2))
    padded = torch.arange(program.inputs.shape[1]) >= torch.tensor(program.lengths)[:, None]
    inputs = torch.where(padded.unsqueeze(-1), filling, program.inputs)
    return torch.where(mask, program.frames, filling), program.mask, inputs


def gradients(value, parameters):
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# The ledger
# ---------------------------------------------------------------------------------------------------------------------


@fuzzing
@given(
    random_programs(), st.sampled_from(("analytic", "monte-carlo")), st.integers(1, 3), st.booleans(), padding(),
    st.floats(0, 2),
)  # fmt: skip
def test_the_ledger_of_a_random_program_is_the_one_worked_out_by_hand(
    program, kl, num_particles, vectorised, filling, weight
):
    """Every term of every sequence, every step of a trajectory, the bound, its gradients; padding holds anything."""
    frames, mask, inputs = arguments(program, filling)
    parameters = [*program.parameters(), frames]
    for parameter in parameters:
        parameter.requires_grad_()
    drawn = []

    def guide(*args, **options):
        trace = poutine.trace(program.guide).get_trace(*args, **options)
        drawn.append({name: trace.nodes[name]["value"] for name in program.model_order})

    run = functools.partial(elbo_terms, program.model, guide, frames, mask, inputs=inputs)
    particles = {"num_particles": num_particles, "vectorize_particles": vectorised}
    terms = seeded(run, kl=kl, **particles)
    one_alone = num_particles == 1 and not vectorised
    program.frames, hand = frames, ByHand(program)

    if vectorised:  # one run has them all
        drawn = [{name: value[k] for name, value in drawn[-1].items()} for k in range(num_particles)]
    ledgers = [hand.ledger(values, analytic=kl == "analytic") for values in drawn[-num_particles:]]
    found = {**terms.log_likelihood, **terms.kl}
    assert list(terms.log_likelihood) == program.observed
    assert list(terms.kl) == program.model_order
    assert terms.monte_carlo == set(program.model_order) - (hand.closed_forms() if kl == "analytic" else set())
    assert set(terms.kl_per_step) == {name for name in program.model_order if program.is_trajectory(name)}
    for k, (totals, per_step) in enumerate(ledgers):
        for name, total in totals.items():
            exact(found[name] if one_alone else found[name][k], total)
        for name, steps in per_step.items():
            exact(terms.kl_per_step[name] if one_alone else terms.kl_per_step[name][k], steps)

    def by_hand(weights):
        signed = [
            (1 if name in program.observed else -1) * weights.get(name, 1.0) * total.sum()
            for totals, _ in ledgers
            for name, total in totals.items()
        ]
        return sum(signed) / num_particles

    weights = {program.model_order[0]: weight, "x": 2 * weight}
    assert terms.elbo().shape == (len(program.lengths),)
    exact(terms.elbo().sum(), by_hand({}))
    exact(terms.elbo(weights).sum(), by_hand(weights))
    for ours, theirs in zip(gradients(terms.elbo().sum(), parameters), gradients(by_hand({}), parameters), strict=True):
        exact(ours, theirs)

    if kl == "monte-carlo":
        elbo = Trace_ELBO(max_plate_nesting=program.num_plates, **particles)
        loss = seeded(elbo.differentiable_loss, program.model, program.guide, frames, mask, inputs=inputs)
        exact(terms.elbo().sum(), -loss)
        for ours, theirs in zip(gradients(terms.elbo().sum(), parameters), gradients(-loss, parameters), strict=True):
            exact(ours, theirs)
        assert_importance_weighted(terms, ledgers, program)


def assert_importance_weighted(terms, ledgers, program):
    if program.scale != 1 or "g" in program.model_order:
        with pytest.raises(ValueError, match="^importance_weighted: "):
            terms.importance_weighted()
        return
    for b in range(len(program.lengths)):
        weights = [
            sum((1 if name in program.observed else -1) * total[b] for name, total in totals.items())
            for totals, _ in ledgers
        ]
        largest = max(weights)
        exact(
            terms.importance_weighted()[b],
            largest + (sum(torch.exp(w - largest) for w in weights) / len(weights)).log(),
        )


@fuzzing
@given(random_programs())
def test_where_pyro_knows_the_closed_forms_the_ledger_is_trace_mean_field_elbo(program):
    """Pyro has none for a chain, and takes one whatever order the guide draws in: there our Monte Carlo term stands."""
    program.guide_order = program.model_order
    program.q = {name: without_later_parents(program, name) for name in program.q}
    args, options = (program.frames, program.mask), {"inputs": program.inputs}
    analytic, sampled = (
        seeded(elbo_terms, program.model, program.guide, *args, kl=kl, **options) for kl in ("analytic", "monte-carlo")
    )
    known = {
        name
        for name in program.model_order
        if program.p[name].kind == program.q[name].kind
        and program.p[name].kind in ("static", "factorised")
        and program.p[name].family == program.q[name].family
    }
    assert not known & analytic.monte_carlo
    bound = sum(term.sum() for term in analytic.log_likelihood.values())
    bound = bound - sum((analytic if name in known else sampled).kl[name].sum() for name in program.model_order)
    elbo = TraceMeanField_ELBO(max_plate_nesting=program.num_plates)
    exact(bound, -seeded(elbo.differentiable_loss, program.model, program.guide, *args, **options))


def without_later_parents(program, name):
    earlier = program.model_order[: program.model_order.index(name)]
    factor = copy.copy(program.q[name])
    factor.reads = {parent: matrix for parent, matrix in factor.reads.items() if parent in [*earlier, "frames"]}
    return factor


# ---------------------------------------------------------------------------------------------------------------------
# The interventions
# ---------------------------------------------------------------------------------------------------------------------


def assert_pictures(pictures, hand, rows, lengths):
    """The means of all emissions are those worked out by hand, at every real step."""
    expected = hand.pictures(rows, lengths)
    assert list(pictures) == list(expected)
    for name, by_row in expected.items():
        mean = pictures[name].mean if hand.program.num_objects is not None else pictures[name].mean.unsqueeze(1)
        for (b, m), picture in by_row.items():
            exact(mean[b, m, : lengths[b]] if picture.ndim == 2 else mean[b, m], picture)


def assert_values(inferred, hand, rows, lengths):
    values = hand.of_values({name: site.value for name, site in inferred.items()}, lengths)
    for name in hand.program.model_order:
        for row, value in rows[name].items():
            exact(values[name][row], value)


@fuzzing
@given(random_programs(for_interventions=True), padding(), st.integers(1, 3))
@torch.no_grad()
def test_inference_reconstruction_and_forecast_of_a_random_program_by_hand(program, filling, more):
    hand, lengths = ByHand(program), program.lengths
    frames, mask, inputs = arguments(program, filling)
    rows = hand.means(program.q, program.guide_order, lengths, {"frames": hand.of_frames(frames, lengths)}, {})
    assert_values(infer(program.guide, frames, mask, inputs=inputs), hand, rows, lengths)
    clip = {"inputs": inputs}
    assert_pictures(reconstruct(program.model, program.guide, frames, mask, **clip), hand, rows, lengths)

    sampled = seeded(infer, program.guide, frames, mask, sample=True, **clip)
    drawn = hand.of_values({name: site.value for name, site in sampled.items()}, lengths)
    pictures = seeded(reconstruct, program.model, program.guide, frames, mask, sample=True, **clip)
    assert_pictures(pictures, hand, drawn, lengths)

    total = [frames.shape[1] + more] * len(lengths)
    longer = hand.means(program.p, program.model_order, total, {}, rows)
    if all(program.p[name].kind == "factorised" for name in program.model_order):
        with pytest.raises(ValueError, match="model: has no latent that carries the frames into the future"):
            forecast(program.model, program.guide, frames, mask, num_steps=more, sample=False, inputs=program.inputs)
        return
    pictures = forecast(program.model, program.guide, frames, mask, num_steps=more, sample=False, inputs=program.inputs)
    assert_pictures(pictures, hand, longer, total)


@fuzzing
@given(random_programs(for_interventions=True), padding(), seeds(), st.data())
@torch.no_grad()
def test_swaps_of_a_random_program_by_hand(program, filling, seed, data):
    hand, lengths = ByHand(program), program.lengths
    sites = data.draw(st.lists(st.sampled_from(program.model_order), min_size=1, unique=True))
    others = [name for name in program.model_order if name not in sites]
    keep = data.draw(st.lists(st.sampled_from(others), unique=True)) if others else []
    moving = [name for name in sites if program.is_trajectory(name)]

    donor = copy.copy(program)
    read_again = any(name in program.q[other].reads for name in moving for other in program.model_order)
    if not read_again:  # a guide that reads a donor's trajectory beside its own frames wants both of one length
        one = st.integers(1, 4)
        donor.lengths = data.draw(st.lists(one, min_size=len(lengths), max_size=len(lengths)))
        if program.mask is None:
            donor.lengths = donor.lengths[:1] * len(lengths)
        else:
            donor.mask = mask_of(donor.lengths, data.draw(st.integers(0, 1)))
    steps = donor.lengths[0] if donor.mask is None else donor.mask.shape[1]
    donor.frames = Tensors(seed).normal(len(lengths), steps, *program.frames.shape[2:])

    frames, mask, _ = arguments(program, filling)
    donor_frames, donor_mask, _ = arguments(donor, filling)
    pictures = swap(
        program.model, program.guide, (frames, mask), (donor_frames, donor_mask), sites=sites, keep=keep,
        inputs=program.inputs,
    )  # fmt: skip

    def inferred(clips, of_lengths, chosen):
        seen = {"frames": hand.of_frames(clips, of_lengths)}
        return hand.means(program.q, program.guide_order, of_lengths, seen, chosen)

    of_donor, of_source = inferred(donor_frames, donor.lengths, {}), inferred(frames, lengths, {})
    chosen = {name: of_donor[name] for name in sites} | {name: of_source[name] for name in keep}
    latents = inferred(frames, lengths, chosen) | chosen
    if moving:
        lengths = donor.lengths
        latents = hand.means(program.p, program.model_order, lengths, {}, latents)
    assert_pictures(pictures, hand, latents, lengths)


@fuzzing
@given(random_programs(for_interventions=True), seeds(), num_steps(6), st.data())
@torch.no_grad()
def test_generations_of_a_random_program_by_hand(program, seed, steps, data):
    hand, tensors, total = ByHand(program), Tensors(seed), [steps] * len(program.lengths)
    given_values = {}
    for name in data.draw(st.lists(st.sampled_from(program.model_order), unique=True)):
        size = (len(program.p[name].bias),)
        batch = () if name == "g" else (len(total),)
        if name != "g" and program.num_objects is not None:
            batch += (program.num_objects if program.objects[name] else 1,)
        prefix = (data.draw(st.integers(1, steps)),) if program.is_trajectory(name) else ()
        given_values[name] = 0.1 + tensors.uniform(*batch, *prefix, *size)
    pictures = generate(
        program.model, num_sequences=len(total), num_steps=steps, given=given_values, emissions=program.observed,
        sample=False, inputs=program.inputs,
    )  # fmt: skip
    rows = hand.means(program.p, program.model_order, total, {}, hand.of_values(given_values, total))
    assert_pictures(pictures, hand, rows, total)


def padded(*rows):
    """Return rows of different lengths as one batch (B, T, 1) and its mask."""
    mask = mask_of([len(row) for row in rows])
    frames = torch.zeros(*mask.shape, 1)
    frames[mask] = torch.tensor([value for row in rows for value in row]).unsqueeze(-1)
    return frames, mask


def doubling(site, start, num_steps, mask):
    return pyro.sample(site, MarkovChain(start, lambda z_prev: normal(2 * z_prev, 1.0), num_steps, mask=mask))


def test_a_source_row_that_ends_early_is_continued_though_another_is_as_long_as_the_donors():
    """Found by fuzzing: such a row went on with the zeros of its padding."""

    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        with pyro.plate("sequences", num_sequences):
            start = normal(torch.zeros(num_sequences, 1), 1.0)
            z, w = (doubling(site, start, num_steps, mask) for site in ("z", "w"))
            pyro.sample("x", normal(z + 100 * w, 1.0, 2), obs=frames)

    def guide(frames, mask=None):
        with pyro.plate("sequences", len(frames)):
            for site in ("z", "w"):
                pyro.sample(site, normal(frames, 1.0).mask(mask).to_event(1))

    source, donor = padded([1.0, 3.0], [1.0, 1.0, 1.0]), padded([5.0, 6.0, 7.0], [8.0, 9.0, 0.0])
    pictures = swap(model, guide, source, donor, sites=["z"])["x"].mean.squeeze(-1)
    exact(pictures, torch.tensor([[105.0, 306.0, 607.0], [108.0, 109.0, 100.0]]))


def test_a_swap_of_rows_that_are_long_enough_continues_none():
    """A flow has no mean to go on with, and needs none where source and donor end together."""
    flow = pyro.distributions.transforms.AffineTransform(torch.zeros(1), 2 * torch.ones(1))

    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        path = lambda z_prev: pyro.distributions.TransformedDistribution(normal(z_prev, 1.0), [flow])  # noqa: E731
        with pyro.plate("sequences", num_sequences):
            start = normal(torch.zeros(num_sequences, 1), 1.0)
            z = pyro.sample("z", MarkovChain(start, path, num_steps, mask=mask))
            level = pyro.sample("level", normal(torch.zeros(num_sequences, num_steps, 1), 1.0, 2))
            pyro.sample("x", normal(z + level, 1.0, 2), obs=frames)

    def guide(frames, mask=None):
        with pyro.plate("sequences", len(frames)):
            pyro.sample("z", normal(frames, 1.0).mask(mask).to_event(1))
            pyro.sample("level", normal(10 * frames, 1.0, 2))

    source, donor = padded([1.0, 3.0], [1.0, 1.0, 1.0]), padded([5.0, 6.0], [8.0, 9.0, 2.0])
    pictures = swap(model, guide, source, donor, sites=["level"])["x"].mean.squeeze(-1)
    exact(pictures[0, :2], torch.tensor([51.0, 63.0]))
    exact(pictures[1], torch.tensor([81.0, 91.0, 21.0]))


def test_a_trajectory_outside_the_sequences_plate_has_no_rows_that_end_early():
    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        beat = doubling("beat", normal(torch.zeros(1), 1.0), num_steps, None)
        with pyro.plate("sequences", num_sequences):
            z = doubling("z", normal(torch.zeros(num_sequences, 1), 1.0), num_steps, mask)
            pyro.sample("x", normal(z + beat, 1.0, 2), obs=frames)

    def guide(frames, mask=None):
        pyro.sample("beat", normal(frames[-1], 1.0, 2))
        with pyro.plate("sequences", len(frames)):
            pyro.sample("z", normal(frames, 1.0).mask(mask).to_event(1))

    source, donor = padded([1.0, 3.0], [2.0, 4.0, 6.0]), padded([50.0, 60.0, 70.0], [80.0, 90.0, 20.0])
    pictures = swap(model, guide, source, donor, sites=["z"])["x"].mean.squeeze(-1)
    exact(pictures, torch.tensor([[52.0, 64.0, 76.0], [82.0, 94.0, 26.0]]))


def test_a_ragged_forecast_in_a_second_plate_continues_each_sequence_from_its_own_end():
    """Found by fuzzing: with as many objects as sequences, an object was continued from another sequence's end."""

    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        with pyro.plate("sequences", num_sequences, dim=-2), pyro.plate("objects", 2, dim=-1):
            z = doubling("z", normal(torch.zeros(num_sequences, 2, 1), 1.0), num_steps, None)
            pyro.sample("x", normal(z, 1.0, 2))

    def guide(frames, mask=None):
        with pyro.plate("sequences", len(frames), dim=-2), pyro.plate("objects", 2, dim=-1):
            pyro.sample("z", normal(frames.transpose(1, 2), 1.0, 2))

    clip, mask = padded([1.0], [3.0, 5.0])
    clip = torch.stack([clip, 10 * clip], 2)
    pictures = forecast(model, guide, clip, mask, num_steps=1, sample=False)["x"].mean.squeeze(-1)
    exact(pictures[:, 0], torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 10.0]]))
    exact(pictures[:, 1], 10 * pictures[:, 0])


# ---------------------------------------------------------------------------------------------------------------------
# Chains, whatever was done to them before
# ---------------------------------------------------------------------------------------------------------------------


class ChainMachine(RuleBasedStateMachine):
    """A chain that is drawn from, expanded, copied and scored in any order always says what a loop over its rows says.

    What it hands over with a draw must be the conditionals of that very path.
    """

    @initialize(
        batch_shape=batch_shapes(2, 2), lengths=st.lists(num_steps(4), min_size=1, max_size=4), size=dimensions(2),
        kind=st.sampled_from(("markov", "recurrent")), flow=st.booleans(), ragged=st.booleans(), filling=padding(),
        seed=seeds(), data=st.data(),
    )  # fmt: skip
    def build(self, batch_shape, lengths, size, kind, flow, ragged, filling, seed, data):
        tensors = Tensors(seed)
        self.factor = data.draw(factors(tensors, kind, "log-normal" if flow else "normal", size, {}, of_guide=False))
        self.steps, self.batch_shape = max(lengths), batch_shape
        self.rows = list(itertools.product(*map(range, batch_shape)))
        self.lengths = {row: lengths[i % len(lengths)] if ragged else self.steps for i, row in enumerate(self.rows)}
        self.inputs = tensors.normal(*batch_shape, self.steps + 3, NUM_INPUTS)
        self.inputs[..., 0, :] = filling
        self.mask, inputs = None, self.inputs[..., : self.steps, :].clone()
        if ragged:
            self.mask = torch.zeros(*batch_shape, self.steps, dtype=torch.bool)
            for row, length in self.lengths.items():
                self.mask[row][:length] = True
            inputs[~self.mask] = filling
        self.start = tensors.normal(*batch_shape, size).requires_grad_()
        self.chain = self.made(self.start, inputs, self.steps, self.mask)
        self.path = self.handed_over = None

    def made(self, start, inputs, steps, mask):
        factor = self.factor
        first = start if factor.network is None else start + factor.start @ factor.of_state.T
        options = {"mask": mask}
        if factor.network is None:
            options["inputs"] = inputs
        else:
            options |= {"recurrence": factor.network, "state": factor.start, "reads_latent": factor.reads_latent}
            if factor.feedback is not None:
                options["inputs"] = self.feedback
            elif factor.reads_input:
                options["inputs"] = inputs
        chain = MarkovChain if factor.network is None else RecurrentChain
        return chain(conditional_of(factor, first), self.transition, steps, **options)

    def transition(self, z_prev, read):
        weight = self.factor.of_input if self.factor.network is None else self.factor.of_state
        location = torch.sin(z_prev @ self.factor.of_previous.T) + read @ weight.T + self.factor.bias
        return conditional_of(self.factor, location)

    def feedback(self, z_prev, h_prev, t):
        of_latent, of_state = self.factor.feedback
        return torch.sin(z_prev @ of_latent.T + h_prev @ of_state.T)

    def by_hand(self, row, length, choose):
        """Walk through one row: its first location is `start`, where a random program's is its bias."""
        first = self.start[row].detach() - self.factor.bias
        drive = torch.zeros(self.steps + 3, *first.shape, dtype=first.dtype)
        drive[0] = first
        factor = copy.copy(self.factor)
        factor.reads = {"first": torch.eye(len(first), dtype=first.dtype)}
        return reference.walk(factor, {"first": drive}, self.inputs[row], length, choose)

    def indices(self, path):
        """Return (index, row of the batch) of every path of a tensor (*S, *B, T, D)."""
        for index in itertools.product(*map(range, path.shape[:-2])):
            yield index, index[len(index) - len(self.batch_shape) :]

    @rule(sample_shape=batch_shapes(1, 2), with_gradient=st.booleans())
    def draw(self, sample_shape, with_gradient):
        with torch.set_grad_enabled(with_gradient):
            drawn = self.chain.rsample_with_conditionals(sample_shape)
            self.path = drawn.path
            log_prob = drawn.log_prob_per_step
            self.handed_over = drawn.conditionals.log_prob_per_step(self.path) if log_prob is None else log_prob
        if self.mask is not None:
            first = self.path[..., :1, :]
            assert torch.equal(self.path, torch.where(self.mask.unsqueeze(-1), self.path, first))

    @precondition(lambda self: self.path is not None)
    @rule()
    def change_the_path(self):
        self.path = self.path.detach() * 1.5
        self.handed_over = None

    @rule()
    def take_a_copy(self):
        self.chain = copy.copy(self.chain)

    @precondition(lambda self: len(self.rows) < 9)
    @rule(more=st.integers(1, 2))
    def expand(self, more):
        self.chain = self.chain.expand((more, *self.batch_shape))
        assert self.chain.batch_shape == (more, *self.batch_shape)
        self.start = self.start.expand(more, *self.start.shape)
        self.inputs = self.inputs.expand(more, *self.inputs.shape)
        self.mask = None if self.mask is None else self.mask.expand(more, *self.mask.shape)
        self.lengths = {(i, *row): length for i in range(more) for row, length in self.lengths.items()}
        self.batch_shape, self.rows = (more, *self.batch_shape), list(self.lengths)
        self.path = self.handed_over = None

    @rule()
    def walk_through_the_means(self):
        if self.factor.family == "log-normal":
            return
        found = self.chain.mean_path()
        for index, row in self.indices(found):
            length = self.lengths[row]
            _, path = self.by_hand(row, length, lambda t, location: location)
            exact(found[index][:length].detach(), torch.stack(path))
            assert torch.equal(found[index][length:], found[index][:1].expand(len(found[index][length:]), -1))

    @precondition(lambda self: self.path is not None)
    @rule(more=st.integers(1, 3))
    def continue_the_path(self, more):
        if self.factor.family == "log-normal":
            return
        known = self.path.detach()
        longer = self.made(self.start, self.inputs[..., : self.steps + more, :], self.steps + more, None)
        found = longer.extend(known, more, mask=self.mask, sample=False)
        for index, row in self.indices(found):
            length, prefix = self.lengths[row], known[index]

            def choose(t, location, length=length, prefix=prefix):
                return prefix[t] if t < length else location

            _, path = self.by_hand(row, self.steps + more, choose)
            exact(found[index].detach(), torch.stack(path))

    @invariant()
    def scores_are_those_of_a_loop(self):
        if getattr(self, "path", None) is None:
            return
        per_step, total = self.chain.log_prob_per_step(self.path), self.chain.log_prob(self.path)
        for index, row in self.indices(self.path):
            length, path = self.lengths[row], self.path[index].detach()
            locations, _ = self.by_hand(row, length, lambda t, _, path=path: path[t])
            by_hand = torch.stack(
                [reference.log_density(self.factor, *pair) for pair in zip(locations, path[:length], strict=True)]
            )
            exact(per_step[index][:length].detach(), by_hand)
            exact(total[index].detach(), by_hand.sum())
            assert (per_step[index][length:] == 0).all()
            if self.handed_over is not None:
                exact(self.handed_over[index][:length].detach(), by_hand)


TestChains = ChainMachine.TestCase
TestChains.settings = settings(fuzzing, stateful_step_count=12)
