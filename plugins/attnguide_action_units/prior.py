"""The prior: heat maps of the action units of an expression, drawn on each face."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.tv_tensors import KeyPoints

from attnguide.errors import InputError
from attnguide.functional import may_read
from attnguide.interfaces import PriorMaps, TargetPrior
from attnguide.pairs import Pairs
from attnguide.trace import Trace
from attnguide_action_units._heatmaps import CHIN, EYE_CORNERS, Regions, heat_maps
from attnguide_action_units.codebook import Codebook, default, load
from attnguide_action_units.landmarks import CANONICAL, to_68

__all__ = ["CLASSES", "ActionUnitPrior", "checked", "collected"]

#: The expressions in the order of AffectNet's classes, and of `ProceduralFaces`.
CLASSES = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger")


#: Least distance of the outer eye corners of a face, in pixels.
_SMALLEST = 2.0
#: How far a face may reach beyond the border of an image, as a share of its side, before that counts.
_BESIDE = 0.05
#: Region that is drawn, with weight 0, if no expression has a region.
_NOWHERE = default().regions([1])


class ActionUnitPrior(TargetPrior):
    """Heat maps of the action units that the codebook gives for a pair's class, drawn from landmarks.

    With `guide.loss(labels, landmarks=…)` landmarks are 68 points in pixels of the image, `(B, 68, 2)`, or in
    another scheme that [`to_68`][attnguide_action_units.landmarks.to_68] knows, or a list with an entry for
    each sample, None for a sample without landmarks. A sample drops out (its weight is 0) if it has no
    landmarks (None, or NaN or −1 everywhere), if its class has no action units, as neutral, or if a landmark
    that places its map lies outside the image.

    Args:
        classes: The expression of each class of the model, as the codebook names them; None for a class
            without action units, such as contempt.
        codebook: The codebook or its file: the units of each expression, and their regions. By default the
            codebook of this package.
        units: Numbers of action units to draw for every class, instead of the units of its expression.
        generic: Whether to draw all units of the codebook for every class: a map that needs no label.

    Raises:
        UnknownNameError: If the codebook lacks an expression or a unit.
        InputError: If there are no classes, or both `units` and `generic` are given.
    """

    def __init__(
        self,
        *,
        classes: Sequence[str | None] = CLASSES,
        codebook: Codebook | str | Path | None = None,
        units: Sequence[int] | None = None,
        generic: bool = False,
    ) -> None:
        if isinstance(classes, str) or not classes:
            raise InputError(f"classes={classes!r} must list the expression of each class of the model.")
        if units is not None and (generic or not units):
            raise InputError(f"units={units!r} must name at least one unit, and excludes generic=True.")
        self.classes = tuple(classes)
        self.codebook = load(codebook) if isinstance(codebook, (str, Path)) else codebook or default()
        self.units = None if units is None else tuple(units)
        self.generic = generic
        own = [() if name is None else self.codebook.units_of(name) for name in self.classes]
        if generic or units is not None:
            shown = tuple(self.codebook.units) if units is None else tuple(units)
            own = [shown] * len(self.classes)
        regions = [self.codebook.regions(numbers) for numbers in own]
        self._regions = tuple(dict.fromkeys(region for group in regions for region in group)) or _NOWHERE
        place = {region: index for index, region in enumerate(self._regions)}
        widest = max(1, *(len(group) for group in regions))
        # Rows are filled up with one of their regions: drawn twice it looks the same.
        rows = [[place[region] for region in group] or [0] for group in regions]
        self._rows = torch.tensor([(row + row[-1:] * widest)[:widest] for row in rows])
        self._empty = torch.tensor([not group for group in regions])
        anchors = torch.zeros(len(regions), 68, dtype=torch.bool)
        for row, group in zip(anchors, regions, strict=True):
            row[[point for region in group for point in region.points]] = True
            row[list(EYE_CORNERS)] = True
        self._anchors = anchors
        self._tables: dict[torch.device, tuple[Regions, Tensor, Tensor, Tensor]] = {}
        self._warned = False

    def __call__(self, trace: Trace, pairs: Pairs, size: tuple[int, int], *, landmarks: Any) -> PriorMaps:
        """Draw a map for each pair.

        Raises:
            InputError: If the landmarks do not fit the batch, some of a face are NaN, a face is mirrored or
                its axes are swapped, no face lies in its image, or the model has another number of classes
                than `classes`.

        Warns:
            UserWarning: Once, if most faces reach beyond the right or lower edge of their images.
        """
        batch, classes = trace.logits.shape
        device = trace.logits.device
        _check_canvas(landmarks, trace.image_size)
        points = collected(landmarks, batch).to(device, non_blocking=True)
        there = checked(points)
        return self._drawn(
            points, there, pairs.sample, self._known(pairs.cls, classes), size, trace.image_size
        )

    def draw(
        self, landmarks: Any, labels: Any, size: tuple[int, int], image_size: tuple[int, int]
    ) -> PriorMaps:
        """Draw the map of each sample for its label, to show or to store it.

        Stored maps guide through the prior `mask`; write NaN for weight 0.

        Args:
            landmarks: Landmarks of B samples, as in `guide.loss`.
            labels: Index of each sample's class, `(B,)`; −100 for none. May be None if all classes have the
                same map (`generic` or `units`).
            size: `(h, w)` of the maps.
            image_size: `(H, W)` of the images that the landmarks are in.

        Returns:
            Maps `(B, h, w)` and weights `(B,)`.

        Raises:
            InputError: As for `guide.loss`, or if the labels are not indices of classes.
        """
        cls = self._labels(labels, len(landmarks) if landmarks is not None else None)
        _check_canvas(landmarks, image_size)
        points = collected(landmarks, len(cls)).to(cls.device)
        sample = torch.arange(len(cls), device=cls.device)
        maps, weights = self._drawn(points, checked(points), sample, cls.clamp(min=0), size, image_size)
        return PriorMaps(maps, weights * (cls >= 0))

    def _labels(self, labels: Any, batch: int | None) -> Tensor:
        """Indices of classes `(B,)`, −100 for none."""
        alike = self.generic or self.units is not None
        if labels is None and alike and batch is not None:
            return torch.zeros(batch, dtype=torch.long)
        cls = torch.as_tensor(labels) if isinstance(labels, (Tensor, np.ndarray, list, tuple)) else None
        if cls is not None and not cls.numel():
            cls = cls.long()  # an empty list has no type of its own
        if cls is None or cls.ndim != 1 or cls.is_floating_point() or cls.dtype == torch.bool:
            what = type(labels).__name__ if cls is None else f"{tuple(cls.shape)} of {cls.dtype}"
            raise InputError(f"labels must be indices of classes (B,), integers, got {what}.")
        cls = cls.long()
        if alike:
            return torch.where(cls == -100, cls, 0)
        if may_read(cls):
            wrong = ((cls != -100) & ((cls < 0) | (cls >= len(self.classes)))).nonzero()[:, 0]
            if len(wrong):
                raise InputError(
                    f"label {int(cls[wrong[0]])} of sample {int(wrong[0])} is none of the "
                    f"{len(self.classes)} classes; −100 stands for none."
                )
        return cls

    def _known(self, cls: Tensor, classes: int) -> Tensor:
        """Classes of pairs as rows of the tables."""
        if classes == len(self.classes):
            return cls
        if self.generic or self.units is not None:
            return torch.zeros_like(cls)
        raise InputError(
            f"the model has {classes} classes, the prior knows the expressions of {len(self.classes)}: "
            f"{', '.join(map(str, self.classes))}. Give them in the model's order: "
            "ActionUnitPrior(classes=[…])."
        )

    def _drawn(
        self,
        points: Tensor,
        there: Tensor,
        sample: Tensor,
        cls: Tensor,
        size: tuple[int, int],
        image_size: tuple[int, int],
    ) -> PriorMaps:
        regions, rows, empty, anchors = self._tables_on(points.device)
        if may_read(points) and bool(there.any()):
            self._check_scale(points[there], image_size)
        limits = points.new_tensor([image_size[1], image_size[0]]) - 0.5
        inside = ((points >= -0.5) & (points <= limits)).all(dim=2)[sample]
        weights = there[sample] & ~empty[cls] & (inside | ~anchors[cls]).all(dim=1)
        # What drops out is drawn somewhere all the same, so that no shape depends on a value.
        points = torch.where(weights[:, None, None], points[sample], CANONICAL.to(points))
        maps = heat_maps(points, regions, rows[cls], size, image_size)
        # A face so small that it falls between the cells has nothing to say.
        weights &= maps.amax(dim=(1, 2)) > 0
        return PriorMaps(maps, weights.to(maps.dtype))

    def _check_scale(self, points: Tensor, image_size: tuple[int, int]) -> None:
        """Refuse landmarks in pixels of larger images; in doubt, warn once.

        A larger image shares its upper left corner with the image, so that faces leave it to the right and
        downwards alone. Random crops cut faces on all sides.

        Args:
            points: Landmarks `(F, 68, 2)` of at least one face.
            image_size: `(H, W)`.
        """
        sides = points.new_tensor([image_size[1], image_size[0]])
        low, high = points.amin(dim=1), points.amax(dim=1)
        beyond = (high > sides * (1 + _BESIDE)).any(dim=1)
        if bool((low < -sides * _BESIDE).any()) or 2 * int(beyond.sum()) <= len(points):
            return
        found = (
            f"x from {float(low[:, 0].min()):.4g} to {float(high[:, 0].max()):.4g}, "
            f"y from {float(low[:, 1].min()):.4g} to {float(high[:, 1].max()):.4g}; the images are "
            f"{image_size[1]}×{image_size[0]} pixels"
        )
        remedy = (
            "Landmarks are in pixels of the images that the model sees: those of larger originals are scaled "
            "by the same factor as the images, as FaceLandmarks are when they are resized with them."
        )
        away = (points.mean(dim=1) > sides).any(dim=1)
        if bool(away.all()) and (len(points) > 1 or bool((high - low > sides).any())):
            raise InputError(
                f"landmarks lie outside of the images, in all {len(points)} faces: {found}. {remedy}"
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"landmarks of {int(beyond.sum())} of {len(points)} faces reach beyond the right or lower "
                f"edge of their images: {found}. Faces whose action units lie outside are left out. {remedy}",
                stacklevel=2,
            )

    def _tables_on(self, device: torch.device) -> tuple[Regions, Tensor, Tensor, Tensor]:
        if device not in self._tables:
            self._tables[device] = (
                Regions(self._regions, device),
                self._rows.to(device),
                self._empty.to(device),
                self._anchors.to(device),
            )
        return self._tables[device]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the copies on devices."""
        return {**self.__dict__, "_tables": {}}

    def __repr__(self) -> str:
        if self.generic:
            return "ActionUnitPrior(generic=True)"
        if self.units is not None:
            return f"ActionUnitPrior(units={list(self.units)})"
        return f"ActionUnitPrior(classes={list(self.classes)})"


