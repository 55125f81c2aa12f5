"""The field's models on one table: the same clips, the same judge, the same minutes, measured in the same way.

    python benchmarks/field.py --data sprites --seeds 3 --minutes 15
    python benchmarks/field.py --data signals --models speakers dsvae "all in f" --seeds 3 --minutes 3
    python benchmarks/field.py --data pendulum --preset small --models mine.py:mine dsvae      a model of one's own

Every model trains on the same clips for as many steps as take the minutes on two cores (of processor time: on one
thread twice as long), with its preset's schedules stretched to them. How long a step takes is measured first: let
nothing else run then. What is measured on was not trained on: `--on test`, or `--on validation`, to choose by. All
seeds of a model train on the same split.

A run is a folder, OUT/DATA/ON/MODEL/SEED. What is finished is not done again, what was stopped goes on; other settings
or another judge need another OUT, and a model that was changed needs its folder removed. After every run OUT/DATA/ON
has the table of all that is finished: field.md, field.json and field.html, with each model's grid of swaps. Several
processes may share a folder if each has models of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from field_models import ENTRIES, Contestant, Entry, Task, check, find_entry
from field_table import write_tables
from settings import settings_of

from seqdisent import _files
from seqdisent.evaluation import evaluate
from seqdisent.metrics import Judge, train_judge
from seqdisent.training import save_weights, train_stages

MODELS = ["vdsm", "dsvae", "dsvae-grouped", "cdsvae", "s3vae", "dbse", "all in f", "all in z"]
OF_ONE_LENGTH = ("cdsvae", "s3vae", "all in f", "all in z")  # of MODELS, those for clips of one length alone
GENERATED = ("pendulum", "moving_mnist", "signals")
OTHER_CLIPS = 1000  # added to the seed where the clips to test on are generated
PROBE = 0.01  # of a plan's steps, to measure how long they take


def load(data: str, on: str, preset: str, more: list[str]) -> Task:
    """Return the clips. What the presets were chosen on, the examples' own held-out clips of seed 0, is validation."""
    example = importlib.import_module("speakers" if data == "signals" else "vdsm").EXAMPLE
    settings = settings_of(example, ["--preset", preset, "--data", data, *more])
    try:
        train, validation, candidates = example.task.load(settings, download=False)
        if data not in GENERATED:  # as many identities again are for the test; training has neither these nor those
            taken, left = (len(clips.identity.unique()) for clips in (validation, train))
            if left <= taken:
                sys.exit(f"--held-out: validation and the test have {taken} identities each, of {taken + left} in all")
            train, test = train.split(taken, 1, by="identity")
        elif on == "test":
            settings.seed += OTHER_CLIPS
            _, test, candidates = example.task.load(settings, download=False)
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"--data {data}: {error}")
    held_out = validation if on == "validation" else test
    if (found := len(held_out.identity.unique())) < 2:
        sys.exit(f"--held-out: leaves {found} identity to measure on; expected at least 2, as swaps are between two")
    return Task(data, preset, train, held_out, candidates)


def digest(task: Task) -> str:
    """Return what tells other clips apart."""
    found = hashlib.sha256()
    for clips in (task.train, task.held_out):
        for values in (clips.frames, clips.identity, *clips.labels.values()):
            found.update(values.contiguous().numpy())
    return found.hexdigest()[:16]


def same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Record the settings of a folder, or leave if it has others."""
    path = folder / "settings.json"
    if not path.exists():
        _files.write(path, json.dumps(settings, indent=2).encode(), several_writers=True)
    known = json.loads(path.read_text())
    for name, value in settings.items():
        if known.get(name) != value:
            option = "--data" if name == "clips" else "--" + name.replace("_", "-")
            known_value = known.get(name)
            sys.exit(f"{option}: got {value}, but {folder} was begun with {known_value}; choose another --out")


def check_judge(folder: Path) -> None:
    """Leave if a finished run was measured by another judge than the folder has."""
    path = folder / "judge.pt"
    own = digest_of(path)
    for about in folder.glob("*/*/about.json"):
        if json.loads(about.read_text()).get("judge") != own:
            sys.exit(
                f"{about.parent} was measured by another judge than {path}: put that one back, remove the run's"
                " about.json to have it measured again, or choose another --out"
            )


def digest_of(path: Path) -> str | None:
    """Return what tells a file from others, None if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None


