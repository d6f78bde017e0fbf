"""New heads for classifiers."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.models import cnn, tiny_vit
from tests.plugins.gradcam_iou.samples import (
    SIZE,
)
from torch import nn

from attnguide.errors import InputError
from attnguide_gradcam_iou.finetune import with_head


def test_with_head() -> None:
    images = torch.rand(2, 3, SIZE, SIZE)
    plain = cnn(7).double().eval()
    assert with_head(plain, 3) is plain
    assert plain(images.double()).shape == (2, 3)
    assert not plain.head.training
    convolutional = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 9, 1, bias=False), nn.AdaptiveAvgPool2d(1))
    assert with_head(convolutional, 2)(images).shape == (2, 2, 1, 1)
    assert convolutional[1].bias is None
    assert with_head(tiny_vit(), 5)(images).shape == (2, 5)  # timm's own way
    with pytest.raises(InputError, match="classes=0"):
        with_head(plain, 0)
    with pytest.raises(InputError, match="no linear layer"):
        with_head(nn.Sequential(nn.ReLU()), 2)
