"""What stays and what changes in a time series: one code for all of it, one for each window, learnt without labels.

    SEQDISENT_DATA=FOLDER python examples/time_series.py air_quality RUN --seed 0
    SEQDISENT_DATA=FOLDER python examples/time_series.py icu RUN --seed 0

The task, its splits and its scores are those of Tonekaboni et al. ("Decoupling local and global representations of time
series", AISTATS 2022): the month from the static code of four weeks of air quality, and, in intensive care, death from
the static code and the local codes of two days. Beside the model: one without a static code, networks that are
trained on the labels, and trees on plain summaries.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from parts import beside, mlp, standard_normal, warmed_up
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from seqdisent import IndependentSteps, NormalHead, StaticEncoder, batch_sizes, infer, mark_missing
from seqdisent.datasets import Scaler, Sequences
from seqdisent.datasets.batch import frames_and_mask
from seqdisent.training import ELBOTraining, fit, load_weights

CODE_DIM = 8  # of the static code and of a window's, as published


class GlobalLocal(nn.Module):
    """p(s) prod_t p(z_t) p(x_t | s, z_t), q(s | x) prod_t q(z_t | x_t, s); without a static code, windows alone."""

    def __init__(self, window: tuple[int, int], *, static_dim: int = CODE_DIM, hidden_dim: int = 128) -> None:
        super().__init__()
        self.window, self.static_dim, size = window, static_dim, window[0] * window[1]
        self.encoder = nn.Sequential(nn.Flatten(2), mlp(2 * size, hidden_dim, hidden_dim), nn.ELU())
        self.static = StaticEncoder(hidden_dim, static_dim) if static_dim else None
        self.local = NormalHead(hidden_dim + static_dim, CODE_DIM)
        self.decoder = mlp(static_dim + CODE_DIM, hidden_dim, hidden_dim, size)
        self.noise = nn.Parameter(torch.full(window, -0.5))  # its softplus is a standard deviation

    def model(self, x=None, mask=None, observed=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = batch_sizes(x, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", standard_normal(self.noise, self.static_dim)) if self.static else None
            steps = standard_normal(self.noise, num_sequences, num_steps, CODE_DIM)
            z = pyro.sample("z", IndependentSteps(steps, mask))
            loc = self.decoder(beside(z, s)).unflatten(-1, self.window)
            window = dist.Normal(loc, F.softplus(self.noise) + 0.05, validate_args=False).to_event(2)
            pyro.sample("x", IndependentSteps(window, mask, observed), obs=x)

    def guide(self, x, mask=None, observed=None):
        features = self.encoder(mark_missing(x, observed, mask, event_dims=2))
        with pyro.plate("sequences", len(x)):
            s = pyro.sample("s", self.static(features, mask)) if self.static else None
            pyro.sample("z", IndependentSteps(self.local(beside(features, s)), mask))


# Data


class Task(NamedTuple):
    """Series of windows (N, T, *window), what is to be told from their codes, and the rows for each use."""

    series: Sequences
    target: Tensor  # (N,)
    train: Tensor
    valid: Tensor
    test: Tensor
    epochs: int = 40  # of a predictor that is trained on the target


def scaled(series: Sequences, train: Tensor) -> Sequences:
    """Return series (N, T, hours, X) by the mean and deviation of each feature in the training series."""
    return series.scaled(Scaler.fit(series.subset(train), dims=[1]))


def air_quality(folder: Path, seed: int, develop: bool) -> Task:
    """Return 576 months of stations in windows of a day; the test is 2016, or 2015 to choose settings on."""
    arrays = np.load(folder / "air_quality" / "air_quality.npz")
    values, year = torch.from_numpy(arrays["values"]), torch.from_numpy(arrays["year"].astype(np.int64))
    rest = (year != 2016).nonzero().squeeze(1)
    test = (year == 2016).nonzero().squeeze(1)
    if develop:
        rest, test = ((year != 2016) & (year != 2015)).nonzero().squeeze(1), (year == 2015).nonzero().squeeze(1)
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    train, valid = rest.split([round(0.85 * len(rest)), len(rest) - round(0.85 * len(rest))])
    month = torch.from_numpy(arrays["month"].astype(np.int64)) - 1
    return Task(scaled(Sequences(values.unflatten(1, (-1, 24))), train), month, train, valid, test)


def icu(folder: Path, seed: int, develop: bool) -> Task:
    """Return the stays of the protocol in windows of four hours; the test is the first fifth, or the valid part."""
    arrays = np.load(folder / "icu" / "icu_a.npz")
    kept = arrays["in_protocol"]
    values = torch.from_numpy(arrays["values"][kept][:, :, arrays["protocol_features"].astype(int)])
    lengths, died = torch.from_numpy(arrays["lengths"][kept]).long(), torch.from_numpy(arrays["died"][kept]).long()
    first, count = len(values) // 5, len(values)
    rest = first + torch.randperm(count - first, generator=torch.Generator().manual_seed(seed))
    train, valid = rest.split([round(0.8 * len(rest)), len(rest) - round(0.8 * len(rest))])
    series = scaled(Sequences(values.unflatten(1, (-1, 4)), lengths=-(-lengths // 4)), train)
    series = series.map_values(lambda windows: windows.clamp(-5, 5))
    return Task(series, died, train, valid, valid if develop else torch.arange(first))


# Learning without labels


def learn(network: GlobalLocal, task: Task, run: Path, seed: int, num_steps: int) -> None:
    """Train on windows, and take the weights with the best bound on the validation series."""
    train = task.series.subset(task.train)
    terms = 64 * network.window[0] * network.window[1] * train.lengths.double().mean().item()
    training = ELBOTraining(
        network, network.model, network.guide, partial(train.draw_windows, 64), num_steps=num_steps,
        learning_rate=warmed_up(2e-3, 50, num_steps), terms_per_step=terms, seed=seed,
        validation=[task.series.batch(rows) for rows in task.valid.split(256)],
    )  # fmt: skip
    fit(training, run, clip_norm=5.0, validate_every=50, progress_bar=False, accelerator="cpu")
    load_weights(network, run / "best.ckpt")


@torch.no_grad()
def codes(network: GlobalLocal, series: Sequences) -> tuple[Tensor, Tensor]:
    """Return static codes (N, 8), or (N, 0) without them, and local ones (N, T, 8), 0 in padding: posterior means."""
    network.eval()
    static, local = [], []
    for rows in torch.arange(len(series)).split(256):
        batch = series.batch(rows)
        found = infer(network.guide, *frames_and_mask(batch)[:2], observed=batch.observed)
        local.append(found["z"].value * batch.mask.unsqueeze(-1))
        static.append(found["s"].value if "s" in found else local[-1].new_zeros(len(rows), 0))
    return torch.cat(static), torch.cat(local)


# Scores


def month_score(task: Task, static: Tensor, local: Tensor) -> dict[str, float]:
    """Return how often a linear classifier of the static code is right; without one, of the windows' mean code."""
    code = (static if static.shape[1] else local.mean(1)).numpy()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000, C=10.0))
    classifier.fit(code[task.train], task.target[task.train])
    return {"accuracy": classifier.score(code[task.test], task.target[task.test])}


