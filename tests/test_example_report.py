"""`evaluate RUN`: the measures of a model of known worth, and the tables made of them."""

import importlib
import json
import math
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from seqdisent.datasets import Clips
from seqdisent.metrics import Judge, pick_donors

for needed in ("torchmetrics", "sklearn", "markdown_it", "matplotlib", "lightning"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module", autouse=True)
def examples_on_the_path():
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    yield
    sys.path.pop(0)


@pytest.fixture(scope="module")
def report():
    return importlib.import_module("report")


@pytest.fixture(scope="module")
def example():
    return importlib.import_module("vdsm").EXAMPLE


def who_and_what(repeats):
    """Clips whose upper left pixel says who, and the lower right one what, with a little noise."""
    who, what = (labels.repeat(repeats) for labels in torch.cartesian_prod(torch.arange(3), torch.arange(2)).unbind(1))
    frames = torch.zeros(len(who), 4, 1, 2, 2, dtype=torch.uint8)
    noise = torch.randint(0, 20, (2, len(who), 1), generator=torch.Generator().manual_seed(0))
    frames[:, :, 0, 0, 0] = (100 * who[:, None] + noise[0]).to(torch.uint8)
    frames[:, :, 0, 1, 1] = (200 * what[:, None] + noise[1]).to(torch.uint8)

    def truth(content, motion, num_steps):
        swapped = frames[motion].clone()
        swapped[:, :, 0, 0, 0] = frames[content][:, :, 0, 0, 0]
        return swapped

    return Clips(
        frames, identity=who, labels={"who": who, "what": what}, static_factors=["who"], motion_factors=["what"],
        renderer=truth,
    )  # fmt: skip


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
            z = pyro.sample("z", dist.Normal(torch.zeros(steps, 1), 1.0).to_event(2))
            painted = torch.zeros(*z.shape[:-1], 1, 2, 2)
            painted[..., 0, 0, 0] = (d[..., :1] if self.all_in_d else s).clamp(0, 1).expand(z.shape[:-1])
            painted[..., 0, 1, 1] = z[..., 0].clamp(0, 1)
            pyro.sample("x", dist.Normal(painted, 0.1).to_event(4), obs=frames)

    def guide(self, frames, mask=None):
        def near(value, event):
            return dist.Normal(value, 1e-3).to_event(event)

        with pyro.plate("sequences", frames.shape[0]):
            who, what = frames[:, 0, :, 0, 0], frames[:, :, :, 1, 1]
            pyro.sample("s", near(torch.zeros_like(who) if self.all_in_d else who, 1))
            pyro.sample("d", near(torch.cat([who if self.all_in_d else 0 * who, what[:, 0]], -1), 1))
            pyro.sample("z", near(what, 2))


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


@pytest.fixture(scope="module")
def measured(report, example):
    judge = Reader()
    judge.num_features = 2
    train, held_out = who_and_what(20), who_and_what(10)
    donors = pick_donors(held_out.identity, held_out.labels["what"], seed=0)
    return {
        name: report.measure(example, model, train, held_out, judge, donors, seed=0)
        for name, model in {"honest": Pixels(), "all in d": Pixels(all_in_d=True)}.items()
    }


def test_an_honest_model_scores_full_marks(measured):
    scores = measured["honest"]
    assert {name: float(value) for name, value in scores["consistency"].items()} == {"who": 1, "what": 1, "average": 1}
    for direction in ("identity", "motion"):
        for factor, score in scores["swaps"][direction].items():
            assert score["follows"] == (factor == {"identity": "who", "motion": "what"}[direction])
            assert float(score["accuracy"]) == 1
            assert float(score["leakage"]) == 0
    assert float(scores["intervention_score"]) == pytest.approx(1, abs=1e-6)
    # neither reconstructions nor swaps have an error at all: 0 / 0
    assert {name: math.isnan(ratio) for name, ratio in scores["error_over_reconstruction"].items()} == {
        "identity": True, "motion": True,
    }  # fmt: skip
    assert scores["probes"]["linear"]["s"]["who"]["accuracy"] == 1
    assert scores["probes"]["linear"]["d"]["what"]["accuracy"] == 1
    for kind in ("linear", "mlp"):
        assert scores["probes"][kind]["d"]["who"]["accuracy"] < 0.6
        assert scores["probes"][kind]["s"]["what"]["accuracy"] < 0.75
    distance = {name: float(of["distance"]) for name, of in scores["frechet"].items()}
    assert distance["reconstruction"] == pytest.approx(distance["real clips"], abs=1e-4)
    assert distance["prior"] > distance["real clips"] + 0.01


def test_a_model_with_everything_in_d_is_found_out(measured):
    scores = measured["all in d"]
    assert float(scores["consistency"]["average"]) == 1  # reconstruction shows nothing of it
    assert float(scores["swaps"]["identity"]["who"]["accuracy"]) == 0  # the donor's s changes nothing
    assert float(scores["swaps"]["identity"]["who"]["leakage"]) == 1
    assert float(scores["swaps"]["motion"]["what"]["accuracy"]) == 1
    assert float(scores["swaps"]["motion"]["who"]["accuracy"]) == 0  # the motion brings the donor with it
    assert scores["probes"]["linear"]["d"]["who"]["accuracy"] == 1
    assert scores["probes"]["linear"]["s"]["who"]["accuracy"] < 0.6
    assert float(scores["intervention_score"]) == pytest.approx(0.5)
    assert float(scores["error_over_reconstruction"]["identity"]) == math.inf  # of none at all


def test_the_report_says_what_was_measured(report, measured, tmp_path):
    clips = who_and_what(2)
    written = report.write_report(measured["all in d"], "made up", clips, tmp_path)
    assert all(path.stat().st_size > 0 for path in written)
    text = (tmp_path / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| who | the donor's"))
    assert row.split(" | ")[2] == "0.00"  # accuracy of the identity swap
    assert "paper" not in text  # it measured none of this data
    page = (tmp_path / "report.html").read_text()
    assert page.count("<table>") == text.count("\n| --- |")
    json.dumps(report.plain(measured["honest"]))


def test_papers_numbers_stand_beside_ours(report, measured):
    scores = {key: value for key, value in measured["honest"].items() if key != "confusion"}
    own = {"body": 1.0, "shirt": 0.9, "pants": 0.8, "hair": 0.7, "action": 0.6}
    scores["consistency"] = {**own, "direction": 0.1, "average": 0.5}
    lines = "\n".join(report.tables(scores, "sprites")).splitlines()
    assert any(line.startswith("| body |") and line.endswith("| 100.00 | 99.67 |") for line in lines)
    assert any(
        line.startswith("| average |") and line.endswith("| 80.00 | 99.53 |") for line in lines
    )  # of the same five


def test_clips_of_different_lengths_are_judged_over_their_own_frames(report, example):
    clips = who_and_what(11)  # 66: a batch of 64 and one of 2
    lengths = torch.arange(len(clips)) % 3 + 1
    lengths[64:] = 1
    frames = clips.frames.clone()
    frames[torch.arange(4) >= lengths[:, None]] = 255
    ragged = Clips(
        frames, lengths=lengths, identity=clips.identity, labels=clips.labels, static_factors=["who"],
        motion_factors=["what"],
    )  # fmt: skip
    judge = Reader()
    judge.num_features = 2
    donors = pick_donors(ragged.identity, ragged.labels["what"], seed=0)
    scores = report.measure(example, Pixels(), clips, ragged, judge, donors, seed=0)["swaps"]
    assert {float(score["accuracy"]) for of in scores.values() for score in of.values()} == {1.0}


class Unlucky(Pixels):
    """Has a posterior that is not 0 at padding."""

    def guide(self, frames, mask=None):
        super().guide(frames + 0.5, mask)


def test_a_trajectory_is_probed_with_all_its_steps(report, example):
    clips = who_and_what(11)  # 66: a batch of 64 and one of 2, which ends earlier
    lengths = torch.arange(len(clips)) % 4 + 1
    lengths[64:] = 2
    ragged = Clips(clips.frames, lengths=lengths, identity=clips.identity, labels=clips.labels)
    latents, labels = report._latents(example._replace(motion=("z",)), Unlucky(), ragged, ["what"])
    pixels = clips.frames[:, :, 0, 1, 1] / 255 + 0.5
    torch.testing.assert_close(latents["z"], torch.where(torch.arange(4) < lengths[:, None], pixels, 0.0))
    assert (labels["what"] == clips.labels["what"]).all()


def test_a_judge_is_trained_once(report, tmp_path):
    clips = who_and_what(3)
    path = tmp_path / "judge.pt"
    first = report.find_judge(clips, clips, path, seed=0, num_steps=2)
    again = report.find_judge(clips, clips, path, seed=1, num_steps=None)
    torch.testing.assert_close(again.state_dict(), first.state_dict())
    asked = report.find_judge(clips, clips, path, seed=1, num_steps=3)
    assert (asked.heads.weight != first.heads.weight).any()


def test_what_no_pair_can_show_is_null(report):
    assert report.plain({"a": torch.tensor([float("nan"), 1.0]), "b": float("nan")}) == {"a": [None, 1.0], "b": None}
