"""`evaluate`, the one call: on models of known worth, on a user's own model, and on data of which little is known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import seqdisent
from seqdisent.datasets import Clips, Scaler, pendulum

for needed in ("torchmetrics", "sklearn", "matplotlib"):
    pytest.importorskip(needed)

from seqdisent import (  # noqa: E402
    ConvEncoder,
    GatedTransition,
    IndependentSteps,
    MarkovChain,
    NormalHead,
    StaticEncoder,
    _files,  # noqa: E402
)
from seqdisent.evaluation import NUMBERS, _errors, evaluate  # noqa: E402
from seqdisent.evaluation._judged import latents  # noqa: E402
from seqdisent.evaluation._programs import Programs  # noqa: E402
from seqdisent.evaluation._report import plain  # noqa: E402
from seqdisent.metrics import Judge  # noqa: E402

SITES = {"static": ["s"], "motion": ["d", "z"]}


def who_and_what(repeats):
    """Clips whose upper left pixel says who, and the lower right one what, with a little noise."""
    who, what = (labels.repeat(repeats) for labels in torch.cartesian_prod(torch.arange(3), torch.arange(2)).unbind(1))
    frames = torch.zeros(len(who), 4, 1, 2, 2, dtype=torch.uint8)
    noise = torch.randint(0, 20, (2, len(who), 1), generator=torch.Generator().manual_seed(0))
    frames[:, :, 0, 0, 0] = (100 * who[:, None] + noise[0]).to(torch.uint8)
    frames[:, :, 0, 1, 1] = (200 * what[:, None] + noise[1]).to(torch.uint8)

    def truth(content, motion, num_steps):
        if num_steps not in (None, 4):
            raise ValueError("num_steps: the clips end after 4 steps")
        swapped = frames[motion].clone()
        swapped[:, :, 0, 0, 0] = frames[content][:, :, 0, 0, 0]
        return swapped

    return Clips(
        frames, identity=who, labels={"who": who, "what": what}, static_factors=["who"], motion_factors=["what"],
        renderer=truth,
    )  # fmt: skip


def near(value, scale=1e-3):
    return dist.Normal(value, scale).to_event(1)


class Pixels(nn.Module):
    """A model whose s is the pixel that says who, and whose d and z the one that says what; or all of it is d."""

    def __init__(self, all_in_d=False):
        super().__init__()
        self.all_in_d = all_in_d

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None):
        count, steps = (num_sequences, num_steps) if frames is None else frames.shape[:2]
        with pyro.plate("sequences", count):
            s = pyro.sample("s", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            d = pyro.sample("d", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z = pyro.sample("z", IndependentSteps(near(torch.zeros(count, steps, 1), 1.0)))
            painted = torch.zeros(*z.shape[:-1], 1, 2, 2)
            painted[..., 0, 0, 0] = (d[..., :1] if self.all_in_d else s).clamp(0, 1).expand(z.shape[:-1])
            painted[..., 0, 1, 1] = z[..., 0].clamp(0, 1)
            pyro.sample("x", dist.Normal(painted, 0.1).to_event(4), obs=frames)

    def guide(self, frames, mask=None):
        with pyro.plate("sequences", frames.shape[0]):
            who, what = frames[:, 0, :, 0, 0], frames[:, :, :, 1, 1]
            pyro.sample("s", near(torch.zeros_like(who) if self.all_in_d else who))
            pyro.sample("d", near(torch.cat([who if self.all_in_d else 0 * who, what[:, 0]], -1)))
            pyro.sample("z", IndependentSteps(near(what)))


class Reader(Judge):
    """Reads both pixels, without an error."""

    def __init__(self):
        super().__init__({"who": 3, "what": 2}, in_channels=1, image_size=2, channels=(2,))
        self.accuracy = {"who": 1.0, "what": 1.0}

    def forward(self, frames, mask=None):
        read = self.features(frames, mask) * 255
        means = {"who": torch.tensor([10.0, 110, 210]), "what": torch.tensor([10.0, 210])}
        return {name: -((read[:, i, None] - mean) ** 2) / 100 for i, (name, mean) in enumerate(means.items())}

    def features(self, frames, mask=None):
        mask = torch.ones(frames.shape[:2]) if mask is None else mask.float()
        return torch.einsum("ntk,nt->nk", frames[:, :, 0].flatten(2)[..., [0, 3]], mask) / mask.sum(1, keepdim=True)


def reader():
    judge = Reader()
    judge.num_features = 2
    return judge


def evaluated(model, train, held_out, **options):
    model.eval()
    return evaluate(model.model, model.guide, train, held_out, **{**SITES, "judge": None, **options})


@pytest.fixture(scope="module")
def found():
    train, held_out = who_and_what(20), who_and_what(10)
    return {
        name: evaluated(model, train, held_out, judge=reader())
        for name, model in {"honest": Pixels(), "all in d": Pixels(all_in_d=True)}.items()
    }


# Models of known worth


def test_an_honest_model_scores_full_marks(found):
    scores = found["honest"].numbers
    assert scores["consistency"] == {"who": 1, "what": 1, "average": 1}
    for direction in ("identity", "motion"):
        for factor, score in scores["swaps"][direction].items():
            assert score["follows"] == (factor == {"identity": "who", "motion": "what"}[direction])
            assert score["accuracy"] == 1
            assert score["leakage"] == 0
    assert scores["intervention_score"] == pytest.approx(1, abs=1e-6)
    errors = scores["mean_squared_error"]
    assert errors["reconstruction"] == errors["swapped"] == errors["motion_swapped"] == 0
    assert scores["swapped / reconstruction"] is None  # 0 / 0
    assert scores["probes"]["linear"]["s"]["who"]["accuracy"] == 1
    assert scores["probes"]["linear"]["d"]["what"]["accuracy"] == 1
    for kind in ("linear", "mlp"):
        assert scores["probes"][kind]["d"]["who"]["accuracy"] < 0.6
        assert scores["probes"][kind]["s"]["what"]["accuracy"] < 0.75
        assert scores["probes"][kind]["z"]["what"]["accuracy"] == 1  # also of what is not the first of its kind
    distance = {name: of["distance"] for name, of in scores["frechet"].items()}
    assert distance["reconstruction"] == pytest.approx(distance["real clips"], abs=1e-4)
    assert distance["prior"] > distance["real clips"] + 0.01


def test_a_model_with_everything_in_d_is_found_out(found):
    scores = found["all in d"].numbers
    assert scores["consistency"]["average"] == 1  # reconstruction shows nothing of it
    assert scores["swaps"]["identity"]["who"]["accuracy"] == 0  # the donor's s changes nothing
    assert scores["swaps"]["identity"]["who"]["leakage"] == 1
    assert scores["swaps"]["motion"]["what"]["accuracy"] == 1
    assert scores["swaps"]["motion"]["who"]["accuracy"] == 0  # the motion brings the donor with it
    assert scores["probes"]["linear"]["d"]["who"]["accuracy"] == 1
    assert scores["probes"]["linear"]["s"]["who"]["accuracy"] < 0.6
    assert scores["intervention_score"] == pytest.approx(0.5)
    assert scores["mean_squared_error"]["reconstruction"] == 0
    assert scores["mean_squared_error"]["swapped"] > 0.01


def test_clips_from_the_prior_are_measured_beside_real_ones(found):
    honest, cheat = found["honest"].numbers, found["all in d"].numbers
    assert honest["neighbours"].keys() == {"training clips", "reconstruction", "prior"}
    # pixels are whole numbers, so some clips are equal and balls overlap at their edges
    assert (
        honest["neighbours"]["reconstruction"]["precision"] == honest["neighbours"]["reconstruction"]["coverage"] == 1
    )
    assert honest["neighbours"]["training clips"]["coverage"] > honest["neighbours"]["prior"]["coverage"]
    assert honest["memorisation"]["reconstruction"]["share_nearer"] == pytest.approx(0.5, abs=0.02)
    assert honest["confidence"]["who"]["real clips"] > 0.99
    assert "combinations" not in honest  # of one factor
    kept = {name: score["kept"] for name, score in honest["sampled_swaps"].items()}
    assert kept == {"who": False, "what": True}
    assert honest["sampled_swaps"]["what"]["accuracy"] == cheat["sampled_swaps"]["what"]["accuracy"] == 1
    assert honest["sampled_swaps"]["who"]["accuracy"] < 0.5
    assert cheat["sampled_swaps"]["who"]["accuracy"] == 1  # the kept motion brings the clip's identity with it
    tables = found["honest"].tables()
    assert "| who | drawn | " in tables
    assert "| what | kept | 100.00 |" in tables


def test_the_report_says_what_was_measured(found, tmp_path):
    (tmp_path / "metrics.json").write_text('{"minutes": 3}')
    written = found["all in d"].save(tmp_path, title="made up")
    assert all(path.stat().st_size > 0 for path in written)
    assert {"confusion.png", "reconstructions.png", "swaps.gif"} <= {path.name for path in written}
    text = (tmp_path / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| who | the donor's"))
    assert row.split(" | ")[2] == "0.00"  # accuracy of the identity swap
    assert found["all in d"].tables() in text
    page = (tmp_path / "report.html").read_text()
    assert page.count("<table>") == text.count("\n| --- |")
    assert "made up" in text
    assert "made up" in page
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert numbers == {"minutes": 3, **found["all in d"].numbers}


def test_published_numbers_stand_beside_ours(found):
    published = {"A paper": {"consistency": {"who": 99.67, "average": 99.53}, "static": {"who": 12.5}}}
    published["A paper"]["motion"] = {"what": 61.5}
    tables = found["honest"].tables(beside=published)
    consistency, linear, *_ = (tables.split(f"## {title}")[1] for title in ("Judge and", "Probes, linear"))
    assert "| who | 100.00 | 100.00 | 99.67 |" in consistency
    assert "| average |  | 100.00 | 99.53 |" in consistency
    assert "| who | 100.00 | 12.50 |" in linear
    assert tables.count("61.50") == 2  # beside d, for either kind of probe, and not again beside z
    assert "paper" not in found["honest"].tables()


def test_an_average_beside_a_published_one_is_over_the_same_factors(found):
    scores = found["honest"].numbers
    changed = {**scores, "consistency": {"who": 0.9, "what": 0.1, "average": 0.5}}
    ours = type(found["honest"])(changed, roles=found["honest"].roles)
    assert "| average |  | 90.00 | 99.53 |" in ours.tables(
        beside={"A paper": {"consistency": {"who": 9, "average": 99.53}}}
    )


def test_clips_of_different_lengths_are_judged_over_their_own_frames():
    clips = who_and_what(11)  # 66: a batch of 64 and one of 2
    lengths = torch.arange(len(clips)) % 3 + 1
    lengths[64:] = 1
    frames = clips.frames.clone()
    frames[torch.arange(4) >= lengths[:, None]] = 255
    ragged = Clips(
        frames, lengths=lengths, identity=clips.identity, labels=clips.labels, static_factors=["who"],
        motion_factors=["what"],
    )  # fmt: skip
    scores = evaluated(Pixels(), clips, ragged, judge=reader(), pictures=False).numbers["swaps"]
    assert {score["accuracy"] for of in scores.values() for score in of.values()} == {1.0}


class Unlucky(Pixels):
    """Has a posterior that is not 0 at padding."""

    def guide(self, frames, mask=None):
        super().guide(frames + 0.5, mask)


def test_a_trajectory_is_probed_with_all_its_steps():
    clips = who_and_what(11)  # 66: a batch of 64 and one of 2, which ends earlier
    lengths = torch.arange(len(clips)) % 4 + 1
    lengths[64:] = 2
    ragged = Clips(clips.frames, lengths=lengths, identity=clips.identity, labels=clips.labels)
    model = Unlucky()
    programs = Programs(model.model, model.guide, (), ("z",), None, False, False, {}).looked_at(ragged)
    found = latents(programs, ragged, ["z"], 64, 6)
    pixels = clips.frames[:, :, 0, 1, 1] / 255 + 0.5
    wanted = torch.where(torch.arange(4) < lengths[:, None], pixels, 0.0)
    torch.testing.assert_close(found["z"], torch.nn.functional.pad(wanted, (0, 2)))  # as long as asked


def test_what_no_pair_can_show_is_null():
    nan = float("nan")
    assert plain({"a": torch.tensor([nan, 1.0]), "b": nan, "c": [1, "x"]}) == {
        "a": [None, 1.0],
        "b": None,
        "c": [1, "x"],
    }


# A user's own model


class Swinging(nn.Module):
    """Somebody's model, with names of its own: who is in "identity", the rest in a chain "path"."""

    def __init__(self):
        super().__init__()
        self.encoder = ConvEncoder(8, in_channels=3, image_size=16, channels=(4, 4))
        self.who, self.where = StaticEncoder(8, 3), NormalHead(8, 2)
        self.transition = GatedTransition(2, 4)
        self.paint = nn.Linear(5, 3 * 16 * 16)

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = (num_sequences, num_steps) if frames is None else frames.shape[:2]
        with pyro.plate("clips", num_sequences):
            identity = pyro.sample("identity", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            start = dist.Normal(torch.zeros(num_sequences, 2), 1.0).to_event(1)
            path = pyro.sample("path", MarkovChain(start, self.transition, num_steps, mask=mask))
            latents = torch.cat([identity.unsqueeze(-2).expand(*path.shape[:-1], 3), path], -1)
            pixels = self.paint(latents).sigmoid().unflatten(-1, (3, 16, 16))
            steps = dist.Normal(pixels, 0.3).to_event(3)
            pyro.sample("pixels", (steps if mask is None else steps.mask(mask)).to_event(1), obs=frames)

    def guide(self, frames, mask=None):
        features = self.encoder(frames)
        with pyro.plate("clips", len(frames)):
            pyro.sample("identity", self.who(features, mask))
            step = lambda _, x: self.where(x)  # noqa: E731
            chain = MarkovChain(self.where(features[:, 0]), step, frames.shape[1], inputs=features, mask=mask)
            pyro.sample("path", chain)


class Moving(nn.Module):
    """A chain of vectors, without anything that is static."""

    def __init__(self):
        super().__init__()
        self.read, self.transition, self.emit = NormalHead(5, 2), GatedTransition(2, 4), nn.Linear(2, 5)

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = (num_sequences, num_steps) if frames is None else frames.shape[:2]
        with pyro.plate("sequences", num_sequences):
            start = dist.Normal(torch.zeros(num_sequences, 2), 1.0).to_event(1)
            z = pyro.sample("z", MarkovChain(start, self.transition, num_steps, mask=mask))
            step = dist.Normal(self.emit(z), 0.3).to_event(1)
            pyro.sample("x", (step if mask is None else step.mask(mask)).to_event(1), obs=frames)

    def guide(self, frames, mask=None):
        with pyro.plate("sequences", len(frames)):
            step = lambda _, x: self.read(x)  # noqa: E731
            chain = MarkovChain(self.read(frames[:, 0]), step, frames.shape[1], inputs=frames, mask=mask)
            pyro.sample("z", chain)


OWN = {"static": ["identity"], "motion": ["path"]}


@pytest.fixture(scope="module")
def swinging():
    torch.manual_seed(0)
    return (
        Swinging().eval(),
        pendulum(28, seed=0, num_steps=5, image_size=16),
        pendulum(14, seed=1, num_steps=5, image_size=16),
    )


def test_one_call_gives_numbers_report_and_pictures(swinging, tmp_path):
    network, train, held_out = swinging
    state = torch.get_rng_state()
    found = evaluate(
        network.model, network.guide, train, held_out, **OWN, judge=2, candidates=held_out, folder=tmp_path
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store().keys())
    assert set(found.numbers) == {
        "held_out_clips", "mean_squared_error", "nats", "swapped / reconstruction", "motion_swapped / reconstruction",
        "roll_out / reconstruction", "nearest_true_clip", "forecast_error", "judge", "consistency", "swaps",
        "intervention_score", "entropies", "frechet", "confusion", "probes",
        "neighbours", "memorisation", "confidence", "sampled_swaps",
    }  # fmt: skip
    assert found.numbers["nats"].keys() == {"KL(identity)", "KL(path)", "log_p(pixels)"}
    assert len(found.numbers["forecast_error"]["forecast"]) == 10
    assert found.numbers["probes"]["linear"].keys() == {"identity", "path"}
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {
        "metrics.json", "report.md", "report.html", "judge.pt", "reconstructions.png", "swaps.png", "swaps.gif",
        "prior_samples.png", "forecast.png", "forecast_error.png", "confusion.png",
    }  # fmt: skip
    text = (tmp_path / "metrics.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) == found.numbers
    again = evaluate(network.model, network.guide, train, held_out, **OWN, judge=found.judge, candidates=held_out)
    assert again.numbers == found.numbers


def test_data_without_labels_and_renderer_lose_what_needs_them(swinging):
    network, train, held_out = swinging
    lengths = torch.arange(14) % 3 + 3
    bare = Clips(held_out.frames, lengths=lengths, identity=held_out.identity)
    found = evaluate(network.model, network.guide, Clips(train.frames), bare, **OWN)
    assert set(found.numbers) == {"held_out_clips", "mean_squared_error", "nats", "roll_out / reconstruction"}
    assert found.numbers["mean_squared_error"].keys() == {"reconstruction", "roll_out", "mean_frame"}
    assert set(found.pictures) == {"reconstructions.png", "swaps.png", "swaps.gif", "prior_samples.png", "forecast.png"}
    assert found.judge is None
    single = Clips(held_out.frames, identity=torch.zeros(14).long(), renderer=held_out.renderer)
    found = evaluate(network.model, network.guide, train, single, **OWN)
    assert "swapped" not in found.numbers["mean_squared_error"]  # nobody to swap with


def test_true_swaps_of_clips_of_different_lengths(swinging):
    """A clip that is cut has the error of its own frames alone, whatever stands beside it in the batch."""
    network, train, held_out = swinging
    lengths = torch.full((14,), 5)
    options = {**OWN, "judge": None, "pictures": False, "candidates": held_out}
    whole = evaluate(network.model, network.guide, train, held_out, **options).numbers
    lengths[0] = 3
    cut = Clips(
        held_out.frames, lengths=lengths, identity=held_out.identity, labels=held_out.labels,
        factor_names=held_out.factor_names, static_factors=["colour"], motion_factors=["speed"],
        renderer=held_out.renderer,
    )  # fmt: skip
    found = evaluate(network.model, network.guide, train, cut, **options).numbers
    assert "nearest_true_clip" in whole
    assert "nearest_true_clip" not in found  # of other frames than the candidates
    for name in ("swapped", "motion_swapped"):
        assert found["mean_squared_error"][name] == pytest.approx(whole["mean_squared_error"][name], rel=0.1)
        assert found["mean_squared_error"][name] != whole["mean_squared_error"][name]


def test_steps_that_are_vectors_have_numbers_and_no_pictures(tmp_path):
    torch.manual_seed(0)
    network = Moving().eval()
    labels = {"loud": torch.arange(20) % 2}
    clips = Clips(torch.randint(0, 256, (20, 6, 5)).byte(), lengths=torch.arange(20) % 4 + 3, labels=labels)
    found = evaluate(network.model, network.guide, clips, clips, motion=["z"], folder=tmp_path)
    assert found.pictures == {}
    assert found.judge is None
    assert found.numbers["probes"]["linear"]["z"]["loud"]["chance"] == 0.5
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "report.md", "report.html"}
    assert "roll_out" in (tmp_path / "report.md").read_text()


def test_clips_held_out_may_be_wider_than_those_of_the_training(tmp_path):
    torch.manual_seed(0)
    network, labels = Moving().eval(), {"loud": torch.arange(20) % 2}
    train, held_out = (Clips(torch.randint(0, 256, (20, width, 5)).byte(), labels=labels) for width in (6, 8))
    found = evaluate(network.model, network.guide, train, held_out, motion=["z"])
    assert 0 <= found.numbers["probes"]["linear"]["z"]["loud"]["accuracy"] <= 1


def test_a_model_without_a_trajectory_is_measured_too(swinging):
    _, train, held_out = swinging

    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = (num_sequences, num_steps) if frames is None else frames.shape[:2]
        with pyro.plate("sequences", num_sequences):
            grey = pyro.sample("grey", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            clip = grey[..., None, None, None].expand(-1, num_steps, 3, 16, 16)
            pyro.sample("x", dist.Normal(clip, 1.0).to_event(4), obs=frames)

    def guide(frames, mask=None):
        with pyro.plate("sequences", len(frames)):
            pyro.sample("grey", dist.Normal(frames.mean((1, 2, 3, 4))[:, None], 0.1).to_event(1))

    found = evaluate(model, guide, train, held_out, static=["grey"], judge=None)
    assert "motion_swapped" not in found.numbers["mean_squared_error"]  # no latent is said to be motion
    assert found.numbers["mean_squared_error"]["swapped"] > 0


# What model, guide and clips may be


def test_true_frames_have_the_scale_of_their_clips():
    """Of clips whose brightest byte is 220, an honest model's swaps are still without an error."""
    clips = who_and_what(2)
    known = {"labels": clips.labels, "static_factors": ["who"], "motion_factors": ["what"], "scale": 220}
    dim = Clips(clips.frames, identity=clips.identity, renderer=clips.renderer, **known)
    content, motion = torch.cartesian_prod(torch.arange(12), torch.arange(12)).unbind(1)
    known["labels"] = {"who": clips.labels["who"][content], "what": clips.labels["what"][motion]}
    found = evaluated(Pixels(), dim, dim, candidates=Clips(dim.true_swap(content, motion), **known), pictures=False)
    errors = found.numbers["mean_squared_error"]
    assert errors["swapped"] < 1e-12
    assert errors["motion_swapped"] < 1e-12
    assert found.numbers["nearest_true_clip"] == {"of": 144, "clip": 1, "who": 1, "what": 1}


class Unsaid(Moving):
    """A guide that does not say that its latent is a trajectory, which the model's chain says."""

    def guide(self, frames, mask=None):
        with pyro.plate("sequences", len(frames)):
            pyro.sample("z", self.read(frames + 0.5).to_event(1))


def vectors(count=12, num_steps=6, **options):
    frames = torch.randint(0, 256, (count, num_steps, 5), generator=torch.Generator().manual_seed(0)).byte()

    def truth(content, motion, steps):
        return torch.nn.functional.pad(frames[motion], (0, 0, 0, (steps or num_steps) - num_steps))

    return Clips(frames, renderer=truth, **options)


def test_a_trajectory_is_one_if_the_model_says_so():
    torch.manual_seed(0)
    model = Unsaid().eval()
    clips = vectors()
    errors = evaluate(model.model, model.guide, clips, clips, motion=["z"]).numbers["mean_squared_error"]
    assert errors["roll_out"] != pytest.approx(errors["reconstruction"], rel=1e-3)
    ragged = vectors(lengths=torch.arange(12) % 3 + 4)
    programs = Programs(model.model, model.guide, (), ("z",), None, False, False, {}).looked_at(ragged)
    found = latents(programs, ragged, ["z"], 12, 6)["z"].unflatten(1, (6, 2))
    assert (found[~ragged.mask] == 0).all()
    assert (found[ragged.mask] != 0).all()


class Forgetful(Moving):
    """A model of steps without memory, beside the guide's chain."""

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = (num_sequences, num_steps) if frames is None else frames.shape[:2]
        with pyro.plate("sequences", num_sequences):
            z = pyro.sample("z", IndependentSteps(near(torch.zeros(num_sequences, num_steps, 2), 1.0)))
            pyro.sample("x", dist.Normal(self.emit(z), 0.3).to_event(2), obs=frames)


class Independent(Moving):
    """A guide of steps without memory, beside the model's chain."""

    def guide(self, frames, mask=None):
        with pyro.plate("sequences", len(frames)):
            pyro.sample("z", IndependentSteps(self.read(frames), mask))


@pytest.mark.parametrize(("kind", "can"), [(Moving, True), (Independent, True), (Forgetful, False)])
def test_the_model_decides_whether_there_is_a_forecast(kind, can):
    torch.manual_seed(0)
    model, clips = kind().eval(), vectors()
    found = evaluate(model.model, model.guide, clips, clips, motion=["z"]).numbers
    assert ("forecast_error" in found) == can
    if not can:
        with pytest.raises(
            ValueError, match="forecast_steps: got 3, expected 0 or None for a model that carries nothing"
        ):
            evaluate(model.model, model.guide, clips, clips, motion=["z"], forecast_steps=3)


class Holey(nn.Module):
    """A chain of small pictures, with holes."""

    def __init__(self):
        super().__init__()
        self.read, self.transition, self.emit = NormalHead(16, 2), GatedTransition(2, 4), nn.Linear(2, 16)

    def model(self, frames=None, mask=None, observed=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = (num_sequences, num_steps) if frames is None else frames.shape[:2]
        with pyro.plate("sequences", num_sequences):
            start = dist.Normal(torch.zeros(num_sequences, 2), 1.0).to_event(1)
            z = pyro.sample("z", MarkovChain(start, self.transition, num_steps, mask=mask))
            step = dist.Normal(self.emit(z).sigmoid().unflatten(-1, (1, 4, 4)), 0.3).to_event(3)
            pyro.sample("x", IndependentSteps(step, mask, observed), obs=frames)

    def guide(self, frames, mask=None, observed=None):
        assert observed is not None
        with pyro.plate("sequences", len(frames)):
            pyro.sample("z", IndependentSteps(self.read(frames.flatten(2)), mask))


@pytest.mark.parametrize("by_value", [True, False])
def test_of_clips_with_holes_the_measured_pixels_count(by_value):
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 256, (12, 8, 1, 4, 4), generator=generator).byte()
    observed = torch.rand((12, 5, 1, 4, 4) if by_value else (12, 5), generator=generator) < 0.7
    observed[:, 0] = True
    observed[0, 3:] = False
    if by_value:
        observed[:, :, 0, 0, 0] = False  # a pixel that nobody ever saw
    known = observed if by_value else observed[..., None, None, None].expand(-1, -1, 1, 4, 4)
    how = {
        "observed": observed, "labels": {"who": torch.arange(12) % 2}, "static_factors": ["who"],
        "identity": torch.arange(12) % 2, "renderer": lambda content, motion, num_steps: truth[motion][:, :num_steps],
    }  # fmt: skip
    torch.manual_seed(0)
    network = Holey().eval()
    asked = {"motion": ["z"], "forecast_steps": 3, "batch_size": 5}
    filled = [Clips(truth[:, :5].where(known, torch.tensor(byte).byte()), **how) for byte in (0, 255)]
    whole = Clips(truth[:, :5], **how | {"observed": torch.ones_like(observed)})
    one, other = (evaluate(network.model, network.guide, whole, clips, **asked) for clips in filled)
    assert one.numbers == other.numbers
    assert set(one.pictures) == {"reconstructions.png", "prior_samples.png", "forecast.png"}
    assert one.judge is None
    assert "probes" in one.numbers
    for name in ("reconstructions.png", "prior_samples.png"):
        unseen = one.pictures[name][0, :4, 3 * 6 : 3 * 6 + 4]  # the fourth frame of clip 0, in two greys
        assert sorted(set(unseen.flatten().tolist())) == pytest.approx([0.35, 0.65])
    frames = truth.double() / 255
    mean = frames[:, :5].mean((0, 1))
    errors = [(row - mean)[seen].square().mean() for row, seen in zip(frames[:, :5], known, strict=True)]
    assert one.numbers["mean_squared_error"]["mean_frame"] == pytest.approx(float(sum(errors) / 12), rel=1e-5)
    last = mean.repeat(12, 1, 1, 1)
    for n in range(12):
        for t in range(5):
            last[n] = torch.where(known[n, t], frames[n, t], last[n])
    wanted = (frames[:, 5:] - last[:, None]).square().mean((0, 2, 3, 4))
    assert one.numbers["forecast_error"]["last frame, frozen"][5:] == pytest.approx(wanted.tolist(), rel=1e-5)
    assert len(one.numbers["forecast_error"]["forecast"]) == 8


def test_a_swap_without_a_trajectory_is_judged_over_the_source():
    """What is swapped in is one value of a clip; the frames are as many as the source has."""
    clips = who_and_what(4)
    lengths = torch.arange(len(clips)) % 4 + 1
    lengths[clips.labels["what"] == 1] = 1
    ragged = Clips(
        clips.frames, lengths=lengths, identity=clips.identity, labels=clips.labels, static_factors=["who"],
        motion_factors=["what"], renderer=clips.renderer,
    )  # fmt: skip
    found = evaluated(Pixels(), clips, ragged, judge=reader(), pictures=False, motion=["d"]).numbers
    assert found["swaps"]["motion"]["what"]["leakage"] == 1  # z stays the source's
    longer = evaluated(Pixels(), clips, ragged, pictures=False).numbers["mean_squared_error"]
    assert longer["motion_swapped"] == 0  # the donor's length, where a trajectory is the donor's


def test_swaps_leave_out_labels_of_which_nobody_says_whether_they_move():
    clips = who_and_what(4)
    who_alone = Clips(clips.frames, identity=clips.identity, labels=clips.labels, static_factors=["who"])
    found = evaluated(Pixels(), clips, who_alone, judge=reader(), pictures=False)
    assert {name: set(of) for name, of in found.numbers["swaps"].items()} == {"identity": {"who"}, "motion": {"who"}}
    neither = Clips(clips.frames, identity=clips.identity, labels=clips.labels)
    found = evaluated(Pixels(), clips, neither, judge=reader(), pictures=False)
    assert found.numbers["swaps"] == {}
    assert "leakage" not in found.tables()


def test_latents_may_be_outside_of_the_plate_or_auxiliary():
    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        num_sequences, num_steps = (num_sequences, num_steps) if frames is None else frames.shape[:2]
        shared = pyro.sample("shared", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        with pyro.plate("sequences", num_sequences):
            level = pyro.sample("level", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            values = (level + shared)[:, None].expand(-1, num_steps, 5)
            pyro.sample("x", dist.Normal(values, 1.0).to_event(2), obs=frames)

    def guide(frames, mask=None):
        pyro.sample("shared", dist.Normal(torch.full((5,), 0.2), 1.0).to_event(1))
        with pyro.plate("sequences", len(frames)):
            first = pyro.sample("u", near(frames.mean((1, 2))[:, None]), infer={"is_auxiliary": True})
            pyro.sample("level", near(first))

    clips = vectors()
    found = evaluate(model, guide, clips, clips, static=["level"], batch_size=5).numbers
    assert found["nats"]["KL(shared)"] == pytest.approx(0.1 / 12)  # each clip's share of it
    assert found["mean_squared_error"]["roll_out"] == pytest.approx(found["mean_squared_error"]["reconstruction"])


def test_forecasts_keep_to_the_batch_size(monkeypatch):
    model, clips, sizes, means = Moving().eval(), vectors(), [], []

    def guide(frames, mask=None):
        sizes.append(len(frames))
        model.guide(frames, mask)

    mean_frame = _errors.mean_frame
    monkeypatch.setattr(_errors, "mean_frame", lambda clips: means.append(1) or mean_frame(clips))
    assert "forecast_error" in evaluate(model.model, guide, clips, clips, motion=["z"], batch_size=5).numbers
    assert max(sizes) == 5
    assert len(means) == 2  # once for errors, once for forecasts


# A report beside an earlier one


def test_numbers_of_an_earlier_model_do_not_survive(found, tmp_path):
    assert found["honest"].numbers.keys() <= NUMBERS
    found["honest"].save(tmp_path)
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps({**numbers, "minutes": 3}))
    clips = who_and_what(4)
    later = evaluated(Pixels(), clips, clips, pictures=False)
    later.save(tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"minutes": 3, **later.numbers}


def test_all_that_is_written_is_returned(found, tmp_path):
    written = found["honest"].save(tmp_path)
    assert set(written) == set(tmp_path.iterdir())
    assert tmp_path / "judge.pt" in written


def test_a_report_is_written_whole_or_not_at_all(found, tmp_path, monkeypatch):
    unwritten = {}
    monkeypatch.setattr(_files, "write", lambda path, content, **how: unwritten.setdefault(path.name, (path, content)))
    found["honest"].save(tmp_path)
    assert {"metrics.json", "report.md", "report.html"} <= unwritten.keys()
    assert not (tmp_path / "report.md").exists()


def renamed(clips):
    """Return clips whose colours are called by numbers."""
    return Clips(clips.frames, labels={"colour": clips.labels["colour"]})


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"static": "identity"}, TypeError, "static: got the string 'identity', expected a sequence"),
        ({"motion": ["paht"]}, ValueError, r"motion: the guide has no site \['paht'\], expected some of"),
        ({"emission": "x"}, ValueError, "emission: the model has no site 'x', expected one of"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"judge": 0}, ValueError, "judge: got 0"),
        ({"static": ["path"]}, ValueError, r"motion: \['path'\] are in `static` too, expected each site in one"),
        ({"forecast_steps": -1}, ValueError, "forecast_steps: got -1, expected an integer >= 0"),
        ({"factors": "colour"}, TypeError, "factors: got the string 'colour', expected a sequence"),
        ({"factors": ["color"]}, ValueError, r"factors: the clips have no label \['color'\], expected some of"),
        (
            {"candidates": pendulum(4, seed=0, num_steps=6, image_size=16)},
            ValueError,
            r"candidates: have lengths \[6\] and steps of shape \(3, 16, 16\), expected 5",
        ),
        (
            {"candidates": renamed(pendulum(4, seed=0, num_steps=5, image_size=16)), "judge": None},
            ValueError,
            "candidates: factor 'colour' has other values than that of held_out .* pass the same factor_names to both",
        ),
        (
            {"candidates": Clips(torch.zeros(2, 3, 5).byte(), observed=torch.ones(2, 3) > 0)},
            ValueError,
            "candidates: got Clips with `observed`, expected whole clips",
        ),
        (
            {"train": Clips(torch.zeros(2, 3, 5).byte(), observed=torch.ones(2, 3).triu() > 0), "judge": reader()},
            ValueError,
            "judge: got a Judge with clips that have `observed`, expected a number or None",
        ),
        (
            {"train": Clips(torch.zeros(2, 3, 5).byte(), covariates=torch.ones(2, 3, 1))},
            ValueError,
            r"train: got Clips with `covariates`, expected Clips without, .*: clips.as_sequences\(\)",
        ),
        ({"season": 3}, ValueError, "season: got 3, expected None where `held_out` is Clips"),
        ({"hidden": 0.2}, ValueError, "hidden: got 0.2, expected None where `held_out` is Clips"),
        (
            {"scaler": Scaler(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))},
            ValueError,
            r"scaler: got Scaler\(1x1x1\), expected None where `held_out` is Clips",
        ),
        ({"num_samples": 7}, ValueError, "num_samples: got 7, expected None where `held_out` is Clips"),
        (
            {"judge": None, "factors": ["colour"]},
            ValueError,
            r"factors: got \['colour'\], expected None with judge=None, which leaves out all labels",
        ),
        ({"judge": len}, TypeError, "judge: got builtin_function_or_method, expected a Judge"),
    ],
)
def test_what_is_wrong_is_named(options, error, said, swinging):
    network, train, held_out = swinging
    with pytest.raises(error, match=said):
        evaluate(network.model, network.guide, **{"train": train, "held_out": held_out, **OWN, **options})


def test_a_module_in_training_mode_is_refused(swinging):
    _, train, held_out = swinging
    network = Swinging()
    with pytest.raises(ValueError, match=r"model: Swinging is in training mode, expected .eval\(\)"):
        evaluate(network.model, network.guide, train, held_out, **OWN)
    with pytest.raises(ValueError, match="guide: Swinging is in training mode"):
        evaluate(Swinging().eval().model, network.guide, train, held_out, **OWN)


def test_a_missing_extra_is_named():
    program = "import sys; sys.modules['torchmetrics'] = None; import seqdisent.evaluation"
    environment = {**os.environ, "PYTHONPATH": str(Path(seqdisent.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert done.returncode != 0
    assert "pip install 'seqdisent[metrics]'" in done.stderr
