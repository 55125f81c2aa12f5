"""What every example's command line does: train in stages, and use a finished run.

A run is a folder:

    config.yaml    what was asked for, presets and all; `--config` takes it again
    stage1/ ...    a folder a stage: last.ckpt (to resume), logs/ (CSV), tensorboard/, model.pt (its finished weights)
    model.pt       the weights at the end; the best ones by validation, where the data have pieces for it
    metrics.json   the numbers, on data that training never saw
    *.png, *.gif   the pictures
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace
from lightning.fabric import Fabric
from parts import warmed_up
from settings import (
    Command,
    Example,
    Plan,
    command_parser,
    parser_of,
    read_settings,
    settings_of,
    settings_of_run,
    write_settings,
    write_whole,
)
from torch import nn

from seqdisent import AnnealingSchedule, zoo
from seqdisent.plotting import plot_ledger, plot_schedules
from seqdisent.training import (
    TERMINATED,
    CheckpointError,
    ELBOTraining,
    is_main_process,
    load_weights,
    save_weights,
    train_stages,
)


def single_stage(
    network: Any, plan: Plan, clips: Any, seed: int, *, model: Any = None, draw: Any = None,
    losses: Mapping[str, float] | None = None, **options: Any,
) -> ELBOTraining:  # fmt: skip
    """Return the training of everything at once on the bound of random clips, as most models have it.

    `losses` are weights of the network's methods that are losses beside the bound; what weighs 0 is left out.
    """
    losses = {name: weight for name, weight in (losses or {}).items() if weight}
    weights = {
        site: AnnealingSchedule.linear(start, *(end or [1.0]), over)
        for site, (start, over, *end) in plan.annealed.items()
    }
    weights |= {name: AnnealingSchedule.constant(weight) for name, weight in losses.items()}
    options = {"objective": plan.objective, "num_particles": plan.num_particles, **options}
    length = clips.lengths.clamp(max=plan.clip_length or clips.frames.shape[1]).double().mean().item()
    return ELBOTraining(
        network, model or network.model, network.guide,
        draw or partial(clips.draw_clips, plan.batch_size, num_steps=plan.clip_length),
        num_steps=plan.num_steps,
        learning_rate=warmed_up(plan.learning_rate, plan.warm_up, plan.num_steps),
        weights=weights, auxiliary_losses={name: getattr(network, name) for name in losses},
        terms_per_step=plan.batch_size * length,
        optimizer=partial(torch.optim.Adam, betas=plan.betas, weight_decay=plan.weight_decay), seed=seed, **options,
    )  # fmt: skip


def main(example: Example, argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in example.task.commands:
        name, *argv = argv
        do = partial(example.task.commands[name].run, example, command_parser(example, name).parse_args(argv))
        how_on = ""
    else:
        options = parser_of(example).parse_args(argv)
        do = partial(train, example, Path(options.run_dir), argv, resume=options.resume)
        how_on = f"; go on with --run-dir {options.run_dir} --resume"
    try:
        do()
    except KeyboardInterrupt:
        _leave(f"stopped{how_on}", 130)
    except SystemExit as error:
        if error.code != TERMINATED:
            raise
        _leave(f"stopped{how_on}", TERMINATED)
    except CheckpointError as error:
        sys.exit(str(error))
    except OSError as error:  # a full disk, say
        _leave(f"{error}{how_on}", 1)


def _leave(why: str, code: int) -> NoReturn:
    """Exit with one line that says why."""
    if is_main_process():
        print(why, file=sys.stderr)
    sys.exit(code)


def train(example: Example, run: Path, argv: list[str], *, resume: bool) -> None:
    started = (run / "config.yaml").exists()
    if started and not resume and is_main_process():
        sys.exit(f"{run} holds a run; continue it with --resume, or choose another --run-dir")
    if resume and not started:
        sys.exit(f"{run} holds no run to resume (there is no {run / 'config.yaml'})")
    settings = settings_of_run(example, run, argv) if started else settings_of(example, argv)
    data = load_data(example, settings, download=settings.download)
    print(f"{run}: training on {data.train}, held out {data.held_out}", flush=True)
    settings.frame_shape = tuple(data.train.frames.shape[2:])
    torch.manual_seed(settings.seed)
    network, plan = network_of(example, settings), example.plan_of(settings)
    if not started and is_main_process():
        write_settings(example, settings, run / "config.yaml")
    validated = {} if example.task.validation is None else {"validation": partial(example.task.validation, data)}
    stages = {
        name: partial(stage, network, plan, data.train, settings.seed, **validated)
        for name, stage in example.stages.items()
    }
    trainings = train_stages(
        network, stages, run, resume=resume, clip_norm=plan.clip_norm, checkpoint_every=plan.checkpoint_every,
        **{name: getattr(plan, name) for name in ("validate_every", "patience", "averaging") if validated},
        **{name: settings[name] for name in ("accelerator", "devices", "num_nodes", "precision", "cuda_graph")},
    )  # fmt: skip
    if not is_main_process():
        return
    if validated:
        load_weights(network, run / list(trainings)[-1] / "best.ckpt")
    network.float().eval()
    numbers, written = example.task.measure(example, network, data, run, settings)
    numbers["minutes"] = {name: read_json(run / name / "minutes.json") for name in trainings}
    write_json(numbers, run / "metrics.json")
    save_weights(network, run / "model.pt")  # last: what has it is a finished run
    written += _draw_trainings(trainings, run)
    print(json.dumps({name: value for name, value in numbers.items() if name != "forecast_error"}, indent=2))
    print("wrote", *dict.fromkeys([run / "metrics.json", *written]), sep="\n  ")


def network_of(example: Example, settings: Namespace) -> nn.Module:
    shape = tuple(settings.frame_shape)
    try:
        return example.build(shape, example.plan_of(settings).sizes)
    except (ValueError, TypeError) as error:
        sys.exit(f"this preset does not fit frames of shape {shape} (--preset, --image-size): {error}")


def _draw_trainings(trainings: Mapping[str, ELBOTraining], run: Path) -> list[Path]:
    written = []
    for name, training in trainings.items():
        shown = {f"weight({k})": v for k, v in training.weights.items()} | {**training.inputs}
        shown["learning_rate"] = training.learning_rate
        written.append(plot_schedules(shown, training.num_steps, run / f"{name}_schedules.png"))
        logs = sorted((run / name / "logs").glob("*/metrics.csv"), key=lambda path: path.stat().st_mtime)
        if logs:
            written.append(plot_ledger(logs, run / f"{name}_ledger.png"))
    return written


# Finished runs


def load_run(example: Example, run: Path) -> tuple[nn.Module, Namespace]:
    """Return a finished run's network and its settings."""
    settings = read_settings(example, run)
    if not (run / "model.pt").exists():
        sys.exit(f"{run} is not finished (there is no {run / 'model.pt'}); continue it with --run-dir {run} --resume")
    network = network_of(example, settings)
    load_weights(network, run / "model.pt")
    return network.eval(), settings


