"""What every example's command line shares: options, presets, training in stages, commands on a finished run.

An example is a network, its training stages and presets (see `Example`), for data of some kind (see `Task`:
`videos.py`, `chorales.py`, ...). Every setting is an option, and can stand in a YAML file:

    python examples/vdsm.py --config my.yaml --plan.sizes.num_experts 12

Presets are such files, `presets/EXAMPLE/PRESET_DATA.yaml`. One that names another as its `base` holds changes to it.
A run is a folder:

    config.yaml    what was asked for, presets and all; `--config` takes it again
    stage1/ ...    a folder a stage: last.ckpt (to resume), logs/ (CSV), tensorboard/, model.pt (its finished weights)
    model.pt       the weights at the end
    metrics.json   the numbers, on data that training never saw
    *.png, *.gif   the pictures
"""

from __future__ import annotations

import json
import sys
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import nn

from seqdisent import AnnealingSchedule
from seqdisent._runs import is_main_process, load_weights, save_weights, train_stages, write_json
from seqdisent.plotting import plot_ledger, plot_schedules
from seqdisent.training import TERMINATED, CheckpointError, ELBOTraining

PRESETS = Path(__file__).parent / "presets"


class Command(NamedTuple):
    """A subcommand that uses a finished run."""

    help: str
    options: Mapping[str, Mapping[str, Any]]
    run: Callable[[Example, Namespace], None]


class Task(NamedTuple):
    """A kind of data: where it comes from, what is measured on it."""

    options: Mapping[str, Mapping[str, Any]]  # of the command line, "data" first; each is recorded in config.yaml
    load: Callable[..., Any]  # from the recorded settings (and download=): has .train and .held_out
    measure: Callable[..., tuple[dict[str, Any], list[Path]]]  # example, network, data, folder, settings
    commands: Mapping[str, Command]

    def on(self, data: str) -> Task:
        """Return this with other data where none is asked for."""
        return self._replace(options={**self.options, "data": {**self.options["data"], "default": data}})


@dataclass(frozen=True)
class Plan:
    """Training in one stage: `single_stage` carries it out."""

    sizes: dict[str, Any]  # arguments of the network
    num_steps: int = 3000
    learning_rate: float = 1e-3
    batch_size: int = 8
    clip_length: int | None = None  # longer sequences give random windows; None: whole ones
    annealed: dict[str, tuple[float, int]] = field(default_factory=dict)  # {site: where its weight starts, over steps}
    warm_up: int = 1  # steps over which the learning rate rises; it then falls to 0 along a cosine
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float | None = None
    checkpoint_every: int = 500


class Example(NamedTuple):
    """A model that can be trained from the command line."""

    name: str  # of the folder of its presets
    description: str
    task: Task
    network: Callable[[tuple[int, ...], Any], nn.Module]  # of a frame's shape and the plan's sizes
    sizes: type  # whose signature says which sizes there are
    stages: Mapping[str, Callable[[Any, Any, Any, int], ELBOTraining | None]]  # None: this plan skips it
    plan: type = Plan
    static: tuple[str, ...] = ()  # the sites that say who
    motion: tuple[str, ...] = ()  # the sites that say what
    flags: Mapping[str, tuple[str, dict[str, Any]]] = {}  # {option: its help and the sizes it changes}


def single_stage(
    network: Any, plan: Plan, clips: Any, seed: int, *, model: Any = None, draw: Any = None, **options: Any
) -> ELBOTraining:
    """Return the training of everything at once on the bound of random clips, as most models have it."""
    warm_up = AnnealingSchedule.linear(plan.learning_rate / plan.warm_up, plan.learning_rate, plan.warm_up)
    length = clips.lengths.clamp(max=plan.clip_length or clips.frames.shape[1]).double().mean().item()
    return ELBOTraining(
        network, model or network.model, network.guide,
        draw or partial(clips.draw_clips, plan.batch_size, num_steps=plan.clip_length),
        num_steps=plan.num_steps,
        learning_rate=warm_up.then(AnnealingSchedule.cosine(plan.learning_rate, 0.0, plan.num_steps - plan.warm_up)),
        weights={site: AnnealingSchedule.linear(start, 1.0, over) for site, (start, over) in plan.annealed.items()},
        terms_per_step=plan.batch_size * length,
        betas=plan.betas, weight_decay=plan.weight_decay, seed=seed, **options,
    )  # fmt: skip


