"""A switching linear dynamical system whose regimes are summed out, after Linderman et al. (AISTATS 2017).

    python examples/slds.py RUN --data ball
    python examples/slds.py RUN --data lorenz

z is a path whose linear dynamics switch, and the next regime depends on where z is; x is z seen through noise. Given a
path, the regimes are a hidden Markov chain, so the prior of z sums over them and the guide knows nothing of them. Both
series are generated with known regimes: in which direction a ball flies, and in which wing of its attractor a Lorenz
system is. Nothing is learnt from the regimes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from parts import mlp, warmed_up
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from seqdisent import IndependentSteps, SwitchingChain, batch_sizes, fill_padding, infer, read_backward
from seqdisent.datasets import Sequences
from seqdisent.training import ELBOTraining, fit

STEP_DIM, NUM_STEPS = 10, 100


class SLDS(nn.Module):
    """p(z) sums p(k_1) p(z_1) prod_t p(k_t | k_{t-1}, z_{t-1}) p(z_t | z_{t-1}, k_t) over all k; then p(x_t | z_t).

    The guide's steps are independent Normals, from recurrent networks that read x in both directions.
    """

    def __init__(self, step_dim: int, latent_dim: int, num_regimes: int, hidden_dim: int = 32) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.eye(latent_dim).repeat(num_regimes, 1, 1))
        self.offsets = nn.Parameter(torch.zeros(num_regimes, latent_dim))
        self.stay = nn.Parameter(3 * torch.eye(num_regimes))
        self.place = nn.Linear(latent_dim, num_regimes)  # where z is, some regimes are more probable than elsewhere
        self.noises = nn.ParameterDict(  # softplus of these are standard deviations
            {"z_1": torch.ones(latent_dim), "z": torch.full((latent_dim,), -2.0), "x": torch.full((step_dim,), -2.0)}
        )
        self.emission, self.reading = nn.Linear(latent_dim, step_dim), nn.Linear(step_dim, latent_dim)
        self.past, self.future = (nn.GRU(step_dim, hidden_dim, batch_first=True) for _ in range(2))
        self.correction = mlp(2 * hidden_dim, hidden_dim, 2 * latent_dim)
        nn.init.zeros_(self.correction[-1].weight)  # so the guide starts at what it is told to read

    def scale(self, name: str) -> Tensor:
        return softplus(self.noises[name]) + 0.01

    def dynamics(self, z_prev: Tensor) -> dist.TorchDistribution:
        """Return the distribution of z_t given z_{t-1} and each regime."""
        loc = (self.matrices @ z_prev[..., None, :, None]).squeeze(-1) + self.offsets
        return dist.Normal(loc, self.scale("z"), validate_args=False).to_event(1)

    def logits(self, z_prev: Tensor) -> Tensor:
        """Return the logits of the next regime, a row for each that may come before it."""
        return self.stay + self.place(z_prev).unsqueeze(-2)

    def chain(self, num_sequences: int, num_steps: int, mask: Tensor | None = None) -> SwitchingChain:
        loc = self.offsets.new_zeros(num_sequences, *self.offsets.shape)
        first = dist.Normal(loc, self.scale("z_1"), validate_args=False).to_event(1)
        start = loc.new_zeros(len(self.offsets))
        return SwitchingChain(
            first, self.dynamics, num_steps, initial_logits=start, transition_logits=self.logits, mask=mask
        )

    def model(self, x=None, mask=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = batch_sizes(x, num_sequences, num_steps)
        with pyro.plate("sequences", num_sequences):
            z = pyro.sample("z", self.chain(num_sequences, num_steps, mask))
            step = dist.Normal(self.emission(z), self.scale("x"), validate_args=False).to_event(1)
            pyro.sample("x", IndependentSteps(step, mask), obs=x)

    def guide(self, x, mask=None):
        x = x if mask is None else fill_padding(x, mask)
        features = torch.cat([self.past(x)[0], read_backward(self.future, x, mask)], -1)
        shift, scale = self.correction(features).chunk(2, -1)
        step = dist.Normal(self.reading(x) + shift, softplus(scale - 2) + 0.01, validate_args=False).to_event(1)
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", IndependentSteps(step, mask))


# Data


def ball(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return paths (N, T, 2) of a ball in a box, and in which of four directions it flies into each step."""
    z, path, regimes = 2 * torch.rand(count, 2, generator=generator) - 1, [], []
    sign = torch.where(torch.rand(count, 2, generator=generator) < 0.5, -1.0, 1.0)
    for _ in range(NUM_STEPS):
        sign = torch.where(z.abs() > 1, -z.sign(), sign)
        z = z + sign * torch.tensor([0.1, 0.07]) + 0.01 * torch.randn(count, 2, generator=generator)
        path.append(z)
        regimes.append((sign > 0).long() @ torch.tensor([1, 2]))
    return torch.stack(path, 1), torch.stack(regimes, 1)


