"""Training of any model and guide with Lightning (extra ``train``).

Everything random in a step, the batch as well as the noise, is a function of (seed, step, process); schedules are
functions of the step. A run that was interrupted therefore continues with exactly the losses of a run that was not.
"""

from __future__ import annotations

try:
    import lightning  # noqa: F401
except ImportError as error:
    raise ImportError("seqdisent.training needs Lightning; install it with: pip install 'seqdisent[train]'") from error

from seqdisent.datasets.batch import frames_and_mask
from seqdisent.training.checkpoints import CheckpointError, load_weights, save_weights
from seqdisent.training.fit import TERMINATED, TrainerOptions, fit
from seqdisent.training.module import ELBOTraining
from seqdisent.training.priors import Refit, refit_priors, start_priors
from seqdisent.training.runs import is_main_process, train_stages

__all__ = [
    "TERMINATED",
    "CheckpointError",
    "ELBOTraining",
    "Refit",
    "TrainerOptions",
    "fit",
    "frames_and_mask",
    "is_main_process",
    "load_weights",
    "refit_priors",
    "save_weights",
    "start_priors",
    "train_stages",
]
