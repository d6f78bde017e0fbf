"""The parts of a face between landmarks, as a source of regions for other plugins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from attnguide.data.images import read_image
from attnguide.errors import DataError
from attnguide.interfaces import RegionSource
from attnguide.masks import FACE_PARTS, face_parts
from attnguide_action_units.tables import LandmarkTable, read_landmarks

__all__ = ["LandmarkRegions"]

_Points = npt.NDArray[np.float64]


class LandmarkRegions(RegionSource):
    """Draws the parts of a face around its landmarks; for the mean of aligned faces, around their means.

    Args:
        landmarks: Table of landmarks, or its file, as `attnguide landmarks` writes it.

    Raises:
        DataError: If the file cannot be read.
    """

    names = FACE_PARTS

    def __init__(self, landmarks: str | Path | LandmarkTable) -> None:
        self.table = landmarks if isinstance(landmarks, LandmarkTable) else read_landmarks(landmarks)

    def __call__(self, images: Tensor, files: Sequence[Sequence[Path]]) -> Tensor:
        """Draw the regions of each image.

        Raises:
            DataError: If the table has no landmarks of an image.
        """
        size = (images.shape[-2], images.shape[-1])
        return face_parts(np.stack([self._points(paths, size) for paths in files]), size)

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
