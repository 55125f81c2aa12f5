"""What is measured of clips from the prior, beside reconstructions and real clips: near, diverse, new."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from seqdisent.datasets import Clips
from seqdisent.evaluation._programs import Programs
from seqdisent.metrics import (
    Judge,
    combination_scores,
    generation_scores,
    memorisation_scores,
    neighbour_scores,
    sampled_swap_accuracy,
)

NUM_NEIGHBOURS = 5


def measure_generated(
    programs: Programs,
    train: Clips,
    held_out: Clips,
    judge: Judge,
    of_train: Tensor,
    features: Mapping[str, Tensor],
    said: Mapping[str, Mapping[str, Tensor]],
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """Measure clips from the prior, by the judge's features (N, F) and logits of real clips, reconstructions and these.

    `of_train` are the features of all training clips; among `features`, "training clips" are as many as are held out.
    """
    real = features["real clips"]
    found: dict[str, Any] = {}
    if len(real) > NUM_NEIGHBOURS and len(features["training clips"]) > NUM_NEIGHBOURS:
        found["neighbours"] = {
            name: neighbour_scores(real, values, num_neighbours=NUM_NEIGHBOURS)._asdict()
            for name, values in features.items()
            if name != "real clips"
        }
    found["memorisation"] = {
        name: memorisation_scores(features[name], real, of_train)._asdict() for name in ("reconstruction", "prior")
    }
    scores = generation_scores(said["prior"], said["real clips"], judge.num_classes)
    found["confidence"] = {
        name: {"real clips": float(score.real_confidence), "prior": float(score.confidence)}
        for name, score in scores.items()
    }
    static = {name: size for name, size in judge.num_classes.items() if name in held_out.static_factors}
    if len(static) > 1:
        drawn = {name: said["prior"][name] for name in static}
        found["combinations"] = combination_scores(drawn, train.labels, held_out.labels, static)._asdict()
    if programs.static and programs.motion and set(held_out.motion_factors) & set(judge.num_classes):
        how: dict[str, Any] = {**programs.inputs, "emission": programs.emission, "sample": programs.sample}
        swaps = sampled_swap_accuracy(
            programs.model,
            programs.guide,
            judge,
            held_out,
            keep=programs.motion,
            seed=seed,
            batch_size=batch_size,
            **how,
        )
        found["sampled_swaps"] = {
            name: {**score._asdict(), "entropies": score.entropies._asdict()} for name, score in swaps.items()
        }
    return found
