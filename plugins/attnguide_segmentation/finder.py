"""The source of region masks: a parser, landmarks, or masks of the user."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnguide.errors import InputError, UnknownNameError
from attnguide.masks import as_landmarks
from attnguide_segmentation.parser import load_parser
from attnguide_segmentation.regions import REGIONS, around_landmarks, as_masks

__all__ = ["FINDERS", "RegionFinder"]

#: Finders that are known by name: the embedded parser, for drawn faces; and landmarks, which are given.
FINDERS: tuple[str, ...] = ("face_parser", "landmarks")


class RegionFinder:
    """Provides the masks of each forward pass to the adapters of a model, which share it.

    ```python
    finder = RegionFinder()  # the embedded parser, for drawn faces
    finder.give(masks)  # or your own masks, for the next forward pass
    finder = RegionFinder("landmarks")  # for photographs
    finder.give(landmarks=points)  # before each forward pass
    ```

    Args:
        parser: Function that returns masks `(B, R, h, w)` for images, whose weights are not trained, and of
            which no graph is kept; or the file of a parser; or a name: `"face_parser"`, the embedded parser
            for drawn faces, which is the default, or `"landmarks"`, which draws the regions around landmarks
            that are given before each forward pass.
        count: Number of regions R.

    Raises:
        UnknownNameError: If no finder has this name.
        DataError: If the file cannot be read.
        InputError: If landmarks are to give another number of regions than seven.
    """

    def __init__(
        self, parser: Callable[[Tensor], Tensor] | str | Path | None = None, count: int = len(REGIONS)
    ) -> None:
        if isinstance(parser, str) and parser not in FINDERS and not Path(parser).suffix:
            raise UnknownNameError("finder of regions", parser, FINDERS)
        self.by_landmarks = parser == "landmarks"
        if self.by_landmarks and count != len(REGIONS):
            raise InputError(f"landmarks give {len(REGIONS)} regions, {count} are needed; give masks.")
        if isinstance(parser, (str, Path)):
            parser = None if parser in FINDERS else load_parser(parser)
        self.parser, self.count = parser, count
        self._given: Tensor | None = None
        self._landmarks: Tensor | Sequence[Tensor | None] | None = None
        self._last: tuple[weakref.ref[Tensor], Tensor] | None = None

    def give(
        self,
        regions: Tensor | None = None,
        *,
        landmarks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> None:
        """Use these masks, or these landmarks, in the next forward pass of the model.

        Args:
            regions: A label map `(B, H, W)`, or masks `(B, R, H, W)`.
            landmarks: The 68 points of 300-W (iBUG) of each image, `(B, 68, 2)`, to draw the regions around;
                x and y in pixels of the image that the model is given; NaN, or −1, everywhere for a face
                without landmarks; or a list in which such a face is None.

        Raises:
            InputError: If the shape is wrong, a label is unknown, or both or neither are given.
        """
        if (regions is None) == (landmarks is None):
            raise InputError("give either regions or landmarks.")
        if landmarks is not None and self.count != len(REGIONS):
            raise InputError(f"landmarks give {len(REGIONS)} regions, {self.count} are needed; give masks.")
        self._given = None if regions is None else as_masks(regions, self.count)
        self._landmarks = landmarks
        self._last = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return the masks for the images of a forward pass; computed once for all adapters.

        Raises:
            InputError: If masks or landmarks were given for another number of images, or none where they are
                needed, or the parser does not return masks.
        """
        if self._last is not None and self._last[0]() is images:
            return self._last[1]
        given, self._given = self._given, None
        landmarks, self._landmarks = self._landmarks, None
        if landmarks is not None:
            given = drawn(landmarks, (images.shape[-2], images.shape[-1]))
        if given is None and self.by_landmarks:
            raise InputError(
                "no landmarks were given for this forward pass: call finder.give(landmarks=…) before it, "
                "with the 68 points of each image in pixels, NaN for a face without."
            )
        masks = self._parsed(images) if given is None else given
        if len(masks) != len(images):
            raise InputError(
                f"regions were given for {len(masks)} images, the model was called with {len(images)}. Give "
                "the regions of each batch before its forward pass."
            )
        masks = masks.to(images.device)
        self._last = (weakref.ref(images), masks)
        return masks

    def forget(self) -> None:
        """Drop the masks of the last forward pass: another one begins."""
        self._last = None

    @property
    def module(self) -> nn.Module | None:
        """The parser, if it is a module."""
        if self.parser is None and not self.by_landmarks:
            self.parser = load_parser()
        return self.parser if isinstance(self.parser, nn.Module) else None

    def _parsed(self, images: Tensor) -> Tensor:
        if self.module is not None:
            place = next(self.module.parameters(), None)
            if place is not None and place.device != images.device:
                self.module.to(images.device)
            self.module.eval()  # the parser is never trained here
        assert self.parser is not None  # noqa: S101  (`module` has loaded it)
        # Masks that were found in inference mode could not be trained with.
        with torch.inference_mode(False), torch.no_grad():
            masks = self.parser(images.clone() if images.is_inference() else images)
        if not isinstance(masks, Tensor) or masks.ndim != 4 or masks.shape[1] != self.count:
            got = tuple(masks.shape) if isinstance(masks, Tensor) else type(masks).__name__
            raise InputError(
                f"the parser gives {got}; expected masks (B, {self.count}, h, w). Wrap a network in Parser."
            )
        return as_masks(masks, self.count)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the masks of the last forward pass."""
        return {**self.__dict__, "_last": None, "_given": None, "_landmarks": None}


def drawn(landmarks: Tensor | Sequence[Tensor | None], size: tuple[int, int]) -> Tensor:
    """Draw the regions around landmarks; see [`around_landmarks`][attnguide_segmentation.regions].

    Warns if every face lies outside its image, as landmarks of a larger original do.
    """
    points = as_landmarks(landmarks)
    masks = around_landmarks(points, size)
    # The middle of the face, which a crop may cut off, but not in all images of a batch.
    middle = points.double().nanmedian(dim=1).values
    limits = middle.new_tensor([size[1], size[0]])
    there = middle.isfinite().all(dim=1) & (middle != -1).any(dim=1)
    inside = ((middle >= 0) & (middle < limits)).all(dim=1)
    if bool(there.any()) and not bool((there & inside).any()):
        first = [round(value, 1) for value in middle[there][0].tolist()]
        warnings.warn(
            f"the landmarks of all {int(there.sum())} faces lie outside their images, of {size[0]} rows and "
            f"{size[1]} columns: the first face is around (x, y) = {first}. Are they in pixels of a larger "
            "original? Scale them as the images were.",
            stacklevel=2,
        )
    return masks
