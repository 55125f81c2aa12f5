"""Sprites: composed as the recipe says, from sheets that are whole or not used at all."""

import hashlib
import http.server
import io
import multiprocessing
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback import serving

from seqdisent.datasets import _sheets, sprites
from seqdisent.datasets.sprites import ATTRIBUTES

try:
    import resource
except ImportError:
    resource = None

sprites_module = sys.modules["seqdisent.datasets.sprites"]  # the function has the module's name

REAL = Path(os.environ.get("SEQDISENT_DATA") or Path(__file__).parents[3] / "shared" / "data") / "lpc" / "layers"
needs_sheets = pytest.mark.skipif(
    not REAL.is_dir(), reason=f"no sprite sheets in {REAL}; SEQDISENT_DATA says where they are"
)

CHARACTERS = {
    0: "0da9b81557eea2641ecd04ab4507929949cccecd0b75a6e2b9cead8e56baf887",
    1: "e7e12b23dd3e2fbc7c21962277bef0f1aa0f50ca1fa9d913c50f113cd4527c8b",
    100: "cb256a8ce19c9465139e14e950555c8dd5d5d95daae3395328a5ceaf5af86447",
    419: "3988bf6d0c14363c739e10288e3931acfc8b742f1827af828a82aea8de52a278",
    839: "6a87b05556e5c007b3a3803787486b11b0d4494ee454aba3b7e2dca9359bb02f",
}
ALL = "8baa315a3490baf8d66749cae085b2d1670f3561ba997bdd82e5095f2bfdb478"


def channels_last(frames):
    return frames.permute(0, 1, 3, 4, 2).contiguous().numpy()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, no data folder, no proxy between the tests and their server."""
    monkeypatch.setenv("SEQDISENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SEQDISENT_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache" / "lpc" / "layers"


# --- the real sheets


@needs_sheets
def test_five_characters_match_their_checksums_in_any_order():
    order = [419, 0, 839, 1, 100]
    clips = sprites(REAL, characters=order)
    assert clips.frames.shape == (45, 8, 3, 64, 64)
    for place, character in enumerate(order):
        rows = slice(9 * place, 9 * place + 9)
        assert clips.identity[rows].tolist() == [character] * 9
        assert hashlib.sha256(channels_last(clips.frames[rows]).tobytes()).hexdigest() == CHARACTERS[character]


@needs_sheets
def test_all_characters_match_their_checksum():
    clips = sprites(REAL)
    assert len(clips) == 7560
    assert clips.num_identities == 840
    digest = hashlib.sha256()
    for some in clips.frames.split(360):
        digest.update(channels_last(some))
    assert digest.hexdigest() == ALL


@needs_sheets
def test_the_data_folder_of_the_environment_is_found(monkeypatch):
    monkeypatch.setenv("SEQDISENT_DATA", str(REAL.parents[1]))
    assert torch.equal(sprites(characters=[1]).frames, sprites(REAL, characters=[1]).frames)


# --- sheets made up here


@pytest.fixture(scope="module")
def sheets():
    """Of each sheet its picture and its file: specks of every alpha in every tile, where layers overlap."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    made = {}
    for sheet in _sheets.SHEETS:
        tiles = np.zeros((21, 13, 64, 64, 4), dtype=np.uint8)
        specks = rng.integers(0, 256, (21, 13, 6, 6, 4), dtype=np.uint8)
        specks[..., 3] = rng.choice([0, 0, 1, 100, 254, 255], (21, 13, 6, 6))
        y, x = rng.integers(20, 24, 2)
        tiles[:, :, y : y + 6, x : x + 6] = specks
        pixels = tiles.swapaxes(1, 2).reshape(1344, 832, 4)
        file = io.BytesIO()
        image.fromarray(pixels).save(file, "PNG", compress_level=1)
        made[sheet] = (pixels, file.getvalue())
    return made


@pytest.fixture
def made_up(sheets, monkeypatch):
    """The package believes in the sheets made up here."""
    for sheet, (_, content) in sheets.items():
        path = _sheets.SHEETS[sheet][0]
        monkeypatch.setitem(_sheets.SHEETS, sheet, (path, hashlib.sha256(content).hexdigest()))
    return {path: sheets[sheet][1] for sheet, (path, _) in _sheets.SHEETS.items()}


@pytest.fixture
def folder(sheets, made_up, tmp_path):
    for sheet, (_, content) in sheets.items():
        (tmp_path / "sheets" / sheet).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sheets" / sheet).write_bytes(content)
    return tmp_path / "sheets"


