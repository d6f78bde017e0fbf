"""Boxes on landmarks in place of regions: a baseline for SSP."""

from __future__ import annotations

import torch
from torch import Tensor

from attnguide.errors import InputError

__all__ = ["landmark_boxes"]

#: Width to height of the boxes.
_RATIOS = (1.0, 0.5, 2.0)
#: Eyes, nose and corners of the mouth among the 68 points of 300-W.
_FIVE = ((36, 37, 38, 39, 40, 41), (42, 43, 44, 45, 46, 47), (30,), (48,), (54,))


def landmark_boxes(points: Tensor, image_size: tuple[int, int], *, area: float = 1 / 16) -> Tensor:
    """Make 16 masks: three boxes on each of five landmarks, and the whole image.

    Boxes have width to height 1:1, 1:2 and 2:1, and are cut off at the border.

    Args:
        points: Five landmarks `(B, 5, 2)` (eyes, nose tip, corners of the mouth), x and y in pixels, or the
            68 of 300-W.
        image_size: Size `(H, W)` of the image.
        area: Area of a box, as a share of the image.

    Returns:
        `(B, 16, H, W)` of 0 and 1; the boxes of landmarks that are NaN are empty.

    Raises:
        InputError: If there are neither 5 nor 68 points, or the area is not in (0, 1].

    Source: the baseline BBox of Kalayeh, Gong and Shah, CVPR 2017. The area that they used is not published.
    """
    if points.ndim != 3 or points.shape[1:] not in ((5, 2), (68, 2)):
        raise InputError(f"landmarks have shape {tuple(points.shape)}; expected (B, 5, 2) or (B, 68, 2).")
    if not 0 < area <= 1:
        raise InputError(f"area={area} must be above 0 and at most 1.")
    if points.shape[1] == 68:
        points = torch.stack([points[:, list(group)].mean(dim=1) for group in _FIVE], dim=1)
    height, width = image_size
    side = (area * height * width) ** 0.5
    ratios = torch.tensor(_RATIOS, device=points.device)
    halves = torch.stack([ratios.sqrt(), 1 / ratios.sqrt()], dim=1) * side / 2  # (3, 2)
    low = (points[:, :, None] - halves).flatten(1, 2)[..., None]  # (B, 15, 2, 1)
    high = (points[:, :, None] + halves).flatten(1, 2)[..., None]
    columns = torch.arange(width, device=points.device)
    rows = torch.arange(height, device=points.device)
    across = (columns >= low[:, :, 0]) & (columns <= high[:, :, 0])
    down = (rows >= low[:, :, 1]) & (rows <= high[:, :, 1])
    boxes = down[..., :, None] & across[..., None, :]
    return torch.cat([boxes, torch.ones_like(boxes[:, :1])], dim=1).float()
