"""What type checkers make of the package in a user's code: `typing_user.py` uses every public name."""

from __future__ import annotations

import ast
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import seqdisent
from seqdisent import chains, datasets, inference, metrics, plotting, training

USER = Path(__file__).parent / "support" / "typing_user.py"


def names_defined_in(module):
    return {
        name
        for name, value in vars(module).items()
        if name[0] != "_"
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    }


def test_the_user_imports_and_uses_every_public_name():
    public = {*seqdisent.__all__, *chains.__all__, *inference.__all__, *datasets.__all__, *metrics.__all__}
    public |= names_defined_in(training) | names_defined_in(plotting)
    tree = ast.parse(USER.read_text(encoding="utf-8"))
    imported = {
        name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("seqdisent")
        for name in node.names
    }
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert public == imported
    assert public <= used


def check(command, folder):
    """Run a type checker on a copy, away from this project's settings, and return what it says."""
    copy = folder / "user.py"
    shutil.copy(USER, copy)
    done = subprocess.run([*command, copy.name], cwd=folder, capture_output=True, text=True, check=False, timeout=900)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_mypy_is_content_with_the_user(tmp_path):
    pytest.importorskip("mypy")
    code, said = check([sys.executable, "-m", "mypy", "--strict"], tmp_path)
    assert code == 0, said


@pytest.mark.slow
def test_pyright_is_content_with_the_user(tmp_path):
    if shutil.which("pyright") is None:
        pytest.skip("pyright is not installed")
    code, said = check(["pyright", "--pythonpath", sys.executable], tmp_path)
    assert code == 0, said
