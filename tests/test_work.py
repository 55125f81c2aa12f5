"""The work of a step, counted and not timed: what `benchmarks/` measures must not creep up unseen.

Beside each bound stands what was counted when docs/performance/ was written.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")

from blending import shared_decoder  # noqa: E402
from dmm_step import DMM, some_chorales  # noqa: E402
from ledger import dmm_by_hand, example, vdsm_by_hand  # noqa: E402
from measuring import work_of  # noqa: E402
from pyro.infer import TraceMeanField_ELBO  # noqa: E402

from seqdisent import MixtureOfExpertsConvDecoder, elbo_terms  # noqa: E402


@pytest.fixture
def small_dmm():
    return DMM(latent_dim=3, transition_dim=4, rnn_dim=5, emission_dim=4)


def ledger_step(model, guide, *inputs):
    return work_of(lambda: (-elbo_terms(model, guide, *inputs).elbo().sum()).backward())


@pytest.mark.parametrize(("num_steps", "counted"), [(8, 1.160), (16, 1.080)])
def test_forty_experts_cost_little_more_than_one_in_operations(num_steps, counted):
    with torch.device("meta"):  # the paper's sizes, counted without computing anything
        bank = MixtureOfExpertsConvDecoder(70, 40)
        shared = shared_decoder(bank)
        latents = torch.randn(20, num_steps, 70, requires_grad=True)
        weights = torch.softmax(torch.randn(20, 40), -1).requires_grad_()
        blended = work_of(lambda: bank(latents, weights).sum().backward())
        one = work_of(lambda: shared(latents.flatten(0, 1)[..., None, None]).sum().backward())
    assert one.operations > 1e10
    assert blended.operations / one.operations < 1 + 1.5 * (counted - 1)


def test_the_ledger_calls_little_more_than_a_loss_by_hand(small_dmm):
    chorales = some_chorales(4, 30)
    ledger = ledger_step(small_dmm.model, small_dmm.guide, *chorales)
    by_hand = work_of(lambda: dmm_by_hand(small_dmm, *chorales).backward())
    looped = work_of(
        lambda: (
            TraceMeanField_ELBO()
            .differentiable_loss(small_dmm.looped_model, small_dmm.looped_guide, *chorales)
            .backward()
        )
    )
    assert ledger.calls / by_hand.calls < 1.15  # 1.10 counted
    assert ledger.operations / by_hand.operations < 1.02  # nothing is evaluated twice
    assert looped.calls / ledger.calls > 3.0  # 3.6 counted


def test_vdsms_ledger_calls_little_more_than_a_loss_by_hand():
    vdsm = example.VDSM((3, 64, 64), example.PRESETS["tiny"]["clips"].sizes)
    frames = torch.rand(2, 10, 3, 64, 64)
    features = vdsm.encoder(frames).detach()
    ledger = ledger_step(vdsm.model, vdsm.guide, frames, None, features)
    by_hand = work_of(lambda: vdsm_by_hand(vdsm, frames, features).backward())
    assert ledger.calls / by_hand.calls < 1.19  # 1.13 counted


def test_the_ledger_does_not_evaluate_the_guide_again(small_dmm):
    shapes = []
    small_dmm.combiner.previous.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    elbo_terms(small_dmm.model, small_dmm.guide, *some_chorales(4, 30))
    assert shapes == [(4, 3)] * 30  # once a step


def test_each_step_of_a_chain_is_walked_once(small_dmm):
    ledger_step(small_dmm.model, small_dmm.guide, *some_chorales(4, 10))  # old torch calls more the first time
    calls = [ledger_step(small_dmm.model, small_dmm.guide, *some_chorales(4, n)).calls for n in (10, 20, 30)]
    assert calls[2] - calls[1] == calls[1] - calls[0]  # linear in time
    assert (calls[1] - calls[0]) / 10 < 88  # 83 counted, forward, backward and the recurrent network
