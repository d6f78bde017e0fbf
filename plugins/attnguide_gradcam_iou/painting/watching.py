"""Attribution maps of a model, shown while masks are painted."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attnguide import functional
from attnguide.errors import DataError
from attnguide.explanation import explain
from attnguide.models import LoadedModel
from attnguide_gradcam_iou.painting.sheets import Sheets, spaced

__all__ = ["SeenMap", "Watcher", "seen_box"]

#: Greatest number of images whose maps are averaged for a template.
_AVERAGED_MAPS = 32
#: Number of maps in memory.
_KEPT = 256


@dataclass(frozen=True)
class SeenMap:
    """An attribution map, and its place on the picture.

    Attributes:
        values: Rows of numbers in [0, 1].
        box: Left, top, right and bottom, in pixels of the picture; the model does not see the rest.
        score: Probability of the class; the mean if there are several images.
    """

    values: list[list[float]]
    box: tuple[float, float, float, float]
    score: float


class Watcher:
    """Computes a model's attribution maps of the sheets, and keeps the last ones.

    Args:
        loaded: The model.
        sheets: Sheets that are painted on.
        device: Device that the model runs on.
        source: Attribution source.
    """

    def __init__(
        self, loaded: LoadedModel, sheets: Sheets, device: torch.device, source: str = "grad_cam"
    ) -> None:
        self.loaded, self.sheets, self.device, self.source = loaded, sheets, device, source
        loaded.model.to(device)
        self._maps: OrderedDict[tuple[int, int], SeenMap] = OrderedDict()
        self._boxes: dict[tuple[int, int], tuple[float, float, float, float]] = {}
        # One at a time: explaining puts hooks on the model.
        self._lock = threading.Lock()

    def map(self, number: int, cls: int) -> SeenMap:
        """Compute a sheet's map for a class of the model; DataError if no image can be read."""
        with self._lock:
            if (number, cls) not in self._maps:
                self._maps[number, cls] = self._computed(number, cls)
                while len(self._maps) > _KEPT:
                    self._maps.popitem(last=False)
            return self._maps[number, cls]

    def _computed(self, number: int, cls: int) -> SeenMap:
        picture = self.sheets.picture(number)
        images = torch.stack(self._images(number, picture)).to(self.device)
        explanation = explain(self.loaded.model, images, self.source, [cls])
        raw = next(iter(explanation.raw.values()))[:, 0].float().relu()
        mean = functional.unit(functional.unit(raw).mean(dim=0, keepdim=True))[0]
        score = float(self.loaded.probabilities(explanation.logits)[:, cls].mean())
        values = [[round(value, 4) for value in row] for row in mean.tolist()]
        # The same for all classes, and for all pictures of one size.
        if picture.size not in self._boxes:
            self._boxes[picture.size] = seen_box(self.loaded, picture.size)
        return SeenMap(values, self._boxes[picture.size], score)

    def _images(self, number: int, picture: Image.Image) -> list[Tensor]:
        paths = self.sheets.paths
        if self.sheets.template is None or not paths:
            return [self.loaded.prepared(picture, self.sheets.name(number))]
        chosen = spaced(paths, _AVERAGED_MAPS)
        images, last = [], ""
        for path in chosen:
            try:
                images.append(self.loaded.read(path))
            except DataError as error:
                last = str(error)
        if not images:
            raise DataError(f"none of {len(chosen)} images can be read. The last one: {last}")
        return images


def seen_box(loaded: LoadedModel, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Measure which part of a picture of `size`, columns and rows, a model's transform lets through.

    Returns:
        Left, top, right and bottom, in pixels of the picture.
    """
    # The transform is unknown: it is given a picture whose colours encode the place.
    width, height = size
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    ramps = np.zeros((height, width, 3))
    ramps[..., 0], ramps[..., 1] = x[None], y[:, None]
    picture = Image.fromarray(np.rint(ramps * 255).astype(np.uint8))
    seen = loaded.displayed(loaded.transform(picture)[None])[0].double()
    ends = []
    for values, length in ((seen[0].mean(dim=0), width), (seen[1].mean(dim=1), height)):
        place = torch.arange(len(values), dtype=torch.float64) + 0.5
        centred = place - place.mean()
        slope = float((centred * values).sum() / centred.square().sum()) if len(values) > 1 else 0.0
        first = float(values.mean()) - slope * float(place.mean())
        ends.append((first * length, (first + slope * len(values)) * length))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom
