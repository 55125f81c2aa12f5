"""The examples' settings and run folders: presets, YAML files, options of every field, and what users get wrong."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from seqdisent import elbo_terms
from seqdisent.datasets import Clips

for needed in ("lightning", "matplotlib", "torchmetrics", "jsonargparse"):
    pytest.importorskip(needed)
EXAMPLES = Path(__file__).parent.parent / "examples"
MODELS = ("vdsm", "dmm", "vrnn", "srnn", "rssm", "dsvae", "cdsvae", "s3vae", "dbse", "kalman_vae", "speakers")


@pytest.fixture(scope="module")
def vdsm():
    return importlib.import_module("vdsm")


@pytest.fixture(scope="module")
def settings():
    return importlib.import_module("settings")


@pytest.mark.parametrize("name", MODELS)
def test_an_example_is_short(name):
    length = len((EXAMPLES / f"{name}.py").read_text().splitlines())
    assert length <= (300 if name == "vdsm" else 150)


# Presets and settings


@pytest.mark.parametrize("name", MODELS)
def test_every_preset_builds_its_network_and_says_all_that_it_is(name, settings):
    example = importlib.import_module(name).EXAMPLE
    for file in (settings.PRESETS / name).glob("*.yaml"):
        preset, _, data = file.stem.partition("_")
        data = data or example.task.options["data"]["default"]
        if not settings.PRESETS.joinpath(name, f"{preset}_{data}.yaml").exists() and preset == "ablation":
            data = "pendulum"
        found = settings.settings_of(example, ["--preset", preset, "--data", data])
        plan = example.plan_of(found)
        assert isinstance(plan, example.plan)
        assert plan.betas == tuple(plan.betas)  # tuples, as Python has them
        if name in ("dmm", "vrnn", "srnn"):
            shape = (88,)
        elif name == "speakers" or data == "signals":
            shape = (96,)
        else:
            shape = (1 if data == "moving_mnist" else 3, found.image_size, found.image_size)
        with torch.device("meta"):  # without memory
            assert sum(p.numel() for p in example.build(shape, plan.sizes).parameters()) > 0


def test_files_and_options_change_any_field(vdsm, settings, tmp_path):
    (tmp_path / "my.yaml").write_text("seed: 3\nplan:\n  sizes: {pose_dim: 4, rnn_dim: 7}\n  betas: [0.8, 1e-1]\n")
    asked = [
        "--preset",
        "tiny",
        "--config",
        str(tmp_path / "my.yaml"),
        "--plan.sizes.rnn_dim",
        "9",
        "--plan.decays=true",
    ]
    found = settings.settings_of(vdsm.EXAMPLE, asked)
    plan = vdsm.EXAMPLE.plan_of(found)
    assert (found.seed, found.preset, found.num_clips) == (3, "tiny", 140)  # the file's, the option's, the preset's
    assert (plan.sizes.num_experts, plan.sizes.pose_dim, plan.sizes.rnn_dim) == (3, 4, 9)
    assert (plan.betas, plan.decays, plan.warm_up) == ((0.8, 0.1), True, 1)
    (tmp_path / "other.yaml").write_text("preset: cpu\ndata: sprites\n")  # a file may choose the preset too
    assert settings.settings_of(vdsm.EXAMPLE, ["--config", str(tmp_path / "other.yaml")]).plan.sizes.num_experts == 24


def test_a_run_takes_the_settings_of_another(vdsm, settings, tmp_path):
    first = settings.settings_of(vdsm.EXAMPLE, ["--preset", "tiny", "--seed", "5", "--plan.clip_norm", "0.3"])
    first.frame_shape = (3, 8, 8)
    settings.write_settings(vdsm.EXAMPLE, first, tmp_path / "config.yaml")
    again = settings.settings_of(vdsm.EXAMPLE, ["--config", str(tmp_path / "config.yaml")])
    for name in vdsm.EXAMPLE.recorded():
        assert again[name] == first[name] == settings.read_settings(vdsm.EXAMPLE, tmp_path)[name]
    assert vdsm.EXAMPLE.plan_of(again) == vdsm.EXAMPLE.plan_of(first)


def test_flags_are_short_for_sizes(settings):
    dsvae, dmm = (importlib.import_module(name).EXAMPLE for name in ("dsvae", "dmm"))
    assert settings.settings_of(dsvae, ["--full"]).plan.sizes.full
    assert settings.settings_of(dmm, ["--flow"]).plan.sizes.num_flows == 1
    assert settings.settings_of(dmm, ["--flow", "--plan.sizes.num_flows", "2"]).plan.sizes.num_flows == 2
    assert settings.settings_of(dmm, []).plan.sizes.num_flows == 0


def test_an_objective_is_a_setting(settings):
    """Its training has it, except where an example has an objective of its own."""
    command_line, dmm, rssm = (importlib.import_module(name) for name in ("command_line", "dmm", "rssm"))
    clips = Clips(torch.zeros(4, 6, 88, dtype=torch.uint8))
    for name, example in (("dreg", dmm.EXAMPLE), (rssm.balanced_bound, rssm.EXAMPLE)):
        asked = ["--preset", "tiny", "--plan.objective", "dreg", "--plan.num_particles", "3"]
        plan = example.plan_of(settings.settings_of(example, asked))
        own = {} if name == "dreg" else {"objective": name}
        network = dmm.EXAMPLE.build((88,), dmm.EXAMPLE.preset("tiny").sizes)
        training = command_line.single_stage(network, plan, clips, 0, **own)
        assert (training.objective, training.num_particles) == (name, 3)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--see=3"], "(?i)unrecognized arguments: --see=3"),
        (["--plan.sizes.num_expert", "3"], "(?i)unrecognized arguments: --plan.sizes.num_expert"),
        (["--plan.sizes.num_experts", "many"], "plan.sizes.num_experts"),
        (["--config", "no/such.yaml"], "no/such.yaml"),
        (["--preset", "cpu", "--config", "MY"], "my.yaml|stage2_steps"),
        (["--preset", "huge"], "huge"),
        (
            ["--preset", "small", "--data", "my.npz"],
            "small.* not for --data my.npz; .* are: ablation, cpu, paper",
        ),
        (["generat", "RUN"], "(?i)unrecognized arguments: generat RUN"),
    ],
)
def test_settings_that_are_wrong_are_named(asked, said, vdsm, settings, tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("plan: {stage2_steps: 3}\n")
    asked = [str(tmp_path / "my.yaml") if word == "MY" else word for word in asked]
    with pytest.raises(SystemExit) as left:
        settings.settings_of(vdsm.EXAMPLE, asked)
    assert left.value.code not in (None, 0)
    assert re.search(said, f"{left.value.code}{capsys.readouterr().err}")


# Run folders


@pytest.fixture(scope="module")
def begun(vdsm, settings, tmp_path_factory):
    """What config.yaml of a run of three clips holds; their archive."""
    folder = tmp_path_factory.mktemp("begun")
    frames = np.random.default_rng(0).integers(0, 256, (6, 4, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "clips.npz", frames=frames, identity=np.arange(6) // 2)
    sizes = ["--plan.sizes.encoder_channels=[4]", "--plan.sizes.decoder_channels=[4]", "--plan.sizes.feature_dim=4"]
    data = ["--data", str(folder / "clips.npz"), "--image-size", "8"]
    found = settings.settings_of(vdsm.EXAMPLE, ["--preset", "tiny", *data, *sizes])
    found.frame_shape = (3, 8, 8)
    settings.write_settings(vdsm.EXAMPLE, found, folder / "config.yaml")
    return yaml.safe_load((folder / "config.yaml").read_text())


def without(config, name):
    return {key: value for key, value in config.items() if key != name}


def renamed(config):
    plan = config["plan"]
    return {**config, "plan": {**without(plan, "sequence_steps"), "stage2_steps": 6}}


def with_file(name, content=b"garbage"):
    def write(run):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)

    return write


RESUME = ["--run-dir", "RUN", "--resume"]


@pytest.mark.parametrize(
    ("config", "prepare", "arguments", "said"),
    [
        pytest.param(*row[1:], id=row[0])
        for row in (
            ("nothing there to resume", None, None, RESUME, "holds no run to resume"),
            ("a run that is there", dict, None, ["--run-dir", "RUN"], "holds a run; continue it with --resume"),
            ("config.yaml cut off", lambda config: yaml.safe_dump(config) + "plan: {si", None, RESUME,
             "config.yaml: cannot be read as YAML"),
            ("config.yaml of something else", lambda _: [1, 2], None, RESUME, "config.yaml: is no list of settings"),
            ("config.yaml without an option", lambda config: without(config, "held_out"), None, RESUME,
             "config.yaml: written by another version .*it lacks held_out"),
            ("a plan of another version", renamed, None, RESUME,
             "config.yaml: written by another version of this example.*stage2_steps"),
            ("a plan of another model", lambda config: {**config, "plan": {"sizes": {"width": 3}}}, None, RESUME,
             "config.yaml: written by another version of this example, or by another one .*width"),
            ("another seed on resuming", dict, None, [*RESUME, "--seed", "3"],
             "--seed: got 3, but this run was started with 0; choose another --run-dir"),
            ("the default seed on resuming another", lambda config: {**config, "seed": 3}, None, [*RESUME, "--seed=0"],
             "--seed: got 0, but this run was started with 3"),
            ("another size on resuming", dict, None, [*RESUME, "--plan.sizes.num_experts", "4"],
             "--plan.sizes.num_experts: got 4, but this run was started with 3"),
            ("another image size on resuming", dict, None, [*RESUME, "--image-size", "9"],
             "--image-size: got 9, but this run was started with 8"),
            ("an option cut short", None, None, ["--run-dir", "RUN", "--see=3"], "(?i)unrecognized arguments: --see=3"),
            ("other data on resuming", dict, None, [*RESUME, "--data", "sprites"], "--data: got sprites, but this run"),
            ("data that are gone", lambda config: {**config, "data": "gone"}, None, RESUME, "--data gone: .*no such"),
            ("a checkpoint of garbage", dict, with_file("stage1/last.ckpt"), RESUME,
             "stage1/last.ckpt: cannot be read as a checkpoint"),
            ("a finished stage of garbage", dict, with_file("stage1/model.pt"), RESUME,
             "stage1/model.pt: cannot be read as a checkpoint .*remove it to train from the start"),
            ("an unfinished run, used", dict, None, ["generate", "RUN"], "is not finished .* continue it with --run-d"),
            ("a damaged run, used", dict, with_file("model.pt"), ["generate", "RUN"], "model.pt: cannot be read"),
            ("no run, used", None, None, ["generate", "RUN"], "config.yaml is missing: .* is not a run folder"),
            ("unknown data", None, None, ["--run-dir", "RUN", "--data", "no/such"], "no/such: no such folder or .npz"),
        )
    ],
)  # fmt: skip
def test_run_folders(config, prepare, arguments, said, vdsm, begun, tmp_path, capsys):
    run = tmp_path / "run"
    if config is not None:
        run.mkdir()
        changed = config(begun)
        (run / "config.yaml").write_text(changed if isinstance(changed, str) else yaml.safe_dump(changed))
    if prepare is not None:
        prepare(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as left:
        vdsm.main(vdsm.EXAMPLE, [str(run) if part == "RUN" else part for part in arguments])
    assert left.value.code not in (None, 0)
    assert re.search(said, f"{left.value.code}{capsys.readouterr().err}")
    assert all(path.read_bytes() == content for path, content in before.items())  # nothing of it is lost


def test_a_flag_on_resuming_a_run_without_it(settings, tmp_path):
    dmm = importlib.import_module("dmm").EXAMPLE
    found = settings.settings_of(dmm, [])
    found.frame_shape = (88,)
    settings.write_settings(dmm, found, tmp_path / "config.yaml")
    with pytest.raises(SystemExit, match="--flow: this run was started without it"):
        settings.settings_of_run(dmm, tmp_path, ["--flow"])
    assert settings.settings_of_run(dmm, tmp_path, ["--plan.annealed.z", "[0.2, 4000]"]).plan == found.plan
    with pytest.raises(SystemExit, match="--plan.annealed: got .*z.*0.3"):
        settings.settings_of_run(dmm, tmp_path, ["--plan.annealed.z", "[0.3, 4000]"])


@pytest.mark.parametrize("frames", [torch.full((2, 3, 3, 8, 8), 255.0), torch.full((2, 3, 3, 8, 8), -0.1)])
def test_pixels_that_are_not_between_0_and_1(frames, vdsm):
    """The library cannot know the likelihood; the examples, whose likelihood wants [0, 1], can."""
    network = vdsm.VDSM((3, 8, 8), vdsm.Sizes(3, encoder_channels=(4,), decoder_channels=(4,)))
    with pytest.raises(ValueError, match=r"frames: got values from .* to .*, expected all in \[0, 1\]"):
        elbo_terms(network.model, network.guide, frames)
