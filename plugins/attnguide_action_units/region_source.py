"""The parts of a face between landmarks, as a source of regions for other plugins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial import ConvexHull, QhullError
from skimage.morphology import isotropic_dilation
from torch import Tensor

from attnguide.data.images import read_image
from attnguide.errors import DataError
from attnguide.interfaces import RegionSource
from attnguide.masks import Polygon
from attnguide_action_units.tables import LandmarkTable, read_landmarks

__all__ = ["LandmarkRegions"]

_Points = npt.NDArray[np.float64]
_Bits = npt.NDArray[np.bool_]

#: Landmarks around each of the polygons that a part consists of.
_AROUND = {
    "face": (range(27),),
    "eyebrows": (range(17, 22), range(22, 27)),
    "eyes": (range(36, 42), range(42, 48)),
    "nose": (range(27, 36),),
    "mouth": (range(48, 60),),
}
#: Margin around the smaller parts, as a share of the distance of the eyes: landmarks of brows lie on a line.
_MARGIN = 0.06


class LandmarkRegions(RegionSource):
    """Draws the parts of a face around its landmarks; for the mean of aligned faces, around their means.

    Args:
        landmarks: Table of landmarks, or its file, as `attnguide landmarks` writes it.

    Raises:
        DataError: If the file cannot be read.
    """

    names = tuple(_AROUND)

    def __init__(self, landmarks: str | Path | LandmarkTable) -> None:
        self.table = landmarks if isinstance(landmarks, LandmarkTable) else read_landmarks(landmarks)

    def __call__(self, images: Tensor, files: Sequence[Sequence[Path]]) -> Tensor:
        """Draw the regions of each image.

        Raises:
            DataError: If the table has no landmarks of an image.
        """
        size = (images.shape[-2], images.shape[-1])
        drawn = []
        for paths in files:
            points = self._points(paths, size)
            drawn.append([_draw(name, points, size) for name in self.names])
        return torch.from_numpy(np.array(drawn)).float()

    def _points(self, paths: Sequence[Path], size: tuple[int, int]) -> _Points:
        """Mean landmarks `(68, 2)` of files, x and y in pixels of an image of the size `(H, W)`."""
        found = []
        for path in paths:
            points = self.table.of(path)
            if points is not None and bool(points.isfinite().all()):
                # As the image is: resized from the size of its file.
                found.append(
                    points.double().numpy() * (np.array(size[::-1]) / np.array(read_image(path).size))
                )
        if not found:
            name = paths[0].name if len(paths) == 1 else f"any of {len(paths)} images"
            raise DataError(f"the table has no landmarks of {name}, or not all 68.")
        return np.asarray(np.mean(found, axis=0))


def _draw(name: str, points: _Points, size: tuple[int, int]) -> _Bits:
    """Draw a part `(H, W)`; nothing where its landmarks enclose no area."""
    mask = np.zeros(size, dtype=bool)
    for around in _AROUND[name]:
        corners = points[list(around)]
        try:
            hull = corners[ConvexHull(corners).vertices]
        except QhullError:  # all on a line
            continue
        mask |= Polygon(tuple((float(x), float(y)) for x, y in hull)).draw(size)
    if name == "face" or not mask.any():
        return mask
    eyes = points[36:42].mean(axis=0) - points[42:48].mean(axis=0)
    return _grown(mask, _MARGIN * float(np.hypot(*eyes)))


def _grown(mask: _Bits, margin: float) -> _Bits:
    """Dilate a mask; only the pixels near it are looked at, as parts are small and images large."""
    near = []
    for axis in (1, 0):
        inside = np.flatnonzero(mask.any(axis=axis))
        near.append(slice(max(0, inside[0] - math.ceil(margin)), inside[-1] + math.ceil(margin) + 1))
    grown = mask.copy()
    grown[tuple(near)] = isotropic_dilation(mask[tuple(near)], margin)  # type: ignore[no-untyped-call]
    return grown
