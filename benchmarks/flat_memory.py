"""Whether memory stays flat over a long run: resident memory, live tensors and objects, step by step.

    python benchmarks/flat_memory.py --steps 10000 --seed 0

A tiny state-space VAE with a `MarkovChain` in model and guide is trained in two ways: with `ELBOTraining` and `fit` (a
checkpoint every 500 steps, a log line every 20), and in a loop of one's own over `elbo_terms`. Counts are taken after a
warm-up of a tenth of the steps and from there on at every tenth, after a collection of garbage.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from lightning.pytorch.callbacks import Callback
from measuring import arguments_of, report
from torch import Tensor, nn

from seqdisent import AnnealingSchedule, GatedTransition, MarkovChain, elbo_terms
from seqdisent.training import ELBOTraining, fit

NUM_SEQUENCES, NUM_STEPS, FRAME_DIM, LATENT_DIM = 4, 6, 5, 2


class StateSpaceVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transition = GatedTransition(LATENT_DIM, 8)
        self.combine = GatedTransition(LATENT_DIM, 8, context_dim=FRAME_DIM)
        self.emission = nn.Linear(LATENT_DIM, FRAME_DIM)

    def model(self, x: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> None:
        with pyro.plate("sequences", len(x)):
            initial = dist.Normal(x.new_zeros(len(x), LATENT_DIM), temperature).to_event(1)
            z = pyro.sample("z", MarkovChain(initial, self.transition, x.shape[1], mask=mask))
            real = dist.Normal(self.emission(z), 1.0, validate_args=False).to_event(1)
            pyro.sample("x", (real if mask is None else real.mask(mask)).to_event(1), obs=x)

    def guide(self, x: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> None:
        with pyro.plate("sequences", len(x)):
            initial = self.combine(x.new_zeros(len(x), LATENT_DIM), x[:, 0])
            pyro.sample("z", MarkovChain(initial, self.combine, x.shape[1], inputs=x, mask=mask))


def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a ragged batch, so that masks are made anew at every step."""
    lengths = torch.randint(1, NUM_STEPS + 1, (NUM_SEQUENCES,), generator=generator)
    mask = torch.arange(NUM_STEPS) < lengths[:, None]
    return torch.randn(NUM_SEQUENCES, NUM_STEPS, FRAME_DIM, generator=generator), mask


def counts() -> dict[str, float]:
    """Return what a process holds, once garbage is collected."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [thing for thing in objects if issubclass(type(thing), Tensor)]
    graph = sum(tensor.grad_fn is not None for tensor in tensors)
    found = {"objects": len(objects), "tensors": len(tensors), "in a graph": graph}
    with open("/proc/self/statm") as file:
        found["MB"] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return found


def with_elbo_training(steps: int, seed: int, look: Callable[[int], None]) -> None:
    class Look(Callback):
        def on_train_batch_start(self, trainer, *_):
            look(trainer.global_step)

        def on_train_end(self, trainer, *_):
            look(trainer.global_step)

    network = StateSpaceVAE()
    training = ELBOTraining(
        network, network.model, network.guide, draw,
        num_steps=steps, learning_rate=AnnealingSchedule.cosine(1e-3, 1e-4, steps),
        weights={"z": AnnealingSchedule.linear(0.1, 1.0, steps)},
        inputs={"temperature": AnnealingSchedule.linear(1.0, 0.9, steps)},
        arguments=lambda batch: batch, seed=seed,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        options = {"clip_norm": 10.0, "checkpoint_every": max(1, steps // 20), "progress_bar": False}
        fit(training, folder, callbacks=(Look(),), accelerator="cpu", **options)


def with_a_loop(steps: int, seed: int, look: Callable[[int], None]) -> None:
    network, generator = StateSpaceVAE(), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(steps):
        look(step)
        x, mask = draw(generator)
        terms = elbo_terms(network.model, network.guide, x, mask)
        terms.check_finite(step)
        optimiser.zero_grad()
        (-terms.elbo({"z": 0.5}).sum()).backward()
        optimiser.step()
        del terms
    look(steps)


WAYS = {"ELBOTraining and fit": with_elbo_training, "a loop over elbo_terms": with_a_loop}


def measure(way: str, steps: int, seed: int, parts: int = 10) -> list[dict[str, float]]:
    """Return the counts after each part of a run, the first of which is its warm-up."""
    found = []

    def look(step: int) -> None:
        if step and step % (steps // parts) == 0 and (not found or found[-1]["step"] < step):
            found.append({"step": step, **counts()})

    torch.manual_seed(seed)
    WAYS[way](steps, seed, look)
    return found


def main() -> None:
    arguments = arguments_of(__doc__, steps=10_000)
    torch.set_num_threads(1)
    rows = []
    for way in WAYS:
        rows += [{"way": way, **row} for row in measure(way, arguments.steps, arguments.seed)]
    report("flat_memory", arguments, rows)


if __name__ == "__main__":
    main()
