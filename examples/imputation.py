"""Holes, filled by draws: a model with a static code and a chain, whose guide learns to read sequences with holes.

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
    AnnealingSchedule,
    GatedTransition,
    IndependentSteps,
    MarkovChain,
    NormalHead,
    StaticEncoder,
    batch_sizes,
    impute,
    mark_missing,
    read_backward,
)
from seqdisent.datasets import Scaler, Sequences
from seqdisent.metrics import CRPS, IntervalCoverage, linear_interpolation
from seqdisent.training import ELBOTraining, fit, load_weights

KINDS, SHARE, BLOCK = ("values", "blocks", "outages"), 0.15, 10


class Series(nn.Module):
    """p(s) p(z_1 | s) prod_t p(z_t | z_{t-1}, s) p(x_t | s, z_t); q(s | x) prod_t q(z_t | s, x), of x that is seen."""

    def __init__(self, step_dim: int, static_dim: int = 8, latent_dim: int = 16, hidden_dim: int = 64) -> None:
        super().__init__()
        self.static_dim = static_dim
        self.past = nn.GRU(2 * step_dim, hidden_dim, batch_first=True)
        self.future = nn.GRU(2 * step_dim, hidden_dim, batch_first=True)
        self.static = StaticEncoder(2 * hidden_dim, static_dim)
        # straight from the values to z and from z to the values: what is seen is then learnt in few steps
        self.local = NormalHead(2 * hidden_dim + 2 * step_dim + static_dim, latent_dim, initial_scale=0.1)
        self.linear = nn.Linear(latent_dim + static_dim, step_dim)
        self.decoder = mlp(latent_dim + static_dim, hidden_dim, hidden_dim, 2 * step_dim)
        self.initial = NormalHead(static_dim, latent_dim)
        self.transition = GatedTransition(latent_dim, hidden_dim, context_dim=static_dim)

    def model(
        self, x=None, mask=None, observed=None, covariates=None, hidden=None, *, num_sequences=None, num_steps=None
    ):
        num_sequences, num_steps = batch_sizes(x, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", standard_normal(self.initial.loc.weight, self.static_dim))
            step = lambda z_prev: self.transition(z_prev, s)  # noqa: E731
            z = pyro.sample("z", MarkovChain(self.initial(s), step, num_steps, mask=mask))
            latents = beside(z, s)
            loc, scale = self.decoder(latents).chunk(2, -1)
            step = dist.Normal(self.linear(latents) + loc, F.softplus(scale) + 0.02, validate_args=False).to_event(1)
            pyro.sample("x", IndependentSteps(step, mask, observed), obs=x)

    def guide(self, x, mask=None, observed=None, covariates=None, hidden=None):
        seen = observed if hidden is None else observed & ~hidden
        read = mark_missing(x, seen, mask)
        both = torch.cat([self.past(read)[0], read_backward(self.future, read, mask)], -1)
        with pyro.plate("sequences", len(x)):
            s = pyro.sample("s", self.static(both, mask))
            pyro.sample("z", IndependentSteps(self.local(beside(torch.cat([read, both], -1), s)), mask))


def air_quality(folder: Path, seed: int) -> Parts:
    """Return months of stations to learn from, and windows of four days to choose on and to score (2016)."""
    arrays = np.load(folder / "air_quality" / "air_quality.npz")
    months, year = Sequences(torch.from_numpy(arrays["values"])), torch.from_numpy(arrays["year"].astype(np.int64))
    rest = (year != 2016).nonzero().squeeze(1)
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    train, valid = (months.subset(rows) for rows in rest.tensor_split([round(0.85 * len(rest))]))
    scaler = Scaler.fit(train)
    test = months.subset(year == 2016)
    return Parts(train.scaled(scaler), valid.scaled(scaler).windows(96), test.scaled(scaler).windows(96))


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


def given(batch: Any, generator: torch.Generator, kind: str | None = None) -> dict[str, Tensor]:
    """Return what model and guide take of a batch, with holes of a kind, or of a random one in each sequence."""
    seen = batch.mask.unsqueeze(-1).expand_as(batch.values) if batch.observed is None else batch.observed
    if kind is None:
        each = torch.stack([hide(kind, seen, generator) for kind in KINDS])
        hidden = each[torch.randint(len(KINDS), (len(seen),), generator=generator), torch.arange(len(seen))]
    else:
        hidden = hide(kind, seen, generator)
    return {"x": batch.values, "mask": batch.mask, "observed": seen, "hidden": hidden}


# Learning and filling


class Setting(NamedTuple):
    load: Callable[[Path, int], Parts]
    batch_size: int
    num_steps: tuple[int, int]  # of training, the linear-Gaussian model's and the other's
    windows: tuple[int | None, int | None]  # steps of a training sequence, likewise; None for all


SETTINGS = {
    "vowels": Setting(utterances, 60, (500, 3000), (None, None)),
    "air_quality": Setting(air_quality, 32, (400, 400), (32, 96)),
}


NETWORKS = {"linear-Gaussian": partial(LinearGaussian, latent_dim=16), "static code and chain": Series}


def learn(network: Any, parts: Parts, setting: Setting, run: Path, seed: int, num_steps: int) -> None:
    """Train, and take the weights with the best bound on the sequences to choose on."""
    train, valid, generator = parts.train, parts.valid, torch.Generator().manual_seed(seed)
    exact = isinstance(network, LinearGaussian)  # its guide is the posterior, and has no need to learn from holes
    kinds, parts_of_valid = KINDS[:1] if exact else KINDS, torch.arange(len(valid)).split(256)
    held_out = [given(valid.batch(rows), generator, kind) for kind in kinds for rows in parts_of_valid]
    window = setting.windows[0 if exact else 1]
    terms = int(held_out[0]["observed"].sum()) / len(held_out[0]["x"])

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        return given(train.draw_windows(setting.batch_size, generator, num_steps=window), generator)

    annealed = {} if exact else {site: AnnealingSchedule.linear(0.05, 1.0, max(1, num_steps // 3)) for site in "sz"}
    training = ELBOTraining(
        network, network.model, network.guide, draw, num_steps=num_steps, learning_rate=warmed_up(1e-2, 50, num_steps),
        arguments=lambda batch: {name: batch[name] for name in batch if name != "hidden" or not exact},
        terms_per_step=setting.batch_size * terms, kl="monte-carlo" if exact else "analytic", weights=annealed,
        validation=held_out, seed=seed,
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
            x, mask, observed, hidden = given(data.batch(rows), generator, kind).values()
            filled = fill(x, mask, observed & ~hidden)
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
    parser.add_argument("--num-samples", type=int, default=100)
    parser.add_argument("--develop", action="store_true", help="score the sequences to choose on")
    options = parser.parse_args()
    setting, found = SETTINGS[options.data], {}
    for seed in options.seeds:
        parts = setting.load(Path(os.environ.get("SEQDISENT_DATA", "data")), seed)
        data, size = parts.valid if options.develop else parts.test, parts.train.values.shape[-1]
        found.setdefault("interpolation", []).append(score(interpolated, data, seed))
        for (name, make), num_steps in zip(NETWORKS.items(), setting.num_steps, strict=True):
            torch.manual_seed(seed)
            network = make(size)
            run = options.run / f"{seed}-{name.replace(' ', '-')}"
            learn(network, parts, setting, run, seed, options.num_steps or num_steps)
            torch.manual_seed(seed)
            found.setdefault(name, []).append(score(partial(draws, network, options.num_samples), data, seed))
    for name, each in found.items():
        for kind in KINDS:
            values = {measure: torch.tensor([row[kind][measure] for row in each]) for measure in each[0][kind]}
            means = (
                f"{measure} {value.mean():.3f}" + (f" +- {value.std():.3f}" if len(value) > 1 else "")
                for measure, value in values.items()
            )
            print(f"{name:24} {kind:8}", *means, sep="  ")
    (options.run / "metrics.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
