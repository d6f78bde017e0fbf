"""Sizes of masks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attnguide.errors import DataError, InputError

if TYPE_CHECKING:  # masks are painted and read without torch
    from torch import Tensor

__all__ = ["Size", "as_size", "check_fit", "check_proportions", "fits", "resize"]

Size = int | tuple[int, int]
"""Height and width in pixels; one number stands for both."""


#: Largest difference between the proportions of a mask and of its image, which rounding explains.
_TOLERANCE = 0.02


def fits(mask: tuple[int, ...], image: tuple[int, ...]) -> bool:
    """Whether a mask has the proportions of an image, within 2 % or a pixel of the mask.

    Args:
        mask: Height and width of the mask.
        image: Height and width of the image.
    """
    height, width = mask[-2:]
    # What the mask would measure, if one of its sides is right.
    expected_height, expected_width = width * image[-2] / image[-1], height * image[-1] / image[-2]
    return abs(width - expected_width) <= max(1, _TOLERANCE * expected_width) or abs(
        height - expected_height
    ) <= max(1, _TOLERANCE * expected_height)


def check_fit(mask: tuple[int, ...], image: tuple[int, ...], what: object, of: object) -> None:
    """Refuse a mask that is not its image's.

    Args:
        mask: Height and width of the mask.
        image: Height and width of the image.
        what: The mask, for the error.
        of: The image, for the error.

    Raises:
        DataError: The proportions differ.
    """
    if not fits(mask, image):
        turned = fits(mask[-2:][::-1], image)
        advice = (
            "They fit if one is turned: the mask may be that of the file without its EXIF orientation. Turn "
            "the mask."
            if turned
            else "Give masks of the whole image, uncropped."
        )
        raise DataError(
            f"{what} has {mask[-1]}×{mask[-2]} pixels, but {of} has {image[-1]}×{image[-2]}, upright: it is "
            f"not the mask of this image. {advice}"
        )


def check_proportions(masks: tuple[int, ...], images: tuple[int, ...], what: str) -> None:
    """Refuse a tensor of masks that would be stretched over a batch of images.

    Args:
        masks: Shape of the masks, which ends in height and width.
        images: Shape of the images, which ends so too.
        what: The masks, for the error.

    Raises:
        InputError: The proportions differ.
    """
    if not fits(masks, images):
        raise InputError(
            f"{what} has {masks[-2]} rows and {masks[-1]} columns, the images have {images[-2]} and "
            f"{images[-1]}: these are other proportions. Transform masks as the images; if these were "
            "squeezed, give the masks their size, as by size= of load_template and MaskFolder."
        )


def resize(mask: Tensor, size: Size | None, name: str | Path = "the mask") -> Tensor:
    """Stretch a mask to a size; a pixel of a smaller mask is the share of it that was covered.

    Args:
        mask: `(H, W)` in [0, 1].
        size: New size; None leaves the mask as it is.
        name: The mask, for the error.

    Returns:
        `(h, w)` in [0, 1]: averages over areas if no side grows, else the nearest pixels.

    Raises:
        DataError: The mask is upright and the size is not, or the reverse.
        InputError: The size is not positive.
    """
    if size is None or tuple(mask.shape) == as_size(size):
        return mask
    import torch.nn.functional as F

    height, width = as_size(size)
    # Images are often squeezed into a square, and their masks with them, but never turned.
    if (height - width) * (mask.shape[0] - mask.shape[1]) < 0 and not fits(mask.shape, (height, width)):
        check_fit(mask.shape, (height, width), name, "the size that was asked for")
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
