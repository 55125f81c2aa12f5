"""The field's models in examples/: each assembled from the blocks, at a tiny size, and as a person runs it."""

import importlib
import json
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
import yaml
from commands import run_here, starts_alone
from half_precision import runs_lstm
from pyro import poutine
from pyro.infer import Trace_ELBO
from reference import kalman_log_evidence
from strategies import mask_of

from seqdisent import IndependentSteps, elbo_terms, forecast, generate, infer, reconstruct, swap
from seqdisent.chains.factorised import as_chain
from seqdisent.datasets import Clips
from seqdisent.inference import Inferred

EXAMPLES = Path(__file__).parent.parent / "examples"
for needed in ("lightning", "matplotlib", "torchmetrics"):
    pytest.importorskip(needed)
MODELS = [
    ("dmm", {}), ("dmm", {"num_flows": 1}), ("vrnn", {}), ("srnn", {}), ("rssm", {}), ("dsvae", {}),
    ("dsvae", {"full": True}), ("cdsvae", {}), ("s3vae", {}), ("dbse", {}), ("kalman_vae", {}),
    ("speakers", {}),
]  # fmt: skip
NAMES = [f"{name}{'-' + next(iter(sizes)) if sizes else ''}" for name, sizes in MODELS]


def example_of(name):
    return importlib.import_module(name).EXAMPLE


@pytest.fixture(params=MODELS, ids=NAMES)
def built(request):
    """An example, its network in float64 and three ragged sequences that fit it."""
    name, sizes = request.param
    torch.manual_seed(0)
    example = example_of(name)
    shape = {"dmm": (88,), "vrnn": (88,), "srnn": (88,), "speakers": (96,)}.get(name, (3, 8, 8))
    sizes = {**example.preset("tiny").sizes, **sizes}
    if len(shape) == 3:
        sizes |= {"encoder": (4,), "decoder": (4,)}
    network = example.build(shape, sizes).double()
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
    losses = {name: getattr(network, name) for name in getattr(network, "losses", ())}
    terms = elbo_terms(network.model, network.guide, frames, auxiliary_losses=losses)
    (terms.elbo() - terms.penalty()).sum().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


# The steps t whose conditional sees the frame of step j: of q(z_t | ...), of p(z_t | ...) and p(x_t | ...)
NEVER = lambda t, j: False  # noqa: E731
SEEN_BY = {
    "dmm": (lambda t, j: t <= j, NEVER),  # x_{t:T}
    "vrnn": (lambda t, j: t >= j, lambda t, j: t > j),  # x_{1:t}; x_{<t}
    "srnn": (lambda t, j: True, lambda t, j: t > j),  # all; x_{<t}
    "rssm": (lambda t, j: t == j, NEVER),  # given z, x_t alone
    "dsvae": (lambda t, j: t == j, NEVER),
    "dsvae-full": (lambda t, j: True, NEVER),
    "cdsvae": (lambda t, j: t == j, NEVER),
    "s3vae": (lambda t, j: t == j, NEVER),
    "dbse": (lambda t, j: True, NEVER),  # all, minus the first
    "kalman_vae": (NEVER, NEVER),  # the codes are all that z sees
    "speakers": (lambda t, j: t == j, NEVER),
}


@pytest.mark.parametrize("built", [m for m in MODELS if "num_flows" not in m[1]], indirect=True,
                         ids=[name for name in NAMES if name != "dmm-num_flows"])  # fmt: skip
