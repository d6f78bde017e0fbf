"""Data sets whose samples get masks from a folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from attnguide.errors import DataError, InputError
from attnguide.masks.folders import MaskFolder
from attnguide.masks.inside import Inside
from attnguide.masks.sizes import Size, as_size, check_proportions

__all__ = ["WithMasks"]


class WithMasks(Dataset[tuple[Any, Any, Tensor]]):
    """Adds a painted mask to each sample of a data set: `(image, attributes, mask)`.

    The images' transform may resize whole images, but not crop or turn them: the mask does not follow.

    Args:
        data: Gives `(image, attributes)`.
        folder: Masks, as for [`MaskFolder`][attnguide.masks.MaskFolder].
        size: Size of the masks, best that of the images; of their proportions.
        classes: Names of the attributes, for masks of single classes; None for masks of whole images.
        names: File name of each image; by default the data set's `filename`, which CelebA has. If these are
            paths of files, each mask must have the proportions of its file.
        inside: Values that are inside in the masks; see [`read_mask`][attnguide.masks.read_mask].

    Raises:
        InputError: If the number of names is not that of the samples.
        DataError: If no image has a mask, or images of one name would share one.
    """

    def __init__(
        self,
        data: Any,
        folder: str | Path,
        size: Size,
        classes: Sequence[str] | None = None,
        names: Sequence[str | Path] | None = None,
        *,
        inside: Inside | None = None,
    ) -> None:
        self.data, self.masks = data, MaskFolder(folder, classes, size, inside=inside)
        self._size = as_size(size)
        self.classes = None if classes is None else tuple(classes)
        self.names = list(getattr(data, "filename", ()) if names is None else names)
        if len(self.names) != len(data):
            raise InputError(
                f"there are {len(self.names)} names for {len(data)} samples. Give names=, the file name of "
                "each image."
            )
        if not any(name in self.masks for name in self.names):
            raise DataError(
                f"{folder} holds masks, but for none of the images, such as {self.names[0]}. Name each mask "
                "like its image."
            )
        for name, count in Counter(self.names).items():
            self.masks.claim(name)
            if count > 1 and len(Path(name).parts) == 1 and name in self.masks:
                raise DataError(
                    f"{count} samples are called {name}, and would share its mask. Give names= with folders, "
                    "such as cat/1.jpg, or rename the images."
                )
        shape = as_size(size) if classes is None else (len(classes), *as_size(size))
        self._missing = torch.full(shape, torch.nan)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, Any, Tensor]:
        """Return a sample with its mask; all NaN if it has none.

        Raises:
            DataError: If a mask cannot be read, or is not that of its image.
            InputError: If the size of the masks has other proportions than the image.
        """
        image, attributes = self.data[index]
        name = self.names[index]
        mask = self.masks.get(name)
        if mask is None:
            return image, attributes, self._missing
        if isinstance(image, Tensor):
            check_proportions(self._size, image.shape, f"the size {self._size} of the masks")
        if Path(name).is_file():
            self.masks.check_fit(name)
        return image, attributes, mask
