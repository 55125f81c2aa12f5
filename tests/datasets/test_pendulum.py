"""Pendulum: the pictures are where the trajectory says, and the truth goes on beyond a clip."""

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqdisent.datasets import pendulum, render_pendulum


@pytest.fixture(scope="module")
def clips():
    return pendulum(28, seed=0, num_steps=6, image_size=32)


def centre_of_bob(frame):
    """(x, y) in pixels of the brightest part of a frame (3, H, W), where rod and antialiased rim are darker."""
    light = frame.amax(dim=0)
    y, x = (light == light.max()).nonzero().float().mean(dim=0)
    return float(x), float(y)


@given(st.floats(-0.7, 0.7), st.sampled_from([32, 64, 96]))
def test_the_bob_hangs_where_the_angle_says(angle, size):
    frame = render_pendulum(torch.tensor(angle), torch.ones(3), size)
    x, y = centre_of_bob(frame)
    right, down = 1.2 * math.sin(angle), -0.75 + 1.2 * math.cos(angle)
    assert abs(x - ((right + 1) * size / 2 - 0.5)) < 0.75
    assert abs(y - ((down + 1) * size / 2 - 0.5)) < 0.75
    if size < 64:
        return  # the bob's soft rim may touch the last pixels
    edge = torch.cat([frame[:, :, 0], frame[:, :, -1], frame[:, -1]], dim=1)
    assert not edge.any()


def test_the_rod_is_thinner_and_darker_than_the_bob_and_edges_are_smooth():
    frame = render_pendulum(torch.tensor(0.0), torch.ones(3), 64)[0]
    across_rod, across_bob = frame[24], frame[46]
    assert 0 < int(across_rod.max()) < int(across_bob.max()) == 255
    assert 2 <= int((across_rod > 0).sum()) <= 4
    assert 9 <= int((across_bob > 0).sum()) <= 13
    assert len(frame.unique()) > 10


@given(st.floats(-0.7, 0.7))
def test_mirrored_angles_give_mirrored_pictures(angle):
    frames = render_pendulum(torch.tensor([angle, -angle]), torch.ones(2, 3), 24)
    assert (frames[0].int() - frames[1].flip(-1).int()).abs().max() <= 1


def test_colours_scale_each_channel():
    white = render_pendulum(torch.tensor(0.3), torch.ones(3), 32)
    tinted = render_pendulum(torch.tensor(0.3), torch.tensor([1.0, 0.5, 0.0]), 32)
    assert torch.equal(tinted[0], white[0])
    assert (tinted[1].float() - 0.5 * white[1].float()).abs().max() <= 1
    assert not tinted[2].any()
    nearly = render_pendulum(torch.tensor(0.0), torch.tensor([0.999, 0.501, 0.0]), 64)  # rounded, not cut off
    assert nearly[:, 46, 32].tolist() == [255, 128, 0]


def test_a_frame_is_the_same_alone_and_among_many():
    angle = torch.linspace(-0.7, 0.7, 300)
    many = render_pendulum(angle, torch.tensor([0.9, 0.4, 0.7]), 20)
    for i in range(0, 300, 37):
        assert torch.equal(many[i], render_pendulum(angle[i], torch.tensor([0.9, 0.4, 0.7]), 20))
    grid = render_pendulum(angle.reshape(3, 4, 25), torch.tensor([0.9, 0.4, 0.7]), 20)
    assert torch.equal(grid.flatten(0, 2), many)


def test_every_fourteen_clips_hold_each_colour_at_each_speed(clips):
    pairs = torch.stack([clips.labels["colour"], clips.labels["speed"]], dim=1)
    assert len({tuple(pair) for pair in pairs[:14].tolist()}) == 14
    assert torch.equal(pairs[:14], pairs[14:])
    assert torch.equal(clips.identity, clips.labels["colour"])
    assert clips.static_factors == ("colour",)
    assert clips.motion_factors == ("speed",)
    assert len(clips.factor_names["colour"]) == 7
    assert clips.factor_names["speed"] == ("slow", "fast")
    assert clips.frames.shape == (28, 6, 3, 32, 32)


