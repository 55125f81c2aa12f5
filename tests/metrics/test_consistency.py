"""Agreement between clips and reconstructions, and the released protocol's way to measure it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from seqdisent.datasets import Clips
from seqdisent.metrics import AccuracyConsistency, released_protocol_consistency

SIZES = {"who": 4, "what": 3}


def draw(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randint(size, (count,), generator=generator) for name, size in SIZES.items()} for _ in range(2)
    ]


def scores_of(real, reconstructed):
    metric = AccuracyConsistency(SIZES)
    metric.update(real, reconstructed)
    return metric.compute()


@given(seed=seeds(), count=st.integers(2, 30), at=st.integers(1, 29))
def test_scores_are_those_of_a_loop_in_batches_and_over_processes(seed, count, at):
    real, reconstructed = draw(seed, count)
    cut = min(at, count)
    metric, updated, first, second = (AccuracyConsistency(SIZES) for _ in range(4))
    for rows, part in ((slice(0, cut), first), (slice(cut, count), second)):
        batch = [{name: label[rows] for name, label in labels.items()} for labels in (real, reconstructed)]
        metric(*batch)
        updated.update(*batch)
        part.update(*batch)
    first.merge_state(second)
    for scores in (scores_of(real, reconstructed), metric.compute(), updated.compute(), first.compute()):
        for name, size in SIZES.items():
            pairs = list(zip(real[name].tolist(), reconstructed[name].tolist(), strict=True))
            assert float(scores.agreement[name]) == pytest.approx(sum(a == b for a, b in pairs) / count)
            chance = max(sum(a == c for a, _ in pairs) for c in range(size)) / count
            assert float(scores.chance[name]) == pytest.approx(chance)
        assert float(scores.average) == pytest.approx(sum(float(x) for x in scores.agreement.values()) / len(SIZES))


@given(seed=seeds(), constant=st.integers(0, 2))
def test_perfect_constant_and_blind(seed, constant):
    real, _ = draw(seed, 50)
    constants = {name: torch.full((50,), constant) for name in SIZES}
    assert scores_of(real, real).average == 1
    same = scores_of(real, constants)
    assert all(same.agreement[name] <= same.chance[name] for name in SIZES)
    blind = scores_of(constants, constants)
    assert blind.average == 1
    assert all(chance == 1 for chance in blind.chance.values())


def test_wrong_arguments_are_named():
    real, reconstructed = draw(0, 5)
    metric = AccuracyConsistency(SIZES)
    with pytest.raises(ValueError, match=r"^reconstructed\['who'\]: "):
        metric.update(real, {name: label[:4] for name, label in reconstructed.items()})
    with pytest.raises(ValueError, match="^real: "):
        metric.update({"who": real["who"]}, reconstructed)


def test_the_released_protocol_forgives_what_ours_does_not():
    # the class is a brightness; "reconstructions" are bright where the clip is dark, and the other way round
    who = torch.arange(2).repeat(20)
    frames = (40 + 160 * who)[:, None, None, None, None].expand(40, 2, 1, 8, 8).to(torch.uint8)
    clips = Clips(frames, labels={"who": who})
    inverted = frames.clone()
    inverted[:, :, :, :4] = 240 - frames[:, :, :, :4]  # the top half is wrong, the bottom half gives it away
    options = {"num_steps": 60, "batch_size": 16, "channels": (4,), "frame_dim": 8, "hidden_dim": 4}
    before = torch.random.get_rng_state()
    scores = released_protocol_consistency(clips, inverted, seed=0, **options)
    assert scores.average == 1
    assert torch.equal(torch.random.get_rng_state(), before)
    as_floats = released_protocol_consistency(clips, inverted.float() / 255, seed=0, **options)
    assert as_floats.chance == scores.chance  # the same draws
    short = Clips(frames, lengths=torch.ones(40, dtype=torch.long), labels={"who": who})
    padded = torch.cat([inverted[:, :1].float() / 255, torch.full((40, 1, 1, 8, 8), 1e4)], 1)
    assert released_protocol_consistency(short, padded, seed=0, **options).chance == scores.chance
    with pytest.raises(ValueError, match=r"^reconstructed: .*\(3, 2, 1, 8, 8\)"):
        released_protocol_consistency(clips, inverted[:3], seed=0)
    with pytest.raises(ValueError, match="^reconstructed: "):
        released_protocol_consistency(clips, inverted.float(), seed=0)
    with pytest.raises(TypeError, match="^reconstructed: "):
        released_protocol_consistency(clips, inverted.long(), seed=0)
    with pytest.raises(ValueError, match="^train_share: "):
        released_protocol_consistency(clips, inverted, seed=0, train_share=1.0)
