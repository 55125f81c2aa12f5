"""Holes, filled by draws: a static code and a linear-Gaussian chain whose posterior is exact, also with holes.

    SEQDISENT_DATA=FOLDER python examples/imputation.py RUN --data vowels
    SEQDISENT_DATA=FOLDER python examples/imputation.py RUN --data air_quality

About 15 % of the measured values are hidden: single values, blocks of 10 steps of one coordinate, or outages, 10 steps
of all coordinates. Beside the model: linear interpolation, and the smoother of a linear-Gaussian model.
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
from linear_gaussian import LinearGaussian
from parts import beside, mlp, standard_normal, warmed_up
from torch import Tensor, nn
from torch.nn import functional as F
from vowels import Parts, utterances

from seqdisent import (
    IndependentSteps,
    StaticEncoder,
    batch_sizes,
    impute,
    mark_missing,
    read_backward,
)
from seqdisent.chains import LinearEmission
from seqdisent.datasets import Scaler, Sequences
from seqdisent.metrics import CRPS, IntervalCoverage, linear_interpolation
from seqdisent.training import ELBOTraining, fit, load_weights

KINDS, SHARE, BLOCK = ("values", "blocks", "outages"), 0.15, 10


class Series(LinearGaussian):
    """A static code, a linear-Gaussian chain, and an emission that is a line of z plus networks of z and of the code.

    p(s) p(z | s) prod_t p(x_t | z_t, s), and q(s | x) q(z | s, x), of x that is seen. Of the line alone, the chain's
    posterior is exact. It is q(z | s, x), after a network has taken from x what the line does not say.
    """

    def __init__(self, step_dim: int, latent_dim: int = 16, static_dim: int = 8, hidden_dim: int = 64) -> None:
        super().__init__(step_dim, latent_dim)
        self.past = nn.GRU(2 * step_dim, hidden_dim, batch_first=True)
        self.future = nn.GRU(2 * step_dim, hidden_dim, batch_first=True)
        self.dropout = nn.Dropout(0.2)
        self.static = StaticEncoder(2 * hidden_dim, static_dim)
        self.first, self.level = nn.Linear(static_dim, latent_dim), nn.Linear(static_dim, step_dim)
        self.emission = mlp(latent_dim + static_dim, hidden_dim, 2 * step_dim)
        self.correction = mlp(2 * hidden_dim + 2 * step_dim + static_dim, hidden_dim, step_dim)
        for last in (self.emission[-1], self.correction[-1]):  # so training starts at a linear-Gaussian model
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def model(self, x=None, mask=None, observed=None, covariates=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = batch_sizes(x, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", standard_normal(self.offset, self.level.in_features))
            z = pyro.sample("z", self.chain(self.first(s), num_steps, mask))
            loc, scale = self.emission(beside(z, s)).chunk(2, -1)
            loc = loc + z @ self.reading.T + self.levels(s)
            scale = F.softplus(self.noises["x"] + scale) + 0.01
            step = dist.Normal(loc, scale, validate_args=False).to_event(1)
            pyro.sample("x", IndependentSteps(step, mask, observed), obs=x)

    def guide(self, x, mask=None, observed=None, covariates=None):
        read = mark_missing(x, observed, mask)
        both = self.dropout(torch.cat([self.past(read)[0], read_backward(self.future, read, mask)], -1))
        with pyro.plate("sequences", len(x)):
            s = pyro.sample("s", self.static(both, mask))
            offset = self.levels(s) + self.correction(beside(torch.cat([read, both], -1), s))
            emission = LinearEmission(self.reading, self.scale("x"), offset)
            pyro.sample("z", self.chain(self.first(s), x.shape[1], mask).posterior(x, emission, observed))

    def levels(self, s: Tensor) -> Tensor:
        """Return what a sequence's code adds to each of its steps, (*S, B, 1, X)."""
        return (self.offset + self.level(s)).unsqueeze(-2)


def air_quality(folder: Path, seed: int) -> Parts:
    """Return months of stations to learn from, and four days of each 16 to choose on and to score (2016)."""
    arrays = np.load(folder / "air_quality" / "air_quality.npz")
    months, year = Sequences(torch.from_numpy(arrays["values"])), torch.from_numpy(arrays["year"].astype(np.int64))
    rest = (year != 2016).nonzero().squeeze(1)
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    train, valid = (months.subset(rows) for rows in rest.tensor_split([round(0.85 * len(rest))]))
    scaler = Scaler.fit(train)
    test = months.subset(year == 2016)
    of_valid, of_test = (part.scaled(scaler).windows(96) for part in (valid, test))
    some = (of.subset(torch.arange(0, len(of), 4)) for of in (of_valid, of_test))  # each draw of s has a filter to run
    return Parts(train.scaled(scaler), *some)


# Holes


def hide(kind: str, seen: Tensor, generator: torch.Generator) -> Tensor:
    """Return which measured values (N, T, X) to hide; a sequence of which nothing would be left stays whole."""
    count, num_steps, size = seen.shape
    if kind == "values":
        hidden = torch.rand(seen.shape, generator=generator) < SHARE
    else:
        starts = torch.rand(count, num_steps + BLOCK - 1, size if kind == "blocks" else 1, generator=generator)
        hidden = (starts < 1 - (1 - SHARE) ** (1 / BLOCK)).unfold(1, BLOCK, 1).any(-1)
    hidden = hidden & seen
    return hidden & (seen & ~hidden).any(2).any(1)[:, None, None]


