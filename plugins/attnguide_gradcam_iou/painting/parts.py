"""Parts of faces that can be taken as masks: found by a parser, or drawn around landmarks."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial import ConvexHull
from skimage.morphology import isotropic_dilation
from torch import Tensor

from attnguide import functional
from attnguide.data.images import read_image
from attnguide.errors import DataError
from attnguide.masks.shapes import Polygon
from attnguide_gradcam_iou.painting.sheets import AVERAGED, Sheets, spaced
from attnguide_gradcam_iou.painting.store import Bits

__all__ = ["FaceParts", "LandmarkParts", "ParsedParts"]

_Points = npt.NDArray[np.float64]


class FaceParts(Protocol):
    """Gives the parts of a face as masks.

    Attributes:
        names: What there is.
    """

    names: tuple[str, ...]

    def mask(self, number: int, part: int) -> Bits:
        """Find a part in a sheet; `(H, W)`, empty if it is not there."""
        ...


class ParsedParts:
    """The regions that a parser finds.

    Args:
        sheets: What is painted on.
        parser: A file with a parser's weights; None for the one that comes along, which knows drawn faces.

    Raises:
        DataError: If the file cannot be read.
    """

    def __init__(self, sheets: Sheets, parser: Path | None = None) -> None:
        from attnguide_segmentation.parser import load_parser
        from attnguide_segmentation.regions import REGIONS

        self.sheets, self.names = sheets, REGIONS
        self._parser = load_parser(parser)
        self._lock = threading.Lock()

    def mask(self, number: int, part: int) -> Bits:
        """Find a part in a sheet; `(H, W)`, empty if it is not there."""
        picture = self.sheets.picture(number)
        image = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 255
        with self._lock, torch.inference_mode():
            masks: Tensor = self._parser(image)
        whole = functional.resize(masks[:, part], (picture.height, picture.width))[0]
        found: Bits = (whole > 0.5).numpy()
        return found


#: Which of the 68 points lie around each of the polygons that a part consists of.
_AROUND = {
    "face": (range(27),),
    "eyebrows": (range(17, 22), range(22, 27)),
    "eyes": (range(36, 42), range(42, 48)),
    "nose": (range(27, 36),),
    "mouth": (range(48, 60),),
}
#: By which share of the distance of the eyes the smaller parts are grown: brows are drawn as lines.
_MARGIN = 0.06


class LandmarkParts:
    """What lies between landmarks; for the mean of aligned faces, between their means.

    Args:
        sheets: What is painted on.
        table: A table of landmarks, as `attnguide landmarks` writes it.

    Raises:
        DataError: If the table cannot be read.
    """

    def __init__(self, sheets: Sheets, table: Path) -> None:
        from attnguide_action_units.tables import read_landmarks

        self.sheets, self.names = sheets, tuple(_AROUND)
        self.table = read_landmarks(table)
        self._found: dict[int, _Points] = {}

    def mask(self, number: int, part: int) -> Bits:
        """Draw a part of a sheet; `(H, W)`.

        Raises:
            DataError: If the table has no landmarks of it.
        """
        picture = self.sheets.picture(number)
        points, name = self._points(number), self.names[part]
        mask = np.zeros((picture.height, picture.width), dtype=bool)
        for around in _AROUND[name]:
            corners = points[list(around)]
            hull = corners[ConvexHull(corners).vertices]
            mask |= Polygon(tuple((float(x), float(y)) for x, y in hull)).draw(mask.shape)
        if name != "face":
            eyes = points[36:42].mean(axis=0) - points[42:48].mean(axis=0)
            mask = isotropic_dilation(mask, _MARGIN * float(np.hypot(*eyes)))  # type: ignore[no-untyped-call]
        return mask

    def _points(self, number: int) -> _Points:
        """Landmarks of a sheet `(68, 2)`, x and y in its pixels."""
        if number not in self._found:
            self._found[number] = self._computed(number)
        return self._found[number]

    def _computed(self, number: int) -> _Points:
        sheets = self.sheets
        size = np.array(sheets.picture(number).size, dtype=np.float64)
        if sheets.template is None:
            paths = [sheets.paths[number]]
        else:
            paths = spaced(sheets.paths, AVERAGED) if sheets.file is None else [sheets.file]
        found = []
        for path in paths:
            points = self.table.of(path)
            if points is not None and bool(points.isfinite().all()):
                # As the images are: resized to the size of the sheet.
                found.append(points.double().numpy() * (size / np.array(read_image(path).size)))
        if not found:
            raise DataError(f"the table has no landmarks of {sheets.name(number)}, or not all 68.")
        return np.asarray(np.mean(found, axis=0))
