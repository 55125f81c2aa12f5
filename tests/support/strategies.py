"""What hypothesis draws: small sizes, lengths, masks and seeds. Tensors come from a generator with a drawn seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def dimensions(largest: int = 4) -> st.SearchStrategy[int]:
    return st.integers(1, largest)


def num_steps(largest: int = 5) -> st.SearchStrategy[int]:
    return st.integers(1, largest)


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**31 - 1)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    return st.sampled_from((torch.float32, torch.float64))


def batch_shapes(max_dims: int = 2, largest: int = 3) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw *B, the empty shape included."""
    return st.lists(dimensions(largest), max_size=max_dims).map(tuple)


def lengths(largest: int = 5, max_rows: int = 4) -> st.SearchStrategy[list[int]]:
    """Draw the real length of each sequence of a batch."""
    return st.lists(num_steps(largest), min_size=1, max_size=max_rows)


def padding() -> st.SearchStrategy[float]:
    """Draw what padding may hold: it must not matter."""
    return st.sampled_from((float("nan"), float("inf"), 1e6, -1e6))


def mask_of(lengths: list[int], extra_steps: int = 0) -> Tensor:
    """Return the mask (B, T) of sequences of these lengths; T is the longest one and `extra_steps` more."""
    return torch.arange(max(lengths) + extra_steps) < torch.tensor(lengths)[:, None]


@st.composite
def masks(draw: st.DrawFn, largest: int = 5, max_rows: int = 4) -> Tensor:
    """Draw a mask (B, T): bool, padding on the right, sometimes a step that is padding in every row."""
    return mask_of(draw(lengths(largest, max_rows)), draw(st.integers(0, 1)))


class Tensors:
    """Tensors and modules from one seed, so that a failing example is reproduced by a few small numbers."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=self.dtype)

    def simplex(self, *shape: int) -> Tensor:
        return self.normal(*shape).softmax(-1)

    def build(self, factory: Callable[[], Module], *, noise: float = 0.3) -> Module:
        """Return `factory()`, seeded; noise on every parameter, for one that starts at 0 would hide its own absence."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=self.generator)))
            module = factory().to(self.dtype)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += noise * self.normal(*parameter.shape)
        return module
