"""Boxes on landmarks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.errors import AttnGuideError
from attnguide_segmentation.boxes import landmark_boxes


def test_boxes_lie_on_the_landmarks() -> None:
    points = torch.tensor([[[30.0, 30], [60, 30], [45, 45], [30, 60], [torch.nan, torch.nan]]])
    boxes = landmark_boxes(points, (96, 96))
    assert boxes.shape == (1, 16, 96, 96)
    for landmark, (x, y) in enumerate(points[0, :4].tolist()):
        for ratio in range(3):
            rows, columns = boxes[0, 3 * landmark + ratio].nonzero().float().mean(dim=0).tolist()
            assert (columns, rows) == (x, y)
    sides = [box.nonzero().amax(dim=0) - box.nonzero().amin(dim=0) for box in boxes[0, :3]]
    assert sides[0][0] == sides[0][1]
    assert sides[1][0] > 1.8 * sides[1][1]  # twice as high as wide
    assert sides[2][1] > 1.8 * sides[2][0]
    assert not boxes[0, 12:15].any()
    assert boxes[0, 15].all()
    faces = ProceduralFaces(2, 64).stack()
    assert landmark_boxes(faces.landmarks.as_subclass(Tensor), (64, 64)).shape == (2, 16, 64, 64)


def test_bad_boxes() -> None:
    with pytest.raises(AttnGuideError, match=r"shape \(2, 4, 2\)"):
        landmark_boxes(torch.zeros(2, 4, 2), (8, 8))
    with pytest.raises(AttnGuideError, match="area=0"):
        landmark_boxes(torch.zeros(2, 5, 2), (8, 8), area=0)
