"""Sphinx configuration; the pages build without a network."""

import importlib.util
import os
import re
from pathlib import Path

project = "seqdisent"
author = "the seqdisent authors"
copyright = "2026, the seqdisent authors"

_pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
release = re.findall(r'^version = "(.+)"$', _pyproject, flags=re.MULTILINE)[0]
version = release

extensions = [
    "myst_nb",  # myst_parser, and the tutorials executed
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "jupyter_execute"]  # the second is written beside the output folder

html_theme = "furo"
html_title = f"seqdisent {release}"
html_css_files = ["wide.css"]

# MathJax lies beside the pages, so that formulas show without a network: of the package that brings it, the one script
# that draws with paths, since some browsers load no font from a local file
mathjax_path = "tex-svg.js"
_mathjax = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax" / mathjax_path
html_static_path = ["_static", str(_mathjax)]

# a copied example is without its prompts and without what it prints
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# a page whose header names a kernel is executed at every build, in a folder of its own; with -W an error, a warning
# (stderr) or a cell that takes too long fails the build
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 600  # seconds a cell; a loaded machine is not a bug
nb_execution_raise_on_error = True
nb_output_stderr = "remove-warn"
nb_merge_streams = True
# for the kernels, which inherit them: the tensors are small; and Pyro's tqdm misses a progress bar that nobody needs
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SEQDISENT_CHECKOUT", str(Path(__file__).parent.parent))  # of the benchmarks that a page runs
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")

# `name` in a docstring is code
default_role = "code"
autosummary_generate = False  # tables alone: what they list is described below them, on the same page
suppress_warnings = ["autosummary.import_cycle"]  # the tables give the names that users import
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True, "exclude-members": "extra_repr", "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape"]