@torch.no_grad()
def test_each_step_sees_the_frames_that_it_should(built, request):
    _, network, frames = built
    network.eval()  # without dropout
    by_q, by_p = SEEN_BY[request.node.callspec.id]
    values = {name: site.value for name, site in infer(network.guide, frames).items()}

    def conditionals(frames):
        given = poutine.condition(network.guide, values), poutine.condition(network.model, values)
        guide, model = (poutine.trace(program).get_trace(frames).nodes for program in given)
        densities = [as_chain(nodes["z"]["fn"]).log_prob_per_step(values["z"]) for nodes in (guide, model)]
        return [*densities, model["x"]["fn"].mean.flatten(2).sum(-1)]

    before = conditionals(frames)
    for j in range(5):
        moved = frames.clone()
        moved[:, j] = 1 - moved[:, j]
        for now, then, sees in zip(conditionals(moved), before, (by_q, by_p, by_p), strict=True):
            seen = ((now - then).abs() > 1e-12).any(0)  # in some sequence: a ReLU of a few units may be dead in another
            assert seen.tolist() == [sees(t, j) for t in range(5)]


@torch.no_grad()
def test_one_frame_is_a_sequence(built):
    _, network, frames = built
    sample = bool(getattr(network, "flows", None))  # a flow has no mean
    assert elbo_terms(network.model, network.guide, frames[:, :1]).elbo().isfinite().all()
    future = forecast(network.model, network.guide, frames[:, :1], num_steps=2, sample=sample)["x"].mean
    assert future.shape == (3, 3, *frames.shape[2:])


@torch.no_grad()
def test_particles_are_drawn_in_one_run(built):
    _, network, frames = built
    terms = elbo_terms(network.model, network.guide, frames, MASK, num_particles=4, vectorize_particles=True)
    assert {name: term.shape for name, term in terms.kl.items()} == dict.fromkeys(terms.kl, (4, 3))
    assert terms.log_likelihood["x"].unique().numel() == 12
    spread = terms.log_likelihood["x"].std(0)
    singles = torch.stack([
        elbo_terms(network.model, network.guide, frames, MASK).log_likelihood["x"] for _ in range(30)
    ])  # fmt: skip
    assert ((terms.log_likelihood["x"].mean(0) - singles.mean(0)).abs() < 6 * spread + 6 * singles.std(0)).all()


@torch.no_grad()
def test_half_precision_is_near_full(built):
    _, network, frames = built
    if any(isinstance(module, torch.nn.LSTM) for module in network.modules()) and not runs_lstm():
        pytest.skip("this processor has no LSTM in bfloat16")
    network.float()
    bounds = []
    for half in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            bounds.append(elbo_terms(network.model, network.guide, frames.float(), MASK, kl="monte-carlo").elbo())
    assert bounds[1].dtype == torch.float32
    torch.testing.assert_close(bounds[1], bounds[0], rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ["vrnn", "srnn"])
@torch.no_grad()
def test_history_is_read_where_there_is_one(name):
    """What follows some chords depends on the chords themselves, not on the keys that the model would have pressed."""
    example = example_of(name)
    network = example.build((88,), example.preset("tiny").sizes).double()
    frames = torch.rand(3, 5, 88, dtype=torch.float64).round()
    found = reconstruct(network.model, network.guide, frames, history=True)["x"].mean
    z = infer(network.guide, frames)["z"].value
    trained = poutine.trace(poutine.condition(network.model, {"z": z})).get_trace(frames)
    torch.testing.assert_close(found, trained.nodes["x"]["fn"].mean)  # as in training, from the frames before
    how = {"sample": False, "history": example.history}
    rest = forecast(network.model, network.guide, frames, num_steps=3, **how)["x"].mean
    torch.testing.assert_close(rest[:, :5], found)
    alone = forecast(network.model, network.guide, frames[:, :2], num_steps=6, **how)["x"].mean
    ragged = forecast(network.model, network.guide, frames, mask_of([5, 2, 4]), num_steps=3, **how)["x"].mean
    torch.testing.assert_close(ragged[0], rest[0])
    torch.testing.assert_close(ragged[1], alone[1])


