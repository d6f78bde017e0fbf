"""Class names as files spell them, and masks of one size."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from attnguide.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ClassNames", "Size", "as_size", "class_key", "resize"]

Size = int | tuple[int, int]
"""Height and width in pixels; one number stands for both."""


def class_key(name: str) -> str:
    """Return a key that all spellings of a class name share, with any case, and with `_` or spaces."""
    # Some file systems store é as e and an accent: NFKC makes one letter of them again.
    return " ".join(re.split(r"[\s_]+", unicodedata.normalize("NFKC", name).casefold().strip()))


class ClassNames:
    """The classes of a model, found by name whatever its case and whether by `_` or by space.

    Args:
        classes: The names, in the order of the model's logits.

    Raises:
        InputError: There are none, or `classes` is a single string.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        if isinstance(classes, str) or not classes:
            raise InputError(f"classes must be a sequence of at least one name, got {classes!r}.")
        self.names = tuple(classes)
        self._keys = tuple(map(class_key, self.names))

    def find(self, name: str) -> str | None:
        """Return the class that `name` means, as the model spells it, or None."""
        key = class_key(name)
        return self.names[self._keys.index(key)] if key in self._keys else None

    def get(self, name: str, where: object) -> str:
        """Return the class that `name` means, as the model spells it.

        Args:
            name: A name out of a file.
            where: The file, and the entry in it, for the error.

        Raises:
            UnknownNameError: It is none of the classes.
        """
        found = self.find(name)
        if found is None:
            raise UnknownNameError(f"class (in {where})", name, self.names)
        return found

    def stack(self, regions: Mapping[str, Tensor], size: Size | None = None) -> Tensor:
        """Stack regions in the order of the classes.

        Args:
            regions: Masks `(H, W)` in [0, 1] by class, as the model spells it. Without any, give `size`.
            size: The common size; that of the first region if None.

        Returns:
            Float tensor `(K, H, W)` in [0, 1]; all NaN, "no annotation", for a class without a region.
        """
        import torch  # here, since class names alone cost no torch

        height, width = next(iter(regions.values())).shape if size is None else as_size(size)
        missing = torch.full((height, width), torch.nan)
        resized = {name: resize(region, (height, width)) for name, region in regions.items()}
        return torch.stack([resized.get(name, missing) for name in self.names])


def resize(mask: Tensor, size: Size | None) -> Tensor:
    """Resize a mask; a pixel of a smaller one holds the share that was covered.

    Args:
        mask: `(H, W)` in [0, 1].
        size: The size wanted; None leaves the mask as it is.

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
