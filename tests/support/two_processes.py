"""Trains a stage of a small VDSM on two processes and saves the gradients of each step, for `test_processes.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from seqdisent.datasets import pendulum
from seqdisent.training import ELBOTraining, fit

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import vdsm as example

NUM_STEPS = 3


def stage(name: str) -> ELBOTraining:
    """The same network, data and plan wherever it is called."""
    torch.manual_seed(0)
    sizes = example.Sizes(
        num_experts=3, pose_dim=2, dynamics_dim=4, feature_dim=6, encoder_channels=(4, 4), decoder_channels=(4, 4),
        rnn_dim=5, rnn_layers=1, transition_dim=4, combiner_dim=5, memory_dim=3, num_components=2,
    )  # fmt: skip
    plan = example.Plan(
        sizes, NUM_STEPS, 1e-3, NUM_STEPS, 1e-3, 8, num_groups=2, frames_per_group=3, num_clips=2,
        prior_steps=NUM_STEPS, same_identity=1.0, same_motion=1.0, rolled=0.5,
    )  # fmt: skip
    clips = pendulum(14, seed=0, num_steps=8, image_size=16)
    return getattr(example, name)(example.VDSM((3, 16, 16), sizes), plan, clips, 7)


def held_out(training: ELBOTraining) -> list[object]:
    """Three batches: an odd number, so that one process has more of them."""
    return [training.draw(torch.Generator().manual_seed(seed)) for seed in (1, 2, 3)]


class SaveGradients(Callback):
    """Keeps the gradients of every step as the optimiser gets them; every process writes its own, and its weights."""

    def __init__(self, path: Path) -> None:
        self.path, self.steps = path, []

    def on_before_optimizer_step(self, trainer, training, optimizer):
        self.steps.append({name: p.grad.clone() for name, p in training.network.named_parameters() if p.requires_grad})

    def on_train_end(self, trainer, training):
        torch.save((self.steps, training.network.state_dict()), f"{self.path}.{trainer.global_rank}")


if __name__ == "__main__":
    name, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    training = stage(name)
    training.validation = held_out(training)
    fit(training, out, callbacks=(SaveGradients(out / "gradients"),), progress_bar=False,
        accelerator="cpu", devices=2)  # fmt: skip
