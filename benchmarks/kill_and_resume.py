"""Kill runs of examples/vdsm.py again and again, resume them, and compare what they end with.

    python benchmarks/kill_and_resume.py --kills 200 --seed 0

A run has three stages. It is killed by SIGKILL up to four times, then resumed until it ends, and its weights after each
stage, its best checkpoints, every row of its logs and its metrics must be those of the run that was never killed, bit
for bit. Ctrl-C (SIGINT) counts as a kill, after which the exit code must be 130 and one line say how to go on, without
a traceback; so does SIGTERM, with the code 143, except outside training, where it ends a process at once. A kill waits
for one of these, drawn from the seed:

    any moment       a time, uniform over the length of the whole run
    in a write       a file that is being written beside its place
    between stages   the weights of a stage that has just ended
    after a write    a checkpoint that has just been moved to its place
    Ctrl-C, SIGTERM  up to a second after a stage's log was opened

The example is the real one; only its plan is smaller, every step is logged, every fourth is followed by a validation
with averaged weights, and no picture is drawn. Children are forked from a parent that has imported everything, since
most of the time would go into imports; with --fresh each is an interpreter of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import command_line
import numpy as np
import torch
import vdsm

from seqdisent.training import ELBOTraining, runs

STAGES = ("stage1", "stage2", "priors")
MOMENTS = ("any moment", "in a write", "between stages", "after a write", "Ctrl-C", "SIGTERM")
SIGNALS = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}  # the others are SIGKILL
KILLS_A_RUN = 4
SMALL = {
    "sizes": {
        "num_experts": 3, "pose_dim": 3, "dynamics_dim": 4, "feature_dim": 8, "encoder_channels": [4, 4],
        "decoder_channels": [8, 4], "rnn_dim": 8, "rnn_layers": 1, "transition_dim": 8, "combiner_dim": 8,
    },
    "pretraining_steps": 24, "sequence_steps": 18, "prior_steps": 12, "clip_length": 6, "num_groups": 2,
    "frames_per_group": 3, "num_clips": 2, "checkpoint_every": 5, "clip_norm": 100.0,
}  # fmt: skip


def fit_and_validate(fit: Callable[..., bool], training: ELBOTraining, folder: Path, **options: object) -> bool:
    """Call `fit` with a log row at every step, validation at every fourth, and averaged weights."""
    training.validation = [training.draw(torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return fit(training, folder, log_every=1, validate_every=4, averaging=0.9, progress_bar=False, **options)


def child(arguments: list[str]) -> None:
    """Be `python examples/vdsm.py ARGUMENTS` with the small plan."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without it
    runs.fit = partial(fit_and_validate, runs.fit)
    command_line._draw_trainings = lambda *_: []
    task = vdsm.VIDEOS._replace(measure=partial(vdsm.VIDEOS.measure, pictures=False))
    command_line.main(vdsm.EXAMPLE._replace(task=task), arguments)


def start_forked(arguments: list[str], log: Path) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with log.open("a") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            child(arguments)
        code = 0
    except SystemExit as leave:
        if not isinstance(leave.code, int):
            print(leave, flush=True)
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # without what the parent would do at its end


def start_fresh(arguments: list[str], log: Path) -> int:
    with log.open("a") as file:
        command = [sys.executable, __file__, "--child", *arguments]
        return subprocess.Popen(command, stdout=file, stderr=file).pid


