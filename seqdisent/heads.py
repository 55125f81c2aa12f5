"""The last layer of every conditional distribution: features in, a diagonal Normal out."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from seqdisent._checks import check_kind, check_last_dim, check_positive, check_scale


def full_precision(tensor: Tensor) -> Tensor:
    """Return `tensor` in float32 if it is in half precision (autocast), else unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def check_precision(parameter: Tensor) -> None:
    """Raise TypeError if a head's parameter is in half precision: scales and log-densities need more bits.

    Example:
        >>> check_precision(torch.zeros(1, dtype=torch.float16))
        Traceback (most recent call last):
        TypeError: parameters: have dtype torch.float16, expected torch.float32 or torch.float64; half precision needs
        torch.autocast, which keeps the parameters in float32
    """
    if parameter.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"parameters: have dtype {parameter.dtype}, expected torch.float32 or torch.float64; half precision needs "
            "torch.autocast, which keeps the parameters in float32"
        )


def diagonal_normal(loc: Tensor, scale: Tensor) -> dist.Independent:
    """Return the Normal with event shape (D,) and independent coordinates."""
    # validate_args=False: a NaN must reach the ledger, which can name the term (law 8)
    normal: dist.Independent = dist.Normal(loc, scale, validate_args=False).to_event(1)
    return normal


class NormalHead(nn.Module):
    r"""The last layer of a conditional Normal: linear for the location, softplus of linear for the scale.

    .. math:: \mathrm{loc} = W_1 h + b_1, \qquad \mathrm{scale} = \mathrm{softplus}(W_2 h + b_2) + \mathrm{min\_scale}

    Computed in float32 under autocast.

    Args:
        in_features: size of the features h.
        latent_dim: size of the event.
        min_scale: the smallest scale.
        initial_scale: the scale around which training starts (it sets the bias of its layer). None: bias 0, so about
            softplus(0) = 0.69.

    Shape:
        - features: (\*B, in_features)
        - output: Normal, batch \*B, event (latent_dim,)

    Raises:
        ValueError: a size below 1, a scale that is not positive, features of another size or on another device.
        TypeError: features of another dtype than the parameters (outside autocast), or parameters in half precision.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> posterior = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), NormalHead(8, 2))
        >>> posterior(torch.zeros(3, 4, 5)).rsample().shape
        torch.Size([3, 4, 2])
    """

    def __init__(
        self, in_features: int, latent_dim: int, *, min_scale: float = 1e-4, initial_scale: float | None = None
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, latent_dim=latent_dim)
        check_scale(min_scale=min_scale)
        self.loc = nn.Linear(in_features, latent_dim)
        self.scale = nn.Linear(in_features, latent_dim)
        self.min_scale = min_scale
        bias = 0.0
        if initial_scale is not None:
            check_scale(initial_scale=initial_scale)
            if initial_scale <= min_scale:
                raise ValueError(f"initial_scale: got {initial_scale}, expected more than min_scale={min_scale}")
            wanted = initial_scale - min_scale  # the softplus of the bias
            bias = wanted + math.log(-math.expm1(-wanted))  # the inverse of softplus, safe for large values
        nn.init.constant_(self.scale.bias, bias)

    def forward(self, features: Tensor) -> dist.Independent:
        """Return the Normal for features."""
        check_last_dim("features", features, self.loc.in_features, "in_features")
        check_precision(self.loc.weight)
        features = full_precision(features)
        check_kind("features", features, self.loc.weight)
        with torch.autocast(features.device.type, enabled=False):
            scale = nn.functional.softplus(self.scale(features)) + self.min_scale
            return diagonal_normal(self.loc(features), scale)
