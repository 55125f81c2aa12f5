"""Training: resumed runs are exact, failures name their term, checkpoints are plain tensors."""

import contextlib
import signal
from functools import partial
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from seqdisent import AnnealingSchedule

lightning = pytest.importorskip("lightning")
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, Logger  # noqa: E402
from small_runs import Interrupted, Linear, losses, make, run  # noqa: E402

from seqdisent import IndependentSteps, _checks, elbo_terms, training  # noqa: E402
from seqdisent.datasets import Clips  # noqa: E402
from seqdisent.training import checkpoints  # noqa: E402
from seqdisent.training.fit import _quiet  # noqa: E402
from seqdisent.training.module import step_seed  # noqa: E402


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
    with pytest.raises(FileExistsError, match=r"^folder: .*last\.ckpt"):
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
        step_seed(seed, stream, step, rank)
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


class Exits(Callback):
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
    logger = CSVLogger(tmp_path, "logs")
    with _quiet():
        lightning.Trainer(
            max_steps=3, logger=logger, log_every_n_steps=0, accelerator="cpu", default_root_dir=tmp_path, **options
        ).fit(module)
    assert module.global_step == 3
    assert not logger.experiment.metrics


# What would train nothing, or the wrong thing ------------------------------------------------------------------------


def changed(**options):
    module, _ = make(num_steps=5)
    for name, value in options.items():
        setattr(module, name, value)
    return module


def likelihood_of_every_step(terms, weights):
    return terms.log_likelihood["x"][:, None] - terms.kl["z"][:, None].expand(-1, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"objective": likelihood_of_every_step}, ValueError,
         r"^objective: .*\(5, 2\)"),
        ({"objective": lambda terms, _: terms.elbo().mean()}, ValueError, r"^objective: .*\(\)"),
        ({"objective": lambda terms, _: None}, ValueError, "^objective: .*NoneType"),
        ({"objective": lambda terms, _: (terms.elbo() * 0 - 1).log()}, FloatingPointError,
         "loss is nan at training step 0"),
        ({"terms_per_step": 0}, FloatingPointError, "loss is inf at training step 0"),
        ({"weights": {"zz": lambda _: 1.0}, "objective": lambda terms, _: terms.elbo()}, ValueError,
         r"^weights: .*\['zz'\]"),
        ({"rate_factors": {"encodr": 0.1}}, ValueError,
         r"^rate_factors: .*\['encodr'\]"),
        ({"arguments": lambda batch: batch}, TypeError, "^arguments: "),
        ({"arguments": training.frames_and_mask}, TypeError, "^draw: "),
        ({"objective": lambda terms, _: terms.elbo() + pyro.param("free", torch.zeros(()))}, ValueError,
         "^network: "),
        ({"network": Linear()}, ValueError,
         "^network: "),
    ],
)  # fmt: skip
def test_what_would_train_the_wrong_thing(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run(changed(**options), tmp_path)
    pyro.clear_param_store()
    assert not (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 1e-3}, "^learning_rate: "),
        ({"weights": {"z": 0.4}}, r"^weights\['z'\]: "),
        ({"inputs": {"gain": 0.5}}, r"^inputs\['gain'\]: "),
    ],
)  # fmt: skip
def test_a_number_is_no_schedule(options, message):
    network = Linear()
    whole = {"num_steps": 3, "learning_rate": AnnealingSchedule.constant(1e-3), **options}
    with pytest.raises(TypeError, match=message):
        training.ELBOTraining(network, network.model, network.guide, lambda _: None, **whole)


def test_a_gradient_that_is_not_finite_is_never_saved(tmp_path):
    """The square root at 0 is finite, its gradient is not; the ledger shows it one step late, and is not to blame."""
    module, _ = make(num_steps=30)
    bad = 10

    def objective(terms, weights):
        return terms.elbo(weights) + ((terms.kl["z"] * 0).sqrt() if module.global_step == bad else 0.0)

    module.objective = objective
    with pytest.raises(FloatingPointError, match="encode.weight .* 11 "):
        run(module, tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 10
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())
    bad = 19  # and where a checkpoint is due at once
    with pytest.raises(FloatingPointError, match="encode.weight .* 20 "):
        run(module, tmp_path, resume=True)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 10
    bad = None
    mended, _ = make()
    mended.objective = objective
    run(mended, tmp_path, resume=True)