def command_of(example: Example, settings: Namespace) -> str:
    """Return the command that trains with these settings: the preset, and what differs from it."""
    words = ["--data", str(settings.data), "--preset", settings.preset]
    preset = settings_of(example, words)
    for name in sorted(key for key in settings.keys() if key.split(".")[0] in example.recorded()):
        if settings[name] != preset.get(name) and name != "frame_shape":
            value = settings[name] if isinstance(settings[name], str) else json.dumps(settings[name])
            words.append(f"--{name if '.' in name else name.replace('_', '-')}={value}")
    return shlex.join(["python", f"examples/{example.name}.py", *words])


def _pack(example: Example, options: Namespace) -> None:
    run = Path(options.run)
    network, settings = load_run(example, run)
    numbers = read_json(run / "metrics.json")
    try:
        written = zoo.save(
            network, options.out, options.name, example=example.name, frame_shape=settings.frame_shape,
            sizes=settings.plan.sizes.as_dict(), static=example.static, motion=example.motion, data=settings.data,
            command=command_of(example, settings), seed=settings.seed, licence=options.licence,
            metrics={name: numbers[name] for name in PACKED if name in numbers},
        )  # fmt: skip
    except (ValueError, ImportError) as error:
        sys.exit(str(error))
    print("wrote", written.with_suffix(".safetensors"), written, sep="\n  ")


# of the numbers of a run, those that the card of its packed model has
PACKED = ("held_out_clips", "mean_squared_error", "nats", "nearest_true_clip", "swaps", "intervention_score", "minutes")
PACK = Command(
    "write the model as files that `seqdisent.load` takes",
    {
        "name": {"required": True, "help": "of the model, such as vdsm-pendulum"},
        "licence": {"required": True, "help": "under which the weights may be used, such as MIT"},
        "out": {"default": "zoo", "help": "folder of the packed models"},
    },
    _pack,
)


def load_data(example: Example, settings: Namespace, *, download: bool = False) -> Any:
    try:
        return example.task.load(settings, download=download)
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"--data {settings.data}: {error}")


def device_of(accelerator: str) -> torch.device:
    """Return the device that Lightning would train on, the first of its kind."""
    return Fabric(accelerator=accelerator, devices=1).device


def write_json(content: Any, path: Path) -> None:
    write_whole(json.dumps(content, indent=2) + "\n", path)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        sys.exit(f"{path}: cannot be read as JSON ({error})")
