"""Landmarks: Gaussians at points, or the parts of a face around its 68 landmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnguide import functional
from attnguide.errors import InputError, nearest
from attnguide.interfaces import PriorMaps, TargetPrior
from attnguide.masks.face_parts import FACE_PARTS, face_parts
from attnguide.pairs import Pairs
from attnguide.trace import Trace

__all__ = ["LandmarkPrior"]


class LandmarkPrior(TargetPrior):
    """Gaussians at the landmarks of each image, or the parts of a face that its landmarks enclose.

    With `guide.loss(labels, landmarks=…)` landmarks are `(B, P, 2)`, x and y in pixels of the images, or a
    list with `(P, 2)` or None for each sample. A point of NaN or −1 is missing; a sample drops out (weight 0)
    if none of its points lies in the image. The map is the same for every class of a sample.

    Args:
        sigma: Standard deviation of the Gaussians, as a share of the images' shorter side.
        points: Numbers of the points to draw; all by default.
        parts: Parts of a face to draw instead, of `FACE_PARTS`, from the 68 points of 300-W (iBUG): `"face"`,
            `"eyebrows"`, `"eyes"`, `"nose"`, `"mouth"`.

    Raises:
        InputError: If sigma is not positive, a part is unknown, or both points and parts are given.
    """

    def __init__(
        self,
        *,
        sigma: float = 0.05,
        points: Sequence[int] | None = None,
        parts: Sequence[str] | None = None,
    ) -> None:
        if not (isinstance(sigma, (int, float)) and math.isfinite(sigma) and sigma > 0):
            raise InputError(f"sigma={sigma!r} must be a positive share of the images' side.")
        if points is not None and parts is not None:
            raise InputError("points= and parts= exclude each other. Leave one of them out.")
        if points is not None and (
            not len(points) or any(type(point) is not int or point < 0 for point in points)
        ):
            raise InputError(f"points={points!r:.60} must be numbers of points, at least one, from 0 on.")
        for part in [parts] if isinstance(parts, str) else parts or ():
            if part not in FACE_PARTS:
                raise InputError(f"parts has {part!r}.{nearest(part, FACE_PARTS)}")
        self.sigma, self.points = sigma, None if points is None else tuple(points)
        self.parts = None if parts is None else (parts,) if isinstance(parts, str) else tuple(parts)

    def __call__(self, trace: Trace, pairs: Pairs, size: tuple[int, int], *, landmarks: Any) -> PriorMaps:
        """Draw the landmarks of each pair's sample.

        Raises:
            InputError: If the landmarks do not fit the batch, one is infinite or half missing, or a number in
                `points` is too large.
        """
        batch, device = len(trace.logits), trace.logits.device
        if landmarks is None:
            landmarks = [None] * batch
        if not isinstance(landmarks, (Tensor, np.ndarray, list, tuple)) or len(landmarks) != batch:
            what = len(landmarks) if hasattr(landmarks, "__len__") else type(landmarks).__name__
            raise InputError(
                f"landmarks must have an entry for each of the {batch} samples, None for missing; got {what}."
            )
        drawn = [
            self._draw(_as_points(entry, sample), sample, size, trace.image_size)
            for sample, entry in enumerate(landmarks)
        ]
        maps = torch.stack(drawn).to(device)
        weights = (maps.amax(dim=(1, 2)) > 0).to(maps)
        return PriorMaps(maps[pairs.sample], weights[pairs.sample])

    def _draw(
        self, points: Tensor, sample: int, size: tuple[int, int], image_size: tuple[int, int]
    ) -> Tensor:
        """Draw a map `(h, w)`; zeros without a point in the image."""
        if not len(points):
            return torch.zeros(size)
        if self.parts is not None:
            if len(points) != 68:
                raise InputError(
                    f"landmarks of sample {sample} are {len(points)} points; parts of a face need 68."
                )
            masks = face_parts(points[None], image_size)[0]
            union = masks[[FACE_PARTS.index(part) for part in self.parts]].amax(dim=0)
            return functional.resize(union[None], size)[0]
        if self.points is not None:
            if max(self.points) >= len(points):
                raise InputError(
                    f"points has {max(self.points)}, but sample {sample} has {len(points)} landmarks, "
                    "counted from 0."
                )
            points = points[list(self.points)]
        height, width = image_size
        inside = ((points >= 0) & (points < points.new_tensor([width, height]))).all(dim=1)  # NaN is outside
        points = points[inside]
        if not len(points):
            return torch.zeros(size)
        # At the centres of the map's cells, in pixels of the image.
        rows = (torch.arange(size[0], dtype=points.dtype) + 0.5) * height / size[0]
        columns = (torch.arange(size[1], dtype=points.dtype) + 0.5) * width / size[1]
        # A Gaussian narrower than a cell would fall between the centres.
        sigma = max(self.sigma * min(height, width), 0.5 * height / size[0], 0.5 * width / size[1])
        down = torch.exp(-((rows - points[:, 1:]) ** 2) / (2 * sigma**2))
        across = torch.exp(-((columns - points[:, :1]) ** 2) / (2 * sigma**2))
        return (down[:, :, None] * across[:, None, :]).amax(dim=0).float()

    def __repr__(self) -> str:
        return f"LandmarkPrior(sigma={self.sigma}, points={self.points}, parts={self.parts})"


def _as_points(entry: Any, sample: int) -> Tensor:
    """Return the landmarks of a sample `(P, 2)`, NaN for a missing one; none if all are missing."""
    if entry is None:
        return torch.empty(0, 2, dtype=torch.float64)
    try:
        points = torch.as_tensor(entry).detach().as_subclass(Tensor).double().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"landmarks of sample {sample} must be numbers (P, 2): {error}.") from error
    if points.ndim != 2 or points.shape[1] != 2:
        raise InputError(f"landmarks of sample {sample} have shape {tuple(points.shape)}; give (P, 2).")
    points = torch.where((points == -1).all(dim=1, keepdim=True), torch.nan, points)
    if bool((points.isnan().any(dim=1) != points.isnan().all(dim=1)).any()) or bool(points.isinf().any()):
        raise InputError(
            f"landmarks of sample {sample} have infinite or half missing points; a missing one is NaN twice."
        )
    return points[:0] if bool(points.isnan().all()) else points
