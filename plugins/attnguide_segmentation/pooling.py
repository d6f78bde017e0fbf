"""Adapters that answer from pooled features: SSP, and what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnguide.errors import InputError
from attnguide.functional import full_precision
from attnguide.interfaces import Adapter
from attnguide.trace import Trace
from attnguide_segmentation.finder import RegionFinder
from attnguide_segmentation.regions import REGIONS, resized

__all__ = ["SSP", "PyramidPooling", "region_means"]


def region_means(features: Tensor, masks: Tensor) -> Tensor:
    """Average features inside each region.

    Args:
        features: Features `(B, C, h, w)`.
        masks: Masks `(B, R, h, w)`, at least 0.

    Returns:
        `(B, R, C)`; zeros for an empty region.
    """
    flat, weights = full_precision(features).flatten(2), full_precision(masks).flatten(2)
    total = weights.sum(dim=2, keepdim=True)
    weights = weights / torch.where(total > 0, total, torch.ones_like(total))
    return torch.bmm(weights.to(flat.dtype), flat.transpose(1, 2))


class SSP(Adapter):
    """Semantic-segmentation-based pooling: predicts from each region separately, and learns their weights.

    The features of a layer are averaged inside each region. One linear branch recognises the attributes in
    each region; the softmax of another one over the regions, for each attribute, gives the weights of these
    predictions.

    Args:
        channels: Number of channels C of the layer's features.
        classes: Number of attributes K.
        regions: Source of the masks.
        layer: Name of the layer; by default the last one that has rows and columns.
        names: Names of the regions.
        normalize: Whether to scale the features of each region to mean 0 and deviation 1 over the channels,
            so that regions compete on equal terms; all weights are then equal at first, and are learned
            slowly. As published, the regions with the largest features win early.

    Source: Kalayeh, Gong and Shah, CVPR 2017, section 3.1.2.
    """

    name = "ssp"

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        regions: RegionFinder | None = None,
        layer: str = "auto",
        names: Sequence[str] = REGIONS,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.names, self.normalize = layer, tuple(names), normalize
        self.settings = {
            "channels": channels,
            "classes": classes,
            "layer": layer,
            "names": list(names),
            "normalize": normalize,
        }
        self.finder = regions or RegionFinder(count=len(self.names))
        self.recognition = nn.Linear(channels, classes)
        self.localisation = nn.Linear(channels, classes)
        if normalize:
            nn.init.zeros_(self.localisation.weight)
            nn.init.zeros_(self.localisation.bias)

    def forward(self, trace: Trace) -> Tensor:
        """Average the scores of the regions by their weights; logits `(B, K)`."""
        scores, weights = self.branches(trace.feature.spatial, self.finder(trace.images))
        return (scores * weights).sum(dim=1)

    def branches(self, features: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Compute scores and weights of each region.

        Args:
            features: Features `(B, C, h, w)`.
            masks: Masks `(B, R, H, W)`, of any resolution.

        Returns:
            Scores and weights, both `(B, R, K)`; weights sum to 1 over the regions.
        """
        size = (features.shape[-2], features.shape[-1])
        pooled = region_means(features, resized(masks, size, self.names)).to(self.recognition.weight.dtype)
        if self.normalize:
            pooled = F.layer_norm(pooled, pooled.shape[-1:])
        logits = self.localisation(pooled)
        if self.normalize:  # as in attention: else steps are larger than for one feature by √C
            logits = logits / pooled.shape[-1] ** 0.5
        return self.recognition(pooled), logits.softmax(dim=1)


class PyramidPooling(Adapter):
    """Predicts from a spatial pyramid: means over the whole, over quarters, and so on.

    With `levels=(1,)` it is average pooling and one linear layer, with `(1, 2)` the publication's SPPNet*.

    Args:
        channels: Number of channels C of the layer's features.
        classes: Number of attributes K.
        levels: Number of cells on a side, for each level.
        layer: Name of the layer; by default the last one that has rows and columns.

    Raises:
        InputError: If `levels` is empty, or a level is below 1.
    """

    name = "pyramid"

    def __init__(
        self, channels: int, classes: int, *, levels: Sequence[int] = (1, 2), layer: str = "auto"
    ) -> None:
        super().__init__()
        if not levels or min(levels) < 1:
            raise InputError(f"levels={levels!r} must list at least one number of cells, each at least 1.")
        self.layer, self.levels = layer, tuple(levels)
        self.settings = {
            "channels": channels,
            "classes": classes,
            "levels": list(levels),
            "layer": layer,
        }
        self.head = nn.Linear(channels * sum(level**2 for level in levels), classes)

    def forward(self, trace: Trace) -> Tensor:
        """Pool and classify; logits `(B, K)`."""
        features = trace.feature.spatial
        pooled = [F.adaptive_avg_pool2d(features, level).flatten(1) for level in self.levels]
        logits: Tensor = self.head(torch.cat(pooled, dim=1))
        return logits
