"""Chains beside a recurrent network against a loop over sequences and steps; reading from the end."""

import itertools
import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import VRNN, normal
from pyro import poutine
from pyro.infer import Trace_ELBO
from reference import recurrent_walk
from strategies import Tensors, batch_shapes, mask_of, masks, num_steps, padding, seeds
from torch import nn

from seqdisent import (
    RecurrentChain,
    elbo_terms,
    feedback,
    forecast,
    generate,
    infer,
    read_backward,
    reconstruct,
    shift_steps,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
KINDS = st.sampled_from((nn.GRU, nn.LSTM, nn.RNN))


class System:
    """A chain of two coordinates beside a network of three units, and all that it is made of."""

    def __init__(self, seed, batch_shape, num_steps, kind=nn.GRU, *, layers=1, first=True, known=True, feedback=False,
                 context=True, latent=True, mask=None):  # fmt: skip
        tensors = Tensors(seed)
        self.num_steps, self.latent, self.feedback = num_steps, latent, feedback
        reads = 2 * latent + 1 * (known or feedback)
        self.network = tensors.build(lambda: kind(reads, 3, num_layers=layers, batch_first=first))
        self.of_z, self.of_h, self.of_c = tensors.normal(2, 2), tensors.normal(2, 3), tensors.normal(2, 2)
        self.of_back = tensors.normal(1, 5)
        self.scale, self.loc = 0.3 + tensors.uniform(2), tensors.normal(*batch_shape, 2)
        self.state = tensors.normal(*batch_shape, 3)
        self.inputs = tensors.normal(*batch_shape, num_steps, 1) if known and not feedback else None
        self.context = tensors.normal(*batch_shape, num_steps, 2) if context else None
        self.mask = mask

    def back(self, z_prev, h_prev, t):
        return (torch.cat([z_prev, h_prev], -1) @ self.of_back.T + 0.2 * t).tanh()

    def transition(self, z_prev, read):
        loc = z_prev @ self.of_z.T + read[..., :3] @ self.of_h.T
        return normal(loc if self.context is None else loc + read[..., 3:] @ self.of_c.T, self.scale)

    def chain(self, **changed):
        options = {
            "recurrence": self.network, "state": self.state, "inputs": self.back if self.feedback else self.inputs,
            "context": self.context, "reads_latent": self.latent, "mask": self.mask,
        } | changed  # fmt: skip
        return RecurrentChain(normal(self.loc, self.scale), self.transition, self.num_steps, **options)

    def walk(self, choose, *row):
        """Walk one sequence by hand; `choose(t, loc)` returns z_t where its conditional's location is `loc`."""

        def located(t, z_prev, h):
            if t == 0:
                return choose(0, self.loc[row])
            parts = [h] if self.context is None else [h, self.context[row][t]]
            return choose(t, self.transition(z_prev, torch.cat(parts)).mean)

        def read(t, z_prev, h_prev):
            parts = [z_prev] if self.latent else []
            if self.feedback:
                parts.append(self.back(z_prev, h_prev, t))
            elif self.inputs is not None:
                parts.append(self.inputs[row][t])
            return torch.cat(parts)

        return recurrent_walk(self.network, self.state[row], self.num_steps, located, read)

    def parameters(self):
        rest = (self.of_z, self.of_h, self.of_c, self.of_back, self.scale, self.loc, self.state)
        return [*self.network.parameters(), *(values.requires_grad_() for values in rest)]


@st.composite
def systems(draw, *, batch=None, steps=None):
    known, latent, feedback = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    return System(
        draw(seeds()), draw(batch_shapes()) if batch is None else batch, draw(num_steps()) if steps is None else steps,
        draw(KINDS), layers=draw(st.integers(1, 2)), first=draw(st.booleans()), known=known or not latent,
        feedback=feedback, context=draw(st.booleans()), latent=latent,
    )  # fmt: skip


@given(systems(), st.sampled_from([(), (2,)]))
def test_scoring_is_the_loops(system, sample_shape):
    chain = system.chain()
    path = Tensors(1).normal(*sample_shape, *chain.batch_shape, system.num_steps, 2)
    found, states = chain.log_prob_per_step(path), chain.states(path)
    for index in itertools.product(*map(range, path.shape[:-2])):
        row, locations = index[len(sample_shape) :], []

        def choose(t, loc, index=index, locations=locations):
            locations.append(loc)
            return path[index][t]

        _, wanted = system.walk(choose, *row)
        torch.testing.assert_close(states[index], wanted, **CLOSE)
        at = (path[index] - torch.stack(locations)) / system.scale
        density = (-0.5 * at.square() - system.scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
        torch.testing.assert_close(found[index], density, **CLOSE)


@given(systems())
def test_sampling_means_and_continuations_are_the_loops(system):
    chain = system.chain()
    torch.manual_seed(3)
    path = chain.rsample()
    torch.manual_seed(3)
    noise = [torch.randn(*chain.batch_shape, 2, dtype=torch.float64) for _ in range(system.num_steps)]
    means = chain.mean_path()
    for index in itertools.product(*map(range, path.shape[:-2])):
        drawn, _ = system.walk(lambda t, loc, row=index: loc + system.scale * noise[t][row], *index)
        torch.testing.assert_close(path[index], drawn, **CLOSE)
        torch.testing.assert_close(means[index], system.walk(lambda t, loc: loc, *index)[0], **CLOSE)
    for length in range(1, system.num_steps):
        continued = chain.extend(means[..., :length, :], system.num_steps - length, sample=False)
        torch.testing.assert_close(continued, means, **CLOSE)


@given(systems(batch=(2,), steps=4), st.booleans())
def test_conditionals_of_the_draw_are_those_of_scoring(system, with_mask):
    chain = system.chain(mask=mask_of([4, 2]) if with_mask else None)
    path, drawn, _ = chain.rsample_with_conditionals()
    kept, scored = drawn.steps, chain.conditionals(path).steps
    real = mask_of([4, 2])[:, 1:].T if with_mask else torch.ones(3, 2, dtype=torch.bool)
    torch.testing.assert_close(kept.mean[real], scored.mean[real], **CLOSE)
    torch.testing.assert_close(kept.stddev[real], scored.stddev[real], **CLOSE)


@given(systems())
def test_going_on_step_by_step_is_the_chain(system):
    chain = system.chain()
    torch.manual_seed(0)
    path = chain.rsample()
    torch.manual_seed(0)
    conditional, state = chain.step()
    z = conditional.rsample()
    for t in range(1, system.num_steps):
        torch.testing.assert_close(z, path[..., t - 1, :], **CLOSE)
        conditional, state = chain.step(z, state)
        resumed, _ = chain.step(path[..., t - 1, :], chain.state_after(path[..., :t, :]))
        torch.testing.assert_close(resumed.mean, conditional.mean, **CLOSE)
        torch.testing.assert_close(state.carried[0], chain.states(path)[..., t, :], **CLOSE)
        z = conditional.rsample()
    torch.testing.assert_close(z, path[..., -1, :], **CLOSE)


@given(seeds(), masks(), st.sampled_from((0, 3)))
def test_ragged_continuation_goes_on_from_each_rows_own_end(seed, mask, more):
    length, total = mask.shape[1], mask.shape[1] + more + 1
    system = System(seed, (len(mask),), total)
    prefix = Tensors(seed).normal(len(mask), length, 2)
    found = system.chain().extend(prefix, more + 1, mask=mask, sample=False)
    for n, real in enumerate(mask.sum(1).tolist()):
        wanted, _ = system.walk(lambda t, loc, n=n, real=real: prefix[n, t] if t < real else loc, n)
        torch.testing.assert_close(found[n], wanted, **CLOSE)


@given(seeds(), masks(largest=4, max_rows=3), padding(), KINDS)
def test_padding_changes_no_value_and_no_gradient(seed, mask, content, kind):
    def run(filling):
        system = System(seed, (len(mask),), mask.shape[1], kind, mask=mask)
        parameters = system.parameters()
        path = Tensors(seed).normal(*mask.shape, 2)
        for values in (path, system.inputs, system.context):
            values[~mask] = filling
        chain = system.chain()
        score = chain.log_prob(path).sum() + chain.states(path)[mask].sum()
        return [score, *torch.autograd.grad(score, parameters, allow_unused=True)]

    for found, wanted in zip(run(content), run(0.0), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


def test_a_row_does_not_see_its_neighbours():
    system = System(0, (3,), 4)
    path = Tensors(1).normal(3, 4, 2)
    whole = system.chain().log_prob(path)
    path[0], system.inputs[0], system.context[0], system.state[0] = 9.0, 9.0, 9.0, 9.0
    changed = system.chain().log_prob(path)
    assert changed[0] != whole[0]
    torch.testing.assert_close(changed[1:], whole[1:], rtol=0, atol=0)


@pytest.mark.parametrize("mask", [None, mask_of([4, 2, 3])])
def test_ledger_is_pyros_bound(mask):
    system = VRNN(0)
    frames = Tensors(1).normal(3, 4, 2)
    torch.manual_seed(2)
    ours = elbo_terms(system.model, system.guide, frames, mask, kl="monte-carlo").elbo().sum()
    torch.manual_seed(2)
    assert -Trace_ELBO().loss(system.model, system.guide, frames, mask) == pytest.approx(ours.item(), rel=1e-12)


def test_analytic_term_compares_the_two_heads_along_one_path():
    system = VRNN(0)
    frames = Tensors(1).normal(2, 3, 2)
    terms = elbo_terms(system.model, system.guide, frames)
    torch.manual_seed(2)
    path = infer(system.guide, frames, sample=True)["z"].value
    torch.manual_seed(2)
    terms = elbo_terms(system.model, system.guide, frames)
    for n in range(2):
        previous = lambda t, z, h, n=n: torch.cat([z, frames[n, t - 1]])  # noqa: E731
        _, states = recurrent_walk(system.network, system.start, 3, lambda t, *_, n=n: path[n, t], previous)
        for t, h in enumerate(states):
            q, p = system.posterior(None, torch.cat([h, frames[n, t]])), system.prior(None, h)
            wanted = torch.distributions.kl_divergence(q, p)
            torch.testing.assert_close(terms.kl_per_step["z"][n, t], wanted, **CLOSE)


def test_particles_in_one_run_are_those_of_a_loop_in_shape_and_kind():
    system = VRNN(0)
    frames, mask = Tensors(1).normal(3, 4, 2), mask_of([4, 2, 3])
    terms = elbo_terms(system.model, system.guide, frames, mask, num_particles=5, vectorize_particles=True)
    assert terms.kl["z"].shape == (5, 3)
    assert terms.kl["z"].unique().numel() == 15
    assert (terms.kl_per_step["z"][:, ~mask] == 0).all()


@torch.no_grad()
def test_without_frames_the_network_reads_the_models_own():
    system = VRNN(0)
    drawn = generate(system.model, num_sequences=1, num_steps=4, sample=False)["x"].mean[0]

    def read(t, z_prev, h_prev):
        return torch.cat([z_prev, system.frame(z_prev, h_prev)])

    z, h = recurrent_walk(system.network, system.start, 4, lambda t, _, h: system.prior(None, h).mean, read)
    torch.testing.assert_close(drawn, system.frame(z, h), **CLOSE)


@torch.no_grad()
def test_where_there_are_frames_the_network_reads_those():
    system, mask = VRNN(0), mask_of([2, 3])
    frames = Tensors(1).normal(2, 3, 2)
    z = infer(system.guide, frames, mask)["z"].value
    found = reconstruct(system.model, system.guide, frames, mask, history=True)["x"].mean
    future = forecast(system.model, system.guide, frames, mask, num_steps=4, sample=False, history=True)["x"].mean
    assert future.shape == (2, 7, 2)
    for n, length in enumerate([2, 3]):

        def read(t, z_prev, h_prev, n=n, length=length):
            return torch.cat([z_prev, frames[n, t - 1] if t <= length else system.frame(z_prev, h_prev)])

        def choose(t, _, h, n=n, length=length):
            return z[n, t] if t < length else system.prior(None, h).mean

        wanted = system.frame(*recurrent_walk(system.network, system.start, 7, choose, read))
        torch.testing.assert_close(future[n, : length + 4], wanted[: length + 4], **CLOSE)
        torch.testing.assert_close(found[n, :length], wanted[:length], **CLOSE)
    under_a_handler = poutine.scale(system.model, scale=1.0)
    same = reconstruct(under_a_handler, system.guide, frames, mask, history=True)["x"].mean
    torch.testing.assert_close(same, found, rtol=0, atol=0)


def test_the_state_starts_at_zero_unless_told():
    system = System(0, (2,), 3)
    told, untold = system.chain(state=torch.zeros(2, 3).double()), system.chain(state=None)
    path = Tensors(1).normal(2, 3, 2)
    torch.testing.assert_close(told.log_prob(path), untold.log_prob(path), rtol=0, atol=0)
    assert untold.has_rsample
    assert (untold.states(path)[:, 0] == 0).all()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"recurrence": nn.Linear(3, 3)}, "^recurrence: .*Linear"),
        ({"recurrence": nn.GRU(3, 3, bidirectional=True)}, "^recurrence: .*directions"),
        ({"recurrence": nn.GRU(3, 3, 2, dropout=0.5)}, "^recurrence: .*at random"),
        ({"recurrence": nn.GRU(4, 3)}, "^recurrence: .*4"),
        ({"inputs": None}, "^recurrence: .*3"),
        ({"inputs": None, "reads_latent": False}, "^recurrence: .*none"),
        ({"state": torch.zeros(2, 4)}, "^state: .*4"),
        ({"state": torch.zeros(5, 3)}, r"^state: .*\(5, 3\)"),
        ({"context": torch.zeros(2, 3, 2)}, "^context: .*T=4"),
        ({"context": torch.zeros(5, 4, 2)}, r"^context: .*\(5, 4, 2\)"),
        ({"inputs": torch.zeros(2, 3, 1)}, "^inputs: "),
        ({"mask": torch.tensor([True, False, True, True])}, "^mask: .*hole"),
        ({"mask": torch.ones(4, dtype=torch.bool, device="meta")}, "^mask: .*meta"),
    ],
)
def test_mistakes_are_named(changed, said):
    with pytest.raises((ValueError, TypeError), match=said):
        System(0, (2,), 4).chain(**changed)


