"""Sphinx configuration; the pages build without a network."""

import re
from pathlib import Path

project = "seqdisent"
author = "the seqdisent authors"
copyright = "2026, the seqdisent authors"

_pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
release = re.findall(r'^version = "(.+)"$', _pyproject, flags=re.MULTILINE)[0]
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"seqdisent {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# `name` in a docstring is code
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True, "exclude-members": "extra_repr", "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape"]
