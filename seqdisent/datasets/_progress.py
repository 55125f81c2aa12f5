"""A progress bar, on a terminal alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def progress(items: Sequence[Item], what: str) -> Iterable[Item]:
    """The items, with a bar on standard error, where that is a terminal, that goes away when they are done."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress bars need tqdm: pip install seqdisent[data]") from error
    bar: Iterable[Item] = tqdm(items, desc=what, leave=False, disable=None)  # None: quiet unless on a terminal
    return bar
