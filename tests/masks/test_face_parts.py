"""Parts of faces around landmarks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from attnguide.errors import InputError
from attnguide.masks import FACE_PARTS, as_landmarks, face_parts


def face(centre: float = 50.0, radius: float = 30.0) -> Tensor:
    """A face of circles: jaw and brows on a large one, each part on one of its own."""

    def circle(count: int, x: float, y: float, wide: float) -> Tensor:
        angles = torch.arange(count) * (2 * math.pi / count)
        return torch.stack([x + wide * angles.cos(), y + wide * angles.sin()], dim=1)

    return torch.cat([
        circle(27, centre, centre, radius),
        circle(9, centre, centre, 4.0),  # nose
        circle(6, centre - 12, centre - 10, 5.0),  # eyes
        circle(6, centre + 12, centre - 10, 5.0),
        circle(20, centre, centre + 12, 6.0)[[*range(0, 20)]],
    ])  # fmt: skip


def test_areas_are_those_of_hulls_and_margins() -> None:
    masks = face_parts(face()[None], (100, 100))
    assert masks.shape == (1, len(FACE_PARTS), 100, 100)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    area = dict(zip(FACE_PARTS, masks[0].sum(dim=(1, 2)).tolist(), strict=True))

    def grown(sides: int, radius: float, margin: float) -> float:
        """Area of a regular polygon, and of what is nearer to it than the margin (Steiner's formula)."""
        side = 2 * radius * math.sin(math.pi / sides)
        polygon = sides * radius**2 * math.sin(2 * math.pi / sides) / 2
        return polygon + sides * side * margin + math.pi * margin**2

    margin = 0.06 * 24  # of the distance of the eyes
    assert area["face"] == pytest.approx(grown(27, 30.0, 0.0), rel=0.01)
    assert area["nose"] == pytest.approx(grown(9, 4.0, margin), rel=0.1)
    assert area["eyes"] == pytest.approx(2 * grown(6, 5.0, margin), rel=0.1)


def test_faces_without_landmarks_have_no_parts() -> None:
    nowhere = torch.full((68, 2), math.nan)
    masks = face_parts([face(), None, nowhere, -torch.ones(68, 2)], (100, 100))
    assert masks.flatten(1).any(dim=1).tolist() == [True, False, False, False]
    assert face_parts(torch.empty(0, 68, 2), (8, 8)).shape == (0, 5, 8, 8)
    assert face_parts([], (8, 8)).shape == (0, 5, 8, 8)
    assert as_landmarks(np.full((1, 68, 2), -1)).isnan().all()


def test_what_is_outside_is_cut_off() -> None:
    masks = face_parts(face(centre=0.0)[None], (100, 100))
    assert masks[0, FACE_PARTS.index("face")].sum() == pytest.approx(math.pi * 900 / 4, rel=0.05)
    assert not face_parts(face(centre=-50.0)[None], (100, 100)).any()


def test_what_is_no_landmarks() -> None:
    for wrong in (torch.zeros(2, 98, 2), torch.zeros(68, 2), torch.zeros(1, 5, 2)):
        with pytest.raises(InputError, match=r"landmarks have shape .* expected \(B, 68, 2\)"):
            face_parts(wrong, (9, 9))
    for junk in ("points", [[1, 2], [3]], {"a": 1}, [torch.zeros(68, 2), torch.zeros(5, 2)]):
        with pytest.raises(InputError, match="landmarks must be numbers"):
            face_parts(junk, (9, 9))
    broken = face()[None].repeat(2, 1, 1)
    broken[1, 7, 0] = math.nan
    with pytest.raises(InputError, match=r"landmark 7 of face 1 is \[nan,"):
        face_parts(broken, (9, 9))
