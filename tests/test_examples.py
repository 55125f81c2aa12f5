"""The field's models in examples/: each assembled from the blocks, at a tiny size, and as a person runs it."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from reference import kalman_log_evidence
from strategies import mask_of

from seqdisent import elbo_terms, forecast, generate, infer, reconstruct, swap

EXAMPLES = Path(__file__).parent.parent / "examples"
for needed in ("lightning", "matplotlib", "torchmetrics"):
    pytest.importorskip(needed)
MODELS = [
    ("dmm", {}), ("dmm", {"num_flows": 1}), ("vrnn", {}), ("srnn", {}), ("rssm", {}), ("dsvae", {}),
    ("dsvae", {"full": True}), ("kalman_vae", {}), ("speakers", {}),
]  # fmt: skip
NAMES = [f"{name}{'-' + next(iter(sizes)) if sizes else ''}" for name, sizes in MODELS]


@pytest.fixture(scope="module", autouse=True)
def examples_on_the_path():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def example_of(name):
    return importlib.import_module(name).EXAMPLE


@pytest.fixture(params=MODELS, ids=NAMES)
def built(request):
    """An example, its network in float64 and three ragged sequences that fit it."""
    name, sizes = request.param
    example = example_of(name)
    (plan,) = example.presets["tiny"].values()
    shape = {"dmm": (88,), "vrnn": (88,), "srnn": (88,), "speakers": (96,)}.get(name, (3, 8, 8))
    sizes = {**plan.sizes, **sizes}
    if len(shape) == 3:
        sizes |= {"encoder": (4,), "decoder": (4,)}
    network = example.network(shape, sizes).double()
    frames = torch.rand(3, 5, *shape, dtype=torch.float64)
    return example, network, (frames if len(shape) == 3 or name == "speakers" else frames.round())


@pytest.fixture
def double_by_default():
    """Pyro's inverse of an autoregressive flow starts from zeros of the default dtype, whatever the flow's is."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


MASK = mask_of([5, 2, 4])


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "ragged"])
def test_ledger_is_pyros_bound(built, mask, double_by_default):
    _, network, frames = built
    torch.manual_seed(1)
    ours = elbo_terms(network.model, network.guide, frames, mask, kl="monte-carlo").elbo().sum().item()
    torch.manual_seed(1)
    assert -Trace_ELBO().loss(network.model, network.guide, frames, mask) == pytest.approx(ours, rel=1e-10)
    assert not list(pyro.get_param_store().keys())


@pytest.mark.parametrize("content", [1e6, float("nan")])
def test_padding_changes_no_value_and_no_gradient(built, content):
    _, network, frames = built

    def run(padding):
        filled = frames.clone()
        filled[~MASK] = padding
        network.zero_grad()
        torch.manual_seed(1)
        bound = elbo_terms(network.model, network.guide, filled, MASK).elbo()
        bound.sum().backward()
        return bound.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    wanted, wanted_gradients = run(0.0)
    found, gradients = run(content)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients, wanted_gradients)


def test_every_parameter_is_trained(built):
    _, network, frames = built
    elbo_terms(network.model, network.guide, frames).elbo().sum().backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]


@torch.no_grad()
def test_interventions_need_no_code_of_the_models_own(built):
    example, network, frames = built
    shape, given = frames.shape[2:], (frames, MASK)
    sample = bool(getattr(network, "flows", None))  # a flow has no mean
    assert reconstruct(network.model, network.guide, *given, sample=sample)["x"].mean.shape == (3, 5, *shape)
    assert generate(network.model, num_sequences=2, num_steps=7)["x"].mean.shape == (2, 7, *shape)
    future = forecast(network.model, network.guide, *given, num_steps=4, sample=sample)["x"].mean
    assert future.shape == (3, 9, *shape)
    assert future.isfinite().all()
    if not example.static:
        return
    own, other = (infer(network.guide, *args) for args in (given, (frames.flip(0), MASK.flip(0))))
    assert set(own) == {*example.static, *example.motion}
    for sites in (example.static, example.motion):
        swapped = swap(network.model, network.guide, given, (frames.flip(0), MASK.flip(0)), sites=sites)["x"].mean
        assert (swapped != reconstruct(network.model, network.guide, *given)["x"].mean).any()
        values = {name: (other if name in sites else own)[name].value for name in own}
        if not getattr(network, "full", False):  # there z is inferred again, given the other's f
            wanted = generate(network.model, num_sequences=3, num_steps=5, given=values, sample=False)["x"].mean
            torch.testing.assert_close(swapped, wanted)


@pytest.mark.parametrize("ragged", [False, True])
def test_kalman_evidence_is_the_filters_whatever_z_was_drawn(ragged):
    kalman = importlib.import_module("kalman_vae")
    network = kalman.KalmanVAE((3, 8, 8), latent_dim=4, code_dim=3, feature_dim=5, encoder=(4,), decoder=(4,)).double()
    frames = torch.rand(3, 5, 3, 8, 8, dtype=torch.float64)
    mask = MASK if ragged else None
    torch.manual_seed(1)
    terms = elbo_terms(network.model, network.guide, frames, mask, kl="monte-carlo")
    torch.manual_seed(1)
    a = infer(network.guide, frames, mask, sample=True)["a"]
    log_q = a.distribution.log_prob(a.value)
    found = log_q - terms.kl["a"] - terms.kl["z"]  # log p(a, z) - log q(z | a)
    noise = {name: network.scale(name).square().diag() for name in network.noises}
    step, seen = (network.dynamics, torch.zeros(4).double(), noise["z"]), (
        network.reading, torch.zeros(3).double(), noise["a"]
    )  # fmt: skip
    for n, length in enumerate([5, 2, 4] if ragged else [5, 5, 5]):
        wanted = kalman_log_evidence(torch.zeros(4).double(), noise["z_1"], [step] * length, seen, a.value[n, :length])
        assert found[n].item() == pytest.approx(wanted.item(), abs=1e-6)


