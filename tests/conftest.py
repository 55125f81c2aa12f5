"""Hypothesis profiles, seeding, and where the data lies; see README.md in this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch
from hypothesis import settings

import seqdisent

settings.register_profile("ci", max_examples=15, derandomize=True, deadline=None, print_blob=True)
settings.register_profile("dev", max_examples=30, deadline=None)
settings.register_profile("mutation", max_examples=5, derandomize=True, deadline=None, database=None)
settings.register_profile("thorough", max_examples=500, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))

# the tests' tensors are small: a second thread costs more to wake than it computes; `pytest -n 2` uses the other core
torch.set_num_threads(1)


def pytest_report_header() -> str:
    """Say which copy of the package is under test, the installed one or the tree's."""
    return f"seqdisent: {Path(seqdisent.__file__).parent}"


@pytest.fixture(autouse=True)
def _no_global_state() -> Iterator[None]:
    """Seed every test, and hold it to the law that nothing global changes (docs/design.md)."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    dtype = torch.get_default_dtype()
    yield
    left = list(pyro.get_param_store().keys())
    pyro.clear_param_store()
    torch.distributions.Distribution.set_default_validate_args(
        __debug__
    )  # torch.compile switches it off, for the whole process
    assert not left, f"parameters left in Pyro's store: {left}"
    assert torch.get_default_dtype() == dtype, "the default dtype was changed"


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data, SEQDISENT_DATA; the test is skipped where there is none."""
    named = os.environ.get("SEQDISENT_DATA")
    if not named:
        pytest.skip("needs real data: set SEQDISENT_DATA to a folder that holds lpc/")
    root = Path(named)
    if not (root / "lpc").is_dir():
        pytest.skip(f"needs real data: there is no folder lpc/ in SEQDISENT_DATA={named}")
    return root