def test_contexts_must_cover_a_continuation():
    chain = System(0, (2,), 4, known=False).chain()
    with pytest.raises(ValueError, match="^num_steps: .*context"):
        chain.extend(torch.zeros(2, 2, 2).double(), 3)


@given(seeds(), masks(), KINDS, st.booleans(), padding())
def test_reading_from_the_end_is_a_loop_over_reversed_sequences(seed, mask, kind, first, content):
    tensors = Tensors(seed)
    network = tensors.build(lambda: kind(2, 3, batch_first=first))
    inputs = tensors.normal(*mask.shape, 2)
    inputs[~mask] = content
    found = read_backward(network, inputs, mask)
    for n, length in enumerate(mask.sum(1).tolist()):
        torch.testing.assert_close(found[n, :length], reference.read_backward(network, inputs[n, :length]), **CLOSE)
    assert (found[~mask] == 0).all()
    gradients = torch.autograd.grad(found.sum(), network.parameters())
    assert all(gradient.isfinite().all() for gradient in gradients)
    real = inputs[:, :1]
    torch.testing.assert_close(read_backward(network, real), read_backward(network, real, mask[:, :1]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((nn.Linear(2, 2), torch.zeros(1, 2, 2)), "^recurrence: .*Linear"),
        ((nn.GRU(2, 2, bidirectional=True), torch.zeros(1, 2, 2)), "^recurrence: .*directions"),
        ((nn.GRU(2, 2), torch.zeros(1, 2, 3)), "^inputs: .*3"),
        ((nn.GRU(2, 2), torch.zeros(2)), r"^inputs: .*\(2,\)"),
        ((nn.GRU(2, 2), torch.zeros(1, 3, 2), torch.ones(1, 2, dtype=torch.bool)), "^mask: .*T=3"),
        ((nn.GRU(2, 2), torch.zeros(1, 3, 2), torch.ones(1, 3, dtype=torch.bool, device="meta")), "^mask: .*meta"),
        ((nn.GRU(2, 2), torch.zeros(0, 3, 2)), r"^inputs: .*\(0, 3, 2\)"),
        ((nn.GRU(2, 2), torch.zeros(1, 0, 2)), r"^inputs: .*\(1, 0, 2\)"),
    ],
)
def test_mistakes_in_reading_are_named(arguments, said):
    with pytest.raises((ValueError, TypeError), match=said):
        read_backward(*arguments)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_chain_that_feeds_its_frames_back_goes_on_after_a_path(kind):
    system = System(0, (2,), 5, kind, feedback=True, context=True)
    chain = system.chain()
    path = chain.rsample()
    for length in (1, 2, 4):
        state = chain.state_after(path[:, :length])
        torch.testing.assert_close(state.carried[0], chain.states(path)[:, length - 1], **CLOSE)
        conditional, _ = chain.step(path[:, length - 1], state)
        torch.testing.assert_close(conditional.mean, chain.conditionals(path).steps.mean[length - 1], **CLOSE)
    for wrong in ({"z_prev": path[:, 0]}, {"state": state}):
        with pytest.raises(ValueError, match="^state: "):
            chain.step(**wrong)


