"""What type checkers make of the package in a user's code: `typing_user.py`, and the examples in the docstrings."""

from __future__ import annotations

import doctest
import inspect
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from public_names import PUBLIC

USER = Path(__file__).parent / "support" / "typing_user.py"

# what modules import, and their examples use without importing it
PRELUDE = """
import csv
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn
"""


def examples() -> Iterator[str]:
    """Yield the examples of every public function, class and method, each as the body of a function."""
    for thing in PUBLIC.values():
        members = vars(thing).values() if inspect.isclass(thing) else ()
        functions = [member for member in (getattr(m, "__func__", m) for m in members) if inspect.isfunction(member)]
        for documented in (thing, *functions):
            shown = doctest.DocTestParser().get_examples(documented.__doc__ or "")
            if shown:
                yield textwrap.indent("".join(example.source for example in shown), "    ")


def check(command, programs, folder):
    """Run a type checker on programs away from this project's settings, and return what it says."""
    for name, program in programs.items():
        (folder / name).write_text(program, encoding="utf-8")
    done = subprocess.run([*command, *programs], cwd=folder, capture_output=True, text=True, check=False, timeout=900)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_mypy_is_content_with_the_user_and_the_examples(tmp_path):
    pytest.importorskip("mypy")
    loose = "# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls\n"  # functions within examples
    imports = "".join("from {0} import {2}\n".format(*name.rpartition(".")) for name in PUBLIC)
    functions = [f"def example_{i}() -> None:\n{body}" for i, body in enumerate(examples())]
    programs = {
        "user.py": USER.read_text(encoding="utf-8"),
        "examples.py": "\n\n".join([loose + PRELUDE + imports, *functions]),
    }
    code, said = check([sys.executable, "-m", "mypy", "--strict"], programs, tmp_path)
    assert code == 0, said


@pytest.mark.slow
def test_pyright_is_content_with_the_user(tmp_path):
    if shutil.which("pyright") is None:
        pytest.skip("pyright is not installed")
    code, said = check(
        ["pyright", "--pythonpath", sys.executable], {"user.py": USER.read_text(encoding="utf-8")}, tmp_path
    )
    assert code == 0, said
