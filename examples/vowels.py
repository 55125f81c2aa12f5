"""Who speaks, without a label: a static code and a chain of utterances of two vowels by nine speakers.

    SEQDISENT_DATA=FOLDER python examples/vowels.py RUN

Utterances have 7 to 29 steps of twelve cepstral coefficients. The code s of an utterance should say who speaks, the
chain z what is said: a linear probe and the equal error rate of verification measure both. Beside them: a model without
a static code, the mean of the coefficients, and a network that is trained on the speakers.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from parts import beside, mlp, standard_normal, warmed_up
from sklearn.metrics import roc_curve
from torch import Tensor, nn
from torch.nn import functional as F

from seqdisent import (
    AnnealingSchedule,
    GatedTransition,
    IndependentSteps,
    MarkovChain,
    NormalHead,
    StaticEncoder,
    batch_sizes,
    fill_padding,
    infer,
    overwrite_padding,
)
from seqdisent.datasets import Scaler, Sequences
from seqdisent.datasets.batch import frames_and_mask
from seqdisent.metrics import probe
from seqdisent.training import ELBOTraining, fit, load_weights

NUM_SPEAKERS, NUM_VALID = 9, 30


class Utterances(nn.Module):
    """p(s) p(z_1) prod_t p(z_t | z_{t-1}) p(x_t | s, z_t), q(s | x) prod_t q(z_t | x_t, s); s may be left out."""

    def __init__(self, step_dim: int, static_dim: int, latent_dim: int, hidden_dim: int = 64) -> None:
        super().__init__()
        self.static_dim, self.latent_dim = static_dim, latent_dim
        self.encoder = nn.Sequential(mlp(step_dim, hidden_dim, hidden_dim), nn.ReLU())
        self.static = StaticEncoder(hidden_dim, static_dim) if static_dim else None
        self.local = NormalHead(hidden_dim + static_dim, latent_dim)
        self.transition = GatedTransition(latent_dim, hidden_dim)
        self.decoder = mlp(static_dim + latent_dim, hidden_dim, hidden_dim, step_dim)
        self.noise = nn.Parameter(torch.zeros(step_dim))  # its softplus is a standard deviation

    def model(self, x=None, mask=None, *, num_sequences=None, num_steps=None, ordered=True):
        num_sequences, num_steps = batch_sizes(x, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", standard_normal(self.noise, self.static_dim)) if self.static else None
            initial = standard_normal(self.noise, num_sequences, self.latent_dim)
            step = self.transition if ordered else lambda z_prev: standard_normal(z_prev, *z_prev.shape)
            z = pyro.sample("z", MarkovChain(initial, step, num_steps, mask=mask))
            scale = F.softplus(self.noise) + 0.05
            step = dist.Normal(self.decoder(beside(z, blend(s))), scale, validate_args=False).to_event(1)
            pyro.sample("x", IndependentSteps(step, mask), obs=x)

    def guide(self, x, mask=None):
        features = self.encoder(x if mask is None else fill_padding(x, mask))
        with pyro.plate("sequences", len(x)):
            s = pyro.sample("s", self.static(features, mask)) if self.static else None
            pyro.sample("z", IndependentSteps(self.local(beside(features, blend(s))), mask))


def blend(s: Tensor | None) -> Tensor | None:
    """Return who speaks as a blend of a few voices: codes of one speaker then differ less than on the whole line."""
    return None if s is None else s.shape[-1] * s.softmax(-1)


class Parts(NamedTuple):
    """Utterances to learn from, to choose on, and to score, whose identity is the speaker."""

    train: Sequences
    valid: Sequences
    test: Sequences


def utterances(folder: Path, seed: int) -> Parts:
    """Return 240, 30 and 370 utterances by the mean and deviation of the first; the 30 are 3 or 4 of each speaker."""
    arrays = np.load(folder / "japanese_vowels" / "japanese_vowels.npz")
    given, test = (
        Sequences.from_arrays(
            np.split(arrays[part], arrays[f"{part}_length"].cumsum()[:-1]),
            identity=arrays[f"{part}_speaker"].astype(np.int64),
        )
        for part in ("train", "test")
    )
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(seed))
    turn = torch.zeros(len(given), dtype=torch.long)  # of an utterance among its speaker's
    for speaker in range(NUM_SPEAKERS):
        own = order[given.identity[order] == speaker]
        turn[own] = torch.arange(len(own))
    chosen = torch.zeros(len(given), dtype=torch.bool)
    chosen[order[turn[order].argsort(stable=True)][:NUM_VALID]] = True
    train, valid = given.subset(~chosen), given.subset(chosen)
    scaler = Scaler.fit(train)
    return Parts(train.scaled(scaler), valid.scaled(scaler), test.scaled(scaler))


def learn(network: Utterances, parts: Parts, run: Path, seed: int, num_steps: int, weight: float) -> None:
    """Train with the steps in no order, so that what stays costs less in s than in each z; then the transition."""
    for stage, ordered in (("unordered", False), ("transition", True)):
        network.requires_grad_(not ordered)
        network.transition.requires_grad_(ordered)
        steps = num_steps if not ordered else (num_steps + 3) // 4
        training = ELBOTraining(
            network, partial(network.model, ordered=ordered), network.guide, partial(parts.train.draw_windows, 60),
            num_steps=steps, learning_rate=warmed_up(2e-3, 50, steps), terms_per_step=60 * 16 * 12,
            weights={"z": AnnealingSchedule.constant(weight)}, validation=[parts.valid.batch(range(len(parts.valid)))],
            seed=seed,
        )  # fmt: skip
        fit(training, run / stage, clip_norm=5.0, validate_every=100, progress_bar=False, accelerator="cpu")
        load_weights(network, run / stage / "best.ckpt")


@torch.no_grad()
def codes(network: Utterances, data: Sequences) -> dict[str, Tensor]:
    """Return the blend of s (N, S) and z averaged over the real steps (N, Z), of posterior means."""
    batch = data.batch(range(len(data)))
    found = {name: site.value for name, site in infer(network.guide, *frames_and_mask(batch)).items()}
    static = {"s": blend(found["s"])} if "s" in found else {}
    return {**static, "z": averaged(found["z"], batch.mask)}


def averaged(steps: Tensor, mask: Tensor) -> Tensor:
    return overwrite_padding(steps, mask).sum(1) / mask.sum(1, keepdim=True)


class Classifier(nn.Module):
    """What labels make possible: a network over the steps in both directions, averaged to a code."""

    def __init__(self, step_dim: int, code_dim: int = 32) -> None:
        super().__init__()
        self.network = nn.GRU(step_dim, 32, batch_first=True, bidirectional=True)
        self.code = nn.Sequential(nn.Dropout(0.3), nn.Linear(64, code_dim))
        self.head = nn.Linear(code_dim, NUM_SPEAKERS)

    def forward(self, data: Sequences) -> Tensor:
        return self.code(averaged(self.network(data.values)[0], data.mask))  # 0 in padding


def supervised(parts: Parts, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return the codes of training and scored utterances by a network that is trained on the speakers."""
    classifier = Classifier(parts.train.values.shape[-1])
    optimizer = torch.optim.Adam(classifier.parameters(), 3e-3)
    for _ in range(num_steps):
        loss = F.cross_entropy(classifier.head(classifier(parts.train)), parts.train.identity)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return classifier.eval()(parts.train), classifier(parts.test)


