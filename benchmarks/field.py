"""The field's models on one table: the same clips, the same judge, the same minutes, measured in the same way.

    python benchmarks/field.py --data sprites --seeds 3 --minutes 15
    python benchmarks/field.py --data signals --models speakers dsvae "all in f" --seeds 3 --minutes 3
    python benchmarks/field.py --data pendulum --models mine.py:mine dsvae       a model of one's own

Every model trains on the same clips for as many steps as take the minutes on two cores (of processor time: on one
thread twice as long), with its preset's schedules stretched to them. How long a step takes is measured first, once a
model. Clips to measure on were never seen: `--on test`, on which nothing was chosen, or `--on validation`.
All seeds of a model train on the same split.

A run is a folder, OUT/DATA/ON/MODEL/SEED. What is finished is not done again, what was stopped goes on. After every run
OUT/DATA/ON has the table of all that is finished: field.md, field.json and field.html, with each model's grid of swaps.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from field_models import ENTRIES, Contestant, Entry, Task, find_entry
from field_table import write_tables
from settings import settings_of

from seqdisent import _files
from seqdisent.evaluation import evaluate
from seqdisent.metrics import Judge
from seqdisent.training import save_weights, train_stages

MODELS = {
    "signals": ["speakers", "dsvae", "dsvae-grouped", "cdsvae", "s3vae", "all in f", "all in z"],
    None: ["vdsm", "dsvae", "dsvae-grouped", "cdsvae", "s3vae", "all in f", "all in z"],
}
OTHER_CLIPS = 1000  # added to the seed where the clips to test on are generated
PROBE = 0.01  # of a plan's steps, to measure how long they take


def load(data: str, on: str, preset: str, more: list[str]) -> Task:
    """Return the clips. What the presets were chosen on, the examples' own held-out clips of seed 0, is validation."""
    example = importlib.import_module("speakers" if data == "signals" else "vdsm").EXAMPLE
    settings = settings_of(example, ["--preset", preset, "--data", data, *more])
    train, validation, candidates = example.task.load(settings, download=False)
    if on == "validation" and data != "sprites":
        return Task(data, preset, train, validation, candidates)
    if data == "sprites":  # as many other characters; training has neither these nor those
        train, test = train.split(len(validation.identity.unique()), 1, by="identity")
        return Task(data, preset, train, validation if on == "validation" else test, candidates)
    settings.seed += OTHER_CLIPS
    _, test, candidates = example.task.load(settings, download=False)
    return Task(data, preset, train, test, candidates)


def stretch(entry: Entry, task: Task, minutes: float) -> float:
    """Return by what a model's steps are multiplied to take the minutes on two cores, from short trainings."""

    def seconds(scale: float) -> float:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            return train(entry(task, 0, scale), Path(folder))

    scale, less = PROBE, seconds(PROBE)
    while (more := seconds(2 * scale)) < 1.3 * less + 1:  # too short to tell what a step takes
        scale, less = 2 * scale, more
    of_all_steps = (more - less) / scale
    at_start = max(0.0, less - scale * of_all_steps)  # what does not grow with the steps
    if (left := 120 * minutes - at_start) <= 0:
        sys.exit(f"--minutes: got {minutes:g}, expected more: the start alone takes {at_start / 120:.2f}")
    return left / of_all_steps


def train(contestant: Contestant, folder: Path) -> float:
    """Train a model, or go on; return the seconds of the processor that this took."""
    start = time.process_time()
    quiet = {"progress_bar": False, "accelerator": "cpu"}
    train_stages(contestant.network, contestant.stages, folder, resume=True, **contestant.options, **quiet)
    return time.process_time() - start


def scale_of(name: str, entry: Entry, task: Task, minutes: float | None, folder: Path) -> float:
    """Return what was measured before, or measure it."""
    path = folder / "scales.json"
    asked = f"{task.preset}, " + ("its steps" if minutes is None else f"{minutes:g} minutes")

    def known() -> dict[str, dict[str, float]]:
        return json.loads(path.read_text()) if path.exists() else {}

    if name not in known().get(asked, {}):
        scale = 1.0 if minutes is None else stretch(entry, task, minutes)
        print(f"{name}: {scale:.3f} times the preset's steps", flush=True)
        scales = known()  # another process may have added to them
        scales.setdefault(asked, {})[name] = scale
        _files.write(path, json.dumps(scales, indent=2).encode())
    return known()[asked][name]


def run(name: str, entry: Entry, task: Task, seed: int, scale: float, folder: Path, judge_steps: int) -> None:
    """Train and measure one model with one seed."""
    run_folder = folder / name.replace(" ", "_").replace("/", "_") / str(seed)
    if (run_folder / "metrics.json").exists():
        return
    torch.manual_seed(seed)
    contestant = entry(task, seed, scale)
    seconds = 0.0
    if contestant.stages:
        recorded = run_folder / "scale.json"
        if recorded.exists() and json.loads(recorded.read_text()) != scale:
            sys.exit(f"--minutes: {run_folder} was started with others; choose another --out")
        _files.write(recorded, json.dumps(scale).encode())
        print(f"{name}, seed {seed}: training", flush=True)
        spent = run_folder / "seconds.json"
        seconds = json.loads(spent.read_text()) if spent.exists() else 0.0
        start = time.process_time()
        try:
            train(contestant, run_folder)
        finally:
            seconds += time.process_time() - start
            _files.write(spent, json.dumps(seconds).encode())
        save_weights(contestant.network, run_folder / "model.pt")
    print(f"{name}, seed {seed}: measuring", flush=True)
    judge = folder / "judge.pt"
    judging = None if len(task.frame_shape) != 3 else Judge.load(judge) if judge.exists() else judge_steps
    contestant.network.eval()
    found = evaluate(
        contestant.model, contestant.guide, task.train, task.held_out, static=contestant.static,
        motion=contestant.motion, emission="x", judge=judging,
        candidates=task.candidates, forecast_steps=0, seed=0,
    )  # fmt: skip
    if found.judge is not None and not judge.exists():
        found.judge.save(judge)
    about = {
        "model": name, "seed": seed, "scale": scale if contestant.stages else None,
        "minutes": seconds / 120 if contestant.stages else None,
        "parameters": sum(parameter.numel() for parameter in contestant.network.parameters()),
    }  # fmt: skip
    _files.write(run_folder / "about.json", (json.dumps(about, indent=2) + "\n").encode())
    found.save(run_folder, title=f"{name}, seed {seed}, on {task.data}")  # metrics.json says that the run is finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="sprites", help="sprites, pendulum, moving_mnist, signals, or a folder of clips"
    )
    parser.add_argument("--models", nargs="+", help=f"FILE.py:FUNCTION, or of {', '.join(ENTRIES)}")
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ...")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="of training on two cores; default: the preset's steps")
    parser.add_argument("--on", choices=["test", "validation"], default="test", help="the clips to measure on")
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--judge-steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("runs/field"))
    options, more = parser.parse_known_args()  # the rest, such as --image-size, is for the data
    names = options.models or MODELS.get(options.data, MODELS[None])
    entries = {name: find_entry(name) for name in names}
    task = load(options.data, options.on, options.preset, more)
    folder = options.out / Path(options.data).name / options.on
    print(f"training on {task.train}, measured on {task.held_out}", flush=True)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name, entry in entries.items():
            scale = scale_of(name, entry, task, options.minutes, folder)
            run(name, entry, task, seed, scale, folder, options.judge_steps)
            written = write_tables(folder, names, f"The field on {options.data}, {options.on}")
    print(written[0].read_text(), "wrote", *written, sep="\n  ")


if __name__ == "__main__":
    main()
