"""Facial landmarks: known schemes, and landmarks that follow augmentations of the image.

Everything in this plugin uses the 68 points of 300-W (iBUG), numbered from 0, as x and y in pixels; (0, 0) is
the centre of the first pixel. [`to_68`][attnguide_action_units.landmarks.to_68] converts other schemes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms
from torchvision.tv_tensors import KeyPoints

from attnguide.errors import InputError
from attnguide.functional import may_read

__all__ = ["CANONICAL", "FROM_98", "FROM_MESH", "MIRROR", "FaceLandmarks", "to_68"]

#: The mirror image of each point.
MIRROR: tuple[int, ...] = (
    *range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1),
    45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40,
    *range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), *range(67, 64, -1),
)  # fmt: skip

#: The 68 points among the 98 of WFLW: every other point of the jaw, the upper edge of the brows, and of the
#: eight points of an eye the six that 300-W has.
FROM_98: tuple[int, ...] = (
    *range(0, 33, 2), *range(33, 38), *range(42, 47), *range(51, 60),
    60, 61, 63, 64, 65, 67, 68, 69, 71, 72, 73, 75, *range(76, 96),
)  # fmt: skip

#: The 68 points among the 478 (or 468, without irises) of mediapipe's face mesh.
FROM_MESH: tuple[int, ...] = (
    162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389,
    70, 63, 105, 66, 107, 336, 296, 334, 293, 300, 168, 197, 5, 4, 75, 97, 2, 326, 305,
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,
    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87,
)  # fmt: skip

#: A frontal face: origin between the outer eye corners, whose distance is 1; y towards the chin. Its right
#: half (of the subject); the other one is its mirror image.
_HALF: dict[int, tuple[float, float]] = {
    0: (-0.77, -0.13), 1: (-0.78, 0.20), 2: (-0.77, 0.36), 3: (-0.70, 0.71), 4: (-0.63, 0.87),
    5: (-0.55, 0.97), 6: (-0.36, 1.13), 7: (-0.15, 1.23), 8: (0.0, 1.25),
    17: (-0.64, -0.17), 18: (-0.57, -0.23), 19: (-0.46, -0.26), 20: (-0.32, -0.25), 21: (-0.16, -0.23),
    27: (0.0, -0.04), 28: (0.0, 0.13), 29: (0.0, 0.28), 30: (0.0, 0.37),
    31: (-0.15, 0.47), 32: (-0.09, 0.51), 33: (0.0, 0.51),
    36: (-0.5, 0.0), 37: (-0.43, -0.04), 38: (-0.32, -0.04), 39: (-0.20, 0.02), 40: (-0.30, 0.03),
    41: (-0.41, 0.04),
    48: (-0.29, 0.78), 49: (-0.18, 0.69), 50: (-0.09, 0.66), 51: (0.0, 0.68),
    57: (0.0, 0.95), 58: (-0.09, 0.94), 59: (-0.17, 0.91),
    60: (-0.26, 0.78), 61: (-0.07, 0.73), 62: (0.0, 0.74), 66: (0.0, 0.85), 67: (-0.08, 0.85),
}  # fmt: skip


def _canonical() -> Tensor:
    points = torch.full((68, 2), torch.nan)
    for index, (x, y) in _HALF.items():
        points[index] = torch.tensor([x, y])
        points[MIRROR[index]] = torch.tensor([-x, y])
    return points


#: A frontal face, `(68, 2)`: the distance between the outer eye corners is 1, and the origin between them.
CANONICAL: Tensor = _canonical()


class FaceLandmarks(KeyPoints):  # type: ignore[misc]
    """68 landmarks `(…, 68, 2)` that move with the image, and keep their meaning when it is flipped.

    torchvision's key points move too, but after a flip the right eye would be named the left one:

    ```python
    points = FaceLandmarks(landmarks, canvas_size=image.shape[-2:])
    image, points = v2.RandomHorizontalFlip()(tv_tensors.Image(image), points)
    ```
    """


def _register(flip: Any) -> None:
    move = transforms._utils._get_kernel(flip, KeyPoints)

    def flipped(points: FaceLandmarks, *args: Any, **kwargs: Any) -> FaceLandmarks:
        if points.shape[-2] != len(MIRROR):
            raise InputError(f"a face has 68 landmarks (…, 68, 2), got {tuple(points.shape)}.")
        moved = move(points, *args, **kwargs).as_subclass(Tensor)
        return FaceLandmarks(moved[..., list(MIRROR), :], canvas_size=points.canvas_size)

    transforms.register_kernel(flip, FaceLandmarks)(flipped)


for _flip in (transforms.horizontal_flip, transforms.vertical_flip):
    _register(_flip)


def to_68(points: Tensor | np.ndarray[Any, Any]) -> Tensor:
    """Convert landmarks of another scheme, which is known by the number of points, to 68 points.

    Args:
        points: `(…, P, 2)`, or `(…, P, 3)` whose third coordinate is dropped: 68; 98 (WFLW); 478 or 468
            (mediapipe's mesh, in pixels); or 5 (eye, eye, nose tip, mouth corner, mouth corner, each from
            left to right in the image), which place a frontal face.

    Returns:
        `(…, 68, 2)`, float32; NaN where a point was NaN, and for a face whose points are all −1, which stands
        for "no landmarks".

    Raises:
        InputError: If it is another number of points, or not an array of numbers; or if five points cannot be
            those of an upright face.
    """
    try:
        tensor = torch.as_tensor(points)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"landmarks must be an array of numbers (…, 68, 2): {error}.") from error
    if tensor.ndim < 2 or tensor.shape[-1] not in (2, 3) or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(
            f"landmarks have shape {tuple(tensor.shape)} and type {tensor.dtype}; they must be numbers "
            "(…, 68, 2), x and y in pixels."
        )
    tensor = tensor[..., :2].as_subclass(Tensor).float()
    nowhere = (tensor == -1).flatten(-2).all(dim=-1)
    tensor = torch.where(nowhere[..., None, None], torch.nan, tensor)
    count = tensor.shape[-2]
    if count == 5:
        _check_five(tensor)
        return _fitted(tensor)
    known = {68: tuple(range(68)), 98: FROM_98, 468: FROM_MESH, 478: FROM_MESH}
    if count not in known:
        raise InputError(
            f"{count} landmarks belong to none of the known schemes: 68 (300-W), 98 (WFLW), 478 (mediapipe's "
            "mesh), or 5 (eyes, nose tip, mouth corners)."
        )
    return tensor[..., list(known[count]), :]


def _check_five(five: Tensor) -> None:
    """Refuse points that cannot be a face; fitted, they would become one, of another size."""
    if not may_read(five):
        return
    faces = five.reshape(-1, 5, 2)
    there = ~faces.isnan().flatten(1).all(dim=1)
    eyes, mouth = faces[:, 1] - faces[:, 0], faces[:, 4] - faces[:, 3]
    middle = (faces[:, 0] + faces[:, 1]) / 2
    below = torch.stack([faces[:, 2] - middle, faces[:, 3:].mean(dim=1) - middle], dim=1)
    area = eyes[:, None, 0] * below[..., 1] - eyes[:, None, 1] * below[..., 0]
    fine = (area > 0).all(dim=1) & ((eyes * mouth).sum(dim=1) > 0)
    wrong = (there & ~fine).nonzero()[:, 0]
    if len(wrong):
        raise InputError(
            f"the five landmarks {faces[wrong[0]].tolist()} of face {int(wrong[0])} are not those of an "
            "upright face. They are eye, eye, nose tip, mouth corner, mouth corner, each pair from left to "
            "right in the image, as (x, y) in pixels, y downwards; all of them or none."
        )


def _fitted(five: Tensor) -> Tensor:
    """Move, turn and scale the canonical face so that it fits five points best, by least squares."""
    face = CANONICAL.to(five.device)
    model = torch.stack([face[36:42].mean(0), face[42:48].mean(0), face[30], face[48], face[54]])
    # As complex numbers the best turn and scale is one factor.
    target, source = (torch.view_as_complex(part.contiguous()) for part in (five, model))
    middle, own = target.mean(dim=-1, keepdim=True), source.mean()
    factor = ((target - middle) * (source - own).conj()).sum(dim=-1, keepdim=True)
    factor = factor / (source - own).abs().square().sum()
    whole = torch.view_as_complex(face.contiguous())
    return torch.view_as_real(factor * (whole - own) + middle)
