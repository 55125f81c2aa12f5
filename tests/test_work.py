"""The work of a step, counted and not timed: what `benchmarks/` measures must not creep up unseen.

Beside each bound stands what was counted when docs/performance/ was written.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")

from dmm_step import DMM, some_chorales  # noqa: E402
from ledger import dmm_by_hand, example, vdsm_by_hand  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from measuring import work_of  # noqa: E402
from pyro.infer import TraceMeanField_ELBO  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from seqdisent import ConvDecoder, MixtureOfExpertsConvDecoder, _checks, elbo_terms  # noqa: E402
from seqdisent.datasets import Clips  # noqa: E402
from seqdisent.training import ELBOTraining, fit  # noqa: E402


@pytest.fixture
def small_dmm():
    return DMM(latent_dim=3, transition_dim=4, rnn_dim=5, emission_dim=4)


def ledger_step(model, guide, *inputs):
    return work_of(lambda: (-elbo_terms(model, guide, *inputs).elbo().sum()).backward())


@pytest.mark.parametrize(("num_steps", "counted"), [(8, 1.160), (16, 1.080)])
def test_forty_experts_cost_little_more_than_one_in_operations(num_steps, counted):
    with torch.device("meta"):  # the paper's sizes, counted without computing anything
        bank = MixtureOfExpertsConvDecoder(70, 40)
        shared = ConvDecoder(70)
        latents = torch.randn(20, num_steps, 70, requires_grad=True)
        weights = torch.softmax(torch.randn(20, 40), -1).requires_grad_()
        blended = work_of(lambda: bank(latents, weights).sum().backward())
        one = work_of(lambda: shared(latents).sum().backward())
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
    sizes = replace(example.EXAMPLE.preset("tiny").sizes, memory_dim=None, num_components=None)
    vdsm = example.VDSM((3, 64, 64), sizes)
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


# Waits for the device ------------------------------------------------------------------------------------------------

READS = {
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__bool__, Tensor.__float__, Tensor.__int__,
    Tensor.__index__, Tensor.__array__, Tensor.is_nonzero, torch.is_nonzero, torch.equal, Tensor.equal, torch.allclose,
}  # fmt: skip
SIZED_BY_VALUES = {
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave",
}


class Waits(TorchFunctionMode):
    """Counts what would wait for an accelerator: a program reads values, or an operator's size depends on them.

    Everything is on the CPU here, so a transfer counts by name alone: ``.cpu()`` and ``.to("cpu")``.
    """

    def __init__(self):
        super().__init__()
        self.found, self.operators = [], _Operators(self)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_host = function is Tensor.to and any(where == "cpu" for where in (*args[1:2], kwargs.get("device")))
        if function in READS or to_host:
            self.found.append(function)
        return function(*args, **kwargs)

    def __enter__(self):
        self.operators.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.operators.__exit__(*error)


class _Operators(TorchDispatchMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if function._overloadpacket.__name__ in SIZED_BY_VALUES or by_mask:
            self.waits.found.append(function)
        return function(*args, **(kwargs or {}))


class CountWaits(Callback):
    """Counts the waits of each step, from the batch's transfer to the end of the optimiser's step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, *_):
        self.waits = Waits()
        self.waits.__enter__()

    def on_train_batch_end(self, *_):
        self.waits.__exit__(None, None, None)
        self.steps.append(self.waits.found)


def waits_of(training, folder, monkeypatch):
    """Return what a step waits for, when masks are not to be read, as on an accelerator."""
    monkeypatch.setattr(_checks, "_AT_ONCE", frozenset())
    monkeypatch.setattr("parts.READ_AT_ONCE", ())
    count = CountWaits()
    fit(training, folder, callbacks=(count,), clip_norm=10.0, log_every=100, progress_bar=False, accelerator="cpu")
    return count.steps[2]  # the first step looks for parameters that nobody owns, the last one writes the log


@pytest.mark.parametrize(("stage", "counted"), [("pretraining", 1), ("sequence_training", 3), ("prior_training", 2)])
def test_a_step_of_vdsm_seldom_waits_for_the_device(stage, counted, tmp_path, monkeypatch):
    """For whether the ledger is finite, and for the lengths of packed sequences, each time dynamics are inferred."""
    sizes = example.Sizes(
        num_experts=3, pose_dim=2, dynamics_dim=4, feature_dim=6, encoder_channels=(4, 4), decoder_channels=(4, 4),
        rnn_dim=5, rnn_layers=1, transition_dim=4, combiner_dim=5, memory_dim=3, num_components=2,
    )  # fmt: skip
    plan = example.Plan(
        sizes, 4, 1e-3, 4, 1e-3, 8, num_groups=2, frames_per_group=3, num_clips=4, prior_steps=4,
        same_identity=1.0, same_motion=1.0, rolled=0.5,
    )  # fmt: skip
    frames = torch.randint(256, (8, 8, 3, 16, 16), dtype=torch.uint8)
    clips = Clips(frames, lengths=torch.arange(1, 9), identity=torch.arange(8) // 2)
    training = getattr(example, stage)(example.VDSM((3, 16, 16), sizes), plan, clips, 7)
    assert len(waits_of(training, tmp_path, monkeypatch)) == counted


def test_a_step_of_a_deep_markov_model_waits_for_the_device_once(small_dmm, tmp_path, monkeypatch):
    rolls, mask = some_chorales(4, 10)
    training = ELBOTraining(
        small_dmm, small_dmm.model, small_dmm.guide, lambda _: {"frames": rolls, "mask": mask}, arguments=dict,
        num_steps=4, learning_rate=lambda _: 1e-3,
    )  # fmt: skip
    assert len(waits_of(training, tmp_path, monkeypatch)) == 1


def test_what_waits_is_counted():
    values = torch.tensor([True, False])
    reads = [
        lambda: bool(values.all()), lambda: values[0].item(), lambda: values.tolist(), lambda: values.cpu(),
        lambda: values.to("cpu"), lambda: values.to(device="cpu"), lambda: values.nonzero(),
        lambda: torch.arange(2)[values], lambda: values.unique(), lambda: float(values.sum()), lambda: int(values[1]),
    ]  # fmt: skip
    for read in reads:
        with Waits() as waits:
            read()
        assert len(waits.found) == 1
    with Waits() as waits:
        values.sum() + values.to(torch.float64).where(values, 0.0)[1:].amax()
    assert waits.found == []
