"""Examples on polyphonic music: training, estimates of the likelihood, piano rolls as pictures.

What is reported of a model of sequences differs between papers; all are negative log-likelihoods in nats:

    bound per step            minus the evidence bound of all pieces, over their steps in all
    mean of pieces' bounds    minus the bound of each piece over its own steps, averaged over pieces
    importance-sampled        as the first, with the importance-weighted bound of many particles in the bound's place
    particle filter           as the first, with a particle filter's estimate of the evidence in the bound's place

Of held-out pieces, they are reported once more without those that share their melody with a training piece
(`music.py`). They are of the model with the best bound on the validation pieces, and not of the last step's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from command_line import device_of, load_data, load_run, read_json, single_stage, write_json
from jsonargparse import Namespace
from lightning.fabric.utilities import move_data_to_device
from matplotlib.figure import Figure
from music import DATA, SPLITS, THRESHOLD, Data, batches_by_length, load_music, melodic_similarity, transpose
from settings import Command, Example, Plan, Task
from torch import Tensor, nn
from tqdm import tqdm

from seqdisent import elbo_terms, forecast, generate, particles, reconstruct
from seqdisent.datasets import Batch, Clips
from seqdisent.training import ELBOTraining

SAMPLES = 20  # of the guide, over which a bound is averaged
PARTICLES = 20  # of an importance-sampled estimate, unless asked otherwise
STEPS = 40_000  # of all pieces that are evaluated at once
STEPS_OF_DRAWS = 100_000  # of all draws of all pieces that are weighed at once: more would mostly be padding
STEPS_OF_PARTICLES = 1_000_000  # of all particles of all pieces that are filtered at once, which stay in memory


def load(settings: Namespace, *, download: bool) -> Data:
    return load_music(settings.data, download=download)


# Training


@dataclass(frozen=True)
class MusicPlan(Plan):
    """Training on windows of pieces, with a choice of the model on the validation pieces."""

    validate_every: int | None = None  # steps between evaluations of the validation pieces; None: `checkpoint_every`
    patience: int | None = None  # stop after so many evaluations without a better bound
    averaging: float | None = None  # decay of the moving average of the weights, which is then evaluated and kept
    transposition: int = 0  # semitones by which a window may be moved up or down at random


def training(
    network: nn.Module, plan: MusicPlan, clips: Clips, seed: int, *, validation: Callable[[], Iterator[Batch]]
) -> ELBOTraining:
    """Return the training on windows that begin anywhere, more of a longer piece: all steps count alike."""
    if plan.clip_length is not None:
        clips = clips.windows(2 * plan.clip_length, stride=plan.clip_length)
    draw = partial(clips.draw_clips, plan.batch_size, num_steps=plan.clip_length)

    def transposed(generator: torch.Generator) -> Batch:
        return transpose(draw(generator), plan.transposition, generator)

    moved = transposed if plan.transposition else draw
    return single_stage(network, plan, clips, seed, draw=moved, validation=validation)


def validation(data: Data) -> Iterator[Batch]:
    return (data.valid.batch(rows) for rows in batches_by_length(data.valid.lengths, STEPS))


# Numbers


@torch.no_grad()
def evidences(network: nn.Module, clips: Clips, *, num_particles: int, seed: int) -> dict[str, Tensor]:
    """Return the estimates of the log-evidence of each piece, and the KL of its bound, (N,) each, in nats."""
    torch.manual_seed(seed)
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    room = 1 if device.type == "cpu" else 10  # an accelerator is faster the more it has to do at once
    names = ("bound", "KL", "importance-sampled", "particle filter")
    found = {name: torch.zeros(len(clips), dtype=torch.float64) for name in names}
    for rows in tqdm([*batches_by_length(clips.lengths, room * STEPS_OF_DRAWS // SAMPLES)], desc="batches of pieces"):
        batch, log_weights, kl = move_data_to_device(clips.batch(rows), device), [], []
        for _ in range(0, max(num_particles, SAMPLES), SAMPLES):
            terms = elbo_terms(
                network.model, network.guide, batch.frames, batch.mask,
                kl="monte-carlo", num_particles=SAMPLES, vectorize_particles=True, max_plate_nesting=1,
            )  # fmt: skip
            kl.append(sum(terms.kl.values()).cpu().double())
            log_weights.append(terms.log_weights().cpu().double())
        weights = torch.cat(log_weights)
        found["bound"][rows] = weights[:SAMPLES].mean(0)
        found["KL"][rows] = kl[0].mean(0)
        found["importance-sampled"][rows] = weights[:num_particles].logsumexp(0) - math.log(num_particles)
    most = room * STEPS_OF_PARTICLES // num_particles
    for rows in tqdm([*batches_by_length(clips.lengths, most)], desc="filtered batches"):
        batch = move_data_to_device(clips.batch(rows), device)
        filtered = particles.filter(network.model, network.guide, batch.frames, batch.mask, num_particles=num_particles)
        found["particle filter"][rows] = filtered.log_evidence.cpu().double()
    return found


def per_step(evidence: Mapping[str, Tensor], steps: Tensor) -> dict[str, float]:
    """Return what is reported of pieces (N,), in nats per step."""
    totals = {name: (values.sum() / steps.sum()).item() for name, values in evidence.items()}
    return {
        "bound per step": -totals["bound"],
        "mean of pieces' bounds": (-evidence["bound"] / steps).mean().item(),
        "importance-sampled": -totals["importance-sampled"],
        "particle filter": -totals["particle filter"],
        "KL per step": totals["KL"],
    }


def likelihood(
    network: nn.Module, clips: Clips, *, num_particles: int, seeds: Sequence[int], near: Tensor | None = None
) -> list[dict[str, float]]:
    """Estimate the negative log-likelihood, in nats per step: means over seeds, and standard deviations if several.

    Args:
        network: with `model` and `guide`.
        clips: the pieces.
        num_particles: of importance sampling and of the filter.
        seeds: of the estimates' noise.
        near: (N,) bool, pieces to leave out in a second estimate.

    Returns:
        The figures of all pieces, and of those that are not `near`, if there are both.
    """
    runs = [evidences(network, clips, num_particles=num_particles, seed=seed) for seed in seeds]
    chosen = [torch.ones(len(clips), dtype=torch.bool)]
    if near is not None and 0 < near.sum() < len(clips):
        chosen.append(~near)
    measured = []
    for rows in chosen:
        steps = clips.lengths[rows].double()
        found = [per_step({name: values[rows] for name, values in run.items()}, steps) for run in runs]
        values = torch.tensor([[*figures.values()] for figures in found], dtype=torch.float64)
        figures = dict(zip(found[0], values.mean(0).tolist(), strict=True))
        if len(seeds) > 1:
            spread = zip(found[0], values.std(0).tolist(), strict=True)
            figures |= {f"{name}, deviation of {len(seeds)} seeds": deviation for name, deviation in spread}
        measured.append({**figures, "particles": num_particles, "pieces": int(rows.sum())})
    return measured


def estimate(
    network: nn.Module, data: Data, seeds: Sequence[int], *, num_particles: int = PARTICLES,
    splits: Sequence[str] = SPLITS, threshold: float = THRESHOLD,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Estimate for pieces that training never saw, and for those it did, to tell how much it has overfitted."""
    pieces, found = dict(zip(SPLITS, data, strict=True)), {}
    for split in splits:
        near = None if split == "train" else melodic_similarity(pieces[split], data.train)[0] >= threshold
        measured = likelihood(network, pieces[split], num_particles=num_particles, seeds=seeds, near=near)
        found |= dict(zip((split, f"{split} without near-duplicates"), measured, strict=False))
    return found