def equal_error_rate(codes: Tensor, speaker: Tensor) -> float:
    """Return the error of telling pairs of one speaker from others by cosine, where both kinds of error are equal."""
    codes, pairs = F.normalize(codes, dim=-1), torch.combinations(torch.arange(len(codes)))
    similarity = (codes[pairs[:, 0]] * codes[pairs[:, 1]]).sum(-1)
    accepted, found, _ = roc_curve(speaker[pairs[:, 0]] == speaker[pairs[:, 1]], similarity)
    nearest = np.abs(accepted - (1 - found)).argmin()
    return float((accepted[nearest] + 1 - found[nearest]) / 2)


def scores(parts: Parts, train: Tensor, test: Tensor) -> dict[str, float]:
    accuracy = probe(train, parts.train.identity, test, parts.test.identity).accuracy
    return {"accuracy": accuracy, "EER": equal_error_rate(test - train.mean(0), parts.test.identity)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a new folder for checkpoints, logs and metrics.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the split and of training")
    parser.add_argument("--num-steps", type=int, default=1000, help="of training")
    parser.add_argument("--static-dim", type=int, default=16)
    parser.add_argument("--latent-dim", type=int, default=4)
    parser.add_argument("--weight", type=float, default=1.0, help="of z's KL")
    parser.add_argument("--develop", action="store_true", help="score on the validation part, to choose settings")
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        parts = utterances(Path(os.environ.get("SEQDISENT_DATA", "data")), seed)
        parts = parts._replace(test=parts.valid) if options.develop else parts
        for name, static_dim in {"with s": options.static_dim, "without s": 0}.items():
            torch.manual_seed(seed)
            network = Utterances(parts.train.values.shape[-1], static_dim, options.latent_dim)
            run = options.run / f"{seed}-{name.replace(' ', '-')}"
            learn(network, parts, run, seed, options.num_steps, options.weight)
            train, test = codes(network, parts.train), codes(network, parts.test)
            for site in test:
                found.setdefault(f"{site}, {name}", []).append(scores(parts, train[site], test[site]))
        raw = [averaged(data.values, data.mask) for data in (parts.train, parts.test)]
        found.setdefault("mean of x", []).append(scores(parts, *raw))
        torch.manual_seed(seed)
        found.setdefault("supervised", []).append(scores(parts, *supervised(parts, options.num_steps // 5)))
    for name, each in found.items():
        for score in each[0]:
            values = torch.tensor([row[score] for row in each])
            spread = f" +- {values.std():.3f}" if len(values) > 1 else ""
            print(f"{name:16} {score:8} {values.mean():.3f}{spread}  {[round(value, 3) for value in values.tolist()]}")
    (options.run / "metrics.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
