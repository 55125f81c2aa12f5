"""Examples on videos: data sets, errors against the truth, pictures, and what a finished run is used for.

For any example whose frames are pictures; `Example.static` and `Example.motion` name the sites that say who and what.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from run_folder import EMISSION, Command, Example, Plan, Task, load_data, load_run, read_json, single_stage, write_json
from torch import Tensor, nn

from seqdisent import elbo_terms, forecast, generate, infer, reconstruct, swap
from seqdisent.chains.factorised import as_chain
from seqdisent.datasets import Clips, load_clips, load_frames, moving_mnist, pendulum, sprites
from seqdisent.metrics import nearest_clip, pick_donors, squared_error
from seqdisent.plotting import film_strip, plot_error_over_time, save_gif, save_png, swap_table
from seqdisent.training import ELBOTraining, frames_and_mask

FORECAST_STEPS = 40  # frames of a forecast picture (paper, Figure 11)


class Data(NamedTuple):
    """Clips to train on, clips held out, and every true clip there is to mistake a swapped one for."""

    train: Clips
    held_out: Clips
    candidates: Clips | None


# Data


def load_videos(config: Mapping[str, Any], *, download: bool) -> Data:
    """Return the clips of a data set by name, or of a folder or .npz file by path."""
    name, image_size, held_out, seed = (config[key] for key in ("data", "image_size", "held_out", "seed"))
    if name == "pendulum":
        # seven colours are too few to hold one out: what is held out is motions
        train = pendulum(1400, seed=seed, image_size=image_size)
        test = pendulum(140, seed=seed + 1_000_003, image_size=image_size)
        return Data(train, test, every_identity_in_every_motion(test))
    if name == "sprites":
        if image_size != 64:
            raise ValueError(f"--image-size: got {image_size}, expected 64 for Sprites")
        clips = sprites(download=download)
        train, test = clips.split(held_out, seed, by="identity")
        return Data(train, test, clips)
    if name == "moving_mnist":
        options = {"seed": seed, "image_size": image_size, "download": download}
        return Data(moving_mnist(10_000, **options), moving_mnist(500, split="test", **options), None)
    clips = load_clips(name, image_size=image_size)
    train, test = clips.split(held_out, seed, by="identity")
    return Data(train, test, None)


def every_identity_in_every_motion(clips: Clips) -> Clips:
    """Return as many clips as identities times motions, rendered."""
    first = torch.stack([(clips.identity == identity).nonzero()[0, 0] for identity in clips.identity.unique()])
    content, motion = torch.cartesian_prod(first, torch.arange(len(clips))).unbind(1)
    labels = {name: clips.labels[name][content if name in clips.static_factors else motion] for name in clips.labels}
    return Clips(
        clips.true_swap(content, motion), identity=clips.identity[content], labels=labels, source=clips.source[motion]
    )


# Training


@torch.no_grad()
def calibrate(network: nn.Module, clips: Clips, seed: int) -> None:
    """Start where frames look different to the encoder and the decoder paints the average pixel."""
    frames = clips.draw_groups(32, 8, torch.Generator().manual_seed(seed)).frames.flatten(0, 1)
    network.encoder.calibrate(frames)
    if hasattr(network, "static"):
        network.static.calibrate(network.encoder(frames))
    bias = network.decoder.biases[-1]
    bias.copy_(frames.mean((0, 2, 3)).clamp(0.01, 0.99).logit().expand_as(bias))


def calibrated_stage(network: nn.Module, plan: Plan, clips: Clips, seed: int, **options: Any) -> ELBOTraining:
    """Return `run_folder.single_stage`, calibrated."""
    calibrate(network, clips, seed)
    return single_stage(network, plan, clips, seed, **options)


# Numbers


@torch.no_grad()
def measure_errors(
    example: Example, network: nn.Module, data: Data, *, seed: int, batch_size: int = 64
) -> dict[str, Any]:
    """Measure on held-out clips: posterior and transition means, mean squared errors of pixels in [0, 1].

    Every clip is paired with a fixed donor of another identity and motion. The swapped clip has the donor's static
    sites and this clip's others; its truth is the donor's identity doing what this clip does; a motion-swapped one is
    the reverse. A roll-out has the clip's own latents, of every trajectory only the first step, and goes on from there
    by itself.
    """
    clips = data.held_out
    # whether there is a swapped clip, and its truth is known
    known = bool(example.static) and clips.renderer is not None and clips.num_identities > 1
    mean_frame = _mean_frame(data.train)
    torch.manual_seed(seed)  # the ledger is taken at one sample of the posterior; everything else at its means
    donors = pick_donors(clips.identity, _motion(clips), seed=seed) if known else torch.arange(len(clips))
    sums: dict[str, list[Tensor]] = {}
    swaps, truths = [], []
    for rows in torch.arange(len(clips)).split(batch_size):
        batch = clips.batch(rows)
        source_args, donor_args = frames_and_mask(batch), frames_and_mask(clips.batch(donors[rows]))
        found = reconstruct(network.model, network.guide, *source_args)[EMISSION].mean
        given = {
            name: site.value if as_chain(site.distribution) is None else site.value[:, :1]
            for name, site in infer(network.guide, *source_args).items()
        }
        num_steps = batch.frames.shape[1]
        rolled = generate(network.model, num_sequences=len(rows), num_steps=num_steps, given=given, sample=False)
        measured = {
            "reconstruction": squared_error(found, batch.frames, batch.mask),
            "roll_out": squared_error(rolled[EMISSION].mean, batch.frames, batch.mask),
            "mean_frame": squared_error(mean_frame.expand_as(batch.frames), batch.frames, batch.mask),
        }
        if known:
            swapped = swap_static(example, network, source_args, donor_args)
            truth = clips.true_swap(donors[rows], rows)
            measured["swapped"] = squared_error(swapped, truth, batch.mask)
            moved = swap(network.model, network.guide, source_args, donor_args, sites=example.motion)[EMISSION].mean
            donor_truth = clips.true_swap(rows, donors[rows])
            measured["motion_swapped"] = squared_error(moved, donor_truth, clips.batch(donors[rows]).mask)
            swaps.append(swapped)
            truths.append(truth)
        terms = elbo_terms(network.model, network.guide, *source_args)
        measured |= {f"KL({site})": term for site, term in terms.kl.items()}
        measured |= {f"log_p({site})": term for site, term in terms.log_likelihood.items()}
        for name, value in measured.items():
            sums.setdefault(name, []).append(value)
    means = {name: torch.cat(values).mean().item() for name, values in sums.items()}
    errors = {
        name: means.pop(name)
        for name in ("reconstruction", "swapped", "motion_swapped", "roll_out", "mean_frame")
        if name in means
    }
    ratios = {
        f"{name} / reconstruction": errors[name] / errors["reconstruction"]
        for name in ("swapped", "motion_swapped", "roll_out")
        if name in errors
    }
    metrics: dict[str, Any] = {"held_out_clips": len(clips), "mean_squared_error": errors, **ratios, "nats": means}
    if known and data.candidates is not None:
        metrics["nearest_true_clip"] = _retrieval(torch.cat(swaps), torch.cat(truths), clips, donors, data.candidates)
    return metrics


def swap_static(example: Example, network: nn.Module, source: Any, donor: Any) -> Tensor:
    """Return clips of the donor's static sites and the source's own motion, whatever the guide infers motion from."""
    sites = {"sites": example.static, "keep": example.motion}
    return swap(network.model, network.guide, source, donor, **sites)[EMISSION].mean


def _retrieval(swaps: Tensor, truths: Tensor, clips: Clips, donors: Tensor, candidates: Clips) -> dict[str, float]:
    """Return how often the true clip that is nearest to a swapped one is the right one, and has the right factors."""
    found = nearest_clip(swaps, candidates.frames)
    right = {"clip": (candidates.frames[found] == truths).flatten(1).all(1)}
    for name, labels in candidates.labels.items():
        wanted = clips.labels[name][donors] if name in clips.static_factors else clips.labels[name]
        right[name] = labels[found] == wanted
    return {"of": len(candidates), **{name: values.double().mean().item() for name, values in right.items()}}


def _motion(clips: Clips) -> Tensor | None:
    """Return one number for the motion factors of each clip, None if they are not known."""
    if not clips.motion_factors:
        return None
    return torch.unique(torch.stack([clips.labels[name] for name in clips.motion_factors]), dim=1, return_inverse=True)[
        1
    ]


def _mean_frame(clips: Clips) -> Tensor:
    some = slice(None, None, max(1, len(clips) // 500))
    return clips.frames[some][clips.mask[some]].float().mean(0) / 255


# Pictures


@torch.no_grad()
def draw_pictures(example: Example, network: nn.Module, data: Data, run: Path, *, seed: int) -> list[Path]:
    clips, written = data.held_out, []
    spread = torch.linspace(0, len(clips) - 1, 6).long()
    batch = clips.batch(spread)
    found = reconstruct(network.model, network.guide, *frames_and_mask(batch))[EMISSION].mean
    pairs = torch.stack([batch.frames, _blank_padding(found, batch.mask)], 1).flatten(0, 1)
    written.append(save_png(film_strip(pairs), run / "reconstructions.png", scale=2))

    if example.static:
        table = swap_all(example, network, clips, *_different(clips, seed))
        moments = table[torch.linspace(0, len(table) - 1, 4).long()]
        written.append(save_png(film_strip(moments[None], gap=8), run / "swaps.png"))
        written.append(save_gif(table, run / "swaps.gif", scale=2))

    torch.manual_seed(seed)
    num_steps = int(clips.lengths.max())
    drawn = generate(network.model, num_sequences=8, num_steps=num_steps)[EMISSION].mean
    written.append(save_png(film_strip(drawn), run / "prior_samples.png", scale=2))

    given = batch.frames[:4], batch.mask[:4]
    more = max(FORECAST_STEPS - num_steps, num_steps)
    predicted = forecast(network.model, network.guide, *given, num_steps=more, sample=False)[EMISSION].mean
    rows, truth = predicted, None
    if clips.renderer is not None:
        try:
            truth = clips.true_clip(spread[:4], num_steps + more).float() / 255
            rows = torch.stack([truth, predicted], 1).flatten(0, 1)
        except ValueError:
            pass  # the data ends with the clip: there is no truth to show
    written.append(save_png(film_strip(rows), run / "forecast.png"))
    if truth is not None:
        written.append(_plot_forecast_error(network, data, more, run / "forecast_error.png"))
    return written


def swap_all(example: Example, network: nn.Module, clips: Clips, who: Tensor, what: Tensor) -> Tensor:
    """Return the table of pictures, step by step, in which clip `who[i]`'s identity does what clip `what[j]` does."""
    pairs = torch.cartesian_prod(who, what)
    sources, donors = clips.batch(pairs[:, 1]), clips.batch(pairs[:, 0])
    given, donated = frames_and_mask(sources), frames_and_mask(donors)
    swapped = swap_static(example, network, given, donated)
    swapped = _blank_padding(swapped, sources.mask).unflatten(0, (len(who), len(what)))
    num_steps = swapped.shape[2]
    static, motion = (_to_length(clips.batch(rows).frames, num_steps) for rows in (who, what))
    return swap_table(static, motion, swapped)


