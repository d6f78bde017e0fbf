"""The source of the adapters' region masks: a parser, or masks of the user."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnguide.errors import InputError
from attnguide_segmentation.parser import load_parser
from attnguide_segmentation.regions import as_masks

__all__ = ["RegionFinder"]


class RegionFinder:
    """Provides the masks of each forward pass to the adapters of a model, which share it.

    ```python
    finder = RegionFinder()  # the embedded parser
    finder.give(masks)  # or your own masks, for the next forward pass
    ```

    Args:
        parser: Function that returns masks `(B, R, h, w)` for images; by default the embedded parser, for
            drawn faces. Its weights are not trained, and no graph is kept.
        count: Number of regions R.
    """

    def __init__(self, parser: Callable[[Tensor], Tensor] | None = None, count: int = 7) -> None:
        self.parser, self.count = parser, count
        self._given: Tensor | None = None
        self._last: tuple[weakref.ref[Tensor], Tensor] | None = None

    def give(self, regions: Tensor) -> None:
        """Use these masks in the next forward pass of the model, in place of the parser's.

        Args:
            regions: A label map `(B, H, W)`, or masks `(B, R, H, W)`.

        Raises:
            InputError: If the shape is wrong, or a label is unknown.
        """
        self._given = as_masks(regions, self.count)
        self._last = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return the masks for the images of a forward pass; computed once for all adapters.

        Raises:
            InputError: If masks were given for another number of images, or the parser does not return masks.
        """
        if self._last is not None and self._last[0]() is images:
            return self._last[1]
        given, self._given = self._given, None
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
        if self.parser is None:
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
        return {**self.__dict__, "_last": None, "_given": None}
