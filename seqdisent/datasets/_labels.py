"""Labels as files and tables hold them, numbered from 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Numbered(NamedTuple):
    """Labels with values from 0, and which of them belong to the identity."""

    labels: dict[str, Tensor]
    factor_names: dict[str, list[str]]
    static_factors: list[str]
    motion_factors: list[str]

    def options(self) -> dict[str, Any]:
        """Return the arguments of :class:`Sequences` that say this."""
        return self._asdict()


def number_labels(whole: Mapping[str, Tensor], identity: Tensor | None) -> Numbered:
    """Renumber labels (N,) of whole numbers from 0, in the order of their values.

    Where some identity (N,) has several sequences, a label that never differs within one identity is static, and the
    others are of the motion; otherwise nothing tells them apart and they are neither.
    """
    found = Numbered({}, {}, [], [])
    for name, label in whole.items():
        values, found.labels[name] = torch.unique(label, return_inverse=True)
        found.factor_names[name] = [str(value) for value in values.tolist()]
    if identity is not None and len(identities := torch.unique(identity)) < len(identity):
        for name, label in found.labels.items():
            never_differs = len(torch.unique(torch.stack([identity, label], dim=1), dim=0)) == len(identities)
            (found.static_factors if never_differs else found.motion_factors).append(name)
    return found
