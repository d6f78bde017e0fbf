"""Masks that are predicted from others: on images whose object has a color of its own."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.models import cnn
from torch import Tensor

from attnguide.errors import InputError
from attnguide.masks import MaskCompletion
from attnguide.testing import hooks

SIDE = 32


def data(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Red squares on grey noise, and where they are."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(size, 3, SIDE, SIDE, generator=generator)
    masks = torch.zeros(size, SIDE, SIDE)
    corners = torch.randint(2, 14, (size, 2), generator=generator).tolist()
    for image, mask, (top, left) in zip(images, masks, corners, strict=True):
        mask[top : top + 16, left : left + 14] = 1
        image[0] += 3 * mask
    return images, masks


def overlap(found: Tensor, masks: Tensor) -> float:
    both, either = (found > 0) & (masks > 0), (found > 0) | (masks > 0)
    return float((both.flatten(1).sum(dim=1) / either.flatten(1).sum(dim=1)).mean())


def test_masks_of_others_are_met() -> None:
    torch.manual_seed(0)
    model = cnn()
    flags, before = [module.training for module in model.modules()], hooks(model)
    images, masks = data(20)
    given: list[Tensor | None] = [*masks[:10], *[None] * 10]
    completion = MaskCompletion(model).fit([(images[:8], given[:8]), (images[8:], given[8:])])
    assert completion.iou > 0.6
    others, theirs = data(12, seed=1)
    assert overlap(completion(others), theirs) > 0.6
    assert [module.training for module in model.modules()] == flags
    assert hooks(model) == before
    assert all(weight.grad is None for weight in model.parameters())


def test_boxes_are_narrowed() -> None:
    torch.manual_seed(0)
    images, masks = data(20)
    # Boxes that reach 4 pixels further at each side.
    boxes = torch.nn.functional.max_pool2d(masks[:, None], 9, 1, 4)[:, 0]
    completion = MaskCompletion(cnn()).fit([(images, boxes)], coarse=True)
    narrowed = completion(images, boxes)
    assert not bool(((narrowed > 0) & (boxes == 0)).any())
    assert overlap(narrowed, masks) > overlap(boxes, masks) + 0.1
    # Where nothing looks like an object the box stays.
    plain = torch.zeros(1, 3, SIDE, SIDE)
    torch.testing.assert_close(completion(plain, boxes[:1]), boxes[:1])


def test_nothing_found_is_no_mask() -> None:
    torch.manual_seed(0)
    images, masks = data(20)
    completion = MaskCompletion(cnn(), threshold=0.99999).fit([(images, masks)])
    assert bool(completion(torch.zeros(2, 3, SIDE, SIDE)).isnan().all())


def test_errors() -> None:
    images, masks = data(4)
    with pytest.raises(InputError, match=r"threshold=1\.5"):
        MaskCompletion(cnn(), threshold=1.5)
    with pytest.raises(InputError, match="call fit first"):
        MaskCompletion(cnn())(images)
    with pytest.raises(InputError, match="none of the images has a mask"):
        MaskCompletion(cnn()).fit([(images, None)])
    with pytest.raises(InputError, match="outside"):
        MaskCompletion(cnn()).fit([(images, 255 * masks)])