class Predictor(nn.Module):
    """An LSTM over local codes, its last state beside the static code, a layer of 16: the published predictor."""

    def __init__(self, local_dim: int, static_dim: int, num_classes: int) -> None:
        super().__init__()
        self.network = nn.LSTM(local_dim, 32, batch_first=True)
        self.head = nn.Sequential(
            nn.Linear(32 + static_dim, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, num_classes)
        )

    def forward(self, static: Tensor, local: Tensor, lengths: Tensor) -> Tensor:
        last = self.network(local)[0][torch.arange(len(local)), lengths - 1]
        return self.head(torch.cat([last, static], -1))


def predicted(task: Task, static: Tensor, local: Tensor, num_classes: int) -> Tensor:
    """Return the class probabilities of the test series by a predictor trained on the training series."""
    predictor = Predictor(local.shape[-1], static.shape[-1], num_classes)
    optimizer = torch.optim.Adam(predictor.parameters(), 1e-3)
    for rows in (rows for _ in range(task.epochs) for rows in task.train[torch.randperm(len(task.train))].split(100)):
        logits = predictor(static[rows], local[rows], task.series.lengths[rows])
        optimizer.zero_grad()
        F.cross_entropy(logits, task.target[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return predictor.eval()(static[task.test], local[task.test], task.series.lengths[task.test]).softmax(-1)


def mortality_score(task: Task, static: Tensor, local: Tensor) -> dict[str, float]:
    return ranking(task, predicted(task, static, local, 2)[:, 1])


def ranking(task: Task, probability: Any) -> dict[str, float]:
    died = task.target[task.test]
    return {"AUPRC": average_precision_score(died, probability), "AUROC": roc_auc_score(died, probability)}


# What it is compared with


def raw_windows(task: Task) -> Tensor:
    """Return windows (N, T, W) with 0 in holes, and beside them what was observed."""
    observed = (
        torch.ones_like(task.series.values, dtype=torch.bool) if task.series.observed is None else task.series.observed
    )
    return mark_missing(task.series.values, observed, None, event_dims=2).flatten(2)


def summaries(task: Task) -> Any:
    """Return mean, deviation, least and largest of each feature of a series, and how often it was missing."""
    values, seen = task.series.values, task.series.observed & task.series.mask[:, :, None, None]
    known = np.ma.masked_array(values.flatten(1, 2), ~seen.flatten(1, 2))
    parts = [getattr(known, name)(axis=1).filled(np.nan) for name in ("mean", "std", "min", "max")]
    return np.concatenate([*parts, known.mask.mean(1)], 1)


def supervised_month(task: Task) -> dict[str, float]:
    raw = raw_windows(task)
    found = predicted(task, raw.new_zeros(len(raw), 0), raw, 12).argmax(-1)
    return {"accuracy": (found == task.target[task.test]).double().mean().item()}


def supervised_mortality(task: Task) -> dict[str, float]:
    raw = raw_windows(task)
    return mortality_score(task, raw.new_zeros(len(raw), 0), raw)


def forest_month(task: Task) -> dict[str, float]:
    features = np.nan_to_num(summaries(task))
    forest = RandomForestClassifier(300, random_state=0).fit(features[task.train], task.target[task.train])
    return {"accuracy": forest.score(features[task.test], task.target[task.test])}


def boosting_mortality(task: Task) -> dict[str, float]:
    features = summaries(task)
    boosting = HistGradientBoostingClassifier(learning_rate=0.05, max_iter=100, max_leaf_nodes=8, random_state=0)
    boosting.fit(features[task.train], task.target[task.train])
    return ranking(task, boosting.predict_proba(features[task.test])[:, 1])


class Setting(NamedTuple):
    load: Callable[[Path, int, bool], Task]
    num_steps: int
    score: Callable[[Task, Tensor, Tensor], dict[str, float]]
    compared: dict[str, Callable[[Task], dict[str, float]]]


SETTINGS = {
    "air_quality": Setting(
        air_quality, 500, month_score, {"supervised": supervised_month, "forest on summaries": forest_month}
    ),
    "icu": Setting(
        icu, 1000, mortality_score, {"supervised": supervised_mortality, "boosting on summaries": boosting_mortality}
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=SETTINGS)
    parser.add_argument("run", type=Path, help="a new folder for checkpoints, logs and metrics.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the split and of training")
    parser.add_argument("--num-steps", type=int, help="of training")
    parser.add_argument("--epochs", type=int, default=40, help="of the predictors that are trained on the target")
    parser.add_argument("--develop", action="store_true", help="score on other series, to choose settings")
    options = parser.parse_args()
    setting, folder = SETTINGS[options.data], Path(os.environ.get("SEQDISENT_DATA", "data"))
    found: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        task = setting.load(folder, seed, options.develop)._replace(epochs=options.epochs)
        for name, static_dim in {"static and local codes": CODE_DIM, "local codes alone": 0}.items():
            torch.manual_seed(seed)
            network = GlobalLocal(tuple(task.series.values.shape[2:]), static_dim=static_dim)
            learn(network, task, options.run / f"{seed}-{static_dim}", seed, options.num_steps or setting.num_steps)
            found.setdefault(name, []).append(setting.score(task, *codes(network, task.series)))
        for name, compared in setting.compared.items():
            torch.manual_seed(seed)
            found.setdefault(name, []).append(compared(task))
    for name, scores in found.items():
        for score in scores[0]:
            values = torch.tensor([each[score] for each in scores])
            spread = f" +- {values.std():.3f}" if len(values) > 1 else ""
            print(f"{name:24} {score:8} {values.mean():.3f}{spread}  {[round(value, 3) for value in values.tolist()]}")
    (options.run / "metrics.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