@pytest.mark.parametrize("name", ["vrnn", "srnn"])
@torch.no_grad()
def test_what_is_drawn_was_read_back(name):
    """Frames that the model draws by itself have the means that it gives them when they are its data."""
    example = example_of(name)
    network = example.build((88,), example.preset("tiny").sizes).double()
    z = torch.randn(3, 5, network.prior[-1].loc.out_features, dtype=torch.float64)
    drawn = generate(network.model, num_sequences=3, num_steps=5, given={"z": z})
    frames = drawn["x"].sample()
    trained = poutine.trace(poutine.condition(network.model, {"z": z})).get_trace(frames)
    torch.testing.assert_close(drawn["x"].mean, trained.nodes["x"]["fn"].mean)
    assert list(drawn) == ["x"]
    assert 0.2 < frames.mean() < 0.8  # neither the keys of another draw nor none


class Gaussian(torch.nn.Module):
    """z_t ~ N(0, 1), x_t ~ N(z_t, 1), and a posterior that is too wide: all that is estimated of it is known."""

    variance = 0.8  # the posterior's is 1/2

    def model(self, frames, mask):
        with pyro.plate("sequences", len(frames)):
            z = pyro.sample("z", self.steps(torch.zeros_like(frames), 1.0, mask))
            pyro.sample("x", self.steps(z, 1.0, mask), obs=frames)

    def guide(self, frames, mask):
        with pyro.plate("sequences", len(frames)):
            pyro.sample("z", self.steps(frames / 2, self.variance**0.5, mask))

    def steps(self, loc, scale, mask):
        return IndependentSteps(pyro.distributions.Normal(loc, scale).to_event(1), mask)


@pytest.mark.parametrize("at_once", [6, 10_000])
def test_likelihoods_are_those_of_a_model_whose_own_are_known(monkeypatch, at_once):
    chorales = importlib.import_module("chorales")
    frames = torch.zeros(4, 3, 1).byte()
    frames[1] = 255  # of a piece that is shorter than the others, so that it matters what is averaged first
    clips = Clips(frames, lengths=torch.tensor([3, 1, 2, 3]))
    monkeypatch.setattr(chorales, "SAMPLES", 600)
    monkeypatch.setattr(chorales, "STEPS", at_once)
    monkeypatch.setattr(chorales, "STEPS_OF_PARTICLES", 800 * at_once)
    near = torch.tensor([True, False, False, True])
    found, others = chorales.likelihood(Gaussian(), clips, num_particles=800, seeds=[0], near=near)
    x, real, length = frames[..., 0] / 255.0, clips.mask, clips.lengths
    evidence = torch.where(real, -0.25 * x.square() - 0.5 * math.log(4 * math.pi), 0.0).sum(1)
    # of a step: KL(N(x/2, v) || N(x/2, 1/2)), and that from the prior
    gap = 0.5 * (2 * Gaussian.variance - 1 - math.log(2 * Gaussian.variance)) * length
    kl = torch.where(real, 0.5 * (Gaussian.variance + (x / 2).square() - 1 - math.log(Gaussian.variance)), 0.0)
    steps = length.sum().item()
    assert found["importance-sampled"] == pytest.approx(-evidence.sum().item() / steps, abs=0.01)
    assert found["particle filter"] == pytest.approx(-evidence.sum().item() / steps, abs=0.01)
    assert found["bound per step"] == pytest.approx((gap - evidence).sum().item() / steps, abs=0.03)
    assert found["mean of pieces' bounds"] == pytest.approx(((gap - evidence) / length).mean().item(), abs=0.03)
    assert found["KL per step"] == pytest.approx(kl.sum().item() / steps, abs=0.03)
    assert (found["particles"], found["pieces"], others["pieces"]) == (800, 4, 2)
    assert others["importance-sampled"] == pytest.approx(-evidence[1:3].sum().item() / 3, abs=0.01)


