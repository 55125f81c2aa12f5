"""Examples on Bach's chorales: the data, estimates of the likelihood, piano rolls as pictures.

What is reported of a model of sequences differs between papers; all are negative log-likelihoods in nats:

    bound per step            minus the evidence bound of all pieces, over their steps in all
    mean of pieces' bounds    minus the bound of each piece over its own steps, averaged over pieces
    importance-sampled        as the first, with the importance-weighted bound of many particles in the bound's place
    particle filter           as the first, with a particle filter's estimate of the evidence in the bound's place
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from command_line import load_data, load_run, read_json, write_json
from jsonargparse import Namespace
from matplotlib.figure import Figure
from settings import Command, Example, Task
from torch import Tensor, nn
from tqdm import tqdm

from seqdisent import elbo_terms, forecast, generate, reconstruct
from seqdisent.datasets import Clips, jsb_chorales
from seqdisent.particles import filter

SAMPLES = 20  # of the guide, over which a bound is averaged
SPLITS = ("train", "valid", "test")
PARTICLES = 20  # of an importance-sampled estimate, unless asked otherwise


class Data(NamedTuple):
    """The published split."""

    train: Clips
    valid: Clips
    held_out: Clips


def load_chorales(settings: Namespace, *, download: bool) -> Data:
    if settings.data != "jsb":
        raise ValueError("expected jsb")
    return Data(*(jsb_chorales(split=split, download=download) for split in SPLITS))


# Numbers


@torch.no_grad()
def likelihood(network: nn.Module, clips: Clips, *, num_particles: int, seed: int) -> dict[str, float]:
    """Return the estimates of the negative log-likelihood, and the terms of the bound, in nats per step."""
    torch.manual_seed(seed)
    batch = clips.batch(range(len(clips)))
    steps, log_weights, kl = clips.lengths.double(), [], 0.0
    for i in tqdm(range(max(num_particles, SAMPLES)), desc="particles"):
        terms = elbo_terms(network.model, network.guide, batch.frames, batch.mask, kl="monte-carlo")
        log_weights.append(terms.importance_weighted().double())
        if i < SAMPLES:
            kl += sum(terms.kl.values()).sum().item() / SAMPLES
    weights = torch.stack(log_weights)
    bound = weights[:SAMPLES].mean(0)
    evidence = _log_mean(weights[:num_particles])
    found = {
        "bound per step": (-bound.sum() / steps.sum()).item(),
        "mean of pieces' bounds": (-bound / steps).mean().item(),
        "importance-sampled": (-evidence.sum() / steps.sum()).item(),
        "particles": num_particles,
        "KL per step": kl / steps.sum().item(),
    }
    total = 0.0
    for rows in torch.arange(len(clips)).split(
        max(1, 8_000 // num_particles)
    ):  # all steps of all particles are in memory
        given = network.model, network.guide, batch.frames[rows], batch.mask[rows]
        total += filter(*given, num_particles=num_particles).log_evidence.double().sum().item()
    found["particle filter"] = -total / steps.sum().item()
    return found


def _log_mean(log_weights: Tensor) -> Tensor:
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def estimate(
    network: nn.Module, data: Data, seed: int, *, num_particles: int = PARTICLES, splits: Sequence[str] = SPLITS
) -> dict[str, Any]:
    """Estimate for pieces that training never saw, and for those it did, to tell how much it has overfitted."""
    pieces = dict(zip(SPLITS, data, strict=True))
    return {name: likelihood(network, pieces[name], num_particles=num_particles, seed=seed) for name in splits}


def _likelihood(example: Example, options: Namespace) -> None:
    run = Path(options.run)
    if options.num_particles < 1:
        sys.exit(f"--num-particles: got {options.num_particles}, expected at least 1")
    network, settings = load_run(example, run)
    particles = {"num_particles": options.num_particles, "splits": options.splits}
    measured = estimate(network, load_data(example, settings), settings.seed, **particles)
    write_json({**read_json(run / "metrics.json"), **measured}, run / "metrics.json")
    for name, figures in measured.items():
        print(name, *(f"{key}: {value:.4g}" for key, value in figures.items()), sep="\n  ")


# Pictures


@torch.no_grad()
def draw_rolls(example: Example, network: nn.Module, data: Data, run: Path, seed: int) -> list[Path]:
    """Draw a held-out piece, its reconstruction, how the model goes on after its first half, and a piece of its own."""
    torch.manual_seed(seed)
    piece = data.held_out.batch([0]).frames
    num_steps = piece.shape[1]
    half = num_steps // 2
    read = {"history": example.history}
    rolls = {
        "held-out piece": piece,
        "reconstruction": reconstruct(network.model, network.guide, piece, sample=True, **read)["x"].mean,
        f"its first {half} chords, then the model's": forecast(
            network.model, network.guide, piece[:, :half], num_steps=num_steps - half, **read
        )["x"].mean,
        "from the prior": generate(network.model, num_sequences=1, num_steps=num_steps)["x"].mean,
    }
    figure = Figure(figsize=(9, 9), layout="constrained")
    for axis, (name, roll) in zip(figure.subplots(len(rolls), 1, sharex=True), rolls.items(), strict=True):
        axis.imshow(roll[0].T, origin="lower", aspect="auto", cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axis.set(title=name, ylabel="key", ylim=(20, 78))
    axis.set_xlabel("quarter note")
    figure.savefig(run / "rolls.png", dpi=100)
    return [run / "rolls.png"]


def measure(
    example: Example, network: nn.Module, data: Data, run: Path, settings: Namespace
) -> tuple[dict[str, Any], list[Path]]:
    return estimate(network, data, settings.seed), draw_rolls(example, network, data, run, settings.seed)


CHORALES = Task(
    options={"data": {"default": "jsb", "help": "jsb: Bach's chorales"}},
    load=load_chorales,
    measure=measure,
    commands={
        "likelihood": Command(
            "estimate the likelihood of held-out pieces with more particles",
            {
                "num-particles": {"type": int, "default": 1000},
                "splits": {"nargs": "+", "choices": SPLITS, "default": ["test"], "help": "of which pieces"},
            },
            _likelihood,
        )
    },
)