def _check_canvas(landmarks: Any, image_size: tuple[int, int]) -> None:
    """Refuse landmarks that say that they belong to images of another size."""
    for entry in landmarks if isinstance(landmarks, (list, tuple)) else [landmarks]:
        if isinstance(entry, KeyPoints) and tuple(entry.canvas_size) != tuple(image_size):
            height, width = entry.canvas_size
            raise InputError(
                f"landmarks are in pixels of {width}×{height} images, the model sees {image_size[1]}×"
                f"{image_size[0]} pixels. Transform them along with the images."
            )


def collected(landmarks: Any, batch: int) -> Tensor:
    """Convert landmarks of any accepted form to one tensor.

    Args:
        landmarks: A tensor or array `(B, P, 2)`, a list with an entry or None for each sample, or None.
        batch: Batch size B.

    Returns:
        `(B, 68, 2)`, float32; NaN for a sample without landmarks.

    Raises:
        InputError: If they do not fit the batch, or their scheme is unknown.
    """
    if landmarks is None:
        return torch.full((batch, 68, 2), torch.nan)
    if not isinstance(landmarks, (Tensor, np.ndarray, list, tuple)):
        raise InputError(f"landmarks must be a tensor, an array or a list, got {type(landmarks).__name__}.")
    if len(landmarks) != batch:
        raise InputError(
            f"landmarks have {len(landmarks)} entries, the batch has {batch} samples; give one entry per "
            "sample, None for missing landmarks."
        )
    if batch and isinstance(landmarks, (list, tuple)):
        missing = torch.full((68, 2), torch.nan)
        points = torch.stack([missing if entry is None else to_68(entry).cpu() for entry in landmarks])
    else:
        points = torch.empty(0, 68, 2) if isinstance(landmarks, (list, tuple)) else to_68(landmarks)
    if points.shape != (batch, 68, 2):
        raise InputError(f"landmarks have shape {tuple(points.shape)}; they must be ({batch}, 68, 2).")
    return points