def _different(clips: Clips, seed: int, *, num_identities: int = 5, num_motions: int = 6) -> tuple[Tensor, Tensor]:
    """Return clips of different identities, and clips of different motions of yet another."""
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed))
    identities = [row for i, row in enumerate(order.tolist()) if clips.identity[row] not in clips.identity[order[:i]]]
    motion = _motion(clips)
    labels = torch.arange(len(clips)) if motion is None or len(motion.unique()) < num_motions else motion
    motions = [row for i, row in enumerate(order.tolist()) if labels[row] not in labels[order[:i]]]
    return torch.tensor(identities[:num_identities]), torch.tensor(motions[:num_motions])


@torch.no_grad()
def _plot_forecast_error(network: nn.Module, data: Data, more: int, path: Path) -> Path:
    """Plot the error of forecasts of all held-out clips against the renderer's truth, beside a frozen last frame."""
    clips, num_steps = data.held_out, int(data.held_out.lengths.max())
    errors: dict[str, list[Tensor]] = {"forecast": [], "last frame, frozen": [], "mean frame": []}
    for rows in torch.arange(len(clips)).split(32):
        frames = clips.batch(rows).frames
        truth = clips.true_clip(rows, num_steps + more)
        predicted = forecast(network.model, network.guide, frames, num_steps=more, sample=False)[EMISSION].mean
        frozen = torch.cat([frames, frames[:, -1:].expand(-1, more, -1, -1, -1)], 1)
        for name, guess in zip(errors, (predicted, frozen, _mean_frame(data.train).expand_as(predicted)), strict=True):
            errors[name].append((guess - truth.float() / 255).square().flatten(2).mean(-1))
    means = {name: torch.cat(values).mean(0) for name, values in errors.items()}
    write_json({name: value.tolist() for name, value in means.items()}, path.with_suffix(".json"))
    return plot_error_over_time(means, path, trained_on=num_steps)


