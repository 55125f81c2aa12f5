"""What a block promises beside its formula; `test_contract.py` runs every promise on every block.

The file that tests a block declares it: `CONTRACTS = {"NormalHead": Contract(...)}`, at the top level of `test_*.py`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn


class Contract(NamedTuple):
    """One small block and what fits it."""

    build: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...]  # the shape of each input to the right of the batch
    event: tuple[int, ...]  # of the output: a tensor's shape to the right of the batch, or a distribution's event
    says: str  # what the repr must hold
    positive: tuple[int, ...] = ()  # which of the inputs are positive, by their place
    starts_at_random: bool = True
    takes_any: tuple[str, ...] = ()  # arguments of `forward` whose last dimension may be any
    other_calls: Callable[[Any, Sequence[Tensor]], list[Tensor]] = lambda module, inputs: []  # methods beside `forward`


def declared() -> dict[str, Contract]:
    """Return the contracts of all files that declare some."""
    found: dict[str, Contract] = {}
    for path in sorted(Path(__file__).parents[1].rglob("test_*.py")):
        if re.search(r"^CONTRACTS = \{", path.read_text(encoding="utf-8"), re.MULTILINE):
            spec = importlib.util.spec_from_file_location(f"contracts_of_{path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            twice = found.keys() & module.CONTRACTS
            assert not twice, f"{path}: {sorted(twice)} have a contract elsewhere"
            found |= module.CONTRACTS
    return found
