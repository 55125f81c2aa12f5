"""The judge: what it reads, what it leaves out, how it is trained and kept."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Tensors, lengths, mask_of, padding, seeds
from torch import nn

from seqdisent.datasets import Clips, Sequences, sprites
from seqdisent.metrics import Judge, train_judge

SIZES = {"who": 3, "what": 2}
SMALL = {"channels": (4,), "frame_dim": 16, "hidden_dim": 8}


def small_judge(seed):
    return Tensors(seed).build(lambda: Judge(SIZES, in_channels=1, image_size=6, **SMALL))


@given(seed=seeds(), lengths=lengths(), extra=st.integers(0, 1), filling=padding())
def test_each_row_is_judged_by_its_real_frames_alone(seed, lengths, extra, filling):
    judge, mask = small_judge(seed), mask_of(lengths, extra)
    frames = Tensors(seed + 1).uniform(*mask.shape, 1, 6, 6)
    frames[~mask] = filling
    frames.requires_grad_()
    together, features = judge(frames, mask), judge.features(frames, mask)
    assert features.shape == (len(lengths), judge.num_features)
    for row, length in enumerate(lengths):
        alone = judge(frames[row : row + 1, :length])
        for name, size in SIZES.items():
            assert together[name].shape == (len(lengths), size)
            torch.testing.assert_close(together[name][row], alone[name][0])
    features.sum().backward()
    assert frames.grad[~mask].eq(0).all()
    assert all(parameter.grad.isfinite().all() for name, parameter in judge.named_parameters() if "heads" not in name)


def test_the_order_of_the_frames_matters():
    judge, frames = small_judge(0), Tensors(0).uniform(2, 4, 1, 6, 6)
    assert not torch.allclose(judge(frames)["what"], judge(frames.flip(1))["what"])


def moving_dots(seed, count=120):
    """Clips of a dot whose brightness says who, and which moves to the right or the left: the same frames, reversed."""
    generator = torch.Generator().manual_seed(seed)
    who, what = (torch.randint(size, (count,), generator=generator) for size in SIZES.values())
    frames = torch.zeros(count, 4, 1, 6, 6, dtype=torch.uint8)
    for clip in range(count):
        height = int(torch.randint(6, (), generator=generator))
        for step in range(4):
            frames[clip, step, 0, height, 1 + step if what[clip] else 4 - step] = 85 * (int(who[clip]) + 1)
    return Clips(frames, labels={"who": who, "what": what})


def train_small(**changes):
    options = {"num_steps": 200, "batch_size": 20, "learning_rate": 2e-2, "seed": 1, **SMALL, **changes}
    return train_judge(moving_dots(0), moving_dots(1), **options)


def test_training_reads_who_and_the_order_and_is_repeatable():
    before, losses = torch.random.get_rng_state(), []
    judge = train_small(on_step=lambda step, loss: losses.append((step, loss)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert judge.accuracy == {"who": 1.0, "what": 1.0}
    assert [step for step, _ in losses] == list(range(200))
    assert losses[-1][1] < 0.1 < losses[0][1]
    assert not judge.training
    assert not any(parameter.requires_grad for parameter in judge.parameters())
    torch.manual_seed(5)
    again, other = train_small(num_steps=3), train_small(num_steps=3, seed=2)
    torch.manual_seed(6)
    for name, value in train_small(num_steps=3).state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(again.heads.weight, other.heads.weight)


def test_dropout_in_the_network_follows_from_the_seed_and_the_random_state_stays():
    weights = {}
    for case, (state, seed) in {"one": (5, 1), "again": (6, 1), "other": (5, 2)}.items():
        network = nn.Sequential(nn.Flatten(), Tensors(0).build(lambda: nn.Linear(36, 16)).float(), nn.Dropout(0.5))
        torch.manual_seed(state)
        before = torch.random.get_rng_state()
        weights[case] = train_small(num_steps=3, seed=seed, network=network).heads.weight
        assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(weights["one"], weights["again"])
    assert not torch.equal(weights["one"], weights["other"])


def test_the_accuracy_is_that_of_held_out_clips_counted_by_hand():
    judge, held_out = train_small(num_steps=15), moving_dots(1)
    for name in SIZES:
        right = [
            int(judge(held_out.batch([row]).frames)[name].argmax()) == int(held_out.labels[name][row])
            for row in range(len(held_out))
        ]
        assert judge.accuracy[name] == sum(right) / len(right)
    assert judge.accuracy["what"] < 1  # else the comparison says little


def test_factors_are_chosen_by_name():
    assert train_small(num_steps=1, factors=["what"]).num_classes == {"what": 2}


def test_what_is_saved_is_loaded_and_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    judge, path = train_small(num_steps=2), tmp_path / "new" / "judge.pt"
    judge.save(path)
    before = torch.random.get_rng_state()
    loaded = Judge.load(path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert loaded.accuracy == judge.accuracy
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    frames = torch.rand(2, 3, 1, 6, 6)
    for name, logits in judge(frames).items():
        assert torch.equal(loaded(frames)[name], logits)
    assert [file.name for file in path.parent.iterdir()] == ["judge.pt"]
    contents = path.read_bytes()

    def fail(*args):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        judge.save(path)
    assert path.read_bytes() == contents


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_does_not_change_what_the_judge_says(dtype):
    judge = small_judge(0).float()
    frames = Tensors(0, torch.float32).uniform(2, 3, 1, 6, 6).to(dtype)
    wanted = judge(frames.float())
    with torch.autocast("cpu", torch.bfloat16):
        said, features = judge(frames), judge.features(frames)
    assert features.dtype == torch.float32
    for name in SIZES:
        assert torch.equal(said[name], wanted[name])


def test_frames_that_are_no_pixels_are_refused():
    judge, frames = small_judge(0), Tensors(0).uniform(2, 3, 1, 6, 6)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    with pytest.raises(ValueError, match="^frames: "):
        judge(255 * frames)
    frames[~mask] = 255
    judge(frames, mask)
    frames[0, 0, 0, 0, 0] = 3.0  # a forecast may diverge
    judge(frames, mask)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="^num_classes: "):
        Judge({})
    with pytest.raises(ValueError, match=r"^num_classes\['who'\]: "):
        Judge({"who": 0})
    judge = small_judge(0)
    with pytest.raises(ValueError, match=r"^frames: .*\(2, 1, 6, 6\)"):
        judge(torch.zeros(2, 1, 6, 6))
    with pytest.raises(TypeError, match="^frames: "):
        judge(torch.zeros(1, 2, 1, 6, 6, dtype=torch.uint8))
    with pytest.raises(TypeError, match="^frames: "):
        judge(torch.zeros(1, 2, 1, 6, 6))
    with pytest.raises(ValueError, match="^frames: .*meta"):
        judge(torch.zeros(1, 2, 1, 6, 6, dtype=torch.float64, device="meta"))
    with pytest.raises(ValueError, match="^mask: "):
        judge(torch.zeros(1, 2, 1, 6, 6, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="^factors: 'hair'"):
        train_small(factors=["hair"])
    with pytest.raises(ValueError, match="^factors: .*empty"):
        train_small(factors=[])
    two = Clips(torch.zeros(2, 1, 1, 6, 6, dtype=torch.uint8), labels={"who": torch.tensor([0, 1])})
    with pytest.raises(
        ValueError,
        match=r"^held_out: .*\(2 and 3\)",
    ):
        train_judge(moving_dots(0), two, factors=["who"])
    wide = Clips(torch.zeros(2, 1, 1, 6, 8, dtype=torch.uint8), labels={"who": torch.tensor([0, 1])})
    with pytest.raises(ValueError, match="^held_out: "):
        train_judge(two, wide)


def test_it_learns_the_direction_of_real_sprites_in_a_few_steps(data_root):
    clips = sprites(data_root / "lpc" / "layers", characters=[0, 1, 2, 3, 4, 5, 400, 401, 402, 403, 404, 405])
    train, held_out = clips.split(2, 0, by="identity")
    judge = train_judge(train, held_out, factors=["direction"], num_steps=30, batch_size=12, channels=(8, 16, 16, 16))
    assert judge.accuracy["direction"] > 0.9


def ramps(seed, count=90):
    """Ragged sequences of three numbers with a hole each, whose level says who, and which rise or fall."""
    generator = torch.Generator().manual_seed(seed)
    who, what = (torch.randint(size, (count,), generator=generator) for size in SIZES.values())
    steps = torch.linspace(-1, 1, 6)[:, None].expand(count, 6, 3)
    values = steps * (2 * what - 1)[:, None, None] + 3 * who[:, None, None]
    values = values + 0.1 * torch.randn(values.shape, generator=generator)
    values[torch.arange(count), torch.randint(4, (count,), generator=generator)] = torch.nan
    lengths = torch.randint(5, 7, (count,), generator=generator)
    return Sequences(values, lengths=lengths, labels={"who": who, "what": what})


def test_any_steps_are_judged_by_a_network_of_ones_own(tmp_path):
    def network():
        return torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU())

    torch.manual_seed(0)
    judge = train_judge(ramps(0), ramps(1), num_steps=150, learning_rate=1e-2, frame_dim=16, network=network())
    assert min(judge.accuracy.values()) > 0.9
    batch = ramps(2).batch([0, 1, 2])
    judge.save(tmp_path / "judge.pt")
    again = Judge.load(tmp_path / "judge.pt", network=network())
    for name, logits in judge(batch.values, batch.mask).items():
        assert (again(batch.values, batch.mask)[name] == logits).all()
    for kept, own in ((tmp_path / "judge.pt", None), (tmp_path / "pictures.pt", network())):
        small_judge(0).save(tmp_path / "pictures.pt")
        with pytest.raises(ValueError, match="network: the judge in .* had"):
            Judge.load(kept, network=own)
    with pytest.raises(ValueError, match=r"expected pictures .*, or a `network`"):
        train_judge(ramps(0), ramps(1))
    with pytest.raises(ValueError, match=r"network: returned shape \(.*, 16\) .*, expected \(.*, 8\)"):
        train_judge(ramps(0), ramps(1), num_steps=1, frame_dim=8, network=network())
    with pytest.raises(ValueError, match=r"frames: has shape \(3, .\), expected \(N, T, \*E\)"):
        judge(batch.values[..., 0])
