"""Entropies of a judge's predictions for generated clips (extra ``metrics``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqdisent.metrics._predictions import as_tensor, check_classes, check_factor, check_logits

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        "seqdisent.metrics.entropies needs torchmetrics; install it with: pip install 'seqdisent[metrics]'"
    ) from error


class EntropyScores(NamedTuple):
    """Result of :class:`GenerationEntropies` for one factor.

    Attributes:
        inter: H(y) in nats, the entropy of the average prediction, from 0 to ln K; high if the clips are diverse.
        intra: H(y|x) in nats, the average entropy of the predictions, from 0 to `inter`; low if the judge is certain.
        inception_score: exp(H(y) - H(y|x)), from 1 to K.
    """

    inter: Tensor
    intra: Tensor
    inception_score: Tensor


class GenerationEntropies(Metric):
    r"""Inter-entropy, intra-entropy and inception score of generated clips, per factor (paper, Table 2).

    .. math::
        H(y) = -\sum_y \bar p(y) \log \bar p(y), \qquad
        H(y|x) = -\frac{1}{N} \sum_{n,y} p(y|x_n) \log p(y|x_n), \qquad
        \mathrm{IS} = e^{H(y) - H(y|x)}

    where :math:`p(y|x_n)` is the judge's prediction and :math:`\bar p` its average over the N clips. Both entropies are
    optimal for one recognisable clip per class, repeated. They do not measure variety within a class or
    disentanglement. If the judge is uncertain of real clips, they mean little.

    Args:
        num_classes: {factor: number of classes}, such as ``judge.num_classes``.
        **options: options of :class:`torchmetrics.Metric`.

    Shape:
        - predictions: {factor: logits (N, K)}, tensors, arrays or lists; log-probabilities are logits too

    Returns:
        {factor: :class:`EntropyScores`} from ``compute()``.

    Raises:
        TypeError: values that are not numbers.
        ValueError: a factor that is missing or has another shape; class numbers or probabilities instead of logits; or
            logits that are NaN.

    Example:
        >>> metric = GenerationEntropies({"action": 3})
        >>> metric.update({"action": 100 * torch.eye(3)})
        >>> metric.compute()["action"].inception_score
        tensor(3.0000, dtype=torch.float64)

    References:
        He et al. Probabilistic video generation using holistic attribute control, ECCV 2018 (the two entropies).
        Salimans et al. Improved techniques for training GANs, NeurIPS 2016 (the score).
    """

    full_state_update = False

    def __init__(self, num_classes: Mapping[str, int], **options: Any) -> None:
        super().__init__(**options)
        self.num_classes = check_classes(num_classes)
        self.count: Tensor
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        for i, size in enumerate(self.num_classes.values()):
            self.add_state(f"probability_{i}", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"entropy_{i}", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predictions: Mapping[str, Tensor]) -> None:
        """Add generated clips."""
        checked = checked_logits("predictions", predictions, self.num_classes).values()
        self.count += len(next(iter(checked)))
        for i, logits in enumerate(checked):
            probability = logits.to(self.device, torch.float64).softmax(-1)
            getattr(self, f"probability_{i}").add_(probability.sum(0))
            getattr(self, f"entropy_{i}").add_(torch.special.entr(probability).sum())

    def compute(self) -> dict[str, EntropyScores]:
        """Return the scores of each factor."""
        scores = {}
        for i, name in enumerate(self.num_classes):
            inter = torch.special.entr(getattr(self, f"probability_{i}") / self.count).sum()
            intra = getattr(self, f"entropy_{i}") / self.count
            scores[name] = EntropyScores(inter, intra, (inter - intra).exp())
        return scores


def checked_logits(
    argument: str, predictions: Mapping[str, Tensor], num_classes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Check and return the logits (N, K) of each factor, N the same for all."""
    checked: dict[str, Tensor] = {}
    for name, size in num_classes.items():
        check_factor(argument, predictions, name, num_classes)
        what = f"{argument}[{name!r}]"
        logits = check_logits(what, as_tensor(what, predictions[name]).detach(), size)
        if _are_probabilities(logits):
            raise ValueError(
                f"{what}: every row is in [0, 1] and sums to 1, as probabilities do; expected logits, such as the "
                "logarithms of those probabilities"
            )
        count = len(next(iter(checked.values()), logits))
        if len(logits) != count:
            raise ValueError(f"{what}: has {len(logits)} rows, expected {count}, as many as the others")
        checked[name] = logits
    return checked


def _are_probabilities(logits: Tensor) -> bool:
    rounding = max(1e-4, torch.finfo(logits.dtype).eps)  # of a sum of probabilities, also in half precision
    shares = ((logits >= 0) & (logits <= 1)).all(-1) & ((logits.double().sum(-1) - 1).abs() < rounding)
    return len(logits) > 0 and bool(shares.all())  # a single row of logits may sum to 1 by chance
