"""What every example's command line shares: training in stages, the run folder, options.

An example is a network, its training stages and named presets (see `Example`), for data of some kind (see `Task`:
`videos.py`, `chorales.py`, ...). A run is a folder:

    config.json    what was asked for; everything else is rebuilt from it
    stage1/ ...    a folder a stage: last.ckpt (to resume), logs/ (CSV), tensorboard/, model.pt (its finished weights)
    model.pt       the weights at the end
    metrics.json   the numbers, on data that training never saw
    *.png, *.gif   the pictures
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from seqdisent import AnnealingSchedule
from seqdisent.datasets import Clips
from seqdisent.plotting import plot_ledger, plot_schedules
from seqdisent.training import TERMINATED, AtomicCheckpointIO, CheckpointError, ELBOTraining, fit

EMISSION = "x"  # the observed site in every example


class Command(NamedTuple):
    """A subcommand that uses a finished run."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Example, argparse.Namespace], None]


class Task(NamedTuple):
    """A kind of data: where it comes from, what is measured on it, what is drawn."""

    options: Mapping[str, Mapping[str, Any]]  # of the command line, "data" first; each becomes an entry of config.json
    load: Callable[..., Any]  # from config.json (and download=): has .train and .held_out
    measure: Callable[..., dict[str, Any]]  # example, network, data, seed
    draw: Callable[..., list[Path]]  # example, network, data, folder of the run, seed
    commands: Mapping[str, Command]

    def on(self, data: str) -> Task:
        """Return this with other data where none is asked for."""
        return self._replace(options={**self.options, "data": {**self.options["data"], "default": data}})


class Example(NamedTuple):
    """A model that can be trained from the command line."""

    description: str
    task: Task
    network: Callable[[tuple[int, ...], Any], nn.Module]  # of a frame's shape and the plan's sizes
    presets: Mapping[str, Mapping[str, Any]]  # {preset: {data: plan}}
    stages: Mapping[str, Callable[[nn.Module, Any, Clips, int], ELBOTraining | None]]  # None: this plan skips it
    plan: Callable[[dict[str, Any]], Any]  # from config.json
    static: tuple[str, ...] = ()  # the sites that say who
    motion: tuple[str, ...] = ()  # the sites that say what
    flags: Mapping[str, tuple[str, dict[str, Any]]] = {}  # {option: its help and the sizes it changes}


@dataclass(frozen=True)
class Plan:
    """Training in one stage: `single_stage` carries it out."""

    sizes: dict[str, Any]  # arguments of the network
    num_steps: int
    learning_rate: float
    batch_size: int
    clip_length: int | None = None  # longer sequences give random windows; None: whole ones
    annealed: dict[str, tuple[float, int]] = field(default_factory=dict)  # {site: where its weight starts, over steps}
    warm_up: int = 1  # steps over which the learning rate rises; it then falls to 0 along a cosine
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float | None = None
    checkpoint_every: int = 500


def plan_from(config: dict[str, Any]) -> Plan:
    """Return the plan that `dataclasses.asdict` and JSON have taken apart."""
    plan = Plan(**tuples(config))
    return replace(plan, sizes=tuples(plan.sizes), annealed=tuples(plan.annealed))


def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with tuples where JSON has made lists of them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def single_stage(
    network: nn.Module, plan: Plan, clips: Clips, seed: int, *, model: Any = None, draw: Any = None, **options: Any
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
        optimizer=partial(torch.optim.Adam, betas=plan.betas, weight_decay=plan.weight_decay), seed=seed, **options,
    )  # fmt: skip


def main(example: Example) -> None:
    arguments = _parse(example)
    try:
        if arguments.command in example.task.commands:
            example.task.commands[arguments.command].run(example, arguments)
        else:
            _train(example, arguments)
    except KeyboardInterrupt:
        _leave(arguments, "stopped", 130)
    except SystemExit as error:
        if error.code != TERMINATED:
            raise
        _leave(arguments, "stopped", TERMINATED)
    except CheckpointError as error:
        sys.exit(str(error))
    except OSError as error:  # a full disk, say
        _leave(arguments, str(error), 1)


