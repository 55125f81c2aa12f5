"""The public names: those that the pages in docs/api describe. A name is made public there and nowhere else."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

PAGES = sorted((Path(__file__).parents[2] / "docs" / "api").glob("*.md"))


def described(page: Path) -> list[str]:
    """Return the names that a page describes, as users import them, in its order."""
    found = re.findall(
        r"^\.\. auto(?:class|exception|function):: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert all(name.startswith("seqdisent.") for name in found), page
    return found


def summarised(page: Path) -> list[str]:
    """Return the names in the tables of a page, in its order."""
    tables = re.findall(r"^\.\. autosummary::\n(?: .*\n|\n)*", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [name for table in tables for name in re.findall(r"^   (seqdisent\.\S+)$", table, re.MULTILINE)]


def _find(name: str) -> object:
    module, _, last = name.rpartition(".")
    return getattr(import_module(module), last)


PUBLIC = {name: _find(name) for page in PAGES for name in described(page)}
