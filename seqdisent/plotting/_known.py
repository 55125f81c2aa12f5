"""What is known of values, by step or by value."""

from __future__ import annotations

import torch
from torch import Tensor


def by_value(argument: str, known: Tensor | None, values: Tensor) -> Tensor:
    """Return what is known by step or by value as bool (N, T, X)."""
    known = torch.ones(values.shape[:2], dtype=torch.bool) if known is None else known.cpu()
    if known.dtype != torch.bool or known.shape not in (values.shape[:2], values.shape):
        raise ValueError(
            f"{argument}: has shape {tuple(known.shape)} and dtype {known.dtype}, expected bool "
            f"{tuple(values.shape[:2])} or {tuple(values.shape)}"
        )
    size = values.shape[2] if values.ndim == 3 else 1
    return known if known.ndim == 3 else known.unsqueeze(-1).expand(-1, -1, size)
