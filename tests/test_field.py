"""The bench of the field: same clips, same judge, same minutes; what is finished stays, and cheats are found out."""

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_here, starts_alone
from PIL import Image

from seqdisent.datasets import sprites

for needed in ("lightning", "matplotlib", "torchmetrics", "jsonargparse"):
    pytest.importorskip(needed)
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True, scope="module")
def benchmarks_on_path():
    folders = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples")]
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)


def field(*arguments):
    return run_here(BENCHMARKS / "field.py", "--preset", "tiny", "--threads", 1, *arguments)


def test_the_bench_starts_by_itself():
    assert "FILE.py:FUNCTION" in starts_alone(BENCHMARKS / "field.py")


@pytest.mark.slow
def test_models_and_cheats_on_one_table(tmp_path):
    asked = ["--data", "pendulum", "--image-size", 16, "--judge-steps", 5, "--out", tmp_path]
    models = ["vdsm", "dsvae", "dsvae-full", "all in f", "all in z"]  # the others are in the test of signals
    done = field(*asked, "--models", *models, "--seeds", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "pendulum" / "test"
    table = json.loads((folder / "field.json").read_text())["tables"]
    assert set(table["Summary"]["reconstruction, squared error"]) == set(models)
    assert table["Summary"]["reconstruction, squared error"]["all in f"] == {"mean": 0, "deviation": None, "seeds": 1}
    nearest = table["Nearest of 98 true clips to a swap of the identity"]
    # with everything in f, a swap of f is a swap of the clip; in z, nothing follows
    assert nearest["has the right colour, %"]["all in f"]["mean"] == 100
    assert nearest["has the right speed, %"]["all in f"]["mean"] == 0
    assert nearest["has the right colour, %"]["all in z"]["mean"] == 0
    assert nearest["has the right speed, %"]["all in z"]["mean"] == 100
    page = (folder / "field.html").read_text()
    for name in models:
        picture = f"{name.replace(' ', '_')}/0/swaps.png"
        assert picture in page
        assert (folder / picture).stat().st_size > 0
    # once more, with a second seed of one model: what is finished is not touched
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/0/*")}
    done = field(*asked, "--models", "dsvae", "--seeds", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    refused = field(*asked, "--models", "dsvae", "--seeds", 3, "--minutes", 5)
    assert f"--minutes: got 5.0, but {folder} was begun with None; choose another --out" in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    rows = json.loads((folder / "field.json").read_text())["tables"]["Summary"]["reconstruction, squared error"]
    found = [
        json.loads((folder / "dsvae" / str(seed) / "metrics.json").read_text())["mean_squared_error"]["reconstruction"]
        for seed in (0, 1)
    ]
    assert rows["dsvae"]["seeds"] == 2
    assert rows["dsvae"]["mean"] == pytest.approx(sum(found) / 2)
    assert rows["dsvae"]["deviation"] == pytest.approx(abs(found[0] - found[1]) / 2**0.5)
    assert rows["vdsm"]["seeds"] == 1  # runs that were not asked for this time stay on the table


@pytest.mark.slow
def test_signals_have_models_of_their_own(tmp_path):
    done = field("--data", "signals", "--seeds", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads((tmp_path / "signals" / "test" / "field.json").read_text())["tables"]
    models = {"speakers", "dsvae", "dsvae-grouped", "cdsvae", "s3vae", "dbse", "all in f", "all in z"}
    assert set(table["Summary"]["identity swapped, squared error"]) == models
    nearest = table["Nearest of 1440 true clips to a swap of the identity"]
    assert nearest["has the right voice, %"]["all in f"]["mean"] == 100
    assert nearest["has the right clip, %"]["all in f"]["mean"] == 0
    assert nearest["has the right speed, %"]["all in z"]["mean"] == 100


OWN = """
from functools import partial

from field_models import Contestant, of_example

def mine(task, seed, scale):
    print("own entry", task.data, seed, round(scale, 2))
    return of_example("dsvae")(task, seed, scale)._replace(stages={})

def broken(task, seed, scale):
    contestant = of_example("dsvae")(task, seed, scale)
    contestant.network.prior.loc.weight.data.fill_(float("nan"))
    return contestant

def misfit(task, seed, scale):
    raise ValueError("width: got 3")
"""


@pytest.mark.slow
def test_a_model_of_ones_own_joins_by_one_function(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    asked = ["--data", "pendulum", "--image-size", 16, "--judge-steps", 5, "--seeds", 1, "--out", tmp_path / "out"]
    broken, mine = (f"{tmp_path / 'mine.py'}:{name}" for name in ("broken", "mine"))
    done = field(*asked, "--models", broken, mine)
    # a model that breaks does not keep the others from the table
    assert done.returncode == 1
    assert f"these did not end, and are not in the table:\n{broken}, seed 0: " in done.stderr
    assert "own entry pendulum 0 1.0" in done.stdout
    folder = tmp_path / "out" / "pendulum" / "test"
    assert set(json.loads((folder / "field.json").read_text())["tables"]["Summary"]["intervention score"]) == {mine}
    (picture,) = re.findall(r"src=['\"]([^'\"]*swaps.png)", (folder / "field.html").read_text())
    assert ":" not in picture  # or a browser takes what is before it for a protocol
    assert (folder / picture).is_file()
    assert f"{mine}, seed 0: was finished before, and is kept" in field(*asked, "--models", mine).stdout
    misfit = f"{tmp_path / 'mine.py'}:misfit"
    assert f"{misfit}: width: got 3" in field(*asked, "--models", misfit).stderr
    assert "unrecognized arguments: --grouped" in field(*asked, "--grouped").stderr


def test_what_an_entry_returns_is_checked_before_anything_is_trained():
    models, load = importlib.import_module("field_models"), importlib.import_module("field").load
    task = load("pendulum", "test", "tiny", ["--image-size=16", "--num-clips=140"])
    right = models.of_example("dsvae")(task, 0, 1.0)
    models.check(right, task)
    grey = models.of_example("dsvae")(task, 0, 1.0)
    grey.network.emission = lambda decoded, mask: right.network.emission(decoded[..., :1, :, :], mask)
    for wrong, error, message in (
        (right.network, TypeError, "got DSVAE, expected a Contestant"),
        (right._replace(stages=print), TypeError, "stages: got builtin_function_or_method, expected {name: function"),
        (right._replace(static="f"), TypeError, "static: got the string 'f'"),
        (right._replace(motion=("what",)), ValueError, "motion: the guide has no site ['what'], expected some of"),
        (right._replace(motion=("f",)), ValueError, "motion: ['f'] are in `static` too"),
        (right._replace(emission="nope"), ValueError, "emission: the model has no site 'nope', expected one of"),
        (grey, ValueError, "emission: its mean has shape (1, 16, 1, 16, 16)"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            models.check(wrong, task)
    for name in ("dsvae", "vdsm"):
        said = (
            rf"preset 'cpu' is not for frames \(3, 16, 16\): channels: got 4 values.* 'plan.sizes' .*{name}.py --help"
        )
        with pytest.raises(ValueError, match=said):
            models.of_example(name)(task._replace(preset="cpu"), 0, 1.0)


def test_an_entry_is_a_function_of_a_file_and_may_import_its_neighbours(tmp_path, monkeypatch):
    models = importlib.import_module("field_models")
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_mine.py").write_text("answer = 42\n")
    (tmp_path / "mine.py").write_text("from beside_mine import answer\n\ndef mine():\n    return answer\n")
    assert models.find_entry(f"{tmp_path / 'mine.py'}:mine")() == 42
    for name, said in (
        (f"{tmp_path / 'mines.py'}:mine", r"but there is no file .*mines\.py"),
        (f"{tmp_path / 'mine.py'}:other", "has no function 'other'"),
        ("vdms", "--models: got 'vdms', expected FILE.py:FUNCTION or one of vdsm, "),
    ):
        with pytest.raises(SystemExit, match=said):
            models.find_entry(name)


def test_a_first_call_that_could_not_start_leaves_no_settings_behind(tmp_path):
    asked = ["--data", "pendulum", "--image-size", 16, "--out", tmp_path, "--models", "dsvae"]
    refused = field(*asked, "--preset", "cpu")
    assert "dsvae: preset 'cpu' is not for frames (3, 16, 16): " in refused.stderr
    assert list(tmp_path.iterdir()) == []
    for option in ("--seeds", "--minutes"):
        assert f"argument {option}: got 0, expected more than 0" in field(*asked, option, 0).stderr
    # a name is looked up before clips are read, which takes long
    assert "--models: got 'vdms', expected " in field("--data", tmp_path / "no_clips", "--models", "vdms").stderr


def test_runs_of_two_judges_do_not_come_into_one_table(tmp_path):
    bench = importlib.import_module("field")
    bench.check_judge(tmp_path)  # nothing is finished
    (tmp_path / "judge.pt").write_bytes(b"one")
    (tmp_path / "mine" / "0").mkdir(parents=True)
    about = tmp_path / "mine" / "0" / "about.json"
    about.write_text(json.dumps({"judge": bench.digest_of(tmp_path / "judge.pt")}))
    bench.check_judge(tmp_path)
    (tmp_path / "judge.pt").write_bytes(b"two")
    with pytest.raises(SystemExit, match=f"{about.parent} was measured by another judge than {tmp_path / 'judge.pt'}"):
        bench.check_judge(tmp_path)
    (tmp_path / "judge.pt").unlink()
    with pytest.raises(SystemExit, match="was measured by another judge"):
        bench.check_judge(tmp_path)
    about.write_text(json.dumps({"judge": None}))  # of clips that have none
    bench.check_judge(tmp_path)


def test_one_model_that_fails_does_not_stop_the_others(capsys):
    bench, failed = importlib.import_module("field"), []
    for error in (ValueError("width"), RuntimeError("memory")):
        with bench.others_go_on("mine, seed 0", failed):
            raise error
    assert failed == ["mine, seed 0: ValueError: width", "mine, seed 0: RuntimeError: memory"]
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt), bench.others_go_on("mine, seed 0", failed):
        raise KeyboardInterrupt


def test_a_label_called_motion_counts_unless_it_says_what_others_say():
    table = importlib.import_module("field_table")
    assert set(table.basic({"motion": {}, "light": {}})) == {"motion", "light"}
    assert set(table.basic({"motion": {}, "action": {}, "direction": {}})) == {"action", "direction"}


@pytest.mark.slow
def test_of_clips_of_different_lengths_the_models_that_can_take_part(tmp_path):
    generator = np.random.default_rng(0)
    for clip in range(24):
        folder = tmp_path / "clips" / f"who{clip // 2}" / f"clip{clip % 2}"
        folder.mkdir(parents=True)
        for step in range(4 + clip % 3):
            Image.fromarray(generator.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(folder / f"{step}.png")
    asked = ["--data", tmp_path / "clips", "--image-size", 16, "--held-out", 2, "--seeds", 1]
    asked += ["--out", tmp_path / "out"]
    done = field(*asked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out, as clips have different lengths: cdsvae, s3vae, all in f, all in z" in done.stdout
    tables = json.loads((tmp_path / "out" / "clips" / "test" / "field.json").read_text())["tables"]
    assert set(tables["Summary"]["reconstruction, squared error"]) == {"vdsm", "dsvae", "dsvae-grouped", "dbse"}
    for name, said in (("cdsvae", "of_example('cdsvae', 'plan.information=0')"), ("all in f", "clips of one length")):
        assert said in field(*asked, "--models", name).stderr


def test_a_number_that_is_not_finite_is_left_out():
    table = importlib.import_module("field_table")
    run = BENCHMARKS / "field_results" / "sprites" / "test" / "dsvae" / "0"
    numbers, about = (json.loads((run / name).read_text()) for name in ("metrics.json", "about.json"))
    of_all = "KL of all latents, nats a clip"
    rows = table.measures(numbers, about)["Information and cost"]
    assert rows[of_all] == pytest.approx(numbers["nats"]["KL(f)"] + numbers["nats"]["KL(z)"])
    numbers["nats"]["KL(z)"] = None  # as the report writes what is not finite
    kept = table.measures(numbers, about)["Information and cost"]
    assert rows.keys() - kept.keys() == {of_all, "KL(z), nats a clip"}


def test_a_measure_that_only_a_later_run_has_is_on_the_table(tmp_path):
    run = BENCHMARKS / "field_results" / "sprites" / "test" / "vdsm" / "1"
    numbers, about = (json.loads((run / name).read_text()) for name in ("metrics.json", "about.json"))
    for seed in (0, 1):
        folder = tmp_path / "vdsm" / str(seed)
        folder.mkdir(parents=True)
        (folder / "about.json").write_text(json.dumps({**about, "seed": seed}))
        probes = {kind: {k: v for k, v in of.items() if k != "z" or seed} for kind, of in numbers["probes"].items()}
        (folder / "metrics.json").write_text(json.dumps({**numbers, "probes": probes}))
    importlib.import_module("field_table").write_tables(tmp_path, ["vdsm"], "two runs")
    row = json.loads((tmp_path / "field.json").read_text())["tables"][
        "Probes of the second site that says what, linear"
    ]
    assert row["action, %"]["vdsm"] == {"mean": 100.0, "deviation": None, "seeds": 1}
    found = json.loads((tmp_path / "field.json").read_text())
    assert found["sites"] == {"vdsm": {"who": ["s"], "what": ["d", "z"]}}
    assert found["constant guess"]["Probes of the second site that says what, linear"]["action, %"] == pytest.approx(
        100 / 3
    )
    assert "| action, % | 100.0 | 33.3 |" in (tmp_path / "field.md").read_text()


def test_the_summary_has_averages_and_what_a_constant_guess_reaches():
    table = importlib.import_module("field_table")
    run = BENCHMARKS / "field_results" / "sprites" / "test" / "dsvae" / "0"
    numbers, about = (json.loads((run / name).read_text()) for name in ("metrics.json", "about.json"))
    found, guessed = (of(numbers, about)["Summary"] for of in (table.measures, table.chances))
    for direction, who, what in (("identity", "who follows", "what stays"), ("motion", "who stays", "what follows")):
        scores = numbers["swaps"][direction]
        for side, factors in ((who, ("body", "shirt", "pants", "hair")), (what, ("action", "direction"))):
            for summary, score in ((found, "accuracy"), (guessed, "chance")):
                average = sum(scores[factor][score] for factor in factors) / len(factors)
                assert summary[f"{direction} swapped: {side}, %"] == pytest.approx(average)
    assert guessed["identity swapped: the nearest true clip is the right one, %"] == 1 / 7560


def test_a_file_named_like_an_example_does_not_replace_it(tmp_path):
    models = importlib.import_module("field_models")
    dsvae = importlib.import_module("dsvae")
    (tmp_path / "dsvae.py").write_text("def mine(task, seed, scale):\n    return 'mine'\n")
    assert models.find_entry(f"{tmp_path / 'dsvae.py'}:mine")(None, 0, 1.0) == "mine"
    assert importlib.import_module("dsvae") is dsvae


@pytest.mark.slow
def test_training_takes_the_minutes_that_are_asked_for(tmp_path):
    minutes = 0.15
    asked = [
        "--data",
        "signals",
        "--seeds",
        1,
        "--out",
        tmp_path,
        "--models",
        "dsvae",
        "all in f",
        "--minutes",
        minutes,
    ]
    done = field(*asked)
    assert done.returncode == 0, done.stdout + done.stderr
    about = json.loads((tmp_path / "signals" / "test" / "dsvae" / "0" / "about.json").read_text())
    assert about["scale"] > 5  # the preset has six steps
    assert minutes / 1.6 < about["minutes"] < 1.6 * minutes


def test_a_plan_is_stretched_with_its_schedules():
    models = importlib.import_module("field_models")
    plan = importlib.import_module("dsvae").EXAMPLE.preset("cpu", "sprites")
    twice = models.scaled(plan, 2.0)
    assert (plan.num_steps, twice.num_steps, plan.warm_up, twice.warm_up) == (3000, 6000, 200, 400)
    assert twice.annealed == {site: (start, 2 * over) for site, (start, over) in plan.annealed.items()}
    kept = {name: getattr(plan, name) for name in ("learning_rate", "batch_size", "sizes", "checkpoint_every")}
    assert all(getattr(twice, name) == value for name, value in kept.items())
    plan = importlib.import_module("vdsm").EXAMPLE.preset("cpu", "sprites")
    tenth = models.scaled(plan, 0.1)
    names = ("pretraining_steps", "sequence_steps", "prior_steps", "warm_up", "clip_length", "pose_part")
    assert [getattr(tenth, name) for name in names] == [900, 400, 300, 20, 8, 0.5]
    paper = importlib.import_module("vdsm").EXAMPLE.preset("paper", "sprites")
    assert models.scaled(paper, 0.1).prior_steps == 0  # a stage that is left out stays out


def test_a_weight_that_ends_elsewhere_is_stretched_too():
    models = importlib.import_module("field_models")
    plan = importlib.import_module("dsvae").EXAMPLE.preset("cpu", "sprites")
    plan = dataclasses.replace(plan, annealed={"f": (300.0, 600, 5.0)})
    assert models.scaled(plan, 0.5).annealed == {"f": (300.0, 300, 5.0)}


def test_nobody_is_in_two_parts_of_a_users_own_clips(tmp_path):
    load = importlib.import_module("field").load
    frames = torch.randint(256, (40 * 3, 4, 16, 16, 3), dtype=torch.uint8)
    np.savez(tmp_path / "own.npz", frames=frames.numpy(), identity=np.arange(120) // 3)
    test, validation = (
        load(str(tmp_path / "own.npz"), on, "tiny", ["--image-size=16"]) for on in ("test", "validation")
    )
    parts = [set(clips.identity.tolist()) for clips in (test.train, test.held_out, validation.held_out)]
    assert [len(part) for part in parts] == [32, 4, 4]
    assert len(set.union(*parts)) == 40
    more = load(str(tmp_path / "own.npz"), "test", "tiny", ["--image-size=16", "--held-out=7"])
    assert len(more.held_out.identity.unique()) == 7
    with pytest.raises(SystemExit, match="--held-out: leaves 1 identity to measure on; expected at least 2"):
        load(str(tmp_path / "own.npz"), "test", "tiny", ["--image-size=16", "--held-out=1"])
    with pytest.raises(SystemExit, match="--held-out: validation and the test have 20 identities each, of 40 in all"):
        load(str(tmp_path / "own.npz"), "test", "tiny", ["--image-size=16", "--held-out=20"])


def test_other_clips_need_another_folder(tmp_path):
    frames = torch.randint(256, (40, 4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = np.arange(40) % 2
    asked = ["--data", tmp_path / "own.npz", "--image-size", 16, "--held-out", 3, "--out", tmp_path / "out"]
    asked += ["--models", "all in f", "--seeds", 1, "--judge-steps", 1]
    for i in range(2):
        np.savez(tmp_path / "own.npz", frames=frames.numpy(), identity=np.arange(40) // 2, way=labels)
        done = field(*asked)
        assert (done.returncode, "--data: got" in done.stderr) == ((0, False), (1, True))[i], done.stdout + done.stderr
        frames[0, 0, 0, 0, 0] += 1
    note = (tmp_path / "out" / "own.npz" / "test" / "field.md").read_text()
    assert "and averages with them, say little" in note  # one step teaches a judge nothing
    assert "and averages with them, say little" in (tmp_path / "out" / "own.npz" / "test" / "field.html").read_text()


def test_nobody_is_in_two_parts_of_sprites(data_root):
    load = importlib.import_module("field").load
    test, validation = (load("sprites", on, "cpu", []) for on in ("test", "validation"))
    parts = [set(clips.identity.tolist()) for clips in (test.train, test.held_out, validation.held_out)]
    assert [len(part) for part in parts] == [672, 84, 84]
    assert len(set.union(*parts)) == 840
    assert torch.equal(test.train.frames, validation.train.frames)
    assert len(test.candidates) == 7560
    clips = sprites()
    held_out = [set(clips.split(0.1, seed, by="identity")[1].identity.tolist()) for seed in (0, 1, 2)]
    assert held_out[0] == parts[2]  # the presets were chosen on these
    assert [len(one & parts[1]) for one in held_out] == [0, 7, 5]  # the figures of docs/field.md
