"""Training on two processes is training on one that computes each process's share in turn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")

from small_runs import losses  # noqa: E402
from two_processes import NUM_STEPS, held_out, stage  # noqa: E402

from seqdisent import elbo_terms  # noqa: E402
from seqdisent.training.module import step_seed  # noqa: E402


def gradients_of_each_share(name):
    """The mean over both processes' shares of the first step's gradients, each with its own batch and noise."""
    training = stage(name)
    weights = {site: schedule(0) for site, schedule in training.weights.items()}
    inputs = {key: schedule(0) for key, schedule in training.inputs.items()}
    for rank in range(2):
        batch = training.draw(torch.Generator().manual_seed(step_seed(training.seed, "batch", 0, rank)))
        torch.manual_seed(step_seed(training.seed, "noise", 0, rank))
        given, losses = training.arguments(batch), training.auxiliary_losses
        terms = elbo_terms(training.model, training.guide, *given, auxiliary_losses=losses, **inputs)
        (-terms.bound(weights).sum() / training.terms_per_step / 2).backward()
    return {name: p.grad for name, p in training.network.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretraining", "sequence_training", "prior_training"])
def test_two_processes_have_the_gradients_of_one(name, tmp_path):
    script = Path(__file__).parent / "support" / "two_processes.py"
    run = subprocess.run(
        [sys.executable, str(script), name, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr  # a parameter that no loss reaches would fail the second step
    (steps, parameters), (other_steps, other_parameters) = (
        torch.load(tmp_path / f"gradients.{rank}", weights_only=True) for rank in range(2)
    )
    assert len(steps) == NUM_STEPS
    expected = gradients_of_each_share(name)
    assert steps[0].keys() == expected.keys()
    for parameter, gradient in steps[0].items():
        scale = expected[parameter].abs().max().item()
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-5 * scale)
    for mine, theirs in zip((*steps, parameters), (*other_steps, other_parameters), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    found = losses(tmp_path, key="validation/elbo")[NUM_STEPS]  # of the batches of both
    assert float(found["validation/elbo"]) == pytest.approx(bound_of_one_process(name, parameters), rel=1e-5)
    assert (tmp_path / "best.ckpt").exists()


def bound_of_one_process(name, weights):
    training = stage(name)
    training.network.load_state_dict(weights)
    training.network.eval()
    inputs = {key: schedule(NUM_STEPS - 1) for key, schedule in training.inputs.items()}
    bounds = []
    for index, batch in enumerate(held_out(training)):
        torch.manual_seed(step_seed(training.seed, "validation", index, 0))
        bounds.append(elbo_terms(training.model, training.guide, *training.arguments(batch), **inputs).elbo())
    return torch.cat(bounds).mean().item()
