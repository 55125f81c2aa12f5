"""A judge on clips from the prior, and on clips whose motion is kept and whose identity is drawn; real pendula."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import WhoWhat
from strategies import Tensors, seeds

from seqdisent import IndependentSteps
from seqdisent.datasets import Clips, pendulum
from seqdisent.datasets.pendulum import COLOURS
from seqdisent.metrics import GenerationEntropies, generation_scores, sampled_swap_accuracy, train_judge

SIZES = {"who": 4, "what": 3}
PALETTE = torch.tensor(list(COLOURS.values()))


@given(seed=seeds(), generated=st.integers(1, 9), real=st.integers(1, 9))
def test_entropies_are_those_of_the_metric_and_confidence_is_that_of_a_loop(seed, generated, real):
    tensors = Tensors(seed)
    sets = [{name: 3 * tensors.normal(count, size) for name, size in SIZES.items()} for count in (generated, real)]
    scores = generation_scores(*sets, SIZES)
    for logits, entropies, confidence in (
        (sets[0], "generated", "confidence"),
        (sets[1], "real", "real_confidence"),
    ):
        metric = GenerationEntropies(SIZES)
        metric.update(logits)
        for name in SIZES:
            assert getattr(scores[name], entropies) == metric.compute()[name]
            rows = [max(row) for row in logits[name].softmax(-1).tolist()]
            assert float(getattr(scores[name], confidence)) == pytest.approx(sum(rows) / len(rows))


def test_predictions_that_are_refused_are_named():
    good = {name: torch.zeros(5, size) for name, size in SIZES.items()}
    for position, argument in enumerate(("generated", "real")):
        for wrong in (torch.zeros(5).long(), torch.full((5, 3), 1 / 3), torch.zeros(4, 3), torch.zeros(5, 2)):
            sets = [good, good]
            sets[position] = {**good, "what": wrong}
            with pytest.raises(ValueError, match=rf"^{argument}\['what'\]: "):
                generation_scores(*sets, SIZES)


# a model of real pendula that needs no training: the colour is s, and the picture without it, frame by frame, is z


def pendula(count, seed):
    """Every twelfth frame of real pendula: a fast one is then where it was, a slow one on the other side."""
    clips = pendulum(count, seed=seed, num_steps=25, image_size=16)
    return Clips(
        clips.frames[:, ::12],
        labels=clips.labels,
        factor_names=clips.factor_names,
        static_factors=clips.static_factors,
        motion_factors=clips.motion_factors,
    )


@pytest.fixture(scope="module")
def data():
    train, held_out = pendula(700, seed=0).split(0.2, seed=0, by="sequence")
    small = {"channels": (16, 32), "frame_dim": 64, "hidden_dim": 32}
    judge = train_judge(train, held_out, num_steps=300, batch_size=32, learning_rate=1e-2, **small)
    assert judge.accuracy["colour"] > 0.99
    assert judge.accuracy["speed"] > 0.95
    return held_out, judge


class Painter:
    """Paints the pictures z in colour s; `leaks` keeps the colour in z."""

    def __init__(self, *, leaks=False):
        self.leaks = leaks

    def model(self, frames=None, mask=None, *, num_sequences=None, num_steps=None):
        with pyro.plate("sequences", num_sequences):
            s = pyro.sample("s", dist.OneHotCategorical(torch.ones(num_sequences, 7)))
            blank = torch.zeros(num_sequences, num_steps, 3, 16, 16)
            z = pyro.sample("z", IndependentSteps(dist.Normal(blank, 1.0).to_event(3)))
            colour = 1.0 if self.leaks else (s @ PALETTE)[:, None, :, None, None]
            pyro.sample("x", dist.Normal(z * colour, 0.1).to_event(4))

    def guide(self, frames, mask=None):
        colour = frames.amax((1, 3, 4))
        nearest = torch.cdist(colour, PALETTE).argmin(1)
        grey = frames if self.leaks else (frames / PALETTE[nearest][:, None, :, None, None]).clamp(max=1)
        with pyro.plate("sequences", len(frames)):
            pyro.sample("s", dist.Delta(torch.nn.functional.one_hot(nearest, 7).float(), event_dim=1))
            pyro.sample("z", IndependentSteps(dist.Normal(grey, 0.01).to_event(3)))


def test_an_honest_model_of_pendula_keeps_the_speed_and_draws_the_colour(data):
    held_out, judge = data
    painter = Painter()
    before = torch.random.get_rng_state()
    scores = sampled_swap_accuracy(painter.model, painter.guide, judge, held_out, keep=["z"], seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {name: score.kept for name, score in scores.items()} == {"colour": False, "speed": True}
    speed, colour = scores["speed"], scores["colour"]
    assert float(speed.accuracy) > 0.93
    assert 0.4 < float(speed.chance) < 0.6
    chance = 1 / 7
    assert abs(float(colour.accuracy) - chance) < 4 * (chance * (1 - chance) / len(held_out)) ** 0.5
    assert float(colour.entropies.inception_score) > 6
    assert float(speed.entropies.inception_score) > 1.6
    assert float(speed.entropies.inter) < math.log(2) + 1e-6
    again = sampled_swap_accuracy(painter.model, painter.guide, judge, held_out, keep=["z"], seed=3)
    other = sampled_swap_accuracy(painter.model, painter.guide, judge, held_out, keep=["z"], seed=4)
    assert again == scores != other


def test_everything_in_the_motion_reaches_the_protocols_scores_and_is_given_away_by_the_colour(data):
    held_out, judge = data
    painter = Painter(leaks=True)
    scores = sampled_swap_accuracy(painter.model, painter.guide, judge, held_out, keep=["z"])
    assert float(scores["speed"].accuracy) > 0.93
    assert float(scores["colour"].entropies.inception_score) > 6
    assert float(scores["colour"].accuracy) > 0.99 > 3 * float(scores["colour"].chance)


def test_the_other_way_round_the_colour_is_kept_and_the_motion_is_noise(data):
    held_out, judge = data
    painter = Painter()
    options = {"keep": ["s"], "factors": held_out.static_factors, "sample": True, "batch_size": 50}
    scores = sampled_swap_accuracy(painter.model, painter.guide, judge, held_out, **options)
    assert {name: score.kept for name, score in scores.items()} == {"colour": True, "speed": False}
    assert float(scores["speed"].accuracy) <= float(scores["speed"].chance) + 0.2
    assert float(scores["speed"].entropies.inception_score) < 1.2


def test_a_judge_says_whether_drawn_pendula_are_like_real_ones(data):
    held_out, judge = data
    real = judge(held_out.batch(range(len(held_out))).frames)
    fresh = judge(pendula(140, seed=5).batch(range(140)).frames)
    same = generation_scores(fresh, real, judge.num_classes)
    for score in same.values():
        assert float(score.confidence) == pytest.approx(float(score.real_confidence), abs=0.03)
        assert float(score.generated.inter) == pytest.approx(float(score.real.inter), abs=0.02)
    red = {name: logits[held_out.labels["colour"] == 0] for name, logits in real.items()}
    collapsed = generation_scores(red, real, judge.num_classes)
    assert float(collapsed["colour"].generated.inception_score) < 1.2
    assert float(collapsed["colour"].real.inception_score) > 6
    assert float(collapsed["colour"].confidence) > 0.95


# ragged clips, against the program by hand


def test_the_kept_latents_are_the_clips_own_and_the_others_are_drawn_for_each():
    program = WhoWhat().float()
    frames = torch.randint(256, (5, 6, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    lengths = torch.tensor([6, 2, 4, 6, 3])
    clips = Clips(frames, lengths=lengths, labels={"what": torch.arange(5) % 3}, motion_factors=["what"])
    seen, masks = [], []

    def model(*args, mask=None, **inputs):
        masks.append(mask)
        program.model(*args, mask=mask, **inputs)

    def judge(frames, mask=None):
        seen.extend(zip(frames, frames.new_ones(frames.shape[:2]).bool() if mask is None else mask, strict=True))
        return {"what": torch.eye(3)[torch.arange(len(frames)) % 3] * 9, "unknown": torch.zeros(len(frames), 2)}

    scores = sampled_swap_accuracy(model, program.guide, judge, clips, keep=["d", "z"], batch_size=2)
    assert list(scores) == ["what"]
    assert float(scores["what"].accuracy) == pytest.approx(2 / 5)  # 0, 1, 0, 1, 0 for 0, 1, 2, 0, 1
    assert [mask.sum() for _, mask in seen] == lengths.tolist()
    assert [None if mask is None else mask.sum(1).tolist() for mask in masks] == [[6, 2], [4, 6], None]
    drawn = []
    with torch.no_grad():
        for clip, (shown, mask) in enumerate(seen):
            real = frames[clip, : lengths[clip]].float() / 255
            motion = program.by_hand(real)["z"] @ program.x_of_z.T
            rest = (shown[mask] - motion) @ torch.linalg.pinv(program.x_of_s).T  # what is not the clip's motion is s
            torch.testing.assert_close(rest, rest[:1].expand_as(rest), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(rest @ program.x_of_s.T, shown[mask] - motion, atol=1e-4, rtol=1e-4)
            drawn.append(rest[0])
    values = torch.stack(drawn)
    assert torch.pdist(values).min() > 0.01
    assert values.abs().max() < 5  # from the prior, a standard Normal


def test_kept_latents_are_drawn_from_the_guide_where_asked():
    program, shown = WhoWhat().float(), {}
    frames = torch.randint(256, (1, 3, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    clips = Clips(frames, labels={"what": torch.tensor([0])}, motion_factors=["what"])
    for sample in (False, True):

        def judge(frames, sample=sample):
            shown[sample] = frames
            return {"what": torch.zeros(1, 2)}

        sampled_swap_accuracy(program.model, program.guide, judge, clips, keep=["s", "d", "z"], sample=sample)
    with torch.no_grad():
        latents = program.by_hand(frames[0].float() / 255)
        torch.testing.assert_close(shown[False][0], program.picture_by_hand(latents["s"], latents["z"]))
    assert (shown[True] - shown[False]).abs().max() > 0.01


def test_programs_read_holes_and_covariates_of_clips():
    """What is kept is the mean of the measured frames; a frame is drawn as it, times its covariate."""
    frames = torch.randint(1, 256, (5, 4, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    observed = torch.tensor([True, False, True, False]).expand(5, 4)
    covariates = torch.rand(5, 6, 1, generator=torch.Generator().manual_seed(1))  # two steps of known future
    clips = Clips(frames, observed=observed, covariates=covariates, labels={"who": torch.zeros(5).long()})
    shown = []

    def model(frames=None, mask=None, *, num_sequences=None, num_steps=None, covariates=None):
        with pyro.plate("sequences", num_sequences):
            level = pyro.sample("level", dist.Normal(torch.zeros(num_sequences, 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(level.unsqueeze(1) * covariates, 0.1).to_event(2), obs=frames)

    def guide(frames, mask=None, observed=None, covariates=None):
        with pyro.plate("sequences", len(frames)):
            pyro.sample("level", dist.Delta((frames * observed[..., None]).sum(1) / observed.sum(1, True), event_dim=1))

    def judge(frames):
        shown.append(frames)
        return {"who": torch.zeros(len(frames), 2)}

    sampled_swap_accuracy(model, guide, judge, clips, keep=["level"], factors=["who"], batch_size=2)
    expected = (frames / 255)[observed].reshape(5, 2, 1).mean(1, keepdim=True) * covariates[:, :4]
    torch.testing.assert_close(torch.cat(shown), expected)


def test_another_emission_is_judged_by_its_name():
    program = WhoWhat(second_emission=True).float()
    clips = Clips(torch.zeros(4, 3, 4, dtype=torch.uint8), labels={"who": torch.zeros(4).long()}, scale=1)
    sizes = []

    def judge(shown):
        sizes.append(tuple(shown.shape))
        return {"who": torch.zeros(len(shown), 2)}

    options = {"keep": ["d", "z"], "factors": ["who"]}
    for emission in ("x", "y", None):
        sampled_swap_accuracy(program.model, program.guide, judge, clips, emission=emission, **options)
    assert sizes == [(4, 3, 4), (4, 1), (4, 1)]
    with pytest.raises(ValueError, match=r"^emissions: .*'w'"):
        sampled_swap_accuracy(program.model, program.guide, judge, clips, emission="w", **options)


def test_wrong_arguments_of_the_protocol_are_named(data):
    held_out, judge = data
    painter = Painter()
    for options, error, match in (
        ({"keep": "z"}, TypeError, "^keep: "),
        ({"keep": ["z"], "factors": "speed"}, TypeError, "^factors: "),
        ({"keep": []}, ValueError, "^keep: is empty"),
        ({"keep": ["z", "d"]}, ValueError, r"^keep: .*\['d'\]"),
        ({"keep": ["z"], "factors": ["hair"]}, ValueError, r"^factors: .*'hair'"),
        ({"keep": ["z"], "factors": []}, ValueError, "^factors: "),
        ({"keep": ["z"], "batch_size": 0}, ValueError, "^batch_size: "),
    ):
        with pytest.raises(error, match=match):
            sampled_swap_accuracy(painter.model, painter.guide, judge, held_out.subset(range(4)), **options)
