"""What a judge sees in generated clips, and in clips with some latents sampled from the prior (extra ``metrics``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from seqdisent._checks import check_positive
from seqdisent._random import kept_random_state
from seqdisent.datasets.batch import frames_and_mask
from seqdisent.inference.interventions import generate, infer
from seqdisent.metrics._predictions import check_classes, class_numbers, shares, tabulate

try:
    from seqdisent.metrics.entropies import EntropyScores, GenerationEntropies, checked_logits
except ImportError as error:
    raise ImportError(
        "seqdisent.metrics.generation needs torchmetrics; install it with: pip install 'seqdisent[metrics]'"
    ) from error

if TYPE_CHECKING:
    from seqdisent.datasets.batch import Batch
    from seqdisent.datasets.clips import Clips


class GenerationScores(NamedTuple):
    """Result of :func:`generation_scores` for one factor.

    Attributes:
        generated: H(y), H(y|x) and the inception score of generated clips.
        real: the same of real clips.
        confidence: the judge's largest probability, averaged over generated clips, from 1 / K to 1.
        real_confidence: the same of real clips.
    """

    generated: EntropyScores
    real: EntropyScores
    confidence: Tensor
    real_confidence: Tensor


def generation_scores(
    generated: Mapping[str, Tensor], real: Mapping[str, Tensor], num_classes: Mapping[str, int]
) -> dict[str, GenerationScores]:
    """Compare a judge's predictions for generated clips with those for real clips.

    Generated clips like the real ones have the same entropies and the same confidence. The inception score alone rises
    above that of real clips if the generator shows rare classes more often, or only clips that are easy to recognise. A
    judge may be certain of clips that look like nothing: report a distance in its features too
    (:class:`FrechetDistance`, :func:`neighbour_scores`).

    Args:
        generated: the judge's predictions for generated clips.
        real: its predictions for held-out clips.
        num_classes: {factor: number of classes}, such as ``judge.num_classes``.

    Shape:
        - generated, real: {factor: logits (M, K)}, {factor: logits (N, K)}; tensors, arrays or lists

    Returns:
        {factor: :class:`GenerationScores`}; entropies in nats.

    Raises:
        TypeError: values that are not numbers.
        ValueError: no clips, or predictions that :class:`GenerationEntropies` refuses.

    Example:
        >>> real = {"action": 100 * torch.eye(4)}
        >>> generated = {"action": 100 * torch.eye(4)[:2]}
        >>> scores = generation_scores(generated, real, {"action": 4})["action"]
        >>> round(float(scores.generated.inception_score)), round(float(scores.real.inception_score))
        (2, 4)
        >>> float(scores.confidence)
        1.0

    References:
        As :class:`GenerationEntropies`.
    """
    num_classes = check_classes(num_classes)
    of_generated, of_real = (
        _entropies_and_confidence(argument, predictions, num_classes)
        for argument, predictions in (("generated", generated), ("real", real))
    )
    return {
        name: GenerationScores(of_generated[name][0], of_real[name][0], of_generated[name][1], of_real[name][1])
        for name in num_classes
    }


def _entropies_and_confidence(
    argument: str, predictions: Mapping[str, Tensor], num_classes: Mapping[str, int]
) -> dict[str, tuple[EntropyScores, Tensor]]:
    checked = checked_logits(argument, predictions, num_classes)
    first = next(iter(checked.values()))
    if not len(first):
        raise ValueError(f"{argument}: has no clips, expected at least one")
    metric = GenerationEntropies(num_classes).to(first.device)
    metric.update(checked)
    entropies = metric.compute()
    return {name: (entropies[name], logits.double().softmax(-1).amax(-1).mean()) for name, logits in checked.items()}


class SampledSwapScores(NamedTuple):
    """Result of :func:`sampled_swap_accuracy` for one factor.

    Attributes:
        kept: whether the factor should stay that of the clip (True), or be drawn anew.
        accuracy: share of predictions equal to the clip's label, in [0, 1]. The best value of a kept factor is 1. Of
            the others, a value above `independent` means that the kept latents transfer the factor.
        independent: the accuracy if predictions had nothing to do with labels: the sum over classes of the frequency of
            the label times that of the prediction.
        chance: accuracy of the best constant prediction, the frequency of the most common label.
        entropies: H(y), H(y|x) and the inception score of the predictions.
    """

    kept: bool
    accuracy: Tensor
    independent: Tensor
    chance: Tensor
    entropies: EntropyScores


def sampled_swap_accuracy(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    judge: Callable[..., Mapping[str, Tensor]],
    clips: Clips,
    *,
    keep: Sequence[str],
    factors: Sequence[str] | None = None,
    emission: str | None = None,
    sample: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    **inputs: Any,
) -> dict[str, SampledSwapScores]:
    """Keep the motion of each clip, draw its identity from the prior, and judge the result: the field's protocol.

    The latents `keep` are inferred from the clip. The model draws all others from its prior, given these, and the mean
    of the emission is judged. S3VAE, C-DSVAE, SPYL and DBSE report the accuracy of the kept action, its inception
    score, H(y|x) and H(y). A model that encodes everything in the motion reaches the best value of all four, so all
    factors are scored here: those that are drawn should be diverse (entropies as of real clips) and not the clip's
    (accuracy no more than `independent`). The scores depend on the judge, so report ``judge.accuracy``. With static
    latents in `keep` and static factors in `factors`, the identity is kept and the motion drawn.

    Args:
        model: a Pyro model. Where clips have holes or covariates, both programs take
            ``(frames, mask, observed, covariates)``.
        guide: its guide.
        judge: a function of frames, and a mask where they are ragged, that returns {factor: logits (B, K)}, such as a
            :class:`Judge`.
        clips: real clips with labels, which did not train the model.
        keep: the latents that stay the clip's, such as ``["d", "z"]``.
        factors: the factors that should stay the clip's; None for the motion factors of `clips` that the judge knows.
        emission: the site to judge; None for the model's last one.
        sample: draw the kept latents from the guide, or use their means.
        seed: seed of all draws; the global random state does not change.
        batch_size: clips per batch.
        **inputs: further arguments of both programs, for any batch.

    Returns:
        {factor: :class:`SampledSwapScores`}, of the factors that the judge knows and the clips have labels of;
        entropies in nats.

    Raises:
        TypeError: `keep` or `factors` is a string.
        ValueError: `keep` is empty or has a site that guide or model does not have; `factors` is empty or has a
            factor that the judge does not know or the clips have no label of; logits of another shape; or, without
            `sample`, a site of the guide that has no mean.

    Example:
        Frames of two pixels: who (s) and what (d).

        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from seqdisent.datasets import Clips
        >>> def model(frames=None, mask=None, *, num_sequences=None, num_steps=None):
        ...     with pyro.plate("sequences", num_sequences):
        ...         half = torch.full((num_sequences, 1), 0.5)
        ...         s, d = (pyro.sample(name, dist.Bernoulli(half).to_event(1)) for name in "sd")
        ...         steps = torch.cat([s, d], -1).unsqueeze(1).expand(-1, num_steps, -1)
        ...         pyro.sample("x", dist.Normal(steps, 0.1).to_event(2), obs=frames)
        >>> def guide(frames, mask=None):
        ...     with pyro.plate("sequences", len(frames)):
        ...         for name, level in zip("sd", frames.mean(1).split(1, -1)):
        ...             pyro.sample(name, dist.Delta(level, event_dim=1))
        >>> def judge(frames):
        ...     who, what = (torch.stack([1 - level, level], -1) for level in (9 * frames.mean(1)).unbind(-1))
        ...     return {"who": who, "what": what}
        >>> who, what = torch.arange(400) % 2, torch.arange(400) // 2 % 2
        >>> frames = torch.stack([who, what], -1).unsqueeze(1).to(torch.uint8)
        >>> clips = Clips(frames, scale=1, labels={"who": who, "what": what}, motion_factors=["what"])
        >>> scores = sampled_swap_accuracy(model, guide, judge, clips, keep=["d"])
        >>> {name: round(float(score.accuracy), 1) for name, score in scores.items()}
        {'who': 0.5, 'what': 1.0}

    References:
        Zhu et al. S3VAE: self-supervised sequential VAE for representation disentanglement and data generation, CVPR
        2020. Bai et al. Contrastively disentangled sequential variational autoencoder (C-DSVAE), NeurIPS 2021.
    """
    for argument, names in (("keep", keep), ("factors", factors or ())):
        if isinstance(names, str):
            raise TypeError(f"{argument}: got the string {names!r}, expected a sequence such as [{names!r}]")
    if not keep:
        raise ValueError("keep: is empty, expected at least one latent of the guide")
    check_positive(batch_size=batch_size)
    said: dict[str, list[Tensor]] = {}
    with kept_random_state(), torch.no_grad():
        torch.manual_seed(seed)
        for rows in torch.arange(len(clips)).split(batch_size):
            for name, logits in _judged(model, guide, judge, clips.batch(rows), keep, emission, sample, inputs).items():
                said.setdefault(name, []).append(logits)
    predictions = {name: torch.cat(parts) for name, parts in said.items() if name in clips.labels}
    kept = [name for name in clips.motion_factors if name in predictions] if factors is None else factors
    if not kept or not set(kept) <= set(predictions):
        raise ValueError(
            f"factors: got {list(kept)}, expected some of those that the judge knows and the clips have labels of, "
            f"{sorted(predictions)}"
        )
    num_classes = {name: logits.shape[-1] for name, logits in predictions.items()}
    found = _entropies_and_confidence("judge", predictions, num_classes)
    device = next(iter(predictions.values())).device
    labels = class_numbers("clips.labels", clips.labels, num_classes, device=device, count=len(clips))
    scores = {}
    for name, logits in predictions.items():
        table = tabulate(labels[name], logits.argmax(-1), num_classes[name])
        independent = (table.sum(0).double() * table.sum(1)).sum() / table.sum().double() ** 2
        accuracy, chance = shares(table)
        scores[name] = SampledSwapScores(name in kept, accuracy, independent, chance, found[name][0])
    return scores


def _judged(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    judge: Callable[..., Mapping[str, Tensor]],
    batch: Batch,
    keep: Sequence[str],
    emission: str | None,
    sample: bool,
    inputs: Mapping[str, Any],
) -> Mapping[str, Tensor]:
    """Return the judge's logits for clips with the latents `keep` of a batch and all others from the prior."""
    mask: dict[str, Any] = {"mask": batch.mask} if batch.ragged else {}
    known: dict[str, Any] = {} if batch.covariates is None else {"covariates": batch.covariates}
    inferred = infer(guide, *frames_and_mask(batch), sample=sample, **inputs)
    if unknown := sorted(set(keep) - set(inferred)):
        raise ValueError(f"keep: the guide has no site {unknown}, expected some of {sorted(inferred)}")
    drawn = generate(
        model,
        num_sequences=len(batch.frames),
        num_steps=batch.frames.shape[1],
        given={name: inferred[name].value for name in keep},
        emissions=None if emission is None else [emission],
        **mask,
        **known,
        **inputs,
    )
    return judge(next(iter(drawn.values())).mean, *mask.values())
