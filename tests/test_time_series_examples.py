"""The examples on series of numbers, as a person runs them, at a tiny size on the real data."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from commands import run_here

for needed in ("lightning", "sklearn", "torchmetrics"):
    pytest.importorskip(needed)
EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *arguments):
    done = run_here(EXAMPLES / f"{name}.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.mark.parametrize(("data", "score"), [("air_quality", "accuracy"), ("icu", "AUROC")])
def test_codes_of_series_are_scored_beside_baselines(data, score, data_root, tmp_path):
    printed = run("time_series", data, tmp_path / "run", "--num-steps", 2, "--epochs", 1, "--seeds", 3)
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(found) == 4
    for name, scores in found.items():
        assert 0 <= scores[0][score] <= 1
        assert f"{name:24} {score:8} {scores[0][score]:.3f}" in printed


def test_the_splits_are_those_of_the_protocol(example, data_root):
    task = example("time_series").icu(Path(data_root), 0, False)
    assert len(task.series) == 1900
    assert (task.test == torch.arange(380)).all()
    assert sorted(torch.cat([task.test, task.train, task.valid]).tolist()) == list(range(1900))
    assert len(task.train) == round(0.8 * 1520)
    task = example("time_series").air_quality(Path(data_root), 0, False)
    assert (len(task.series), len(task.test)) == (576, 144)
    assert sorted(torch.cat([task.test, task.train, task.valid]).tolist()) == list(range(576))
    seen = task.series.values[task.train][task.series.observed[task.train]]
    assert abs(seen.mean()) < 0.01
    assert abs(seen.std() - 1) < 0.01


def test_forecasts_are_scored_beside_baselines(data_root, tmp_path):
    run("ett", tmp_path / "run", "--num-steps", 2, "--num-samples", 5, "--stride", 960)
    assert (tmp_path / "run" / "days-with-a-static-code.png").exists()
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(found) == ["the day before", "linear-Gaussian", "days with a static code"]
    for scores in found.values():
        assert set(scores["24 hours"]) == set(scores["96 hours"]) == {"MSE", "CRPS", "50 %", "90 %"}


def test_windows_of_a_part_do_not_see_a_later_one(example, data_root):
    ett = example("ett")
    values = ett.hours(Path(data_root))
    other = values.clone()
    other[ett.PARTS["valid"][0] :] = 1e6
    train = ett.windows(values, "train", 50)
    assert torch.equal(train.series.values, ett.windows(other, "train", 50).series.values)
    test = ett.windows(values, "test", 240)
    hour = ett.PARTS["test"][0]  # the first hour that is forecast
    ahead = test.series.values[:7, ett.KNOWN, 0].unsqueeze(-1) * test.scale[:7, 0] + test.loc[:7, 0]
    torch.testing.assert_close(ahead.squeeze(-1), values[hour])
