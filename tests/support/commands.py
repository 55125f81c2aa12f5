"""A script with its command line, run in the tests' process: a process of its own imports for many seconds first."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import torch

import seqdisent


def run_here(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Do what `python SCRIPT ARGUMENTS` does; return its exit code and what it writes to sys.stdout and sys.stderr.

    A warning is an error, as in all tests. What is imported already is not imported again, and the examples are on the
    path: a script that cannot start by itself may start here, hence :func:`starts_alone`.
    """
    argv = [str(script), *map(str, arguments)]
    path = [str(script.parent), *sys.path]
    threads, code = torch.get_num_threads(), 0
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "path", path),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            torch.set_num_threads(threads)
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def starts_alone(script: Path) -> str:
    """What a script says when asked for help, in a process of its own, away from its folder and the tests' path."""
    command = [sys.executable, str(script), "--help"]
    here = {"PYTHONPATH": str(Path(seqdisent.__file__).parents[1])}  # the copy that is tested
    done = subprocess.run(
        command, cwd="/", env={**os.environ, **here}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
