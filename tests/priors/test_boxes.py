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


def drawn(boxes: Any, count: int, size: tuple[int, int] = SIZE, **settings: Any) -> PriorMaps:
    logits = torch.zeros(count, 3)
    trace = Trace(torch.zeros(count, 3, *SIZE), logits, {})
    maps = BoxPrior(**settings)(trace, resolve([0], logits), size, boxes=boxes)
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


def test_boxes_in_pixels_of_larger_originals() -> None:
    boxes = torch.tensor([[2.0, 1, 9, 7], [0, 0, 20, 12], [8, 3, 18, 10]])
    with pytest.raises(InputError, match=r"box 0 of sample 0.*no area inside.*scaled by the same factor"):
        drawn(boxes[2:] * 4, 1)
    with pytest.raises(InputError, match=r"far beyond their images, 2 of 3: x up to 50, y up to 30.*20×12"):
        drawn(torch.tensor([[5.0, 2.5, 19, 11], [0, 0, 50, 30], [10, 4, 41, 11]]), 3)
    logits, prior = torch.zeros(3, 2), BoxPrior()
    trace = Trace(torch.zeros(3, 3, *SIZE), logits, {})
    with pytest.warns(UserWarning, match=r"2 of 3 boxes reach beyond.*cut off there: x up to 30, y up to 18"):
        prior(trace, resolve([0], logits), SIZE, boxes=boxes * 1.5)
    prior(trace, resolve([0], logits), SIZE, boxes=boxes * 1.5)  # once


def test_boxes_at_the_border_are_fine() -> None:
    drawn(torch.tensor([[2.0, 1, 20.5, 12.5], [0, 0, 20.9, 12]]), 2)
    drawn(torch.tensor([[-30.0, -9, 50, 30]]), 1)  # zoomed in


def test_boxes_that_know_the_size_of_their_images() -> None:
    box = torch.tensor([[3.0, 2.0, 8.0, 9.0]])
    other = BoundingBoxes(box, format="XYXY", canvas_size=(24, 40))
    for boxes in (other, [other]):
        with pytest.raises(InputError, match="pixels of 40×24 images, the model sees 20×12 pixels"):
            drawn(boxes, 1)


def test_dilation_grows_each_side_by_half_its_share() -> None:
    boxes = torch.tensor([[4.0, 4, 12, 8], [0, 0, 4, 4], [14, 8, 20, 12]])
    assert repr(BoxPrior(dilation=0.5)) == "BoxPrior(dilation=0.5)"
    found = drawn(boxes, 3, dilation=0.5)
    # By a quarter of 8 and of 4 on each side; what lies beside the image is cut off.
    expected = [[2, 3, 14, 9], [0, 0, 5, 5], None]
    torch.testing.assert_close(found.maps[0], painted(expected[0] or []))
    torch.testing.assert_close(found.maps[1], painted(expected[1] or []))
    torch.testing.assert_close(found.maps[2].sum(), torch.tensor((20 - 12.5) * (12 - 7)))


def test_jitter_moves_edges_within_its_share_and_by_box_and_seed_alone() -> None:
    fine = (480, 800)  # cells of a fortieth of a pixel
    boxes = torch.tensor([[5.0, 4, 15, 8]]) + torch.linspace(0, 0.5, 200)[:, None]
    state = torch.get_rng_state()
    edges = []
    for map_, box in zip(drawn(boxes, 200, fine, jitter=0.2, seed=3).maps, boxes, strict=True):
        rows, columns = map_.sum(dim=1).nonzero()[:, 0], map_.sum(dim=0).nonzero()[:, 0]
        found = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 40
        edges.append((found - box) / torch.tensor([10.0, 4, 10, 4]))
    moved = torch.stack(edges)
    assert torch.equal(torch.get_rng_state(), state)
    assert float(moved.abs().max()) < 0.21
    # Uniform in ±0.2: the mean is 0 and the standard deviation 0.2/√3, up to the errors of 200 draws.
    torch.testing.assert_close(moved.mean(dim=0), torch.zeros(4), rtol=0, atol=4 * 0.2 / (3 * 200) ** 0.5)
    torch.testing.assert_close(moved.std(dim=0), torch.full((4,), 0.2 / 3**0.5), rtol=0.2, atol=0)
    whole = drawn(boxes[:8], 8, jitter=0.2, seed=3).maps
    torch.testing.assert_close(drawn(boxes[:8].flip(0), 8, jitter=0.2, seed=3).maps.flip(0), whole)
    assert not torch.equal(drawn(boxes[:8], 8, jitter=0.2, seed=4).maps, whole)


def test_missing_boxes_stay_missing() -> None:
    found = drawn([None, [4, 4, 12, 8]], 2, dilation=0.2, jitter=0.2)
    assert found.weights.tolist() == [0, 1]
    # One that the image hardly holds leaves it with some seeds.
    tries = [drawn([[-10.0, 4, 0.01, 8]], 1, jitter=0.4, seed=seed) for seed in range(8)]
    left = [not bool(each.maps.any()) for each in tries]
    assert set(left) == {True, False}
    assert [float(each.weights) == 0 for each in tries] == left


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dilation": -0.1}, "dilation=-0.1"),
        ({"dilation": float("inf")}, "dilation=inf"),
        ({"jitter": 0.5}, r"jitter=0.5 must be .* in \[0, 0.5\)"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_that_are_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BoxPrior(**settings)
