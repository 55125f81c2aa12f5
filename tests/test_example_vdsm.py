"""examples/vdsm.py as a person runs it, at a tiny size; and the model it builds."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from commands import run_here
from half_precision import needs_lstm
from pyro.infer import Trace_ELBO

from seqdisent import elbo_terms, forecast, generate, infer, reconstruct, swap
from seqdisent.datasets import Clips

EXAMPLES = Path(__file__).parent.parent / "examples"
pytest.importorskip("lightning")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def vdsm():
    return importlib.import_module("vdsm")


@pytest.fixture(params=["as in the paper", "with a memory and mixtures"])
def network(vdsm, request):
    beyond = {} if request.param == "as in the paper" else {"memory_dim": 3, "num_components": 2}
    sizes = vdsm.Sizes(
        num_experts=3, pose_dim=2, dynamics_dim=4, feature_dim=6, encoder_channels=(4, 4), decoder_channels=(4, 4),
        rnn_dim=5, rnn_layers=1, transition_dim=4, combiner_dim=5, **beyond,
    )  # fmt: skip
    torch.manual_seed(0)
    return vdsm.VDSM((3, 16, 16), sizes)


def frames(*shape):
    return torch.rand(*shape, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("stage", ["", "pretraining_"])
def test_ledger_equals_pyros_elbo(network, stage):
    network = network.double()
    model, guide = getattr(network, f"{stage}model"), getattr(network, f"{stage}guide")
    clips = frames(4, 5).double()
    torch.manual_seed(2)
    ours = elbo_terms(model, guide, clips, kl="monte-carlo").elbo().sum().item()
    torch.manual_seed(2)
    assert -Trace_ELBO().loss(model, guide, clips) == pytest.approx(ours, rel=1e-12)


def test_both_stages_train_what_the_paper_trains(vdsm, network):
    from seqdisent.datasets import pendulum

    clips = pendulum(14, seed=0, num_steps=8, image_size=16)
    plan = vdsm.Plan(
        network.sizes,
        3,
        1e-3,
        3,
        1e-3,
        8,
        num_groups=2,
        frames_per_group=3,
        num_clips=2,
        prior_steps=3,
        rolled=0.5 if network.sizes.memory_dim else 0.0,
    )
    wanted = {
        "pretraining": {"encoder", "static", "pose", "decoder"},
        "sequence_training": {"static", "pose", "dynamics", "combiner", "initial_pose", "transition"},
        "prior_training": {"transition"},
    }
    if network.sizes.memory_dim:
        wanted["sequence_training"] |= {"memory", "first_memory", "past", "future"}
        wanted["prior_training"] |= {"memory", "first_memory", "priors"}
    for name, parts in wanted.items():
        training = getattr(vdsm, name)(network, plan, clips, 0)
        batch = training.draw(torch.Generator().manual_seed(0))
        network.zero_grad()
        elbo_terms(training.model, training.guide, *training.arguments(batch)).elbo().sum().backward()
        trained = {key.split(".")[0] for key, value in network.named_parameters() if value.grad is not None}
        assert trained == parts
        dead = [key for key, value in network.named_parameters() if value.requires_grad and value.grad is None]
        assert not dead  # a parameter without gradient stops a run on several devices


@torch.no_grad()
def test_the_last_stage_changes_the_priors_alone(vdsm, network, tmp_path):
    from seqdisent.datasets import pendulum
    from seqdisent.training import fit

    clips = pendulum(14, seed=0, num_steps=8, image_size=16)
    plan = vdsm.Plan(
        network.sizes, 3, 1e-3, 3, 1e-3, 8, num_clips=4, prior_steps=3, rolled=0.5 if network.sizes.memory_dim else 0.0
    )
    before = reconstruct(network.model, network.guide, frames(2, 5))["x"].mean
    drawn = generate(network.model, num_sequences=3, num_steps=5, sample=True)["x"].mean
    with torch.enable_grad():
        fit(vdsm.prior_training(network, plan, clips, 0), tmp_path, progress_bar=False, accelerator="cpu")
    torch.testing.assert_close(
        reconstruct(network.model, network.guide, frames(2, 5))["x"].mean, before, rtol=1e-5, atol=1e-6
    )
    torch.manual_seed(0)
    assert (generate(network.model, num_sequences=3, num_steps=5, sample=True)["x"].mean != drawn).any()


@torch.no_grad()
def test_priors_that_are_learnt_are_asked_for(network):
    """Before the last stage, p(s), p(d) and p(z_1) are Normals, whose KL terms are closed."""
    terms = elbo_terms(partial(network.model, learnt=False), network.guide, frames(2, 5))
    assert {terms.terms[name].how for name in ("s", "d")} == {"closed form"}
    learnt = elbo_terms(network.model, network.guide, frames(2, 5))
    expected = "monte carlo" if network.sizes.num_components else "closed form"
    assert {learnt.terms[name].how for name in ("s", "d")} == {expected}


@torch.no_grad()
def test_ablation_has_one_decoder_that_reads_s(vdsm, network):
    torch.manual_seed(0)
    alone = vdsm.VDSM((3, 16, 16), dataclasses.replace(network.sizes, single_decoder=True))
    assert len(alone.decoder.kernels[0]) == 1
    assert len(network.decoder.kernels[0]) == network.sizes.num_experts
    s, z = torch.randn(2, 3), torch.randn(2, 5, 2)
    drawn = alone.emission(s, z, None, 0.1).mean
    assert (drawn != alone.emission(s.flip(0), z, None, 0.1).mean).any()
    torch.testing.assert_close(drawn, alone.emission(s + 7, z, None, 0.1).mean)  # it reads softmax(s / temperature)


def test_disagreement_of_one_identitys_clips_is_a_loss_of_its_own(network):
    network = network.double()
    clips, others = frames(2, 4).double(), network.encoder(frames(2, 3).double() ** 2)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    features = network.encoder(clips)
    losses = {"same_identity": network.same_identity}
    terms = elbo_terms(network.model, network.guide, clips, None, features, (others, mask), auxiliary_losses=losses)
    for n, length in enumerate((3, 1)):
        one, other = network.static(features[n : n + 1]), network.static(others[n : n + 1, :length])
        shift = (one.mean - other.mean).square()
        wanted = 0.5 * ((one.variance + shift) / other.variance + (other.variance + shift) / one.variance - 2).sum()
        torch.testing.assert_close(terms.auxiliary_losses["same_identity"][n], wanted)
    itself = elbo_terms(network.model, network.guide, clips, None, features, (features, None), auxiliary_losses=losses)
    torch.testing.assert_close(itself.auxiliary_losses["same_identity"], torch.zeros(2).double())


def test_disagreement_of_a_motion_done_by_another_is_a_loss_of_its_own(network):
    network, mask = network.double(), torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    clips = frames(3, 3).double()
    features = network.encoder(clips)
    torch.manual_seed(0)
    drawn = infer(network.guide, clips, mask, sample=True)
    torch.manual_seed(0)
    losses = {"same_motion": network.same_motion}
    terms = elbo_terms(network.model, network.guide, clips, mask, features, (features, None), auxiliary_losses=losses)
    for n, length in enumerate((3, 2, 1)):
        s, z = drawn["s"].value[n - 1 : n or None], drawn["z"].value[n : n + 1, :length]
        seen = network.encoder(network.emission(s, z, None, None).mean)
        one, other = (network.dynamics(network.pose(clip).mean) for clip in (seen, features[n : n + 1, :length]))
        shift = (one.mean - other.mean).square()
        wanted = 0.5 * ((one.variance + shift) / other.variance + (other.variance + shift) / one.variance - 2).sum()
        torch.testing.assert_close(terms.auxiliary_losses["same_motion"][n], wanted)
    assert terms.auxiliary_losses["same_motion"].requires_grad


def test_a_stage_may_be_shorter_than_its_warm_up(vdsm):
    from parts import warmed_up

    for num_steps in (1, 2, 5):
        rates = [warmed_up(0.1, 200, num_steps)(step) for step in range(num_steps + 1)]
        assert max(rates) == pytest.approx(0.1)
        assert rates[-1] == pytest.approx(0.0) or num_steps == 1
    rate = warmed_up(0.1, 4, 12)
    assert [round(rate(step), 3) for step in (0, 1, 4, 8, 12)] == [0.025, 0.044, 0.1, 0.05, 0.0]
    assert warmed_up(0.1, 4, 12, decays=False)(12) == pytest.approx(0.1)


def test_a_plan_without_what_it_needs_is_refused(vdsm, network):
    if network.sizes.num_components:
        with pytest.raises(ValueError, match="expected prior_steps where num_components are set"):
            vdsm.Plan(network.sizes)
    else:
        with pytest.raises(ValueError, match="memory_dim where rolled is > 0"):
            vdsm.Plan(network.sizes, rolled=0.5)


def test_partners_show_the_same_identity(vdsm, network):
    from seqdisent.datasets import pendulum

    clips = pendulum(28, seed=0, num_steps=4, image_size=16)
    plan = vdsm.Plan(
        network.sizes, 3, 1e-3, 3, 1e-3, 4, num_clips=14, prior_steps=1, same_identity=2.0, same_motion=3.0
    )
    training = vdsm.sequence_training(network, plan, clips, 0)
    batch = training.draw(torch.Generator().manual_seed(0))
    colour = batch.frames.amax((1, 3, 4))
    found = torch.cdist(batch.partner[0].flatten(1), network.encoder(clips.batch(range(28)).frames).flatten(1))
    partners = found.argmin(1)
    torch.testing.assert_close(clips.batch(partners).frames.amax((1, 3, 4)), colour)
    own = torch.cdist(batch.features.flatten(1), network.encoder(clips.batch(range(28)).frames).flatten(1)).argmin(1)
    assert (partners != own).any()
    assert (training.weights["same_identity"](0), training.weights["same_motion"](0)) == (2.0, 3.0)


def test_few_identities_are_seen_in_other_colours(vdsm, network):
    from videos import recoloured

    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(3, 1, 3, 1, 1, generator=generator).expand(3, 2, 3, 4, 4).clone()
    frames[:, :, :, 0] = 0.2
    changed = recoloured(frames, generator)
    assert changed.shape == frames.shape
    assert ((changed >= 0) & (changed <= 1)).all()
    for part in (changed[:, :, :, :1], changed[:, :, :, 1:]):  # one change for all of a clip: what was of one colour is
        assert (part - part[:, :1, :, :1, :1]).abs().max() < 1e-6
    assert torch.pdist(changed[:, 0, :, 0, 0]).min() > 0.01  # and another one for each clip
    shades = torch.linspace(0, 1, 256).expand(300, 3, 256)[:, None, :, None]
    greys = recoloured(shades, generator)
    assert ((greys >= 0) & (greys <= 1)).all()
    assert shades.std() / 2 < greys.std(-1).mean() < shades.std()  # colours stay vivid

    def drawn(num_identities, recolour, colours=3):
        frames = torch.arange(256, dtype=torch.uint8).expand(colours, 256).reshape(1, 1, colours, 16, 16)
        clips = Clips(frames.repeat(num_identities, 2, 1, 1, 1), identity=torch.arange(num_identities))
        plan = vdsm.Plan(network.sizes, num_groups=100, frames_per_group=2, recolour=recolour, prior_steps=1)
        network_of = vdsm.VDSM((colours, 16, 16), network.sizes)
        batch = vdsm.pretraining(network_of, plan, clips, 0).draw(torch.Generator().manual_seed(1))
        real = clips.draw_groups(100, 2, torch.Generator().manual_seed(1))
        assert (batch.positions == real.positions).all()
        return (batch.frames != real.frames).flatten(1).any(1).double().mean()

    assert drawn(59, 0.0) == drawn(60, 0.7) == drawn(59, 0.7, colours=1) == 0.0
    assert 0.5 < drawn(59, 0.7) < 0.9


def test_few_identities_come_in_other_colours_too(vdsm, network):
    from videos import FEW_IDENTITIES

    owner = torch.arange(40) // 2
    frames = torch.arange(20, dtype=torch.uint8).repeat_interleave(2)[:, None, None, None, None] * 10 + 40
    frames = frames.expand(40, 12, 3, 16, 16).clone()
    frames[:, :, 1] //= 2
    lengths = torch.tensor([12, 5] * 20)
    clips = Clips(frames, identity=owner, lengths=lengths)
    plan = vdsm.Plan(network.sizes, num_clips=40, clip_length=6, recolour=0.5, same_identity=1.0, prior_steps=1)
    batch = vdsm.sequence_training(network, plan, clips, 0).draw(torch.Generator().manual_seed(0))
    features, mask = batch.partner
    real = network.encoder(batch.frames)
    torch.testing.assert_close(batch.features[batch.mask], real[batch.mask])  # those of the frames as they are shown
    torch.testing.assert_close(features[:, 0], real[:, 0])  # the partner, of one flat colour, in the same colours
    assert set(mask.sum(1).tolist()) == {5, 12}
    shown = (255 * batch.frames[:, 0, :, 0, 0]).round().to(torch.uint8)
    originals = (shown[:, None] == frames[:, 0, :, 0, 0]).all(-1).any(-1)
    assert 0.15 < originals.double().mean() < 0.55  # a third of them
    assert len(shown.unique(dim=0)) > 25
    assert FEW_IDENTITIES == 60


def test_cached_features_are_those_of_the_frames(vdsm, network):
    from seqdisent.datasets import pendulum

    clips = pendulum(14, seed=0, num_steps=8, image_size=16)
    plan = vdsm.Plan(network.sizes, 3, 1e-3, 3, 1e-3, 5, num_groups=2, frames_per_group=3, num_clips=3, prior_steps=1)
    training = vdsm.sequence_training(network, plan, clips, 0)
    batch = training.draw(torch.Generator().manual_seed(0))
    assert batch.frames.shape[1] == 5
    torch.testing.assert_close(batch.features, network.encoder(batch.frames), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("content", [1e6, float("nan")])
def test_padding_changes_no_value_and_no_gradient(network, content):
    clips = frames(2, 5)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])

    def run(padding):
        filled = clips.clone()
        filled[1, 3:] = padding
        network.zero_grad()
        torch.manual_seed(0)
        terms = elbo_terms(network.model, network.guide, filled, mask)
        terms.elbo().sum().backward()
        gradients = {name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None}
        return terms.elbo().detach(), gradients

    wanted, wanted_gradients = run(0.0)
    found, gradients = run(content)
    torch.testing.assert_close(found, wanted)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name])


@pytest.mark.parametrize("stage", ["", "pretraining_"])
def test_padded_row_counts_as_the_clip_that_it_holds(network, stage):
    network = network.double()
    model, guide = getattr(network, f"{stage}model"), getattr(network, f"{stage}guide")
    clip = frames(1, 6).double()
    mask = torch.arange(6)[None] < 3

    @torch.no_grad()
    def terms(*args):
        torch.manual_seed(4)  # the noise of the first three steps is the same, in whatever order the rest is drawn
        return elbo_terms(model, guide, *args)

    padded, cut = terms(clip, mask), terms(clip[:, :3])
    torch.testing.assert_close(padded.kl["s"], cut.kl["s"])
    torch.testing.assert_close(padded.kl["z"], cut.kl["z"])


@needs_lstm
def test_heads_stay_in_full_precision_under_autocast(network):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for guide in (network.guide, network.pretraining_guide):
            for site in infer(guide, frames(2, 3)).values():
                assert site.value.dtype == torch.float32


def test_particles_can_be_drawn_in_one_run(network):
    terms = elbo_terms(network.model, network.guide, frames(2, 4), num_particles=3, vectorize_particles=True)
    assert {name: tuple(term.shape) for name, term in terms.kl.items()} == dict.fromkeys(("s", "d", "z"), (3, 2))


@torch.no_grad()
def test_swaps_follow_the_donor(network):
    source, donor = frames(2, 5), frames(2, 5).flip(0)
    own, other = (infer(network.guide, clips) for clips in (source, donor))
    swapped = swap(network.model, network.guide, source, donor, sites=["s"])["x"].mean
    wanted = generate(
        network.model, num_sequences=2, num_steps=5, sample=False,
        given={"s": other["s"].value, "d": own["d"].value, "z": own["z"].value},
    )["x"].mean  # fmt: skip
    torch.testing.assert_close(swapped, wanted)
    of_motion = swap(network.model, network.guide, source, donor, sites=["d"])["x"].mean
    wanted = generate(
        network.model, num_sequences=2, num_steps=5, sample=False,
        given={"s": own["s"].value, "d": other["d"].value, "z": other["z"].value},
    )["x"].mean  # fmt: skip
    if network.sizes.memory_dim is None:  # z reads the frames through d alone
        torch.testing.assert_close(of_motion, wanted)
    still = swap(network.pretraining_model, network.pretraining_guide, source, donor, sites=["s"])["x"].mean
    assert still.shape == source.shape
    assert (still != reconstruct(network.pretraining_model, network.pretraining_guide, source)["x"].mean).any()
    longer = forecast(network.model, network.guide, source[:, :1], num_steps=9)["x"].mean
    assert longer.shape == (2, 10, 3, 16, 16)


def test_parameters_stay_out_of_pyros_store(network):
    elbo_terms(network.model, network.guide, frames(2, 3)).elbo().sum().backward()
    assert not list(pyro.get_param_store().keys())


def test_presets_hold_the_papers_tables(vdsm):
    names = ("clips", "sprites", "moving_mnist", "pendulum")
    paper = {name: vdsm.EXAMPLE.preset("paper", name) for name in names}
    assert [plan.sizes.num_experts for plan in paper.values()] == [15, 40, 12, 8]
    plan = paper["sprites"]
    assert (plan.pretraining_steps, plan.sequence_steps) == (300 * 50, 200 * 50)
    assert (plan.pretraining_rate, plan.sequence_rate, plan.num_clips, plan.clip_length) == (8e-3, 1e-3, 20, 8)
    assert (plan.sizes.pose_dim, plan.sizes.dynamics_dim, plan.sizes.rnn_layers, plan.sizes.rnn_dim) == (30, 50, 3, 512)
    assert paper["clips"] == vdsm.Plan(vdsm.Sizes())  # the defaults
    for name in names:  # one change, to whatever is trained on the CPU
        own, ablation = (vdsm.EXAMPLE.preset(preset, name) for preset in ("cpu", "ablation"))
        assert ablation == dataclasses.replace(own, sizes=dataclasses.replace(own.sizes, single_decoder=True))


def run(*arguments):
    """Run the example as a user does, in a process of its own, to an end without an error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "vdsm.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def refused(*arguments):
    """What the example says to arguments that it does not take, without a traceback."""
    done = run_here(EXAMPLES / "vdsm.py", *arguments)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.slow
