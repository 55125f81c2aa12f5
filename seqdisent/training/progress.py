"""How far a run is: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from typing_extensions import override

SECONDS_BETWEEN_LINES = 30.0


class RunProgressBar(TQDMProgressBar):
    """Lightning's bar over the whole run: a resumed run goes on at its step."""

    @override
    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Start at the steps that are done."""
        super().on_train_start()
        bar = self.train_progress_bar
        bar.total, bar.initial, bar.n = trainer.max_steps, trainer.global_step, trainer.global_step
        bar.refresh()

    @override
    def on_train_epoch_start(self, *_: Any) -> None:
        """Leave the bar as it is: a run is one epoch, and a resumed one does not start it again."""

    @override
    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Redraw the bar."""
        super().on_train_batch_end(trainer, module, outputs, batch, trainer.global_step - 1)


class ProgressLines(Callback):
    """Prints a line with the step, the speed and the ledger now and then, and at the end."""

    @override
    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Start the clock."""
        self._began = self._printed = time.monotonic()
        self._first = trainer.global_step

    @override
    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Print a line if it is time."""
        now = time.monotonic()
        if now - self._printed >= SECONDS_BETWEEN_LINES:
            self._print(trainer, now)

    @override
    def on_train_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Print the last line."""
        if trainer.global_step > self._first:
            self._print(trainer, time.monotonic())

    def _print(self, trainer: lightning.Trainer, now: float) -> None:
        self._printed = now
        speed = (trainer.global_step - self._first) / max(now - self._began, 1e-9)
        shown = ", ".join(f"{name} {float(value):.4g}" for name, value in trainer.progress_bar_metrics.items())
        if trainer.is_global_zero:
            print(f"step {trainer.global_step} of {trainer.max_steps}, {speed:.3g} a second: {shown}", flush=True)


def of_this_output(refresh_rate: int) -> Callback:
    """Return a bar, redrawn every so many steps, where the output is a terminal, else lines."""
    return RunProgressBar(refresh_rate) if sys.stdout.isatty() else ProgressLines()