def test_estimates_of_several_seeds_are_averaged():
    chorales = importlib.import_module("chorales")
    clips = Clips(torch.zeros(2, 3, 1).byte())
    single = [chorales.likelihood(Gaussian(), clips, num_particles=2, seeds=[seed])[0] for seed in (3, 4, 5)]
    (found,) = chorales.likelihood(Gaussian(), clips, num_particles=2, seeds=[3, 4, 5])
    for name in ("bound per step", "importance-sampled", "particle filter"):
        values = torch.tensor([figures[name] for figures in single], dtype=torch.float64)
        assert found[name] == pytest.approx(values.mean().item())
        assert found[f"{name}, deviation of 3 seeds"] == pytest.approx(values.std().item())
        assert values.std() > 0


@torch.no_grad()
def test_interventions_need_no_code_of_the_models_own(built):
    example, network, frames = built
    shape, given = frames.shape[2:], (frames, MASK)
    how = {"sample": bool(getattr(network, "flows", None)), "history": example.history}  # a flow has no mean
    assert reconstruct(network.model, network.guide, *given, **how)["x"].mean.shape == (3, 5, *shape)
    assert generate(network.model, num_sequences=2, num_steps=7)["x"].mean.shape == (2, 7, *shape)
    future = forecast(network.model, network.guide, *given, num_steps=4, **how)["x"].mean
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


@pytest.mark.parametrize(
    ("dtype", "half", "within"),
    [(torch.float64, False, 1e-6), (torch.float32, False, 1e-3), (torch.float32, True, 1e-3)],
)
@pytest.mark.parametrize("ragged", [False, True])
def test_kalman_evidence_is_the_filters_whatever_z_was_drawn(ragged, dtype, half, within):
    kalman = importlib.import_module("kalman_vae")
    torch.manual_seed(0)
    network = kalman.KalmanVAE((3, 8, 8), latent_dim=4, code_dim=3, feature_dim=5, encoder=(4,), decoder=(4,)).to(dtype)
    frames = torch.rand(3, 5, 3, 8, 8, dtype=dtype)
    mask = MASK if ragged else None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        torch.manual_seed(1)
        terms = elbo_terms(network.model, network.guide, frames, mask, kl="monte-carlo")
        torch.manual_seed(1)
        a = infer(network.guide, frames, mask, sample=True)["a"]
        log_q = a.distribution.log_prob(a.value)
    found = log_q - terms.kl["a"] - terms.kl["z"]  # log p(a, z) - log q(z | a)
    network.double()
    noise = {name: network.scale(name).square().diag() for name in network.noises}
    step, seen = (network.dynamics, torch.zeros(4).double(), noise["z"]), (
        network.reading, torch.zeros(3).double(), noise["a"]
    )  # fmt: skip
    for n, length in enumerate([5, 2, 4] if ragged else [5, 5, 5]):
        wanted = kalman_log_evidence(
            torch.zeros(4).double(), noise["z_1"], [step] * length, seen, a.value[n, :length].double()
        )
        assert found[n].item() == pytest.approx(wanted.item(), abs=within)


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
    signals = importlib.import_module("signals").signals
    clips = signals(48, 12, seed=1)
    rows = torch.arange(48)
    torch.testing.assert_close(clips.true_swap(rows, rows), clips.frames, rtol=0, atol=0)
    swapped = clips.true_swap([0, 1], [1, 0]).float() - 127.5
    # the contour of the one: its loudness at every step; the voice of the other: its spectrum
    loudness = [clip.float().sub(127.5).square().sum(-1) for clip in clips.frames[:2]]
    assert torch.corrcoef(torch.stack([swapped[0].square().sum(-1), loudness[1]]))[0, 1] > 0.95
    assert clips.labels["speed"].tolist() == [0] * 12 + [1] * 12 + [0] * 12 + [1] * 12
    assert (signals(48, 12, seed=2).frames != clips.frames).any()


def run(name, *arguments):
    return run_here(EXAMPLES / f"{name}.py", *arguments)