def test_actions_drive_the_state():
    rssm = importlib.import_module("rssm")
    network = rssm.RSSM((3, 8, 8), 3, 6, 5, 4, action_dim=2, encoder=(4,), decoder=(4,)).double()
    frames = torch.rand(2, 5, 3, 8, 8, dtype=torch.float64)
    actions = torch.rand(2, 9, 2, dtype=torch.float64)  # they cover what is forecast
    torch.manual_seed(1)
    terms = elbo_terms(network.model, network.guide, frames, actions=actions)
    moved = actions.clone()
    moved[0, 2] += 1.0
    torch.manual_seed(1)
    changed = elbo_terms(network.model, network.guide, frames, actions=moved).kl_per_step["z"] != terms.kl_per_step["z"]
    # what is done at step 2 is known from step 3 on
    assert changed.tolist() == [[False, False, False, True, True], [False] * 5]
    options = {"num_steps": 4, "sample": False}
    first, second = (
        forecast(network.model, network.guide, frames, actions=given, **options)["x"].mean for given in (actions, moved)
    )
    assert first.shape == (2, 9, 3, 8, 8)
    torch.testing.assert_close(first[1], second[1])
    assert (first[0, 5:] != second[0, 5:]).any()


def test_balanced_bound_has_the_ledgers_value_and_other_gradients():
    rssm = importlib.import_module("rssm")
    network = rssm.RSSM((3, 8, 8), 3, 6, 5, 4, encoder=(4,), decoder=(4,)).double()
    frames = torch.rand(3, 5, 3, 8, 8, dtype=torch.float64)

    def gradients(bound):
        network.zero_grad()
        bound.sum().backward()
        return [network.prior[-1].loc.weight.grad.clone(), network.posterior[-1].loc.weight.grad.clone()]

    terms = elbo_terms(network.model, network.guide, frames, MASK)
    balanced = rssm.balanced_bound(terms, {"z": 0.7}, free_nats=0.0)
    torch.testing.assert_close(balanced, terms.elbo({"z": 0.7}))
    clipped = rssm.balanced_bound(terms, {}, free_nats=1e3)
    steps = MASK.sum(1)
    torch.testing.assert_close(clipped, terms.log_likelihood["x"] - 1e3 * steps)
    kl = {share: [] for share in (0.0, 0.8, 1.0)}
    for share, found in kl.items():
        torch.manual_seed(1)
        terms = elbo_terms(network.model, network.guide, frames, MASK)
        found += gradients(rssm.balanced_bound(terms, {}, to_prior=share, free_nats=0.0) - terms.log_likelihood["x"])
    for none, some, whole in zip(kl[0.0], kl[0.8], kl[1.0], strict=True):
        torch.testing.assert_close(some, 0.2 * none + 0.8 * whole)
    assert (kl[0.0][0] == 0).all()  # with nothing for it, the prior's head has no gradient


def test_voices_swap_as_the_renderer_says():
    speakers = importlib.import_module("speakers")
    clips = speakers.signals(48, seed=1)
    rows = torch.arange(48)
    torch.testing.assert_close(clips.true_swap(rows, rows), clips.frames, rtol=0, atol=0)
    swapped = clips.true_swap([0, 1], [1, 0]).float() - 127.5
    # the contour of the one: its loudness at every step; the voice of the other: its spectrum
    loudness = [clip.float().sub(127.5).square().sum(-1) for clip in clips.frames[:2]]
    assert torch.corrcoef(torch.stack([swapped[0].square().sum(-1), loudness[1]]))[0, 1] > 0.95
    assert clips.labels["speed"].tolist() == [0] * 12 + [1] * 12 + [0] * 12 + [1] * 12
    assert (speakers.signals(48, seed=2).frames != clips.frames).any()


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rssm", ["--image-size", 16]), ("dsvae", ["--image-size", 16, "--full"]), ("kalman_vae", ["--image-size", 16]),
        ("speakers", []),
    ],
)  # fmt: skip
def test_command_line_of_models_of_clips(tmp_path, name, arguments):
    done = run(name, "--preset", "tiny", "--run-dir", tmp_path / "run", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    swapped = {"swapped", "motion_swapped"} if example_of(name).static else set()
    assert metrics["mean_squared_error"].keys() == {"reconstruction", "roll_out", "mean_frame"} | swapped
    for line in done.stdout.split("wrote")[1].split():
        assert Path(line).stat().st_size > 0
    if name in ("rssm", "kalman_vae"):
        assert run(name, "generate", tmp_path / "run", "--num-steps", 3).returncode == 0
        refused = run(name, "swap", tmp_path / "run", "--content", "a", "--motion", "b")
        assert "no static latent" in refused.stderr
        assert "Traceback" not in refused.stderr
        refused = run(name, "evaluate", tmp_path / "run")
        assert "no static latent" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), [("dmm", []), ("dmm", ["--flow"]), ("vrnn", []), ("srnn", [])])
def test_command_line_of_models_of_chorales(tmp_path, data_root, name, arguments):
    done = run(name, "--preset", "tiny", "--run-dir", tmp_path / "run", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    estimates = {"bound per step", "mean of pieces' bounds", "importance-sampled"}
    assert estimates <= metrics["test"].keys() == metrics["valid"].keys()
    assert metrics["test"]["importance-sampled"] < metrics["test"]["bound per step"]
    assert (tmp_path / "run" / "rolls.png").stat().st_size > 0
    assert ("num_flows" in json.loads((tmp_path / "run" / "config.json").read_text())["plan"]["sizes"]) == bool(
        arguments
    )
