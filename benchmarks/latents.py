"""What the static latent's density looks like, and what the dynamics tell of who is seen, in means and in draws.

    SEQDISENT_DATA=FOLDER_WITH_lpc python benchmarks/latents.py RUN

For a run of `examples/vdsm.py --data sprites` (stage 2 is enough): log-densities of held-out characters' draws of s
under mixtures fitted to draws of the training characters, and under one that knows the labels (factors add up, are
independent and have a common covariance); then probes (a network) of means and of draws of d.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
from torch.distributions import MultivariateNormal

from seqdisent import MixturePrior
from seqdisent.metrics import probe_table
from seqdisent.training import load_weights

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import vdsm as example
from command_line import load_data, network_of
from settings import read_settings

KINDS = [(1, True), (30, False), (100, False), (10, True), (30, True), (50, True)]


def posteriors(network, clips):
    """Return q(s) and q(d) of every clip, as means and draws."""
    found = {name: [] for name in ("s", "d", "drawn s", "drawn d")}
    for rows in torch.arange(len(clips)).split(128):
        features = network.encoder(clips.batch(rows).frames)
        for name, q in (("s", network.static(features)), ("d", network.dynamics(network.pose(features).mean))):
            found[name].append(q.mean)
            found[f"drawn {name}"].append(q.sample())
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def knows_the_labels(s, labels):
    """Return the log-density of a mixture over all combinations, each as frequent as its values together."""
    sizes = [int(values.max()) + 1 for values in labels]

    def one_hot(values):
        parts = [torch.nn.functional.one_hot(value, size) for value, size in zip(values, sizes, strict=True)]
        return torch.cat([*parts, torch.ones_like(values[0])[:, None]], 1).double()

    effects = torch.linalg.lstsq(one_hot(labels), s, driver="gelsd").solution
    rest = s - one_hot(labels) @ effects
    combinations = torch.tensor(list(itertools.product(*map(range, sizes)))).unbind(1)
    shares = [torch.bincount(values, minlength=size) / len(s) for values, size in zip(labels, sizes, strict=True)]
    weights = torch.stack([share[value] for share, value in zip(shares, combinations, strict=True)]).log().sum(0)
    around = MultivariateNormal(torch.zeros_like(s[0]), rest.T.cov() + 1e-6 * torch.eye(s.shape[1]).double())
    return lambda x: (around.log_prob(x[:, None] - one_hot(combinations) @ effects) + weights).logsumexp(1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    settings = read_settings(example.EXAMPLE, options.run)
    network = network_of(example.EXAMPLE, settings)
    load_weights(network, options.run / "stage2" / "model.pt")
    data = load_data(example.EXAMPLE, settings)
    torch.manual_seed(options.seed)
    train, held_out = (posteriors(network.eval(), clips) for clips in (data.train, data.held_out))
    for num_components, full in KINDS:
        prior = MixturePrior(train["s"].shape[1], num_components, full=full).double()
        prior.start(train["drawn s"], seed=options.seed)
        scores = [prior().log_prob(of["drawn s"]).mean() for of in (train, held_out)]
        kind = "full" if full else "diagonal"
        print(f"log p(s), {num_components} {kind}: training {scores[0]:.1f}, held out {scores[1]:.1f}", flush=True)
    who = ("body", "shirt", "pants", "hair")
    density = knows_the_labels(train["drawn s"], [data.train.labels[name] for name in who])
    print("log p(s), knows the labels: held out", round(density(held_out["drawn s"]).mean().item(), 1), flush=True)
    labels = [{name: clips.labels[name] for name in (*who, "action")} for clips in (data.train, data.held_out)]
    sites = ("d", "drawn d")
    with torch.enable_grad():
        found = probe_table(
            {name: train[name].float() for name in sites}, labels[0],
            {name: held_out[name].float() for name in sites}, labels[1], kind="mlp", seed=options.seed,
        )  # fmt: skip
    for site, scores in found.items():
        print(site, {name: round(100 * float(score.accuracy), 1) for name, score in scores.items()})


if __name__ == "__main__":
    main()
