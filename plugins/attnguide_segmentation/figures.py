"""Figures of SSP: the weights of the regions for each attribute, and channels of the features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attnguide import visual
from attnguide.adapters import trace_for
from attnguide.errors import InputError
from attnguide.functional import min_max
from attnguide_segmentation.adapted import RegionAdapters
from attnguide_segmentation.pooling import SSP
from attnguide_segmentation.regions import REGIONS

__all__ = ["colors", "region_weights", "sheet", "top_channels", "weights_figure"]

#: The color of each region, as in `REGIONS`.
_COLORS = torch.tensor(
    [
        [0.15, 0.15, 0.20], [0.45, 0.28, 0.15], [0.95, 0.75, 0.60], [0.20, 0.55, 0.90],
        [0.50, 0.30, 0.70], [0.85, 0.20, 0.30], [0.25, 0.70, 0.40],
    ]
)  # fmt: skip


def region_weights(adapted: RegionAdapters, images: Tensor) -> Tensor:
    """Compute SSP's weights of the regions for each attribute.

    Args:
        adapted: The adapters of a model, with an SSP.
        images: Images `(B, 3, H, W)`, on the model's device. Masks are found in them, or were given before.

    Returns:
        `(B, R, K)`, in [0, 1]; sums to 1 over the regions.

    Raises:
        InputError: If there is no SSP.
    """
    for adapter in adapted:
        if isinstance(adapter, SSP):
            trace = trace_for(adapter, adapted.model, images)
            with torch.no_grad():
                return adapter.branches(trace.feature.spatial, adapter.finder(trace.images))[1]
    raise InputError("there is no SSP on the model; attach it with attach(model, images, 'ssp').")


def weights_figure(
    weights: Tensor, classes: Sequence[str], path: str, names: Sequence[str] = REGIONS
) -> None:
    """Draw the weights of the regions for each attribute, as the publication's Figure 4.

    Args:
        weights: Weights, means over the images, `(R, K)`.
        classes: Names of the K attributes.
        path: File of the picture; needs `pip install attnguide[figures]`.
        names: Names of the R regions.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.45 * len(classes), 1.2 + 0.35 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(weights.cpu().numpy(), vmin=0, vmax=1, cmap="magma", aspect="auto")
    axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
    axes.set_yticks(range(len(names)), names)
    figure.colorbar(picture, ax=axes, label="weight")
    figure.savefig(path, dpi=110)


def top_channels(features: Tensor, count: int = 50) -> Tensor:
    """Return the most active channels, each scaled to [0, 1], as the publication's Figure 5.

    Args:
        features: Features of one image, `(C, h, w)`.
        count: Number of channels.

    Returns:
        `(count, h, w)`, the most active first; fewer if there are fewer channels.
    """
    order = features.amax(dim=(1, 2)).argsort(descending=True)[:count]
    return min_max(features[order])


def colors(regions: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Color a segmentation, to show it next to its image.

    Args:
        regions: Label map `(B, H, W)`, or masks `(B, 7, h, w)`.
        size: Size `(H, W)` of the pictures; by default the size of the regions.

    Returns:
        RGB in [0, 1], `(B, 3, H, W)`.
    """
    labels = regions.argmax(dim=1) if regions.ndim == 4 else regions.long()
    pictures = _COLORS.to(labels.device)[labels].movedim(-1, 1)
    return pictures if size is None else F.interpolate(pictures, size=size, mode="nearest")


def sheet(maps: Tensor, columns: int = 10) -> Tensor:
    """Put maps side by side, in color.

    Args:
        maps: Maps in [0, 1], `(N, h, w)`.
        columns: Number of maps in a row.

    Returns:
        RGB in [0, 1], `(3, rows·h, columns·w)`.
    """
    height, width = maps.shape[-2:]
    rows = -(-len(maps) // columns)
    padded = torch.cat([maps, maps.new_zeros(rows * columns - len(maps), height, width)])
    tiles = visual.colorize(padded).view(rows, columns, 3, height, width)
    return tiles.permute(2, 0, 3, 1, 4).reshape(3, rows * height, columns * width)
