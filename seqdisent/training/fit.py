"""Running a training: the Lightning trainer, its callbacks, its loggers, and how a run ends."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning
from lightning.pytorch.callbacks import Callback, ProgressBar, WeightAveraging
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim.swa_utils import get_ema_multi_avg_fn
from typing_extensions import TypedDict, Unpack

from seqdisent._checks import check_positive
from seqdisent.training import checkpoints, progress
from seqdisent.training.cuda_graphs import StepGraphs
from seqdisent.training.logs import WholeCSVLogger
from seqdisent.training.module import ELBOTraining
from seqdisent.training.validation import Validation

TERMINATED = 128 + 15  # the exit code of a process that SIGTERM ended


class TrainerOptions(TypedDict, total=False):
    """The options of Lightning's ``Trainer`` that :func:`fit` passes on."""

    accelerator: Any
    strategy: Any
    devices: Any
    num_nodes: int
    precision: Any
    gradient_clip_val: float | None
    gradient_clip_algorithm: str | None
    max_time: str | timedelta | dict[str, int] | None
    deterministic: bool | Literal["warn"] | None
    benchmark: bool | None
    detect_anomaly: bool
    sync_batchnorm: bool
    profiler: Any
    plugins: Any


# what fit decides, and which argument says it
_DECIDED = {
    "max_steps": "num_steps of ELBOTraining",
    "max_epochs": "num_steps of ELBOTraining",
    "logger": "loggers",
    "log_every_n_steps": "log_every",
    "enable_progress_bar": "progress_bar",
    "enable_checkpointing": "checkpoint_every",
    "default_root_dir": "folder",
    "val_check_interval": "validate_every",
    "accumulate_grad_batches": "terms_per_step and larger batches",
}


