"""A script with its command line, run in the tests' process: a process of its own imports for many seconds first."""

from __future__ import annotations

import io
import runpy
import subprocess
import sys
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import torch


def run_here(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Do what `python SCRIPT ARGUMENTS` does, with what it would return and print. Warnings are no errors, as there."""
    argv = [str(script), *map(str, arguments)]
    path = [str(script.parent), *sys.path]
    threads, code = torch.get_num_threads(), 0
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
        warnings.catch_warnings(),
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "path", path),
    ):
        warnings.simplefilter("default")
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
