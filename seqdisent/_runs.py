"""Training in stages: a folder a stage, each done once, whatever ends the run in between."""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from seqdisent import _checkpoints
from seqdisent._checkpoints import CheckpointError
from seqdisent.training import ELBOTraining, fit


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
        {stage: its training}, without those that were skipped.

    Raises:
        FileExistsError: the folder of an unfinished stage holds a checkpoint and `resume` is False.
        CheckpointError: the weights of a finished stage, or a checkpoint, are damaged or another network's.

    Example:
        >>> import tempfile
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from functools import partial
        >>> from seqdisent import AnnealingSchedule
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
    trainings, started = {}, time.monotonic()
    for name, make in stages.items():
        training = make()
        if training is None:
            continue
        trainings[name] = training
        finished = Path(folder) / name / "model.pt"
        if not finished.exists():
            fit(training, finished.parent, resume=resume, **options)
            if not is_main_process():
                continue
            write_json((time.monotonic() - started) / 60, finished.with_name("minutes.json"))
            save_weights(network, finished)  # last: a stage that has it is not trained again
        load_weights(network, finished)
        started = time.monotonic()
    return trainings


def is_main_process() -> bool:
    """Return whether this process is the one that writes files, also before training has started.

    Example:
        >>> is_main_process()
        True
    """
    # before `fit`, Lightning's rank does not know of another node where Lightning itself starts the processes
    return getattr(rank_zero_only, "rank", 0) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0


def save_weights(network: nn.Module, path: str | Path) -> None:
    """Write the weights of a network, whole or not at all.

    Args:
        network: a module.
        path: where to write.

    Raises:
        OSError: the file could not be written; one that was there before is still there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(nn.Linear(2, 1), Path(folder) / "model.pt")
        ...     load_weights(nn.Linear(2, 1), Path(folder) / "model.pt")
    """
    _checkpoints.write(network.state_dict(), Path(path))


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Give a network the weights that :func:`save_weights` wrote.

    Args:
        network: the module, built as it was.
        path: the file.

    Raises:
        CheckpointError: the file is damaged, or holds the weights of another network.
        FileNotFoundError: there is no such file.

    Example:
        >>> load_weights(nn.Linear(2, 1), "no/such/model.pt")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: 'no/such/model.pt'
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums and does not look at them
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} does not fit its checksum")
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise
    except Exception as error:  # what is damaged fails in any of many ways
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: damaged, or the weights of another network ({reason}); put a whole copy in its place, or remove "
            "it and resume the run"
        ) from error


def write_json(content: Any, path: Path) -> None:
    """Write `content` beside its place and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(unfinished, path)
