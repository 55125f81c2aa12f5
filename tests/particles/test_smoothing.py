"""Backward simulation against the Kalman smoother, all paths of a discrete chain, and a dense Gaussian.

With K particles its distribution is off by about 1 / K; K is chosen so that this is well below the standard error.
"""

import itertools

import pyro
import pytest
import reference
import torch
from models import normal
from particle_models import MASK, Classes, Ragged, programs, within
from strategies import Tensors, mask_of
from torch import nn

from seqdisent import IndependentSteps, MarkovChain, RecurrentChain
from seqdisent.particles import filter, smooth


@pytest.mark.parametrize("guide", ["bootstrap", "reading"])
def test_moments_are_those_of_the_kalman_smoother(guide):
    system = Ragged(runs=40)
    with torch.no_grad():
        found = filter(system.model, getattr(system, guide), *system.given, num_particles=1500)
    drawn = smooth(found, num_draws=20)["z"]
    assert drawn.shape == (20, 120, 5, 2)
    real, smoothed = system.mask[..., None], system.exact[1]
    assert torch.equal(drawn[:, ~system.mask], drawn[:, :, :1].expand_as(drawn)[:, ~system.mask])
    error = torch.where(real, drawn - smoothed.loc, 0.0)
    within(system.by_run(error.mean(0)), 0.0)
    products = (error.unsqueeze(-1) * error.unsqueeze(-2)).mean(0)
    within(system.by_run(products), system.by_run(torch.where(real[..., None], smoothed.covariance, 0.0))[0])
    early = drawn[:, :40, 0, 0].unique().numel()
    assert early > 1.5 * found.paths["z"][:20, :40, 0, 0].unique().numel()


def test_paths_of_classes_have_their_joint_probabilities():
    classes = Classes()
    with torch.no_grad():
        found = filter(classes.model, classes.guide, classes.x.expand(200, -1), num_particles=300)
    drawn = smooth(found, num_draws=30)["z"].argmax(-1)
    total, _ = classes.exact()
    for path in itertools.product(range(3), repeat=4):
        p = classes.start[path[0]] * classes.show[path[0], classes.x[0]]
        for t in range(1, 4):
            p = p * classes.move[path[t - 1], path[t]] * classes.show[path[t], classes.x[t]]
        if p / total > 0.01:
            within((drawn == torch.tensor(path)).all(-1).double().mean(0), p / total)


def test_a_network_that_reads_no_latent_keeps_the_chain_a_markov_chain():
    """z_t = 0.8 z_{t-1} + h_t + noise, x_t = z_t - 2 h_t + noise, where h_t reads x alone: a known shift."""
    tensors, runs = Tensors(0), 60
    network = tensors.build(lambda: nn.GRU(1, 2, batch_first=True))
    x, weight = tensors.normal(1, 5, 1).expand(runs, -1, -1), tensors.normal(2)
    shifted = torch.cat([x[:, :1], x[:, :-1]], 1)

    def model(x):
        with pyro.plate("sequences", len(x)):
            step = lambda z, h: normal(0.8 * z + (h @ weight).unsqueeze(-1), 0.6)  # noqa: E731
            inputs = torch.cat([x[:, :1], x[:, :-1]], 1)
            start = normal(torch.zeros(len(x), 1).double(), 1.0)
            chain = RecurrentChain(start, step, x.shape[1], recurrence=network, inputs=inputs, reads_latent=False)
            z = pyro.sample("z", chain)
            pyro.sample("x", IndependentSteps(normal(z - 2 * (chain.states(z) @ weight).unsqueeze(-1), 0.7)), obs=x)

    def guide(x):
        with pyro.plate("sequences", len(x)):
            step = lambda z, x: normal(0.5 * z + 0.3 * x, 0.9)  # noqa: E731
            pyro.sample("z", MarkovChain(normal(0.3 * x[:, 0], 1.0), step, x.shape[1], inputs=x))

    with torch.no_grad():
        h = torch.cat([torch.zeros(1, 1, 2).double(), network(shifted[:1, 1:])[0]], 1)[0] @ weight
        found = filter(model, guide, x, num_particles=1000)
    one = torch.ones(1, 1).double()
    steps = [(0.8 * one, shift[None], 0.36 * one) for shift in h[1:]]
    given = torch.zeros(1).double(), one, steps, (one, torch.zeros(1).double(), 0.49 * one), x[0] + 2 * h[:, None]
    assert found.runs == "step"
    within((found.log_evidence - reference.kalman_log_evidence(*given)).exp(), 1.0)
    mean, _ = reference.dense_chain(*reference.posterior_chain(*given))
    within(smooth(found, num_draws=20)["z"].mean(0).squeeze(-1), mean)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("static", r"^particles: have static sites \['d', 's'\]"),
        ("recurrent", "^site 'z': is a RecurrentChain each of whose steps depends"),
        ("all steps before", "^particles: the model was run on whole sequences"),
    ],
)
def test_models_that_it_refuses(name, said):
    model, guide, x, _, _ = programs(name)
    found = filter(model, guide, x, MASK, num_particles=4)
    with pytest.raises(ValueError, match=said):
        smooth(found, num_draws=2)


def test_the_number_of_draws():
    model, guide, x, _, _ = programs("chain")
    found = filter(model, guide, x, mask_of([4, 2, 3]), num_particles=4)
    with pytest.raises(ValueError, match="^num_draws: "):
        smooth(found, num_draws=0)
    assert not smooth(found, num_draws=1)["z"].requires_grad
