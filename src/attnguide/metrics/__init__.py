"""Measures of predictions, of where maps lie, and of how faithful maps are to the model.

Pure functions, and for each a `Metric` of [torchmetrics](https://lightning.ai/docs/torchmetrics), which
gathers batches and syncs across processes.
"""

from attnguide.metrics.classification import (
    AveragePrecision,
    BalancedAccuracy,
    WorstGroupAccuracy,
    average_precision,
    balanced_accuracy,
    classification_error,
    group_accuracy,
)
from attnguide.metrics.faithfulness import Deletion, Insertion, deletion, insertion, occlusion
from attnguide.metrics.localization import (
    Cosine,
    EnergyInMask,
    IoU,
    PointingGame,
    RelevanceRank,
    cosine,
    energy_in_mask,
    iou,
    pointing_game,
    relevance_rank,
)
from attnguide.metrics.perturbation import confidence_change, road, sensitivity
from attnguide.metrics.swapping import SwappedAccuracy, swapped_accuracy

__all__ = [
    "AveragePrecision",
    "BalancedAccuracy",
    "Cosine",
    "Deletion",
    "EnergyInMask",
    "Insertion",
    "IoU",
    "PointingGame",
    "RelevanceRank",
    "SwappedAccuracy",
    "WorstGroupAccuracy",
    "average_precision",
    "balanced_accuracy",
    "classification_error",
    "confidence_change",
    "cosine",
    "deletion",
    "energy_in_mask",
    "group_accuracy",
    "insertion",
    "iou",
    "occlusion",
    "pointing_game",
    "relevance_rank",
    "road",
    "sensitivity",
    "swapped_accuracy",
]
