"""The part of a picture that a model's transform lets through."""

from __future__ import annotations

import pytest

from attnguide import models
from attnguide_gradcam_iou.painting.watching import seen_box


def test_where_a_transform_looks() -> None:
    loaded = models.load("torchvision/resnet18", num_classes=2)
    left, top, right, bottom = seen_box(loaded, (500, 300))
    # The short side becomes 256 pixels, and 224 of them are cut out of the middle.
    assert (right - left, bottom - top) == pytest.approx((262.5, 262.5), abs=2)
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((250, 150), abs=1.5)
    assert seen_box(models.load(), (64, 64)) == pytest.approx((0, 0, 64, 64), abs=0.5)
