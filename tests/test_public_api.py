"""The public names, their documentation, and that importing them changes and loads nothing else."""

from __future__ import annotations

import inspect
import json
import os
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pyro
import pytest
from public_names import PAGES, PUBLIC, described, summarised

import seqdisent

NAMES = {name.removeprefix("seqdisent.") for name in PUBLIC if name.count(".") == 1}

# Imports the package as a user would, after torch and Pyro (whose own imports may do as they like), and reports.
PROBE = """
import json, random, sys, warnings
import numpy
import pyro
import torch

def state():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "torch's generator": torch.get_rng_state().tolist(),
        "random's generator": str(random.getstate()),
        "numpy's generator": str(numpy.random.get_state()),
        "warnings' filters": str(warnings.filters),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch's validation": torch.distributions.Distribution._validate_args,
        "pyro's validation": pyro.settings.get(),
        "recursion": sys.getrecursionlimit(),
    }

before, modules = state(), set(sys.modules)
import seqdisent
after, imported = state(), set(sys.modules)
blocks = [
    seqdisent.ConvEncoder(2, image_size=8, channels=(2,), downsample=lambda c: torch.nn.AvgPool2d(2, ceil_mode=True)),
    seqdisent.ConvDecoder(2, image_size=8, channels=(2,)),
    seqdisent.MixtureOfExpertsConvDecoder(2, 2, image_size=8, channels=(2,)),
    seqdisent.StaticEncoder(2, 2),
    seqdisent.Seq2SeqDynamicsEncoder(2, 2, hidden_dim=2),
    seqdisent.GatedTransition(2, 2),
    seqdisent.Combiner(2, 2, context_dim=2),
    seqdisent.MixtureOfExperts(lambda: torch.nn.Linear(2, 2), 2),
]
blocks[0](torch.zeros(1, 3, 8, 8))
without_blur = set(sys.modules)
seqdisent.ConvEncoder(2, image_size=8, channels=(2,))
print(json.dumps({
    "changed": [name for name in before if before[name] != after[name]],
    "imported": sorted(imported - modules),
    "used": sorted(without_blur - modules),
    "blur": "antialiased_cnns" in sys.modules,
    "store": list(pyro.get_param_store().keys()),
}))
"""


@pytest.fixture(scope="module")
def report() -> dict:
    # the same copy of the package as here, wherever it lies
    environment = {**os.environ, "PYTHONPATH": str(Path(seqdisent.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def roots(modules: list[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def public_in(module: ModuleType) -> dict[str, object]:
    """Return the functions and classes in `__all__` of a part of the package."""
    found = {name: getattr(module, name) for name in module.__all__}
    return {name: thing for name, thing in found.items() if callable(thing)}


def test_all_is_exactly_what_the_api_pages_describe():
    assert set(seqdisent.__all__) == NAMES
    assert len(seqdisent.__all__) == len(NAMES)
    for name in NAMES:
        assert getattr(seqdisent, name).__name__ == name


def test_the_package_defines_nothing_else_in_public():
    public = {
        name for name, value in vars(seqdisent).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == NAMES


MODULES = [import_module(f"seqdisent.{module.name}") for module in pkgutil.iter_modules(seqdisent.__path__)]
PARTS = [module for module in MODULES if hasattr(module, "__all__")]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_the_api_pages_describe_every_part(part):
    lacking = [name for name, thing in public_in(part).items() if not any(thing is known for known in PUBLIC.values())]
    assert not lacking, "describe them on a page in docs/api"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_table_of_an_api_page_lists_what_it_describes(page):
    assert summarised(page) == described(page)


def test_every_public_name_is_described_once():
    assert len(PUBLIC) == sum(len(described(page)) for page in PAGES)


def test_the_package_says_that_it_is_typed():
    assert (Path(seqdisent.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_is_documented(name):
    thing = getattr(seqdisent, name)
    assert thing.__doc__, name
    first, *rest = inspect.cleandoc(thing.__doc__).splitlines()
    assert first.endswith((".", ":"))
    assert not rest or not rest[0]
    if inspect.isclass(thing):
        for attribute, value in vars(thing).items():
            function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            function = function.fget if isinstance(function, property) else function
            if inspect.isfunction(function) and not attribute.startswith("_"):
                assert inspect.getdoc(getattr(thing, attribute)), f"{name}.{attribute}"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_public_argument_is_annotated(name):
    thing = getattr(seqdisent, name)
    function = thing.__init__ if inspect.isclass(thing) and "__init__" in vars(thing) else thing
    if inspect.isfunction(function):
        for parameter in inspect.signature(function).parameters.values():
            assert parameter.name == "self" or parameter.annotation is not parameter.empty, parameter.name


def test_importing_loads_no_optional_dependency(report):
    optional = {"lightning", "pytorch_lightning", "matplotlib", "PIL", "torchvision", "tensorboard", "antialiased_cnns"}
    optional |= {"torchmetrics", "sklearn", "scipy"}
    assert not roots(report["imported"]) & optional
    assert "seqdisent" in roots(report["imported"])


def test_importing_loads_no_part_of_the_package_that_needs_an_extra(report):
    parts = {module.split(".")[1] for module in report["imported"] if module.startswith("seqdisent.")}
    assert not parts & {"training", "plotting", "datasets", "metrics"}


def test_importing_changes_no_global_state(report):
    assert report["changed"] == []


def test_antialiased_cnns_is_imported_by_its_own_blur_alone(report):
    assert "antialiased_cnns" not in roots(report["used"])
    assert report["blur"]


def test_blocks_leave_pyros_store_empty(report):
    assert report["store"] == []
    assert list(pyro.get_param_store().keys()) == []