def test_a_run_goes_on_with_its_seed_and_not_backwards(tmp_path):
    run(make(num_steps=10)[0], tmp_path)
    other = make(num_steps=10)[0]
    other.seed = 4
    with pytest.raises(training.CheckpointError, match=r"last\.ckpt: .*seed=4"):
        run(other, tmp_path, resume=True)
    with pytest.raises(training.CheckpointError, match=r"last\.ckpt: .*num_steps=7"):
        run(make(num_steps=7)[0], tmp_path, resume=True)


def test_a_weight_may_be_a_tensor(tmp_path):
    module = changed(weights={"z": lambda step: torch.full((5,), 0.5)})
    run(module, tmp_path)
    assert {float(row["weight(z)"]) for row in losses(tmp_path).values()} == {0.5}


# The end of a run ----------------------------------------------------------------------------------------------------


def averaged():
    return EMAWeightAveraging(decay=0.9)


@pytest.fixture(scope="module")
def averaged_whole(tmp_path_factory):
    module, _ = make(num_steps=20)
    run(module, tmp_path_factory.mktemp("averaged"), callbacks=(averaged(),))
    return module.network.state_dict()


@pytest.mark.parametrize("steps_before", [15, 20])
def test_averaged_weights_are_those_of_one_run(steps_before, averaged_whole, tmp_path):
    """Extended from an end, and resumed at one: what callbacks do at the end of a run is done at its last end alone."""
    before, after = make(num_steps=steps_before)[0], make(num_steps=20)[0]
    before.learning_rate = after.learning_rate
    run(before, tmp_path, callbacks=(averaged(),))
    run(after, tmp_path, callbacks=(averaged(),), resume=True)
    torch.testing.assert_close(after.network.state_dict(), averaged_whole, rtol=0, atol=0)


class AtTheEnd(Callback):
    def on_train_end(self, *_):
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_after_the_last_step_ends_the_process_too(tmp_path):
    with pytest.raises(SystemExit, match="143"):
        run(make(num_steps=3)[0], tmp_path, callbacks=(AtTheEnd(),))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


def test_a_finished_run_resumes_with_its_progress_bar(tmp_path):
    run(make(num_steps=4)[0], tmp_path)
    training.fit(make(num_steps=4)[0], tmp_path, resume=True, accelerator="cpu")


