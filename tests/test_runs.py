"""Training in stages: each is done once, wherever a run is ended in between."""

import json

import pytest
import torch

lightning = pytest.importorskip("lightning")

from small_runs import Interrupted, Linear, make  # noqa: E402

from seqdisent import training  # noqa: E402

QUIET = {"checkpoint_every": 5, "progress_bar": False, "accelerator": "cpu"}


def stages(network, begun, *, stop=None):
    """Two stages and one that is skipped, between them; `stop` names one that ends after ten steps."""

    def stage(name, seed):
        begun.append(name)
        made, _ = make(num_steps=12, stop_at=10 if name == stop else None)
        options = {"num_steps": 12, "learning_rate": made.learning_rate, "arguments": made.arguments, "seed": seed}
        return training.ELBOTraining(network, network.model, network.guide, made.draw, **options)

    return {"first": lambda: stage("first", 1), "skipped": lambda: None, "second": lambda: stage("second", 2)}


def trained(folder, *, stop=None, resume=False):
    torch.manual_seed(0)
    network, begun = Linear(), []
    found = training.train_stages(network, stages(network, begun, stop=stop), folder, resume=resume, **QUIET)
    assert list(found) == begun == ["first", "second"]
    return network


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return trained(folder), folder


def test_every_stage_has_a_folder_of_its_own(whole):
    network, folder = whole
    assert sorted(path.name for path in folder.iterdir()) == ["first", "second"]
    for name in ("first", "second"):
        assert {"last.ckpt", "logs", "minutes.json", "model.pt"} <= {path.name for path in (folder / name).iterdir()}
        assert 0 < json.loads((folder / name / "minutes.json").read_text()) < 1
    first, second = (torch.load(folder / name / "model.pt", weights_only=True) for name in ("first", "second"))
    torch.testing.assert_close(dict(network.state_dict()), dict(second), rtol=0, atol=0)
    assert (first["decode.weight"] != second["decode.weight"]).any()


@pytest.mark.parametrize("stop", ["first", "second"])
def test_a_run_that_was_ended_goes_on_and_ends_alike(stop, whole, tmp_path):
    with pytest.raises(Interrupted):
        trained(tmp_path, stop=stop)
    assert (tmp_path / "first" / "model.pt").exists() == (stop == "second")
    with pytest.raises(FileExistsError, match="^folder: .* exists; resume that run"):
        trained(tmp_path)
    network = trained(tmp_path, resume=True)
    torch.testing.assert_close(dict(network.state_dict()), dict(whole[0].state_dict()), rtol=0, atol=0)


def test_a_finished_stage_is_not_trained_again(whole, tmp_path):
    trained(tmp_path)
    before = (tmp_path / "first" / "last.ckpt").stat().st_mtime_ns
    again = trained(tmp_path, resume=True)
    assert (tmp_path / "first" / "last.ckpt").stat().st_mtime_ns == before
    torch.testing.assert_close(dict(again.state_dict()), dict(whole[0].state_dict()), rtol=0, atol=0)


def test_weights_of_another_network_are_refused(tmp_path):
    trained(tmp_path)
    training.save_weights(torch.nn.Linear(2, 2), tmp_path / "first" / "model.pt")
    with pytest.raises(training.CheckpointError, match="first/model.pt"):
        trained(tmp_path, resume=True)


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    trained(tmp_path)
    with pytest.raises(FileExistsError, match="first/model.pt exists; resume that run"):
        trained(tmp_path)


def test_a_stage_that_an_option_ended_early_is_not_done(whole, tmp_path):
    class Enough(lightning.pytorch.callbacks.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 7

    torch.manual_seed(0)
    network, begun = Linear(), []
    found = training.train_stages(network, stages(network, begun), tmp_path, callbacks=(Enough(),), **QUIET)
    assert list(found) == ["first"]
    assert not (tmp_path / "first" / "model.pt").exists()
    network = trained(tmp_path, resume=True)
    torch.testing.assert_close(dict(network.state_dict()), dict(whole[0].state_dict()), rtol=0, atol=0)


def test_a_stage_that_returns_no_training_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"stages\['priors'\]: returned dict, expected ELBOTraining or None"):
        training.train_stages(torch.nn.Linear(1, 1), {"skipped": lambda: None, "priors": dict}, tmp_path)
