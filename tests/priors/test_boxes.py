"""Boxes as maps: a cell is the share of it that a box covers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.tv_tensors import BoundingBoxes

from attnguide.errors import InputError
from attnguide.interfaces import PriorMaps
from attnguide.pairs import resolve
from attnguide.priors.boxes import BoxPrior
from attnguide.trace import Trace

SIZE = (12, 20)


def drawn(boxes: Any, count: int, size: tuple[int, int] = SIZE) -> PriorMaps:
    logits = torch.zeros(count, 3)
    trace = Trace(torch.zeros(count, 3, *SIZE), logits, {})
    maps = BoxPrior()(trace, resolve([0], logits), size, boxes=boxes)
    assert isinstance(maps, PriorMaps)
    return maps


def painted(box: list[int]) -> Tensor:
    mask = torch.zeros(SIZE)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return mask


def test_whole_pixels_are_a_painted_mask() -> None:
    boxes = [[2, 1, 9, 7], [0, 0, 20, 12], [19, 11, 20, 12]]
    found = drawn(torch.tensor(boxes).float(), 3)
    torch.testing.assert_close(found.maps, torch.stack([painted(box) for box in boxes]))
    small = drawn(torch.tensor(boxes).float(), 3, (6, 5))
    expected = torch.nn.functional.avg_pool2d(found.maps[:, None], (2, 4))[:, 0]
    torch.testing.assert_close(small.maps, expected)
    assert small.weights.tolist() == [1, 1, 1]


def test_the_area_is_that_of_the_box() -> None:
    box = torch.tensor([[1.3, 2.6, 7.9, 10.1]])
    torch.testing.assert_close(drawn(box, 1).maps.sum(), (7.9 - torch.tensor(1.3)) * (10.1 - 2.6))


def test_forms_of_a_box_and_of_none() -> None:
    box = torch.tensor([3.0, 2.0, 8.0, 9.0])
    expected = drawn(box[None], 1).maps[0]
    converted = BoundingBoxes(box_convert(box[None], "xyxy", "cxcywh"), format="CXCYWH", canvas_size=SIZE)
    found = drawn(
        [box, box[None], converted, box.numpy(), None, torch.full((4,), -1.0), torch.zeros(0, 4)], 7
    )
    for index in range(4):
        torch.testing.assert_close(found.maps[index], expected)
    assert found.weights.tolist() == [1, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[5.0, 2, 3, 9]], "no area inside the 20×12 image"),
        ([[25.0, 2, 30, 9]], "no area inside"),
        ([[float("nan"), 2, 3, 9]], "no area inside"),
        ([[1.0, 2, 3]], r"must be \(x1, y1, x2, y2\)"),
        ([None, None], "2 entries, the batch has 1"),
        ("everywhere", "got str"),
    ],
)
def test_boxes_that_cannot_be(boxes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        drawn(boxes, 1)
