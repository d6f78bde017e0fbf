"""How much of the image a position sees: against receptive fields that are known."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.models import batch, cnn, tiny_vit
from torch import nn

import attnguide as ag
from attnguide.layers import find_layers, find_local, reach


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


def staged() -> nn.Sequential:
    """Three stages, of which a position sees 3×3, 8×8 and, all weights being alike, about 40×40 pixels."""
    body: list[nn.Module] = [nn.Conv2d(3, 1, 3, padding=1), nn.AvgPool2d(2), nn.Conv2d(1, 1, 3, padding=1)]
    body += [nn.AvgPool2d(2), nn.Conv2d(1, 1, 9, padding=4)]
    for layer in body:
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 1.0)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))


def test_the_local_layer_is_the_deepest_stage_that_sees_little() -> None:
    model, images = staged(), torch.randn(4, 3, 128, 128)
    found = find_local(model, images)
    assert found is not None
    assert found.name == "2"  # 8×8 of 128×128 are 0.4 %, 40×40 nearly a tenth
    wider = find_local(model, images, most=0.2)
    assert wider is not None
    assert wider.name == "4"
    narrow = find_local(model, images, most=0.002)
    assert narrow is not None
    assert narrow.name == "0"
    assert find_local(model, images, most=1e-5) is None


def test_the_local_layer_does_not_depend_on_what_images_show() -> None:
    model = staged()
    found = [find_local(model, torch.full((1, 3, 128, 128), value)) for value in (0.0, 1.0)]
    assert [layer and layer.name for layer in found] == ["2", "2"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_transformers_and_small_images_have_no_local_layer() -> None:
    assert find_local(tiny_vit(), torch.randn(2, 3, 32, 32)) is None
    assert find_local(staged(), torch.randn(2, 3, 20, 20)) is None
