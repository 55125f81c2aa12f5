"""Training in stages: a folder a stage, each done once, whatever ends the run in between."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from seqdisent import _files
from seqdisent.training.checkpoints import load_weights, save_weights
from seqdisent.training.fit import fit
from seqdisent.training.module import ELBOTraining


def train_stages(
    network: nn.Module,
    stages: Mapping[str, Callable[[], ELBOTraining | None]],
    folder: str | Path,
    *,
    resume: bool = False,
    **options: Any,
) -> dict[str, ELBOTraining]:
    """Train a network in stages, one after the other, and leave it with the weights of the last.

    Every stage has a folder of its own with what :func:`~seqdisent.training.fit` writes, ``minutes.json`` and, when it
    is done, ``model.pt``, the weights of the whole network. A run that was killed goes on with `resume`: a stage that
    has its ``model.pt`` is not trained again, and the one after it goes on from its ``last.ckpt``.

    Args:
        network: what all stages train; each may freeze parts of it.
        stages: {name of the folder: a function that returns the stage's training, or None to skip it}. It is called
            when the stages before are done, and again in a run that goes on.
        folder: of the run.
        resume: go on with the run that `folder` holds.
        **options: those of :func:`~seqdisent.training.fit`, for all stages.

    Returns:
        {stage: its training}, without those that were skipped. Where an option such as ``max_time`` stops a stage
        before its end, that stage is the last.

    Raises:
        FileExistsError: the folder holds a stage of an earlier run and `resume` is False.
        CheckpointError: the weights of a finished stage, or a checkpoint, are damaged or another network's.
        ValueError: as :func:`~seqdisent.training.fit`.
        TypeError: a stage returns something else than :class:`ELBOTraining` or None, or as
            :func:`~seqdisent.training.fit`.
        FloatingPointError: as :func:`~seqdisent.training.fit`.
        OSError: as :func:`~seqdisent.training.fit`.
        KeyboardInterrupt: as :func:`~seqdisent.training.fit`.
        SystemExit: as :func:`~seqdisent.training.fit`.

    Example:
        >>> import tempfile
        >>> import pyro
        >>> import torch
        >>> import pyro.distributions as dist
        >>> from functools import partial
        >>> from seqdisent import AnnealingSchedule
        >>> from seqdisent.training import ELBOTraining
        >>> network = nn.Linear(1, 1)
        >>> def model(x):
        ...     with pyro.plate("sequences", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("sequences", len(x)):
        ...         pyro.sample("z", dist.Normal(network(x.unsqueeze(-1)).squeeze(-1), 0.7))
        >>> def stage(rate):
        ...     return ELBOTraining(
        ...         network, model, guide, lambda generator: torch.randn(8, generator=generator),
        ...         arguments=lambda batch: (batch,), num_steps=2, learning_rate=AnnealingSchedule.constant(rate),
        ...     )
        >>> stages = {"first": partial(stage, 0.1), "second": partial(stage, 0.01)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = train_stages(network, stages, folder, progress_bar=False, accelerator="cpu")
        ...     sorted(path.name for path in Path(folder).glob("*/model.pt"))
        ...     sorted(path.parent.name for path in Path(folder).glob("*/model.pt"))
        ['model.pt', 'model.pt']
        ['first', 'second']
    """
    left = [Path(folder) / name / file for name in stages for file in ("model.pt", "last.ckpt")]
    if not resume and (earlier := [path for path in left if path.exists()]):
        raise FileExistsError(f"folder: {earlier[0]} exists; resume that run, or choose another folder")
    trainings = {}
    for name, make in stages.items():
        training = make()
        if training is None:
            continue
        if not isinstance(training, ELBOTraining):
            raise TypeError(f"stages[{name!r}]: returned {type(training).__name__}, expected ELBOTraining or None")
        trainings[name] = training
        finished, minutes = (Path(folder) / name / file for file in ("model.pt", "minutes.json"))
        if not finished.exists():
            is_over = fit(training, finished.parent, resume=resume, **options)
            if not is_over:  # stopped by an option of the trainer: the stage goes on when the run does
                break
            if not is_main_process():
                continue
            _files.write(minutes, json.dumps(training.minutes).encode())
            save_weights(network, finished)  # last: a stage that has it is not trained again
        load_weights(network, finished)
        if minutes.exists():
            training.minutes = json.loads(minutes.read_bytes())
    return trainings


def is_main_process() -> bool:
    """Return whether this process is the one that writes files, also before training has started.

    Example:
        >>> is_main_process()
        True
    """
    # before `fit`, Lightning's rank does not know of another node where Lightning itself starts the processes
    return getattr(rank_zero_only, "rank", 0) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0