def has_ended(process: int) -> int | None:
    """Return the exit code of a process, None while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def kill_when(process: int, due: Callable[[], bool], how: signal.Signals = signal.SIGKILL) -> int | None:
    """Kill the process as soon as `due`; return its exit code, or None if it ended before that."""
    while True:
        if due():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, how)
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if (code := has_ended(process)) is not None:
            if code:
                raise RuntimeError(f"a run ended by itself with exit code {code}")
            return None
        time.sleep(0.0005)


def moment_in(run: Path, whole: float, draw: random.Random, kinds: tuple[str, ...]) -> tuple[str, Callable[[], bool]]:
    """Draw when to kill: what the moment is called, and whether it has come."""
    stage = draw.choice(STAGES)
    kind = draw.choice(kinds)
    if kind in SIGNALS and where(run) != "after training":
        logs, wait = run / where(run).replace("before config.yaml", "stage1") / "logs", draw.uniform(0.0, 1.0)
        opened, at = len(list(logs.glob("*"))), [float("inf")]

        def logging() -> bool:
            if at[0] == float("inf") and len(list(logs.glob("*"))) > opened:
                at[0] = time.monotonic() + wait
            return time.monotonic() >= at[0]

        return kind, logging
    if kind in ("any moment", *SIGNALS):
        kind, until = "any moment", time.monotonic() + draw.uniform(0.0, whole)
        return kind, lambda: time.monotonic() >= until
    if kind == "between stages":
        there = (run / stage / "model.pt").exists()
        return kind, lambda: not there and (run / stage / "model.pt").exists()
    last, unfinished = run / stage / "last.ckpt", run / stage / "last.ckpt.unfinished"
    if kind == "in a write":
        before = _changed(unfinished)  # what an earlier kill has left is no write
        return kind, lambda: _changed(unfinished) not in (None, before)
    before, nth = _changed(last), [draw.randint(1, 4)]

    def written() -> bool:
        nonlocal before
        now = _changed(last)
        if now not in (None, before):
            before, nth[0] = now, nth[0] - 1
        return nth[0] == 0

    return kind, written


def _changed(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def where(run: Path) -> str:
    """Say how far a run got."""
    if not (run / "config.yaml").exists():
        return "before config.yaml"
    unfinished = next((name for name in STAGES if not (run / name / "model.pt").exists()), None)
    return "after training" if unfinished is None else unfinished


def outcome(run: Path) -> dict[str, object]:
    """Return all that a run ends with: weights, logged rows, metrics."""
    found: dict[str, object] = {}
    for stage in STAGES:
        found[f"{stage} weights"] = torch.load(run / stage / "model.pt", weights_only=True)
        best = torch.load(run / stage / "best.ckpt", weights_only=True)
        found[f"{stage} best"] = {name: best[name] for name in ("global_step", "state_dict", "callbacks")}
        rows: dict[tuple[int, str], dict[str, str]] = {}
        logs = sorted((run / stage / "logs").glob("*/metrics.csv"), key=lambda log: int(log.parent.name.split("_")[1]))
        for log in logs:
            with log.open(newline="") as file:
                for row in csv.DictReader(file):
                    kept = {
                        name: value for name, value in row.items() if value
                    }  # a log without validation lacks its columns
                    kind = "step" if row["loss"] else "validation"
                    if kept != rows.setdefault((int(row["step"]), kind), kept):
                        raise RuntimeError(f"{log}: step {row['step']} was done twice, and not alike")
        found[f"{stage} rows"] = rows
    found["weights"] = torch.load(run / "model.pt", weights_only=True)
    found["metrics"] = json.loads((run / "metrics.json").read_text())
    found["metrics"].pop("minutes")  # type: ignore[attr-defined]
    return found


def _check_was_told(moment: str, code: int, said: str) -> None:
    """Raise unless a run that was asked to stop said how to go on, in one line at its end."""
    number = SIGNALS[moment]
    if number == signal.SIGTERM and code == -number:  # it hit outside training
        return
    line = said.strip().splitlines()[-1]
    if code != 128 + number or "stopped; go on with --run-dir" not in line or "Traceback" in said:
        raise RuntimeError(f"{moment}: exit code {code}, and this was said: {said}")


def differences(found: dict[str, object], wanted: dict[str, object]) -> list[str]:
    return [name for name in wanted if not _equal(found[name], wanted[name])]


def _equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a == b


def kill_and_resume(
    kills: int, seed: int, folder: Path, start: Callable[[list[str], Path], int], kinds: tuple[str, ...] = MOMENTS
) -> dict[str, object]:
    """Kill runs until that many kills have hit, and count what came of it."""
    draw, log = random.Random(seed), folder / "log.txt"
    frames = np.random.default_rng(seed).integers(0, 256, (9, 6, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "clips.npz", frames=frames, lengths=[6, 4, 5] * 3, identity=np.arange(9) // 3)
    new = ["--data", str(folder / "clips.npz"), "--image-size", "16", "--preset", "tiny", "--accelerator", "cpu"]
    new += ["--config", json.dumps({"plan": SMALL})]

    def begin(run: Path) -> int:
        how = ["--resume"] if (run / "config.yaml").exists() else [*new, "--seed", str(seed)]
        return start([*how, "--run-dir", str(run)], log)

    began = time.monotonic()
    kill_when(begin(folder / "whole"), lambda: False)
    length = time.monotonic() - began
    wanted = outcome(folder / "whole")
    for stage, n in zip(STAGES, (24, 18, 12), strict=True):
        steps = [step for step, kind in wanted[f"{stage} rows"] if kind == "step"]  # type: ignore[attr-defined]
        assert steps == list(range(n))
    by_moment, by_place, in_a_write, too_late, alike, different = Counter(), Counter(), 0, 0, 0, []
    while sum(by_moment.values()) < kills:
        run = folder / f"run{alike + len(different)}"
        for _ in range(KILLS_A_RUN):
            if sum(by_moment.values()) == kills:
                break
            moment, due = moment_in(run, length, draw, kinds)
            told = log.stat().st_size
            code = kill_when(begin(run), due, SIGNALS.get(moment, signal.SIGKILL))
            if code is None or code == 0:  # it had ended, or ended before it heard the signal
                too_late += code == 0
                break
            if moment in SIGNALS:
                _check_was_told(moment, code, log.read_bytes()[told:].decode())
            by_moment[moment] += 1
            by_place[where(run)] += 1
            in_a_write += any(run.rglob("*.unfinished"))
        kill_when(begin(run), lambda: False)
        wrong = differences(outcome(run), wanted)
        if wrong:
            different.append({"run": run.name, "differs": wrong})
        else:
            alike += 1
            shutil.rmtree(run)
    return {
        "seed": seed, "kills": sum(by_moment.values()), "by moment": dict(by_moment), "by place": dict(by_place),
        "left a file half written": in_a_write, "signals that came too late": too_late,
        "runs": alike + len(different), "alike": alike, "different": different,
        "seconds of a whole run": round(length, 2),
    }  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", nargs="+", default=MOMENTS, choices=MOMENTS, help="when to kill")
    parser.add_argument("--fresh", action="store_true", help="start each process with an interpreter of its own")
    parser.add_argument("--folder", help="where the runs are kept (default: a temporary folder)")
    parser.add_argument("--out", help="write the counts to this JSON file")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(arguments.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        start = start_fresh if arguments.fresh else start_forked
        counts = kill_and_resume(arguments.kills, arguments.seed, folder, start, tuple(arguments.moments))
    print(json.dumps(counts, indent=2))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(counts, indent=2) + "\n")
    if counts["different"]:
        sys.exit("some runs ended with something else")


if __name__ == "__main__":
    main()
