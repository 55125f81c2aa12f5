"""Examples on videos: the data sets, the evaluation, and what a finished run is used for.

For any example whose frames are pictures; `Example.static` and `Example.motion` name the sites that say who and what.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from command_line import PACK, load_data, load_run, single_stage
from jsonargparse import Namespace
from settings import Command, Example, Plan, Task
from torch import Tensor, nn
from torch.nn import functional as F

from seqdisent import ConvDecoder, forecast, generate, swap
from seqdisent.datasets import Batch, Clips, load_clips, load_frames, moving_mnist, pendulum, sprites
from seqdisent.evaluation import Evaluation, evaluate
from seqdisent.metrics import Judge
from seqdisent.plotting import film_strip, save_gif, save_png
from seqdisent.training import ELBOTraining

FORECAST_STEPS = 40  # frames of a forecast picture (paper, Figure 11)
FEW_IDENTITIES = 60  # fewer are shown in other colours as well, if the plan of training says so

# Vowels et al., tables 1 and 2, in per cent: consistency; what is told from the identity's and the dynamics' embedding
PAPER = {
    "sprites": {
        "VDSM (paper)": {
            "consistency": {
                "body": 99.67, "shirt": 99.67, "pants": 99.00, "hair": 100.00, "action": 99.33, "average": 99.53
            },
            "static": {"body": 98.67, "shirt": 99.67, "pants": 97.67, "hair": 99.33, "action": 45.00},
            "motion": {"body": 52.67, "shirt": 47.33, "pants": 31.67, "hair": 21.00, "action": 99.33},
        }
    }
}  # fmt: skip


class Data(NamedTuple):
    """Clips to train on, clips held out, and every true clip there is to mistake a swapped one for."""

    train: Clips
    held_out: Clips
    candidates: Clips | None


def load_videos(settings: Namespace, *, download: bool) -> Data:
    """Return the clips of a data set by name, or of a folder or .npz file by path."""
    name, image_size, held_out, seed = settings.data, settings.image_size, settings.held_out, settings.seed
    if name == "pendulum":
        # seven colours are too few to hold one out: what is held out is motions
        train = pendulum(settings.num_clips or 1400, seed=seed, image_size=image_size)
        test = pendulum(len(train) // 10, seed=seed + 1_000_003, image_size=image_size)
        return Data(train, test, every_identity_in_every_motion(test))
    if name == "sprites":
        if image_size != 64:
            raise ValueError(f"--image-size: got {image_size}, expected 64 for Sprites")
        clips = sprites(download=download)
        train, test = clips.split(held_out, seed, by="identity")
        return Data(train, test, clips)
    if name == "moving_mnist":
        options = {"seed": seed, "image_size": image_size, "download": download}
        train = moving_mnist(settings.num_clips or 10_000, **options)
        return Data(train, moving_mnist(len(train) // 20, split="test", **options), None)
    clips = load_clips(name, image_size=image_size)
    train, test = clips.split(held_out, seed, by="identity")
    return Data(train, test, None)


def every_identity_in_every_motion(clips: Clips) -> Clips:
    """Return as many clips as identities times motions, rendered."""
    first = torch.stack([(clips.identity == identity).nonzero()[0, 0] for identity in clips.identity.unique()])
    content, motion = torch.cartesian_prod(first, torch.arange(len(clips))).unbind(1)
    labels = {name: clips.labels[name][content if name in clips.static_factors else motion] for name in clips.labels}
    return Clips(
        clips.true_swap(content, motion), identity=clips.identity[content], labels=labels,
        factor_names=clips.factor_names, source=clips.source[motion],
    )  # fmt: skip


# Training


@torch.no_grad()
def calibrate(network: Any, clips: Clips, seed: int) -> None:
    """Start where frames look different to the encoder and the decoder paints the average pixel."""
    frames = clips.draw_groups(32, 8, torch.Generator().manual_seed(seed)).frames.flatten(0, 1)
    network.encoder.calibrate(frames)
    if hasattr(network, "static"):
        network.static.calibrate(network.encoder(frames))
    decoder = network.decoder
    bias = decoder.layers[-1].bias if isinstance(decoder, ConvDecoder) else decoder.biases[-1]
    bias.copy_(frames.mean((0, 2, 3)).clamp(0.01, 0.99).logit().expand_as(bias))


def calibrated_stage(network: nn.Module, plan: Plan, clips: Clips, seed: int, **options: Any) -> ELBOTraining:
    """Return `command_line.single_stage`, calibrated where frames are pictures."""
    if clips.frames.ndim == 5:
        calibrate(network, clips, seed)
    return single_stage(network, plan, clips, seed, **options)


def group_draws(
    clips: Clips, num_groups: int, frames_per_group: int, recolour: float
) -> Callable[[torch.Generator], Batch]:
    """Return what draws groups of frames of one identity each, a part in other colours."""

    def draw(generator: torch.Generator) -> Batch:
        batch = clips.draw_groups(num_groups, frames_per_group, generator)
        if recolour > 0:
            chosen = torch.rand(num_groups, generator=generator) < recolour
            batch.frames[chosen] = recoloured(batch.frames[chosen], generator)
        return batch

    return draw


def part_recoloured(recolour: float, clips: Clips) -> float:
    """Return the part of the clips that gets other colours: none of many identities, and none of grey ones."""
    return recolour if clips.num_identities < FEW_IDENTITIES and clips.frames.shape[2] == 3 else 0.0


def with_other_colours(clips: Clips, seed: int) -> Clips:
    """Return clips and copies of them in other colours, of as many identities in all as are not few, or a few more."""
    generator, owner = torch.Generator().manual_seed(seed), torch.unique(clips.identity, return_inverse=True)[1]
    frames, identity = [clips.frames], [owner]
    for copy in range(1, -(-FEW_IDENTITIES // clips.num_identities)):
        changed = torch.empty_like(clips.frames)
        for who in range(clips.num_identities):  # all clips of an identity change together
            rows = (owner == who).nonzero().squeeze(1)
            flat = clips.frames[rows].flatten(0, 1)[None] / 255
            changed[rows] = (255 * recoloured(flat, generator)).round().to(torch.uint8).view_as(changed[rows])
        frames.append(changed)
        identity.append(owner + copy * clips.num_identities)
    lengths = clips.lengths.repeat(len(frames))
    return Clips(torch.cat(frames), lengths=lengths, identity=torch.cat(identity))


def recoloured(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Return clips (B, T, 3, H, W) with a random change of colours each: more identities, where a data set has few.

    A change is a smooth function from colours to colours, by linear interpolation in a table of 3 x 3 x 3: red, green
    and blue in another order, each as it is or inverted, and up to half of the way from there to random colours.
    """
    axis, count = torch.linspace(0, 1, 3), len(frames)
    blue, green, red = torch.meshgrid(axis, axis, axis, indexing="ij")
    order = torch.rand(count, 3, generator=generator).argsort(1)
    tables = torch.stack([red, green, blue])[order]
    inverted = torch.rand(count, 3, 1, 1, 1, generator=generator) < 0.5
    tables = torch.where(inverted, 1 - tables, tables)
    way = 0.5 * torch.rand(count, 1, 1, 1, 1, generator=generator)
    tables = torch.lerp(tables, torch.rand(tables.shape, generator=generator), way)
    colours = frames.movedim(2, -1).flatten(1, 3)  # (B, pixels, 3)
    changed = F.grid_sample(tables, 2 * colours[:, :, None, None] - 1, padding_mode="border", align_corners=True)
    return changed.reshape(count, 3, frames.shape[1], *frames.shape[3:]).movedim(1, 2)


