"""How good attributes and regions are: error, average precision, balanced accuracy, overlap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnguide.errors import InputError
from attnguide_segmentation.regions import REGIONS

__all__ = [
    "average_precision",
    "balanced_accuracy",
    "balanced_bce",
    "classification_error",
    "region_iou",
    "right_regions",
]


def classification_error(scores: Tensor, labels: Tensor) -> Tensor:
    """Share of the wrong answers, for each attribute.

    Args:
        scores: Logits `(N, K)`; above 0 an attribute is taken to be present.
        labels: 0 or 1, `(N, K)`.

    Returns:
        `(K,)` in [0, 1].

    Raises:
        InputError: If the shapes differ, or there is no sample.
    """
    truth = _checked(scores, labels)
    return ((scores > 0) != truth).float().mean(dim=0)


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Area under the steps of precision over recall, for each attribute.

    The mean, over the samples that have the attribute, of the precision among those that score at least as
    high; samples of equal scores count together, as in scikit-learn.

    Args:
        scores: `(N, K)`, higher for "present".
        labels: 0 or 1, `(N, K)`.

    Returns:
        `(K,)` in [0, 1]; NaN for an attribute that no sample has.

    Raises:
        InputError: If the shapes differ, or there is no sample.
    """
    truth = _checked(scores, labels).double()
    order = scores.argsort(dim=0, descending=True, stable=True)
    ranked, sorted_scores = truth.gather(0, order), scores.gather(0, order)
    hits = ranked.cumsum(dim=0)
    rank = torch.arange(1, len(scores) + 1, device=scores.device, dtype=torch.double)[:, None]
    # Where scores tie, precision is that at the last of them.
    last = torch.ones_like(truth, dtype=torch.bool)
    last[:-1] = sorted_scores[:-1] != sorted_scores[1:]
    at_last = torch.where(last, hits / rank, torch.zeros_like(hits))
    place = torch.where(last, rank, torch.full_like(rank, len(scores)).expand_as(hits))
    following = place.flip(0).cummin(dim=0).values.flip(0).long() - 1
    precision = at_last.gather(0, following)
    return ((precision * ranked).sum(dim=0) / truth.sum(dim=0)).float()


def balanced_accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean of the accuracies among those that have the attribute and those that have not, for each attribute.

    Args:
        scores: Logits `(N, K)`; above 0 an attribute is taken to be present.
        labels: 0 or 1, `(N, K)`.

    Returns:
        `(K,)` in [0, 1]; NaN for an attribute that all have, or none.

    Raises:
        InputError: If the shapes differ, or there is no sample.
    """
    truth = _checked(scores, labels)
    said = scores > 0
    with_it = (said & truth).sum(dim=0) / truth.sum(dim=0)
    without = (~said & ~truth).sum(dim=0) / (~truth).sum(dim=0)
    return (with_it + without) / 2


def balanced_bce(logits: Tensor, labels: Tensor, prevalence: Tensor) -> Tensor:
    """Binary cross entropy in which both answers weigh the same, however rare one is.

    A sample that has an attribute of prevalence p weighs 1 / 2p, another 1 / 2(1 − p).

    Args:
        logits: `(B, K)`.
        labels: 0 or 1, `(B, K)`.
        prevalence: How often each attribute is present in the training data, `(K,)`, between 0 and 1.

    Returns:
        A scalar.

    Raises:
        InputError: If a prevalence is not between 0 and 1.
    """
    if not bool(((prevalence > 0) & (prevalence < 1)).all()):
        index = int((~((prevalence > 0) & (prevalence < 1))).nonzero()[0])
        raise InputError(
            f"prevalence of attribute {index} is {float(prevalence[index])}: it must lie between 0 and 1. "
            "Leave out attributes that all have, or none."
        )
    share = prevalence.to(logits)
    weights = torch.where(labels > 0.5, 0.5 / share, 0.5 / (1 - share))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits), weights)


def region_iou(found: Tensor, truth: Tensor, regions: int = len(REGIONS)) -> Tensor:
    """Intersection over union of each region, over all pixels of all images.

    Args:
        found: Indices of the regions, of any shape.
        truth: The same, of the same shape.
        regions: R, their number.

    Returns:
        `(R,)` in [0, 1]; NaN for a region that is in neither.

    Raises:
        InputError: If the shapes differ.
    """
    if found.shape != truth.shape:
        raise InputError(
            f"found has shape {tuple(found.shape)}, truth {tuple(truth.shape)}; they must agree."
        )
    pairs = torch.bincount((truth.long() * regions + found.long()).flatten(), minlength=regions**2)
    table = pairs.view(regions, regions).double()
    both = table.diagonal()
    return (both / (table.sum(dim=0) + table.sum(dim=1) - both)).float()


def _checked(scores: Tensor, labels: Tensor) -> Tensor:
    if scores.shape != labels.shape or scores.ndim != 2 or not len(scores):
        raise InputError(
            f"scores have shape {tuple(scores.shape)}, labels {tuple(labels.shape)}; both must be (N, K), "
            "N ≥ 1."
        )
    return labels > 0.5


def right_regions(weights: Tensor, table: Tensor) -> Tensor:
    """Tell for which attributes a region that shows them counts most.

    Args:
        weights: How much each region counts for each attribute, `(R, K)`; the first region is the background.
        table: Which regions show each attribute, `(K, R)`, 0 or 1; see
            [`attribute_table`][attnguide_segmentation.attributes.attribute_table].

    Returns:
        `(K,)`: 1 or 0; NaN for an attribute that no place shows, and for what is worn, which lies on the
        background.
    """
    most = weights.argmax(dim=0)[:, None]
    placed = (table.sum(dim=1) > 0) & (table[:, 0] == 0)
    return torch.where(placed, table.gather(1, most)[:, 0].to(weights.dtype), torch.nan)
