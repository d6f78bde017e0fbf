"""The prior: the regions of the face that show an attribute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from attnguide.errors import InputError
from attnguide.interfaces import PriorMaps, TargetPrior
from attnguide.pairs import Pairs
from attnguide.trace import Trace
from attnguide_segmentation.attributes import CELEBA, attribute_table
from attnguide_segmentation.finder import RegionFinder, drawn
from attnguide_segmentation.regions import as_masks, resized

__all__ = ["SegmentationPrior"]


class SegmentationPrior(TargetPrior):
    """The regions that show a pair's class: the hair for hair colours, the mouth for lipstick.

    With `guide.loss(labels, regions=…)` they are a label map `(B, H, W)` of indices into `REGIONS`, or masks
    `(B, 7, H, W)`. With `guide.loss(labels, landmarks=…)` they are drawn around the 68 points of 300-W (iBUG)
    of each image, `(B, 68, 2)`, x and y in pixels, NaN or −1 everywhere for a face without, or a list in
    which such a face is None; hair has no
    landmarks, and stays empty. Regions come before landmarks, and landmarks before the parser, which finds
    them in the images. A class without a region, and a sample in which the regions of the class are empty,
    drop out (weight 0).

    Args:
        classes: Name of each class of the model.
        attributes: Regions that show each attribute, as a mapping or a TOML file; by default a table for the
            attributes of CelebA and of the drawn faces.
        parser: Function that returns masks `(B, 7, h, w)` for images, or the file of a parser; by default
            `"face_parser"`, the embedded parser, for drawn faces. With `"landmarks"` there is no parser, and
            each call of `guide.loss` needs landmarks or regions.

    Raises:
        UnknownNameError: If the table lacks a class, or no finder has the name.
        DataError: If the file of the parser cannot be read.
        InputError: If there are no classes, or the table names an unknown region.
    """

    def __init__(
        self,
        *,
        classes: Sequence[str] = CELEBA,
        attributes: Mapping[str, Sequence[str]] | str | Path | None = None,
        parser: Callable[[Tensor], Tensor] | str | Path | None = None,
    ) -> None:
        self.table = attribute_table(classes, attributes)
        self.classes = tuple(classes)
        self.finder = RegionFinder(parser)

    def __call__(
        self,
        trace: Trace,
        pairs: Pairs,
        size: tuple[int, int],
        *,
        regions: Tensor | None = None,
        landmarks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> PriorMaps:
        """Join the masks of the regions that show each pair's class.

        Raises:
            InputError: If regions or landmarks do not fit the batch, neither is given though there is no
                parser, or the model has another number of classes.
        """
        classes = trace.logits.shape[1]
        if classes != len(self.classes):
            raise InputError(
                f"the model has {classes} classes, the prior knows {len(self.classes)}. Name them in the "
                "model's order: SegmentationPrior(classes=[…])."
            )
        device = trace.logits.device
        masks = self._masks(trace, regions, landmarks).to(device)
        chosen = self.table.to(device)[pairs.cls]
        # A region is present if some pixel is mostly of it; a parser's shares are never exactly 0.
        present = (masks.amax(dim=(2, 3)) >= 0.5).to(masks.dtype)[pairs.sample]
        masks = resized(masks, size)
        # Regions exclude each other, so that their union is their sum; parts that were grown overlap a
        # little.
        maps = torch.einsum("nrhw,nr->nhw", masks[pairs.sample], chosen).clamp(max=1)
        return PriorMaps(maps, ((present * chosen).amax(dim=1) > 0).to(maps.dtype))

    def _masks(
        self,
        trace: Trace,
        regions: Tensor | None,
        landmarks: Tensor | Sequence[Tensor | None] | None,
    ) -> Tensor:
        """Masks of the regions in each image, `(B, 7, h, w)`."""
        batch = len(trace.images)
        for name, given in (("regions", regions), ("landmarks", landmarks)):
            if given is not None and len(given) != batch:
                raise InputError(f"{name} have {len(given)} entries, the batch has {batch} samples.")
        if regions is not None:
            return as_masks(regions)
        if landmarks is not None:
            return drawn(landmarks, trace.image_size)
        if self.finder.by_landmarks:
            raise InputError(
                'SegmentationPrior(parser="landmarks") needs landmarks: guide.loss(labels, landmarks=…), NaN '
                "for a face without."
            )
        self.finder.forget()
        return self.finder(trace.images)

    def __repr__(self) -> str:
        return f"SegmentationPrior(classes={list(self.classes)})"