def test_frames_of_the_history_are_read_before_the_models_own():
    frames, mask = Tensors(0).normal(2, 3, 1), mask_of([3, 2])
    z, h = Tensors(1).normal(2, 1), Tensors(2).normal(2, 1)
    own = z + 10 * h

    def made(history, prepare=None):
        return feedback(lambda z, h: z + 10 * h, history, prepare=prepare)

    assert torch.equal(made(None)(z, h, 1), own)
    for t in (1, 2, 3):
        assert torch.equal(made((frames, None))(z, h, t), frames[:, t - 1])
    assert torch.equal(made((frames, None))(z, h, 4), own)
    assert torch.equal(made((frames, mask))(z, h, 3), torch.stack([frames[0, 2], own[1]]))
    assert torch.equal(made((frames, None), prepare=torch.exp)(z, h, 2), frames[:, 1].exp())
    sampled = made((frames, None))(z.expand(4, 2, 1), h.expand(4, 2, 1), 2)
    assert torch.equal(sampled, frames[:, 1].expand(4, 2, 1))


def test_steps_are_shifted_by_one():
    x = Tensors(0).normal(2, 4, 3)
    assert torch.equal(shift_steps(x), torch.stack([x[:, 0], x[:, 0], x[:, 1], x[:, 2]], 1))
