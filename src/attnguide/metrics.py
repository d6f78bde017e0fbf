"""How well a model looks where it should, measured; and an attribution that no training here optimises."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnguide.errors import InputError
from attnguide.functional import full_precision
from attnguide.modes import evaluating
from attnguide.outputs import find_logits

__all__ = ["energy_in_mask", "occlusion"]


def energy_in_mask(maps: Tensor, masks: Tensor) -> Tensor:
    """Energy pointing game: the share of the positive attribution that lies in the mask, Σ S·A⁺ / Σ A⁺.

    Args:
        maps: Attributions `(N, H, W)`, any scale.
        masks: `(N, H, W)`, or `(H, W)` for all, in [0, 1].

    Returns:
        Shares `(N,)` in [0, 1]; 0 for a map without a positive value, which points nowhere.

    Raises:
        InputError: If the shapes do not fit.
    """
    if maps.ndim != 3 or masks.shape not in (maps.shape, maps.shape[1:]):
        raise InputError(
            f"maps {tuple(maps.shape)} and masks {tuple(masks.shape)} do not fit: give (N, H, W), and masks "
            "alike or (H, W)."
        )
    positive = full_precision(maps).relu()
    total = positive.sum(dim=(1, 2))
    return (positive * masks.to(positive)).sum(dim=(1, 2)) / torch.where(
        total > 0, total, torch.ones_like(total)
    )


@torch.no_grad()
def occlusion(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    *,
    window: int = 16,
    stride: int = 8,
    batch_size: int = 512,
) -> Tensor:
    """Occlusion maps: how far the class's logit falls when a window is painted over.

    A window slides over the image and is filled with the image's mean colour; each pixel gets the mean fall
    over the windows that cover it (Zeiler and Fergus, ECCV 2014). The model runs in evaluation mode and comes
    back as it was.

    Args:
        model: Any classifier.
        images: `(B, C, H, W)`.
        classes: The class to look at in each image, `(B,)`, int64.
        window: Side of the window in pixels.
        stride: Step of the window in pixels.
        batch_size: Number of occluded images that the model sees at once.

    Returns:
        Maps `(B, H, W)`: positive where the model finds evidence for the class.

    Raises:
        InputError: If window or stride do not fit the images.
    """
    batch, _, height, width = images.shape
    if not 0 < stride <= window <= min(height, width):
        limit = min(height, width)
        raise InputError(f"window={window} and stride={stride}: 0 < stride ≤ window ≤ {limit} is needed.")
    rows, columns = _starts(height, window, stride), _starts(width, window, stride)
    covers = torch.zeros(len(rows) * len(columns), height, width, device=images.device, dtype=images.dtype)
    for index, (row, column) in enumerate((r, c) for r in rows for c in columns):
        covers[index, row : row + window, column : column + window] = 1
    mean = images.mean(dim=(2, 3), keepdim=True)
    falls = images.new_empty(batch, len(covers))
    sample = torch.arange(batch * len(covers), device=images.device)
    with evaluating(model):
        plain = torch.cat([find_logits(model(part)) for part in torch.split(images, batch_size)])
        plain = plain.gather(1, classes[:, None])[:, 0]
        for chunk in torch.split(sample, batch_size):
            which, cover = chunk // len(covers), covers[chunk % len(covers)][:, None]
            occluded = images[which] * (1 - cover) + mean[which] * cover
            scores = find_logits(model(occluded)).gather(1, classes[which][:, None])[:, 0]
            falls.view(-1)[chunk] = (plain[which] - scores).to(falls)
    return (falls @ covers.flatten(1)).view(batch, height, width) / covers.sum(0)


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start along a side; the last one ends at the edge."""
    return sorted({*range(0, length - window, stride), length - window})
