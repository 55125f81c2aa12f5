"""Measures that need labels: what a judge sees in swaps, reconstructions and drawn clips, and what probes find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seqdisent.datasets import Clips, Sequences
from seqdisent.datasets._progress import progress
from seqdisent.datasets.batch import frames_and_mask
from seqdisent.evaluation._generated import measure_generated
from seqdisent.evaluation._programs import Programs, batches
from seqdisent.metrics import (
    AccuracyConsistency,
    FrechetDistance,
    GenerationEntropies,
    Judge,
    SwapAccuracy,
    intervention_score,
    probe_table,
)

PROBED_CLIPS = 2000  # training clips that probes learn from


def varied(data: Sequences) -> list[str]:
    """Return the labels that have more than one value."""
    return [name for name, label in data.labels.items() if len(label.unique()) > 1]


def measure_judged(
    programs: Programs, train: Clips, held_out: Clips, donors: Tensor | None, judge: Judge, seed: int, batch_size: int
) -> dict[str, Any]:
    """Measure what a judge sees in held-out clips, each with a fixed donor; what comes from the prior is sampled."""
    factors = judge.num_classes
    static = [name for name in held_out.static_factors if name in factors]
    motion = [name for name in held_out.motion_factors if name in factors]
    known = {name: size for name, size in factors.items() if name in (*static, *motion)}  # what each should follow
    swaps: dict[str, tuple[Sequence[str], Sequence[str], SwapAccuracy]] = {}
    if known and donors is not None and programs.static:
        # an identity is swapped under the clip's own motion, whatever the guide infers motion from
        swaps["identity"] = programs.static, programs.motion, SwapAccuracy(known, static)
        if programs.motion:
            swaps["motion"] = programs.motion, (), SwapAccuracy(known, motion)
    consistency = AccuracyConsistency(factors)
    entropies = {name: GenerationEntropies(factors) for name in ("real clips", "reconstruction", "prior")}
    distances = {  # of features, which are computed once
        name: FrechetDistance(lambda features: features, judge.num_features, "the judge's features")
        for name in entropies
    }
    of_train = torch.cat([judge.features(batch.frames, batch.mask) for _, batch in batches(train, batch_size)])
    beside = of_train[some_rows(train, len(held_out), seed)]  # as many as are compared with them
    for distance in distances.values():
        distance.update(beside, real=True)
    features: dict[str, list[Tensor]] = {name: [] for name in entropies}
    answers: dict[str, list[dict[str, Tensor]]] = {name: [] for name in entropies}
    torch.manual_seed(seed)
    for rows, batch in progress(list(batches(held_out, batch_size)), "held-out clips"):
        given = frames_and_mask(batch)
        found = programs.reconstruct(*given)
        drawn = programs.generate(len(rows), batch.frames.shape[1])
        said = {}
        for name, clips in zip(entropies, (batch.frames, found, drawn), strict=True):
            said[name] = judge(clips, batch.mask)
            entropies[name].update(said[name])
            answers[name].append(said[name])
            features[name].append(judge.features(clips, batch.mask))
            distances[name].update(features[name][-1], real=False)
        consistency.update(said["real clips"], said["reconstruction"])
        if not swaps or donors is None:
            continue
        other = held_out.batch(donors[rows])
        for sites, keep, accuracy in swaps.values():
            accuracy.update(judge(*programs.swap(batch, other, sites, keep)), batch.labels, other.labels)
    scores = {name: accuracy.compute() for name, (*_, accuracy) in swaps.items()}
    agreement = consistency.compute()
    of_all = {"training clips": beside, **{name: torch.cat(parts) for name, parts in features.items()}}
    said_of_all = {
        name: {factor: torch.cat([of[factor] for of in parts]) for factor in factors} for name, parts in answers.items()
    }
    generated = measure_generated(programs, train, held_out, judge, of_train, of_all, said_of_all, seed, batch_size)
    follow = {score.follows for of in scores.values() for score in of.values()}
    return {
        "judge": judge.accuracy,
        "consistency": {**agreement.agreement, "average": agreement.average},
        "swaps": {name: {factor: score._asdict() for factor, score in of.items()} for name, of in scores.items()},
        "intervention_score": intervention_score(list(scores.values())) if follow == {True, False} else None,
        "entropies": {
            name: {factor: score._asdict() for factor, score in metric.compute().items()}
            for name, metric in entropies.items()
        },
        "frechet": {name: metric.compute()._asdict() for name, metric in distances.items()},
        "confusion": {name: accuracy.confusion() for name, (*_, accuracy) in swaps.items()},
        **generated,
    }


def some(data: Sequences, count: int, seed: int) -> Sequences:
    return data.subset(some_rows(data, count, seed))


def some_rows(data: Sequences, count: int, seed: int) -> Tensor:
    return torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count]


def measure_probes(
    programs: Programs, train: Sequences, held_out: Sequences, factors: Sequence[str], seed: int, batch_size: int
) -> dict[str, Any]:
    """Measure what is told from the posterior means of each site of who and what."""
    clips = some(train, PROBED_CLIPS, seed), held_out
    sites = [*programs.static, *programs.motion]
    num_steps = max(half.values.shape[1] for half in clips) if isinstance(held_out, Clips) else None
    learnt, tested = (latents(programs, half, sites, batch_size, num_steps) for half in clips)
    labels = [{name: half.labels[name] for name in factors} for half in clips]
    return {
        kind: {
            site: {factor: score._asdict() for factor, score in of.items()}
            for site, of in probe_table(learnt, labels[0], tested, labels[1], kind=kind, seed=seed).items()
        }
        for kind in ("linear", "mlp")
    }


def latents(
    programs: Programs, data: Sequences, sites: Sequence[str], batch_size: int, num_steps: int | None
) -> dict[str, Tensor]:
    """Return the posterior means (N, D) of sites.

    A trajectory is `num_steps` in a row, 0 where a clip has ended, or, for None, its mean over the real steps.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in sites}
    for _, batch in progress(list(batches(data, batch_size)), "latents"):
        found = programs.infer(*frames_and_mask(batch))
        for name, values in parts.items():
            value = found[name].value
            if programs.latents[name].is_trajectory:
                steps = torch.where(batch.mask.unsqueeze(-1), value.reshape(*value.shape[:2], -1), 0.0)
                if num_steps is None:
                    value = steps.sum(1) / batch.mask.sum(1, keepdim=True)
                else:
                    value = nn.functional.pad(steps, (0, 0, 0, num_steps - value.shape[1]))
            values.append(value.flatten(1))
    return {name: torch.cat(values) for name, values in parts.items()}