def main(example: Example, argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(example)
    asked = parser.parse_args(argv, defaults=False)  # what the user has set, and nothing else
    run = Path(asked.get("run_dir", parser.get_default("run_dir")))
    try:
        if asked.get("command"):
            options = parser.parse_args(argv)
            example.task.commands[options.command].run(example, options[options.command])
        else:
            _train(example, parser, asked, argv, run)
    except KeyboardInterrupt:
        _leave(run, asked, "stopped", 130)
    except SystemExit as error:
        if error.code != TERMINATED:
            raise
        _leave(run, asked, "stopped", TERMINATED)
    except CheckpointError as error:
        sys.exit(str(error))
    except OSError as error:  # a full disk, say
        _leave(run, asked, str(error), 1)


def _leave(run: Path, asked: Namespace, why: str, code: int) -> NoReturn:
    """Exit with one line that says why, and how the run goes on if there is one."""
    if not asked.get("command") and (run / "config.yaml").exists():
        why = f"{run}: {why}; go on with --run-dir {run} --resume"
    if is_main_process():
        print(why, file=sys.stderr)
    sys.exit(code)


# Training


def _train(example: Example, parser: ArgumentParser, asked: Namespace, argv: list[str], run: Path) -> None:
    path, resume = run / "config.yaml", asked.get("resume", False)
    if path.exists():
        if not resume and is_main_process():
            sys.exit(f"{run} holds a run; continue it with --resume, or choose another --run-dir")
        _check_asked(example, asked, read_settings(example, run))
        files = [str(path)]
    elif resume:
        sys.exit(f"{run} holds no run to resume (there is no {path})")
    else:
        data = asked.get("data", example.task.options["data"]["default"])
        files = [str(file) for file in _preset(example.name, asked.get("preset", "cpu"), data)]
        files += [
            json.dumps({"plan": {"sizes": sizes}}) for flag, (_, sizes) in example.flags.items() if asked.get(flag)
        ]
    options = parser.parse_args([*(word for file in files for word in ("--config", file)), *argv])
    data = load_data(example, options, download=options.download)
    print(f"{run}: training on {data.train}, held out {data.held_out}", flush=True)
    options.frame_shape = tuple(data.train.frames.shape[2:])
    torch.manual_seed(options.seed)
    network, plan = _network(example, options)
    if not path.exists() and is_main_process():
        _write_settings(example, options, path)
    trainings = train_stages(
        network,
        {name: partial(stage, network, plan, data.train, options.seed) for name, stage in example.stages.items()},
        run, resume=resume, clip_norm=plan.clip_norm, checkpoint_every=plan.checkpoint_every,
        **{name: options[name] for name in ("accelerator", "devices", "num_nodes", "precision")},
    )  # fmt: skip
    if not is_main_process():
        return
    network.float().eval()
    numbers, written = example.task.measure(example, network, data, run, options)
    numbers["minutes"] = {name: read_json(run / name / "minutes.json") for name in trainings}
    write_json(numbers, run / "metrics.json")
    save_weights(network, run / "model.pt")  # last: what has it is a finished run
    written += _draw_trainings(trainings, run)
    print(json.dumps({name: value for name, value in numbers.items() if name != "forecast_error"}, indent=2))
    print("wrote", *dict.fromkeys([run / "metrics.json", *written]), sep="\n  ")


def _network(example: Example, options: Namespace) -> tuple[nn.Module, Any]:
    values = options.plan.as_dict()
    sizes = values.pop("sizes")
    plan = example.plan(sizes=example.sizes(**sizes) if is_dataclass(example.sizes) else sizes, **values)
    try:
        return example.network(tuple(options.frame_shape), plan.sizes), plan
    except (ValueError, TypeError) as error:
        sys.exit(
            f"this preset does not fit frames of shape {tuple(options.frame_shape)} (--preset, --image-size): {error}"
        )


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


# Finished runs, settings and data


def load_run(example: Example, run: Path) -> tuple[nn.Module, Namespace]:
    """Return a finished run's network and its settings."""
    settings = read_settings(example, run)
    if not (run / "model.pt").exists():
        sys.exit(f"{run} is not finished (there is no {run / 'model.pt'}); continue it with --run-dir {run} --resume")
    network, _ = _network(example, settings)
    load_weights(network, run / "model.pt")
    return network.eval(), settings


def load_data(example: Example, settings: Namespace, *, download: bool = False) -> Any:
    try:
        return example.task.load(settings, download=download)
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"--data {settings.data}: {error}")


