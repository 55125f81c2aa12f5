"""Precision, recall, density, coverage and memorised clips, against loops, closed facts and real clips."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Tensors, dtypes, seeds

from seqdisent.datasets import pendulum
from seqdisent.metrics import memorisation_scores, neighbour_scores, squared_error

SCORES = ("precision", "recall", "density", "coverage")


def distance(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def by_hand(real, generated, k):
    """Every distance on its own, from the definitions."""
    real, generated = real.tolist(), generated.tolist()
    real_radii, generated_radii = (
        [sorted(distance(a, b) for j, b in enumerate(own) if j != i)[k - 1] for i, a in enumerate(own)]
        for own in (real, generated)
    )
    inside = [[distance(x, y) <= radius for y in generated] for x, radius in zip(real, real_radii, strict=True)]
    back = [[distance(x, y) <= radius for y, radius in zip(generated, generated_radii, strict=True)] for x in real]
    return {
        "precision": sum(any(column) for column in zip(*inside, strict=True)) / len(generated),
        "recall": sum(any(row) for row in back) / len(real),
        "density": sum(sum(row) for row in inside) / (k * len(generated)),
        "coverage": sum(any(row) for row in inside) / len(real),
    }


@given(
    seed=seeds(), real=st.integers(6, 30), generated=st.integers(6, 30), size=st.integers(1, 4), k=st.integers(1, 5),
    at_once=st.integers(1, 40), origin=st.sampled_from([0.0, 1e4]), dtype=dtypes(),
)  # fmt: skip
def test_scores_are_those_of_loops_in_any_batches_far_from_the_origin_too(
    seed, real, generated, size, k, at_once, origin, dtype
):
    tensors = Tensors(seed)
    x = (tensors.normal(real, size) + origin).to(dtype)
    y = (0.8 * tensors.normal(generated, size) + 0.3 + origin).to(dtype)
    scores = neighbour_scores(x, y, num_neighbours=k, batch_size=at_once)
    wanted = by_hand(x.double(), y.double(), k)
    assert {name: getattr(scores, name) for name in SCORES} == pytest.approx(wanted)


@given(seed=seeds(), count=st.integers(6, 20), copies=st.integers(1, 3), k=st.integers(1, 5))
def test_a_set_and_itself_agree_though_clips_repeat(seed, count, copies, k):
    features = Tensors(seed).normal(count, 3).repeat(copies, 1).float()
    scores = neighbour_scores(features, features.flip(0), num_neighbours=k, batch_size=7)
    assert scores.precision == scores.recall == scores.coverage == 1
    if copies == 1:
        assert scores.density == pytest.approx((k + 1) / k)  # the edge of a ball is inside


def test_sets_that_are_far_apart_score_zero():
    real, generated = Tensors(0).normal(2, 20, 3)
    assert neighbour_scores(real, generated + 100)[:4] == (0, 0, 0, 0)


@pytest.mark.parametrize(("real", "generated", "k"), [(60, 60, 5), (40, 90, 2), (90, 30, 3)])
def test_sets_of_one_distribution_have_density_one_and_the_expected_coverage(real, generated, k):
    tensors = Tensors(0)
    runs = [
        neighbour_scores(tensors.normal(real, 4), tensors.normal(generated, 4), num_neighbours=k) for _ in range(400)
    ]
    for name, expected in (("density", 1.0), ("coverage", runs[0].expected_coverage)):
        found = torch.tensor([getattr(run, name) for run in runs], dtype=torch.float64)
        assert abs(found.mean() - expected) < 4 * found.std() / len(runs) ** 0.5  # four standard errors
    assert runs[0].expected_coverage == pytest.approx(1 - math.comb(real - 1, k) / math.comb(real + generated - 1, k))


def test_one_outlier_raises_precision_and_hardly_density():
    tensors = Tensors(0)
    real, generated = tensors.normal(200, 2), tensors.normal(200, 2) + 20
    assert neighbour_scores(real, generated).precision == 0
    real[0] = 60.0  # its ball holds every generated clip
    scores = neighbour_scores(real, generated)
    assert scores.precision == 1
    assert scores.density == pytest.approx(1 / 5)
    assert scores.coverage == pytest.approx(1 / 200)


def test_a_generator_of_one_mode_is_precise_but_covers_little():
    real, tensors = torch.cat([Tensors(0).normal(100, 2), Tensors(1).normal(100, 2) + 50]), Tensors(2)
    scores = neighbour_scores(real, tensors.normal(200, 2))
    assert scores.precision > 0.9
    assert scores.density > 0.8
    assert scores.recall < 0.6
    assert scores.coverage < 0.6


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_the_unit_of_the_features_does_not_matter(scale):
    real, generated = Tensors(0, torch.float32).normal(2, 30, 3)
    wanted = neighbour_scores(real, generated)
    assert 0 < wanted.recall < 1
    assert neighbour_scores(scale * real, scale * generated) == wanted  # their squares are no float32 numbers


def test_features_in_lists_of_integers_are_taken():
    points = [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert neighbour_scores(points, points, num_neighbours=1).precision == 1


@given(seed=seeds(), sizes=st.tuples(*[st.integers(1, 12)] * 3), at_once=st.integers(1, 13), clips=st.booleans())
def test_distances_to_training_clips_are_those_of_a_loop(seed, sizes, at_once, clips):
    tensors, shape = Tensors(seed), (2, 1, 3, 3) if clips else (5,)
    generated, held_out, train = (tensors.uniform(size, *shape) for size in sizes)
    scores = memorisation_scores(generated, held_out, train, batch_size=at_once)
    drawn, real = (
        [min(float((one - other).square().mean().sqrt()) for other in train) for one in some]
        for some in (generated, held_out)
    )
    middle = float(torch.tensor(real, dtype=torch.float64).quantile(0.5))
    assert scores.mean == pytest.approx(sum(drawn) / len(drawn))
    assert scores.held_out_mean == pytest.approx(sum(real) / len(real))
    assert scores.held_out_median == pytest.approx(middle)
    assert scores.median == pytest.approx(float(torch.tensor(drawn, dtype=torch.float64).quantile(0.5)))
    assert scores.share_nearer == sum(one < middle for one in drawn) / len(drawn)


def test_clips_at_the_held_out_median_count_half():
    train, held_out = torch.zeros(1, 1), torch.tensor([[1.0], [2.0], [3.0]])
    for generated, share in (([2.0], 0.5), ([1.0, 2.0, 2.0, 4.0], 0.5), ([0.0, 0.0], 1.0), ([2.0, 2.5], 0.25)):
        assert memorisation_scores(torch.tensor(generated)[:, None], held_out, train).share_nearer == share
    copies = torch.zeros(4, 1)
    assert memorisation_scores(copies, copies, train).share_nearer == 0.5


@pytest.fixture(scope="module")
def pendula():
    """Real pendula: 280 that train, 140 held out, and as many of the same recipe in the place of drawn ones."""
    clips = pendulum(560, seed=0, num_steps=4, image_size=16).frames
    return clips[:280], clips[280:420], clips[420:]


def thumbnails(clips):
    """Features of clips: each frame at 4 x 4 pixels."""
    frames = torch.nn.functional.adaptive_avg_pool2d(clips.flatten(0, 1).float() / 255, 4)
    return frames.reshape(len(clips), -1)


def test_real_pendula_pass_and_copies_are_found_though_they_look_right(pendula):
    train, held_out, drawn = pendula
    fair = memorisation_scores(drawn, held_out, train)
    copied = memorisation_scores(train[::2], held_out, train)
    assert 0.35 < fair.share_nearer < 0.65
    assert copied.share_nearer == 1
    assert copied.median == copied.mean == 0
    nearest = [float(squared_error(clip.expand_as(train), train).min()) ** 0.5 for clip in held_out[:3]]
    assert memorisation_scores(drawn, held_out[:3], train).held_out_mean == pytest.approx(sum(nearest) / 3)
    for clips in (drawn, train[::2]):
        scores = neighbour_scores(thumbnails(held_out), thumbnails(clips))
        assert scores.precision > 0.8
        assert scores.density == pytest.approx(1, abs=0.25)
        assert scores.coverage == pytest.approx(scores.expected_coverage, abs=0.08)


def test_bytes_and_their_shares_are_at_the_same_distance(pendula):
    train, held_out, drawn = (clips[:20] for clips in pendula)
    shares = [clips.float() / 255 for clips in (drawn, held_out, train)]
    assert memorisation_scores(*shares) == pytest.approx(memorisation_scores(drawn, held_out, train))


def test_noise_and_checkerboards_fail_on_real_pendula(pendula):
    _, held_out, drawn = pendula
    noise = torch.rand(drawn.shape, generator=torch.Generator().manual_seed(0)) * 255
    checkerboards = ((torch.arange(16) + torch.arange(16)[:, None]) % 2 * 255).expand_as(drawn)
    for clips in (noise, checkerboards):
        scores = neighbour_scores(thumbnails(held_out), thumbnails(clips))
        assert scores.precision == scores.density == scores.coverage == 0