def lorenz(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return paths (N, T, 3) of a Lorenz system, about standardised, and in which wing each step is."""
    z, path = torch.randn(count, 3, generator=generator) + torch.tensor([0.0, 0.0, 25.0]), []
    for t in range((100 + NUM_STEPS) * 40):
        a, b, c = z.unbind(-1)
        z = z + 0.001 * torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)
        if t >= 100 * 40 and t % 40 == 0:
            path.append(z)
    found = (torch.stack(path, 1) - torch.tensor([0.0, 0.0, 23.5])) / torch.tensor([7.9, 9.0, 8.6])
    return found, (found[..., 0] > 0).long()


class Setting(NamedTuple):
    generate: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    latent_dim: int
    num_regimes: int


SETTINGS = {"ball": Setting(ball, 2, 4), "lorenz": Setting(lorenz, 3, 2)}


# Learning


def principal(network: SLDS, x: Tensor) -> Tensor:
    """Let emission and guide start at the principal components of x (N, T, X); return these, (N, T, D)."""
    size, mean = network.offsets.shape[-1], x.mean((0, 1))
    _, deviations, directions = torch.linalg.svd((x - mean).flatten(0, 1), full_matrices=False)
    scale = deviations[:size] / x[..., 0].numel() ** 0.5
    with torch.no_grad():
        network.emission.weight.copy_(directions[:size].T * scale)
        network.emission.bias.copy_(mean)
        network.reading.weight.copy_(directions[:size] / scale[:, None])
        network.reading.bias.copy_(-network.reading.weight @ mean)
        return network.reading(x)


def start(network: SLDS, path: Tensor, num_steps: int, seed: int) -> KMeans:
    """Start the regimes at clusters of the path's differences, and fit the switching dynamics to the path as it is."""
    differences = path.diff(dim=1).flatten(0, 1).numpy()
    clusters = KMeans(len(network.offsets), n_init=10, random_state=seed).fit(differences)
    network.offsets.data = torch.from_numpy(clusters.cluster_centers_).to(path)
    fitted = ("matrices", "offsets", "stay", "place", "noises.z")
    optimizer = torch.optim.Adam([p for n, p in network.named_parameters() if n.startswith(fitted)], 2e-2)
    for _ in range(num_steps):
        chain = network.chain(16, path.shape[1])
        loss = -chain.log_prob(path[torch.randint(len(path), (16,))]).mean() / path.shape[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return clusters


@torch.no_grad()
def regimes(network: SLDS, path: Tensor) -> Tensor:
    """Return the most probable regimes (N, T) of paths (N, T, D)."""
    return network.chain(*path.shape[:2]).regimes(path).viterbi().argmax(-1)


def matched(found: Tensor, known: Tensor) -> Tensor:
    """Return what was found under the names of the known regimes that make most of it right (Hungarian matching)."""
    size = int(max(found.max(), known.max())) + 1
    counts = one_hot(found.flatten(), size).T @ one_hot(known.flatten(), size)
    return torch.from_numpy(linear_sum_assignment(counts.numpy(), maximize=True)[1])[found]


def picture(path: Tensor, found: Tensor, known: Tensor, file: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.5), sharex=True, sharey=True)
    for axis, name, classes in zip(axes, ("known", "found"), (known, found), strict=True):
        axis.plot(path[:, 0], path[:, 1], color="0.8", linewidth=0.8, zorder=0)
        axis.scatter(path[:, 0], path[:, 1], c=classes, cmap="tab10", vmin=0, vmax=9, s=12)
        axis.set(title=f"{name} regimes", xlabel="z, first coordinate")
    axes[0].set_ylabel("z, second coordinate")
    figure.savefig(file, dpi=100, bbox_inches="tight")
    plt.close(figure)


def score(options: argparse.Namespace, seed: int) -> dict[str, float]:
    """Learn from new sequences and return the accuracy of regimes on others, of the model and of what it started at."""
    setting, generator = SETTINGS[options.data], torch.Generator().manual_seed(seed)
    paths, known = setting.generate(160, generator)
    reading = torch.randn(STEP_DIM, setting.latent_dim, generator=generator)
    x = paths @ reading.T + 0.2 * torch.randn(*paths.shape[:2], STEP_DIM, generator=generator)
    train, test = Sequences(x[:128]), x[128:]
    torch.manual_seed(seed)
    network, found = SLDS(STEP_DIM, setting.latent_dim, setting.num_regimes), {}
    clusters = start(network, principal(network, x[:128]), options.num_steps, seed)
    with torch.no_grad():
        path = network.reading(test)
    guess = torch.from_numpy(clusters.predict(path.diff(dim=1).flatten(0, 1).numpy())).long().unflatten(0, (32, -1))
    found["k-means of differences"] = torch.cat([guess[:, :1], guess], 1)
    found["autoregressive HMM"] = regimes(network, path)
    training = ELBOTraining(
        network, network.model, network.guide, partial(train.draw_windows, 16), num_steps=options.num_steps,
        learning_rate=warmed_up(1e-2, 50, options.num_steps), terms_per_step=16 * x[0].numel(), seed=seed,
    )  # fmt: skip
    fit(training, options.run / str(seed), clip_norm=5.0, progress_bar=False, accelerator="cpu")
    with torch.no_grad():
        path = infer(network.guide, test)["z"].value
    found["SLDS"] = regimes(network, path)
    names = {name: matched(each, known[128:]) for name, each in found.items()}
    picture(path[0], names["SLDS"][0], known[128], options.run / f"regimes-{seed}.png")
    return {name: (each == known[128:]).double().mean().item() for name, each in names.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a new folder for checkpoints, logs, pictures and metrics.json")
    parser.add_argument("--data", choices=SETTINGS, default="ball")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the data and of training")
    parser.add_argument("--num-steps", type=int, default=400, help="of each of the two trainings")
    options = parser.parse_args()
    scores = [score(options, seed) for seed in options.seeds]
    found = {name: [each[name] for each in scores] for name in scores[0]}
    for name, values in found.items():
        print(f"{name:24} {sum(values) / len(values):.3f}  {[round(value, 3) for value in values]}")
    (options.run / "metrics.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