def composed_slowly(sheets, character, action, direction, step):
    """One frame as RECIPE.md puts it, layer by layer over whole tiles."""
    body, shirt, pants, hair = np.unravel_index(character, (7, 4, 5, 6))
    row = {"walk": 8, "spellcast": 0, "slash": 12}[action] + ["back", "left", "front", "right"].index(direction)
    column = {"walk": range(8), "spellcast": [0, 1, 2, 3, 4, 5, 6, 6], "slash": [0, 1, 2, 3, 4, 5, 5, 5]}[action][step]
    colour, alpha = np.zeros((64, 64, 3)), np.zeros((64, 64, 1))
    for name, index in (("body", body), ("pants", pants), ("shirt", shirt), ("hair", hair)):
        sheet = sheets[f"{name}/{ATTRIBUTES[name][index]}.png"][0]
        tile = sheet[64 * row : 64 * row + 64, 64 * column : 64 * column + 64] / 255.0
        above = tile[:, :, 3:]
        total = above + alpha * (1 - above)
        mixed = tile[:, :, :3] * above + colour * alpha * (1 - above)
        colour, alpha = np.divide(mixed, total, out=np.zeros_like(mixed), where=total > 0), total
    return np.where(alpha > 0, np.floor(255 * colour + 0.5), 0).astype(np.uint8)


def test_every_frame_is_as_the_recipe_says(sheets, folder):
    characters = [0, 1, 7, 839]  # 0 and 1 differ in their hair alone
    clips = sprites(folder, characters=characters)
    row = 0
    for character in characters:
        for action in ("walk", "spellcast", "slash"):
            for direction in ("left", "front", "right"):
                assert clips.names[row] == f"{character} {action} {direction}"
                for step in range(8):
                    slow = composed_slowly(sheets, character, action, direction, step).astype(int)
                    fast = clips.frames[row, step].permute(1, 2, 0).numpy()
                    # a colour half way between two bytes may round either way where the layers' alphas mix
                    assert np.abs(slow - fast).max() <= 1
                    assert (slow != fast).mean() < 1e-3
                row += 1


def test_labels_name_what_is_shown(folder):
    clips = sprites(folder, characters=[100, 3])
    assert clips.static_factors == ("body", "shirt", "pants", "hair")
    assert clips.motion_factors == ("action", "direction", "motion")
    assert [int(clips.labels[name][0]) for name in clips.static_factors] == [0, 3, 1, 4]
    assert [int(clips.labels[name][9]) for name in clips.static_factors] == [0, 0, 0, 3]
    assert clips.factor_names["hair"][4] == "white"
    for row, name in enumerate(clips.names[:9]):
        _, action, direction = name.split()
        assert clips.factor_names["action"][clips.labels["action"][row]] == action
        assert clips.factor_names["direction"][clips.labels["direction"][row]] == direction
        assert clips.factor_names["motion"][clips.labels["motion"][row]] == f"{action} {direction}"
    assert clips.labels["motion"].tolist() == [*range(9), *range(9)]


def test_a_true_swap_is_the_clip_of_that_character_doing_that(folder):
    clips = sprites(folder, characters=[5, 700, 31])
    part = clips.subset(torch.arange(27).flip(0))
    content, motion = torch.arange(27).repeat_interleave(27), torch.arange(27).repeat(27)
    swapped = part.true_swap(content, motion)
    table = {
        (int(c.identity[0]), c.names[0].split(" ", 1)[1]): c.frames[0]
        for c in map(clips.subset, [[i] for i in range(27)])
    }
    for row in range(0, 27 * 27, 13):
        who, what = int(part.identity[content[row]]), part.names[int(motion[row])].split(" ", 1)[1]
        assert torch.equal(swapped[row], table[who, what])
    assert torch.equal(pickle.loads(pickle.dumps(part)).true_swap(3, 20), part.true_swap(3, 20))
    assert torch.equal(part.true_clip(2, 5), part.frames[2, :5])
    with pytest.raises(ValueError, match="^num_steps: "):
        part.true_clip(2, 9)


