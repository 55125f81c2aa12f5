"""One observation at a time: a causal chain that gets its inputs step by step is the chain that has them all."""

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Tensors, dimensions, num_steps, seeds
from torch import nn

from seqdisent import Combiner, MarkovChain, OrnsteinUhlenbeckTransition, RecurrentChain

CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # float64
SIZE, READS, BESIDE, HIDDEN = 2, 3, 2, 4  # of z, of the inputs, of the context, of the network


KINDS = ("markov", "gru", "lstm", "feedback")


class Causal:
    """A guide's chain with random weights, whole or cut off after a step, and what arrives at each step."""

    def __init__(self, seed, num_sequences, length, kind):
        tensors = Tensors(seed)
        self.kind, self.length = kind, length
        self.read = tensors.normal(num_sequences, length, READS)
        self.beside = tensors.normal(num_sequences, length, BESIDE)
        reads = READS if kind == "markov" else HIDDEN + BESIDE
        self.combiner = tensors.build(lambda: Combiner(SIZE, 5, context_dim=reads))
        network = nn.LSTM if kind == "lstm" else nn.GRU
        self.network = tensors.build(lambda: network(SIZE + READS, HIDDEN, num_layers=2))
        self.own = tensors.build(lambda: nn.Linear(SIZE + HIDDEN, READS))  # the model's frame, fed back
        self.start = dist.Normal(tensors.normal(num_sequences, SIZE), 0.5).to_event(1)

    def chain(self, length, read=None, beside=None):
        read = (self.read if read is None else read)[:, :length]
        if self.kind == "markov":
            return MarkovChain(self.start, self.combiner, length, inputs=read)
        feed_back = (lambda z, h, t: self.own(torch.cat([z, h], -1))) if self.kind == "feedback" else None
        beside = (self.beside if beside is None else beside)[:, :length]
        return RecurrentChain(
            self.start, self.combiner, length, recurrence=self.network, inputs=feed_back or read, context=beside
        )

    def arriving(self, t):
        inputs = {} if self.kind == "feedback" else {"inputs": self.read[:, t]}
        return inputs if self.kind == "markov" else {**inputs, "context": self.beside[:, t]}


def causal(*kinds):
    return st.builds(Causal, seeds(), dimensions(3), num_steps(), st.sampled_from(kinds))


def walk(chain, arriving, choose=lambda conditional: conditional.mean):
    """Go through time with a chain, and hand over what arrives."""
    path, state = [], None
    num_kept = {len(values) for values in chain.step()[1].reads.values()}
    for now in arriving:
        conditional, state = chain.step(path[-1] if path else None, state, **now)
        path.append(choose(conditional))
        assert {len(values) for values in state.reads.values()} == num_kept  # the state does not grow
    return torch.stack(path, -2)


@given(causal(*KINDS))
def test_the_path_of_means_is_that_of_the_whole_chain(system):
    found = walk(system.chain(1), map(system.arriving, range(system.length)))
    torch.testing.assert_close(found, system.chain(system.length).mean_path(), **CLOSE)


@given(causal(*KINDS), seeds())
def test_the_same_noise_draws_the_same_path(system, seed):
    torch.manual_seed(seed)
    found = walk(system.chain(1), map(system.arriving, range(system.length)), lambda conditional: conditional.rsample())
    torch.manual_seed(seed)
    torch.testing.assert_close(found, system.chain(system.length).rsample(), **CLOSE)


@given(causal(*KINDS))
def test_what_arrives_is_read_in_place_of_what_the_chain_has(system):
    other = system.chain(system.length, system.read + 1.0, system.beside - 1.0)
    found = walk(other, map(system.arriving, range(system.length)))
    torch.testing.assert_close(found, system.chain(system.length).mean_path(), **CLOSE)


@given(causal("feedback"))
def test_what_arrives_is_read_in_place_of_what_is_fed_back(system):
    arriving = [{**system.arriving(t), "inputs": system.read[:, t]} for t in range(system.length)]
    found = walk(system.chain(1), arriving)
    system.kind = "gru"  # which knows its inputs
    torch.testing.assert_close(found, system.chain(system.length).mean_path(), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_goes_on_after_a_batch(kind):
    """Four steps at once, then one at a time."""
    system = Causal(0, 3, 7, kind)
    chain = system.chain(4)
    path = list(chain.mean_path().unbind(-2))
    state = chain.state_after(torch.stack(path, -2))
    for t in range(4, 7):
        conditional, state = chain.step(path[-1], state, **system.arriving(t))
        path.append(conditional.mean)
    torch.testing.assert_close(torch.stack(path, -2), system.chain(7).mean_path(), **CLOSE)


def test_one_input_for_all_particles():
    """Several paths of each sequence read the same frame."""
    system = Causal(1, 3, 2, "markov")
    chain, several = system.chain(1), Tensors(2).normal(5, 3, SIZE)
    conditional, _ = chain.step(several, chain.state_after(several[..., None, :]), inputs=system.read[:, 1])
    torch.testing.assert_close(conditional.mean, system.combiner(several, system.read[:, 1]).mean, **CLOSE)


def test_unequal_time_steps_one_at_a_time():
    transition, dt = OrnsteinUhlenbeckTransition(2).double(), Tensors(0).uniform(3, 4, 1)
    start = transition.stationary().expand([3])
    path = Tensors(1).normal(3, 4, 2)
    wanted = MarkovChain(start, transition, 4, inputs=dt).log_prob_per_step(path)
    chain, state = MarkovChain(start, transition, 1), None  # a chain that was built without inputs takes them too
    for t in range(4):
        conditional, state = chain.step(path[:, t - 1] if t else None, state, inputs=dt[:, t])
        torch.testing.assert_close(conditional.log_prob(path[:, t]), wanted[:, t], **CLOSE)


@pytest.mark.parametrize("kind", ["markov", "gru"])
def test_inputs_that_have_ended_or_do_not_fit_are_refused(kind):
    system = Causal(0, 3, 4, kind)
    chain = system.chain(1)
    _, state = chain.step()
    z = torch.zeros(3, SIZE).double()
    with pytest.raises(ValueError, match=r"^state: 1 steps are done, .* for 1; step\(..., (inputs|context)=\) takes"):
        chain.step(z, state)
    with pytest.raises(ValueError, match=r"^inputs: has shape \(2, 3\), expected one that expands to \(3, 3\)"):
        chain.step(z, state, **{**system.arriving(1), "inputs": system.read[:2, 1]})
    chain = system.chain(4)
    with pytest.raises(ValueError, match="^inputs: has last dimension 1, expected 3, the chain's own"):
        chain.step(z, chain.step()[1], **{**system.arriving(1), "inputs": torch.zeros(3, 1).double()})