def _leave(arguments: argparse.Namespace, why: str, code: int) -> NoReturn:
    """Exit with one line that says why, and how the run goes on if there is one."""
    run = Path(arguments.run_dir)
    how = f"{run}: {why}; go on with --run-dir {run} --resume" if arguments.command is None else why
    if _is_main_process():
        print(how if (run / "config.json").exists() else why, file=sys.stderr)
    sys.exit(code)


# Training


def _train(example: Example, arguments: argparse.Namespace) -> None:
    run = Path(arguments.run_dir)
    config_path = run / "config.json"
    if config_path.exists():
        if not arguments.resume and _is_main_process():
            sys.exit(f"{run} holds a run; continue it with --resume, or choose another --run-dir")
        config = _read_config(example, run)
        _check_options(example, arguments, config)
    elif arguments.resume:
        sys.exit(f"{run} holds no run to resume (there is no {config_path})")
    else:
        config = _new_config(example, arguments)
    plan = _plan_of(example, config, run)
    data = load_data(example, config, download=arguments.download)
    print(f"{run}: training on {data.train}, held out {data.held_out}", flush=True)
    torch.manual_seed(config["seed"])
    network = _network(example, tuple(data.train.frames.shape[2:]), plan)
    if not config_path.exists() and _is_main_process():
        run.mkdir(parents=True, exist_ok=True)
        write_json({**config, "frame_shape": list(data.train.frames.shape[2:])}, config_path)
    trainings = {}
    for name, stage in example.stages.items():
        finished = run / name / "model.pt"
        training = stage(network, plan, data.train, config["seed"])
        if training is None:
            continue
        trainings[name] = training
        if not finished.exists():
            fit(
                training, run / name, resume=arguments.resume, clip_norm=plan.clip_norm,
                accelerator=arguments.accelerator, devices=arguments.devices, num_nodes=arguments.num_nodes,
                precision=arguments.precision, checkpoint_every=plan.checkpoint_every,
            )  # fmt: skip
            if not _is_main_process():
                continue
            write_json(training.minutes, run / name / "minutes.json")
            _save(network.state_dict(), finished)  # last: a stage that has it is not trained again
        _load_weights(network, finished)
    if not _is_main_process():
        return
    network.float().eval()
    metrics = example.task.measure(example, network, data, seed=config["seed"])
    metrics["minutes"] = {name: read_json(run / name / "minutes.json") for name in trainings}
    write_json(metrics, run / "metrics.json")
    _save(network.state_dict(), run / "model.pt")  # last: what has it is a finished run
    pictures = example.task.draw(example, network, data, run, seed=config["seed"])
    pictures += _draw_trainings(trainings, run)
    print(json.dumps(metrics, indent=2))
    print("wrote", run / "metrics.json", *pictures, sep="\n  ")


def _new_config(example: Example, arguments: argparse.Namespace) -> dict[str, Any]:
    known = example.presets[arguments.preset]
    plan = known.get(arguments.data) or known.get("clips")
    if plan is None:
        sys.exit(f"--data: got {arguments.data!r}, expected one of {sorted(known)}")
    for flag, (_, changes) in example.flags.items():
        if getattr(arguments, flag):
            plan = replace(plan, sizes={**plan.sizes, **changes})
    options = {name: getattr(arguments, name) for name in example.task.options}
    return {**options, "preset": arguments.preset, "seed": arguments.seed, "plan": asdict(plan)}


def _network(example: Example, frame_shape: tuple[int, ...], plan: Any) -> nn.Module:
    try:
        return example.network(frame_shape, plan.sizes)
    except (ValueError, TypeError, KeyError) as error:
        sys.exit(f"this preset does not fit frames of shape {frame_shape} (--preset, --image-size): {error}")