def _blank_padding(frames: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[..., None, None, None], frames, 0.0)


def _to_length(frames: Tensor, num_steps: int) -> Tensor:
    """Cut clips to `num_steps`, or repeat their last frame."""
    return frames[:, torch.arange(num_steps).clamp(max=frames.shape[1] - 1)]


# What a finished run is used for


def _read_clip(path: str, frame_shape: tuple[int, int, int]) -> Tensor:
    try:
        frames = load_frames(path, image_size=frame_shape[1], channels=frame_shape[0])
    except (OSError, ValueError, TypeError) as error:
        sys.exit(str(error))
    return frames.float()[None] / 255


@torch.no_grad()
def _generate(example: Example, arguments: argparse.Namespace) -> None:
    network, _, _ = load_run(example, Path(arguments.run))
    torch.manual_seed(arguments.seed)
    drawn = generate(network.model, num_sequences=arguments.num_clips, num_steps=arguments.num_steps)[EMISSION].mean
    _write_clips(drawn, arguments.out or Path(arguments.run) / "generated")


@torch.no_grad()
def _swap(example: Example, arguments: argparse.Namespace) -> None:
    network, _, frame_shape = load_run(example, Path(arguments.run))
    if not example.static:
        sys.exit("swap: this model has no static latent")
    content, motion = (_read_clip(path, frame_shape) for path in (arguments.content, arguments.motion))
    swapped = swap_static(example, network, motion, content)
    rows = torch.cat([_to_length(content, motion.shape[1]), motion, swapped])
    _write_clips(rows, arguments.out or Path(arguments.run) / "swapped")