def test_pairs_are_two_actions_of_one_character(folder):
    clips = sprites(folder, characters=[5, 700])
    batch = clips.draw_pairs(18, torch.Generator().manual_seed(0))
    assert batch.frames.shape == (18, 16, 3, 64, 64)
    assert batch.mask.all()
    assert set(batch.labels) == set(ATTRIBUTES)
    shown = clips.identity[batch.positions // 8]
    assert torch.equal(shown, batch.identity[:, None].expand(18, 16))
    assert torch.equal(batch.positions[:, 8:] % 8, torch.arange(8).expand(18, 8))
    assert (batch.positions[:, 0] != batch.positions[:, 8]).any()


# --- composed frames kept in a file


@pytest.fixture
def kept(cache):
    """Where composed frames are kept."""
    return cache.parents[1] / "sprites"


def composing(monkeypatch):
    """The characters of each composition from now on."""
    asked, compose = [], sprites_module._compose

    def recorded(folder, chosen):
        asked.append(chosen)
        return compose(folder, chosen)

    monkeypatch.setattr(sprites_module, "_compose", recorded)
    return asked


def test_kept_frames_are_the_composed_ones_and_composed_once(folder, kept, monkeypatch):
    plain = sprites(folder, characters=[3, 8])
    assert not kept.exists()
    asked = composing(monkeypatch)
    for _ in range(2):
        clips = sprites(folder, characters=[3, 8], cache=True)
        assert torch.equal(clips.frames, plain.frames)
        assert torch.equal(clips.true_swap(0, 12), plain.true_swap(0, 12))
    assert asked == [[3, 8]]
    assert [path.stat().st_size for path in kept.iterdir()] == [2 * 884736 + 4]
    clips.frames[0] += 1  # stays in this process
    assert torch.equal(sprites(folder, characters=[3, 8], cache=True).frames, plain.frames)
    assert torch.equal(pickle.loads(pickle.dumps(clips)).frames, clips.frames)


def test_kept_frames_are_those_of_these_sheets_this_recipe_and_these_characters(folder, kept, sheets, monkeypatch):
    sprites(folder, characters=[3], cache=True)
    asked = composing(monkeypatch)
    sprites(folder, characters=[4], cache=True)
    sprites(folder, characters=[3, 4], cache=True)
    sprites(folder, characters=[4, 3], cache=True)
    monkeypatch.setattr(sprites_module, "_RECIPE_VERSION", 0)
    sprites(folder, characters=[3], cache=True)
    assert asked == [[4], [3, 4], [4, 3], [3]]
    content = sheets["hair/blue.png"][1] + b"!"
    (folder / "hair" / "blue.png").write_bytes(content)
    changed = (_sheets.SHEETS["hair/blue.png"][0], hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(_sheets.SHEETS, "hair/blue.png", changed)
    sprites(folder, characters=[3], cache=True)
    assert len(asked) == len(list(kept.iterdir())) - 1 == 5


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"!",
        lambda content: b"",
        lambda content: bytes(len(content)),
        lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    ],
)
def test_a_damaged_file_is_composed_again(folder, kept, monkeypatch, damage):
    frames = sprites(folder, characters=[3], cache=True).frames.clone()
    (path,) = kept.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    asked = composing(monkeypatch)
    for _ in range(2):
        assert torch.equal(sprites(folder, characters=[3], cache=True).frames, frames)
    assert asked == [[3]]


