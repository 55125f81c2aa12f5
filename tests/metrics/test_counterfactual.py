"""Swaps against the truth: donors, errors, nearest clips."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqdisent.metrics import nearest_clip, pick_donors, squared_error


@given(seed=st.integers(0, 2**31), identities=st.integers(2, 5), motions=st.integers(2, 4))
def test_donors_differ_in_identity_and_motion(seed, identities, motions):
    identity, motion = torch.cartesian_prod(torch.arange(identities), torch.arange(motions)).unbind(1)
    donors = pick_donors(identity, motion, seed=seed)
    assert (identity[donors] != identity).all()
    assert (motion[donors] != motion).all()
    assert torch.equal(donors, pick_donors(identity, motion, seed=seed))


def test_donors_keep_to_another_identity_where_no_other_motion_is_left():
    donors = pick_donors(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), seed=0)
    assert donors.tolist() == [2, 0, 0]
    with pytest.raises(ValueError, match="^identity: "):
        pick_donors(torch.tensor([3, 3]), seed=0)


def test_donors_of_labels_in_a_list_or_an_array_are_those_of_a_tensor():
    identity, motion = [0, 0, 1, 2, 2], [0, 1, 0, 1, 0]
    wanted = pick_donors(torch.tensor(identity), torch.tensor(motion), seed=3)
    assert torch.equal(pick_donors(identity, motion, seed=3), wanted)
    assert torch.equal(pick_donors(np.array(identity), np.array(motion), seed=3), wanted)
    with pytest.raises(TypeError, match="^identity: "):
        pick_donors(["anna", "ben"], seed=0)
    with pytest.raises(TypeError, match="^motion: "):
        pick_donors([0, 1], ["runs", "walks"], seed=0)


def test_labels_that_do_not_fit_each_other_are_refused():
    identity, nan = torch.tensor([0, 1, 1]), torch.tensor([0.0, float("nan"), 1.0])
    for wrong in (torch.tensor([3]), torch.tensor([0, 1]), identity[:, None], nan):
        with pytest.raises(ValueError, match="^motion: "):
            pick_donors(identity, wrong, seed=0)
    for wrong in (identity[:, None], nan):  # NaN differs from itself
        with pytest.raises(ValueError, match="^identity: "):
            pick_donors(wrong, seed=0)


def test_squared_error_is_that_of_a_loop_and_ignores_padding():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(3, 4, 2, 5, 5, generator=generator)
    truth = torch.randint(256, predicted.shape, generator=generator, dtype=torch.uint8)
    lengths = torch.tensor([4, 1, 3])
    mask = torch.arange(4) < lengths[:, None]
    wanted = [((predicted[b, :n] - truth[b, :n].float() / 255) ** 2).mean() for b, n in enumerate(lengths)]
    predicted[1, 2:] = float("nan")
    torch.testing.assert_close(squared_error(predicted, truth, mask), torch.stack(wanted))
    whole = squared_error(predicted[:1], truth[:1])
    torch.testing.assert_close(whole, torch.stack(wanted[:1]))
    with pytest.raises(ValueError, match="^truth: "):
        squared_error(predicted, truth[:, :2])
    for wrong in (mask[:1], mask.float(), torch.zeros_like(mask)):
        with pytest.raises(ValueError, match="^mask: "):
            squared_error(predicted, truth, wrong)


@given(seed=st.integers(0, 2**31), batch_size=st.integers(1, 9))
def test_nearest_clip_is_that_of_a_loop(seed, batch_size):
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.rand(4, 2, 1, 3, 3, generator=generator)
    candidates = torch.rand(7, 2, 1, 3, 3, generator=generator)
    wanted = [min(range(7), key=lambda j: (p - candidates[j]).square().sum().item()) for p in predicted]
    assert nearest_clip(predicted, candidates, batch_size=batch_size).tolist() == wanted
    as_bytes = (candidates * 255).round().to(torch.uint8)
    for clips in (as_bytes.float() / 255, as_bytes):  # bytes and floats on either side
        assert nearest_clip(clips, as_bytes, batch_size=batch_size).tolist() == list(range(7))
        assert nearest_clip(as_bytes, clips, batch_size=batch_size).tolist() == list(range(7))
    with pytest.raises(ValueError, match="^candidates: "):
        nearest_clip(predicted, candidates[:, :1])


def clips_of_a_common_picture(count, seed=0):
    """Clips (N, 2, 1, 60, 60) of one picture that differ in two pixels each, as bytes."""
    generator = torch.Generator().manual_seed(seed)
    clips = torch.randint(100, 150, (1, 2 * 60 * 60), generator=generator, dtype=torch.uint8).repeat(count, 1)
    places = torch.randint(clips.shape[1], (count, 2), generator=generator)
    clips.scatter_(1, places, clips.gather(1, places) + 1 + torch.arange(count, dtype=torch.uint8)[:, None] % 50)
    return clips.reshape(count, 2, 1, 60, 60)


@pytest.mark.parametrize("batch_size", [7, 1024])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_nearest_clip_finds_clips_that_differ_in_two_pixels(dtype, batch_size):
    candidates = clips_of_a_common_picture(40)
    if dtype != torch.uint8:
        candidates = (candidates.double() / 255).to(dtype)
    candidates = candidates.unique(dim=0)  # of what is the same after rounding, none is the nearest
    assert len(candidates) >= 20
    assert nearest_clip(candidates, candidates, batch_size=batch_size).tolist() == list(range(len(candidates)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nearest_clip_of_half_precision_frames_is_that_of_exact_differences(dtype):
    generator = torch.Generator().manual_seed(0)
    candidates = torch.rand(30, 4, 3, 16, 16, generator=generator).to(dtype)
    predicted = (candidates + 0.3 * torch.randn(candidates.shape, generator=generator)).to(dtype)
    wanted = (predicted.double()[:, None] - candidates.double()).square().flatten(2).sum(-1).argmin(1)
    assert torch.equal(nearest_clip(predicted, candidates), wanted)
    assert torch.equal(nearest_clip(predicted.float(), candidates), wanted)


@given(seed=st.integers(0, 2**31), batch_size=st.integers(1, 9))
def test_nearest_clip_compares_real_frames_alone(seed, batch_size):
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.rand(4, 3, 1, 3, 3, generator=generator)
    candidates = torch.rand(7, 3, 1, 3, 3, generator=generator)
    lengths = torch.randint(1, 4, (4,), generator=generator)
    mask = torch.arange(3) < lengths[:, None]
    wanted = [
        min(range(7), key=lambda j: (clip[:n] - candidates[j, :n]).square().sum().item())  # noqa: B023
        for clip, n in zip(predicted, lengths, strict=True)
    ]
    predicted[~mask] = float("nan")
    assert nearest_clip(predicted, candidates, mask, batch_size=batch_size).tolist() == wanted
    for wrong in (mask[:1], mask.float(), torch.zeros_like(mask)):
        with pytest.raises(ValueError, match="^mask: "):
            nearest_clip(predicted, candidates, wrong)


def test_what_padding_holds_does_not_reach_the_gradient_of_the_squared_error():
    predicted, truth = torch.rand(2, 2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, True], [True, False, False]])
    predicted[~mask] = float("nan")
    (gradient,) = torch.autograd.grad(squared_error(predicted.requires_grad_(), truth, mask).sum(), predicted)
    assert (gradient[~mask] == 0).all()
    torch.testing.assert_close(gradient[0], 2 * (predicted - truth)[0] / 12)
    torch.testing.assert_close(gradient[1, 0], 2 * (predicted - truth)[1, 0] / 4)


def test_of_equally_near_clips_the_first_is_taken():
    candidates = clips_of_a_common_picture(6)[[0, 1, 2, 1, 0, 2]]
    for batch_size in (1, 2, 6):
        assert nearest_clip(candidates, candidates, batch_size=batch_size).tolist() == [0, 1, 2, 1, 0, 2]


def test_nearest_clip_keeps_no_graph_and_refuses_what_is_not_finite():
    clips = torch.rand(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert not nearest_clip(clips.clone().requires_grad_(), clips).requires_grad
    for bad in (float("nan"), float("inf")):
        wrong = clips.clone()
        wrong[1, 0, 0, 0, 0] = bad
        with pytest.raises(ValueError, match="^candidates: "):
            nearest_clip(clips, wrong)
        with pytest.raises(ValueError, match="^truth: "):
            squared_error(clips, wrong)
    wrong[1, 0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="^predicted: .*NaN"):
        nearest_clip(wrong, clips)
    assert squared_error(wrong, clips).isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="^candidates: .*empty"):
        nearest_clip(clips, clips[:0])
    with pytest.raises(ValueError, match="^batch_size: "):
        nearest_clip(clips, clips, batch_size=0)


@pytest.mark.parametrize("by", ["step", "value"])
@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 2)])
def test_the_squared_error_counts_what_was_observed_alone_in_any_unit(by, shape):
    generator = torch.Generator().manual_seed(0)
    predicted, truth = 100 * torch.randn(2, 4, 6, *shape, generator=generator).double()
    mask = torch.arange(6) < torch.tensor([6, 4, 1, 3])[:, None]
    observed = torch.rand(4, 6, *(shape if by == "value" else ()), generator=generator) < 0.6
    observed[:, 0] = True
    wanted = []
    for b in range(4):
        known = [t for t in range(6) if mask[b, t] and observed[b, t].any()]
        errors = [((predicted[b, t] - truth[b, t]) ** 2)[observed[b, t].expand(shape)] for t in known]
        wanted.append(torch.cat([error.flatten() for error in errors]).mean())
    seen = (observed & mask.reshape(4, 6, *[1] * (observed.ndim - 2))).reshape(
        *observed.shape, *[1] * (truth.ndim - observed.ndim)
    )
    for filler in (float("nan"), 1e9):
        one, other = (torch.where(seen, values, filler).requires_grad_() for values in (predicted, truth))
        found = squared_error(one, other, mask, observed, are_pixels=False)
        torch.testing.assert_close(found, torch.stack(wanted))
        (gradient,) = torch.autograd.grad(found.sum(), one)
        assert (gradient[~seen.expand(gradient.shape)] == 0).all()
    everything = torch.ones_like(observed)
    torch.testing.assert_close(
        squared_error(predicted, truth, mask, everything, are_pixels=False),
        squared_error(predicted, truth, mask, are_pixels=False),
    )


def test_measurements_are_no_pixels_and_pixels_may_have_holes():
    values = torch.full((1, 2, 3), 7.0)
    with pytest.raises(ValueError, match="^predicted: has values of mean 7"):
        squared_error(values, values)
    assert squared_error(values, values, are_pixels=False).tolist() == [0]
    bytes_ = torch.tensor([[[255], [0]]], dtype=torch.uint8)
    assert squared_error(bytes_ * 0, bytes_, observed=torch.tensor([[True, False]])).tolist() == [1]
    nan = torch.full_like(values, torch.nan)
    for bad, error, said in (
        ({"truth": nan}, ValueError, "^truth: has measurements that are not finite"),
        ({"truth": values.long()}, TypeError, "^truth: has dtype torch.int64"),
        ({"observed": torch.zeros(1, 2, dtype=torch.bool)}, ValueError, "^observed: has a row"),
        ({"observed": torch.ones(1, 2)}, TypeError, "^observed: got dtype"),
        ({"observed": torch.ones(1, 3, dtype=torch.bool)}, ValueError, "^observed: has shape"),
    ):
        with pytest.raises(error, match=said):
            squared_error(**{"predicted": values, "truth": values, "are_pixels": False, **bad})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squared_error_of_half_precision_frames_is_computed_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    predicted, truth = torch.rand(2, 5, 3, 3, 16, 16, generator=generator).to(dtype)
    mask = torch.arange(3) < torch.tensor([3, 2, 1, 3, 3])[:, None]
    for chosen in (None, mask):
        error = squared_error(predicted, truth, chosen)
        assert error.dtype == torch.float32
        torch.testing.assert_close(error, squared_error(predicted.double(), truth.double(), chosen).float())
    assert squared_error(predicted, (255 * truth.float()).to(torch.uint8)).dtype == torch.float32


@pytest.mark.parametrize(("first", "second", "measure"), [
    ("predicted", "truth", squared_error), ("predicted", "candidates", nearest_clip),
])  # fmt: skip
def test_what_are_no_pixels_is_refused_by_name(first, second, measure):
    good = torch.rand(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.int64, torch.bool):
        with pytest.raises(TypeError, match=f"^{first}: "):
            measure(good.to(dtype), good)
        with pytest.raises(TypeError, match=f"^{second}: "):
            measure(good, good.to(dtype))
    with pytest.raises(ValueError, match=f"^{first}: "):
        measure(255 * good, good)
    for wrong in (255 * good, 2 * (good - good.min()) / (good.max() - good.min()) - 1):  # 0 to 255, -1 to 1
        with pytest.raises(ValueError, match=f"^{second}: "):
            measure(good, wrong)
    diverges = good.clone()
    diverges[0, 0, 0, 0, 0] = 3.0
    measure(diverges, good)
    measure(1.4 * good, good - 0.4)  # the mean of a Gaussian may lie a little outside
    measure(good.numpy(), (255 * good).numpy().astype(np.uint8))
    assert len(measure(good[:0], good[:0] if measure is squared_error else good)) == 0


def test_what_the_padding_of_clips_holds_is_not_looked_at():
    frames = torch.zeros(1, 2, 1, 4, 4)
    mask = torch.tensor([[True, False]])
    frames[:, 1] = 1e4
    assert squared_error(frames, frames, mask).tolist() == [0]
    assert squared_error(frames, frames, mask.numpy()).tolist() == [0]