def find_judge(task: Task, num_steps: int, path: Path) -> Judge | None:
    """Return the judge of all models, trained once; None where steps are no pictures or labels are not shared."""
    names = [clips.factor_names for clips in (task.train, task.held_out)]
    factors = [name for name, label in task.train.labels.items() if len(label.unique()) > 1]
    if len(task.frame_shape) != 3 or not factors or any(names[0][name] != names[1].get(name) for name in factors):
        return None
    if not path.exists():
        judge = train_judge(task.train, task.held_out, factors=factors, seed=0, num_steps=num_steps)
        _files.write(path.parent / "judge.json", json.dumps(judge.accuracy).encode(), several_writers=True)
        judge.save(path)
        print(
            "judge, right on real clips:", {name: round(value, 3) for name, value in judge.accuracy.items()}, flush=True
        )
    return Judge.load(path)


def train(contestant: Contestant, folder: Path) -> float:
    """Train a model, or go on; return the seconds of the processor that this took."""
    start = time.process_time()
    quiet = {"progress_bar": False, "accelerator": "cpu"}
    train_stages(contestant.network, contestant.stages, folder, resume=True, **contestant.options, **quiet)
    return time.process_time() - start


def stretch(entry: Entry, task: Task, minutes: float) -> float:
    """Return by what a model's steps are multiplied to take the minutes on two cores, from short trainings."""

    def seconds(scale: float) -> float:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            return train(entry(task, 0, scale), Path(folder))

    seconds(PROBE)  # what only the first training takes
    scale, less = PROBE, seconds(PROBE)
    while (more := seconds(2 * scale)) < 1.3 * less + max(1, 2 * minutes):  # too short to tell what a step takes
        if scale > 1000:
            sys.exit("--minutes: a training takes no longer with more steps; its number of steps should follow `scale`")
        scale, less = 2 * scale, more
    of_all_steps = (more - less) / scale
    at_start = max(0.0, less - scale * of_all_steps)  # what does not grow with the steps
    if (left := 120 * minutes - at_start) <= 0:
        sys.exit(f"--minutes: got {minutes:g}, expected more: the start alone takes {at_start / 120:.2f}")
    return left / of_all_steps


