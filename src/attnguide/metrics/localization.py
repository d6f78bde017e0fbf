"""Measures of how well maps lie on masks.

Each is a function, which gives one score for each map, and a `Metric` of torchmetrics, their mean. A map
without a positive value points nowhere: it scores 0, and is never left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnguide import functional
from attnguide.errors import InputError
from attnguide.functional import full_precision
from attnguide.metrics._mean import MeanMetric

__all__ = [
    "Cosine",
    "EnergyInMask",
    "IoU",
    "PointingGame",
    "RelevanceRank",
    "cosine",
    "energy_in_mask",
    "iou",
    "pointing_game",
    "relevance_rank",
]


def energy_in_mask(maps: Tensor, masks: Tensor) -> Tensor:
    """Energy pointing game: the share of the positive attribution that lies in the mask, Σ S·A⁺ / Σ A⁺.

    Args:
        maps: Attributions `(N, H, W)`, any scale.
        masks: `(N, H, W)`, or `(H, W)` for all, in [0, 1].

    Returns:
        Shares `(N,)` in [0, 1]; 0 for a map without a positive value, which points nowhere.

    Raises:
        InputError: If the shapes do not fit, or a map is not finite.
    """
    maps, masks = _fitting(maps, masks)
    positive = functional.unit(maps)
    total = positive.sum(dim=(1, 2))
    return (positive * masks).sum(dim=(1, 2)) / torch.where(total > 0, total, torch.ones_like(total))


def iou(maps: Tensor, masks: Tensor, *, threshold: float = 0.5) -> Tensor:
    """IoU@t: overlap of the mask with the positions where the map is above a threshold.

    The positive part of the map is scaled to [0, 1] by its minimum and maximum. Choose the threshold on
    held-out data, and state it.

    Args:
        maps: Attributions `(N, H, W)`, any scale.
        masks: `(N, H, W)`, or `(H, W)` for all; above 0.5 is inside.
        threshold: Threshold in [0, 1).

    Returns:
        `(N,)` in [0, 1]; 0 if both are empty.

    Raises:
        InputError: If the shapes do not fit, a map is not finite, or the threshold is out of range.
    """
    if not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
        raise InputError(f"threshold={threshold!r} must be at least 0 and below 1.")
    maps, masks = _fitting(maps, masks)
    seen, inside = functional.min_max(maps.relu()) > threshold, masks > 0.5
    overlap = (seen & inside).sum(dim=(1, 2))
    return overlap / (seen | inside).sum(dim=(1, 2)).clamp(min=1)


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Pointing game: whether the largest value lies in the mask (Zhang et al., ECCV 2016).

    Args:
        maps: Attributions `(N, H, W)`, any scale; of several largest values the first counts.
        masks: `(N, H, W)`, or `(H, W)` for all; above 0.5 is inside.

    Returns:
        0 or 1, `(N,)`.

    Raises:
        InputError: If the shapes do not fit, or a map is not finite.
    """
    maps, masks = _fitting(maps, masks)
    flat = maps.flatten(1)
    peak = flat.argmax(dim=1, keepdim=True)
    hit = (masks.flatten(1).gather(1, peak) > 0.5) & (flat.gather(1, peak) > 0)
    return hit[:, 0].float()


def cosine(maps: Tensor, masks: Tensor) -> Tensor:
    """Cosine between map and mask: CAM-COS or ATT-COS, depending on the map (Belharbi et al., FG 2024).

    Args:
        maps: Attributions `(N, H, W)`, any scale, signed or not.
        masks: `(N, H, W)`, or `(H, W)` for all, in [0, 1].

    Returns:
        `(N,)` in [−1, 1]; 0 where either is zero throughout.

    Raises:
        InputError: If the shapes do not fit, or a map is not finite.
    """
    return 1 - functional.cosine_loss(*_fitting(maps, masks))


def relevance_rank(maps: Tensor, masks: Tensor) -> Tensor:
    """Relevance rank accuracy: the share of the K highest pixels in the mask, with K its size.

    Arras et al., Information Fusion 2022, eq. 5.

    Args:
        maps: Attributions `(N, H, W)`, any scale; where values tie, the first count.
        masks: `(N, H, W)`, or `(H, W)` for all; above 0.5 is inside.

    Returns:
        `(N,)` in [0, 1]; 0 for an empty mask, and for a map without a positive value.

    Raises:
        InputError: If the shapes do not fit, or a map is not finite.
    """
    maps, masks = _fitting(maps, masks)
    flat, inside = maps.flatten(1), (masks > 0.5).flatten(1)
    size = inside.sum(dim=1, keepdim=True)
    order = flat.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(flat.shape[1], device=flat.device) < size
    hits = (inside.gather(1, order) & first).sum(dim=1)
    return torch.where(flat.amax(dim=1) > 0, hits / size[:, 0].clamp(min=1), 0.0)


def _fitting(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    if maps.ndim != 3 or masks.shape not in (maps.shape, maps.shape[1:]):
        raise InputError(
            f"maps {tuple(maps.shape)} and masks {tuple(masks.shape)} do not fit: give (N, H, W), and masks "
            "alike or (H, W)."
        )
    if not bool(maps.isfinite().all()):
        raise InputError("maps are not finite: the model or the source gave NaN or infinity.")
    maps = full_precision(maps)
    return maps, masks.to(maps).expand_as(maps)


class EnergyInMask(MeanMetric):
    """Mean of [`energy_in_mask`][attnguide.metrics.energy_in_mask]."""

    def score(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Compute the scores of a batch, `(N,)`."""
        return energy_in_mask(maps, masks)


class IoU(MeanMetric):
    """Mean of [`iou`][attnguide.metrics.iou].

    Args:
        threshold: Threshold in [0, 1).
    """

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold

    def score(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Compute the scores of a batch, `(N,)`."""
        return iou(maps, masks, threshold=self.threshold)


class PointingGame(MeanMetric):
    """Mean of [`pointing_game`][attnguide.metrics.pointing_game]."""

    def score(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Compute the scores of a batch, `(N,)`."""
        return pointing_game(maps, masks)


class Cosine(MeanMetric):
    """Mean of [`cosine`][attnguide.metrics.cosine]."""

    def score(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Compute the scores of a batch, `(N,)`."""
        return cosine(maps, masks)


class RelevanceRank(MeanMetric):
    """Mean of [`relevance_rank`][attnguide.metrics.relevance_rank]."""

    def score(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Compute the scores of a batch, `(N,)`."""
        return relevance_rank(maps, masks)
