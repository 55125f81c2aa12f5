"""A chain that scores some sequences on its own roll-outs: which ones, after what, and that the rest are as before."""

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Tensors, seeds
from torch import nn

from seqdisent import GatedTransition, OvershootingChain, RecurrentChain


def build(seed, num_sequences, num_steps, part, mask=None):
    tensors = Tensors(seed)
    network, head = tensors.build(lambda: nn.GRU(2, 3)), tensors.build(lambda: GatedTransition(2, 4, context_dim=3))
    start = dist.Normal(tensors.normal(num_sequences, 2), 1.0).to_event(1)
    options = {"recurrence": network, "state": tensors.normal(num_sequences, 3), "mask": mask}
    plain = RecurrentChain(start, head, num_steps, **options)
    return OvershootingChain(start, head, num_steps, part=part, **options), plain, tensors


@given(seeds(), st.integers(1, 6), st.integers(1, 6), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_a_part_of_the_sequences_is_scored_after_the_means_that_follow(seed, num_sequences, num_steps, part):
    chain, plain, tensors = build(seed, num_sequences, num_steps, part)
    path = tensors.normal(num_sequences, num_steps, 2)
    found = chain.conditionals(path)
    for n in range(num_sequences):
        known = num_steps
        if n / num_sequences < part / 2:
            known = 1
        elif n / num_sequences < part:
            known = max(1, num_steps // 2) if num_steps > 1 else 1
        own, state = path[n : n + 1].clone(), None
        alone = plain.expand([num_sequences])
        walked, z_prev = [], None
        for t in range(num_steps):
            conditional, state = alone.step(z_prev, state)
            walked.append(conditional.mean[n])
            row = own[0, t] if t < known else conditional.mean[n]
            z_prev = path[:, t].clone()
            z_prev[n] = row
        if num_steps > 1:
            torch.testing.assert_close(found.steps.mean[:, n], torch.stack(walked[1:]))
    torch.testing.assert_close(found.initial.mean, plain.conditionals(path).initial.mean)


def test_all_of_its_own_steps_are_a_recurrent_chains():
    chain, plain, tensors = build(0, 4, 5, 0.0)
    path = tensors.normal(4, 5, 2)
    torch.testing.assert_close(chain.log_prob_per_step(path), plain.log_prob_per_step(path), rtol=0, atol=0)


def test_padding_reaches_no_value():
    mask = torch.arange(6) < torch.tensor([6, 2, 5, 1])[:, None]
    chain, _, tensors = build(0, 4, 6, 1.0, mask)
    path = tensors.normal(4, 6, 2)
    spoilt = torch.where(mask.unsqueeze(-1), path, 1e6)
    torch.testing.assert_close(chain.log_prob_per_step(spoilt), chain.log_prob_per_step(path))


def test_what_is_not_rolled_out_gives_no_gradient_that_overflows():
    mask = torch.arange(12) < torch.tensor([12, 12, 1, 12])[:, None]
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)

    def step(z_prev, _):
        return dist.Normal(2 * factor * z_prev**3, 1.0, validate_args=False).to_event(1)

    def scored(kind, **options):
        start = dist.Normal(torch.zeros(4, 1).double(), 1.0).to_event(1)
        chain = kind(start, step, 12, recurrence=nn.GRU(1, 2).double(), mask=mask, **options)
        path = torch.full((4, 12, 1), 0.1, dtype=torch.float64)
        path[2:] = 3.0  # padded after its first step, and not rolled out
        path[3, 1:] = 0.1
        return torch.autograd.grad(chain.log_prob(path).sum(), factor)[0]

    assert scored(RecurrentChain).isfinite()
    assert scored(OvershootingChain, part=0.5).isfinite()


def test_a_path_without_a_batch():
    chain = OvershootingChain(
        dist.Normal(torch.zeros(1), 1.0).to_event(1), lambda z, h: dist.Normal(z + 1, 1.0).to_event(1), 3,
        part=1.0, recurrence=nn.GRU(1, 2),
    )  # fmt: skip
    torch.testing.assert_close(
        chain.conditionals(torch.tensor([[0.0], [9.0], [9.0]])).steps.mean, torch.tensor([[1.0], [2.0]])
    )


def test_a_larger_batch_keeps_the_part():
    chain, _, tensors = build(0, 4, 5, 1.0)
    path = tensors.normal(3, 4, 5, 2)
    wide = chain.expand([3, 4])
    assert type(wide) is OvershootingChain
    torch.testing.assert_close(wide.log_prob(path), torch.stack([chain.log_prob(one) for one in path]))


@pytest.mark.parametrize("part", [-0.1, 1.5])
def test_a_part_outside_of_the_whole_is_refused(part):
    with pytest.raises(ValueError, match=f"part: got {part}, expected a part of the sequences, in"):
        build(0, 4, 5, part)