def fit(
    training: ELBOTraining,
    folder: str | Path,
    *,
    resume: bool = False,
    clip_norm: float | None = None,
    checkpoint_every: int = 500,
    log_every: int = 20,
    validate_every: int | None = None,
    patience: int | None = None,
    averaging: float | None = None,
    cuda_graph: bool = False,
    loggers: Iterable[Logger] | None = None,
    callbacks: Sequence[Callback] = (),
    progress_bar: bool = True,
    **trainer_options: Unpack[TrainerOptions],
) -> bool:
    """Train, with checkpoints and logs of the ledger in `folder`, and with validation if `training` has it.

    At its end the network has the weights of the last step, averaged ones with `averaging`. The best ones by
    validation: ``load_weights(network, folder / "best.ckpt")``.

    Args:
        training: what to train.
        folder: ``last.ckpt``, ``best.ckpt`` (with validation), ``logs/`` (CSV) and ``tensorboard/`` are written there.
        resume: continue from ``last.ckpt`` if it is there.
        clip_norm: the largest norm of a step's gradient; None for any.
        checkpoint_every: steps between checkpoints.
        log_every: steps between log lines.
        validate_every: steps between validations; there is one after the last step too. None for as many as
            `checkpoint_every`.
        patience: stop after this many validations in a row without a better bound, and say so; None for never. A run
            that was stopped so trains no further when it is resumed with the same patience.
        averaging: decay of an exponential moving average of the weights, 0.999 say, which validation uses, and which
            the network has at the end; None for none. It waits for the device once more a step.
        cuda_graph: record the forward and backward pass of a step once for each shape of batch, and replay it: on an
            NVIDIA GPU, where launching the small kernels of a walk through time takes longer than they run. Batches
            should have few shapes. Model and guide must do the same whatever the values of tensors, and may not read
            what changes in Python from step to step, but for their arguments: tensors and floats in them may change, of
            anything else each value is recorded anew. A recorded step is not validated by Pyro. Not with ``"stl"``,
            ``"dreg"`` and ``"fivo"``, nor in several processes.
        loggers: Lightning's; None for CSV files and TensorBoard.
        callbacks: further Lightning callbacks.
        progress_bar: show the ledger's terms, as a bar in a terminal, as a line every half minute elsewhere.
        **trainer_options: of Lightning's ``Trainer``: those that :class:`TrainerOptions` lists. `devices` is 1 unless
            given.

    Returns:
        Whether training is over: all steps are done, or `patience` ended it. False where something else stopped it
        before (``max_time``, a callback).

    Raises:
        FloatingPointError: a term of the ledger is not finite.
        FileExistsError: `folder` holds a checkpoint and `resume` is False.
        CheckpointError: (a ValueError) ``last.ckpt`` is damaged, no checkpoint, of another network, seed or
            `clip_norm`, has more steps behind it than `training` has, or has averaged weights, which `averaging` would
            have to go on with.
        ValueError: `checkpoint_every`, `log_every`, `validate_every` or `patience` below 1, the latter two without
            validation batches, an empty `validation`, an `averaging` outside (0, 1), two limits of the gradient, or
            `cuda_graph` without a CUDA device, with mixed precision, or with what it cannot record.
        RuntimeError: with `cuda_graph`, a step that cannot be recorded.
        TypeError: a trainer option that :func:`fit` decides by itself, or that is unknown.
        OSError: a checkpoint or a log could not be written, on a full disk say; the checkpoint before is whole.
        KeyboardInterrupt: Ctrl-C was pressed. The step at hand was finished and ``last.ckpt`` written, and a resumed
            run continues exactly there. Pressed again before that, training ends at once and the checkpoint is older.
        SystemExit: SIGTERM was received, as a cluster sends it before it takes a machine away; the code is 143. In a
            single process, the step at hand was finished and ``last.ckpt`` written; with several, it is older.

    Example:
        >>> import tempfile
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from seqdisent import AnnealingSchedule
        >>> network = torch.nn.Linear(1, 1)
        >>> def model(x):
        ...     with pyro.plate("sequences", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("sequences", len(x)):
        ...         pyro.sample("z", dist.Normal(network(x.unsqueeze(-1)).squeeze(-1), 0.7))
        >>> training = ELBOTraining(
        ...     network,
        ...     model,
        ...     guide,
        ...     draw=lambda generator: torch.randn(8, generator=generator),
        ...     arguments=lambda batch: (batch,),
        ...     num_steps=3,
        ...     learning_rate=AnnealingSchedule.constant(0.1),
        ...     weights={"z": AnnealingSchedule.linear(0.1, 1.0, 3)},
        ...     validation=[torch.zeros(8), torch.ones(4)],
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = fit(training, folder, progress_bar=False, accelerator="cpu")
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['best.ckpt', 'last.ckpt', 'logs', 'tensorboard']
    """
    folder = Path(folder)
    last = folder / "last.ckpt"
    if last.exists() and not resume:
        raise FileExistsError(f"folder: {last} exists; resume that run, or choose another folder")
    check_positive(checkpoint_every=checkpoint_every, log_every=log_every)
    _check_validation(training, validate_every=validate_every, patience=patience)
    options = _trainer_options(trainer_options, clip_norm)
    saving = checkpoints.RunCheckpoint(last, checkpoint_every)
    # in this order: the average has the step before validation looks at it, and last.ckpt holds all that came of it
    chosen: list[Callback] = [*_averaging(averaging), *callbacks]
    if training.validation is not None:
        chosen.append(
            Validation(folder / "best.ckpt", validate_every or checkpoint_every, patience, tells=progress_bar)
        )
    if progress_bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        chosen.append(progress.of_this_output(max(1, log_every // 2)))
    if loggers is None:
        loggers = [WholeCSVLogger(folder, "logs"), TensorBoardLogger(folder, "tensorboard")]
    with _quiet(), checkpoints.stopped_by_ctrl_c(saving):
        trainer = lightning.Trainer(
            max_steps=training.num_steps,
            default_root_dir=folder,
            logger=list(loggers),
            callbacks=[*chosen, saving],
            log_every_n_steps=min(log_every, training.num_steps),
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in chosen),
            enable_model_summary=False,
            use_distributed_sampler=False,
            **options,
        )
        if cuda_graph:
            _check_recordable(training, trainer)
        training.graphs = StepGraphs(training.network) if cuda_graph else None
        try:
            trainer.fit(training, ckpt_path=str(last) if last.exists() else None)
        except checkpoints.Stopped:
            pass
        except SIGTERMException:
            raise SystemExit(TERMINATED) from None
        except SystemExit as error:
            if not isinstance(error.__context__, KeyboardInterrupt):  # what Lightning makes of a second Ctrl-C
                raise
        finally:
            training.graphs = None  # and free their memory
    if saving.stop or trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.received_sigterm:  # after the last step
        raise SystemExit(TERMINATED)
    ended_early = any(isinstance(callback, Validation) and callback.is_over for callback in chosen)
    return bool(trainer.global_step >= training.num_steps or ended_early)


def _check_validation(training: ELBOTraining, **counts: int | None) -> None:
    given = {name: count for name, count in counts.items() if count is not None}
    check_positive(**given)
    if given and training.validation is None:
        raise ValueError(
            f"{next(iter(given))}: training has no batches to validate on, expected ELBOTraining(validation=...)"
        )


def _check_recordable(training: ELBOTraining, trainer: lightning.Trainer) -> None:
    if (device := trainer.strategy.root_device).type != "cuda":
        raise ValueError(f"cuda_graph: training is on {device}, expected a CUDA device")
    if trainer.world_size > 1:
        raise ValueError(f"cuda_graph: training has {trainer.world_size} processes, expected 1")
    if training.objective in ("stl", "dreg", "fivo"):  # they look at the random state, or at what they drew
        raise ValueError(f"cuda_graph: a step with objective={training.objective!r} cannot be recorded")


def _averaging(decay: float | None) -> list[Callback]:
    if decay is None:
        return []
    if not 0 < decay < 1:
        raise ValueError(f"averaging: got {decay!r}, expected a decay in (0, 1)")
    return [WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(decay))]


def _trainer_options(given: Mapping[str, Any], clip_norm: float | None) -> dict[str, Any]:
    """Return what the trainer gets of the caller, or say which option it may not get."""
    for name in given:
        if name in _DECIDED:
            raise TypeError(f"{name}: fit decides it; expected {_DECIDED[name]} to say it")
        if name not in TrainerOptions.__annotations__:
            raise TypeError(f"{name}: is no option of fit, expected one of {sorted(TrainerOptions.__annotations__)}")
    options = {"devices": 1, **given}
    if clip_norm is not None:
        if options.get("gradient_clip_val") is not None:
            raise ValueError("clip_norm: gradient_clip_val is given too, expected one of them")
        options["gradient_clip_val"] = clip_norm
    plugins = options.get("plugins") or []
    plugins = list(plugins) if isinstance(plugins, Sequence) else [plugins]
    if any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        raise TypeError("plugins: fit decides how checkpoints are written, expected no CheckpointIO")
    options["plugins"] = [*plugins, checkpoints.AtomicCheckpointIO()]
    return options


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning says of every run; its warnings about anything else stay."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        logger.setLevel(level)


# what Lightning says of every run that draws its batches in the main process and validates by itself
_EXPECTED = (
    ".*does not have many workers.*",
    ".*`IterableDataset` has `__len__` defined.*",
    ".*Starting from v1.9.0.*",
    ".*treespec.*",
    ".*You have overridden.*",
    ".*exists and is not empty.*",
    ".*your dataloader is not resumable.*",  # it is: batches are functions of the step
)
