"""Training steps that are recorded and replayed; all but the refusals need a CUDA device."""

import pyro
import pytest
import torch
from torch import nn

from seqdisent import AnnealingSchedule, Combiner, GatedTransition, IndependentSteps, MarkovChain, read_backward

pytest.importorskip("lightning")
from small_runs import losses, make, run  # noqa: E402

from seqdisent.training import ELBOTraining, fit  # noqa: E402
from seqdisent.training.cuda_graphs import StepGraphs  # noqa: E402

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Network(nn.Module):
    """A deep Markov model with what makes steps differ: padding, dropout, running averages, an annealed input."""

    def __init__(self):
        super().__init__()
        self.normalise, self.dropout = nn.BatchNorm1d(3), nn.Dropout(0.2)
        self.rnn = nn.GRU(3, 6, batch_first=True)
        self.combiner, self.transition = Combiner(2, 5, context_dim=6), GatedTransition(2, 5)
        self.emission, self.unused = nn.Linear(2, 3), nn.Parameter(torch.ones(1))

    def model(self, x, mask=None, *, temperature=1.0):
        with pyro.plate("sequences", len(x)):
            first = self.transition(x.new_zeros(len(x), 2))
            z = pyro.sample("z", MarkovChain(first, self.transition, x.shape[1], mask=mask))
            steps = pyro.distributions.Normal(self.emission(z), 0.5 * temperature).to_event(1)
            pyro.sample("x", IndependentSteps(steps, mask=mask), obs=x)

    def guide(self, x, mask=None, *, temperature=1.0):
        read = self.dropout(self.normalise(x.movedim(-1, 1)).movedim(1, -1))
        contexts = self.combiner.project(read_backward(self.rnn, read, mask))
        with pyro.plate("sequences", len(x)):
            first = self.combiner.step(x.new_zeros(len(x), 2), contexts[:, 0])
            pyro.sample("z", MarkovChain(first, self.combiner.step, x.shape[1], inputs=contexts, mask=mask))


def draw(generator):
    """Return sequences of two lengths in turn, with padding."""
    length = 5 + 2 * int(torch.randint(2, (), generator=generator))
    mask = torch.arange(length) < torch.randint(2, length + 1, (4, 1), generator=generator)
    return torch.randn(4, length, 3, generator=generator) * mask[..., None], mask


def train(folder, *, cuda_graph, network=None, **options):
    torch.manual_seed(0)
    network = network or Network()
    training = ELBOTraining(
        network, network.model, network.guide, draw, num_steps=12, arguments=tuple,
        learning_rate=AnnealingSchedule.linear(0.0, 0.02, 12),
        weights={"z": AnnealingSchedule.linear(0.1, 1.0, 10)},
        inputs={"temperature": AnnealingSchedule.linear(2.0, 1.0, 10)},
        validation=lambda: [draw(torch.Generator().manual_seed(1))],
    )  # fmt: skip
    fit(
        training, folder, cuda_graph=cuda_graph, progress_bar=False, accelerator="gpu", log_every=1,
        checkpoint_every=4, clip_norm=1.0, averaging=0.5, **options,
    )  # fmt: skip
    return network


@pytest.mark.filterwarnings("ignore:GPU available but not used")
def test_a_training_on_the_cpu_is_refused(tmp_path):
    module, _ = make()
    with pytest.raises(ValueError, match="cuda_graph: training is on cpu, expected a CUDA device"):
        run(module, tmp_path, cuda_graph=True)


@on_gpu
def test_replayed_steps_are_the_steps(tmp_path):
    eager, replayed = (train(tmp_path / str(graph), cuda_graph=graph) for graph in (False, True))
    for (name, one), two in zip(eager.state_dict().items(), replayed.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    rows, others = losses(tmp_path / "False"), losses(tmp_path / "True")
    assert rows.keys() == others.keys()
    for step, row in rows.items():
        for name, value in row.items():
            if value:
                assert float(others[step][name]) == pytest.approx(float(value), rel=1e-4, abs=1e-4), (step, name)


@on_gpu
def test_a_resumed_run_replays_the_same_steps(tmp_path):
    whole = train(tmp_path / "whole", cuda_graph=True)
    train(tmp_path / "parts", cuda_graph=True, max_time={"seconds": 0})  # stops after its first step
    parts = train(tmp_path / "parts", cuda_graph=True, resume=True)
    for one, two in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@on_gpu
def test_a_program_that_waits_for_a_value_is_refused(tmp_path):
    class Waits(Network):
        def model(self, x, mask=None, *, temperature=1.0):
            scale = 1.0 if x.sum() > 0 else 2.0
            super().model(x * scale, mask, temperature=temperature)

    with pytest.raises(RuntimeError, match="cuda_graph: the step cannot be recorded; expected model, guide"):
        train(tmp_path, cuda_graph=True, network=Waits())


@on_gpu
def test_mixed_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cuda_graph: got mixed precision"):
        train(tmp_path, cuda_graph=True, precision="bf16-mixed")


@on_gpu
def test_an_objective_that_cannot_be_recorded_is_refused(tmp_path):
    network = Network()
    training = ELBOTraining(
        network, network.model, network.guide, draw, num_steps=2, arguments=tuple,
        learning_rate=AnnealingSchedule.constant(0.1), objective="stl",
    )  # fmt: skip
    with pytest.raises(ValueError, match="cuda_graph: a step with objective='stl' cannot be recorded"):
        fit(training, tmp_path, cuda_graph=True, progress_bar=False, accelerator="gpu")


def test_what_is_not_on_the_device_is_refused():
    def compute(*_):
        raise AssertionError("nothing is computed from it")

    with pytest.raises(ValueError, match="cuda_graph: model and guide are given a tensor on cpu"):
        StepGraphs(nn.Linear(1, 1))(compute, (torch.zeros(3),), {}, {"z": 0.5})
