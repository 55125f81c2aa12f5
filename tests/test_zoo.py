"""Trained models by name: what is packed is what is loaded, and whatever does not fit is refused."""

from __future__ import annotations

import copy
import hashlib
import http.server
import importlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from failures import check, rows
from loopback import serving

import seqdisent
from seqdisent import load, swap, zoo
from seqdisent.zoo import save

for needed in ("lightning", "matplotlib", "torchmetrics", "jsonargparse"):
    pytest.importorskip(needed)
safetensors = pytest.importorskip("safetensors.torch")
ROOT = Path(__file__).parent.parent
NAME = "speakers-tiny"
SHAPES = {"speakers": (96,), "vdsm": (3, 64, 64)}


def network_of(name, **changes):
    """Return an example's network at a tiny size, with what else `save` wants to know of it."""
    example = importlib.import_module(name).EXAMPLE
    sizes = example.preset("tiny").sizes
    sizes = {**(sizes if isinstance(sizes, dict) else vars(sizes)), **changes}
    network = example.build(SHAPES[name], example.sizes(**sizes) if example.sizes else sizes)
    known = {"example": name, "frame_shape": SHAPES[name], "sizes": sizes, "static": example.static}
    return network, {**known, "motion": example.motion, "data": "generated", "command": "none", "seed": 0}


def packed(folder, name=NAME, example="speakers", sizes=None, **changes):
    network, known = network_of(example, **(sizes or {}))
    save(network, folder, name, **{**known, "metrics": {"error": 0.5}, "licence": "MIT", **changes})
    return network


@pytest.fixture(scope="module")
def folder_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    packed(folder)
    return folder


@pytest.fixture
def folder(folder_once, tmp_path):
    """A zoo of one model, which a test may change."""
    return Path(shutil.copytree(folder_once, tmp_path / "zoo"))


def change_card(folder, **changes):
    """Change fields of the card; None takes one out."""
    path = folder / f"{NAME}.json"
    card = {**json.loads(path.read_bytes()), **changes}
    path.write_text(json.dumps({field: value for field, value in card.items() if value is not None}))


def change_weights(folder, content):
    """Put other weights in place, with a card that they fit."""
    (folder / f"{NAME}.safetensors").write_bytes(content)
    change_card(folder, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def change_tensors(folder, change):
    tensors = safetensors.load_file(folder / f"{NAME}.safetensors")
    change(tensors)
    change_weights(folder, safetensors.save(tensors))


# What is packed is what is loaded


def test_the_callers_default_dtype_is_of_no_account(folder):
    torch.set_default_dtype(torch.float64)
    try:
        network = load(NAME, source=folder).network
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("example", "sizes"), [("speakers", {}), ("vdsm", {"decoder_channels": (4, 4, 4, 4)})], ids=["speakers", "vdsm"]
)
def test_what_is_loaded_equals_what_was_packed(example, sizes, tmp_path):
    network = packed(tmp_path, example=example, sizes=sizes).eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loaded = load(NAME, source=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    wanted, found = network.state_dict(), loaded.network.state_dict()
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)
    assert not any(module.training for module in loaded.network.modules())
    clips = torch.rand(2, 4, *SHAPES[example])
    expected, *swapped = (
        swap(each.model, each.guide, clips[:1], clips[1:], sites=loaded.motion)["x"].mean
        for each in (network, loaded, loaded.network, copy.deepcopy(loaded.network))
    )
    assert all(torch.equal(each, expected) for each in swapped)
    known = importlib.import_module(example).EXAMPLE
    assert (loaded.static, loaded.motion) == (known.static, known.motion)


