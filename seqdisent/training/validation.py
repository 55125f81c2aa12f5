"""The bound on held-out batches while a run trains: the best checkpoint, and when to stop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from typing_extensions import override

from seqdisent._distributed import of_all_processes
from seqdisent._random import kept_random_state
from seqdisent.inference.objectives import OF_ALL_DRAWS
from seqdisent.training.checks import check_batch_mask
from seqdisent.training.logs import means, per_sequence, per_step

if TYPE_CHECKING:
    from seqdisent.training.module import ELBOTraining


class Validation(Callback):
    """Evaluates the bound on ``training.validation`` every so many steps and after the last one.

    Training does not see it: the noise has seeds of its own, the random state and the modes of the network's modules
    are put back. The weights are the averaged ones where a run has them.
    """

    def __init__(self, path: Path, every: int, patience: int | None, *, tells: bool = True) -> None:
        self.path, self.every, self.patience, self.tells = path, every, patience, tells
        self.best, self.since_best = -math.inf, 0

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the best bound, and how many validations there have been since."""
        return {"best": self.best, "since_best": self.since_best}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what :meth:`state_dict` returned."""
        self.best, self.since_best = state_dict["best"], state_dict["since_best"]

    @override
    def on_train_start(self, trainer: lightning.Trainer, training: ELBOTraining) -> None:  # type: ignore[override]
        """Train no further where the run had been stopped before."""
        self._stop_if_over(trainer, training)

    @override
    def on_train_batch_end(self, trainer: lightning.Trainer, training: ELBOTraining, *_: Any) -> None:  # type: ignore[override]
        """Evaluate if it is time, write the log, and the checkpoint if it is the best one."""
        step = trainer.global_step
        if step % self.every and step != trainer.max_steps and not trainer.should_stop:
            return
        found = {f"validation/{name}": value for name, value in evaluate(trainer, training).items()}
        if wrong := [f"{name} is {value}" for name, value in found.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"{wrong[0]} after {step} training steps, expected finite terms")
        bound = found[self._name(training)]
        training.log_dict({self._name(training): bound}, prog_bar=True, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(found, step)
            logger.save()
        if bound > self.best:
            self.best, self.since_best = bound, 0
            trainer.save_checkpoint(self.path)
        else:
            self.since_best += 1
        self._stop_if_over(trainer, training)

    @property
    def is_over(self) -> bool:
        """Whether there have been as many validations without a better bound as there may be."""
        return self.patience is not None and self.since_best >= self.patience

    @staticmethod
    def _name(training: ELBOTraining) -> str:
        """Return the bound that says which checkpoint is the best one: of what is trained."""
        objective = training.objective
        return f"validation/{OF_ALL_DRAWS.get(objective, 'elbo') if isinstance(objective, str) else 'elbo'}"

    def _stop_if_over(self, trainer: lightning.Trainer, training: ELBOTraining) -> None:
        if self.is_over:
            trainer.should_stop = True
            if self.tells:
                _tell(
                    f"{self.path.parent}: stopped at step {trainer.global_step}, {self.since_best} validations after "
                    f"the best one, whose weights are in {self.path.name} ({self._name(training)} {self.best:.4g})"
                )


@rank_zero_only
def _tell(what: str) -> None:
    print(what, flush=True)


@torch.no_grad()
def evaluate(trainer: lightning.Trainer, training: ELBOTraining) -> dict[str, float]:
    """Return the bound and its terms on all validation batches, per sequence and per real step."""
    totals: dict[str, tuple[float, float]] = {}
    precision = trainer.precision_plugin.val_step_context()
    with kept_random_state(), _averaged_weights(trainer, training), _evaluating(training.network), precision:
        torch.manual_seed(training.seed)  # a function or a loader may shuffle: the same way whenever it is asked
        batches = training.validation() if callable(training.validation) else training.validation
        for index, batch in enumerate(batches or ()):
            if index % trainer.world_size != trainer.global_rank:  # the processes share the batches
                continue
            check_batch_mask(batch)
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            terms = training._validation_terms(batch, index)
            _add(totals, {**per_sequence(terms), **per_step(terms)})
    shares, totals = of_all_processes(totals), {}
    for share in shares:
        _add(totals, share)
    if not totals:
        raise ValueError("validation: has no batch, expected one or more")
    return means(totals)


def _add(totals: dict[str, tuple[float, float]], more: dict[str, tuple[Any, Any]]) -> None:
    for name, (total, count) in more.items():
        before, counted = totals.get(name, (0.0, 0.0))
        totals[name] = before + float(total), counted + float(count)


@contextlib.contextmanager
def _averaged_weights(trainer: lightning.Trainer, training: ELBOTraining) -> Iterator[None]:
    averages = [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]  # type: ignore[attr-defined]
    for callback in averages:  # these hooks swap the averaged weights in, and out again
        callback.on_validation_epoch_start(trainer, training)
    try:
        yield
    finally:
        for callback in averages:
            callback.on_validation_epoch_end(trainer, training)


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
