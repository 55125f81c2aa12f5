"""Asking a question must not move the random state."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def kept_random_state() -> AbstractContextManager[None]:
    """Return a context that puts the random state of every device back at its end."""
    # named, since fork_rng warns where there are several devices and none is named
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return torch.random.fork_rng(devices)
