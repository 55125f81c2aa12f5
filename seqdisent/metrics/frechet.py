"""Frechet distance between real and generated clips, in the features of any network (extra ``metrics``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqdisent._checks import check_positive
from seqdisent.metrics._predictions import as_tensor

try:
    from torchmetrics.image.fid import FrechetInceptionDistance
except ImportError as error:
    raise ImportError(
        "seqdisent.metrics.frechet needs torchmetrics; install it with: pip install 'seqdisent[metrics]'"
    ) from error


class FrechetScore(NamedTuple):
    """Result of :class:`FrechetDistance`.

    Attributes:
        distance: 0 if both sets have the same mean and covariance of features.
        extractor: name of the feature extractor. Distances of different extractors cannot be compared.
    """

    distance: Tensor
    extractor: str


class _Features(nn.Module):
    """The identity, since the features are extracted before."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetDistance(FrechetInceptionDistance):
    r"""Compare the features of real and generated clips as two Gaussians (paper, Table 3).

    .. math::
        \lVert \mu - \mu' \rVert^2 + \operatorname{tr}\bigl(\Sigma + \Sigma' - 2 (\Sigma \Sigma')^{1/2}\bigr)

    computed by torchmetrics in float64. It is the Frechet inception distance only with Inception's features, and
    comparable to the paper's values only with the paper's 3D ResNeXt. The result therefore contains the extractor's
    name. The distance is biased upwards if there are few clips. Use as many generated as real clips, several times
    `num_features`, and report the distance between two sets of real clips of the same size beside it.

    Args:
        extractor: a function of the arguments of ``update`` (frames, and a mask if they are ragged) that returns
            features (N, F), a tensor or an array, such as ``judge.features``. Moving the metric to a device moves a
            module, but not a bound method of one.
        num_features: F, such as ``judge.num_features``.
        name: name of the extractor in the result, with its architecture and training data.
        **options: options of :class:`torchmetrics.Metric`.

    Shape:
        - clips: the extractor's arguments, such as frames (N, T, C, H, W) and a mask (N, T)

    Returns:
        :class:`FrechetScore` from ``compute()``.

    Raises:
        TypeError: features that are not numbers.
        ValueError: an empty name, or features of another shape or that are not finite.
        RuntimeError: in ``compute``, fewer than two real or two generated clips.

    Example:
        >>> frames = torch.rand(50, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> metric = FrechetDistance(lambda frames: frames.mean((2, 3, 4)), 2, "mean brightness")
        >>> metric.update(frames, real=True)
        >>> metric.update(frames + 0.5, real=False)
        >>> metric.compute()
        FrechetScore(distance=tensor(0.5000), extractor='mean brightness')

    References:
        Heusel et al. GANs trained by a two time-scale update rule converge to a local Nash equilibrium, NeurIPS 2017.
    """

    def __init__(self, extractor: Callable[..., Tensor], num_features: int, name: str, **options: Any) -> None:
        check_positive(num_features=num_features)
        if not name:
            raise ValueError("name: is empty, expected what to call the extractor")
        super().__init__(feature=_Features(num_features), normalize=True, **options)
        self.extractor, self.num_features, self.name = extractor, num_features, name

    def update(self, *clips: Tensor, real: bool) -> None:  # type: ignore[override]
        """Add real or generated clips."""
        with torch.no_grad():
            features = as_tensor("extractor", self.extractor(*clips))
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(
                f"extractor: returned features of shape {tuple(features.shape)}, expected (N, {self.num_features})"
            )
        # torchmetrics returns the distance in the features' dtype, which must not be an integer or half precision
        features = features.to(self.device, torch.float64 if features.dtype == torch.float64 else torch.float32)
        if not bool(features.isfinite().all()):
            raise ValueError("extractor: returned features that are not finite")
        super().update(features, real)

    def compute(self) -> FrechetScore:  # type: ignore[override]
        """Return the distance and the extractor's name."""
        return FrechetScore(super().compute().clamp(min=0.0), self.name)  # of like sets, rounding makes it negative
