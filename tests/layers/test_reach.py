"""How much of the image a position sees: against receptive fields that are known."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.models import batch, cnn, tiny_vit
from torch import nn

import attnguide as ag
from attnguide.layers import find_layers, reach


def chain(depth: int) -> nn.Sequential:
    """Convolutions 3×3 with weights of 1, whose gradient is spread over (2·depth + 1)² pixels."""
    body = [nn.Conv2d(3 if number == 0 else 1, 1, 3, padding=1, bias=False) for number in range(depth)]
    for layer in body:
        nn.init.constant_(layer.weight, 1.0)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))


def test_one_convolution_sees_its_kernel() -> None:
    images = torch.randn(2, 3, 32, 32)
    model = chain(1)
    found = reach(model, images, find_layers(model, images, "0"))
    # All nine pixels have the same gradient; 90 % of it needs all of them.
    assert found == {"0": pytest.approx(9 / 32**2)}


def test_deeper_layers_see_more() -> None:
    images = torch.randn(2, 3, 32, 32)
    model = chain(4)
    found = [*reach(model, images, find_layers(model, images, ["0", "1", "2", "3"])).values()]
    assert found == sorted(found)
    assert found[-1] < 81 / 32**2  # the rim of a receptive field counts for little


def test_attention_that_mixes_all_sees_all() -> None:
    images = torch.randn(1, 3, 32, 32)
    model = tiny_vit(depth=1)
    attention = model.blocks[0].attn  # type: ignore[index]
    with torch.no_grad():
        attention.qkv.weight[: 2 * 12] = 0  # the same probability for each patch
        attention.qkv.weight[2 * 12 :] *= 100
        attention.proj.weight *= 100
    found = reach(model, images, find_layers(model, images, ["patch_embed", "blocks.0"]))
    assert found["patch_embed"] <= 1 / 16
    assert found["blocks.0"] > 0.5


def test_the_images_see_themselves_and_a_check_tells() -> None:
    images, labels, masks = batch()
    model = cnn()
    with ag.Guide(model, layer="input", source="input_gradient") as guide:
        report = guide.check(images, labels, mask=masks)
    assert report.sees == {"input": pytest.approx(1 / 32**2)}
    assert "depends on" not in str(report)
    with ag.Guide(model) as guide:
        report = guide.check(images, labels, mask=masks)
    (share,) = report.sees.values()
    assert ("proves little" in str(report)) == (share > 0.25)
    assert all(weight.grad is None for weight in model.parameters())
