"""Sizes of masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnguide.errors import InputError

if TYPE_CHECKING:  # masks are painted and read without torch
    from torch import Tensor

__all__ = ["Size", "as_size", "resize"]

Size = int | tuple[int, int]
"""Height and width in pixels; one number stands for both."""


def resize(mask: Tensor, size: Size | None) -> Tensor:
    """Resize a mask; a pixel of a smaller mask is the share of it that was covered.

    Args:
        mask: `(H, W)` in [0, 1].
        size: New size; None leaves the mask as it is.

    Returns:
        `(h, w)` in [0, 1]: averages over areas if no side grows, else the nearest pixels.

    Raises:
        InputError: The size is not positive.
    """
    if size is None or tuple(mask.shape) == as_size(size):
        return mask
    import torch.nn.functional as F

    height, width = as_size(size)
    mode = "area" if height <= mask.shape[0] and width <= mask.shape[1] else "nearest-exact"
    return F.interpolate(mask[None, None], (height, width), mode=mode)[0, 0]


def as_size(size: Size) -> tuple[int, int]:
    """Return `(height, width)`.

    Raises:
        InputError: The size is not one or two positive integers.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise InputError(f"size must be a positive integer or (height, width), got {size!r}.")
    return sides[0], sides[1]
