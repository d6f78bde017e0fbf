"""Analyses of the masks over a data set: similar attributes, similar channels, and important channels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from attnguide.adapters import AdapterSet, trace_for
from attnguide.errors import InputError
from attnguide_multichannel.adapted import multichannel_of
from attnguide_multichannel.attention import MultiChannel

__all__ = ["Analysis", "Likeness", "MaskStatistics", "analyze", "clustered"]

#: Quantities by which attributes can be compared.
Likeness = Literal["masks", "scores", "both"]


@dataclass(frozen=True)
class Analysis:
    """Results of an analysis of a data set.

    Attributes:
        classes: Names of the K attributes.
        attributes: Correlation of the masks of each two attributes, over all channels, positions and
            samples, `(K, K)` in [-1, 1].
        scores: Correlation of the scores of each two attributes over the samples, `(K, K)` in [-1, 1].
        channels: Correlation of the masks of each two channels, over all attributes, positions and samples,
            `(C, C)` in [-1, 1].
        importance: Importance of each channel for each attribute: standard deviation over the samples of its
            contribution to the score, in units of logits, `(K, C)`.
        maps: Mean over the samples and channels of each attribute's mask, `(K, h, w)`.
        samples: Number of samples.
    """

    classes: tuple[str, ...]
    attributes: Tensor
    scores: Tensor
    channels: Tensor
    importance: Tensor
    maps: Tensor
    samples: int

    def correlated(self, count: int = 5, by: Likeness = "both") -> dict[str, list[tuple[str, float]]]:
        """List for each attribute the most similar attributes, with their likeness.

        Args:
            count: Number of attributes listed; all others if there are fewer.
            by: Measure of likeness. `"masks"`: correlation of the masks, high if two attributes depend on the
                same places and features. `"scores"`: correlation of the scores without its sign, high if they
                occur together or exclude each other. `"both"`: the mean of the two.

        Returns:
            For each attribute pairs of a name and a likeness, the highest first.

        Raises:
            InputError: If `by` is unknown.
        """
        others = self.likeness(by)
        others.fill_diagonal_(-torch.inf)
        best = others.topk(min(count, len(self.classes) - 1), dim=1)
        return {
            name: [
                (self.classes[index], value)
                for index, value in zip(indices.tolist(), values.tolist(), strict=True)
            ]
            for name, indices, values in zip(self.classes, best.indices, best.values, strict=True)
        }

    def likeness(self, by: Likeness = "both") -> Tensor:
        """Return the likeness of each two attributes, `(K, K)` in [-1, 1]; see `correlated`.

        Raises:
            InputError: If `by` is unknown.
        """
        if by not in get_args(Likeness):
            raise InputError(f"by={by!r} must be one of {', '.join(get_args(Likeness))}.")
        masks, scores = self.attributes, self.scores.abs()
        return {"masks": masks, "scores": scores, "both": (masks + scores) / 2}[by].clone()

    def matters(self, attribute: str, count: int = 5) -> list[tuple[int, float]]:
        """List the channels that matter most to an attribute, with their shares of its importance.

        Args:
            attribute: Name of the attribute.
            count: Number of channels listed.

        Raises:
            InputError: If the attribute is unknown.
        """
        if attribute not in self.classes:
            raise InputError(f"there is no attribute {attribute!r}; there are {', '.join(self.classes)}.")
        own = self.importance[self.classes.index(attribute)]
        shares = own / own.sum().clamp(min=torch.finfo(own.dtype).tiny)
        best = shares.topk(min(count, len(shares)))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    @property
    def ranking(self) -> Tensor:
        """Channels `(C,)`, the least important first: an order for pruning.

        Attributes have equal weights: a channel's importance is the sum of its shares over the attributes.
        """
        total = self.importance.sum(dim=1, keepdim=True)
        shares = self.importance / total.clamp(min=torch.finfo(total.dtype).tiny)
        return shares.sum(dim=0).argsort(stable=True)


class MaskStatistics:
    """Gathers the statistics of an analysis, batch by batch, without holding all masks in memory.

    Args:
        adapter: The multi-channel attention, whose weights must not change in between.
    """

    def __init__(self, adapter: MultiChannel) -> None:
        self.adapter = adapter
        self.samples = 0
        count, channels = adapter.weight.shape
        place = adapter.weight.device
        self._sum = torch.zeros(count, channels, dtype=torch.float64, device=place)
        self._squares = torch.zeros_like(self._sum)
        self._scores = torch.zeros(count, count, dtype=torch.float64, device=place)
        self._products: tuple[Tensor, ...] = ()
        self._maps: Tensor | None = None

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add a batch.

        Args:
            features: Features `(B, C, h, w)`, of one size in all batches.

        Raises:
            InputError: If the grid differs from the one before.
        """
        adapter = self.adapter
        if self._maps is not None and features.shape[2:] != self._maps.shape[1:]:
            raise InputError(
                f"features have a grid of {tuple(features.shape[2:])}, those before had "
                f"{tuple(self._maps.shape[1:])}; give images of one size."
            )
        maps = adapter.mean_masks(features).double().sum(dim=0)
        products = adapter.masking.sums(features)
        if self._maps is None:
            self._maps, self._products = maps, products
        else:
            self._maps += maps
            self._products = tuple(map(torch.add, self._products, products))
        added = (adapter.attended(features) * adapter.weight).double()
        self._sum += added.sum(dim=0)
        scores = added.sum(dim=2)
        self._scores += scores.T @ scores
        self._squares += added.square().sum(dim=0)
        self.samples += len(features)

    @torch.no_grad()
    def result(self, classes: Sequence[str]) -> Analysis:
        """Compute the analysis.

        Args:
            classes: Names of the K attributes.

        Raises:
            InputError: If there was no batch, or the number of names is wrong.
        """
        adapter = self.adapter
        if self._maps is None:
            raise InputError("there are no images to analyze. Give at least one batch.")
        if len(classes) != len(adapter.weight):
            raise InputError(f"{len(classes)} names were given for {len(adapter.weight)} attributes.")
        mean = self._sum / self.samples
        variance = self._squares / self.samples - mean.square()
        attributes, channels = adapter.masking.covariances(*self._products)
        return Analysis(
            tuple(classes),
            _correlation(attributes),
            _correlation(self._scores / self.samples - torch.outer(mean.sum(dim=1), mean.sum(dim=1))),
            _correlation(channels),
            variance.clamp(min=0).sqrt().float().cpu(),
            (self._maps / self.samples).float().cpu(),
            self.samples,
        )


