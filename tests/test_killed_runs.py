"""Runs that are killed, stopped by Ctrl-C, or run out of disk: nothing is lost, and what goes on ends the same."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")

from small_runs import losses, make, run  # noqa: E402

from seqdisent import _files  # noqa: E402
from seqdisent.training import checkpoints  # noqa: E402
from seqdisent.training.logs import WholeCSVLogger  # noqa: E402

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_runs_of_the_example_end_like_the_one_that_was_not(tmp_path):
    """Real processes, real signals; `benchmarks/kill_and_resume.py` does the same many more times."""
    command = [sys.executable, str(BENCHMARKS / "kill_and_resume.py"), "--kills", "5", "--seed", "4"]
    command += ["--folder", str(tmp_path / "runs"), "--out", str(tmp_path / "counts.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["kills"] == 5
    assert counts["different"] == []
    assert counts["alike"] >= 2
    assert len(counts["by moment"]) >= 3


# Ctrl-C --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody stops: its module and its log."""
    folder = tmp_path_factory.mktemp("whole")
    module, _ = make()
    run(module, folder, clip_norm=1.0)
    return module, losses(folder)


@pytest.fixture
def ctrl_c():
    """The handler that Python has for Ctrl-C, which a job in the background is started without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def pressing(module, *, at, times=1, number=signal.SIGINT):
    """Have Ctrl-C pressed, or another signal come, while the batch of step `at` is drawn."""
    draw, drawn = module.draw, []

    def pressed(generator):
        drawn.append(None)
        if len(drawn) == at + 1:
            for _ in range(times):
                signal.raise_signal(number)
        return draw(generator)

    module.draw = pressed
    return module


def assert_same_end(module, folder, whole):
    for found, wanted in zip(module.network.parameters(), whole[0].network.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert losses(folder) == whole[1]


@pytest.mark.parametrize("step", [9, 16, 29])
def test_ctrl_c_ends_after_the_step_with_a_checkpoint_and_the_rest_is_exact(step, whole, tmp_path, ctrl_c):
    with pytest.raises(KeyboardInterrupt):
        run(pressing(make()[0], at=step), tmp_path, clip_norm=1.0)
    assert signal.getsignal(signal.SIGINT) is ctrl_c
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == step + 1
    assert len(losses(tmp_path)) == step + 1  # nor is a row of the log missing
    resumed, batches = make()
    run(resumed, tmp_path, clip_norm=1.0, resume=True)
    assert len(batches) == 30 - (step + 1)
    if batches:
        assert_same_end(resumed, tmp_path, whole)


@pytest.mark.parametrize("step", [9, 16, 29])
def test_sigterm_ends_after_the_step_with_a_checkpoint_and_the_rest_is_exact(step, whole, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        run(pressing(make()[0], at=step, number=signal.SIGTERM), tmp_path, clip_norm=1.0)
    assert signal.getsignal(signal.SIGTERM) is before
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == step + 1
    assert len(losses(tmp_path)) == step + 1
    resumed, batches = make()
    run(resumed, tmp_path, clip_norm=1.0, resume=True)
    assert len(batches) == 30 - (step + 1)
    if batches:
        assert_same_end(resumed, tmp_path, whole)


def test_ctrl_c_pressed_twice_ends_at_once_with_the_checkpoint_before(whole, tmp_path, ctrl_c):
    with pytest.raises(KeyboardInterrupt):
        run(pressing(make()[0], at=16, times=2), tmp_path, clip_norm=1.0)
    assert signal.getsignal(signal.SIGINT) is ctrl_c
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 10
    resumed, _ = make()
    run(resumed, tmp_path, clip_norm=1.0, resume=True)
    assert_same_end(resumed, tmp_path, whole)


def test_a_program_with_a_handler_of_its_own_keeps_it(tmp_path):
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        run(pressing(make()[0], at=3), tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed == [True]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 30


# Killed between the checkpoint and whatever follows it ---------------------------------------------------------------


class Killed(BaseException):
    pass


def test_the_log_has_every_step_that_a_checkpoint_has_behind_it(tmp_path, monkeypatch):
    """A resumed run starts at the checkpoint: what is logged after it, of a step before it, would be lost by a kill."""
    checked = []
    write = checkpoints.write_tensors

    def and_look(checkpoint, path):
        write(checkpoint, path)
        checked.append((checkpoint["global_step"], sorted(losses(tmp_path))))

    monkeypatch.setattr(checkpoints, "write_tensors", and_look)
    run(make(num_steps=25)[0], tmp_path)
    assert checked == [(step, list(range(step))) for step in (10, 20, 25)]


@pytest.mark.parametrize("moment", ["in torch.save", "before the move"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(moment, whole, tmp_path, monkeypatch):
    real = {"in torch.save": torch.save, "before the move": os.replace}[moment]
    calls = []

    def killed(*arguments, **options):
        calls.append(None)
        if len(calls) == 2:
            if moment == "in torch.save":
                arguments[1].write(b"half")
            raise Killed
        return real(*arguments, **options)

    module, _ = make()
    with monkeypatch.context() as patch:
        patch.setattr(*(("torch.save",) if moment == "in torch.save" else ("os.replace",)), killed)
        with pytest.raises(Killed):
            run(module, tmp_path, clip_norm=1.0)
    assert (tmp_path / "last.ckpt.unfinished").exists()  # as a kill leaves it: nothing cleans up
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 10
    resumed, _ = make()
    run(resumed, tmp_path, clip_norm=1.0, resume=True)
    assert_same_end(resumed, tmp_path, whole)
    assert not (tmp_path / "last.ckpt.unfinished").exists()


def test_a_kill_while_the_log_gets_a_column_leaves_its_rows(tmp_path, monkeypatch):
    """The first validation brings columns, for which the whole file is written anew."""
    logger = WholeCSVLogger(tmp_path, "logs")
    for step in range(3):
        logger.log_metrics({"loss": 1.5}, step)
        logger.save()
    logger.log_metrics({"validation/elbo": 2.5}, 3)

    class DictWriter(csv.DictWriter):
        def writerows(self, rows):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(csv, "DictWriter", DictWriter)
        with pytest.raises(Killed):
            logger.save()
    assert list(losses(tmp_path)) == [0, 1, 2]
    logger.save()
    assert list(losses(tmp_path)) == [0, 1, 2]


# Disk full -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    ) if sys.platform == "linux" else None  # fmt: skip
    if mounted is None or mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def file_size_limit(size):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def large(num_steps=30):
    """A run whose checkpoints hold 600 kB."""
    module, _ = make(num_steps=num_steps)
    module.network.unused = torch.nn.Parameter(torch.zeros(150_000), requires_grad=False)
    return module


def test_a_full_disk_is_named_and_the_checkpoint_before_stays(small_disk):
    with pytest.raises(OSError, match=r"last\.ckpt .*No space left on device; the one before is whole") as raised:
        run(large(), small_disk / "run")
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(small_disk / "run" / "last.ckpt")
    assert torch.load(small_disk / "run" / "last.ckpt", weights_only=True)["global_step"] == 10
    assert not list(small_disk.rglob("*.unfinished"))  # which would keep what space there is
    assert sorted(losses(small_disk / "run")) == list(range(20))


def test_a_disk_that_the_log_fills_is_named_and_the_rows_before_stay(small_disk):
    (small_disk / "other").write_bytes(bytes(1_000_000))
    with pytest.raises(OSError, match="No space left on device"):
        run(make(num_steps=2000)[0], small_disk / "run")
    for log in (small_disk / "run" / "logs").glob("*/metrics.csv"):
        rows = list(csv.DictReader(log.read_text().splitlines()))
        assert [row["step"] for row in rows[:-1]] == [str(step) for step in range(len(rows) - 1)]


def test_a_file_that_may_not_grow_is_named_and_the_checkpoint_before_stays(tmp_path):
    run(make(num_steps=10)[0], tmp_path)
    before = (tmp_path / "last.ckpt").read_bytes()
    with (
        file_size_limit(100_000),
        pytest.raises(OSError, match="last.ckpt was not written: File too large; the one .* whole"),
    ):
        _files.write_tensors({"weights": torch.zeros(150_000)}, tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == before
    with file_size_limit(100_000), pytest.raises(OSError, match="File too large; there was none before"):
        _files.write_tensors({"weights": torch.zeros(150_000)}, tmp_path / "other.ckpt")
    assert not list(tmp_path.rglob("*.unfinished"))