def test_the_card_says_what_the_model_is(folder):
    card = load(NAME, source=str(folder)).card
    assert card == json.loads((folder / f"{NAME}.json").read_bytes())
    content = (folder / f"{NAME}.safetensors").read_bytes()
    assert (card["bytes"], card["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert card["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert (card["metrics"], card["licence"], card["name"], card["format"]) == ({"error": 0.5}, "MIT", NAME, 1)
    assert sorted(card) == sorted(zoo.FIELDS)


def test_the_folder_may_be_named_by_the_environment(folder, monkeypatch):
    monkeypatch.setenv("SEQDISENT_ZOO", str(folder))
    assert load(NAME).card["name"] == NAME
    monkeypatch.delenv("SEQDISENT_ZOO")
    with pytest.raises(ValueError, match="^source: got None, and SEQDISENT_ZOO is not set; expected a folder or an ad"):
        load(NAME)


def test_a_model_packed_again_replaces_the_one_before(folder):
    network = packed(folder)
    assert torch.equal(load(NAME, source=folder).network.noise, network.noise)
    assert sorted(path.name for path in folder.iterdir()) == [f"{NAME}.json", f"{NAME}.safetensors"]


def test_no_card_stands_beside_weights_that_were_not_written(folder):
    (folder / f"{NAME}.safetensors").unlink()
    (folder / f"{NAME}.safetensors").mkdir()  # where the weights cannot be written
    with pytest.raises(OSError, match=NAME):
        packed(folder)
    assert not (folder / f"{NAME}.json").exists()
    with pytest.raises(FileNotFoundError):
        load(NAME, source=folder)


# What is refused


def loading(change=None, name=NAME):
    def do(folder):
        if change is not None:
            change(folder)
        load(name, source=folder)

    return do


def with_card(**changes):
    return loading(lambda folder: change_card(folder, **changes))


def with_tensors(change):
    return loading(lambda folder: change_tensors(folder, change))


def with_file(ending, change):
    def write(folder):
        path = folder / (NAME + ending)
        path.write_bytes(change(path.read_bytes()))

    return loading(write)


def flipped(content):
    return content[:-1] + bytes([content[-1] ^ 1])


WEIGHT = "pose.loc.weight"


@rows(
    ("a path for a name", loading(name=f"../zoo/{NAME}"), ValueError, r"^name: got '\.\./zoo/.*', expected lower-case"),
    ("a hidden file", loading(name=".hidden"), ValueError, r"^name: got '\.hidden'"),
    ("a name with a line break", loading(name=f"{NAME}\n"), ValueError, r"^name: got 'speakers-tiny\\n'"),
    ("no name", loading(name=""), ValueError, "^name: got ''"),
    ("an unknown name", loading(name="vdsm"), FileNotFoundError,
     r"^name: got 'vdsm', but there is no .*vdsm\.json; expected one of \['speakers-tiny'\]$"),
    ("no folder", loading(lambda folder: shutil.rmtree(folder)), FileNotFoundError,
     r"^source: there is no folder .*zoo$"),
    ("no weights", loading(lambda folder: (folder / f"{NAME}.safetensors").unlink()), FileNotFoundError,
     r"there is no .*speakers-tiny\.safetensors; expected one of \['speakers-tiny'\]$"),
    ("no JSON", with_file(".json", lambda content: content[:-9]), ValueError, r"\.json: cannot be read as JSON \("),
    ("no text", with_file(".json", lambda _: b"\xff\xfe\xfa"), ValueError, r"\.json: cannot be read as JSON \("),
    ("nested without end", with_file(".json", lambda _: b"[" * 10**6), ValueError, "cannot be read as JSON"),
    ("no card", with_file(".json", lambda _: b"[1]"), ValueError, r"\.json: is a list, expected a dict"),
    ("another format", with_card(format=2), ValueError, "json: format is 2, expected 1"),
    ("no format", with_card(format=None), ValueError, "json: format is None, expected 1"),
    ("a format that equals 1", with_card(format=True), ValueError, "json: format is True, expected 1"),
    ("no licence", with_card(licence=None), ValueError, "json: licence is None, expected str"),
    ("a seed in words", with_card(seed="0"), ValueError, "json: seed is '0', expected int"),
    ("no sites of this model", with_card(static=["z"]), ValueError, r"^static: got \['z'\], expected \['s'\], which"),
    ("sites of no kind", with_card(motion=[3]), ValueError, r"^motion: got \[3\], expected \['"),
    ("not a number", with_file(".json", lambda content: content.replace(b"0.5", b"NaN")), ValueError,
     r"\.json: cannot be read as JSON \(NaN is not JSON\)"),
    ("another model's card", with_card(name="vdsm"), ValueError, "json: name is 'vdsm', expected speakers-tiny"),
    ("another byte", with_file(".safetensors", flipped), ValueError, "SHA-256 is .*, expected .*; remove it and its"),
    ("cut off", with_file(".safetensors", lambda content: content[:-4]), ValueError, r"has \d+ bytes, expected \d+; r"),
    ("an unknown example", with_card(example="nothing"), ValueError, r"^example: got 'nothing', expected one of \['cd"),
    ("a path for an example", with_card(example="../vdsm"), ValueError, r"^example: got '\.\./vdsm'"),
    ("a module that is no example", with_card(example="settings"), ValueError, "^example: got 'settings'"),
    ("an unknown size", with_card(sizes={"width": 3}), ValueError, r"^sizes: \{'width': 3\} build no speakers .*width"),
    ("an impossible size", with_card(sizes={"num_experts": -1}), ValueError, "^sizes: .* build no speakers for frames"),
    ("a size that is no number", with_card(sizes={"num_experts": "x"}), ValueError, "^sizes: .* build no speakers for"),
    ("frames of another rank", with_card(frame_shape=[3, 64, 64]), ValueError, r"of shape \(3, 64, 64\)"),
    ("another size", with_card(sizes={"num_experts": 3, "latent_dim": 5, "hidden_dim": 6}), ValueError,
     r"\.safetensors: its tensors do not fit speakers \(\d+ differ\): .* is torch.float32 \(.*\), expected torch.fl"),
    ("all memory", with_card(sizes={"num_experts": 3, "latent_dim": 2, "hidden_dim": 10**6}), ValueError,
     r"^sizes: hidden_dim: got 1000000, expected at most the \d+ numbers of .*\.safetensors$"),
    ("modules without end", with_card(sizes={"num_experts": 10**9}), ValueError, r"^sizes: num_experts: got 10+, "),
    ("a tensor missing", with_tensors(lambda tensors: tensors.pop(WEIGHT)), ValueError,
     rf": .* \(1 differ\): {WEIGHT} is missing, expected torch.float32 \(2, 6\)$"),
    ("a tensor too many", with_tensors(lambda tensors: tensors.update(extra=torch.ones(2))), ValueError,
     r": .* \(1 differ\): extra is torch.float32 \(2,\), expected none$"),
    ("a tensor of another shape", with_tensors(lambda tensors: tensors.update({WEIGHT: torch.ones(6, 2)})), ValueError,
     rf": .* \(1 differ\): {WEIGHT} is torch.float32 \(6, 2\), expected torch.float32 \(2, 6\)$"),
    ("a tensor of another dtype", with_tensors(lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].half()})),
     ValueError, rf": .* \(1 differ\): {WEIGHT} is torch.float16 \(2, 6\), expected torch.float32 \(2, 6\)$"),
    ("no safetensors", loading(lambda folder: change_weights(folder, b"weights")), ValueError,
     r"\.safetensors: cannot be read as safetensors \("),
)  # fmt: skip
def test_what_does_not_fit_is_refused(row, folder):
    check(row, folder)


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(folder, tmp_path):
    for write in (lambda path: path.write_bytes(pickle.dumps(Malice(tmp_path / "done"))),
                  lambda path: torch.save(Malice(tmp_path / "done"), path)):  # fmt: skip
        write(tmp_path / "pickle")
        change_weights(folder, (tmp_path / "pickle").read_bytes())
        with pytest.raises(ValueError, match="cannot be read as safetensors"):
            load(NAME, source=folder)
        assert not (tmp_path / "done").exists()
    torch.load(tmp_path / "pickle", weights_only=False)
    assert (tmp_path / "done").exists()  # it would have been


