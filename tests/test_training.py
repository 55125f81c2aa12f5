"""Training: resumed runs are exact, failures name their term, checkpoints are plain tensors."""

import csv

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from seqdisent import AnnealingSchedule

training = pytest.importorskip("seqdisent.training")


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 4), nn.Linear(2, 3)

    def model(self, x, gain=1.0):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(gain * self.decode(z), 1.0, validate_args=False).to_event(1), obs=x)

    def guide(self, x, gain=1.0):
        with pyro.plate("sequences", len(x)):
            loc, scale = self.encode(x).chunk(2, -1)
            scale = nn.functional.softplus(scale)
            pyro.sample("z", dist.Normal(loc, scale, validate_args=False).to_event(1))


class Interrupted(Exception):
    pass


def make(*, stop_at=None, bad_at=None, num_steps=30):
    torch.manual_seed(0)
    network = Linear()
    drawn = []

    def draw(generator):
        if len(drawn) == stop_at:
            raise Interrupted
        batch = torch.randn(5, 3, generator=generator)
        if len(drawn) == bad_at:
            batch[2, 1] = float("nan")
        drawn.append(batch)
        return batch

    module = training.ELBOTraining(
        network,
        network.model,
        network.guide,
        draw,
        num_steps=num_steps,
        learning_rate=AnnealingSchedule.cosine(1e-2, 1e-3, num_steps),
        weights={"z": AnnealingSchedule.linear(0.0, 1.0, 20)},
        inputs={"gain": AnnealingSchedule.linear(0.5, 1.0, 20)},
        arguments=lambda batch: (batch,),
        seed=3,
    )
    return module, drawn


def run(module, folder, **options):
    training.fit(module, folder, checkpoint_every=10, log_every=1, progress_bar=False, accelerator="cpu", **options)


def losses(folder):
    found = {}
    for log in sorted((folder / "logs").glob("*/metrics.csv")):
        with log.open(newline="") as file:
            found |= {int(row["step"]): row for row in csv.DictReader(file)}
    return found


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    whole, batches = make()
    run(whole, tmp_path / "whole", clip_norm=1.0)
    broken, _ = make(stop_at=17)
    with pytest.raises(Interrupted):
        run(broken, tmp_path / "parts", clip_norm=1.0)
    resumed, later = make()
    run(resumed, tmp_path / "parts", clip_norm=1.0, resume=True)

    assert len(later) == 20  # steps 10 to 29: the last checkpoint was at step 10
    torch.testing.assert_close(later[0], batches[10], rtol=0, atol=0)
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    one, two = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert one.keys() >= set(range(10, 30))
    for step in range(10, 30):
        assert one[step] == two[step]


def test_every_term_and_weight_is_logged_and_follows_its_schedule(tmp_path):
    module, _ = make()
    run(module, tmp_path)
    rows = losses(tmp_path)
    wanted = {"log_p(x)", "KL(z)", "weight(z)", "input(gain)", "learning_rate", "elbo", "loss"}
    assert wanted <= rows[0].keys()
    assert float(rows[10]["weight(z)"]) == pytest.approx(0.5)
    assert float(rows[10]["input(gain)"]) == pytest.approx(0.75)
    assert float(rows[29]["weight(z)"]) == pytest.approx(1.0)
    elbo = float(rows[10]["log_p(x)"]) - float(rows[10]["KL(z)"])
    assert float(rows[10]["elbo"]) == pytest.approx(elbo, rel=1e-5)
    loss = -5 * (float(rows[10]["log_p(x)"]) - 0.5 * float(rows[10]["KL(z)"]))
    assert float(rows[10]["loss"]) == pytest.approx(loss, rel=1e-5)
    assert list((tmp_path / "tensorboard").rglob("events.out.*"))


def test_training_raises_the_bound(tmp_path):
    module, _ = make(num_steps=200)
    run(module, tmp_path)
    rows = losses(tmp_path)
    first = sum(float(rows[step]["elbo"]) for step in range(20))
    last = sum(float(rows[step]["elbo"]) for step in range(180, 200))
    assert last > first + 20 * 0.3  # 20 steps, by 0.3 nats a sequence; measured: about 1


def test_nan_names_term_sequence_and_step_and_keeps_the_last_checkpoint(tmp_path):
    module, _ = make(bad_at=12)
    with pytest.raises(FloatingPointError, match=r"log_likelihood\['x'\] is nan at training step 12 \(sequence 2\)"):
        run(module, tmp_path)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 10


def test_checkpoint_loads_with_weights_only_and_no_unfinished_file_is_left(tmp_path):
    module, _ = make()
    run(module, tmp_path)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 30
    torch.testing.assert_close(
        checkpoint["state_dict"]["network.encode.weight"], module.network.encode.weight.data, rtol=0, atol=0
    )
    assert not list(tmp_path.rglob("*.unfinished"))


def test_existing_run_is_not_overwritten(tmp_path):
    module, _ = make()
    run(module, tmp_path)
    with pytest.raises(FileExistsError, match="last.ckpt exists; resume"):
        run(make()[0], tmp_path)


def test_training_leaves_pyros_store_and_the_random_state_alone(tmp_path):
    module, _ = make(num_steps=3)
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    run(module, tmp_path)
    torch.testing.assert_close(torch.rand(3), wanted, rtol=0, atol=0)
    assert not list(pyro.get_param_store().keys())


def test_step_seeds_differ_by_step_stream_and_rank():
    seeds = {
        training.step_seed(seed, stream, step, rank)
        for seed in (0, 1)
        for stream in ("batch", "noise")
        for step in range(10)
        for rank in range(3)
    }
    assert len(seeds) == 2 * 2 * 10 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_checkpoint_loads_outside_training(tmp_path):
    module, _ = make()
    run(module, tmp_path)
    other, drawn = make()
    for parameter in other.network.parameters():
        parameter.requires_grad_(False)  # a frozen copy, to be used
    options = {name: getattr(other, name) for name in ("network", "model", "guide", "draw", "num_steps")}
    loaded = training.ELBOTraining.load_from_checkpoint(
        tmp_path / "last.ckpt", **options, learning_rate=other.learning_rate
    )
    torch.testing.assert_close(loaded.network.encode.weight.data, module.network.encode.weight.data, rtol=0, atol=0)
    assert not drawn


class Exits(training.Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            raise self.error


def test_only_ctrl_c_is_ctrl_c(tmp_path):
    with pytest.raises(SystemExit, match="7"):  # what a callback, or SIGTERM, makes of a run
        run(make()[0], tmp_path / "exit", callbacks=(Exits(SystemExit(7)),))
    with pytest.raises(KeyboardInterrupt):
        run(make()[0], tmp_path / "interrupt", callbacks=(Exits(KeyboardInterrupt()),))


def test_a_trainer_of_ones_own_may_log_nothing(tmp_path):
    module, _ = make(num_steps=3)
    options = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    logger = training.CSVLogger(tmp_path, "logs")
    with training._quiet():
        training.lightning.Trainer(
            max_steps=3, logger=logger, log_every_n_steps=0, accelerator="cpu", default_root_dir=tmp_path, **options
        ).fit(module)
    assert module.global_step == 3
    assert not logger.experiment.metrics
