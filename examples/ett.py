"""Forecasts with intervals: the hours of an electricity transformer, from two weeks the next day and the next four.

    SEQDISENT_DATA=FOLDER python examples/ett.py RUN --seed 0

A sequence is one of the seven columns in windows of a day, by the mean and deviation of the two weeks that are known.
One network serves all columns. Its static code holds the shape of these days, its chain what changes from day to day.
Beside it: the day before (with resampled changes for intervals), and a linear-Gaussian model of the same sequences.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from linear_gaussian import LinearGaussian
from parts import mlp, standard_normal, warmed_up
from torch import Tensor, nn
from torch.nn import functional as F

from seqdisent import (
    GatedTransition,
    IndependentSteps,
    MarkovChain,
    NormalHead,
    StaticEncoder,
    batch_sizes,
    forecast,
)
from seqdisent.datasets import Sequences
from seqdisent.metrics import CRPS, IntervalCoverage, seasonal_naive_draws
from seqdisent.plotting import plot_intervals
from seqdisent.training import ELBOTraining, fit, load_weights

DAY, KNOWN, HORIZONS = 24, 14, (24, 96)  # hours; days that are known; hours ahead
MONTH = 30 * DAY
PARTS = {"train": (0, 12 * MONTH), "valid": (12 * MONTH, 16 * MONTH), "test": (16 * MONTH, 20 * MONTH)}
COLUMNS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")


class Days(nn.Module):
    """p(s) p(z_1 | s, c) prod_t p(z_t | z_{t-1}, s, c) p(x_t | s, z_t, c) of days x_t, given covariates c."""

    def __init__(self, covariate_dim: int, static_dim: int = 8, latent_dim: int = 8, hidden_dim: int = 64) -> None:
        super().__init__()
        context_dim, self.static_dim = static_dim + hidden_dim, static_dim
        self.context = nn.Sequential(nn.Linear(covariate_dim, hidden_dim), nn.Tanh())
        self.encoder = nn.Sequential(mlp(DAY + hidden_dim, hidden_dim, hidden_dim), nn.ReLU(), nn.Dropout(0.1))
        self.static = StaticEncoder(hidden_dim, static_dim)
        self.past = nn.GRU(hidden_dim, hidden_dim, batch_first=True)
        self.local = NormalHead(2 * hidden_dim + static_dim, latent_dim)
        self.initial = NormalHead(context_dim, latent_dim)
        self.transition = GatedTransition(latent_dim, hidden_dim, context_dim=context_dim)
        self.decoder = nn.Sequential(
            mlp(context_dim + latent_dim, hidden_dim), nn.ReLU(), nn.Dropout(0.1), nn.Linear(hidden_dim, 2 * DAY)
        )

    def model(self, x=None, mask=None, observed=None, covariates=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = batch_sizes(x, num_sequences, num_steps)
        known = self.context(covariates)
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", standard_normal(known, self.static_dim))
            step = lambda z_prev, known: self.transition(z_prev, joined(s, known))  # noqa: E731
            chain = MarkovChain(self.initial(joined(s, known[:, 0])), step, num_steps, inputs=known, mask=mask)
            z = pyro.sample("z", chain)
            loc, scale = self.decoder(torch.cat([joined(s.unsqueeze(-2), known), z], -1)).chunk(2, -1)
            day = dist.Normal(loc, F.softplus(scale) + 0.05, validate_args=False).to_event(1)
            pyro.sample("x", IndependentSteps(day, mask, observed), obs=x)

    def guide(self, x, mask=None, observed=None, covariates=None):
        features = self.encoder(torch.cat([x, self.context(covariates)], -1))
        seen = torch.cat([features, self.past(features)[0]], -1)
        with pyro.plate("sequences", len(x)):
            s = pyro.sample("s", self.static(features, mask))
            pyro.sample("z", IndependentSteps(self.local(joined(s.unsqueeze(-2), seen)), mask))


def joined(one: Tensor, other: Tensor) -> Tensor:
    """Return two vectors side by side, whatever other dimensions either of them has."""
    shape = torch.broadcast_shapes(one.shape[:-1], other.shape[:-1])
    return torch.cat([one.expand(*shape, -1), other.expand(*shape, -1)], -1)


class Windows(NamedTuple):
    """Sequences (N, days, 24), and what undoes their normalisation: (N, 1, 1) each."""

    series: Sequences
    loc: Tensor
    scale: Tensor


def hours(folder: Path) -> Tensor:
    """Return the columns (hours, 7), by mean and deviation of the training months."""
    with (folder / "ett" / "ETTh1.csv").open() as file:
        values = torch.tensor([[float(value) for value in row[1:]] for row in list(csv.reader(file))[1:]])
    train = values[slice(*PARTS["train"])]
    return (values - train.mean(0)) / train.std(0)


def windows(values: Tensor, part: str, stride: int) -> Windows:
    """Return all columns from every `stride` hours; what is forecast lies within the part, what is known before."""
    start, end = PARTS[part]
    length, known = KNOWN * DAY + HORIZONS[-1], KNOWN * DAY
    starts = torch.arange(max(start - known, 0), end - length + 1, stride)
    cut = values[starts[:, None] + torch.arange(length)].transpose(1, 2).flatten(0, 1)  # (N, hours)
    loc, scale = cut[:, :known].mean(1), cut[:, :known].std(1) + 0.05
    days = ((cut - loc[:, None]) / scale[:, None]).unflatten(1, (-1, DAY))
    angle = 2 * math.pi / DAY * starts.repeat_interleave(len(COLUMNS))
    column = torch.arange(len(COLUMNS)).repeat(len(starts))
    covariates = torch.cat([angle.sin()[:, None], angle.cos()[:, None], F.one_hot(column, len(COLUMNS))], -1)
    series = Sequences(days, covariates=covariates[:, None].expand(-1, days.shape[1], -1).contiguous(), identity=column)
    return Windows(series, loc[:, None, None], scale[:, None, None])


def learn(network: Any, values: Tensor, run: Path, seed: int, num_steps: int, rate: float) -> None:
    """Train, and take the weights with the best bound on the validation months."""
    train, valid = windows(values, "train", 5).series, windows(values, "valid", 7 * DAY).series
    training = ELBOTraining(
        network, network.model, network.guide, partial(train.draw_windows, 224), num_steps=num_steps,
        learning_rate=warmed_up(rate, 50, num_steps), terms_per_step=224 * DAY * (KNOWN + HORIZONS[-1] // DAY),
        optimizer=partial(torch.optim.AdamW, weight_decay=0.01), kl="monte-carlo",
        validation=[valid.batch(range(len(valid)))], seed=seed,
    )  # fmt: skip
    fit(training, run, clip_norm=5.0, validate_every=100, progress_bar=False, accelerator="cpu")
    load_weights(network, run / "best.ckpt")


@torch.no_grad()
def futures(network: Any, given: Windows, num_samples: int) -> Tensor:
    """Return draws of the hours ahead, (S, N, hours, 1), in the unit of the standardised columns."""
    network.eval()
    days, covariates, ahead = given.series.values, given.series.covariates, HORIZONS[-1] // DAY
    x = forecast(
        network.model, network.guide, days[:, :KNOWN], None, None, covariates[:, :KNOWN], num_steps=ahead,
        num_samples=num_samples, future={"covariates": covariates[:, KNOWN:]},
    )["x"].sample()  # fmt: skip
    return x[:, :, KNOWN:].flatten(2).unsqueeze(-1) * given.scale + given.loc


def truth(given: Windows) -> Tensor:
    """Return all hours (N, T, 1), in the unit of the standardised columns."""
    return given.series.values.flatten(1).unsqueeze(-1) * given.scale + given.loc


def score(draws: Tensor, given: Windows) -> dict[str, dict[str, float]]:
    ahead, found = truth(given)[:, KNOWN * DAY :], {}
    for horizon in HORIZONS:
        crps, coverage = CRPS(), IntervalCoverage((0.5, 0.9))
        crps.update(draws[:, :, :horizon], ahead[:, :horizon])
        coverage.update(draws[:, :, :horizon], ahead[:, :horizon])
        error = (draws[:, :, :horizon].mean(0) - ahead[:, :horizon]).square().mean()
        inside = coverage.compute().coverage
        found[f"{horizon} hours"] = {"MSE": float(error), "CRPS": float(crps.compute())} | {
            f"{100 * level:.0f} %": float(share) for level, share in inside.items()
        }
    return found


def draw(draws: Tensor, given: Windows, path: Path) -> None:
    """Draw the forecast of three columns from the middle of the part, four known days before it."""
    first = len(draws[0]) // len(COLUMNS) // 2 * len(COLUMNS)
    rows = first + torch.tensor([0, 4, 6])
    shown = truth(given)[rows, -2 * HORIZONS[-1] :, 0]
    blank = draws.new_full((len(draws), len(rows), HORIZONS[-1]), torch.nan)
    names = [COLUMNS[row] for row in (rows - first).tolist()]
    plot_intervals(shown, torch.cat([blank, draws[:, rows, :, 0]], -1), path, names=names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a new folder for checkpoints, logs and metrics.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-steps", type=int, default=1500)
    parser.add_argument("--part", choices=["valid", "test"], default="test", help="what is forecast")
    parser.add_argument("--num-samples", type=int, default=100)
    parser.add_argument("--stride", type=int, default=DAY, help="hours from one forecast to the next")
    options = parser.parse_args()
    values = hours(Path(os.environ.get("SEQDISENT_DATA", "data")))
    given = windows(values, options.part, options.stride)
    generator = torch.Generator().manual_seed(options.seed)
    past = given.series.values[:, :KNOWN].flatten(1).unsqueeze(-1)
    naive = seasonal_naive_draws(past, HORIZONS[-1], DAY, options.num_samples, generator)
    found = {"the day before": score(naive * given.scale + given.loc, given)}
    for name, make, rate in (
        ("linear-Gaussian", lambda: LinearGaussian(DAY, 16), 1e-2),
        ("days with a static code", lambda: Days(given.series.covariates.shape[-1]), 2e-3),
    ):
        torch.manual_seed(options.seed)
        network = make()
        learn(network, values, options.run / name.replace(" ", "-"), options.seed, options.num_steps, rate)
        ahead = futures(network, given, options.num_samples)
        found[name] = score(ahead, given)
        draw(ahead, given, options.run / f"{name.replace(' ', '-')}.png")
    for name, scores in found.items():
        for horizon, row in scores.items():
            print(f"{name:24} {horizon:9}", *(f"{score} {value:.3f}" for score, value in row.items()), sep="  ")
    (options.run / "metrics.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
