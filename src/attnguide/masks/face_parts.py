"""The parts of a face, drawn around its 68 landmarks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial import ConvexHull, QhullError
from skimage.morphology import isotropic_dilation
from torch import Tensor

from attnguide.errors import InputError
from attnguide.masks._shapes import Polygon

__all__ = ["FACE_PARTS", "as_landmarks", "face_parts"]

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
#: Names of the parts that `face_parts` draws, in their order.
FACE_PARTS: tuple[str, ...] = tuple(_AROUND)
#: Margin around the smaller parts, as a share of the distance of the eyes: landmarks of brows lie on a line.
_MARGIN = 0.06


def as_landmarks(landmarks: Any) -> Tensor:
    """Check the landmarks of faces.

    Args:
        landmarks: The 68 points of 300-W (iBUG) of each face, `(B, 68, 2)`, x and y in pixels of the image. A
            face without landmarks has NaN, or −1, everywhere; in a list it is None.

    Returns:
        `(B, 68, 2)`, float64, on the CPU; NaN everywhere for a face without landmarks.

    Raises:
        InputError: If they are not `(B, 68, 2)`, or some of a face are NaN or infinite.
    """
    nowhere = torch.full((68, 2), torch.nan, dtype=torch.float64)
    try:
        if isinstance(landmarks, (list, tuple)):
            faces = [nowhere if face is None else _plain(face) for face in landmarks]
            points = torch.stack(faces) if faces else torch.empty(0, 68, 2, dtype=torch.float64)
        else:
            points = _plain(landmarks)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"landmarks must be numbers (B, 68, 2): {error}.") from error
    if points.ndim != 3 or points.shape[1:] != (68, 2):
        raise InputError(
            f"landmarks have shape {tuple(points.shape)}; expected (B, 68, 2): the 68 points of 300-W (iBUG) "
            "of each face, x and y in pixels."
        )
    missing = points.isnan() | (points == -1)
    points = torch.where(missing.flatten(1).all(dim=1)[:, None, None], nowhere, points)
    broken = ~points.isfinite().all(dim=2) & ~points.isnan().flatten(1).all(dim=1)[:, None]
    if bool(broken.any()):
        face, point = broken.nonzero()[0].tolist()
        raise InputError(
            f"landmark {point} of face {face} is {points[face, point].tolist()}. A face has all 68 "
            "landmarks, or NaN everywhere if it has none."
        )
    return points


def _plain(points: Any) -> Tensor:
    return torch.as_tensor(points).detach().as_subclass(Tensor).double().cpu()


def face_parts(landmarks: Any, size: tuple[int, int]) -> Tensor:
    """Draw the parts of faces: the convex hulls of their landmarks, and a margin around the smaller parts.

    The face reaches from the chin to the eyebrows; hair and forehead have no landmarks.

    Args:
        landmarks: Landmarks of B faces, as [`as_landmarks`][attnguide.masks.as_landmarks] takes them.
        size: Size `(H, W)` of the images.

    Returns:
        Masks `(B, 5, H, W)` of 0 and 1 on the CPU, in the order of `FACE_PARTS`; all zero for a part that is
        outside the image or whose landmarks enclose no area, and for a face without landmarks.

    Raises:
        InputError: If the landmarks are not `(B, 68, 2)`, or some of a face are NaN or infinite.
    """
    faces = as_landmarks(landmarks).numpy()
    masks = np.zeros((len(faces), len(FACE_PARTS), *size), dtype=np.float32)
    for index, face in enumerate(faces):
        if not bool(np.isnan(face).any()):
            masks[index] = [_draw(name, face, size) for name in FACE_PARTS]
    return torch.from_numpy(masks)


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
