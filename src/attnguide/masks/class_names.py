"""Class names as files spell them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from attnguide.errors import InputError, UnknownNameError
from attnguide.masks.sizes import Size, as_size, check_fit, resize

if TYPE_CHECKING:  # masks are painted and read without torch
    from torch import Tensor

__all__ = ["ClassNames", "class_key"]


def class_key(name: str) -> str:
    """Return a key that all spellings of a class name share, with any case, and with `_` or spaces."""
    # Some file systems store é as e and an accent: NFKC makes one letter of them again.
    return " ".join(re.split(r"[\s_]+", unicodedata.normalize("NFKC", name).casefold().strip()))


class ClassNames:
    """The classes of a model, found by name in any case, and with `_` or spaces.

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
            name: A name in a file.
            where: The file, and the entry in it, for the error.

        Raises:
            UnknownNameError: There is no such class.
        """
        match = self.find(name)
        if match is None:
            raise UnknownNameError(f"class (in {where})", name, self.names)
        return match

    def stack(self, regions: Mapping[str, Tensor], size: Size | None = None) -> Tensor:
        """Stack regions in the order of the classes.

        Args:
            regions: Masks `(H, W)` in [0, 1] by class, as the model spells it. Without any, give `size`.
            size: The common size; that of the first region if None.

        Returns:
            Float tensor `(K, H, W)` in [0, 1]; all NaN, "no annotation", for a class without a region.

        Raises:
            DataError: Regions have other proportions than the first, or are upright where the size is not.
        """
        import torch

        height, width = next(iter(regions.values())).shape if size is None else as_size(size)
        first = next(iter(regions), "")
        for name, region in regions.items():
            check_fit(region.shape, regions[first].shape, f"the mask of {name!r}", f"that of {first!r}")
        missing = torch.full((height, width), torch.nan)
        resized = {
            name: resize(region, (height, width), f"the mask of {name!r}") for name, region in regions.items()
        }
        return torch.stack([resized.get(name, missing) for name in self.names])