@pytest.mark.skipif(resource is None, reason="no limits on a file's size here")
def test_a_write_without_space_leaves_nothing_and_the_frames_stay_in_memory(folder, kept):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.warns(RuntimeWarning, match="File too large.*; they are held in memory") as caught:
            clips = sprites(folder, characters=[3], cache=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert caught[0].filename == __file__
    assert torch.equal(clips.frames, sprites(folder, characters=[3]).frames)
    assert list(kept.iterdir()) == []


WHOLE = 2 * 884736 + 4


def keep_and_report(folder, kept, barrier, reports):
    """Compose and keep, stopping half way through the file until the other process is there too."""

    class Stopping(io.FileIO):
        def writelines(self, parts):
            content = b"".join(parts)
            self.write(content[: WHOLE // 2])
            barrier.wait(60)
            reports.put(("others see", [path.name for path in kept.iterdir() if not path.name.startswith(".")]))
            barrier.wait(60)
            self.write(content[WHOLE // 2 :])

    os.fdopen = Stopping
    for _ in range(2):
        clips = sprites(folder, characters=[3, 8], cache=True)
        reports.put(("frames", hashlib.sha256(clips.frames.numpy()).hexdigest()))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_at_once_get_and_leave_whole_frames(folder, kept):
    expected = hashlib.sha256(sprites(folder, characters=[3, 8]).frames.numpy()).hexdigest()
    context = multiprocessing.get_context("fork")
    barrier, reports = context.Barrier(2), context.Queue()
    arguments = (folder, kept, barrier, reports)
    processes = [context.Process(target=keep_and_report, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    got = [reports.get(timeout=60) for _ in range(6)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [value for what, value in got if what == "others see"] == [[], []]
    assert [value for what, value in got if what == "frames"] == [expected] * 4
    (path,) = kept.iterdir()
    assert hashlib.sha256(path.read_bytes()[:-4]).hexdigest() == expected


# --- the progress bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_shows_on_a_terminal_alone(folder, monkeypatch):
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        sprites(folder, characters=[3])
        assert ("composing sprites" in stream.getvalue()) == shown
        assert bool(stream.getvalue()) == shown


def test_without_tqdm_the_error_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="tqdm"):
        sprites(folder, characters=[0])


# --- arguments and sheets that are wrong


@pytest.mark.parametrize("characters", [[], [840], [-1], [3, 3]])
def test_wrong_characters_are_refused(characters):
    with pytest.raises(ValueError, match="^characters: "):
        sprites(characters=characters)


def test_missing_sheets_say_where_was_looked_and_what_to_do(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("SEQDISENT_DATA", str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError) as error:
        sprites(tmp_path / "root", characters=[0])
    for part in (tmp_path / "root", tmp_path / "data" / "lpc" / "layers", cache, "SEQDISENT_DATA", "download=True"):
        assert str(part) in str(error.value)


def test_the_cache_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.delenv("SEQDISENT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "xdg" / "seqdisent" / "lpc" / "layers")):
        sprites(characters=[0])


def test_a_changed_sheet_is_refused(folder):
    sheet = folder / "hair" / "blue.png"
    sheet.write_bytes(sheet.read_bytes() + b"!")
    got, expected = hashlib.sha256(sheet.read_bytes()).hexdigest(), _sheets.SHEETS["hair/blue.png"][1]
    with pytest.raises(ValueError, match=f"{sheet}: .*{got}.*{expected}"):
        sprites(folder, characters=[0])


def test_without_pillow_the_error_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(ImportError, match="Pillow"):
        sprites(folder, characters=[0])


# --- downloads, from a server on loopback


@pytest.fixture
def server(made_up):
    """A server of the source repository; `faults[path]` says what goes wrong, `asked` what was fetched."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.removeprefix("/mirror/")
            self.server.asked.append(path)
            fault = self.server.faults.get(path)
            if fault == "404" or path not in made_up:
                self.send_error(404)
                return
            if fault == "stall":
                self.server.released.wait(10)
                return
            content = b"<html>not a picture</html>" if fault == "changed" else made_up[path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)

        def log_message(self, *_):
            pass

    with serving(Handler) as server:
        server.faults, server.asked = {}, []
        server.url += "/mirror"
        yield server


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_download_fills_the_cache_once(server, cache, folder):
    clips = sprites(download=True, characters=[8], base_url=server.url)
    assert torch.equal(clips.frames, sprites(folder, characters=[8]).frames)
    assert files_below(cache) == sorted([*_sheets.SHEETS, "ATTRIBUTION.md"])
    assert "CC-BY-SA 3.0" in (cache / "ATTRIBUTION.md").read_text()
    assert len(server.asked) == 22
    sprites(download=True, characters=[8], base_url=server.url)
    sprites(characters=[8])
    assert len(server.asked) == 22


def test_a_download_goes_to_root_and_fetches_only_what_is_missing(server, cache, folder):
    (folder / "pants" / "teal.png").unlink()
    sprites(folder, download=True, characters=[8], base_url=server.url + "/")
    assert server.asked == [_sheets.SHEETS["pants/teal.png"][0]]
    assert not cache.exists()


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("changed", ValueError, "{got}.*{expected}"),
        ("cut", ConnectionError, "IncompleteRead"),
        ("404", ConnectionError, "404"),
        ("stall", ConnectionError, "timed? ?out"),
    ],
)
def test_a_failed_download_leaves_nothing_of_that_sheet_and_can_go_on(server, cache, fault, error, message):
    sheet = "hair/raven.png"
    path, expected = _sheets.SHEETS[sheet]
    server.faults[path] = fault
    got = hashlib.sha256(b"<html>not a picture</html>").hexdigest()
    begin = time.monotonic()
    with pytest.raises(error, match=message.format(got=got, expected=expected)) as raised:
        sprites(download=True, characters=[0], base_url=server.url, timeout=0.3 if fault == "stall" else 10.0)
    assert time.monotonic() - begin < 2.5  # the server stalls for ten seconds
    assert path in str(raised.value)
    before = list(_sheets.SHEETS)[: list(_sheets.SHEETS).index(sheet)]
    assert files_below(cache) == sorted(before)
    server.faults.clear()
    sprites(download=True, characters=[0], base_url=server.url)
    assert sheet in files_below(cache)


def test_no_server_is_an_error_that_names_the_address(server, cache):
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match="http://127.0.0.1"):
        sprites(download=True, characters=[0], base_url=server.url)
    assert not cache.exists()


def test_a_write_that_fails_leaves_nothing(server, cache, monkeypatch):
    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        sprites(download=True, characters=[0], base_url=server.url)
    assert files_below(cache) == []


def test_the_table_of_sheets_is_the_recipes():
    assert sorted(_sheets.SHEETS) == sorted(f"{name}/{v}.png" for name, values in ATTRIBUTES.items() for v in values)
    recipe = REAL.parent / "RECIPE.md"
    if not recipe.is_file():
        pytest.skip(f"no recipe in {recipe}")
    text = recipe.read_text()
    for sheet, (path, digest) in _sheets.SHEETS.items():
        assert f"| {sheet} | {path} | {digest} |" in text
    assert _sheets.COMMIT in text
