"""The Frechet distance against its closed form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Tensors, seeds

from seqdisent.metrics import FrechetDistance


def pixels(frames):
    """The first two pixels of the first frame."""
    return frames.flatten(1)[:, :2]


def distance(real, generated):
    metric = FrechetDistance(pixels, 2, "two pixels")
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return metric.compute()


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T


@given(seed=seeds(), real=st.integers(4, 20), generated=st.integers(4, 20), at=st.integers(1, 3))
def test_it_is_the_closed_form_in_batches_and_over_processes(seed, real, generated, at):
    tensors = Tensors(seed)
    clips = tensors.normal(real, 1, 1, 1, 3), 2 * tensors.normal(generated, 1, 1, 1, 3) + 1
    means, covariances = zip(*((pixels(c).mean(0), pixels(c).T.cov()) for c in clips), strict=True)
    middle = root(covariances[0])
    wanted = (means[0] - means[1]).square().sum() + (
        covariances[0] + covariances[1] - 2 * root(middle @ covariances[1] @ middle)
    ).trace()
    metric, first, second = (FrechetDistance(pixels, 2, "two pixels") for _ in range(3))
    for side, is_real in zip(clips, (True, False), strict=True):
        for rows, part in ((side[:at], first), (side[at:], second)):
            metric.update(rows, real=is_real)
            part.update(rows, real=is_real)
    first.merge_state(second)
    for score in (distance(*clips), metric.compute(), first.compute()):
        torch.testing.assert_close(score.distance, wanted, atol=1e-6, rtol=1e-6)
        assert score.extractor == "two pixels"


def test_equal_sets_are_at_zero_and_a_mask_reaches_the_extractor():
    clips = Tensors(0).normal(30, 2, 1, 2, 2)
    assert float(distance(clips, clips).distance) == pytest.approx(0, abs=1e-8)
    seen = []
    metric = FrechetDistance(lambda frames, mask: (seen.append(mask), pixels(frames))[1], 2, "two pixels")
    mask = torch.ones(30, 2, dtype=torch.bool)
    metric.update(clips, mask, real=True)
    assert seen[0] is mask


def test_features_in_an_array_are_those_of_a_tensor():
    clips = Tensors(0).normal(2, 10, 1, 1, 1, 3)
    metric = FrechetDistance(lambda clips: pixels(clips).numpy(), 2, "two pixels")
    metric.update(clips[0], real=True)
    metric.update(clips[1], real=False)
    assert metric.compute() == distance(*clips)
    with pytest.raises(TypeError, match="^extractor: "):
        FrechetDistance(lambda clips: {"pool": pixels(clips)}, 2, "two pixels").update(clips[0], real=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16])
def test_features_of_any_dtype_give_a_distance_in_full_precision(dtype):
    clips = (300 * Tensors(0).normal(2, 20, 1, 1, 1, 3)).to(dtype)
    metric = FrechetDistance(pixels, 2, "two pixels")
    metric.update(clips[0], real=True)
    metric.update(clips[1], real=False)
    score = metric.compute().distance
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, distance(*clips.double()).distance.float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(bad):
    metric = FrechetDistance(pixels, 2, "two pixels")
    with pytest.raises(ValueError, match="^extractor: .*finite"):
        metric.update(torch.full((4, 1, 1, 1, 3), bad), real=True)
    assert int(metric.real_features_num_samples) == 0


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="^name: "):
        FrechetDistance(pixels, 2, "")
    with pytest.raises(ValueError, match="^num_features: "):
        FrechetDistance(pixels, 0, "two pixels")
    metric = FrechetDistance(pixels, 3, "two pixels")
    with pytest.raises(ValueError, match="^extractor: "):
        metric.update(torch.zeros(4, 1, 1, 1, 3), real=True)


def test_a_set_is_not_nearer_to_itself_than_zero():
    """Twenty clips leave most of 256 features without variance, where rounding made the distance negative."""
    for seed in range(5):
        features = torch.randn(20, 256, generator=torch.Generator().manual_seed(seed))
        metric = FrechetDistance(lambda values: values, 256, "features")
        metric.update(features, real=True)
        metric.update(features, real=False)
        assert metric.compute().distance >= 0
