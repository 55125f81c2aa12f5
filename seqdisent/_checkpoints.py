"""When the checkpoint of a run is written, how Ctrl-C or SIGTERM ends a run, and which checkpoints are refused."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

REMEDY = "put a whole copy in its place, or remove it to train from the start"


class CheckpointError(ValueError):
    """A checkpoint is damaged, is none, or is another network's; the message names the file and what can be done.

    A run that is resumed raises it before anything is trained or written.
    """


class Stopped(Exception):
    """Ctrl-C was pressed, and the checkpoint is written."""


class RunCheckpoint(Checkpoint):
    """Writes `path` every so many steps, after the last one, and after the one in which Ctrl-C or SIGTERM came."""

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self.stop = self.ended = False

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Write it if it is time, and stop if asked to, on every process after the same step."""
        stop = trainer.strategy.reduce_boolean_decision(self.stop, all=False)
        if (
            stop
            or trainer.global_step % self.every == 0
            or trainer.global_step == trainer.max_steps
            or trainer.should_stop
        ):
            trainer.save_checkpoint(self.path)
        if stop:
            raise Stopped

    def on_train_end(self, *_: Any) -> None:
        """Note that averaged weights have taken their place."""
        self.ended = True

    def on_fit_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Have them do so where a run is resumed after its last step: Lightning leaves that out."""
        if not self.ended:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):  # a progress bar has not begun
                    callback.on_train_end(trainer, module)

    def on_exception(self, trainer: lightning.Trainer, _: Any, exception: BaseException) -> None:
        """Write it if a SIGTERM ends the run: Lightning raises it between steps, but not on every process at once."""
        if isinstance(exception, SIGTERMException) and trainer.world_size == 1:
            trainer.save_checkpoint(self.path)


@contextlib.contextmanager
def stopped_by_ctrl_c(checkpoint: RunCheckpoint) -> Iterator[None]:
    """Let the first Ctrl-C ask for a stop after the step; the second one interrupts as ever.

    Nothing changes where a program has a handler of its own, or in another thread, where none can be set.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(*_: Any) -> None:
        checkpoint.stop = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves Ctrl-C ignored once it was interrupted


def write(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all.

    Raises:
        OSError: it could not be written; a checkpoint that was there before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut might leave the name without its content
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch hides the system's error
        if not isinstance(cause, OSError):
            raise
        kept = "the one before is whole" if path.exists() else "there was none before"
        raise OSError(cause.errno, f"the checkpoint was not written: {cause.strerror}; {kept}", str(path)) from error


def read(path: Path) -> dict[str, Any]:
    """Return a checkpoint of plain tensors and numbers.

    Raises:
        CheckpointError: it is damaged, holds other objects, or lacks the parts that training writes.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums and does not look at them
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} does not fit its checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint (it holds more than tensors, numbers and text: the state of a "
            f"callback, say; torch.serialization.add_safe_globals allows a class); {REMEDY}"
        ) from error
    except Exception as error:  # what is damaged fails in any of many ways
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({reason}); {REMEDY}") from error
    parts = ("state_dict", "optimizer_states", "global_step", "loops", "pytorch-lightning_version")
    missing = [name for name in parts if not isinstance(checkpoint, dict) or name not in checkpoint]
    if missing:
        raise CheckpointError(f"{path}: is no checkpoint of seqdisent.training, it lacks {missing}; {REMEDY}")
    return dict(checkpoint)


def check_is_of_this_network(path: str | Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless names and shapes are those of the network that is to go on."""
    differences = [f"lacks {name}" for name in wanted if name not in found]
    differences += [f"has {name}, which the network has not" for name in found if name not in wanted]
    differences += [
        f"has {name} of shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if differences:
        more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
        raise CheckpointError(f"{path}: is the checkpoint of another network: it {differences[0]}{more}; {REMEDY}")


def check_goes_on(path: str | Path, found: Mapping[str, Any], seed: int, num_steps: int) -> None:
    """Raise CheckpointError if the run that goes on has another seed, or fewer steps than were done."""
    if found.get("seed", seed) != seed:
        raise CheckpointError(f"{path}: was written with seed={found['seed']}, and goes on with seed={seed}; {REMEDY}")
    if found["global_step"] > num_steps:
        raise CheckpointError(
            f"{path}: has {found['global_step']} steps behind it, expected at most num_steps={num_steps}; {REMEDY}"
        )


def check_trains_the_same(path: str | Path, found: Iterable[str], wanted: Iterable[str]) -> None:
    """Raise CheckpointError unless the same parameters are trained: the optimiser has a state for each."""
    changed = sorted(set(found) ^ set(wanted))
    if changed:
        raise CheckpointError(
            f"{path}: was written where other parameters were trained, {changed[0]} in one case alone "
            f"({len(changed)} in all); {REMEDY}"
        )