def measured(batch: Any) -> Tensor:
    return batch.mask.unsqueeze(-1).expand_as(batch.values) if batch.observed is None else batch.observed


def with_holes(batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Return what model and guide take of a batch, with holes of a random kind in each sequence."""
    seen = measured(batch)
    each = torch.stack([hide(kind, seen, generator) for kind in KINDS])
    hidden = each[torch.randint(len(KINDS), (len(seen),), generator=generator), torch.arange(len(seen))]
    return {"x": batch.values, "mask": batch.mask, "observed": seen & ~hidden}


# Learning and filling


class Setting(NamedTuple):
    load: Callable[[Path, int], Parts]
    batch_size: int
    num_steps: int  # of training
    window: int | None  # steps of a training sequence; None for all


SETTINGS = {
    "vowels": Setting(utterances, 60, 1000, None),
    "air_quality": Setting(air_quality, 32, 1000, 32),
}


NETWORKS = {"linear-Gaussian": partial(LinearGaussian, latent_dim=16), "static code and chain": Series}


def learn(network: Any, parts: Parts, setting: Setting, run: Path, seed: int, num_steps: int) -> None:
    """Train with holes, and take the weights with the best bound on the sequences to choose on."""
    train, valid, generator = parts.train, parts.valid, torch.Generator().manual_seed(seed)
    held_out = [with_holes(valid.batch(rows), generator) for rows in torch.arange(len(valid)).split(256)]

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        return with_holes(train.draw_windows(setting.batch_size, generator, num_steps=setting.window), generator)

    terms = draw(torch.Generator().manual_seed(seed))["observed"].sum().item()
    training = ELBOTraining(
        network, network.model, network.guide, draw, num_steps=num_steps, learning_rate=warmed_up(1e-2, 50, num_steps),
        arguments=lambda batch: batch, terms_per_step=terms, kl="monte-carlo", validation=held_out, seed=seed,
    )  # fmt: skip
    fit(training, run, clip_norm=5.0, validate_every=100, progress_bar=False, accelerator="cpu")
    load_weights(network, run / "best.ckpt")


@torch.no_grad()
def draws(network: Any, num_samples: int, x: Tensor, mask: Tensor, observed: Tensor) -> Tensor:
    """Return draws (S, N, T, X) of sequences, in which what was observed stays."""
    network.eval()
    return impute(network.model, network.guide, x, mask, observed=observed, num_samples=num_samples).values


def interpolated(x: Tensor, mask: Tensor, observed: Tensor) -> Tensor:
    """Return straight lines between what was observed, as two equal draws; 0, the mean, where nothing was."""
    return linear_interpolation(x, observed, mask).expand(2, *x.shape)


def score(fill: Callable[[Tensor, Tensor, Tensor], Tensor], data: Sequences, seed: int) -> dict[str, dict[str, float]]:
    """Return for each kind of hole how far the mean of the draws is off, and how good the draws are as forecasts."""
    found = {}
    for kind in KINDS:
        generator, crps, coverage = torch.Generator().manual_seed(seed), CRPS(), IntervalCoverage((0.9,))
        errors = []
        for rows in torch.arange(len(data)).split(64):
            batch = data.batch(rows)
            x, mask, seen = batch.values, batch.mask, measured(batch)
            hidden = hide(kind, seen, generator)
            filled = fill(x, mask, seen & ~hidden)
            errors.append((filled.mean(0) - x)[hidden].square())
            crps.update(filled, x, mask, hidden)
            coverage.update(filled, x, mask, hidden)
        inside = float(coverage.compute().coverage[0.9])
        found[kind] = {"MSE": float(torch.cat(errors).mean()), "CRPS": float(crps.compute()), "90 %": inside}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a new folder for checkpoints, logs and metrics.json")
    parser.add_argument("--data", choices=SETTINGS, default="vowels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the split, of training, of holes")
    parser.add_argument("--num-steps", type=int, help="of training")
    parser.add_argument("--num-samples", type=int, default=50)
    parser.add_argument("--develop", action="store_true", help="score the sequences to choose on")
    options = parser.parse_args()
    setting, found = SETTINGS[options.data], {}
    for seed in options.seeds:
        parts = setting.load(Path(os.environ.get("SEQDISENT_DATA", "data")), seed)
        data, size = parts.valid if options.develop else parts.test, parts.train.values.shape[-1]
        found.setdefault("interpolation", []).append(score(interpolated, data, seed))
        for name, make in NETWORKS.items():
            torch.manual_seed(seed)
            network = make(size)
            run = options.run / f"{seed}-{name.replace(' ', '-')}"
            learn(network, parts, setting, run, seed, options.num_steps or setting.num_steps)
            torch.manual_seed(seed)
            found.setdefault(name, []).append(score(partial(draws, network, options.num_samples), data, seed))
            (options.run / "metrics.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, each in found.items():
        for kind in KINDS:
            values = {measure: torch.tensor([row[kind][measure] for row in each]) for measure in each[0][kind]}
            means = (
                f"{measure} {value.mean():.3f}" + (f" +- {value.std():.3f}" if len(value) > 1 else "")
                for measure, value in values.items()
            )
            print(f"{name:24} {kind:8}", *means, sep="  ")


if __name__ == "__main__":
    main()