def saving(**changes):
    return lambda folder: packed(folder, **changes)


@rows(
    ("a bad name", saving(name="Speakers"), ValueError, "^name: got 'Speakers'"),
    ("too large", saving(sizes={"hidden_dim": 400}), ValueError,
     r"^network: .* \d+\.\d MB, expected at most 5 MB; smaller sizes"),
    ("no number", saving(metrics={"error": float("nan")}), ValueError, "^sizes, metrics: expected finite numbers"),
    ("a tensor", saving(metrics={"error": torch.ones(1)}), ValueError, r"^sizes, metrics: .* \(Object of type Tensor"),
    ("a seed in words", saving(seed="0"), ValueError, "^card: seed is '0', expected int"),
    ("frames of another rank", saving(frame_shape=(96, 1)), ValueError, "^sizes: "),
    ("sites of another model", saving(motion=("s",)), ValueError, r"^motion: got \['s'\], expected \['"),
)  # fmt: skip
def test_what_load_would_refuse_is_not_packed(row, tmp_path):
    check(row, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_not_packed(tmp_path):
    network, known = network_of("speakers")
    network.get_parameter(WEIGHT).detach()[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"^network: {WEIGHT} is not finite"):
        save(network, tmp_path, NAME, **known, metrics={}, licence="MIT")
    assert list(tmp_path.iterdir()) == []


def test_sizes_of_another_network_are_not_packed(tmp_path):
    network, known = network_of("speakers")
    known["sizes"] = {**known["sizes"], "num_experts": 4}
    with pytest.raises(ValueError, match="^network: its tensors do not fit speakers "):
        save(network, tmp_path, NAME, **known, metrics={}, licence="MIT")
    assert list(tmp_path.iterdir()) == []


# From a server


@pytest.fixture
def server(folder_once, tmp_path, monkeypatch):
    """A server of the zoo: `served` are its files, `asked` the paths that were asked for, `cut` those sent in part."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            name = Path(self.path).name
            if name not in self.server.served:
                self.send_error(404)
                return
            content = self.server.served[name]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if name in self.server.cut else content)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("SEQDISENT_CACHE", str(tmp_path / "cache"))
    with serving(Handler) as server:
        server.served = {path.name: path.read_bytes() for path in folder_once.iterdir()}
        server.asked, server.cut = [], set()
        yield server


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_a_model_is_fetched_once(server, folder_once, tmp_path, monkeypatch):
    first = load(NAME, source=server.url)
    assert server.asked == [f"/{NAME}.json", f"/{NAME}.safetensors"]
    assert kept(tmp_path) == [f"{NAME}.json", f"{NAME}.safetensors"]
    monkeypatch.setenv("SEQDISENT_ZOO", server.url + "/")
    again, local = load(NAME), load(NAME, source=folder_once)
    assert len(server.asked) == 2
    for key, value in local.network.state_dict().items():
        assert torch.equal(first.network.state_dict()[key], value)
        assert torch.equal(again.network.state_dict()[key], value)
    load(NAME, source=server.url + "/v2")  # another zoo, which may have another model of this name
    assert server.asked[2:] == [f"/v2/{NAME}.json", f"/v2/{NAME}.safetensors"]


@pytest.mark.parametrize("ending", [".json", ".safetensors"])
def test_what_is_cut_off_is_not_kept(server, ending, tmp_path):
    server.cut = {NAME + ending}
    with pytest.raises(ConnectionError, match=re.escape(NAME + ending)):
        load(NAME, source=server.url)
    assert kept(tmp_path) == []
    server.cut = set()
    load(NAME, source=server.url)


@rows(
    ("another byte", lambda files: files.update({f"{NAME}.safetensors": flipped(files[f"{NAME}.safetensors"])}),
     ValueError, rf"^http://.*/{NAME}\.safetensors: SHA-256 is .*; nothing was kept"),
    ("a page", lambda files: files.update({f"{NAME}.safetensors": b"<html>"}), ValueError,
     rf"^http://.*/{NAME}\.safetensors: has 6 bytes, expected \d+; nothing was kept"),
    ("a page for a card", lambda files: files.update({f"{NAME}.json": b"<html>"}), ValueError,
     rf"^http://.*/{NAME}\.json: cannot be read as JSON"),
    ("no model", lambda files: files.clear(), ConnectionError,
     rf"http://.*/{NAME}\.json: HTTP Error 404: .*; nothing was kept, there is no such file$"),
)  # fmt: skip
def test_a_wrong_file_of_a_server_is_not_kept(row, server, tmp_path):
    row.do(server.served)
    with pytest.raises(row.error, match=row.said):
        load(NAME, source=server.url)
    assert kept(tmp_path) == []


def test_weights_above_the_limit_are_refused(folder, server, tmp_path):
    change_weights(folder, bytes(5 * 2**20 + 1))
    with pytest.raises(ValueError, match="bytes is 5242881, expected at most 5242880"):
        load(NAME, source=folder)
    server.served = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="safetensors: has more than 5242880 bytes; nothing was kept"):
        load(NAME, source=server.url)
    assert kept(tmp_path) == []


def test_a_card_of_the_cache_in_another_format_says_how_to_have_it_again(server, tmp_path):
    load(NAME, source=server.url)
    (path,) = (tmp_path / "cache").rglob("*.json")
    path.write_text(path.read_text().replace('"format": 1', '"format": 0'))
    with pytest.raises(ValueError, match=r"remove it to fetch it again\): format is 0, expected 1"):
        load(NAME, source=server.url)
    path.unlink()
    assert load(NAME, source=server.url).card["format"] == 1


def test_a_file_of_the_cache_that_was_damaged_is_named(server, tmp_path):
    load(NAME, source=server.url)
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: SHA-256 is .*; remove it and its card, and fetch"):
        load(NAME, source=server.url)
    assert len(server.asked) == 2


# What else it leaves as it was


def test_modules_of_the_user_stay_the_users(folder, tmp_path, monkeypatch):
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    for name in names:  # as in a program that has none of them; put back after the test
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    for name in ("settings", "parts"):
        (tmp_path / f"{name}.py").write_text("OWNER = 'user'")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    mine, path = importlib.import_module("settings"), list(sys.path)
    zoo._example.cache_clear()
    load(NAME, source=folder)
    assert sys.path == path
    assert sys.modules["settings"] is mine
    assert names & sys.modules.keys() == {"settings"}
    assert importlib.import_module("parts").OWNER == "user"
    assert Path(importlib.import_module("settings").__file__).parent == tmp_path


def test_an_example_that_cannot_be_imported_leaves_nothing_either(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    zoo._example.cache_clear()
    path, before = list(sys.path), dict(sys.modules)
    with pytest.raises(ImportError, match=r"jsonargparse.*pip install 'seqdisent\[zoo\]'$"):
        load(NAME, source=folder)
    assert sys.path == path
    assert all(sys.modules.get(name) is module for name, module in before.items())


def test_without_safetensors_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"safetensors.*pip install 'seqdisent\[zoo\]'$"):
        load(NAME, source=folder)


# The README's commands


def readme_block(mark, language):
    (block,) = re.findall(
        rf"^<!-- {mark} -->\n```{language}\n(.*?)^```$",
        (ROOT / "README.md").read_text("utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    return block


def run(command, folder, **environment):
    """Run a command in a folder, with the copy of the package that is tested here."""
    environment = {**os.environ, "PYTHONPATH": str(Path(seqdisent.__file__).parents[1]), **environment}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train_and_pack(folder):
    """Run README's commands that train a model, at a tiny size, and pack it."""
    train, pack, export = readme_block("train-and-pack", "bash").splitlines()
    tiny = ["--preset=tiny", "--num-clips=70", "--plan.sizes.decoder_channels=[4, 4, 4, 4]"]
    for command, options in ((train, tiny), (pack, [])):
        python, script, *words = shlex.split(command)
        assert python == "python"
        run([str(ROOT / script), *words, *options], folder)
    assert export == "export SEQDISENT_ZOO=zoo"


@pytest.mark.slow
def test_the_readme_swaps_with_a_model_that_a_server_has_and_its_card_says_how_to_train_it_again(server, tmp_path):
    train_and_pack(tmp_path)
    server.served = {path.name: path.read_bytes() for path in (tmp_path / "zoo").iterdir()}
    empty = tmp_path / "empty"
    empty.mkdir()
    block = readme_block("a-trained-model", "py")
    said = run(["-c", f"{block}\nprint(tuple(swapped.shape))"], empty, SEQDISENT_ZOO=server.url)
    assert said.splitlines()[-1] == "(1, 16, 3, 64, 64)"
    assert server.asked == ["/vdsm-pendulum.json", "/vdsm-pendulum.safetensors"]
    assert list(empty.iterdir()) == []
    settings, vdsm = importlib.import_module("settings"), importlib.import_module("vdsm").EXAMPLE
    (run_folder,) = (tmp_path / "runs").iterdir()
    card, recorded = load("vdsm-pendulum", source=tmp_path / "zoo").card, settings.read_settings(vdsm, run_folder)
    python, script, *words = shlex.split(card["command"])
    assert (python, script) == ("python", "examples/vdsm.py")
    again = settings.settings_of(vdsm, words)
    for name in set(vdsm.recorded()) - {"frame_shape"}:
        assert again[name] == recorded[name], name
    assert (card["data"], card["seed"], card["licence"]) == ("pendulum", 0, "MIT")
    measured = json.loads((run_folder / "metrics.json").read_bytes())
    for name in ("mean_squared_error", "nats", "held_out_clips", "minutes"):
        assert card["metrics"][name] == measured[name]


def test_the_readme_needs_five_lines():
    assert len([line for line in readme_block("a-trained-model", "py").splitlines() if line]) == 5
