"""The examples' music: transposition, melodies that pieces share, and a choice of the model that survives a stop."""

import importlib
import math
from functools import partial

import pytest
import torch

from seqdisent import elbo_terms
from seqdisent.datasets import Clips
from seqdisent.training import train_stages

for needed in ("lightning", "matplotlib", "torchmetrics", "jsonargparse"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def music():
    return importlib.import_module("music")


@pytest.fixture(scope="module")
def chorales():
    return importlib.import_module("chorales")


def rolls_of(*pieces):
    """Clips of pieces, each a list of chords of keys."""
    frames = torch.zeros(len(pieces), max(map(len, pieces)), 88, dtype=torch.uint8)
    for piece, chords in enumerate(pieces):
        for step, keys in enumerate(chords):
            frames[piece, step, list(keys)] = 1
    return Clips(frames, scale=1, lengths=torch.tensor([len(piece) for piece in pieces]))


# Transposition


PIECES = [
    [(40, 44, 47), (), (41,)], [(0, 50), (3,)], [(87,)], [(2, 85), (10,), (11,)], [(), ()], [(0, 87)],
]  # fmt: skip


def chords_of(batch):
    return [[tuple(chord.nonzero().squeeze(1).tolist()) for chord in piece] for piece in batch.frames]


def test_transposition_moves_every_chord_of_a_piece_by_one_number(music):
    batch, generator = rolls_of(*PIECES).batch(range(len(PIECES))), torch.Generator().manual_seed(0)
    seen = [set() for _ in PIECES]
    for _ in range(300):
        moved = music.transpose(batch, 6, generator)
        assert torch.equal(moved.mask, batch.mask)
        for piece, (before, after) in enumerate(zip(chords_of(batch), chords_of(moved), strict=True)):
            possible = [
                shift for shift in range(-6, 7) if after == [tuple(key + shift for key in chord) for chord in before]
            ]
            assert possible, (before, after)
            seen[piece].add(possible[0])
    # all numbers that leave no key out; silence stays silence
    assert seen == [set(range(-6, 7)), set(range(7)), set(range(-6, 1)), set(range(-2, 3)), {-6}, {0}]


def test_shifts_are_equally_likely(music):
    batch = rolls_of(*[[(2, 40)]] * 9000).batch(range(9000))
    moved = music.transpose(batch, 6, torch.Generator().manual_seed(0))
    count = torch.bincount(moved.frames[:, 0].argmax(1), minlength=9)
    assert len(count) == 9  # -2 to 6
    assert (count - 1000).abs().max() < 4 * 1000**0.5


def test_transposition_is_a_function_of_the_generator(music):
    batch = rolls_of(*PIECES).batch(range(len(PIECES)))
    drawn = [music.transpose(batch, 6, torch.Generator().manual_seed(seed)).frames for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# Melodies


TUNE = [40, 42, 43, 40, 40, 45, 47, 48, 40, 42, 35, 36, 38, 40, 41, 43]


def test_a_melody_is_intervals_and_durations(music):
    clips = rolls_of([(30, 40), (10, 40), (), (43,), (41, 20)])
    assert music.melody(clips.frames[0].bool()) == [(3, 2), (-2, 1)]


def test_near_duplicates(music):
    harmonised = [(key, 20 + i % 3) for i, key in enumerate(TUNE)]
    half = [(key + 3,) for key in TUNE[:8]] + [(50 - key // 2 - 9 * (i % 2),) for i, key in enumerate(TUNE[:8])]
    slower = [(key,) for key in TUNE for _ in range(2)]
    backwards = [(key,) for key in reversed(TUNE)]
    training = rolls_of(backwards, [(key - 7, 3) for key in TUNE])
    held_out = rolls_of(harmonised, half, slower, [(3,)], [()], backwards)
    similarity, position = music.melodic_similarity(held_out, training)
    assert similarity[0] == similarity[5] == 1.0
    assert (position[0], position[5]) == (1, 0)
    assert 0 < similarity[1] < 0.3
    assert similarity[2:5].tolist() == [0.0, 0.0, 0.0]  # other durations; too short to have a melody


def test_the_chorales(music, data_root):
    data = music.load_music("jsb")
    similarity, _ = music.melodic_similarity(data.held_out, data.train)
    assert (similarity >= music.THRESHOLD).sum() == 35
    assert not ((similarity > 0.36) & (similarity < 0.46)).any()  # the gap in which the threshold lies


def test_unknown_music_is_refused(music):
    with pytest.raises(ValueError, match=r"expected one of jsb, nottingham, musedata, piano-midi"):
        music.load_music("bach")


# Batches and training


def test_batches_by_length_have_every_sequence_once(music):
    lengths = torch.randint(1, 50, (40,), generator=torch.Generator().manual_seed(0))
    batches = list(music.batches_by_length(lengths, 60))
    assert torch.cat(batches).sort().values.tolist() == list(range(40))
    for rows in batches:
        assert len(rows) * lengths[rows].max() <= 60
    assert len(batches) < 25
    assert [len(rows) for rows in music.batches_by_length(lengths, 1)] == [1] * 40  # one that is longer, by itself


def plan_of(settings, *options):
    example = importlib.import_module("dmm").EXAMPLE
    return example, example.plan_of(settings.settings_of(example, ["--preset", "tiny", *options]))


def test_steps_of_long_and_of_short_pieces_count_alike(chorales, music):
    """Pieces of 900 and 100 steps: nine of ten windows are of the longer one."""
    settings = importlib.import_module("settings")
    example, plan = plan_of(
        settings, "--plan.clip_length", "10", "--plan.transposition", "0", "--plan.batch_size", "50"
    )
    clips = rolls_of([(60,)] * 900, [(20,)] * 100)
    network = example.build((88,), plan.sizes)
    training = chorales.training(network, plan, clips, 0, validation=lambda: iter(()))
    batches = [training.draw(torch.Generator().manual_seed(seed)) for seed in range(40)]
    share = torch.cat([batch.frames[:, 0, 60] for batch in batches]).mean().item()
    assert share == pytest.approx(0.9, abs=0.02)
    assert all(batch.frames.shape[1] == 10 for batch in batches)


def test_every_choice_is_an_option_that_a_run_records(tmp_path):
    settings = importlib.import_module("settings")
    asked = ["--plan.patience=3", "--plan.averaging=0.9", "--plan.transposition=5", "--plan.validate_every=7"]
    example = importlib.import_module("dmm").EXAMPLE
    found = settings.settings_of(example, ["--data", "musedata", *asked, "--plan.sizes.dropout=0.3"])
    found.frame_shape = (88,)
    settings.write_settings(example, found, tmp_path / "config.yaml")
    plan = example.plan_of(settings.read_settings(example, tmp_path))
    assert (plan.patience, plan.averaging, plan.transposition, plan.validate_every) == (3, 0.9, 5, 7)
    assert plan.sizes["dropout"] == 0.3
    with pytest.raises(SystemExit, match=r"--plan.averaging: got 0.8, but this run was started with 0.9"):
        settings.settings_of_run(example, tmp_path, ["--plan.averaging=0.8"])


def test_dropout_is_of_the_emission_and_of_what_the_guide_reads():
    dmm = importlib.import_module("dmm")
    network = dmm.DMM((88,), 3, 4, 5, 6, dropout=0.5)
    assert [module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)] == [0.5] * 3
    plain = dmm.DMM((88,), 3, 4, 5, 6)
    assert plain.state_dict()["emission.4.weight"].shape == (88, 6)  # the names that saved weights have
    z = torch.ones(1, 3)
    assert not torch.equal(network.emission(z), network.emission(z))
    network.eval()
    assert torch.equal(network.emission(z), network.emission(z))


class _Stop(Exception):
    pass


def test_a_run_that_was_stopped_chooses_the_same_model(chorales, tmp_path):
    """Averages, patience, dropout and transposition go on where they were."""
    settings = importlib.import_module("settings")
    example, plan = plan_of(settings, "--plan.num_steps=12", "--plan.averaging=0.7", "--plan.learning_rate=3")
    generator = torch.Generator().manual_seed(0)
    frames = (torch.rand(6, 12, 88, generator=generator) < 0.05).to(torch.uint8)
    data = importlib.import_module("music").Data(*(Clips(frames[i : i + 2], scale=1) for i in (0, 2, 4)))

    def run(folder, stop_at=None, **options):
        torch.manual_seed(0)
        network = example.build((88,), plan.sizes)
        training = chorales.training(network, plan, data.train, 0, validation=partial(chorales.validation, data))
        draw, drawn = training.draw, iter(range(100))

        def draw_or_stop(generator):
            if next(drawn) == stop_at:
                raise _Stop
            return draw(generator)

        training.draw = draw_or_stop
        train_stages(
            network, {"training": lambda: training}, folder, validate_every=2, checkpoint_every=1, patience=3,
            averaging=plan.averaging, progress_bar=False, accelerator="cpu", loggers=[], **options,
        )  # fmt: skip

    run(tmp_path / "whole")
    steps = [
        torch.load(tmp_path / f"whole/training/{file}.ckpt", weights_only=True)["global_step"]
        for file in ("best", "last")
    ]
    assert steps in ([2, 8], [4, 10])  # it soon learns nothing more at this rate, and patience ends it
    with pytest.raises(_Stop):
        run(tmp_path / "stopped", stop_at=7)
    run(tmp_path / "stopped", resume=True)
    for file in ("best.ckpt", "last.ckpt"):
        whole, stopped = (
            torch.load(tmp_path / name / "training" / file, weights_only=True) for name in ("whole", "stopped")
        )
        assert whole["global_step"] == stopped["global_step"]
        for key, tensor in whole["state_dict"].items():
            assert torch.equal(tensor, stopped["state_dict"][key]), (file, key)
        assert whole["callbacks"].keys() == stopped["callbacks"].keys()
        (name,) = [name for name in whole["callbacks"] if "Validation" in name]
        assert whole["callbacks"][name] == stopped["callbacks"][name]


@pytest.mark.parametrize("preset", ["cpu", "short"])
def test_a_preset_for_some_data_changes_its_namesake(preset):
    dmm = importlib.import_module("dmm").EXAMPLE
    chorales, reels = (dmm.preset(preset, name) for name in ("jsb", "nottingham"))
    assert (chorales.weight_decay, reels.weight_decay) == (1.5e-3, 1e-4)
    assert chorales.num_steps == reels.num_steps == {"cpu": 12_000, "short": 3_000}[preset]


# Estimates


def test_draws_in_one_run_estimate_what_draws_in_turn_do(chorales):
    example, plan = plan_of(importlib.import_module("settings"), "--plan.sizes.dropout", "0")
    network = example.build((88,), plan.sizes)
    clips = rolls_of([(40,), (41, 50), (40,)], [(30,)] * 5)
    found = chorales.evidences(network, clips, num_particles=30, seed=0)
    batch, log_weights, kl = clips.batch([0, 1]), [], []
    with torch.no_grad():
        for _ in range(300):
            terms = elbo_terms(network.model, network.guide, batch.frames, batch.mask, kl="monte-carlo")
            log_weights.append(terms.log_weights().double())
            kl.append(terms.kl["z"].double())
    weights, kl = torch.stack(log_weights), torch.stack(kl)
    error = 4 * weights.std(0) / chorales.SAMPLES**0.5
    assert ((found["bound"] - weights.mean(0)).abs() < error).all()
    assert ((found["KL"] - kl.mean(0)).abs() < 4 * kl.std(0) / chorales.SAMPLES**0.5).all()
    thirty = weights.reshape(10, 30, 2).logsumexp(1) - math.log(30)  # what the same number of draws gives
    assert ((found["importance-sampled"] - thirty.mean(0)).abs() < 4 * thirty.std(0)).all()
    assert (found["importance-sampled"] > found["bound"]).all()
    assert (found["particle filter"] > found["bound"]).all()
