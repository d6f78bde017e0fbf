"""A classifier with everything that is needed to use it on image files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image
from torch import Tensor, nn

from attnguide.data.images import read_image
from attnguide.errors import DataError, InputError

__all__ = ["LoadedModel"]

#: Resizing the short side of a longer image would make the long one enormous.
_MAX_ASPECT = 50


@dataclass(frozen=True)
class LoadedModel:
    """A classifier with its preprocessing and the names of its classes.

    Attributes:
        model: The classifier, in evaluation mode, on the CPU at first.
        classes: Name of each class.
        transform: Turns an RGB image into the model's input, `(3, H, W)`.
        mean: Value that the transform subtracts from each channel of an image in [0, 1].
        std: Value that the transform then divides each channel by.
        multi_label: Whether each class is predicted independently (sigmoid) or the classes exclude each other
            (softmax).
        name: Name of the model, as in [`load`][attnguide.models.load].
        size: Rows and columns `(H, W)` of the model's input.
        weights: Origin of the weights.
    """

    model: nn.Module
    classes: tuple[str, ...]
    transform: Callable[[Image.Image], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    multi_label: bool
    name: str
    size: tuple[int, int]
    weights: Literal["random", "pretrained", "checkpoint", "embedded"]

    def read(self, path: str | Path) -> Tensor:
        """Read an image file and prepare it for the model, `(3, H, W)`.

        Raises:
            DataError: If it cannot be read, or is too elongated to be resized.
        """
        return self.prepared(read_image(path), path)

    def prepared(self, image: Image.Image, path: str | Path) -> Tensor:
        """Turn an image into the model's input, `(3, H, W)`.

        Args:
            image: Upright RGB image, as [`read_image`][attnguide.data.read_image] returns it.
            path: File of the image, for the error.

        Raises:
            DataError: If it is too elongated to be resized.
        """
        check_aspect(image, path)
        return self.transform(image)

    def renamed(self, classes: Sequence[str]) -> LoadedModel:
        """Return the same model with other names of its classes.

        Raises:
            InputError: If the number of names is not the number of classes.
        """
        if len(classes) != len(self.classes):
            raise InputError(
                f"there are {len(classes)} class names, but {self.name} has {len(self.classes)} classes. "
                "Give one for each, in order."
            )
        return replace(self, classes=tuple(classes))

    def displayed(self, images: Tensor) -> Tensor:
        """Undo the normalisation of the model's inputs `(B, 3, H, W)`: images in [0, 1], for display."""
        mean, std = (images.new_tensor(value)[:, None, None] for value in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits `(B, K)` into probabilities: softmax, or sigmoid for multi-label or one logit."""
        logits = logits.float()
        return logits.sigmoid() if self.multi_label or logits.shape[1] == 1 else logits.softmax(dim=1)


def check_aspect(image: Image.Image, name: str | Path) -> None:
    """Refuse an image that is too elongated to be resized.

    Raises:
        DataError: If it is.
    """
    if max(image.size) > _MAX_ASPECT * min(image.size):
        raise DataError(
            f"{name} is {image.width}×{image.height} pixels, more than {_MAX_ASPECT} times as long as "
            "wide. Crop it."
        )
