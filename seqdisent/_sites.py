"""The sites of a Pyro trace that stand for factors of the joint distribution."""

from __future__ import annotations

from typing import Any

from pyro import poutine
from pyro.poutine.util import site_is_subsample


def sample_sites(trace: poutine.Trace) -> dict[str, Any]:
    """Return {name: sample site} without a plate's subsample and without what ``pyro.deterministic`` records."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not (site["infer"] or {}).get("_deterministic")
    }