def analyze(
    adapted: AdapterSet, batches: Iterable[Tensor], classes: Sequence[str], *, progress: bool = False
) -> Analysis:
    """Analyze a data set.

    Args:
        adapted: The model and its multi-channel attention.
        batches: Batches of images `(B, 3, H, W)`, as the model expects them.
        classes: Names of the K attributes.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The analysis.

    Raises:
        InputError: If there is no multi-channel attention or no image, or the names do not fit.
    """
    from attnguide.cli.console import track

    statistics = MaskStatistics(multichannel_of(adapted))
    for images in track(batches, "Analyzing", show=progress):
        statistics.update(trace_for(statistics.adapter, adapted.model, images).feature.spatial)
    return statistics.result(classes)


def clustered(correlation: Tensor) -> tuple[list[int], Tensor]:
    """Order attributes or channels so that similar ones are neighbours.

    Args:
        correlation: Correlations `(N, N)`.

    Returns:
        Their order, and the tree of average linkage that it comes from, with distances 1 − correlation, as
        `scipy.cluster.hierarchy` writes it, `(N - 1, 4)`; `(0, 4)` for N = 1.
    """
    if len(correlation) < 2:
        return list(range(len(correlation))), correlation.new_zeros(0, 4)
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = (1 - correlation).clamp(min=0).fill_diagonal_(0)
    tree = linkage(squareform(((distance + distance.T) / 2).numpy(), checks=False), method="average")
    return [int(leaf) for leaf in leaves_list(tree)], torch.from_numpy(tree)


def _correlation(covariance: Tensor) -> Tensor:
    """Compute correlations, in float32 on the CPU; 0 for a value that does not vary, 1 with itself."""
    size = covariance.diagonal().clamp(min=0).sqrt()
    divisor = torch.where(size > 0, size, torch.ones_like(size))
    correlation = (covariance / divisor[:, None] / divisor).clamp(-1, 1).float().cpu()
    return correlation.fill_diagonal_(1)
