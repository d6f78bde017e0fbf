"""Regions of a sheet that can be added to a mask, such as the parts of a face."""

from __future__ import annotations

import threading

import numpy as np
import torch

from attnguide import functional
from attnguide.interfaces import RegionSource
from attnguide_gradcam_iou.painting.sheets import Sheets
from attnguide_gradcam_iou.painting.store import Bits

__all__ = ["SheetRegions"]


class SheetRegions:
    """Gives the regions of a sheet as masks.

    Args:
        sheets: Sheets that are painted on.
        source: Source of the regions.
    """

    def __init__(self, sheets: Sheets, source: RegionSource) -> None:
        self.sheets, self.source, self.names = sheets, source, source.names
        self._lock = threading.Lock()
        #: The last sheet whose regions were found, and their masks `(R, H, W)`.
        self._last: tuple[int, Bits] | None = None

    def mask(self, number: int, region: int) -> Bits:
        """Find a region in a sheet; `(H, W)`, empty if it is not there.

        Raises:
            DataError: If nothing is known about the sheet.
        """
        with self._lock:
            if self._last is None or self._last[0] != number:
                self._last = number, self._found(number)
            mask: Bits = self._last[1][region]
        return mask

    def _found(self, number: int) -> Bits:
        picture = self.sheets.picture(number)
        image = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            masks = self.source(image, [self.sheets.files(number)])[0]
        masks = functional.resize(masks, (picture.height, picture.width))
        bits: Bits = (masks > 0.5).numpy()
        return bits
