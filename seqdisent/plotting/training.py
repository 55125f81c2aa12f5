"""Schedules and ledgers against the training step."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from seqdisent.plotting._figures import make_axes, save_figure


def plot_schedules(schedules: Mapping[str, Callable[[float], float]], num_steps: int, path: str | Path) -> Path:
    """Plot schedules against the training step, one panel each (paper, Figures 9 and 10), and return the path.

    Args:
        schedules: {title: a schedule, or any function of the step}.
        num_steps: number of training steps.
        path: the file to write; its suffix selects the format.

    Raises:
        ImportError: matplotlib is missing.

    Example:
        >>> import tempfile
        >>> from seqdisent import AnnealingSchedule
        >>> schedules = {"weight of z": AnnealingSchedule.cosine(30.0, 1.0, 500)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_schedules(schedules, 1000, Path(folder) / "schedules.png").name
        'schedules.png'
    """
    steps = torch.linspace(0, num_steps, 200).tolist()
    figure, axes = make_axes(len(schedules), width=3.2)
    for axis, (name, schedule) in zip(axes, schedules.items(), strict=True):
        axis.plot(steps, [schedule(step) for step in steps])
        axis.set(title=name, xlabel="step")
    return save_figure(figure, path)


def plot_ledger(logs: Sequence[str | Path], path: str | Path) -> Path:
    """Plot every term of the ledger against the training step, from the CSV files of one run, and return the path.

    Args:
        logs: ``metrics.csv`` of each part of the run, oldest first. If two parts log the same step, the later is used.
        path: the file to write; its suffix selects the format.

    Raises:
        ValueError: no log contains a term.
        ImportError: matplotlib is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = Path(folder) / "metrics.csv"
        ...     with log.open("w", newline="") as file:
        ...         csv.writer(file).writerows([("step", "KL(z)"), (0, 9.0), (20, 4.0)])
        ...     plot_ledger([log], Path(folder) / "ledger.png").name
        'ledger.png'
    """
    terms: dict[str, dict[int, float]] = {}
    for log in logs:
        with Path(log).open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get("step") is None:  # an incomplete last row, written when the disk was full
                    continue
                for name, value in row.items():
                    if value and (name.startswith(("KL(", "log_p(")) or name == "elbo"):
                        terms.setdefault(name, {})[int(row["step"])] = float(value)
    if not terms:
        raise ValueError(f"logs: {[str(log) for log in logs]} hold no term of a ledger")
    figure, axes = make_axes(len(terms), width=3.6)
    for axis, (name, values) in zip(axes, sorted(terms.items()), strict=True):
        steps = sorted(values)
        axis.plot(steps, [values[step] for step in steps], linewidth=0.8)
        axis.set(title=name, xlabel="step", ylabel="nats a sequence")
        if name.startswith("KL(") and max(values.values()) > 5 * min(values.values()):
            axis.set_yscale("symlog", linthresh=1.0, subs=(2, 5))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
    return save_figure(figure, path)
