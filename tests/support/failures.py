"""The form of the tables in tests/failures/: what was done, and what is said."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest


class Row(NamedTuple):
    mistake: str
    do: Any  # a function, of a folder where it needs one
    error: type[BaseException]
    said: str  # a regular expression


def rows(*table):
    """Run a test once for each row, under the name of the mistake."""
    return pytest.mark.parametrize("row", [Row(*row) for row in table], ids=[row[0] for row in table])


def check(row, *given):
    with pytest.raises(row.error, match=row.said):
        row.do(*given)
