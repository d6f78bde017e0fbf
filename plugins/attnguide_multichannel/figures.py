"""Figures of multi-channel attention. They need `pip install attnguide[figures]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from attnguide import visual
from attnguide.errors import InputError
from attnguide.functional import min_max
from attnguide_multichannel.analysis import Analysis, clustered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["correlation_figure", "mask_figure", "place_figure", "reconstruction_sheet"]


def correlation_figure(correlation: Tensor, names: Sequence[str] | None = None) -> Figure:
    """Draw a matrix of correlations, ordered by likeness, under the tree of the order.

    Args:
        correlation: Correlations `(N, N)` in [-1, 1].
        names: Names of the rows; None to write no names.

    Returns:
        The figure.
    """
    figure = _figure(7.5, 8.0)
    order, tree = clustered(correlation)
    above, below = figure.subplots(2, 1, height_ratios=[1, 6])
    above.axis("off")
    if len(tree) and tree[:, 2].max() > 0:  # else all are the same
        from scipy.cluster.hierarchy import dendrogram

        dendrogram(tree.numpy(), ax=above, no_labels=True, color_threshold=0, above_threshold_color="#456")
        above.set_xlim(0, 10 * len(order))
    picture = below.imshow(
        correlation[order][:, order].numpy(), vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto"
    )
    if names is None:
        below.set_xticks([])
        below.set_yticks([])
    else:
        ordered = [names[index] for index in order]
        below.set_xticks(range(len(order)), ordered, rotation=60, ha="right")
        below.set_yticks(range(len(order)), ordered)
    figure.colorbar(picture, ax=below, label="correlation", shrink=0.6, location="bottom")
    return figure


def place_figure(analysis: Analysis, columns: int = 8) -> Figure:
    """Draw the mean of each attribute's masks over channels and samples."""
    rows = -(-len(analysis.classes) // columns)
    figure = _figure(1.25 * columns, 1.5 * rows)
    for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if number < len(analysis.classes):
            axes.imshow(analysis.maps[number].numpy(), cmap="magma", vmin=0)
            axes.set_title(analysis.classes[number], fontsize=8)
    return figure


def mask_figure(masks: Tensor, analysis: Analysis, count: int = 12) -> Figure:
    """Draw masks of one image: a row for each attribute, with the channels that matter most to it.

    Args:
        masks: Masks of one image, `(K, C, h, w)`.
        analysis: Analysis with the importance of the channels.
        count: Number of channels for each attribute.

    Returns:
        The figure; the number under a mask is its channel, and each mask has its own scale.
    """
    count = min(count, masks.shape[1])
    figure = _figure(1.4 + 0.62 * count, 0.68 * len(masks))
    grid = figure.subplots(len(masks), count, squeeze=False)
    for row, name in enumerate(analysis.classes):
        for column, (channel, _) in enumerate(analysis.matters(name, count)):
            axes = grid[row, column]
            axes.imshow(min_max(masks[row, channel][None])[0].numpy(), cmap="magma")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(str(channel), fontsize=6, labelpad=1)
        grid[row, 0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    return figure


def reconstruction_sheet(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Put images above their reconstructions.

    Args:
        images: Images `(B, C, H, W)`, as the model takes them.
        reconstructions: Output of the reconstructor `(B, C, h, w)`.

    Returns:
        RGB in [0, 1], `(3, 2H, B·W)`.
    """
    low = images.amin(dim=(1, 2, 3), keepdim=True)
    scale = (images.amax(dim=(1, 2, 3), keepdim=True) - low).clamp(min=1e-6)
    large = F.interpolate(reconstructions, size=images.shape[-2:], mode="nearest")
    rows = [((part - low) / scale).clamp(0, 1) for part in (images, large)]
    rows = [visual.displayable(row) if row.shape[1] != 3 else row for row in rows]
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("figures need matplotlib: pip install 'attnguide[figures]'.") from error
    return Figure(figsize=(width, height), layout="constrained")
