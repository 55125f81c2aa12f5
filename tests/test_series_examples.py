"""The examples of vowels, imputation and switching dynamics: their parts, and each run at a tiny size."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from commands import run_here
from strategies import mask_of

from seqdisent import elbo_terms

for needed in ("lightning", "sklearn", "torchmetrics"):
    pytest.importorskip(needed)
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def vowels():
    return importlib.import_module("vowels")


@pytest.fixture(scope="module")
def imputation():
    return importlib.import_module("imputation")


# Measures and holes


@pytest.mark.parametrize("seed", range(5))
def test_equal_error_rate_is_where_both_errors_are_equal(vowels, seed):
    generator = torch.Generator().manual_seed(seed)
    speaker = torch.randint(4, (40,), generator=generator)
    codes = torch.eye(4)[speaker] + 0.7 * torch.randn(40, 4, generator=generator)
    same, other = [], []
    for i in range(40):
        for j in range(i + 1, 40):
            cosine = float(torch.cosine_similarity(codes[i], codes[j], dim=0))
            (same if speaker[i] == speaker[j] else other).append(cosine)
    errors = []
    for threshold in same + other:
        missed, accepted = sum(c < threshold for c in same) / len(same), sum(c >= threshold for c in other) / len(other)
        errors.append((abs(missed - accepted), (missed + accepted) / 2))
    assert vowels.equal_error_rate(codes, speaker) == pytest.approx(min(errors)[1], abs=2 / len(same))
    assert vowels.equal_error_rate(torch.eye(4)[speaker], speaker) == 0


@pytest.mark.parametrize("kind", ["values", "blocks", "outages"])
def test_holes_are_of_their_kind_and_share(imputation, kind):
    generator = torch.Generator().manual_seed(0)
    hidden = imputation.hide(kind, torch.ones(300, 80, 6, dtype=torch.bool), generator)
    # a share of draws that are independent in no more than 10 steps and 6 coordinates: 4 standard errors
    num_independent = hidden.numel() / {"values": 1, "blocks": 10, "outages": 60}[kind]
    assert hidden.float().mean().item() == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / num_independent) ** 0.5)
    if kind != "values":
        for column in hidden.transpose(1, 2).flatten(0, 1).tolist():
            inside = "".join("x" if hole else " " for hole in column).strip("x").split()  # the ends cut blocks off
            assert all(len(run) >= 10 for run in inside)
    if kind == "outages":
        assert torch.equal(hidden.any(-1), hidden.all(-1))


@pytest.mark.parametrize("kind", ["values", "blocks", "outages"])
def test_only_what_was_measured_is_hidden_and_something_is_left(imputation, kind):
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(500, 7, 2, generator=generator) < 0.4
    seen[:, 0, 0] = True
    hidden = imputation.hide(kind, seen, generator)
    assert hidden.any()
    assert not (hidden & ~seen).any()
    assert (seen & ~hidden).flatten(1).any(1).all()


def test_interpolation_is_linear_inside_and_constant_outside(imputation):
    nan = torch.nan
    x = torch.tensor([[[nan, nan], [1.0, nan], [nan, nan], [nan, nan], [4.0, nan], [nan, nan]]])
    filled = imputation.interpolated(x, torch.ones(1, 6, dtype=torch.bool), ~x.isnan())[0, 0]
    assert filled[:, 0].tolist() == [1, 1, 2, 3, 4, 4]
    assert filled[:, 1].tolist() == [0] * 6  # never measured: the mean of standardised values


# Models

MASK = mask_of([6, 3, 4])


def networks(vowels, imputation):
    torch.manual_seed(0)
    series = imputation.Series(3, 4, 5, 8).eval()
    for last in (series.emission[-1], series.correction[-1]):  # else nothing before them has a gradient
        torch.nn.init.normal_(last.weight)
    return {
        "vowels": vowels.Utterances(3, 5, 2),
        "vowels without s": vowels.Utterances(3, 0, 2),
        "imputation": series,
    }


def observed_of(name, generator):
    return (torch.rand(3, 6, 3, generator=generator) < 0.7,) if name == "imputation" else ()


@pytest.mark.parametrize("name", ["vowels", "vowels without s", "imputation"])
def test_padding_and_holes_change_no_value_and_no_gradient(vowels, imputation, name):
    network, generator = networks(vowels, imputation)[name].double(), torch.Generator().manual_seed(0)
    observed = observed_of(name, generator)
    x = torch.randn(3, 6, 3, generator=generator, dtype=torch.float64)

    def run(filler):
        unread = ~MASK.unsqueeze(-1).expand_as(x) if not observed else ~(observed[0] & MASK.unsqueeze(-1))
        network.zero_grad()
        torch.manual_seed(1)
        bound = elbo_terms(network.model, network.guide, x.masked_fill(unread, filler), MASK, *observed).elbo()
        bound.sum().backward()
        return bound.detach(), {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}

    wanted, wanted_gradients = run(0.0)
    assert all(gradient.any() for gradient in wanted_gradients.values())
    assert len(wanted_gradients) == len(list(network.parameters()))
    for filler in (1e6, torch.nan):
        found, gradients = run(filler)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(gradients, wanted_gradients)


def test_the_posterior_is_exact_before_the_networks_say_anything(imputation):
    generator = torch.Generator().manual_seed(0)
    network = imputation.Series(3, 4, 5, 8).double().eval()
    with torch.no_grad():
        network.offset.normal_()
        for layer in (network.first, network.level):  # s changes nothing
            layer.weight.zero_()
            layer.bias.zero_()
    linear = imputation.LinearGaussian(3, 4).double()
    linear.load_state_dict({name: network.state_dict()[name] for name in linear.state_dict()})
    x = torch.randn(3, 6, 3, generator=generator, dtype=torch.float64)
    observed = torch.rand(3, 6, 3, generator=generator) < 0.7
    terms = [elbo_terms(of.model, of.guide, x, MASK, observed, kl="monte-carlo") for of in (network, linear)]
    found, wanted = (of.log_likelihood["x"] - of.kl["z"] for of in terms)
    torch.testing.assert_close(found, wanted)  # the evidence, whatever was drawn


# Switching dynamics


@pytest.fixture(scope="module")
def slds():
    return importlib.import_module("slds")


def test_regimes_are_matched_by_the_names_that_make_most_right(slds):
    known = torch.tensor([[0, 0, 1, 1, 2, 2]])
    assert slds.matched(torch.tensor([[2, 2, 0, 0, 0, 1]]), known).tolist() == [[0, 0, 1, 1, 1, 2]]


@pytest.mark.parametrize("name", ["ball", "lorenz"])
def test_paths_switch_where_their_regimes_do(slds, name):
    path, known = getattr(slds, name)(8, torch.Generator().manual_seed(0))
    assert path.shape[:2] == known.shape == (8, slds.NUM_STEPS)
    assert path.isfinite().all()
    step = path.diff(dim=1)
    if name == "ball":  # each direction is the sign of the move into its step, but for noise of a tenth of it
        right = (step > 0).long() @ torch.tensor([1, 2])
        assert (right == known[:, 1:]).float().mean() > 0.99
        assert path.abs().max() < 1.3
        assert known.diff(dim=1).bool().any(1).all()  # every ball bounces
    else:
        assert 0.3 < known.float().mean() < 0.7
        assert step.abs().max() < 1.5


@pytest.mark.parametrize("filler", [1e6, torch.nan])
def test_padding_of_a_switching_system_changes_no_value_and_no_gradient(slds, filler):
    torch.manual_seed(0)
    network = slds.SLDS(3, 2, 2).double()
    for part in (network.correction[-1].weight, network.offsets):
        torch.nn.init.normal_(part)
    x = torch.randn(3, 6, 3).double()

    def run(filler):
        network.zero_grad()
        torch.manual_seed(1)
        padded = torch.where(MASK.unsqueeze(-1), x, filler)
        bound = elbo_terms(network.model, network.guide, padded, MASK).elbo()
        bound.sum().backward()
        return bound.detach(), {n: p.grad.clone() for n, p in network.named_parameters()}

    wanted, wanted_gradients = run(0.0)
    found, gradients = run(filler)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients, wanted_gradients)
    assert all(gradient.any() for gradient in gradients.values())


def test_a_switching_system_starts_at_principal_components(slds):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 50, 2, generator=generator)
    x = z @ torch.randn(2, 10, generator=generator) + 3.0
    network = slds.SLDS(10, 2, 3)
    path = slds.principal(network, x)
    torch.testing.assert_close(path.flatten(0, 1).T.cov(correction=0), torch.eye(2), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(network.emission(path), x, rtol=1e-3, atol=1e-3)


def test_a_switching_system_runs(tmp_path):
    asked = ["--data", "lorenz", "--seeds", 0, "--num-steps", 3]
    done = run_here(EXAMPLES / "slds.py", tmp_path / "run", *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(found) == {"k-means of differences", "autoregressive HMM", "SLDS"}
    assert all(0.5 <= each[0] <= 1 for each in found.values())  # two regimes, matched
    assert (tmp_path / "run" / "regimes-0.png").is_file()


# Runs


@pytest.mark.parametrize(
    ("name", "arguments", "rows"),
    [
        ("vowels", [], {"s, with s", "z, with s", "z, without s", "mean of x", "supervised"}),
        ("imputation", ["--num-samples", "2"], {"interpolation", "linear-Gaussian", "static code and chain"}),
    ],
)
def test_an_example_runs(tmp_path, data_root, name, arguments, rows):
    if not (data_root / "japanese_vowels").is_dir():
        pytest.skip("the folder of data has no japanese_vowels")
    done = run_here(EXAMPLES / f"{name}.py", tmp_path / "run", "--seeds", 0, "--num-steps", 4, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(json.loads((tmp_path / "run" / "metrics.json").read_text())) == rows
