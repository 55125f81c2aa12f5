"""The settings of an example: options, presets, YAML files, and what a run records of them.

Every setting is an option, and can stand in a YAML file:

    python examples/vdsm.py --config my.yaml --plan.sizes.num_experts 12

Presets are such files, `presets/EXAMPLE/PRESET_DATA.yaml` or, for any data, `presets/EXAMPLE/PRESET.yaml`. One that
names another as its `base` holds changes to it. A run records its settings in a file of the same form, `config.yaml`.
"""

from __future__ import annotations

import json
import sys
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace
from torch import nn

from seqdisent.training import ELBOTraining

PRESETS = Path(__file__).parent / "presets"


class Command(NamedTuple):
    """A subcommand that uses a finished run."""

    help: str
    options: Mapping[str, Mapping[str, Any]]
    run: Callable[[Example, Namespace], None]


class Task(NamedTuple):
    """A kind of data: where it comes from, what is measured on it."""

    options: Mapping[str, Mapping[str, Any]]  # of the command line, "data" first
    load: Callable[..., Any]  # from the settings (and download=): has .train and .held_out
    measure: Callable[..., tuple[dict[str, Any], list[Path]]]  # example, network, data, folder, settings
    commands: Mapping[str, Command]
    validation: Callable[[Any], Iterable[Any]] | None = None  # of the data: batches that choose among a run's models

    def on(self, data: str) -> Task:
        """Return this with other data where none is asked for."""
        return self._replace(options={**self.options, "data": {**self.options["data"], "default": data}})


@dataclass(frozen=True)
class Plan:
    """Training in one stage: `command_line.single_stage` carries it out."""

    sizes: dict[str, Any]  # arguments of the network
    num_steps: int = 3000
    learning_rate: float = 1e-3
    batch_size: int = 8
    clip_length: int | None = None  # longer sequences give random windows; None: whole ones
    # {site: where its weight starts, over how many steps it changes, and where it ends (1, if that is left out)}
    annealed: dict[str, tuple[float, int] | tuple[float, int, float]] = field(default_factory=dict)
    warm_up: int = 1  # steps over which the learning rate rises; it then falls to 0 along a cosine
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float | None = None
    checkpoint_every: int = 500
    objective: Literal["elbo", "stl", "iwae", "dreg", "fivo"] = "elbo"  # the last three without `annealed`
    num_particles: int = 1


class Example(NamedTuple):
    """A model that can be trained from the command line."""

    name: str  # of the folder of its presets
    description: str
    task: Task
    network: Callable[..., nn.Module]  # of a frame's shape and the plan's sizes, which its signature names
    stages: Mapping[str, Callable[[Any, Any, Any, int], ELBOTraining | None]]  # None: this plan skips it
    sizes: type | None = None  # a dataclass of sizes, where `network` takes that instead
    plan: type = Plan
    static: tuple[str, ...] = ()  # the sites that say who
    motion: tuple[str, ...] = ()  # the sites that say what
    history: bool = False  # whether the model reads the frames before each step
    flags: Mapping[str, tuple[str, dict[str, Any]]] = {}  # {option: its help and the sizes it changes}

    def recorded(self) -> list[str]:
        """Return the settings that belong to a run; the others may change when it goes on."""
        return [*(name.replace("-", "_") for name in self.task.options), "preset", "seed", "frame_shape", "plan"]

    def preset(self, name: str, data: str | None = None) -> Any:
        """Return the plan of a preset."""
        return self.plan_of(settings_of(self, ["--preset", name] + ([] if data is None else ["--data", data])))

    def plan_of(self, settings: Namespace) -> Any:
        values = settings.plan.as_dict()
        sizes = values.pop("sizes")
        return self.plan(sizes=self.sizes(**sizes) if self.sizes else sizes, **values)

    def build(self, frame_shape: tuple[int, ...], sizes: Any) -> nn.Module:
        return self.network(frame_shape, sizes) if self.sizes else self.network(frame_shape, **sizes)


class _Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of an example's description, and shows types and defaults."""


