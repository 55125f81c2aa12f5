"""Metrics of disentanglement, generation, reconstruction and forecasts, for any model.

Metrics that accumulate and probes need the extra ``metrics`` (torchmetrics, scikit-learn), imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from seqdisent.metrics.baselines import linear_interpolation, seasonal_naive, seasonal_naive_draws
from seqdisent.metrics.combinations import CombinationScores, combination_scores
from seqdisent.metrics.counterfactual import nearest_clip, pick_donors, squared_error
from seqdisent.metrics.judge import Judge, train_judge
from seqdisent.metrics.neighbours import (
    MemorisationScores,
    NeighbourScores,
    memorisation_scores,
    neighbour_scores,
)

if TYPE_CHECKING:
    from seqdisent.metrics.consistency import AccuracyConsistency, ConsistencyScores, released_protocol_consistency
    from seqdisent.metrics.entropies import EntropyScores, GenerationEntropies
    from seqdisent.metrics.forecasts import (
        CRPS,
        CoverageScores,
        EnergyScore,
        IntervalCoverage,
        QuantileLoss,
        QuantileScores,
    )
    from seqdisent.metrics.frechet import FrechetDistance, FrechetScore
    from seqdisent.metrics.generation import (
        GenerationScores,
        SampledSwapScores,
        generation_scores,
        sampled_swap_accuracy,
    )
    from seqdisent.metrics.probes import ProbeScores, probe, probe_table
    from seqdisent.metrics.swaps import SwapAccuracy, SwapScores, intervention_score

__all__ = [
    "CRPS",
    "AccuracyConsistency",
    "CombinationScores",
    "ConsistencyScores",
    "CoverageScores",
    "EnergyScore",
    "EntropyScores",
    "FrechetDistance",
    "FrechetScore",
    "GenerationEntropies",
    "GenerationScores",
    "IntervalCoverage",
    "Judge",
    "MemorisationScores",
    "NeighbourScores",
    "ProbeScores",
    "QuantileLoss",
    "QuantileScores",
    "SampledSwapScores",
    "SwapAccuracy",
    "SwapScores",
    "combination_scores",
    "generation_scores",
    "intervention_score",
    "linear_interpolation",
    "memorisation_scores",
    "nearest_clip",
    "neighbour_scores",
    "pick_donors",
    "probe",
    "probe_table",
    "released_protocol_consistency",
    "sampled_swap_accuracy",
    "seasonal_naive",
    "seasonal_naive_draws",
    "squared_error",
    "train_judge",
]

_NEED_THE_EXTRA = {
    "consistency": ("AccuracyConsistency", "ConsistencyScores", "released_protocol_consistency"),
    "entropies": ("EntropyScores", "GenerationEntropies"),
    "forecasts": (
        "CRPS",
        "CoverageScores",
        "EnergyScore",
        "IntervalCoverage",
        "QuantileLoss",
        "QuantileScores",
    ),
    "frechet": ("FrechetDistance", "FrechetScore"),
    "generation": ("GenerationScores", "SampledSwapScores", "generation_scores", "sampled_swap_accuracy"),
    "probes": ("ProbeScores", "probe", "probe_table"),
    "swaps": ("SwapAccuracy", "SwapScores", "intervention_score"),
}
_MODULE_OF = {name: module for module, names in _NEED_THE_EXTRA.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