def test_fast_ones_swing_twice_as_fast(clips):
    for row in (0, 7):  # red slow, red fast
        angle = clips.renderer.angle(torch.tensor([row]), 60)[0]
        crossings = (angle[:-1].sign() != angle[1:].sign()).nonzero().flatten()
        period = {0: 24, 7: 12}[row]
        assert all(abs(int(gap) - period / 2) <= 1 for gap in crossings.diff())
        assert torch.allclose(angle[:36], angle[24:60])


def test_amplitudes_and_phases_differ_between_clips_and_stay_in_the_picture(clips):
    angle = clips.renderer.angle(torch.arange(28), 48)
    assert angle.abs().max() <= 0.7
    assert angle.abs().amax(dim=1).min() > 0.3
    assert len(clips.renderer.phase.unique()) == 28
    assert 7 <= int((angle[:, 0] > 0).sum()) <= 21  # they start anywhere in the swing


def test_the_true_clip_begins_as_the_clip_and_goes_on(clips):
    part = clips.subset([5, 20])
    longer = part.true_clip([0, 1], 40)
    assert longer.shape == (2, 40, 3, 32, 32)
    assert torch.equal(longer[:, :6], part.frames)
    assert torch.equal(part.true_clip(1, 40), longer[1])
    x, _ = centre_of_bob(longer[0, 39])
    angle = float(clips.renderer.angle(torch.tensor([5]), 40)[0, 39])
    assert abs(x - ((1.2 * math.sin(angle) + 1) * 16 - 0.5)) < 0.75


def test_a_true_swap_has_the_one_colour_and_the_other_trajectory(clips):
    red, green = clips.names.index("red slow 0"), clips.names.index("green fast 8")
    swapped = clips.true_swap(red, green)
    for step in range(6):
        assert centre_of_bob(swapped[step]) == pytest.approx(centre_of_bob(clips.frames[green, step]), abs=0.3)
    strength = swapped.float().mean(dim=(0, 2, 3))
    assert strength[0] > 3 * strength[1]
    assert torch.equal(clips.true_swap(red, red), clips.frames[red])
    assert torch.equal(pickle.loads(pickle.dumps(clips)).true_swap(red, green), swapped)


def test_the_seed_decides_everything():
    state = torch.get_rng_state()
    first, again, other = (pendulum(7, seed=s, num_steps=3, image_size=16) for s in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.frames, other.frames)


@pytest.mark.parametrize("name", ["num_clips", "num_steps", "image_size"])
def test_nothing_is_not_a_size(name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        pendulum(**{"num_clips": 1, "seed": 0, name: 0})
    with pytest.raises(TypeError, match=f"^{name}: "):
        pendulum(**{"num_clips": 1, "seed": 0, name: 1.5})


@pytest.mark.parametrize(
    ("angle", "colour", "error", "message"),
    [
        (torch.zeros(2), torch.ones(2, 4), ValueError, r"^colour: .*\(2, 4\)"),
        (torch.zeros(2), torch.ones(5, 3), ValueError, r"^colour: .*\(5, 3\)"),
        (torch.zeros(2), torch.ones(2, 2, 3), ValueError, r"^colour: .*\(2, 2, 3\)"),
        (torch.zeros(2), 255 * torch.ones(3), ValueError, "^colour: "),
        (torch.tensor([float("nan")]), torch.ones(3), ValueError, "^angle: "),
        (torch.zeros(2, dtype=torch.long), torch.ones(3), TypeError, "^angle: "),
        (0.0, torch.ones(3), TypeError, "^angle: "),
        (torch.zeros(2), torch.ones(3, dtype=torch.long), TypeError, "^colour: "),
    ],
)
def test_the_renderer_refuses(angle, colour, error, message):
    with pytest.raises(error, match=message):
        render_pendulum(angle, colour)
    with pytest.raises(ValueError, match="^image_size: "):
        render_pendulum(torch.zeros(1), torch.ones(3), 0)