def _likelihood(example: Example, options: Namespace) -> None:
    run = Path(options.run)
    if options.num_particles < 1:
        sys.exit(f"--num-particles: got {options.num_particles}, expected at least 1")
    network, settings = load_run(example, run)
    network.to(device_of(options.accelerator))
    asked = {"num_particles": options.num_particles, "splits": options.splits, "threshold": options.threshold}
    measured = estimate(network, load_data(example, settings), options.seeds or [settings.seed], **asked)
    write_json({**read_json(run / "metrics.json"), **measured}, run / "metrics.json")
    for name, figures in measured.items():
        print(name, *(f"{key}: {value:.4g}" for key, value in figures.items()), sep="\n  ")


# Pictures


LONGEST_DRAWN = 160


@torch.no_grad()
def draw_rolls(example: Example, network: nn.Module, data: Data, run: Path, seed: int) -> list[Path]:
    """Draw a held-out piece, its reconstruction, how the model goes on after its first half, and a piece of its own."""
    torch.manual_seed(seed)
    piece = data.held_out.batch([0]).frames
    piece = piece[:, :LONGEST_DRAWN]
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
        axis.imshow(
            roll[0].T.numpy(), origin="lower", aspect="auto", cmap="gray_r", vmin=0, vmax=1, interpolation="nearest"
        )
        axis.set(title=name, ylabel="key", ylim=(20, 78))
    axis.set_xlabel("quarter note")
    figure.savefig(run / "rolls.png", dpi=100)
    return [run / "rolls.png"]


def measure(
    example: Example, network: nn.Module, data: Data, run: Path, settings: Namespace
) -> tuple[dict[str, Any], list[Path]]:
    seen = data.train.subset(range(0, len(data.train), math.ceil(len(data.train) / len(data.held_out))))
    network.to(device_of(settings.accelerator))
    numbers = estimate(network, data, [settings.seed], splits=SPLITS[1:])
    (numbers["train"],) = likelihood(network, seen, num_particles=PARTICLES, seeds=[settings.seed])
    return numbers, draw_rolls(example, network.cpu(), data, run, settings.seed)


MUSIC = Task(
    options={"data": {"default": "jsb", "help": f"{', '.join(DATA)} (jsb: Bach's chorales)"}},
    load=load,
    measure=measure,
    commands={
        "likelihood": Command(
            "estimate the likelihood of held-out pieces with more particles",
            {
                "num-particles": {"type": int, "default": 1000},
                "splits": {"nargs": "+", "choices": SPLITS, "default": ["valid", "test"], "help": "of which pieces"},
                "seeds": {"nargs": "+", "type": int, "help": "of the estimates' noise; by default the run's"},
                "accelerator": {"default": "auto", "help": "as Lightning's: cpu, gpu, ..."},
                "threshold": {"type": float, "default": THRESHOLD, "help": "similarity that makes a near-duplicate"},
            },
            _likelihood,
        )
    },
    validation=validation,
)