class PairedBatch(NamedTuple):
    """Clips, each with any clip of the same identity."""

    frames: Tensor
    mask: Tensor | None
    partner: tuple[Tensor, Tensor | None]  # frames and mask


def paired_draws(clips: Clips, num_clips: int, num_steps: int | None) -> Callable[[torch.Generator], PairedBatch]:
    """Return what draws random clips with a partner each."""

    def draw(generator: torch.Generator) -> PairedBatch:
        batch = clips.draw_clips(num_clips, generator, num_steps=num_steps)
        partner = clips.batch(clips.draw_partners(batch.positions[:, 0] // clips.frames.shape[1], generator))
        real, of_partner = (each.mask if each.ragged else None for each in (batch, partner))
        return PairedBatch(batch.frames, real, (partner.frames, of_partner))

    return draw


class EncodedBatch(NamedTuple):
    """Clips with what a frozen encoder makes of them."""

    frames: Tensor
    mask: Tensor | None
    features: Tensor
    partner: tuple[Tensor, Tensor | None] | None  # features and mask of any clip of the same identity


def encoded_draws(
    encoder: nn.Module, clips: Clips, num_clips: int, num_steps: int, *, partners: bool = False, decodes: bool = True
) -> Callable[[torch.Generator], EncodedBatch]:
    """Return what draws random clips with their features, which are computed once, when training starts.

    Where nothing is decoded, of the frames one pixel is left.
    """
    shown = clips if decodes else Clips(clips.frames[..., :1, :1], lengths=clips.lengths, identity=clips.identity)

    @cache
    @torch.no_grad()
    def features() -> Tensor:
        device = next(encoder.parameters()).device
        frames = clips.frames.flatten(0, 1).split(256)
        return torch.cat([encoder(chunk.to(device) / 255).cpu() for chunk in frames])

    def draw(generator: torch.Generator) -> EncodedBatch:
        batch = shown.draw_clips(num_clips, generator, num_steps=num_steps)
        partner = None
        if partners:
            rows = clips.draw_partners(batch.positions[:, 0] // clips.frames.shape[1], generator)
            mask = clips.mask[rows]
            partner = features().unflatten(0, clips.frames.shape[:2])[rows], None if mask.all() else mask
        return EncodedBatch(batch.frames, batch.mask if batch.ragged else None, features()[batch.positions], partner)

    return draw


# Numbers and pictures


def evaluation(example: Example, network: Any, data: Data, seed: int, **options: Any) -> Evaluation:
    num_steps = int(data.held_out.lengths.max())
    return evaluate(
        network.model, network.guide, data.train, data.held_out, static=example.static, motion=example.motion,
        history=example.history, emission="x", candidates=data.candidates, seed=seed,
        forecast_steps=max(FORECAST_STEPS - num_steps, num_steps), **options,
    )  # fmt: skip


def measure_videos(
    example: Example, network: nn.Module, data: Data, run: Path, settings: Namespace, *, pictures: bool = True
) -> tuple[dict[str, Any], list[Path]]:
    """Measure all that needs no judge, which `evaluate RUN` adds."""
    found = evaluation(example, network, data, settings.seed, judge=None, pictures=pictures)
    return found.numbers, found.save(run, title=f"{run.name}: {settings.data}")


# What a finished run is used for


@torch.no_grad()
def _generate(example: Example, options: Namespace) -> None:
    network, _ = load_run(example, Path(options.run))
    torch.manual_seed(options.seed)
    drawn = generate(network.model, num_sequences=options.num_clips, num_steps=options.num_steps)["x"].mean
    _write_clips(drawn, options.out or Path(options.run) / "generated")


@torch.no_grad()
def _swap(example: Example, options: Namespace) -> None:
    network, settings = load_run(example, Path(options.run))
    if not example.static:
        sys.exit("swap: this model has no static latent")
    content, motion = (_read_clip(path, settings.frame_shape) for path in (options.content, options.motion))
    sites = {"sites": example.static, "keep": example.motion}
    swapped = swap(network.model, network.guide, motion, content, **sites)["x"].mean
    shown = content[:, torch.arange(motion.shape[1]).clamp(max=content.shape[1] - 1)]
    _write_clips(torch.cat([shown, motion, swapped]), options.out or Path(options.run) / "swapped")


@torch.no_grad()
def _forecast(example: Example, options: Namespace) -> None:
    network, settings = load_run(example, Path(options.run))
    torch.manual_seed(options.seed)
    frames = _read_clip(options["from"], settings.frame_shape)
    how = {"num_steps": options.num_steps, "sample": options.sample, "history": example.history}
    predicted = forecast(network.model, network.guide, frames, **how)["x"].mean
    _write_clips(predicted, options.out or Path(options.run) / "forecast_from_file")


def _evaluate(example: Example, options: Namespace) -> None:
    run = Path(options.run)
    network, settings = load_run(example, run)
    if not example.static:
        sys.exit("evaluate: this model has no static latent, so there is no swap to judge")
    data = load_data(example, settings)
    if not data.held_out.static_factors:
        sys.exit(f"--data {settings.data}: has no labels that belong to an identity, so there is nothing to judge")
    factors = [name for name, label in data.train.labels.items() if len(label.unique()) > 1]
    judge = _find_judge(data, factors, run / "judge.pt", options.judge_steps)
    found = evaluation(example, network, data, settings.seed, judge=judge, factors=factors)
    beside = PAPER.get(settings.data)
    print(found.tables(beside=beside))
    print("\nwrote", *found.save(run, title=f"{run.name}: {settings.data}", beside=beside), sep="\n  ")


def _find_judge(data: Data, factors: list[str], path: Path, num_steps: int | None) -> Judge | int:
    """Return the judge of an earlier evaluation of these clips, or for how many steps one is trained."""
    if path.exists() and num_steps is None:
        judge = Judge.load(path)
        wanted = {name: len(data.train.factor_names[name]) for name in factors}
        if judge.num_classes == wanted and judge.frame_shape == tuple(data.train.frames.shape[2:]):
            print(f"the judge is {path}, of an earlier evaluation")
            return judge
    return 500 if num_steps is None else num_steps


def _read_clip(path: str, frame_shape: tuple[int, int, int]) -> Tensor:
    try:
        frames = load_frames(path, image_size=frame_shape[1], channels=frame_shape[0])
    except (OSError, ValueError, TypeError) as error:
        sys.exit(str(error))
    return frames.float()[None] / 255


def _write_clips(clips: Tensor, stem: str | Path) -> None:
    """Write clips as one picture of film strips and as one animation."""
    stem = Path(stem)
    side_by_side = torch.stack([film_strip(frame[None]) for frame in clips.transpose(0, 1)])
    print("wrote", save_png(film_strip(clips), f"{stem}.png"), save_gif(side_by_side, f"{stem}.gif", scale=2))


OUT = {"out": {"help": "where to write, without ending (default: in the run folder)"}}
SEED = {"seed": {"type": int, "default": 0}}
NUM_CLIPS = {"num-clips": {"type": int, "default": 8}}
NUM_STEPS = {"num-steps": {"type": int, "default": FORECAST_STEPS}}

VIDEOS = Task(
    options={
        "data": {
            "default": "pendulum",
            "help": "pendulum, sprites, moving_mnist, or a folder identity/clip/frame.png or .npz of clips",
        },
        "held-out": {
            "type": int | float,
            "default": 0.1,
            "help": "identities that training never sees: a fraction, or how many; where clips are "
            "generated, those held out are too",
        },
        "image-size": {"type": int, "default": 64},
        "num-clips": {
            "type": int | None,
            "help": "where clips are generated, how many to train on (default: 1400 pendula, 10000 of digits)",
        },
    },
    load=load_videos,
    measure=measure_videos,
    commands={
        "generate": Command("draw new clips from the prior", {**OUT, **NUM_CLIPS, **NUM_STEPS, **SEED}, _generate),
        "swap": Command(
            "show who is in one clip doing what is done in another",
            {
                **OUT,
                "content": {"required": True, "help": "clip that gives the identity: folder, image, GIF, .npy"},
                "motion": {"required": True, "help": "clip that gives the motion"},
            },
            _swap,
        ),
        "forecast": Command(
            "continue a clip",
            {
                **OUT,
                **NUM_STEPS,
                **SEED,
                "from": {"required": True, "help": "one frame or more: folder, image, GIF, .npy"},
                "sample": {"action": "store_true", "help": "draw the future instead of following its mean"},
            },
            _forecast,
        ),
        "evaluate": Command(
            "judge, swaps, probes, entropies: tables beside the paper's numbers",
            {"judge-steps": {"type": int | None, "help": "train a new judge, for so many steps (default: 500, once)"}},
            _evaluate,
        ),
        "pack": PACK,
    },
)
