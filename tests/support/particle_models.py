"""Models that a particle filter is tested on, with what is known of them exactly; all are float64."""

import functools
import itertools
import math

import pyro
import pyro.distributions as dist
import torch
from models import VRNN, StateSpace, WhoWhat, normal
from pyro.distributions.transforms import LeakyReLUTransform, affine_autoregressive
from strategies import Tensors, mask_of

from seqdisent import IndependentSteps, LinearGaussianChain, MarkovChain
from seqdisent.chains import LinearEmission

RUNS = 1000


def within(found, wanted, standard_errors=4):
    """Hold the mean over runs (the first dimension) to a value, in standard errors of that mean."""
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - wanted).abs() <= standard_errors * error + 1e-9).all(), (found.mean(0), wanted, error)


class Ragged:
    """A linear-Gaussian model with holes, of three sequences of 5, 2 and 4 steps; the exact answers; its guides."""

    def __init__(self, by="coordinate", runs=RUNS):
        tensors = Tensors(3)
        self.mask = mask_of([5, 2, 4]).repeat_interleave(runs, 0)
        self.runs = runs
        x = tensors.normal(3, 5, 2)
        self.observed = tensors.uniform(3, 5, 2) < 0.7 if by == "coordinate" else tensors.uniform(3, 5) < 0.7
        seen = self.observed if by == "coordinate" else self.observed.unsqueeze(-1)
        self.x = torch.where(seen & mask_of([5, 2, 4]).unsqueeze(-1), x, math.nan).repeat_interleave(runs, 0)
        self.observed = self.observed.repeat_interleave(runs, 0)
        self.matrix, self.offset = 0.7 * tensors.normal(2, 2), tensors.normal(2)
        self.loc, self.scales = tensors.normal(2), 0.4 + tensors.uniform(2, 2)
        self.emission = LinearEmission(tensors.normal(2, 2), 1.2 + tensors.uniform(2), 0.3 * tensors.normal(2))
        self.given = self.x, self.mask, self.observed

    def prior(self, mask, num_sequences, num_steps):
        return LinearGaussianChain(
            self.loc.expand(num_sequences, -1), self.scales[0], self.matrix, self.scales[1], num_steps,
            offset=self.offset, mask=mask,
        )  # fmt: skip

    def model(self, x, mask, observed):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", self.prior(mask, *x.shape[:2]))
            step = normal(z @ self.emission.matrix.T + self.emission.offset, self.emission.scale)
            pyro.sample("x", IndependentSteps(step, mask, observed), obs=x)

    def bootstrap(self, x, mask, observed):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", self.prior(mask, *x.shape[:2]))

    def reading(self, x, mask, observed):
        read = self.emission.matrix
        seen = torch.where(x.isnan(), 0.0, x) @ read
        step = lambda z, x: normal(0.5 * (z @ self.matrix.T + self.offset) + 0.2 * x, 0.9)  # noqa: E731
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", MarkovChain(normal(0.2 * seen[:, 0], 1.0), step, x.shape[1], inputs=seen, mask=mask))

    def factorised(self, x, mask, observed):
        seen = torch.where(x.isnan(), 0.0, x) @ self.emission.matrix
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", IndependentSteps(normal(0.2 * seen, 1.2), mask))

    def posterior(self, x, mask, observed):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", self.prior(mask, *x.shape[:2]).posterior(x, self.emission, observed))

    @functools.cached_property
    def exact(self):
        chain = self.prior(self.mask, *self.x.shape[:2])
        return chain.filter(self.x, self.emission, self.observed), chain.smooth(self.x, self.emission, self.observed)

    def by_run(self, values):
        """(3 * runs, ...) -> (runs, 3, ...)."""
        return values.unflatten(0, (3, self.runs)).transpose(0, 1)


