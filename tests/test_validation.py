"""Validation: training does not see it, a resumed run goes on with it, and it finds the best weights."""

from __future__ import annotations

import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import Callback  # noqa: E402
from small_runs import Interrupted, Linear, losses, make, run  # noqa: E402

from seqdisent import elbo_terms, training  # noqa: E402
from seqdisent.training.module import step_seed  # noqa: E402
from seqdisent.training.validation import evaluate  # noqa: E402

HELD_OUT = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 3)]


def validated(*, validation=HELD_OUT, **options):
    module, _ = make(**options)
    module.validation = validation
    return module


def validations(folder):
    """Return the logged validations, {step: row}."""
    return {
        int(row["step"]): {name: float(value) for name, value in row.items() if name.startswith("validation/")}
        for row in losses(folder, key="validation/elbo").values()
    }


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


class ModesAndRandomState(Callback):
    """Notes what a validation must leave alone, before and after each step's callbacks."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, *_):
        self.seen.append((torch.get_rng_state().sum().item(), [part.training for part in module.network.modules()]))


# What it does not change ----------------------------------------------------------------------------------------------


def with_dropout(module):
    module.network.encode = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    module.network.frozen = nn.BatchNorm1d(2).eval()  # a module that its user set to evaluate stays so
    return module


@pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode")
def test_training_is_the_same_bit_for_bit_with_and_without(tmp_path):
    without, watched, watching = with_dropout(make()[0]), with_dropout(validated()), ModesAndRandomState()
    torch.manual_seed(5)
    for module in (without, watched):
        for part in (module.network.encode, module.network.decode):
            for parameter in part.parameters():
                nn.init.constant_(parameter, 0.1)
    run(without, tmp_path / "without")
    run(watched, tmp_path / "with", validate_every=4, callbacks=(watching,))
    same(dict(watched.network.named_parameters()), dict(without.network.named_parameters()))
    one, two = losses(tmp_path / "without"), losses(tmp_path / "with")
    assert {step: row["loss"] for step, row in one.items()} == {step: row["loss"] for step, row in two.items()}
    assert len(set(map(str, watching.seen))) == 1
    assert not watched.network.frozen.training


# What it finds --------------------------------------------------------------------------------------------------------


def test_it_is_the_mean_bound_of_all_held_out_sequences_at_fixed_noise(tmp_path):
    module = validated()
    module.network.encode = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))  # which drops nothing here
    run(module, tmp_path, validate_every=7)
    found = validations(tmp_path)
    assert list(found) == [7, 14, 21, 28, 30]  # and after the last step
    total = {"validation/elbo": 0.0, "validation/KL(z)": 0.0, "validation/log_p(x)": 0.0}
    module.network.eval()
    for index, batch in enumerate(HELD_OUT):
        torch.manual_seed(step_seed(3, "validation", index, 0))
        terms = elbo_terms(module.model, module.guide, batch, gain=module.inputs["gain"](29))
        total["validation/elbo"] += terms.elbo().sum().item() / 9
        total["validation/KL(z)"] += terms.kl["z"].sum().item() / 9
        total["validation/log_p(x)"] += terms.log_likelihood["x"].sum().item() / 9
    assert found[30] == pytest.approx(total, rel=1e-5)


def shuffled():
    return iter(DataLoader(HELD_OUT, batch_size=None, shuffle=True))


@pytest.mark.parametrize("validation", [lambda: iter(HELD_OUT), DataLoader(HELD_OUT, batch_size=None)])
def test_batches_may_come_from_a_function_or_a_loader(validation, tmp_path):
    run(validated(), tmp_path / "list", validate_every=15)
    run(validated(validation=validation), tmp_path / "other", validate_every=15)
    assert validations(tmp_path / "list") == validations(tmp_path / "other")


def test_a_loader_that_shuffles_gives_the_same_bound_and_leaves_the_random_state_alone(tmp_path):
    module = validated(validation=shuffled, num_steps=2)
    module.learning_rate = lambda _: 0.0
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    run(module, tmp_path, validate_every=1)
    same(torch.rand(3), wanted)
    again = validated(validation=shuffled, num_steps=2)
    again.learning_rate = module.learning_rate
    torch.manual_seed(4)  # as a process that resumes the run may have it
    run(again, tmp_path / "again", validate_every=1)
    assert validations(tmp_path / "again") == validations(tmp_path)
    first, second = validations(tmp_path).values()
    assert first["validation/KL(z)"] == second["validation/KL(z)"]  # no term of the gain, which is annealed


def test_the_best_checkpoint_has_the_weights_of_the_best_bound(tmp_path):
    module = validated(num_steps=20)
    module.learning_rate = lambda step: 0.02 if step < 10 else -0.05  # uphill, then downhill
    run(module, tmp_path, validate_every=5)
    bounds = {step: row["validation/elbo"] for step, row in validations(tmp_path).items()}
    assert max(bounds, key=bounds.get) == 10
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 10
    at_the_end = module.network.encode.weight.clone()
    training.load_weights(module.network, tmp_path / "best.ckpt")
    assert not torch.equal(module.network.encode.weight, at_the_end)
    module.on_fit_start = lambda: None
    found = evaluate(module.trainer, module)  # with the inputs of the end
    assert found["elbo"] > bounds[20]


# Stopping early -------------------------------------------------------------------------------------------------------


def getting_worse(**options):
    module = validated(**options)
    module.learning_rate = lambda step: 0.01 if step < 8 else -0.05
    return module


def test_a_run_stops_after_as_many_validations_without_a_better_bound(tmp_path, capsys):
    run(getting_worse(), tmp_path, validate_every=4, patience=2)
    assert capsys.readouterr().out == ""  # without a progress bar, nothing is said
    assert list(validations(tmp_path)) == [4, 8, 12, 16]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 16
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 8
    again = getting_worse()
    run(again, tmp_path, validate_every=4, patience=2, resume=True)  # a run that has stopped is over
    assert again.global_step == 16
    patient = getting_worse()
    run(patient, tmp_path, validate_every=4, patience=3, resume=True)
    assert patient.global_step == 20


def test_a_run_that_a_callback_ends_is_validated_once_more(tmp_path):
    class Enough(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 3

    run(getting_worse(), tmp_path, validate_every=4, callbacks=(Enough(),))
    assert list(validations(tmp_path)) == [3]
    assert (tmp_path / "best.ckpt").exists()


# Averaging ------------------------------------------------------------------------------------------------------------


def test_validation_and_the_end_of_a_run_have_the_averaged_weights(tmp_path):
    weights = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            weights.append(module.network.encode.weight.detach().clone())

    module = validated(num_steps=6)
    seen = []
    terms = module._validation_terms
    module._validation_terms = lambda *given: (seen.append(module.network.encode.weight.clone()), terms(*given))[1]
    run(module, tmp_path, validate_every=3, averaging=0.8, callbacks=(Watch(),))
    average, expected = weights[0], {}
    for step, now in enumerate(weights, 1):
        average = now if step == 1 else average + 0.2 * (now - average)
        expected[step] = average
    torch.testing.assert_close(seen[0], expected[3])
    torch.testing.assert_close(seen[-1], expected[6])
    torch.testing.assert_close(module.network.encode.weight.detach(), expected[6])
    assert not torch.equal(weights[5], expected[6])
    fresh = Linear()
    training.load_weights(fresh, tmp_path / "best.ckpt")
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"]
    torch.testing.assert_close(fresh.encode.weight.detach(), expected[best])


def test_averaging_copies_no_data(tmp_path):
    class Data(list):
        def __deepcopy__(self, memo):
            raise AssertionError("the data was copied")

        def draw(self, generator):
            return self[0]

    data = Data(HELD_OUT)
    module = validated(num_steps=3, validation=data)
    module.draw = data.draw
    run(module, tmp_path, averaging=0.9)


def test_averaged_weights_do_not_go_on_as_others(tmp_path):
    run(validated(num_steps=4), tmp_path, averaging=0.9)
    with pytest.raises(training.CheckpointError, match=r"last\.ckpt: .*averaged"):
        run(validated(num_steps=8), tmp_path, resume=True)


# Resuming -------------------------------------------------------------------------------------------------------------

OPTIONS = {"validate_every": 4, "patience": 3, "averaging": 0.7}


@pytest.fixture(scope="module", params=["to the end", "stopped early"])
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    build = {"to the end": validated, "stopped early": getting_worse}[request.param]
    module = build()
    run(module, folder, **OPTIONS)
    return build, module, folder


def checkpoint(path):
    found = torch.load(path, weights_only=True)
    found.pop("minutes")
    return found


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def interrupted(module, at, how):
    draw, drawn = module.draw, []

    def stop(generator):
        drawn.append(None)
        if len(drawn) == at + 1:
            if how == "raise":
                raise Interrupted
            signal.raise_signal(signal.SIGTERM)
        return draw(generator)

    module.draw = stop
    return module


@pytest.mark.parametrize(("at", "how"), [(13, "raise"), (9, "raise"), (11, "SIGTERM"), (14, "SIGTERM")])
def test_a_resumed_run_ends_with_the_same_best_and_last_checkpoint(at, how, whole, tmp_path):
    """Also where best.ckpt is newer than last.ckpt, or a step that a kill undoes had been the best."""
    build, wanted, folder = whole
    with pytest.raises(Interrupted if how == "raise" else SystemExit):
        run(interrupted(build(), at, how), tmp_path, **OPTIONS)
    module = build()
    run(module, tmp_path, resume=True, **OPTIONS)
    assert module.global_step == wanted.global_step
    same(module.network.state_dict(), wanted.network.state_dict())
    for name in ("best.ckpt", "last.ckpt"):
        assert equal(checkpoint(tmp_path / name), checkpoint(folder / name))
    assert validations(tmp_path) == validations(folder)


def test_a_full_disk_leaves_the_best_checkpoint_before(tmp_path, monkeypatch):
    from seqdisent.training import checkpoints

    write = checkpoints.write_tensors

    def full(content, path):
        if path.name == "best.ckpt" and content["global_step"] == 8:
            monkeypatch.setattr(torch, "save", out_of_space)
        write(content, path)

    def out_of_space(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with pytest.raises(OSError, match=r"best\.ckpt .*No space left on device"):
        run(validated(), tmp_path, validate_every=4)
    monkeypatch.undo()
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 4
    assert not list(tmp_path.rglob("*.unfinished"))


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("validation", "error", "message"),
    [
        (iter(HELD_OUT), TypeError, "^validation: "),
        (HELD_OUT[0], TypeError, "^validation: "),
        ((torch.zeros(4), torch.zeros(4)), TypeError, "^validation: got one tuple"),
        (3, TypeError, "^validation: "),
    ],
)  # fmt: skip
def test_what_is_no_set_of_batches(validation, error, message):
    network = Linear()
    with pytest.raises(error, match=message):
        training.ELBOTraining(
            network, network.model, network.guide, len, num_steps=3, learning_rate=len, validation=validation
        )


@pytest.mark.parametrize(
    ("validation", "options", "error", "message"),
    [
        ([], {}, ValueError, "^validation: "),
        (HELD_OUT, {"validate_every": 0}, ValueError, "^validate_every: "),
        (HELD_OUT, {"patience": 0}, ValueError, "^patience: "),
        (None, {"patience": 2}, ValueError, "^patience: "),
        (None, {"validate_every": 2}, ValueError, "^validate_every: "),
        (HELD_OUT, {"averaging": 1.0}, ValueError, "^averaging: "),
        ([HELD_OUT[0] * torch.nan], {}, FloatingPointError, "validation/elbo .*nan"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(validation, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run(validated(validation=validation), tmp_path, **options)


@pytest.mark.parametrize("objective", ["iwae", "dreg"])
def test_the_best_checkpoint_is_chosen_by_the_bound_that_is_trained(tmp_path, objective):
    module = validated()
    module.weights, module.objective, module.num_particles = {}, objective, 5
    run(module, tmp_path, validate_every=10)
    found = validations(tmp_path)
    assert all(row["validation/iwae"] > row["validation/elbo"] for row in found.values())
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)
    (state,) = [value for name, value in best["callbacks"].items() if name.startswith("Validation")]
    assert state["best"] == pytest.approx(max(row["validation/iwae"] for row in found.values()), rel=1e-5)
