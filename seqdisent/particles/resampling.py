"""Particles drawn anew by their weights, each sequence on its own."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Scheme = Literal["systematic", "stratified", "residual", "multinomial"]


def resample(log_weights: Tensor, scheme: Scheme = "systematic", *, generator: torch.Generator | None = None) -> Tensor:
    r"""Draw K particles anew by their weights: return the index of each one's ancestor.

    With weights :math:`W^k` that sum to 1, every scheme gives particle k an expected number of :math:`K W^k`
    offspring. They differ in how far the number varies around that:

    - ``"multinomial"``: K independent draws, the most variance;
    - ``"residual"``: :math:`\lfloor K W^k \rfloor` offspring for certain, and the rest by independent draws;
    - ``"stratified"``: a uniform number in each of K equal parts of [0, 1], looked up in the cumulated weights;
    - ``"systematic"``: the same with one uniform number for all parts, so that the number of offspring is
      :math:`K W^k` rounded up or down.

    Args:
        log_weights: (K, \*B), of K particles, normalised or not.
        scheme: one of these four.
        generator: of the random numbers; None for torch's own.

    Returns:
        (K, \*B) int64, the ancestors, in [0, K). Sequences are independent of each other.

    Raises:
        ValueError: an unknown scheme, or a sequence whose weights are NaN, infinite or all 0.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> weights = torch.tensor([[0.5, 0.0], [0.25, 0.0], [0.25, 1.0], [0.0, 0.0]])
        >>> resample(weights.log())
        tensor([[0, 2],
                [0, 2],
                [1, 2],
                [2, 2]])

    References:
        Douc, Cappe and Moulines, "Comparison of resampling schemes for particle filtering", ISPA 2005. Gordon, Salmond
        and Smith, "Novel approach to nonlinear/non-Gaussian Bayesian state estimation", 1993, for the multinomial one.
    """
    check_scheme("scheme", scheme)
    if log_weights.ndim < 1 or log_weights.shape[0] == 0:
        raise ValueError(f"log_weights: has shape {tuple(log_weights.shape)}, expected (K, *B) with K >= 1")
    num_particles, batch_shape = log_weights.shape[0], log_weights.shape[1:]
    weights = log_weights.detach().reshape(num_particles, -1).T.double().softmax(-1)  # a row a sequence
    if not weights.isfinite().all():
        raise ValueError("log_weights: are NaN, infinite or all -inf in a sequence, expected a particle with weight")
    if scheme == "multinomial":
        ancestors = torch.multinomial(weights, num_particles, replacement=True, generator=generator)
    elif scheme == "residual":
        ancestors = _residual(weights, generator)
    else:
        num_numbers = num_particles if scheme == "stratified" else 1
        numbers = torch.rand(len(weights), num_numbers, dtype=weights.dtype, device=weights.device, generator=generator)
        parts = torch.arange(num_particles, device=weights.device)
        ancestors = _look_up(weights, (parts + numbers) / num_particles)
    return ancestors.T.reshape(num_particles, *batch_shape)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""Return :math:`1 / \sum_k (W^k)^2` of normalised weights, (K, \*B) -> (\*B)."""
    return (-(2 * log_weights.detach()).logsumexp(0)).exp()


def check_scheme(name: str, scheme: str) -> None:
    """Raise ValueError unless the scheme is known."""
    if scheme not in get_args(Scheme):
        raise ValueError(f"{name}: got {scheme!r}, expected one of {', '.join(map(repr, get_args(Scheme)))}")


def pick(values: Tensor, index: Tensor) -> Tensor:
    r"""Return the particles of values (K, \*B, \*E) that an index (K', \*B) names, (K', \*B, \*E)."""
    event_dims = values.ndim - index.ndim
    index = index.reshape(index.shape + (1,) * event_dims).expand(*index.shape, *values.shape[index.ndim :])
    return values.gather(0, index)


def _look_up(weights: Tensor, numbers: Tensor) -> Tensor:
    """Return where numbers in [0, 1) lie in the cumulated weights; a particle without weight is never found."""
    cumulated = weights.cumsum(-1)
    cumulated = cumulated / cumulated[:, -1:]
    below_one = 1 - torch.finfo(weights.dtype).eps
    return torch.searchsorted(cumulated, numbers.clamp(max=below_one), right=True)


def _residual(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    num_particles = weights.shape[-1]
    certain = (num_particles * weights + 1e-9).floor()  # 49 times 1/49 is a little less than 1
    rest = (num_particles * weights - certain).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, 1.0)  # of a sequence where none is left to draw
    drawn = torch.multinomial(rest, num_particles, replacement=True, generator=generator)
    cumulated = certain.cumsum(-1)
    places = torch.arange(num_particles, device=weights.device, dtype=weights.dtype).expand_as(weights).contiguous()
    found = torch.searchsorted(cumulated, places, right=True)
    return torch.where(places < cumulated[:, -1:], found, drawn)
