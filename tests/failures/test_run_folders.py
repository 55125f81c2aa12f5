"""Run folders and command lines of the examples that users get wrong, and what they are told."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from seqdisent import elbo_terms

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")


def npz(folder, **arrays):
    np.savez(folder / "clips.npz", **arrays)
    return folder / "clips.npz"


@pytest.fixture(scope="module")
def vdsm():
    examples = str(Path(__file__).parents[2] / "examples")
    sys.path.insert(0, examples)
    yield importlib.import_module("vdsm")
    sys.path.remove(examples)


@pytest.fixture(scope="module")
def begun(vdsm, tmp_path_factory):
    """config.json of a run of three clips, and their archive."""
    from dataclasses import asdict

    folder = tmp_path_factory.mktemp("begun")
    frames = np.random.default_rng(0).integers(0, 256, (6, 4, 8, 8, 3), dtype=np.uint8)
    sizes = vdsm.replace(
        vdsm.PRESETS["tiny"]["clips"].sizes, encoder_channels=(4,), decoder_channels=(4,), feature_dim=4
    )
    plan = vdsm.replace(vdsm.PRESETS["tiny"]["clips"], sizes=sizes)
    return {
        "data": str(npz(folder, frames=frames, identity=np.arange(6) // 2)), "held_out": 0.1, "image_size": 8,
        "preset": "tiny", "seed": 0, "plan": asdict(plan), "frame_shape": [3, 8, 8],
    }  # fmt: skip


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
            ("config.json cut off", lambda config: json.dumps(config)[:50], None, RESUME,
             "config.json: cannot be read as JSON"),
            ("config.json of something else", lambda _: [1, 2], None, RESUME, "config.json: is no list of settings"),
            ("config.json without an option", lambda config: without(config, "held_out"), None, RESUME,
             "config.json: lacks held_out; written by another version"),
            ("a plan of another version", renamed, None, RESUME,
             "config.json: written by another version of this example.*stage2_steps"),
            ("a plan of another model", lambda config: {**config, "plan": {"sizes": {"width": 3}}}, None, RESUME,
             "config.json: written by another version of this example, or by another one .*width"),
            ("another seed on resuming", dict, None, [*RESUME, "--seed", "3"],
             "--seed: got 3, but this run was started with 0; choose another --run-dir"),
            ("the default seed on resuming another", lambda config: {**config, "seed": 3}, None, [*RESUME, "--seed=0"],
             "--seed: got 0, but this run was started with 3"),
            ("an option cut short", None, None, ["--run-dir", "RUN", "--see=3"], "unrecognized arguments: --see=3"),
            ("other data on resuming", dict, None, [*RESUME, "--data", "sprites"], "--data: got sprites, but this run"),
            ("data that are gone", lambda config: {**config, "data": "gone"}, None, RESUME, "--data gone: .*no such"),
            ("a checkpoint of garbage", dict, with_file("stage1/last.ckpt"), RESUME,
             "stage1/last.ckpt: cannot be read as a checkpoint"),
            ("a finished stage of garbage", dict, with_file("stage1/model.pt"), RESUME,
             "stage1/model.pt: damaged, or the weights of another network .*--resume makes it again"),
            ("an unfinished run, used", dict, None, ["generate", "RUN"], "is not finished .* continue it with --run-d"),
            ("a damaged run, used", dict, with_file("model.pt"), ["generate", "RUN"], "model.pt: damaged, or the wei"),
            ("no run, used", None, None, ["generate", "RUN"], "config.json is missing: .* is not a run folder"),
            ("unknown data", None, None, ["--run-dir", "RUN", "--data", "no/such"], "no/such: no such folder or .npz"),
        )
    ],
)  # fmt: skip
def test_run_folders(config, prepare, arguments, said, vdsm, begun, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    if config is not None:
        run.mkdir()
        changed = config(begun)
        (run / "config.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))
    if prepare is not None:
        prepare(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", ["vdsm.py", *(str(run) if part == "RUN" else part for part in arguments)])
    with pytest.raises(SystemExit) as left:
        vdsm.main(vdsm.EXAMPLE)
    assert left.value.code not in (None, 0)
    assert re.search(said, f"{left.value.code}{capsys.readouterr().err}")
    assert all(path.read_bytes() == content for path, content in before.items())  # nothing of it is lost


@pytest.mark.parametrize("frames", [torch.full((2, 3, 3, 8, 8), 255.0), torch.full((2, 3, 3, 8, 8), -0.1)])
def test_pixels_that_are_not_between_0_and_1(frames, vdsm):
    """The library cannot know the likelihood; the examples, whose likelihood wants [0, 1], can."""
    plan = vdsm.replace(vdsm.PRESETS["tiny"]["clips"].sizes, encoder_channels=(4,), decoder_channels=(4,))
    network = vdsm.VDSM((3, 8, 8), plan)
    with pytest.raises(ValueError, match=r"frames: got values from .* to .*, expected all in \[0, 1\]"):
        elbo_terms(network.model, network.guide, frames)