def read_settings(example: Example, run: Path) -> Namespace:
    """Return what config.yaml records."""
    path = run / "config.yaml"
    if not path.exists():
        sys.exit(f"{path} is missing: {run} is not a run folder")
    other = f"{path}: written by another version of this example, or by another one"
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        sys.exit(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})")
    if not isinstance(found, dict):
        sys.exit(f"{path}: is no list of settings")
    if missing := sorted(set(_recorded(example)) - set(found)):
        sys.exit(f"{other} (it lacks {', '.join(missing)})")
    try:
        return _parser(example, exit_on_error=False).parse_object(found)
    except ArgumentError as error:
        sys.exit(f"{other} ({' '.join(str(error).split())})")


def _write_settings(example: Example, options: Namespace, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded = json.loads(json.dumps({name: options[name] for name in _recorded(example)}, default=Namespace.as_dict))
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(yaml.safe_dump(recorded, sort_keys=False))
    unfinished.replace(path)


def _recorded(example: Example) -> list[str]:
    return [*(name.replace("-", "_") for name in example.task.options), "preset", "seed", "frame_shape", "plan"]


def _check_asked(example: Example, asked: Namespace, recorded: Namespace) -> None:
    """A resumed run keeps its settings: one that is asked for and is another would be passed over in silence."""
    for name, value in asked.items():
        known = recorded.get(name)
        if isinstance(value, dict):  # of a dict, what is named
            known = {key: (known or {}).get(key) for key in value}
        if name.split(".")[0] in _recorded(example) and value != known:
            option = "--" + (name if "." in name else name.replace("_", "-"))
            sys.exit(f"{option}: got {value}, but this run was started with {known}; choose another --run-dir")
    for flag, (_, sizes) in example.flags.items():
        if asked.get(flag) and not sizes.items() <= recorded.plan.sizes.as_dict().items():
            sys.exit(f"--{flag}: this run was started without it; choose another --run-dir")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        sys.exit(f"{path}: cannot be read as JSON ({error})")


# The command line


class _Help(RawDescriptionHelpFormatter):
    """Keeps the lines of an example's description."""


def _preset(name: str, preset: str, data: str) -> list[Path]:
    """Return the files of a preset for these data, the one that it changes first."""
    names = (f"{preset}_{data}", f"{preset}_clips", preset)
    path = next((PRESETS / name / f"{n}.yaml" for n in names if (PRESETS / name / f"{n}.yaml").is_file()), None)
    if path is None:
        known = sorted(file.stem for file in (PRESETS / name).glob("*.yaml"))
        sys.exit(f"--data: got {data!r}, and preset {preset!r} is for other data, expected one of {known}")
    base = yaml.safe_load(path.read_text()).get("base")
    return [*(_preset(name, base, data) if base else []), path]


def _parser(example: Example, *, exit_on_error: bool = True) -> ArgumentParser:
    parser = ArgumentParser(
        description=example.description, formatter_class=_Help, allow_abbrev=False, exit_on_error=exit_on_error
    )
    add = parser.add_argument
    add("--config", action="config", help="a YAML file of settings; those that follow it go before")
    for name, how in example.task.options.items():
        add("--" + name, **how)
    presets = sorted({file.stem.split("_")[0] for file in (PRESETS / example.name).glob("*.yaml")})
    add("--preset", default="cpu", choices=presets, help="hyperparameters (default: cpu)")
    for flag, (text, _) in example.flags.items():
        add("--" + flag, action="store_true", help=text)
    add("--run-dir", default="runs/latest", help="folder of the run (default: runs/latest)")
    add("--resume", action="store_true", help="continue the run in --run-dir where it stopped")
    add("--seed", type=int, default=0)
    add("--download", action="store_true", help="fetch the data if it is not there")
    add("--accelerator", default="auto", help="as Lightning's: cpu, gpu, ...")
    add("--devices", default="1", help="as Lightning's: how many, or which")
    add("--num-nodes", type=int, default=1)
    add("--precision", default="32-true", help="as Lightning's: 32-true, bf16-mixed, 64-true, ...")
    add("--base", help=SUPPRESS)
    add("--frame_shape", type=list[int], help=SUPPRESS)  # as the data have it, recorded
    parser.add_class_arguments(example.plan, "plan", skip={"sizes"})
    # of a network, all but the shape of what it reads
    parser.add_class_arguments(example.sizes, "plan.sizes", skip=set() if is_dataclass(example.sizes) else {1})
    if example.task.commands:
        commands = parser.add_subcommands(required=False, dest="command")
        for name, command in example.task.commands.items():
            subparser = ArgumentParser(description=command.help, allow_abbrev=False)
            subparser.add_argument("run", help="folder of a finished run")
            for option, how in command.options.items():
                subparser.add_argument("--" + option, **how)
            commands.add_subcommand(name, subparser, help=command.help)
    return parser