def checked(points: Tensor) -> Tensor:
    """Find the faces that have landmarks, and refuse landmarks that cannot be a face's.

    Args:
        points: Landmarks `(B, 68, 2)`; a face of NaN has none.

    Returns:
        True for a face with landmarks, `(B,)`.

    Raises:
        InputError: If only some of a face are NaN, some are infinite, the eyes are in one place, or the face
            is mirrored, as it is when x and y are swapped.
    """
    there = ~points.isnan().all(dim=2).all(dim=1)
    if not may_read(there):
        return there & points.isfinite().all(dim=2).all(dim=1)
    broken = there & ~points.isfinite().all(dim=2).all(dim=1)
    if bool(broken.any()):
        sample = int(broken.nonzero()[0])
        point = int((~points[sample].isfinite().all(dim=1)).nonzero()[0])
        raise InputError(
            f"landmark {point} of sample {sample} is {points[sample, point].tolist()}. A face has all 68 or "
            "none: None, or NaN or −1 everywhere."
        )
    eyes = points[:, EYE_CORNERS[1]] - points[:, EYE_CORNERS[0]]
    chin = points[:, CHIN] - points[:, EYE_CORNERS[0]]
    area = eyes[:, 0] * chin[:, 1] - eyes[:, 1] * chin[:, 0]
    for wrong, what in (
        (there & (eyes.norm(dim=1) < _SMALLEST), "is less than two pixels wide between the eyes"),
        (there & (area < 0), "is mirrored"),
    ):
        if bool(wrong.any()):
            sample = int(wrong.nonzero()[0])
            raise InputError(
                f"the face of sample {sample} {what}: right eye at "
                f"{points[sample, EYE_CORNERS[0]].tolist()}, left eye at "
                f"{points[sample, EYE_CORNERS[1]].tolist()}, chin at "
                f"{points[sample, CHIN].tolist()}. Landmarks are (x, y) in pixels, y downwards, in the order "
                "of 300-W, not shares of the image's sides; x and y may be swapped, or the image was "
                "flipped without renaming left and right, which FaceLandmarks does."
            )
    return there
