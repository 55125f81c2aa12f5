"""The last stage: priors are fitted to the posterior, and nothing else changes."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

pytest.importorskip("lightning")

from seqdisent import MarkovChain, MixturePrior  # noqa: E402
from seqdisent.training import refit_priors, start_priors  # noqa: E402

QUIET = {"progress_bar": False, "accelerator": "cpu", "arguments": lambda x: (x,)}


class Clustered(nn.Module):
    """A static latent that has two clusters, and a chain whose first step depends on it."""

    def __init__(self):
        super().__init__()
        self.s, self.z = MixturePrior(1, 2), MixturePrior(1, 2, context_dim=1)
        self.scale = nn.Parameter(torch.ones(()))

    def model(self, x):
        with pyro.plate("sequences", len(x)):
            s = pyro.sample("s", self.s())
            z = pyro.sample("z", MarkovChain(self.z(s), lambda z: dist.Normal(z, 0.1).to_event(1), x.shape[1]))
            pyro.sample("x", dist.Normal(z, self.scale).to_event(2), obs=x)

    def guide(self, x):
        with pyro.plate("sequences", len(x)):
            s = pyro.sample("s", dist.Normal(x[:, 0].sign() * 5, 0.5).to_event(1))
            pyro.sample(
                "z",
                MarkovChain(dist.Normal(3 - s, 0.1).to_event(1), lambda z: dist.Normal(z, 0.1).to_event(1), x.shape[1]),
            )


def draw(generator):
    return torch.randn(64, 3, 1, generator=generator)


def build():
    torch.manual_seed(0)
    network = Clustered()
    return network, {"s": network.s, "z": network.z}


def test_refitting_wins_what_there_is_to_win(tmp_path):
    network, priors = build()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    rate = [parameter.requires_grad for parameter in network.parameters()]
    won = refit_priors(network, network.model, network.guide, draw, priors, tmp_path, num_steps=300, **QUIET)
    assert [parameter.requires_grad for parameter in network.parameters()] == rate
    assert torch.equal(network.scale, before["scale"])
    assert not torch.equal(network.s.loc, before["s.loc"])
    for site in ("s", "z"):
        assert won[site].before > won[site].after + 5
    # what is left: log 2 of s, since both clusters are equally likely, and of z_1 - (3 - s) nothing but its spread
    x = draw(torch.Generator().manual_seed(1))
    trace = pyro.poutine.trace(network.guide).get_trace(x)
    s = trace.nodes["s"]["value"]
    kl = (trace.nodes["s"]["fn"].log_prob(s) - network.s().log_prob(s)).mean().item()
    assert 0.5 < kl < 0.9
    other = trace.nodes["z"]["value"][:, 0]
    assert (dist.Normal(3 - s, 0.1).to_event(1).log_prob(other) - network.z(s).log_prob(other)).mean() < 1.5


def test_modes_come_back_and_nothing_else_moves(tmp_path):
    network, priors = build()
    network.norm = nn.BatchNorm1d(1)
    inner = network.guide
    network.train()
    network.s.eval()
    refit_priors(
        network,
        network.model,
        lambda x: (network.norm(x[:, 0]), inner(x))[1],
        draw,
        priors,
        tmp_path,
        num_steps=2,
        **QUIET,
    )
    assert network.training
    assert network.norm.training
    assert not network.s.training
    assert network.norm.running_mean.item() == 0


def test_held_out_batches_are_measured_where_they_are_given(tmp_path):
    found = []
    for run, measured in (("a", None), ("b", lambda generator: draw(generator) + 50)):
        network, priors = build()
        found.append(
            refit_priors(
                network,
                network.model,
                network.guide,
                draw,
                priors,
                tmp_path / run,
                num_steps=1,
                measured=measured,
                **QUIET,
            )
        )
    assert found[0] != found[1]


def test_what_cannot_start_draws_nothing():
    def draw(generator):
        raise AssertionError("drawn")

    start_priors(lambda x: None, draw, {"z": nn.Linear(1, 1)})


def test_no_prior_to_refit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="priors: is empty"):
        refit_priors(nn.Linear(1, 1), None, None, None, {}, tmp_path)


def test_a_module_that_the_model_does_not_read_is_refused(tmp_path):
    network, priors = build()
    network.other = MixturePrior(1, 2)
    for unread in (network.other, nn.Identity()):
        with pytest.raises(ValueError, match="priors: the model's 'z' does not read this module"):
            refit_priors(network, network.model, network.guide, draw, {"s": network.s, "z": unread}, tmp_path, **QUIET)


def test_priors_start_from_samples_of_their_sites():
    network, priors = build()
    start_priors(network.guide, draw, priors, num_samples=500, arguments=QUIET["arguments"])
    assert network.s.loc.flatten().sort().values.tolist() == pytest.approx([-5, 5], abs=0.3)
    assert network.z.loc.flatten().sort().values.tolist() == pytest.approx([-2, 8], abs=0.3)  # of the first step


def test_random_state_is_kept_and_one_seed_gives_one_result(tmp_path):
    found = []
    for run in ("a", "b"):
        network, priors = build()
        state = torch.get_rng_state()
        found.append(
            refit_priors(network, network.model, network.guide, draw, priors, tmp_path / run, num_steps=3, **QUIET)
        )
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]


def test_a_site_that_the_model_lacks_is_named(tmp_path):
    network, _ = build()
    with pytest.raises(ValueError, match=r"priors: .* no latent site \['d'\], expected some of \['s', 'z'\]"):
        refit_priors(network, network.model, network.guide, draw, {"d": network.s}, tmp_path, **QUIET)


def test_a_module_of_another_network_is_refused(tmp_path):
    network, _ = build()
    with pytest.raises(ValueError, match=r"priors: 's' has parameters that `network` does not own"):
        refit_priors(network, network.model, network.guide, draw, {"s": MixturePrior(1, 2)}, tmp_path, **QUIET)
