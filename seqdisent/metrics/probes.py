"""Probes: classifiers that predict a factor from a latent (extra ``metrics``)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from seqdisent.metrics._predictions import as_tensor

try:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
except ImportError as error:
    raise ImportError(
        "seqdisent.metrics.probes needs scikit-learn; install it with: pip install 'seqdisent[metrics]'"
    ) from error

Kind = Literal["linear", "mlp"]
"""The kind of probe: logistic regression, or a network with one hidden layer."""


class ProbeScores(NamedTuple):
    """Scores of a probe on the test latents.

    Attributes:
        accuracy: fraction of correct predictions, in [0, 1].
        chance: fraction of the most common test label, the accuracy of the best constant prediction.
        converged: whether the fit converged; if not, more iterations may give a higher accuracy.
    """

    accuracy: float
    chance: float
    converged: bool


def probe(
    train_latents: Tensor,
    train_labels: Tensor,
    test_latents: Tensor,
    test_labels: Tensor,
    *,
    train_mask: Tensor | None = None,
    test_mask: Tensor | None = None,
    kind: Kind = "linear",
    seed: int = 0,
    max_iterations: int = 1000,
) -> ProbeScores:
    """Predict one factor from one latent, with scikit-learn (paper, Table 1).

    Each dimension of the latents is standardised with the mean and standard deviation of the training latents. Use the
    posterior means, and test on identities that the probe was not trained on, since a code of the identity predicts all
    its factors. An accuracy at chance means that this kind of probe finds nothing, not that the latent contains
    nothing. A high accuracy does not mean that the decoder uses the information; swaps show that.

    A factor of each step, such as the `step_labels` of a :class:`~seqdisent.datasets.Batch`, is predicted from the
    latent of the same step: one probe for all steps, in which each step counts once. Training and test are different
    sequences. Never split by step: neighbouring steps are alike, and a probe that has seen one knows the other.

    Args:
        train_latents: training latents; a tensor, array or list, as the other arguments.
        train_labels: the factor's values for them.
        test_latents: test latents.
        test_labels: the factor's values for them.
        train_mask: True where a training latent counts, such as at real steps that are labelled; anything else may
            stand where it does not. None for all.
        test_mask: True where a test latent counts; None for all.
        kind: "linear" (logistic regression) or "mlp" (one hidden layer of 128).
        seed: seed of the network's initial weights and batches.
        max_iterations: maximum number of iterations of the optimiser (for "mlp", of epochs).

    Shape:
        - train_latents: (N, D), test_latents: (M, D); of each step (N, T, D) and (M, T', D)
        - train_labels: (N,), test_labels: (M,), whole numbers; of each step (N, T) and (M, T')
        - train_mask, test_mask: bool, of the labels' shape

    Returns:
        The scores; of each step, over all test steps that count.

    Raises:
        TypeError: latents or labels that are not numbers, or a mask that is not bool.
        ValueError: inconsistent shapes, latents that are not finite, a mask that leaves nothing, a single training
            class, or another `kind`.

    Example:
        >>> latents = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> labels = (latents[:, 0] > 0).long()
        >>> probe(latents[:100], labels[:100], latents[100:], labels[100:]).accuracy > 0.9
        True
        >>> z, word = latents.reshape(20, 10, 3), labels.reshape(20, 10)  # of 20 sequences of at most 10 steps
        >>> mask = torch.arange(10) < torch.arange(1, 21)[:, None]
        >>> probe(z[:10], word[:10], z[10:], word[10:], train_mask=mask[:10], test_mask=mask[10:]).accuracy > 0.9
        True
    """
    x, y = _checked("train", train_latents, train_labels, train_mask)
    x_test, y_test = _checked("test", test_latents, test_labels, test_mask)
    if np.ndim(train_latents) != np.ndim(test_latents):
        raise ValueError(
            f"test_latents: has shape {tuple(np.shape(test_latents))}, expected {np.ndim(train_latents)} dimensions as "
            "train_latents"
        )
    if x.shape[1] != x_test.shape[1]:
        raise ValueError(f"test_latents: have {x_test.shape[1]} dimensions, expected {x.shape[1]} as train_latents")
    if len(np.unique(y)) < 2:
        raise ValueError("train_labels: all are the same, expected at least two classes")
    if kind == "linear":
        classifier = LogisticRegression(max_iter=max_iterations)
    elif kind == "mlp":
        classifier = MLPClassifier((128,), max_iter=max_iterations, random_state=seed)
    else:
        raise ValueError(f"kind: got {kind!r}, expected 'linear' or 'mlp'")
    pipeline = make_pipeline(StandardScaler(), classifier)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline.fit(x, y)
    converged = True
    for warning in caught:  # part of the result; other warnings are passed on
        if issubclass(warning.category, ConvergenceWarning):
            converged = False
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    chance = np.unique(y_test, return_counts=True)[1].max() / len(y_test)
    return ProbeScores(float((pipeline.predict(x_test) == y_test).mean()), float(chance), converged)


def probe_table(
    train_latents: Mapping[str, Tensor],
    train_labels: Mapping[str, Tensor],
    test_latents: Mapping[str, Tensor],
    test_labels: Mapping[str, Tensor],
    *,
    train_mask: Tensor | None = None,
    test_mask: Tensor | None = None,
    kind: Kind = "linear",
    seed: int = 0,
    max_iterations: int = 1000,
) -> dict[str, dict[str, ProbeScores]]:
    """Probe every latent for every factor, those that it should contain and those that it should not.

    Args:
        train_latents: {latent: training latents}.
        train_labels: {factor: its values for them}.
        test_latents: {latent: test latents}.
        test_labels: {factor: its values for them}.
        train_mask: as :func:`probe`'s.
        test_mask: as :func:`probe`'s.
        kind: as :func:`probe`'s.
        seed: as :func:`probe`'s.
        max_iterations: as :func:`probe`'s.

    Shape:
        - train_latents: (N, D) each, test_latents: (M, D) each; D may differ between latents
        - train_labels: (N,) each, test_labels: (M,) each
        - or all of each step, with masks, as :func:`probe`'s; a code of the sequence is repeated,
          ``s.unsqueeze(1).expand(-1, T, -1)``

    Returns:
        {latent: {factor: :class:`ProbeScores`}}

    Raises:
        TypeError: as :func:`probe`.
        ValueError: latents or factors that differ between training and test, or as :func:`probe`.

    Example:
        >>> s, d = torch.eye(2).repeat_interleave(10, 0), torch.zeros(20, 1)
        >>> who = {"who": torch.arange(2).repeat_interleave(10)}
        >>> table = probe_table({"s": s, "d": d}, who, {"s": s, "d": d}, who)
        >>> table["s"]["who"].accuracy, table["d"]["who"].accuracy, table["d"]["who"].chance
        (1.0, 0.5, 0.5)
    """
    for argument, first, second in (("latents", train_latents, test_latents), ("labels", train_labels, test_labels)):
        if set(first) != set(second):
            raise ValueError(f"test_{argument}: got {sorted(second)}, expected those of training, {sorted(first)}")
    options: dict[str, Any] = {"train_mask": train_mask, "test_mask": test_mask}
    options |= {"kind": kind, "seed": seed, "max_iterations": max_iterations}
    return {
        latent: {
            factor: probe(
                train_latents[latent], train_labels[factor], test_latents[latent], test_labels[factor], **options
            )
            for factor in train_labels
        }
        for latent in train_latents
    }


def _checked(half: str, latents: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Any, Any]:
    """Check latents and labels and return those that count as NumPy arrays (N, D) and (N,)."""
    latents, labels = as_tensor(f"{half}_latents", latents), as_tensor(f"{half}_labels", labels)
    if latents.ndim not in (2, 3) or 0 in latents.shape:
        raise ValueError(
            f"{half}_latents: has shape {tuple(latents.shape)}, expected (N, D) or (N, T, D) with nothing empty"
        )
    if labels.shape != latents.shape[:-1] or labels.is_floating_point():
        raise ValueError(
            f"{half}_labels: has shape {tuple(labels.shape)} and dtype {labels.dtype}, expected whole numbers "
            f"{tuple(latents.shape[:-1])}"
        )
    latents, labels = latents.detach().cpu(), labels.cpu()
    if mask is not None:
        counts = _checked_mask(f"{half}_mask", mask, labels.shape)
        latents, labels = latents[counts], labels[counts]
    if not bool(torch.isfinite(latents).all()):
        raise ValueError(f"{half}_latents: not all are finite")
    return latents.double().flatten(0, -2).numpy(), labels.flatten().numpy()


def _checked_mask(argument: str, mask: Tensor, shape: torch.Size) -> Tensor:
    mask = as_tensor(argument, mask).cpu()
    if mask.dtype != torch.bool:
        raise TypeError(f"{argument}: has dtype {mask.dtype}, expected torch.bool")
    if mask.shape != shape:
        raise ValueError(f"{argument}: has shape {tuple(mask.shape)}, expected {tuple(shape)}, that of the labels")
    if not bool(mask.any()):
        raise ValueError(f"{argument}: is False everywhere, expected True where a latent counts")
    return mask
