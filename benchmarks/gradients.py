"""The signal-to-noise ratio of the guide's gradient under each objective, over the number of particles.

    python benchmarks/gradients.py --plot docs/images/gradients.png

The model is a linear-Gaussian chain. Its amortised guide, q(z_t | z_{t-1}, x_t), is linear too, but reads no later
frame and so is not the posterior. It is trained on the ELBO, then its parameters are moved a little at random.
The gradient of the bound of one sequence is drawn many times. A parameter's ratio is |mean| / standard deviation; the
figure is the root mean square over the guide's parameters, less what chance would make of it. Each seed has a guide and
a sequence of its own, and figures are means over seeds. `ms` are milliseconds a draw of the gradient, many at a time.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from measuring import arguments_of, report

from seqdisent import MarkovChain, elbo_terms

WAYS = {
    "elbo": {"objective": "elbo"},
    "elbo, monte-carlo": {"objective": "elbo", "kl": "monte-carlo"},
    "stl": {"objective": "stl"},
    "iwae": {"objective": "iwae"},
    "dreg": {"objective": "dreg"},
}
PARTICLES, LENGTHS = (1, 2, 4, 8, 16, 32, 64), (2, 20)
TIMED = ("elbo", "stl", "iwae", "dreg")
SIZE = 2
DYNAMICS, DECODE = torch.tensor([[0.9, 0.2], [-0.2, 0.9]]), torch.tensor([[1.0, 0.0], [0.5, 1.0]])


def times(matrix, vector):
    """Multiply vectors (*S, *B, n) by matrices (*B, n, n)."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def chain(first, mean, scale, num_steps, **options):
    def step(*reads):
        return dist.Normal(mean(*reads), scale).to_event(1)

    return MarkovChain(dist.Normal(first, scale).to_event(1), step, num_steps, **options)


def model(x, guide_parameters):
    with pyro.plate("sequences", len(x)):
        z = pyro.sample("z", chain(x.new_zeros(len(x), SIZE), partial(times, DYNAMICS), x.new_tensor(0.5), x.shape[1]))
        pyro.sample("x", dist.Normal(times(DECODE, z), 0.5).to_event(2), obs=x)


def guide(x, guide_parameters):
    carry, read, log_scale = guide_parameters  # alike for all sequences, or with a row for each
    features = times(read.unsqueeze(-3), x)
    with pyro.plate("sequences", len(x)):
        mean = lambda z_prev, feature: times(carry, z_prev) + feature  # noqa: E731
        pyro.sample("z", chain(features[:, 0], mean, log_scale.exp(), x.shape[1], inputs=features))


def sequences(count, length):
    z, frames = torch.zeros(count, SIZE), []
    for _ in range(length):
        z = times(DYNAMICS, z) + 0.5 * torch.randn_like(z)
        frames.append(times(DECODE, z) + 0.5 * torch.randn_like(z))
    return torch.stack(frames, 1)


def trained(length, num_steps=300, moved=0.05):
    """Return the guide's parameters near the best of its family."""
    parameters = [torch.zeros(SIZE, SIZE), torch.zeros(SIZE, SIZE), torch.zeros(SIZE)]
    optimiser = torch.optim.Adam([p.requires_grad_() for p in parameters], 0.02)
    for _ in range(num_steps):
        optimiser.zero_grad()
        (-elbo_terms(model, guide, sequences(64, length), parameters).elbo().mean()).backward()
        optimiser.step()
    return [p.detach() + moved * torch.randn_like(p) for p in parameters]


def gradients(x, parameters, draws, num_particles, **options):
    """Return draws of the gradient of the bound of one sequence (T, X), and the seconds that they took."""
    found, start = [], time.perf_counter()
    size = max(1, min(draws, 16_000 // num_particles))
    for _ in range(0, draws, size):
        own = [p.expand(size, *p.shape).clone().requires_grad_() for p in parameters]  # every draw has its own
        particles = {"num_particles": num_particles, "vectorize_particles": num_particles > 1}
        bound = elbo_terms(model, guide, x.expand(size, -1, -1), own, **options, **particles).bound()
        found.append(torch.cat([g.flatten(1) for g in torch.autograd.grad(bound.sum(), own)], 1))
    return torch.cat(found), time.perf_counter() - start


def signal_to_noise(found):
    variance = found.var(0)
    return ((found.mean(0) ** 2 - variance / len(found)) / variance).mean().clamp(min=0).sqrt().item()


def plot(rows, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for panel, length in zip(figure.subplots(1, len(LENGTHS), sharey=True), LENGTHS, strict=True):
        for way, marker in zip(WAYS, "os^vD", strict=True):
            ratios = [row[way] for row in rows if row["T"] == length]
            panel.loglog(PARTICLES, ratios, marker=marker, label=way)
        panel.set(xlabel="particles K", title=f"{length} steps")
        panel.set_xticks([], minor=True)
        panel.set_xticks(PARTICLES, [str(k) for k in PARTICLES])
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("signal-to-noise ratio")
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


def measured(num_particles, parameters, x, seed, draws):
    """Return {way: (ratio, milliseconds a draw)}, every way with the same noise."""
    found = {}
    for way, options in WAYS.items():
        torch.manual_seed(seed)
        drawn, took = gradients(x, parameters, draws, num_particles, **options)
        found[way] = signal_to_noise(drawn), 1e3 * took / len(drawn)
    return found


def main():
    arguments = arguments_of(__doc__, repeats=3, draws=500, plot="")
    rows = []
    for length in LENGTHS:
        runs = []
        for seed in range(arguments.seed, arguments.seed + arguments.repeats):
            torch.manual_seed(seed)
            parameters, x = trained(length), sequences(1, length)[0]
            runs.append([measured(k, parameters, x, seed, arguments.draws) for k in PARTICLES])
        for k, of_seeds in zip(PARTICLES, zip(*runs, strict=True), strict=True):
            row = {"T": length, "K": k} | {way: statistics.mean(of[way][0] for of in of_seeds) for way in WAYS}
            row |= {f"ms {way}": statistics.median(of[way][1] for of in of_seeds) for way in TIMED}
            rows.append(row | {"each seed": {way: [round(of[way][0], 3) for of in of_seeds] for way in WAYS}})
    report("gradients", arguments, [{name: row[name] for name in row if name != "each seed"} for row in rows])
    print("\neach seed:", *(f"T={row['T']}, K={row['K']}: {row['each seed']}" for row in rows), sep="\n  ")
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
