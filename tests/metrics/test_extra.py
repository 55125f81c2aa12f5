"""What needs the extra ``metrics`` says so, and the rest does without it."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import seqdisent
from seqdisent import metrics

LACKING = {  # module: the first that it imports of the extra
    "consistency": "torchmetrics",
    "entropies": "torchmetrics",
    "forecasts": "torchmetrics",
    "frechet": "torchmetrics.image.fid",
    "generation": "seqdisent.metrics.entropies",
    "probes": "sklearn.exceptions",
    "swaps": "torchmetrics",
}

WITHOUT = """
import sys
sys.modules["torchmetrics"] = sys.modules["sklearn"] = None  # as if they were not installed
import torch
from seqdisent.metrics import Judge, combination_scores, memorisation_scores, nearest_clip, neighbour_scores
Judge({"who": 2}, in_channels=1, image_size=4, channels=(2,))(torch.zeros(1, 1, 1, 4, 4))
import seqdisent.metrics
for name in seqdisent.metrics.__all__:
    try:
        getattr(seqdisent.metrics, name)
    except ImportError as error:
        print(name, error)
"""


def test_a_missing_extra_is_named_by_all_that_needs_it_and_by_nothing_else():
    environment = {**os.environ, "PYTHONPATH": str(Path(seqdisent.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    free = {"Judge", "train_judge", "nearest_clip", "pick_donors", "squared_error"}
    free |= {"combination_scores", "CombinationScores", "memorisation_scores", "MemorisationScores"}
    free |= {"neighbour_scores", "NeighbourScores"}
    free |= {"linear_interpolation", "seasonal_naive", "seasonal_naive_draws"}
    assert set(said) == set(metrics.__all__) - free
    assert all("pip install 'seqdisent[metrics]'" in message for message in said.values())


@pytest.mark.parametrize("module", sorted(LACKING))
def test_each_module_names_what_it_lacks(module, monkeypatch):
    monkeypatch.setitem(sys.modules, LACKING[module], None)
    monkeypatch.delitem(sys.modules, f"seqdisent.metrics.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"^seqdisent\.metrics\.{module} "):
        importlib.import_module(f"seqdisent.metrics.{module}")


@pytest.mark.parametrize("name", metrics.__all__)
def test_every_public_name_is_there_and_documented(name):
    thing = getattr(metrics, name)
    assert thing.__name__ == name
    assert name in dir(metrics)
    assert inspect.cleandoc(thing.__doc__).splitlines()[0].endswith((".", ":", "?"))


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="accuracy_of_everything"):
        _ = metrics.accuracy_of_everything
