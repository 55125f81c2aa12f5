"""Models that cheat, run through the library's own interventions: each must score badly just where it should.

A clip has two factors, who and what, and shows each as one bright pixel of a row of its own; the pixel of `what` moves
on by that many places at each step. So an exact judge can be written down, and so can every true swap. The latents are
s and d.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import seqdisent
from seqdisent.datasets import Clips
from seqdisent.metrics import (
    AccuracyConsistency,
    GenerationEntropies,
    SwapAccuracy,
    intervention_score,
    pick_donors,
    probe_table,
    sampled_swap_accuracy,
    squared_error,
)

WHO, WHAT, STEPS = 4, 5, 3
SIZES = {"who": WHO, "what": WHAT}


def render(who: Tensor, what: Tensor, num_steps: int) -> Tensor:
    """Draw clips (N, T, 1, 2, WHAT) from soft class memberships (N, WHO) and (N, WHAT)."""
    moved = [
        torch.stack([what[:, [k for k in range(WHAT) if (k * t) % WHAT == place]].sum(-1) for place in range(WHAT)], -1)
        for t in range(1, num_steps + 1)
    ]
    top = F.pad(who, (0, WHAT - WHO)).unsqueeze(1).expand(-1, num_steps, -1)
    return torch.stack([top, torch.stack(moved, 1)], 2).unsqueeze(2)


def read(frames: Tensor) -> dict[str, Tensor]:
    """Return the soft class memberships that a clip was drawn from: its first frame tells both."""
    return {"who": frames[:, 0, 0, 0, :WHO], "what": frames[:, 0, 0, 1]}


def exact_judge(frames: Tensor) -> dict[str, Tensor]:
    return {name: 50 * membership for name, membership in read(frames).items()}


def blind_judge(frames: Tensor) -> dict[str, Tensor]:
    return {name: 50.0 * F.one_hot(torch.zeros(len(frames), dtype=torch.long), size) for name, size in SIZES.items()}


class Program:
    """A model and guide of which some latent holds who, some what; the rest of each latent is one idle class."""

    def __init__(self, *, s: tuple[str, ...], d: tuple[str, ...]) -> None:
        self.holds = {"s": s, "d": d}

    def width(self, site: str) -> int:
        return math.prod(SIZES[name] for name in self.holds[site])

    def decode(self, latents: dict[str, Tensor], num_steps: int) -> Tensor:
        # what nobody holds is shown as class 0
        members = {name: F.one_hot(torch.zeros(len(latents["s"]), dtype=torch.long), k) for name, k in SIZES.items()}
        for site, names in self.holds.items():
            table = latents[site].unflatten(-1, [SIZES[name] for name in names] or [1])
            for i, name in enumerate(names):
                members[name] = table.sum([1 + j for j in range(len(names)) if j != i]) if len(names) > 1 else table
        return render(members["who"].float(), members["what"].float(), num_steps)

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None):
        if frames is not None:
            num_sequences, num_steps = frames.shape[:2]
        with pyro.plate("sequences", num_sequences):
            latents = {
                site: pyro.sample(site, dist.OneHotCategorical(torch.ones(num_sequences, self.width(site))))
                for site in self.holds
            }
            mean = self.decode(latents, num_steps)
            pyro.sample("x", dist.Normal(mean, 0.1).to_event(4), obs=frames)

    def guide(self, frames, mask=None):
        members = read(frames)
        with pyro.plate("sequences", len(frames)):
            for site, names in self.holds.items():
                code = torch.ones(len(frames), 1)
                for name in names:
                    code = (code.unsqueeze(-1) * members[name].unsqueeze(1)).flatten(1)
                pyro.sample(site, dist.Delta(code, event_dim=1))


HONEST = Program(s=("who",), d=("what",))
ALL_IN_S = Program(s=("who", "what"), d=())
ALL_IN_D = Program(s=(), d=("who", "what"))
IGNORANT = Program(s=(), d=())


class Report:
    """Every measure of one program."""

    def __init__(self, program: Program, judge=exact_judge, *, copies: int = 6) -> None:
        who, what = torch.cartesian_prod(torch.arange(WHO), torch.arange(WHAT)).repeat(copies, 1).unbind(1)
        self.labels = {"who": who, "what": what}
        self.frames = render(F.one_hot(who, WHO).float(), F.one_hot(what, WHAT).float(), STEPS)
        donors = pick_donors(who, seed=0)
        donor_labels = {name: label[donors] for name, label in self.labels.items()}
        self.swaps, self.errors = {}, {}
        for site, name in (("s", "who"), ("d", "what")):
            swapped = seqdisent.swap(program.model, program.guide, self.frames, self.frames[donors], sites=[site])
            metric = SwapAccuracy(SIZES, follows=[name])
            metric.update(judge(swapped["x"].mean), self.labels, donor_labels)
            self.swaps[site] = metric.compute()
            true = {**self.labels, name: donor_labels[name]}
            truth = render(F.one_hot(true["who"], WHO).float(), F.one_hot(true["what"], WHAT).float(), STEPS)
            self.errors[site] = float(squared_error(swapped["x"].mean, truth).mean())
        reconstruction = seqdisent.reconstruct(program.model, program.guide, self.frames)["x"].mean
        self.reconstruction_error = float(squared_error(reconstruction, self.frames).mean())
        consistency = AccuracyConsistency(SIZES)
        consistency.update(judge(self.frames), judge(reconstruction))
        self.consistency = consistency.compute()
        generated = seqdisent.generate(program.model, num_sequences=400, num_steps=STEPS)["x"].mean
        entropies = GenerationEntropies(SIZES)
        entropies.update(judge(generated))
        self.entropies = entropies.compute()
        self.score = float(intervention_score(list(self.swaps.values())))
        clips = Clips(self.frames.byte(), scale=1, labels=self.labels, motion_factors=["what"])
        self.sampled = sampled_swap_accuracy(program.model, program.guide, judge, clips, keep=["d"])
        latents = {name: site.value for name, site in seqdisent.infer(program.guide, self.frames).items()}
        half = len(who) // 2
        self.probes = probe_table(
            {name: value[:half] for name, value in latents.items()},
            {name: value[:half] for name, value in self.labels.items()},
            {name: value[half:] for name, value in latents.items()},
            {name: value[half:] for name, value in self.labels.items()},
        )

    def accuracy(self, site: str) -> dict[str, float]:
        return {name: float(score.accuracy) for name, score in self.swaps[site].items()}

    def leakage(self, site: str) -> dict[str, float]:
        return {name: float(score.leakage) for name, score in self.swaps[site].items()}

    def kept(self, name: str) -> tuple[float, float, float]:
        """Accuracy, chance and inception score of a factor with d kept and s drawn."""
        score = self.sampled[name]
        return float(score.accuracy), float(score.chance), float(score.entropies.inception_score)

    def agreement(self, site: str) -> dict[str, float]:
        return {name: float(score.agreement) for name, score in self.swaps[site].items()}

    def probed(self) -> dict[str, set[str]]:
        """Which factors each latent tells perfectly; for the others, check that it tells nothing."""
        told = {}
        for site, row in self.probes.items():
            told[site] = {name for name, score in row.items() if score.accuracy == 1}
            assert all(row[name].accuracy <= row[name].chance + 1e-9 for name in set(row) - told[site])
        return told


def nearly(value, tolerance=0.02):
    return pytest.approx(value, abs=tolerance)


def test_the_honest_model_scores_well_everywhere():
    report = Report(HONEST)
    for site in "sd":
        assert report.accuracy(site) == {"who": 1, "what": 1}
        assert report.leakage(site) == {"who": 0, "what": 0}
        assert report.errors[site] == 0
        for name, score in report.swaps[site].items():
            assert float(score.chance) < 0.4, name
    assert report.score == nearly(1)
    assert report.kept("what") == (1, nearly(1 / WHAT), nearly(WHAT))
    accuracy, chance, score = report.kept("who")
    assert accuracy < chance + 4 * (chance * (1 - chance) / 120) ** 0.5  # four standard errors
    assert score > 3.8
    assert report.reconstruction_error == 0
    assert report.consistency.average == 1
    assert report.probed() == {"s": {"who"}, "d": {"what"}}
    for name, size in SIZES.items():
        assert float(report.entropies[name].inception_score) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize(("program", "full", "empty"), [(ALL_IN_D, "d", "s"), (ALL_IN_S, "s", "d")])
def test_everything_in_one_latent_fails_on_the_factors_that_should_stay_or_follow(program, full, empty):
    report = Report(program)
    mine, other = ("what", "who") if full == "d" else ("who", "what")
    # one direction alone is perfect, which is why it is never reported alone
    assert report.accuracy(full)[mine] == 1
    assert report.accuracy(empty)[other] == report.agreement(empty)[other] < 0.5
    # with the full latent, the whole clip is the donor's: the other factor leaks, always
    assert report.accuracy(full)[other] == report.agreement(full)[other] < 0.5
    assert report.leakage(full) == {mine: 0, other: 1}
    # with the empty one, nothing is: what should follow stays, always
    assert report.accuracy(empty)[mine] == 1
    assert report.leakage(empty) == {mine: 0, other: 1}
    for site in "sd":
        assert float(report.swaps[site][other].leakage_chance) < 0.5
        assert report.errors[site] > 0.05
    # with the motion kept and the identity drawn, everything stays or nothing does
    if full == "d":
        assert report.kept("what") == (1, nearly(1 / WHAT), nearly(WHAT))
        assert report.kept("who") == (1, nearly(1 / WHO), nearly(WHO))
    else:
        assert report.kept("what")[0] < 0.4
        assert report.kept("who")[0] < 0.45
    assert report.probed() == {full: {"who", "what"}, empty: set()}
    assert report.score < 0.7
    # what does not swap cannot tell: it reconstructs and generates as well as the honest one
    assert report.reconstruction_error == 0
    assert report.consistency.average == 1
    for name, size in SIZES.items():
        assert float(report.entropies[name].inception_score) == pytest.approx(size, rel=0.05)


def test_a_model_that_ignores_its_input_is_at_chance_everywhere():
    report = Report(IGNORANT)
    for site in "sd":
        for score in report.swaps[site].values():
            assert float(score.accuracy) <= float(score.chance)
            assert float(score.leakage) <= float(score.leakage_chance)
            assert float(score.accuracy) < 0.4
        assert report.errors[site] > 0.05
    assert report.reconstruction_error > 0.05
    assert report.score < 0.7
    assert report.probed() == {"s": set(), "d": set()}
    for name, size in SIZES.items():
        assert float(report.consistency.agreement[name]) == pytest.approx(1 / size)
        assert float(report.consistency.agreement[name]) <= float(report.consistency.chance[name]) + 1e-6
        assert float(report.entropies[name].inception_score) == nearly(1)


def test_a_blind_judge_puts_an_honest_model_at_chance_and_gives_itself_away():
    report = Report(HONEST, blind_judge)
    for site in "sd":
        for score in report.swaps[site].values():
            assert float(score.accuracy) <= float(score.chance)
            assert float(score.leakage) <= float(score.leakage_chance)
    # it agrees with itself, and its chance level says why
    assert report.consistency.average == 1
    assert all(chance == 1 for chance in report.consistency.chance.values())
    for score in report.entropies.values():
        assert float(score.inception_score) == nearly(1)
    # what involves no judge is untouched
    assert report.errors == {"s": 0, "d": 0}
    assert report.probed() == {"s": {"who"}, "d": {"what"}}


def test_clips_are_drawn_and_read_as_said():
    who, what = torch.eye(WHO)[[1]], torch.eye(WHAT)[[2]]
    clip = render(who, what, STEPS)
    assert [int(clip[0, t, 0, 1].argmax()) for t in range(STEPS)] == [2, 4, 1]
    assert {name: int(logits.argmax()) for name, logits in exact_judge(clip).items()} == {"who": 1, "what": 2}
