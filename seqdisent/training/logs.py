"""The ledger as numbers for a log, and a CSV log that is whole at any moment."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from typing_extensions import override

from seqdisent import _files
from seqdisent.inference import ELBOTerms
from seqdisent.inference.objectives import OF_ALL_DRAWS

Sums = dict[str, tuple[Any, Any]]  # {name: a sum, and of how many}


def per_sequence(terms: ELBOTerms) -> Sums:
    """Return the bound and every term, in nats, summed over sequences; and the bound that is trained."""
    count = terms.num_sequences
    found = {"elbo": terms.elbo()}
    if name := OF_ALL_DRAWS.get(terms.objective):
        found[name] = terms.importance_weighted() if terms.log_evidence is None else terms.log_evidence
    found |= {f"log_p({site})": term for site, term in terms.log_likelihood.items()}
    found |= {f"KL({site})": term for site, term in terms.kl.items()}
    found |= {f"auxiliary_loss({name})": loss for name, loss in terms.auxiliary_losses.items()}
    # the mean, since a term outside the sequences' plate is one number
    return {name: (term.detach().mean() * count, count) for name, term in found.items()}


def per_step(terms: ELBOTerms) -> Sums:
    """Return the terms that have steps, in nats, summed over real steps."""
    found = {f"per_step/log_p({site})": (site, term) for site, term in terms.log_likelihood_per_step.items()}
    found |= {f"per_step/KL({site})": (site, term) for site, term in terms.kl_per_step.items()}
    return {name: (term.detach().sum(), terms.real_steps[site].sum()) for name, (site, term) in found.items()}


def means(sums: Sums) -> dict[str, Any]:
    """Return each sum divided by its count."""
    return {name: total / count for name, (total, count) in sums.items()}


class WholeCSVLogger(CSVLogger):
    """Lightning's CSV log, but a new column (the first validation's) never leaves half a file."""

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """Return what writes the rows."""
        if not isinstance(self._experiment, _WholeWriter):
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _WholeWriter(self.log_dir)
        return self._experiment


class _WholeWriter(ExperimentWriter):
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            rows: list[Mapping[str, Any]] = list(csv.DictReader(file))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        _files.write(path, text.getvalue().encode())