class StopsEarly(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 7


def test_a_run_that_a_callback_ends_keeps_its_last_step(tmp_path):
    run(make()[0], tmp_path, callbacks=(StopsEarly(),))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 7


def test_numbers_of_numpy_make_no_unreadable_checkpoint(tmp_path):
    np = pytest.importorskip("numpy")
    for num_steps in (5, 10):
        module, _ = make(num_steps=num_steps)
        again = training.ELBOTraining(
            module.network, module.model, module.guide, module.draw, num_steps=np.int64(num_steps),
            learning_rate=lambda step: np.float64(1e-3) * np.cos(step), seed=np.int64(3),
            arguments=lambda batch: (batch,),
        )  # fmt: skip
        run(again, tmp_path, resume=num_steps == 10)
    assert again.global_step == 10


def test_what_is_not_trained_may_be_infinite_and_others(tmp_path):
    module = changed()
    module.network.bias = nn.Parameter(torch.full((2,), -torch.inf), requires_grad=False)  # a mask of attention, say
    teacher = nn.Linear(3, 1).requires_grad_(False)
    frames = torch.randn(5, 3, requires_grad=True)  # nor is a frame a parameter
    module.draw = lambda generator: frames.detach().requires_grad_()
    module.objective = lambda terms, weights: terms.elbo(weights) + teacher(frames.detach()).mean()
    run(module, tmp_path)
    assert (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.parametrize("objective", ["elbo", "stl", "iwae", "dreg"])
def test_an_objective_by_name_is_that_of_the_ledger(tmp_path, objective, num_particles):
    """A step of gradient descent, with the noise of the run: particles in one run, on the left of the sequences."""
    options = {"objective": objective, "num_particles": num_particles, "kl": "monte-carlo"}
    changes = {"weights": {}, "inputs": {}, "optimizer": partial(torch.optim.SGD), "num_steps": 1, **options}
    module = changed(**changes)
    before = [p.detach().clone() for p in module.network.parameters()]
    batch = module.draw(torch.Generator().manual_seed(step_seed(3, "batch", 0, 0)))
    with torch.random.fork_rng([]):
        torch.manual_seed(step_seed(3, "noise", 0, 0))
        particles = {"vectorize_particles": num_particles > 1}
        terms = elbo_terms(module.model, module.guide, batch, **options, **particles)
    wanted = torch.autograd.grad(-terms.bound().sum(), list(module.network.parameters()))
    run(module, tmp_path)
    for new, old, gradient in zip(module.network.parameters(), before, wanted, strict=True):
        torch.testing.assert_close(new, old - 1e-2 * gradient)
    row = losses(tmp_path)[0]
    assert float(row["loss"]) == pytest.approx(-terms.bound().sum().item(), rel=1e-5)
    assert float(row["elbo"]) == pytest.approx(terms.elbo().mean().item(), rel=1e-5)
    assert ("iwae" in row) == (objective in ("iwae", "dreg"))
    assert float(row.get("iwae", row["elbo"])) == pytest.approx(terms.bound().mean().item(), rel=1e-5)


def test_auxiliary_losses_are_trained_logged_and_left_out_of_validation(tmp_path):
    """A step of gradient descent on the bound less the weighted loss, with the weight of that step."""
    far = {"far": lambda drawn, *_, **__: drawn["z"].value.square().sum(-1)}
    options = {"weights": {"far": AnnealingSchedule.constant(0.3)}, "inputs": {}, "num_steps": 1}
    module = changed(auxiliary_losses=far, optimizer=partial(torch.optim.SGD), **options)
    before = [p.detach().clone() for p in module.network.parameters()]
    batch = module.draw(torch.Generator().manual_seed(step_seed(3, "batch", 0, 0)))
    module.validation = [batch]
    with torch.random.fork_rng([]):
        torch.manual_seed(step_seed(3, "noise", 0, 0))
        terms = elbo_terms(module.model, module.guide, batch, auxiliary_losses=far)
    wanted = torch.autograd.grad(-terms.bound({"far": 0.3}).sum(), list(module.network.parameters()))
    run(module, tmp_path)
    for new, old, gradient in zip(module.network.parameters(), before, wanted, strict=True):
        torch.testing.assert_close(new, old - 1e-2 * gradient)
    row = losses(tmp_path)[0]
    assert float(row["auxiliary_loss(far)"]) == pytest.approx(terms.auxiliary_losses["far"].mean().item(), rel=1e-5)
    assert float(row["weight(far)"]) == pytest.approx(0.3)
    assert float(row["elbo"]) == pytest.approx(terms.elbo().mean().item(), rel=1e-5)
    assert module._validation_terms(batch, 0).auxiliary_losses == {}


def test_auxiliary_losses_are_subtracted_from_an_objective_of_one_s_own(tmp_path):
    far = {"far": lambda drawn, *_, **__: drawn["z"].value.square().sum(-1)}
    seen = []

    def objective(terms, weights):
        seen.append((terms.penalty({"far": 0.3}).sum().item(), terms.elbo().sum().item(), weights))
        return terms.elbo()

    weights = {"far": AnnealingSchedule.constant(0.3)}
    module = changed(auxiliary_losses=far, weights=weights, inputs={}, num_steps=1, objective=objective)
    run(module, tmp_path)
    ((penalty, bound, given),) = seen
    assert "far" not in given
    assert float(losses(tmp_path)[0]["loss"]) == pytest.approx(penalty - bound, rel=1e-5)


def test_training_finds_out_once_where_the_particles_stand(tmp_path):
    runs = []
    module = changed(objective="iwae", weights={}, inputs={}, num_steps=3, num_particles=2)
    model = module.model
    module.__dict__["model"] = lambda *args, **kwargs: (runs.append(1), model(*args, **kwargs))
    run(module, tmp_path)
    assert len(runs) == 4


def test_an_objective_knows_every_latent_s_weight(tmp_path):
    seen = []

    def objective(terms, weights):
        seen.append(dict(weights))
        return terms.log_likelihood["x"] - sum(weight * terms.kl[site] for site, weight in weights.items())

    run(changed(objective=objective, weights={}), tmp_path / "none")
    assert seen == [{"z": 1.0}] * 5


# Options of the training and of the trainer --------------------------------------------------------------------------


def test_any_optimiser_at_the_rate_of_the_schedule(tmp_path):
    """One step of plain gradient descent, by hand; its own rate, 7, is never used."""
    module = changed(optimizer=partial(torch.optim.SGD, lr=7.0), rate_factors={"decode": 0.5})
    module.num_steps, rate = 1, module.learning_rate(0)
    before = {name: parameter.detach().clone() for name, parameter in module.network.named_parameters()}
    run(module, tmp_path)
    for name, parameter in module.network.named_parameters():
        factor = 0.5 if name.startswith("decode") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] - rate * factor * parameter.grad)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_is_fused_unless_it_says_otherwise(optimizer, tmp_path):
    module = changed(optimizer=partial(optimizer, betas=(0.8, 0.9), weight_decay=0.1))
    run(module, tmp_path / "fused", clip_norm=1.0, precision="bf16-mixed")  # which Lightning refuses for `fused=True`
    (group,) = module.trainer.optimizers[0].param_groups
    assert (group["fused"], group["betas"], group["weight_decay"]) == (True, (0.8, 0.9), 0.1)
    other = changed(optimizer=partial(optimizer, fused=False))
    run(other, tmp_path / "not")
    assert other.trainer.optimizers[0].param_groups[0]["fused"] is False