def test_command_line_from_training_to_forecast(tmp_path):
    generator = np.random.default_rng(0)
    clips = generator.integers(0, 256, (9, 6, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "clips.npz", frames=clips, lengths=[6, 4, 5] * 3, identity=np.arange(9) // 3)
    folder = tmp_path / "run"
    started = run("--data", tmp_path / "clips.npz", "--preset", "tiny", "--image-size", 32, "--run-dir", folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["mean_squared_error"].keys() == {"reconstruction", "roll_out", "mean_frame"}
    assert metrics["minutes"].keys() == {"stage1", "stage2", "priors"}
    for name in ("reconstructions.png", "swaps.png", "swaps.gif", "prior_samples.png", "forecast.png"):
        assert (folder / name).stat().st_size > 0
        assert name in started.stdout
    for part in ("stage1", "stage2"):
        assert (folder / f"{part}_ledger.png").exists()
        torch.load(folder / part / "model.pt", weights_only=True)

    assert "--resume" in refused("--data", tmp_path / "clips.npz", "--preset", "tiny", "--run-dir", folder)

    # killed after stage 1: the resumed run ends with the same weights
    wanted = torch.load(folder / "stage2" / "model.pt", weights_only=True)
    (folder / "stage2" / "model.pt").unlink()
    (folder / "stage2" / "last.ckpt").unlink()
    run("--run-dir", folder, "--resume")
    found = torch.load(folder / "stage2" / "model.pt", weights_only=True)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)

    np.save(tmp_path / "clip.npy", clips[0])
    run("generate", folder, "--num-clips", 2, "--num-steps", 9)
    run("swap", folder, "--content", tmp_path / "clip.npy", "--motion", tmp_path / "clip.npy")
    run("forecast", folder, "--from", tmp_path / "clip.npy", "--num-steps", 3, "--out", tmp_path / "future")
    for path in (folder / "generated.png", folder / "swapped.gif", tmp_path / "future.gif"):
        assert path.stat().st_size > 0
    assert "no.npy" in refused("swap", folder, "--content", tmp_path / "no.npy", "--motion", tmp_path / "clip.npy")
    assert "nothing to judge" in refused("evaluate", folder)


@pytest.mark.slow
def test_evaluation_of_a_run_on_labelled_clips_of_different_lengths(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (16, 6, 32, 32, 3), dtype=np.uint8)
    shown = {"identity": np.arange(16) // 2, "hair": np.arange(16) // 2 % 2, "action": np.arange(16) % 2}
    np.savez(tmp_path / "clips.npz", frames=frames, lengths=[6, 4, 5, 3] * 4, **shown)
    folder = tmp_path / "run"
    asked = ["--data", tmp_path / "clips.npz", "--preset", "tiny", "--image-size", 32, "--held-out", 4]
    done = run_here(EXAMPLES / "vdsm.py", *asked, "--run-dir", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run_here(EXAMPLES / "vdsm.py", "evaluate", folder, "--judge-steps", 3)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (folder / "metrics.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["held_out_clips"] == 8
    assert found["swaps"]["identity"]["hair"]["follows"]
    assert found["swaps"]["motion"]["action"]["follows"]
    assert found["minutes"].keys() == {"stage1", "stage2", "priors"}
    assert "## Swap: motion from the donor" in done.stdout
    for name in ("judge.pt", "report.md", "report.html", "confusion.png"):
        assert (folder / name).stat().st_size > 0


@needs_lstm
@pytest.mark.slow
def test_two_processes_in_bfloat16_end_with_one_set_of_numbers(tmp_path):
    clips = np.random.default_rng(0).integers(0, 256, (6, 5, 32, 32), dtype=np.uint8)  # grey
    np.savez(tmp_path / "clips.npz", frames=clips, identity=np.arange(6) // 2)
    arguments = ("--data", tmp_path / "clips.npz", "--preset", "tiny", "--image-size", 32, "--held-out", 1)
    folder = tmp_path / "run"
    done = run(*arguments, "--run-dir", folder, "--devices", 2, "--accelerator", "cpu", "--precision", "bf16-mixed")
    assert done.stdout.count("metrics.json") == 1  # the second process writes nothing
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["held_out_clips"] == 2
    assert 0 < metrics["mean_squared_error"]["reconstruction"] < 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--run-dir", "no/such/run", "--resume"], "no run to resume"),
        (["swap", "no/such/run", "--content", "a", "--motion", "b"], "not a run folder"),
        (["--data", "sprites", "--image-size", "32"], "--image-size: got 32, expected 64"),
    ],
)
def test_mistakes_on_the_command_line_are_named(tmp_path, arguments, said):
    if "--run-dir" not in arguments and arguments[0] != "swap":
        arguments = [*arguments, "--run-dir", str(tmp_path)]
    assert said in refused(*arguments)