class Classes:
    """A chain of three classes that is seen through a table of probabilities; every path can be counted."""

    def __init__(self):
        tensors = Tensors(2)
        self.start, self.move, self.show = tensors.simplex(3), tensors.simplex(3, 3), tensors.simplex(3, 4)
        self.x = torch.tensor([0, 3, 1, 2])

    def model(self, x):
        onehot = lambda p: dist.OneHotCategorical(p, validate_args=False)  # noqa: E731
        with pyro.plate("sequences", len(x)):
            chain = MarkovChain(onehot(self.start.expand(len(x), -1)), lambda z: onehot(z @ self.move), x.shape[1])
            z = pyro.sample("z", chain)
            pyro.sample("x", IndependentSteps(dist.Categorical(z @ self.show, validate_args=False)), obs=x)

    def guide(self, x):
        onehot = lambda p: dist.OneHotCategorical(p / p.sum(-1, keepdim=True), validate_args=False)  # noqa: E731
        shown = self.show.T[x] + 0.1
        with pyro.plate("sequences", len(x)):
            step = lambda z, shown: onehot(shown * (z @ self.move + 0.05))  # noqa: E731
            pyro.sample("z", MarkovChain(onehot(shown[:, 0]), step, x.shape[1], inputs=shown))

    def exact(self):
        """Return p(x), and p(z_t = class | x), by all paths."""
        total, marginals = 0.0, torch.zeros(4, 3).double()
        for path in itertools.product(range(3), repeat=4):
            p = self.start[path[0]] * self.show[path[0], self.x[0]]
            for t in range(1, 4):
                p = p * self.move[path[t - 1], path[t]] * self.show[path[t], self.x[t]]
            total = total + p
            for t, z in enumerate(path):
                marginals[t, z] += p
        return total, marginals / total


def flows(seed):
    """Chains whose steps are flows; the guide's is autoregressive, with an inverse that is known of its own draws."""
    tensors, made = Tensors(seed), affine_autoregressive(2, [4]).double()

    def chain(shift, x, mask, flow):
        step = lambda z, u: dist.TransformedDistribution(normal(0.7 * z + u, 0.5), [flow])  # noqa: E731
        inputs = shift * x
        return MarkovChain(step(0 * x[:, 0], inputs[:, 0]), step, x.shape[1], inputs=inputs, mask=mask)

    def model(x, mask):
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", chain(0.0, x, mask, LeakyReLUTransform()))
            pyro.sample("x", IndependentSteps(normal(z, 0.6), mask), obs=x)

    def guide(x, mask):
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", chain(0.3, x, mask, made))

    return model, guide, tensors.normal(3, 4, 2), list(made.parameters())


def programs(name):
    """Return model, guide, x (3, 4, X), parameters, and what a run of the model gives."""
    x = Tensors(1).normal(3, 4, 2)
    if name == "chain":
        known = StateSpace(0)
        return known.model, known.guide, x, known.parameters(), "step"
    if name == "recurrent":
        known = VRNN(0)
        return known.model, known.guide, x, known.parameters(), "step"
    if name == "static":
        known = WhoWhat(0).double()
        return known.model, known.guide, Tensors(1).normal(3, 4, 4), list(known.parameters()), "step"
    if name == "flows":
        return *flows(0), "step"
    known = StateSpace(0)  # "smooth": the emission of a step reads all steps before it
    average = 1 / torch.arange(1, 5).double()[:, None]

    def model(x, mask):
        with pyro.plate("sequences", len(x)):
            start = known.prior(known.loc.expand(len(x), -1), known.first_scale)
            z = pyro.sample("z", MarkovChain(start, known.transition, x.shape[1], mask=mask))
            pyro.sample("x", IndependentSteps(normal(z.cumsum(-2) * average[: x.shape[1]], 0.5), mask), obs=x)

    return model, known.guide, x, known.parameters(), "sequence"


NAMES = ("chain", "recurrent", "static", "flows", "all steps before")
MASK = mask_of([4, 2, 3])
