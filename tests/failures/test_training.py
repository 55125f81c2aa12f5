"""Trainings and checkpoints that users get wrong, and what they are told."""

from __future__ import annotations

import importlib
import io
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from failures import check, rows
from torch import nn

from seqdisent import AnnealingSchedule

pytest.importorskip("lightning")
from seqdisent import training  # noqa: E402
from seqdisent.training import checkpoints  # noqa: E402


class Network(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 2 * width), nn.Linear(width, 3)
        self.width = width

    def model(self, x):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.width), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0, validate_args=False).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("sequences", len(x)):
            loc, scale = self.encode(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp(), validate_args=False).to_event(1))


def of(network=None, **options):
    """A training of two steps or as many as said."""
    network = network or Network()
    whole = {
        "draw": lambda generator: torch.randn(4, 3, generator=generator), "num_steps": 2,
        "learning_rate": AnnealingSchedule.constant(1e-3), "arguments": lambda batch: (batch,), **options,
    }  # fmt: skip
    return training.ELBOTraining(network, network.model, network.guide, **whole)


def train(folder, network, *, num_steps=3, resume=True, bad=None, module=None, **options):
    def draw(generator):
        batch = torch.randn(4, 3, generator=generator)
        return batch if bad is None else batch * bad

    module = module or of(network, draw=draw, num_steps=num_steps)
    training.fit(module, folder, resume=resume, progress_bar=False, accelerator="cpu", **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(folder, Network())
    return (folder / "last.ckpt").read_bytes()


def half_frozen():
    network = Network()
    network.encode.requires_grad_(False)
    return network


def lacking_a_layer():
    network = Network()
    network.deeper = nn.Linear(1, 1)
    return network


def put(path, content):
    path.write_bytes(content)


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


KEPT = "put a whole copy in its place, or remove it to train from the start"
THE_SAME = "use the network and the settings that it was written with, or another folder"


@rows(
    ("half of it", lambda path, whole: put(path, whole[: len(whole) // 2]), training.CheckpointError,
     rf"last.ckpt: cannot be read as a checkpoint \(.*\); {KEPT}"),
    ("all but its last bytes", lambda path, whole: put(path, whole[:-1]), training.CheckpointError, "cannot be read"),
    ("a byte of a weight changed", lambda path, whole: put(path, flipped(whole)), training.CheckpointError,
     "cannot be read as a checkpoint .*data/[0-9]+ does not fit its checksum"),
    ("nothing", lambda path, _: put(path, b""), training.CheckpointError, "cannot be read"),
    ("garbage", lambda path, _: put(path, b"\x00\x01 garbage" * 99), training.CheckpointError, "cannot be read"),
    ("text", lambda path, _: put(path, b"loss,step\n1.0,3\n"), training.CheckpointError, "cannot be read"),
    ("a pickle that would run code", lambda path, _: torch.save({"state_dict": Harmful()}, path),
     training.CheckpointError, "cannot be read as a checkpoint .it holds more than tensors"),
    ("bare weights", lambda path, _: torch.save(Network().state_dict(), path), training.CheckpointError,
     r"is no checkpoint of seqdisent.training, it lacks \['state_dict', .*; " + KEPT),
    ("another program's", lambda path, _: torch.save([1, 2], path), training.CheckpointError, "is no checkpoint of"),
)  # fmt: skip
def test_checkpoints_that_cannot_be_read(row, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row.do(tmp_path / "last.ckpt", checkpoint)
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(row.error, match=row.said) as raised:
        train(tmp_path, Network(), num_steps=5)
    assert str(tmp_path / "last.ckpt") in str(raised.value)
    assert (tmp_path / "last.ckpt").read_bytes() == before  # what is refused is not overwritten either
    assert not (tmp_path / "harmed").exists()


def flipped(whole):
    weights = torch.load(io.BytesIO(whole), weights_only=True)["state_dict"]["network.encode.weight"]
    at = whole.index(weights.numpy().tobytes()) + 1
    return whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]


@rows(
    ("of a network with other sizes", lambda: Network(width=5), training.CheckpointError,
     r"is the checkpoint of another network: it has network.encode.weight of shape \(4, 3\), expected \(10, 3\) "
     r"\(and 2 more differences\)"),
    ("of a network with fewer layers", lacking_a_layer, training.CheckpointError,
     "is the checkpoint of another network: it lacks network.deeper.weight .and 1 more"),
    ("of another stage", half_frozen, training.CheckpointError,
     "was written where other parameters were trained, encode.bias in one case alone .2 in all"),
)  # fmt: skip
def test_checkpoints_of_another_run(row, checkpoint, tmp_path):
    (tmp_path / "last.ckpt").write_bytes(checkpoint)
    with pytest.raises(row.error, match=row.said):
        train(tmp_path, row.do(), num_steps=5)
    assert (tmp_path / "last.ckpt").read_bytes() == checkpoint


@rows(
    ("with another seed", lambda folder: train(folder, None, module=of(num_steps=5, seed=4)), training.CheckpointError,
     rf"last.ckpt: was written with seed=0, and goes on with seed=4; {THE_SAME}"),
    ("with another limit of the gradient", lambda folder: train(folder, Network(), num_steps=5, clip_norm=1.0),
     training.CheckpointError, rf"was written with clip_norm=None, and goes on with clip_norm=1.0; {THE_SAME}"),
    ("with fewer steps than it has", lambda folder: train(folder, Network(), num_steps=2), training.CheckpointError,
     "last.ckpt: has 3 steps behind it, expected at most num_steps=2"),
    ("a run that is there, and no resume", lambda folder: train(folder, Network(), resume=False), FileExistsError,
     "folder: .*last.ckpt exists; resume that run, or choose another folder"),
    ("no step between checkpoints", lambda folder: train(folder, Network(), checkpoint_every=0), ValueError,
     "checkpoint_every: got 0, expected an integer >= 1"),
    ("NaN in a batch", lambda folder: train(folder, Network(), num_steps=5, bad=torch.nan), FloatingPointError,
     r"log_likelihood\['x'\] is nan at training step 3 \(sequence 0\)"),
)  # fmt: skip
def test_what_a_run_goes_on_with(row, checkpoint, tmp_path):
    (tmp_path / "last.ckpt").write_bytes(checkpoint)
    check(row, tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == checkpoint


def test_averaged_weights_do_not_go_on_without(tmp_path):
    train(tmp_path, Network(), averaging=0.9)
    with pytest.raises(
        training.CheckpointError, match="was written with averaged weights, and goes on without averaging"
    ):
        train(tmp_path, Network(), num_steps=5)


# ---------------------------------------------------------------------------------------------------------------------
# Trainings
# ---------------------------------------------------------------------------------------------------------------------


def fitted(*, fit=None, network=None, **options):
    return lambda folder: train(folder, None, module=of(network, **options), resume=False, **(fit or {}))


class Foreign(Network):
    """Its model uses a layer that belongs to somebody else."""

    def __init__(self):
        super().__init__()
        other = nn.Linear(3, 3)
        own, self.model = self.model, lambda x: own(other(x))


def without_a_bias(parameters):
    return torch.optim.SGD(parameters[:-1], lr=1.0)


def grouped_anew(groups):
    return torch.optim.SGD([parameter for group in groups for parameter in group["params"]], lr=1.0)


def of_every_row(terms, _):
    return terms.elbo()[:, None].expand(-1, 2)


def with_an_infinite_gradient(terms, weights):
    return terms.elbo(weights) + (terms.kl["z"] * 0).sqrt()


BATCHES = [torch.zeros(4, 3)]


@rows(
    ("a number for a schedule", fitted(learning_rate=1e-3), TypeError,
     r"learning_rate: got 0.001, expected a function of the step, such as AnnealingSchedule.constant\(...\)"),
    ("a number for a weight", fitted(weights={"z": 0.4}), TypeError, r"weights\['z'\]: got 0.4, expected a function"),
    ("a number for a function", fitted(objective=3), TypeError, "objective: got int, expected a function"),
    ("an unknown objective", fitted(objective="elbow"), ValueError, "objective: got 'elbow', expected one of 'elbo', "),
    ("closed forms in an importance-weighted bound", fitted(objective="iwae", kl="analytic"), ValueError,
     "kl: got \"analytic\" with objective='iwae'"),
    ("an unknown kind of KL term", fitted(kl="exact"), ValueError, "kl: got 'exact', expected"),
    ("annealing in an importance-weighted bound", fitted(objective="dreg",
     weights={"z": AnnealingSchedule.linear(0.0, 1.0, 2)}), ValueError, r"weights: got \['z'\] with objective='dreg'"),
    ("no particle", fitted(num_particles=0), ValueError, "num_particles: got 0"),
    ("an objective of every step", fitted(objective=of_every_row), ValueError,
     r"objective: returned shape \(4, 2\), expected shape \(4,\), a value for each sequence"),
    ("an objective that returns nothing", fitted(objective=lambda *_: None), ValueError,
     "objective: returned NoneType, expected shape"),
    ("an objective that is NaN", fitted(objective=lambda terms, _: (terms.elbo() * 0 - 1).log()), FloatingPointError,
     "the loss is nan at training step 0, here or on another process, though every term of the ledger is finite; "
     "expected a finite objective"),
    ("a gradient that is NaN", fitted(objective=with_an_infinite_gradient), FloatingPointError,
     "parameter encode.weight is not finite after [0-9] training steps, though every term of the ledger was: the "
     "gradient of the last step was not"),
    ("a model of somebody else's parameters", fitted(network=Foreign()), ValueError,
     r"network: lacks 2 parameters that model and guide use, one of them of shape \(3,.*\); expected the module that "
     r"owns all of them \(also what is a pyro.param\), and `.requires_grad_\(False\)` on those that are not to be"),
    ("a batch that is no clips", fitted(arguments=training.frames_and_mask), TypeError,
     "draw: the batch is a Tensor, expected clips with `frames` and `mask`; what model and guide take from anything "
     "else is for `arguments` to say"),
    ("a rate for no parameter", fitted(rate_factors={"encodr": 0.1}), ValueError,
     r"rate_factors: no parameter starts with \['encodr'\], expected starts of \['encode.weight', 'encode.bias'"),
    ("one argument that is no tuple", fitted(arguments=lambda batch: batch), TypeError,
     "arguments: returned Tensor, expected a tuple or a dict"),
    ("an input given twice", fitted(arguments=lambda batch: {"x": batch, "gain": 1.0}, inputs={"gain": lambda _: 1.0}),
     ValueError, r"inputs: \['gain'\] are also in the dict that `arguments` returned, expected one value"),
    ("an optimiser that is none", fitted(optimizer=lambda parameters: parameters), TypeError,
     "optimizer: returned list, expected a torch.optim.Optimizer"),
    ("an optimiser of some parameters", fitted(optimizer=without_a_bias), ValueError,
     "optimizer: lacks 1 of 4 trained parameters, expected all; `.requires_grad_.False.` is for those that are not to"),
    ("an optimiser without the rates' groups", fitted(optimizer=grouped_anew, rate_factors={"encode": 0.1}), ValueError,
     "optimizer: its groups lack `factor`, expected those that it was given, as rate_factors wants"),
    # options of fit
    ("what fit decides", fitted(fit={"max_steps": 7}), TypeError,
     "max_steps: fit decides it; expected num_steps of ELBOTraining to say it"),
    ("a misspelt option", fitted(fit={"acelerator": "cpu"}), TypeError,
     r"acelerator: is no option of fit, expected one of \['accelerator', "),
    ("two ways to clip", fitted(fit={"clip_norm": 1.0, "gradient_clip_val": 1.0}), ValueError,
     "clip_norm: gradient_clip_val is given too, expected one of them"),
    ("another way to write checkpoints", fitted(fit={"plugins": checkpoints.AtomicCheckpointIO()}), TypeError,
     "plugins: fit decides how checkpoints are written, expected no CheckpointIO"),
    # validation
    ("one batch to validate on", fitted(validation=BATCHES[0]), TypeError,
     r"validation: got one Tensor, expected a sequence of batches, or a function that returns an iterable of batches; "
     r"of one batch: \[batch\]"),
    ("batches that can be read once", fitted(validation=iter(BATCHES)), TypeError,
     "validation: got list_iterator, which can be read once; expected a sequence of batches"),
    ("a number to validate on", fitted(validation=3), TypeError, "validation: got int, expected a sequence of batches"),
    ("no batch to validate on", fitted(validation=[]), ValueError, "validation: has no batch, expected one or more"),
    ("patience without validation", fitted(fit={"patience": 2}), ValueError,
     r"patience: training has no batches to validate on, expected ELBOTraining\(validation=...\)"),
    ("a bound on validation data that is NaN", fitted(validation=[BATCHES[0] * torch.nan]), FloatingPointError,
     "validation/elbo is nan after 2 training steps, expected finite terms"),
    ("an average of nothing", fitted(fit={"averaging": 1.0}), ValueError,
     r"averaging: got 1.0, expected a decay in \(0, 1\)"),
)  # fmt: skip
def test_trainings(row, tmp_path):
    check(row, tmp_path)


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="last.ckpt was not written: No space left on device; there was none before"):
        train(tmp_path, Network())


def test_lightning_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "seqdisent.training")
    with pytest.raises(ImportError, match="seqdisent.training needs Lightning; .*seqdisent.train."):
        importlib.import_module("seqdisent.training")
