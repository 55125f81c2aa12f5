"""Checkpoints of a run: when they are written, how they are read, which are refused; weights alone."""

from __future__ import annotations

import contextlib
import pickle
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from typing_extensions import override

from seqdisent._files import read_tensors, write_tensors

REMEDY = "put a whole copy in its place, or remove it to train from the start"
THE_SAME = "use the network and the settings that it was written with, or another folder"


class CheckpointError(ValueError):
    """A file is damaged, no checkpoint, or of another network or run; the message names it and the remedy.

    A resumed run raises it before anything is trained or written.
    """


class Stopped(Exception):
    """Ctrl-C was pressed, and the checkpoint was written."""


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
        """Note that the network has its averaged weights."""
        self.ended = True

    def on_fit_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Give the network its averaged weights where a run is resumed after its last step, as Lightning does not."""
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


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and reads only checkpoints of plain tensors and numbers."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write the checkpoint; where that fails (a full disk), the one before stays, and OSError names the file."""
        write_tensors(checkpoint, Path(path))

    @override
    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Return the checkpoint, of plain tensors and numbers alone; CheckpointError names a file that is none."""
        checkpoint = _read(Path(path))
        parts = ("state_dict", "optimizer_states", "global_step", "loops", "pytorch-lightning_version")
        missing = [name for name in parts if not isinstance(checkpoint, dict) or name not in checkpoint]
        if missing:
            raise CheckpointError(f"{path}: is no checkpoint of seqdisent.training, it lacks {missing}; {REMEDY}")
        return dict(checkpoint)


def save_weights(network: nn.Module, path: str | Path) -> None:
    """Write the weights and buffers of `network`, whole or not at all.

    Args:
        network: any module.
        path: the file; missing folders are made.

    Raises:
        OSError: it could not be written, on a full disk say; a file that was there before is whole.

    Example:
        >>> import tempfile
        >>> network, other = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(network, Path(folder) / "model.pt")
        ...     load_weights(other, Path(folder) / "model.pt")
        >>> bool((network.weight == other.weight).all())
        True
    """
    write_tensors(network.state_dict(), Path(path))


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Give `network` the weights and buffers of a file.

    Args:
        network: a module with the same parameters as the one that was saved.
        path: a checkpoint that :func:`fit` wrote (``best.ckpt`` or ``last.ckpt``; of averaged weights where the run
            had `averaging`), or what :func:`save_weights` wrote.

    Raises:
        CheckpointError: the file is damaged, holds no weights, or those of another network.
        ValueError: that class's base; no other ValueError is raised.
        FileNotFoundError: there is no such file.

    Example:
        See :func:`save_weights`.
    """
    content = _read(Path(path))
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise CheckpointError(f"{path}: holds no weights")
    if weights is not content:
        weights = {name.removeprefix("network."): tensor for name, tensor in weights.items()}
    check_is_of_this_network(path, weights, network.state_dict())
    network.load_state_dict(weights)


def _read(path: Path) -> Any:
    try:
        return read_tensors(path)
    except (FileNotFoundError, PermissionError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint (it holds more than tensors, numbers and text: the state of a "
            f"callback, say; torch.serialization.add_safe_globals allows a class); {REMEDY}"
        ) from error
    except Exception as error:  # a damaged file fails in any of many ways
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({reason}); {REMEDY}") from error


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
        raise CheckpointError(f"{path}: is the checkpoint of another network: it {differences[0]}{more}; {THE_SAME}")


def check_goes_on(path: str | Path, found: Mapping[str, Any], num_steps: int, **settings: Any) -> None:
    """Raise CheckpointError if the run that goes on has other settings, or fewer steps than were done."""
    for name, value in settings.items():
        if found.get(name, value) != value:
            was = f"was written with {name}={found[name]}"
            raise CheckpointError(f"{path}: {was}, and goes on with {name}={value}; {THE_SAME}")
    if found["global_step"] > num_steps:
        raise CheckpointError(
            f"{path}: has {found['global_step']} steps behind it, expected at most num_steps={num_steps}; {THE_SAME}"
        )


def check_trains_the_same(path: str | Path, found: Iterable[str], wanted: Iterable[str]) -> None:
    """Raise CheckpointError unless the same parameters are trained: the optimiser has a state for each."""
    changed = sorted(set(found) ^ set(wanted))
    if changed:
        raise CheckpointError(
            f"{path}: was written where other parameters were trained, {changed[0]} in one case alone "
            f"({len(changed)} in all); {THE_SAME}"
        )


def check_averages_the_same(path: str | Path, found: Mapping[str, Any], *, averages: bool) -> None:
    """Raise CheckpointError if a checkpoint with averaged weights goes on without: training would start at them."""
    if "averaging_state" in found and not averages:
        raise CheckpointError(f"{path}: was written with averaged weights, and goes on without averaging; {THE_SAME}")