@pytest.mark.parametrize("name", ["dsvae", "speakers", "dmm", "slds", "time_series"])  # one of each family
def test_an_example_starts_by_itself(name):
    assert f"usage: {name}.py" in starts_alone(EXAMPLES / f"{name}.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rssm", ["--image-size", 16]), ("kalman_vae", ["--image-size", 16]), ("speakers", []),
        ("dsvae", ["--data", "pendulum", "--image-size", 16, "--full"]),
        ("dsvae", ["--data", "pendulum", "--image-size", 16, "--grouped"]),
        ("cdsvae", ["--data", "pendulum", "--image-size", 16]),
        ("s3vae", ["--data", "pendulum", "--image-size", 16]),
        ("dbse", ["--data", "pendulum", "--image-size", 16]),
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
def test_command_line_of_models_of_music(tmp_path, data_root, name, arguments):
    done = run(name, "--preset", "tiny", "--run-dir", tmp_path / "run", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    estimates = {"bound per step", "mean of pieces' bounds", "importance-sampled", "particle filter"}
    assert estimates <= metrics["test"].keys() == metrics["valid"].keys() == metrics["train"].keys()
    assert metrics["test"]["importance-sampled"] < metrics["test"]["bound per step"]
    assert metrics["test"]["particle filter"] < metrics["test"]["bound per step"]
    assert (metrics["test"]["pieces"], metrics["test without near-duplicates"]["pieces"]) == (77, 42)
    assert (tmp_path / "run" / "rolls.png").stat().st_size > 0
    kept, best = (torch.load(tmp_path / "run" / file, weights_only=True) for file in ("model.pt", "training/best.ckpt"))
    assert all(torch.equal(tensor, best["state_dict"][f"network.{key}"]) for key, tensor in kept.items())
    if name == "dmm":
        sizes = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["plan"]["sizes"]
        assert sizes["num_flows"] == len(arguments)
    if name != "dmm":
        return
    again = run(name, "likelihood", tmp_path / "run", "--num-particles", 30, "--splits", "test", "--seeds", 1, 2)
    assert again.returncode == 0, again.stdout + again.stderr
    more = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert more["test"]["particles"] == 30
    assert more["test"]["particle filter, deviation of 2 seeds"] < 0.1
    assert more["test"]["particle filter"] < more["test"]["importance-sampled"]
    assert more["valid"] == metrics["valid"]


def test_f_of_a_grouped_dsvae_is_inferred_from_the_partner():
    """Its own clip has no say in q(f), and q(z) and the emission have none of the partner but through f."""
    torch.manual_seed(0)
    sizes = {**example_of("dsvae").preset("tiny").sizes, "encoder": (4,), "decoder": (4,), "grouped": True}
    network = example_of("dsvae").build((3, 8, 8), sizes).double()
    frames, others = torch.rand(2, 3, 5, 3, 8, 8, dtype=torch.float64)
    found = infer(network.guide, frames, None, (others, MASK))
    torch.testing.assert_close(found["f"].value, infer(network.guide, others, MASK)["f"].value)
    torch.testing.assert_close(found["z"].value, infer(network.guide, frames)["z"].value)
    bound = elbo_terms(network.model, network.guide, frames, None, (others, MASK)).elbo()
    assert bound.shape == (3,)


def test_partners_of_a_batch_show_the_same_identity_in_clips_of_their_own():
    videos = importlib.import_module("videos")
    frames = torch.arange(12, dtype=torch.uint8)[:, None, None, None, None].expand(12, 4, 3, 2, 2).contiguous()
    clips = Clips(frames, identity=torch.arange(12) // 4, lengths=torch.tensor([4, 4, 4, 2] * 3))
    batch = videos.paired_draws(clips, 12, 3)(torch.Generator().manual_seed(0))
    one = (255 * batch.frames[:, 0, 0, 0, 0]).round().long()
    other = (255 * batch.partner[0][:, 0, 0, 0, 0]).round().long()
    assert (one // 4 == other // 4).all()
    assert (one != other).any()
    assert batch.mask.shape == (12, 3)
    assert batch.partner[1].shape == (12, 4)


def small_network(name):
    example = example_of(name)
    return example.build((3, 8, 8), {**example.preset("tiny").sizes, "encoder": (4,), "decoder": (4,)}).double()


def auxiliary_of(network, names, *given):
    """Return the named losses of a network, and what its guide drew."""
    kept = {}

    def keep(drawn, *_):
        kept.update(drawn)
        return drawn["f"].value.sum(-1)

    losses = {name: getattr(network, name) for name in names}
    terms = elbo_terms(network.model, network.guide, *given, auxiliary_losses={"keep": keep, **losses})
    return terms.auxiliary_losses, kept


def test_losses_of_cdsvae_by_hand():
    network = small_network("cdsvae")
    network.temperature = 0.5
    found, _ = auxiliary_of(network, ("contrast_f", "contrast_z"), torch.rand(3, 5, 3, 8, 8, dtype=torch.float64), MASK)
    one, other = torch.randn(2, 3, 4, dtype=torch.float64)
    for i, loss in enumerate(importlib.import_module("cdsvae").contrast(one, other, 0.5)):
        similar = [2 * one[i] @ o / one[i].norm() / o.norm() for o in other]
        torch.testing.assert_close(loss, -(similar[i] - torch.stack(similar).logsumexp(0)))
    assert all((found[name] > 0).all() for name in ("contrast_f", "contrast_z"))


@pytest.mark.parametrize("name", ["cdsvae", "s3vae"])
def test_information_by_hand(name):
    network = small_network(name)
    network.num_clips = 100
    frames = torch.rand(3, 5, 3, 8, 8, dtype=torch.float64)
    found, drawn = auxiliary_of(network, ["information"], frames)
    f, z = drawn["f"], drawn["z"]
    q = f.distribution.base_dist
    for i in range(3):
        wanted = 0.0
        for t in range(5):
            of_f = torch.stack([dist.Normal(q.loc[j], q.scale[j]).log_prob(f.value[i]).sum() for j in range(3)])
            of_z = torch.stack(
                [network.motion(network.encoder(frames[j, t])).log_prob(z.value[i, t]) for j in range(3)]
            )
            wanted += (of_f + of_z).exp().sum().log() - of_f.exp().sum().log() - of_z.exp().sum().log() + math.log(300)
        torch.testing.assert_close(found["information"][i], wanted)
    with pytest.raises(ValueError, match="got clips of different lengths, expected 0 for them"):
        network.information(drawn, frames, MASK)


def test_losses_of_s3vae_by_hand():
    network, moving_parts = small_network("s3vae"), importlib.import_module("s3vae").moving_parts
    network.margin = 2.0
    frames = torch.rand(3, 5, 3, 8, 8, dtype=torch.float64)
    found, drawn = auxiliary_of(network, ["motion_target"], frames, MASK)
    f, z = drawn["f"].value, drawn["z"].value
    for i, length in enumerate([5, 2, 4]):
        targets, wanted = moving_parts(frames[i : i + 1, :length])[0], 0.0  # of the clip alone
        for t in range(length):
            for chance, moves in zip(network.moving(z[i, t]).sigmoid(), targets[t], strict=True):
                wanted -= (chance if moves else 1 - chance).log() / length
        torch.testing.assert_close(found["motion_target"][i], wanted)
    narrow = Inferred(dist.Normal(f, 1e-9).to_event(1), f)  # drawn again, it is the same
    losses = network.consistency({"f": narrow}, frames)
    for i, loss in enumerate(losses):
        torch.testing.assert_close(loss, (2 - (f[i] - f[i - 1]).norm()).relu(), atol=1e-4, rtol=1e-4)
    assert (losses > 0).any()
    two = torch.stack([f, f + 1])  # of two particles, the other clip is of the same particle
    narrow = Inferred(dist.Normal(two, 1e-9).to_event(1), two)
    again = network.consistency({"f": narrow}, frames)
    torch.testing.assert_close(again, losses.expand(2, -1), atol=1e-4, rtol=1e-4)


def test_the_moving_parts_of_a_frame():
    s3vae = importlib.import_module("s3vae")
    frames = torch.zeros(1, 3, 1, 9, 9)
    frames[0, 1, 0, 0, :] = 1.0  # at the second step, the upper three parts light up, and they stay so
    frames[0, 2, 0, 0, :] = 1.0
    frames[0, 2, 0, 8, :3], frames[0, 2, 0, 4, 3:] = 0.5, 0.1  # then one below left, and a little of two in the middle
    found = s3vae.moving_parts(frames)
    assert found[0].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0, 0], *2 * [[0, 0, 0, 0, 1, 1, 1, 0, 0]]]
    found = s3vae.moving_parts(frames[:, 1:2].repeat(1, 3, 1, 1, 1))
    assert not found.any()  # where nothing moves, no part does
    windows = torch.zeros(1, 2, 18)
    windows[0, 1, [0, 1, 6, 17]] = torch.tensor([0.1, 0.1, 0.4, 0.9])
    assert s3vae.moving_parts(windows)[0].tolist() == 2 * [[1, 0, 0, 1, 0, 0, 0, 0, 1]]


@torch.no_grad()
def test_f_of_dbse_sees_the_first_step_and_z_sees_nothing_of_a_still_clip():
    network = small_network("dbse")
    still = torch.rand(2, 1, 3, 8, 8, dtype=torch.float64).expand(-1, 5, -1, -1, -1)
    goes_on = torch.cat([still[:, :2], torch.rand(2, 3, 3, 8, 8, dtype=torch.float64)], 1)
    of_still, of_other = infer(network.guide, still), infer(network.guide, goes_on)
    # f has seen the first step alone; that two clips differ there is all it can tell
    torch.testing.assert_close(of_still["f"].distribution.mean, of_other["f"].distribution.mean)
    assert (of_still["f"].distribution.mean.diff(dim=0).abs() > 1e-3).any()
    # where nothing moves, z is the same whatever stands there
    where = of_still["z"].distribution.mean_path()
    torch.testing.assert_close(where[0], where[1])
    assert ((of_other["z"].distribution.mean_path() - where).abs() > 1e-3).any()


def test_loss_of_dbse_by_hand():
    network = small_network("dbse")
    frames = torch.rand(3, 5, 3, 8, 8, dtype=torch.float64)
    found, drawn = auxiliary_of(network, ["first_step"], frames, MASK)
    for i in range(3):
        shown = network.decoder(torch.cat([drawn["f"].value[i], drawn["z"].value[i, 0]])).sigmoid()
        wanted = -(frames[i, 0] * shown.log() + (1 - frames[i, 0]) * (1 - shown).log()).sum()
        torch.testing.assert_close(found["first_step"][i], wanted)


def test_a_weight_ends_where_the_plan_says():
    example, line = example_of("dsvae"), importlib.import_module("command_line")
    asked = ["--preset", "tiny", "--data", "pendulum", "--plan.annealed", "{f: [300.0, 6, 5.0], z: [5.0, 4]}"]
    plan = example.plan_of(importlib.import_module("settings").settings_of(example, asked))
    clips = Clips(torch.zeros(4, 8, 3, 16, 16, dtype=torch.uint8))
    training = line.single_stage(example.build((3, 16, 16), plan.sizes), plan, clips, 0)
    found = {site: [weight(step) for step in (0, 2, 4, 6, 9)] for site, weight in training.weights.items()}
    wanted = {"f": [300, 300 - 295 / 3, 300 - 590 / 3, 5, 5], "z": [5, 3, 1, 1, 1]}
    assert found == {site: pytest.approx(values) for site, values in wanted.items()}