def parser_of(example: Example, **options: Any) -> ArgumentParser:
    lines = [f"  {name + ' RUN':14} {command.help}" for name, command in example.task.commands.items()]
    commands = "\n".join(["commands on a finished run (COMMAND --help: their options):", *lines]) if lines else None
    usage = "%(prog)s [options]" + ("" if commands is None else "\n       %(prog)s COMMAND RUN [options]")
    how = {"usage": usage, "description": example.description, "epilog": commands, "formatter_class": _Help}
    parser = ArgumentParser(allow_abbrev=False, print_config=None, **how, **options)
    add = parser.add_argument
    add("--config", action="config", help="a YAML file of settings; options after it change them")
    for name, how in example.task.options.items():
        add("--" + name, **how)
    presets = sorted({file.stem.split("_")[0] for file in (PRESETS / example.name).glob("*.yaml")})
    add("--preset", default="cpu", choices=presets, help="hyperparameters")
    for flag, (text, _) in example.flags.items():
        add("--" + flag, action="store_true", help=text)
    add("--run-dir", default="runs/latest", help="folder of the run")
    add("--resume", action="store_true", help="continue the run in --run-dir where it stopped")
    add("--seed", type=int, default=0)
    add("--download", action="store_true", help="fetch the data if it is not there")
    add("--accelerator", default="auto", help="as Lightning's: cpu, gpu, ...")
    add("--devices", default="1", help="as Lightning's: how many, or which")
    add("--num-nodes", type=int, default=1)
    add("--precision", default="32-true", help="as Lightning's: 32-true, bf16-mixed, 64-true, ...")
    add("--cuda-graph", action="store_true", help="record a training step, replay it: faster on an NVIDIA GPU")
    add("--base", help=SUPPRESS)  # of a preset
    add("--frame_shape", type=tuple[int, ...], help=SUPPRESS)  # as the data have it
    parser.add_class_arguments(example.plan, "plan", skip={"sizes"})
    # of a network, all but the shape of what it reads
    parser.add_class_arguments(example.sizes or example.network, "plan.sizes", skip=set() if example.sizes else {1})
    for key, title in (("plan", "training"), ("plan.sizes", "network")):
        parser.groups[key].title = f"{title} (defaults are those without a preset)"
    return parser


def command_parser(example: Example, name: str) -> ArgumentParser:
    """Return the parser of what stands after a command's name."""
    command = example.task.commands[name]
    parser = ArgumentParser(prog=f"{Path(sys.argv[0]).name} {name}", description=command.help, allow_abbrev=False)
    parser.add_argument("run", help="folder of a finished run")
    for option, how in command.options.items():
        parser.add_argument("--" + option, **how)
    return parser


def settings_of(example: Example, argv: list[str]) -> Namespace:
    """Return the settings of a new run: defaults, changed by the preset, changed by what was asked for."""
    parser = parser_of(example)
    asked = parser.parse_args(argv, defaults=False)  # what is typed, or stands in a file of --config
    data = asked.get("data", example.task.options["data"]["default"])
    files = [str(file) for file in preset_files(example.name, asked.get("preset", "cpu"), data)]
    chosen = [sizes for flag, (_, sizes) in example.flags.items() if asked.get(flag)]
    files += [json.dumps({"plan": {"sizes": sizes}}) for sizes in chosen]
    return parser.parse_args([*_as_options(files), *argv])


def settings_of_run(example: Example, run: Path, argv: list[str]) -> Namespace:
    """Return the settings of a run that goes on, or leave if something else is asked for."""
    parser, recorded = parser_of(example), read_settings(example, run)
    asked = parser.parse_args(argv, defaults=False)
    for name, value in asked.items():
        known = recorded.get(name)
        if isinstance(value, dict):  # of a dict, what is named
            known = {key: (known or {}).get(key) for key in value}
        if name.split(".")[0] in example.recorded() and value != known:
            option = "--" + (name if "." in name else name.replace("_", "-"))
            sys.exit(f"{option}: got {value}, but this run was started with {known}; choose another --run-dir")
    for flag, (_, sizes) in example.flags.items():
        if asked.get(flag) and not sizes.items() <= recorded.plan.sizes.as_dict().items():
            sys.exit(f"--{flag}: this run was started without it; choose another --run-dir")
    return parser.parse_args([*_as_options([str(run / "config.yaml")]), *argv])


def _as_options(files: list[str]) -> list[str]:
    return [word for file in files for word in ("--config", file)]


def preset_files(name: str, preset: str, data: str, *, changed_by: Path | None = None) -> list[Path]:
    """Return the files of a preset for these data, the one that it changes first."""
    folder = PRESETS / name

    def paths_of(preset: str) -> list[Path]:
        stems = (f"{preset}_{data}", f"{preset}_clips", preset)
        return [path for stem in stems if (path := folder / f"{stem}.yaml").is_file() and path != changed_by]

    if not (paths := paths_of(preset)):
        presets = sorted({file.stem.split("_")[0] for file in folder.glob("*.yaml")})
        known = ", ".join(each for each in presets if paths_of(each)) or "none"
        sys.exit(f"--preset: {name}'s {preset!r} is not for --data {data}; of its presets, these are: {known}")
    path = paths[0]
    base = yaml.safe_load(path.read_text()).get("base")
    return [*(preset_files(name, base, data, changed_by=path) if base else []), path]


def read_settings(example: Example, run: Path) -> Namespace:
    """Return what a run has recorded."""
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
    if missing := sorted(set(example.recorded()) - set(found)):
        sys.exit(f"{other} (it lacks {', '.join(missing)})")
    try:
        return parser_of(example, exit_on_error=False).parse_object(found)
    except ArgumentError as error:
        sys.exit(f"{other} ({' '.join(str(error).split())})")


def write_settings(example: Example, settings: Namespace, path: Path) -> None:
    recorded = {name: settings[name] for name in example.recorded()}
    plain = json.loads(json.dumps(recorded, default=Namespace.as_dict))
    write_whole(yaml.safe_dump(plain, sort_keys=False), path)


def write_whole(text: str, path: Path) -> None:
    """Write a file beside its place and move it there: a run that is killed leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)
