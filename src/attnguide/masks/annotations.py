"""Annotations of one image that were drawn as shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attnguide.data.images import image_size
from attnguide.masks._shapes import Shape
from attnguide.masks.class_names import ClassNames
from attnguide.masks.sizes import Size, check_fit

__all__ = ["LabeledMasks"]


@dataclass(frozen=True)
class LabeledMasks:
    """The regions of one image in an annotation file. Masks are drawn at each call.

    Attributes:
        size: Height and width of the image in pixels, as the file says; see `check_fit`.
        shapes: Label and shape of every region, in the order of the file.
        skipped: Number of entries of each kind that are not regions, or have no area, and were left out.
        source: The file, and the image in it, for errors.
    """

    size: tuple[int, int]
    shapes: tuple[tuple[str, Shape], ...]
    skipped: Mapping[str, int] = field(default_factory=dict)
    source: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in use, in the order of the file."""
        return tuple(dict.fromkeys(label for label, _ in self.shapes))

    @property
    def masks(self) -> dict[str, Tensor]:
        """The union of the regions of each label: float tensors `(H, W)` of 0 and 1."""
        return {label: self._draw([label]) for label in self.labels}

    def check_fit(self, image: str | Path) -> None:
        """Check that an image has the proportions that the file says.

        They differ if the file is about another version of the image: cropped, or without its EXIF
        orientation.

        Args:
            image: Path of the image, of which the size is read.

        Raises:
            DataError: It has others, or cannot be read.
        """
        check_fit(self.size, image_size(image), self.source, image)

    def tensor(self, classes: Sequence[str], size: Size | None = None, *, strict: bool = True) -> Tensor:
        """Draw the regions of a model's classes.

        Args:
            classes: The model's classes; a label matches in any case, and `_` counts as a space.
            size: Size of the masks; that of the image if None.
            strict: Whether an unknown label is an error; if not, it is left out.

        Returns:
            Float tensor `(K, H, W)` in [0, 1]; all NaN, "no annotation", for a class without a region, or
            whose regions have no pixel, because they are outside the image or too small.

        Raises:
            DataError: The image is upright and the size is not, or the reverse.
            InputError: There are no classes, or the size is not positive.
            UnknownNameError: A label is unknown, and `strict` is true.
        """
        names = ClassNames(classes)
        spellings: dict[str, list[str]] = {}
        for label in self.labels:
            name = names.get(label, self.source) if strict else names.find(label)
            if name is not None:
                spellings.setdefault(name, []).append(label)
        regions = {name: self._draw(labels) for name, labels in spellings.items()}
        regions = {name: region for name, region in regions.items() if region.any()}
        return names.stack(regions, self.size if size is None else size)

    def _draw(self, labels: Sequence[str]) -> Tensor:
        drawn = (shape.draw(self.size) for label, shape in self.shapes if label in labels)
        return torch.from_numpy(reduce(np.logical_or, drawn)).float()