def scale_of(name: str, entry: Entry, task: Task, minutes: float | None, folder: Path) -> float:
    """Return what was measured before, or measure it."""
    path = folder / folder_name(name) / "scale.json"
    if not path.exists():
        learns = bool(entry(task, 0, PROBE).stages)
        scale = stretch(entry, task, minutes) if learns and minutes is not None else 1.0
        print(f"{name}: {scale:.3f} times its own steps", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        _files.write(path, json.dumps(scale).encode(), several_writers=True)
    return json.loads(path.read_text())


def folder_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def run(name: str, entry: Entry, task: Task, seed: int, scale: float, folder: Path, judge: Judge | None) -> None:
    """Train and measure one model with one seed, unless that is done."""
    run_folder = folder / folder_name(name) / str(seed)
    if (run_folder / "about.json").exists():
        print(f"{name}, seed {seed}: was finished before, and is kept ({run_folder})", flush=True)
        return
    torch.manual_seed(seed)
    contestant, seconds = entry(task, seed, scale), None
    if contestant.stages:
        print(f"{name}, seed {seed}: training", flush=True)
        spent = run_folder / "seconds.json"  # of a run that was stopped; one that is killed loses what it spent
        seconds = json.loads(spent.read_text()) if spent.exists() else 0.0
        start = time.process_time()
        try:
            train(contestant, run_folder)
        finally:
            seconds += time.process_time() - start
            _files.write(spent, json.dumps(seconds).encode())
        save_weights(contestant.network, run_folder / "model.pt")
    print(f"{name}, seed {seed}: measuring", flush=True)
    contestant.network.eval()
    found = evaluate(
        contestant.model, contestant.guide, task.train, task.held_out, static=contestant.static,
        motion=contestant.motion, emission=contestant.emission, history=contestant.history, judge=judge,
        candidates=task.candidates, forecast_steps=0, seed=0,
    )  # fmt: skip
    found.save(run_folder, title=f"{name}, seed {seed}, on {task.data}")
    about = {
        "model": name, "seed": seed, "static": contestant.static, "motion": contestant.motion,
        "scale": scale if contestant.stages else None,
        "minutes": None if seconds is None else seconds / 120,
        "judge": digest_of(folder / "judge.pt"),
        "parameters": sum(parameter.numel() for parameter in contestant.network.parameters()),
    }  # fmt: skip
    _files.write(run_folder / "about.json", (json.dumps(about, indent=2) + "\n").encode())  # last: it is finished


@contextmanager
def others_go_on(name: str, failed: list[str]) -> Iterator[None]:
    """Note the error of one model, whatever it is."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        failed.append(f"{name}: {type(error).__name__}: {error}")


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        if not (value := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"got {text}, expected more than 0")
        return value

    return read


def main() -> None:
    how: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **how)
    add = parser.add_argument
    add("--data", default="sprites", help="sprites, pendulum, signals, moving_mnist, or a folder or .npz of clips")
    add("--models", nargs="+", help=f"FILE.py:FUNCTION, or of {', '.join(ENTRIES)}")
    add("--seeds", type=positive(int), default=3, help="how many: 0, 1, ...")
    add("--first-seed", type=int, default=0)
    add("--minutes", type=positive(float), help="of training on two cores; default: the models' own steps")
    add("--on", choices=["test", "validation"], default="test", help="the clips to measure on")
    add("--preset", default="cpu")
    add("--image-size", type=int, help="where clips are generated, or one's own (default: 64)")
    add("--num-clips", type=int, help="where clips are generated")
    add("--held-out", help="identities for validation, and as many for the test: a share, or how many")
    add("--judge-steps", type=int, default=500, help="of the judge's training (default: 500)")
    add("--threads", type=int, default=2)
    add("--out", type=Path, default=Path("runs/field"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    more = [
        f"--{name}={value}"
        for name, value in (
            ("image-size", options.image_size),
            ("num-clips", options.num_clips),
            ("held-out", options.held_out),
        )
        if value is not None
    ]
    names = options.models or ["speakers" if options.data == "signals" else MODELS[0], *MODELS[1:]]
    entries = {name: find_entry(name) for name in names}
    task = load(options.data, options.on, options.preset, more)
    if options.models is None and not task.one_length:
        entries = {name: entry for name, entry in entries.items() if name not in OF_ONE_LENGTH}
        print("left out, as clips have different lengths:", ", ".join(OF_ONE_LENGTH), flush=True)
    folder = options.out / Path(options.data).name / options.on
    recorded = ("data", "minutes", "preset", "image_size", "num_clips", "held_out", "judge_steps", "threads")
    print(f"training on {task.train}, measured on {task.held_out}", flush=True)
    for name, entry in entries.items():  # what cannot be built or measured is found before anything is trained
        try:
            check(entry(task, 0, PROBE), task)
        except (ValueError, TypeError) as error:
            sys.exit(f"{name}: {error}")
    same_settings(folder, {name: getattr(options, name) for name in recorded} | {"clips": digest(task)})
    check_judge(folder)
    failed, written, scales = [], [], {}
    for name, entry in entries.items():
        with others_go_on(f"{name}, its time", failed):
            scales[name] = scale_of(name, entry, task, options.minutes, folder)
    judge = find_judge(task, options.judge_steps, folder / "judge.pt")
    if judge is None:
        print("no judge: steps are no pictures, or clips have no labels; what it would see is left out", flush=True)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name, scale in scales.items():
            with others_go_on(f"{name}, seed {seed}", failed):
                run(name, entries[name], task, seed, scale, folder, judge)
                written = write_tables(folder, list(entries), f"The field on {options.data}, {options.on}")
    if written:
        print(written[0].read_text(), "wrote", *written, sep="\n  ")
    if failed:
        sys.exit("\n".join(["these did not end, and are not in the table:", *failed]))


if __name__ == "__main__":
    main()