def test_model_and_guide_take_keywords(tmp_path):
    run(changed(), tmp_path / "positional")
    run(changed(arguments=lambda batch: {"x": batch}), tmp_path / "keywords")
    assert losses(tmp_path / "keywords") == losses(tmp_path / "positional")


def without_a_bias(parameters):
    return torch.optim.SGD(parameters[:-1], lr=1.0)


def grouped_anew(groups):
    return torch.optim.SGD([parameter for group in groups for parameter in group["params"]], lr=1.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": lambda parameters: parameters}, TypeError, "^optimizer: "),
        ({"optimizer": without_a_bias}, ValueError, "^optimizer: "),
        ({"optimizer": grouped_anew, "rate_factors": {"encode": 0.1}}, ValueError,
         "^optimizer: "),
        ({"arguments": lambda batch: {"x": batch, "gain": 1.0}}, ValueError,
         "^inputs: "),
    ],
)  # fmt: skip
def test_options_of_a_training_that_do_not_fit(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run(changed(**options), tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_steps": 7}, TypeError, "^max_steps: "),
        ({"logger": False}, TypeError, "^logger: "),
        ({"acelerator": "cpu"}, TypeError, "^acelerator: "),
        ({"clip_norm": 1.0, "gradient_clip_val": 1.0}, ValueError, "^clip_norm: "),
        ({"plugins": checkpoints.AtomicCheckpointIO()}, TypeError, "^plugins: "),
    ],
)  # fmt: skip
def test_options_of_the_trainer_that_fit_decides(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run(make()[0], tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["draw", "optimizer", "arguments", "objective", "logged"])
def test_a_value_is_no_function(name):
    network = Linear()
    whole = {"num_steps": 3, "learning_rate": lambda _: 1e-3, "draw": lambda _: None}
    value, said = ({"scale": 3}, r"logged\['scale'\]: ") if name == "logged" else (3, f"{name}: ")
    with pytest.raises(TypeError, match=f"^{said}"):
        training.ELBOTraining(network, network.model, network.guide, **{**whole, name: value})


class Remembers(Logger):
    name, version = "remembers", 0

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        self.rows[step] = metrics

    def log_hyperparams(self, *_):
        pass


def test_loggers_and_trainer_options_are_lightning_s(tmp_path):
    logger, module = Remembers(), changed(logged={"scale": lambda network: network.encode.bias})
    run(module, tmp_path, loggers=[logger], gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    assert sorted(logger.rows) == [0, 1, 2, 3, 4]
    assert logger.rows[4]["scale"] == pytest.approx(module.network.encode.bias.mean().item(), abs=0.05)
    assert logger.rows[0]["scale"] != logger.rows[4]["scale"]
    assert max(parameter.grad.abs().max() for parameter in module.network.parameters()) <= 1e-3
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_terms_with_steps_are_logged_per_real_step(tmp_path):
    from flat_memory import StateSpaceVAE

    torch.manual_seed(0)
    network = StateSpaceVAE()
    lengths = torch.tensor([1, 3, 6])
    frames, mask = torch.randn(3, 6, 5), torch.arange(6) < lengths[:, None]
    module = training.ELBOTraining(
        network, network.model, network.guide, lambda _: {"x": frames, "mask": mask}, arguments=dict,
        num_steps=1, learning_rate=lambda _: 1e-3,
    )  # fmt: skip
    run(module, tmp_path)
    row = losses(tmp_path)[0]
    assert float(row["per_step/KL(z)"]) == pytest.approx(float(row["KL(z)"]) * 3 / 10, rel=1e-5)

    def model(x, mask):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            step = dist.Normal(z[:, None, None], network.emission.bias.exp()).to_event(1)
            pyro.sample("x", IndependentSteps(step, mask), obs=x)

    def guide(x, mask):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", dist.Normal(network.emission.bias[0], 1.0))

    module.model, module.guide = model, guide
    run(module, tmp_path / "independent")
    row = losses(tmp_path / "independent")[0]
    assert float(row["per_step/log_p(x)"]) == pytest.approx(float(row["log_p(x)"]) * 3 / 10, rel=1e-5)


def test_a_batch_of_clips_says_whether_it_is_ragged():
    frames = torch.zeros(3, 4, 1, 8, 8, dtype=torch.uint8)
    clips = Clips(frames, lengths=torch.tensor([4, 2, 4]))
    whole, ragged = clips.batch([0, 2]), clips.batch([0, 1])
    assert (whole.ragged, ragged.ragged) == (False, True)
    assert len(training.frames_and_mask(whole)) == 1
    assert training.frames_and_mask(ragged)[1] is ragged.mask
    foreign = SimpleNamespace(frames=whole.frames, mask=whole.mask)  # then the mask is read
    assert len(training.frames_and_mask(foreign)) == 1


def test_a_mask_with_a_hole_is_refused_as_it_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(_checks, "_AT_ONCE", frozenset())  # where blocks do not look, as on an accelerator
    hole = {"x": torch.zeros(2, 3), "mask": torch.tensor([[True, True, True], [True, False, True]])}
    with pytest.raises(ValueError, match="^mask: "):
        run(changed(draw=lambda _: hole, arguments=lambda batch: (batch["x"],)), tmp_path)


# How far it is -------------------------------------------------------------------------------------------------------


def test_minutes_add_up_over_resumptions(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("seqdisent.training.module.time.monotonic", lambda: now[0])

    def minutes_of(module, resume):
        draw = module.draw

        def slow(generator):
            now[0] += 6.0
            return draw(generator)

        module.draw = slow
        with contextlib.suppress(Interrupted):
            run(module, tmp_path, resume=resume)
        return module.minutes

    assert minutes_of(make(stop_at=17)[0], resume=False) == pytest.approx(1.1, abs=0.11)  # at the checkpoint of step 10
    now[0] += 1e6
    assert minutes_of(make()[0], resume=True) == pytest.approx(3.0, abs=0.11)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["minutes"] == pytest.approx(3.0, abs=0.11)
    finished = make()[0]
    run(finished, tmp_path, resume=True)
    assert finished.minutes == pytest.approx(3.0, abs=0.11)


def test_a_terminal_has_a_bar_that_goes_on_where_a_resumed_run_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    shown = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            bar = trainer.progress_bar_callback.train_progress_bar
            shown.append((trainer.global_step, bar.initial, bar.total))

    options = {"accelerator": "cpu", "checkpoint_every": 10, "log_every": 1, "callbacks": (Watch(),)}
    with pytest.raises(Interrupted):
        training.fit(make(stop_at=12)[0], tmp_path, **options)
    assert shown[0] == (1, 0, 30)
    capsys.readouterr()
    training.fit(make()[0], tmp_path, resume=True, **options)
    assert shown[-1] == (30, 10, 30)
    assert "30/30" in capsys.readouterr().out


def test_elsewhere_a_line_is_printed_now_and_then(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("seqdisent.training.progress.time.monotonic", lambda: now[0])
    module, _ = make()
    draw = module.draw

    def slow(generator):
        now[0] += 3.0
        return draw(generator)

    module.draw = slow
    training.fit(module, tmp_path, accelerator="cpu")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split(":")[0] for line in lines] == [f"step {n} of 30, 0.333 a second" for n in (10, 20, 30, 30)]
    assert all("log_p(x) -" in line and "KL(z) " in line for line in lines)
    assert "\r" not in capsys.readouterr().out


def test_a_network_that_is_the_model_itself_is_saved_once(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(1, 1)

        def forward(self, x):
            with pyro.plate("sequences", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(self, x):
            with pyro.plate("sequences", len(x)):
                pyro.sample("z", dist.Normal(self.q(x.unsqueeze(-1)).squeeze(-1), 0.7))

    def made(network):
        return training.ELBOTraining(
            network, network, network.guide, lambda generator: torch.randn(4, generator=generator),
            arguments=lambda batch: (batch,), num_steps=3, learning_rate=AnnealingSchedule.constant(0.1),
        )  # fmt: skip

    network, other = Both(), Both()
    training.fit(made(network), tmp_path, progress_bar=False, accelerator="cpu", averaging=0.5)
    assert set(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]) == {
        "network.q.weight", "network.q.bias"
    }  # fmt: skip
    training.load_weights(other, tmp_path / "last.ckpt")
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
