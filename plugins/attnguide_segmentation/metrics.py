"""Metrics of regions, and a loss for rare attributes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnguide.errors import InputError
from attnguide_segmentation.regions import REGIONS

__all__ = ["balanced_bce", "region_iou", "right_regions"]


def balanced_bce(logits: Tensor, labels: Tensor, prevalence: Tensor) -> Tensor:
    """Binary cross entropy in which presence and absence of an attribute weigh the same, however rare one is.

    A sample with an attribute of prevalence p weighs 1 / 2p, a sample without it 1 / 2(1 − p).

    Args:
        logits: Logits `(B, K)`.
        labels: Labels 0 or 1, `(B, K)`.
        prevalence: Share of the training data with each attribute, `(K,)`, between 0 and 1.

    Returns:
        A scalar.

    Raises:
        InputError: If a prevalence is not between 0 and 1.
    """
    if not bool(((prevalence > 0) & (prevalence < 1)).all()):
        index = int((~((prevalence > 0) & (prevalence < 1))).nonzero()[0])
        raise InputError(
            f"prevalence of attribute {index} is {float(prevalence[index])}: it must lie between 0 and 1. "
            "Leave out attributes that all samples have, or none."
        )
    share = prevalence.to(logits)
    weights = torch.where(labels > 0.5, 0.5 / share, 0.5 / (1 - share))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits), weights)


def region_iou(found: Tensor, truth: Tensor, regions: int = len(REGIONS)) -> Tensor:
    """Intersection over union of each region, over all pixels of all images.

    Args:
        found: Predicted indices of the regions, of any shape.
        truth: True indices, of the same shape.
        regions: Number of regions R.

    Returns:
        `(R,)` in [0, 1]; NaN for a region that occurs in neither.

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


def right_regions(weights: Tensor, table: Tensor) -> Tensor:
    """Find the attributes for which a region that shows them has the largest weight.

    Args:
        weights: Weight of each region for each attribute, `(R, K)`; the first region is the background.
        table: Regions that show each attribute, `(K, R)`, 0 or 1; see
            [`attribute_table`][attnguide_segmentation.attributes.attribute_table].

    Returns:
        `(K,)`: 1 or 0; NaN for an attribute without a region, and for worn things, which lie on the
        background.
    """
    most = weights.argmax(dim=0)[:, None]
    placed = (table.sum(dim=1) > 0) & (table[:, 0] == 0)
    return torch.where(placed, table.gather(1, most)[:, 0].to(weights.dtype), torch.nan)