@torch.no_grad()
def _forecast(example: Example, arguments: argparse.Namespace) -> None:
    network, _, frame_shape = load_run(example, Path(arguments.run))
    torch.manual_seed(arguments.seed)
    frames = _read_clip(arguments.frames, frame_shape)
    predicted = forecast(network.model, network.guide, frames, num_steps=arguments.num_steps, sample=arguments.sample)[
        EMISSION
    ].mean
    _write_clips(predicted, arguments.out or Path(arguments.run) / "forecast_from_file")


def _evaluate(example: Example, arguments: argparse.Namespace) -> None:
    import report  # scikit-learn and more, which nothing else needs

    run = Path(arguments.run)
    network, config, _ = load_run(example, run)
    if not example.static:
        sys.exit("evaluate: this model has no static latent, so there is no swap to judge")
    data = load_data(example, config)
    if not data.held_out.static_factors:
        sys.exit(f"--data {config['data']}: has no labels that belong to an identity, so there is nothing to judge")
    seed = config["seed"]
    judge = report.find_judge(data.train, data.held_out, run / "judge.pt", seed=seed, num_steps=arguments.judge_steps)
    donors = pick_donors(data.held_out.identity, _motion(data.held_out), seed=seed)
    measured = report.measure(example, network, data.train, data.held_out, judge, donors, seed=seed)
    write_json({**read_json(run / "metrics.json"), "evaluation": report.plain(measured)}, run / "metrics.json")
    written = report.write_report(measured, config["data"], data.held_out, run)
    print(*report.tables(measured, config["data"]), sep="\n\n")
    print("\nwrote", run / "metrics.json", *written, sep="\n  ")


def _write_clips(clips: Tensor, stem: str | Path) -> None:
    """Write clips as one picture of film strips and as one animation."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    side_by_side = torch.stack([film_strip(frame[None]) for frame in clips.transpose(0, 1)])
    print(
        "wrote",
        save_png(film_strip(clips), stem.with_name(stem.name + ".png")),
        save_gif(side_by_side, stem.with_name(stem.name + ".gif"), scale=2),
    )


def _number(text: str) -> int | float:
    return int(text) if text.isdigit() and int(text) else float(text)


def _adds(*options: str) -> Any:
    """Return the function that adds these options to a subcommand."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        for name in options:
            parser.add_argument("--" + name, **_OPTIONS[name])

    return add_arguments


_OPTIONS: dict[str, dict[str, Any]] = {
    "out": {"help": "where to write, without ending (default: in the run folder)"},
    "num-clips": {"type": int, "default": 8},
    "num-steps": {"type": int, "default": FORECAST_STEPS},
    "seed": {"type": int, "default": 0},
    "content": {"required": True, "help": "clip that gives the identity: folder, image, GIF, .npy"},
    "motion": {"required": True, "help": "clip that gives the motion"},
    "from": {"dest": "frames", "required": True, "help": "one frame or more: folder, image, GIF, .npy"},
    "sample": {"action": "store_true", "help": "draw the future instead of following its mean"},
    "judge-steps": {"type": int, "help": "train a new judge, for so many steps (default: 500, once)"},
}

VIDEOS = Task(
    options={
        "data": {
            "default": "pendulum",
            "help": "pendulum, sprites, moving_mnist, or a folder identity/clip/frame.png or .npz of clips",
        },
        "held_out": {
            "type": _number,
            "default": 0.1,
            "help": "identities that training never sees: a fraction, or how many (default: 0.1); where clips are "
            "generated, those held out are too",
        },
        "image_size": {"type": int, "default": 64},
    },
    load=load_videos,
    measure=measure_errors,
    draw=draw_pictures,
    commands={
        "generate": Command("draw new clips from the prior", _adds("out", "num-clips", "num-steps", "seed"), _generate),
        "swap": Command(
            "show who is in one clip doing what is done in another", _adds("out", "content", "motion"), _swap
        ),
        "forecast": Command("continue a clip", _adds("out", "from", "num-steps", "sample", "seed"), _forecast),
        "evaluate": Command(
            "judge, swaps, probes, entropies: tables beside the paper's numbers", _adds("judge-steps"), _evaluate
        ),
    },
)