def _plan_of(example: Example, config: Mapping[str, Any], run: Path) -> Any:
    try:
        return example.plan(config["plan"])
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        sys.exit(f"{run / 'config.json'}: written by another version of this example, or by another one ({error})")


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


def _is_main_process() -> bool:
    # before `fit`, Lightning's rank does not know of another node where Lightning itself starts the processes
    return rank_zero_only.rank == 0 and int(os.environ.get("NODE_RANK", 0)) == 0


# Runs and files


def load_run(example: Example, run: Path) -> tuple[nn.Module, dict[str, Any], tuple[int, ...]]:
    """Return a finished run's network, its config.json and the shape of its frames."""
    config = _read_config(example, run)
    plan = _plan_of(example, config, run)
    finished = run / "model.pt"
    if not finished.exists():
        sys.exit(f"{run} is not finished (there is no {finished}); continue it with --run-dir {run} --resume")
    network = _network(example, tuple(config["frame_shape"]), plan)
    _load_weights(network, finished)
    return network.eval(), config, tuple(config["frame_shape"])


def _read_config(example: Example, run: Path) -> dict[str, Any]:
    config = read_json(run / "config.json")
    wanted = {*example.task.options, "preset", "seed", "plan", "frame_shape"}
    if not isinstance(config, dict) or (missing := sorted(wanted - set(config))):
        lacks = f"lacks {', '.join(missing)}" if isinstance(config, dict) else "is no list of settings"
        sys.exit(f"{run / 'config.json'}: {lacks}; written by another version of this example, or by another one")
    return config


def _check_options(example: Example, arguments: argparse.Namespace, config: Mapping[str, Any]) -> None:
    """A resumed run keeps its settings: one that is asked for and is another would be passed over in silence."""
    for name in (*example.task.options, "preset", "seed"):
        asked, option = getattr(arguments, name), "--" + name.replace("_", "-")
        typed = any(word.split("=")[0] == option for word in sys.argv[1:])
        if typed and asked != config[name]:
            sys.exit(f"{option}: got {asked}, but this run was started with {config[name]}; choose another --run-dir")
    for flag, (_, changes) in example.flags.items():
        if getattr(arguments, flag) and not changes.items() <= tuples(config["plan"]["sizes"]).items():
            sys.exit(f"--{flag}: this run was started without it; choose another --run-dir")


def load_data(example: Example, config: Mapping[str, Any], *, download: bool = False) -> Any:
    try:
        return example.task.load(config, download=download)
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"--data {config['data']}: {error}")


def read_json(path: Path) -> Any:
    if not path.exists():
        sys.exit(f"{path} is missing: {path.parent} is not a run folder")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        sys.exit(f"{path}: cannot be read as JSON ({error})")


def write_json(content: Any, path: Path) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(unfinished, path)


def _save(state: Any, path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(state, path)


def _load_weights(network: nn.Module, path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums and does not look at them
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} does not fit its checksum")
        network.load_state_dict(torch.load(path, weights_only=True))
    except Exception as error:  # what is damaged fails in any of many ways
        reason = " ".join(str(error).split())[:200]
        sys.exit(f"{path}: damaged, or the weights of another network ({reason}); without it, --resume makes it again")


# The command line


def _parse(example: Example) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=example.description, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    for name, how in example.task.options.items():
        add("--" + name.replace("_", "-"), **how)
    add("--preset", default="cpu", choices=sorted(example.presets), help="hyperparameters (default: cpu)")
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
    parser.set_defaults(command=None)
    if not example.task.commands:
        return parser.parse_args()
    commands = parser.add_subparsers(dest="command", metavar="{" + ",".join(example.task.commands) + "}")
    for name, command in example.task.commands.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help)
        subparser.add_argument("run", help="folder of a finished run")
        command.add_arguments(subparser)
    return parser.parse_args()
