"""Reads image files as masks, without torch: how much of each pixel was painted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from attnguide.data.images import gray_levels, load_image

__all__ = ["is_gray", "read_levels"]


def read_levels(path: str | Path) -> npt.NDArray[np.float64]:
    """Read a painted mask; see [`read_mask`][attnguide.masks.read_mask].

    Returns:
        Array `(H, W)` in [0, 1].

    Raises:
        DataError: The file cannot be read as an image.
    """
    image = load_image(path)
    if image.has_transparency_data and not image.mode.startswith("I"):
        opacity = np.asarray(image.convert("RGBA").getchannel("A"))
        if opacity.min() < 255:
            return opacity / 255
    if is_gray(image) and np.asarray(image).max() == 1:
        return np.asarray(image, dtype=np.float64)
    return gray_levels(image, path)


def is_gray(image: Image.Image) -> bool:
    """Whether an image has one channel of whole numbers, and no palette."""
    return image.mode == "L" or image.mode.startswith("I")
