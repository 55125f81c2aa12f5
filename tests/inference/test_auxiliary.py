"""Losses beside the bound: by hand, with particles, under every objective."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine.messenger import Messenger
from torch.testing import assert_close

from seqdisent import DecomposedELBO, elbo_terms

LOC = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
X = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)


def model(x, shift=0.0):
    with pyro.plate("sequences", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def guide(x, shift=0.0):
    with pyro.plate("sequences", len(x)):
        pyro.sample("z", dist.Normal(LOC, 0.5))


def far(drawn, x, shift=0.0):
    """A value for each sequence, also with particles on the left."""
    return (drawn["z"].value - x - shift).square()


def ledger(losses=None, **options):
    torch.manual_seed(0)
    return elbo_terms(model, guide, X, auxiliary_losses={"far": far} if losses is None else losses, **options)


WAYS = [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}]


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("objective", ["elbo", "stl", "iwae", "dreg"])
def test_the_bound_is_less_by_the_weighted_loss(objective, options):
    terms, plain = ledger(objective=objective, **options), ledger({}, objective=objective, **options)
    loss = terms.auxiliary_losses["far"]
    assert loss.shape == ((3, 3) if options else (3,))
    by_hand = loss.mean(0) if options else loss
    assert_close(terms.bound({"far": 0.3}), plain.bound() - 0.3 * by_hand)
    assert_close(terms.bound(), plain.bound() - by_hand)
    assert_close(terms.penalty({"far": 0.3}), 0.3 * by_hand)
    assert_close(terms.elbo(), plain.elbo())  # no part of it
    (of_bound,) = torch.autograd.grad(terms.bound({"far": 0.3}).sum(), LOC, retain_graph=True)
    (of_loss,) = torch.autograd.grad(by_hand.sum(), LOC)
    (without,) = torch.autograd.grad(plain.bound().sum(), LOC)
    assert of_loss.abs().min() > 0.1
    assert_close(of_bound, without - 0.3 * of_loss)


class Names(Messenger):
    """Notes the sites that come by."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def _pyro_sample(self, msg):
        self.seen.add(msg["name"])


def test_a_loss_gets_what_was_drawn_and_what_the_programs_are_given():
    seen = []

    def loss(drawn, *args, **kwargs):
        seen.append((drawn, args, kwargs))
        pyro.sample("noise", dist.Normal(0.0, 1.0))  # is no site of the programs
        return drawn["z"].value.exp()

    torch.manual_seed(0)
    with Names() as names:
        terms = elbo_terms(model, guide, X, shift=2.0, auxiliary_losses={"one": loss, "far": far})
    assert names.seen == {"sequences", "z", "x"}
    ((drawn, args, kwargs),) = seen
    assert [*drawn] == ["z"]
    assert args == (X,)
    assert kwargs == {"shift": 2.0}
    assert [*terms.auxiliary_losses] == ["one", "far"]
    assert_close(terms.auxiliary_losses["far"], (drawn["z"].value - X - 2.0).square())
    weights = {"one": 0.5, "z": 0.1, "x": 2.0}
    sites = {"z": 0.1, "x": 2.0}
    assert_close(
        terms.bound(weights), terms.elbo(sites) - 0.5 * drawn["z"].value.exp() - (drawn["z"].value - X - 2.0).square()
    )
    assert "auxiliary_loss['one']=" in repr(terms)


def test_without_losses_nothing_is_subtracted():
    terms = ledger({})
    assert terms.auxiliary_losses == {}
    assert_close(terms.penalty(), torch.zeros(3))


def test_a_loss_may_leave_out_the_particles():
    terms = ledger({"of x": lambda drawn, x: x**2}, num_particles=2, vectorize_particles=True)
    assert_close(terms.penalty(), X**2)


def test_a_loss_that_is_not_finite_is_named():
    def loss(drawn, x):
        return torch.where(x == 0, torch.nan, drawn["z"].value)

    with pytest.raises(FloatingPointError, match=r"^auxiliary_loss\['bad'\] is nan at training step 7 \(sequence 1\)$"):
        ledger({"bad": loss}).check_finite(7)
    with pytest.raises(FloatingPointError, match=r"\(particle 0, sequence 1\)$"):
        ledger({"bad": loss}, num_particles=2).check_finite()


def test_the_loss_of_svi_is_more_by_the_weighted_one():
    options = {"auxiliary_losses": {"far": far}, "weights": {"far": 0.3, "z": 0.5}}
    torch.manual_seed(0)
    found = DecomposedELBO(**options).differentiable_loss(model, guide, X)
    terms = ledger()
    assert_close(found, -(terms.elbo({"z": 0.5}) - 0.3 * terms.auxiliary_losses["far"]).sum())
    DecomposedELBO(objective="iwae", auxiliary_losses={"far": far}, weights={"far": 0.3})  # no weight of a site


@pytest.mark.parametrize(
    ("losses", "options", "error", "message"),
    [
        ({"far": 3.0}, {}, TypeError, r"^auxiliary_losses\['far'\]: got float, expected a function"),
        ({"z": far}, {}, ValueError, r"^auxiliary_losses: \['z'\] are sites"),
        ({"far": far}, {"objective": "fivo", "num_particles": 2}, ValueError, "^auxiliary_losses: .*fivo"),
        ({"far": lambda *_: 1.0}, {}, ValueError, r"^auxiliary_losses\['far'\]: returned float, expected \(3,\)"),
        ({"far": lambda *_: torch.ones(())}, {}, ValueError, r"returned shape \(\), expected \(3,\), a value for each"),
        (
            {"far": lambda *_: torch.ones(2)}, {"num_particles": 2, "vectorize_particles": True}, ValueError,
            r"returned shape \(2,\), expected \(2, 3\) or \(3,\)",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_loss_is_said(losses, options, error, message):
    with pytest.raises(error, match=message):
        ledger(losses, **options)


def test_a_weight_has_the_name_of_a_site_or_a_loss():
    terms = ledger()
    with pytest.raises(ValueError, match=r"no site \['far'\]"):
        terms.elbo({"far": 1.0})
    with pytest.raises(ValueError, match=r"no site \['nothing'\] .* or of the auxiliary losses \['far'\]$"):
        terms.bound({"nothing": 1.0})
    with pytest.raises(ValueError, match=r"^weights: no auxiliary loss \['z'\], expected some of \['far'\]$"):
        terms.penalty({"z": 1.0})
    with pytest.raises(ValueError, match=r"^weights\['far'\]: got nan"):
        terms.bound({"far": float("nan")})
