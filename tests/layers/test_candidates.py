"""Candidates: every layer with rows and columns, and which the automatic choice takes."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from tests.helpers.models import CLASSES, batch, cnn, tiny_vit
from torch import nn

from attnguide.layers import choose, find_layers, list_candidates, stages
from attnguide.layers.candidates import images_as_layer
from attnguide.trace import Shortcuts

IMAGES = batch()[0]


def test_blocks_are_listed_with_their_shapes() -> None:
    model = cnn().eval()
    candidates = {candidate.layer.name: candidate for candidate in list_candidates(model, IMAGES)}
    values = IMAGES
    for name in ("block1", "block2", "block3", "block4"):
        values = getattr(model, name)(values)
        assert candidates[name].shape == tuple(values.shape[1:])
        assert candidates[name].layer.layout.grid == tuple(values.shape[2:])
        assert candidates[name].channels == values.shape[1]
        # Pooling computes no features of its own.
        assert candidates[name].usable == (name in ("block1", "block4"))
    assert "head" not in candidates
    assert choose(model, list(candidates.values())).layer.name == "block4"


def test_stages_are_the_sizes_of_maps() -> None:
    candidates = list_candidates(cnn().eval(), IMAGES)
    sizes = [{candidate.layer.layout.grid for candidate in stage} for stage in stages(candidates)]
    assert all(len(size) == 1 for size in sizes)
    grids = [size.pop() for size in sizes]
    assert grids == sorted(grids, reverse=True)


def test_global_maximum_pooling_leaves_few_positions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 2, 3, 2, 1), nn.GELU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(2, CLASSES)
    ).eval()
    spread = {candidate.layer.name: candidate.layer.spread for candidate in list_candidates(model, IMAGES)}
    (features,) = (values.detach().requires_grad_() for values in [model[:2](IMAGES[:1])])
    (gradient,) = torch.autograd.grad(model[2:](features).square().sum(), features)
    assert spread["1"] == pytest.approx(float((gradient.abs().sum(dim=1) > 0).float().mean()), abs=0.02)


def test_a_layer_without_its_shortcuts() -> None:
    (layer,) = find_layers(tiny_vit(depth=2).eval(), IMAGES)
    assert layer.shortcuts.rowwise
    plain = layer.plain()
    assert (plain.name, plain.layout, plain.how) == (layer.name, layer.layout, layer.how)
    assert plain.shortcuts == Shortcuts()
    images = images_as_layer(cnn(), IMAGES)
    assert images.name == "input"
    assert torch.equal(images.layout.spatial(IMAGES), IMAGES)


def test_the_stages_of_bottleneck_networks_end_where_all_passes_through() -> None:
    images = torch.rand(2, 3, 64, 64)
    for model in (torchvision.models.resnet50(weights=None), timm.create_model("resnet26t")):
        names = [find_layers(model, images, f"stage:-{stage}")[0].name for stage in (1, 2, 3, 4)]
        assert names == ["layer4", "layer3", "layer2", "layer1"]


@pytest.mark.parametrize(
    "name",
    [
        "resnet26t",
        "convnext_atto",
        "mobilenetv3_small_050",
        "efficientnet_b0",
        "swin_tiny_patch4_window7_224",
    ],
)
def test_stages_are_those_of_the_metadata(name: str) -> None:
    model = timm.create_model(name)
    size = 224 if "swin" in name else 96
    info = getattr(model.feature_info, "info", model.feature_info)
    for stage in range(1, len(info) + 1):
        found = find_layers(model, torch.rand(1, 3, size, size), f"stage:-{stage}")[0]
        assert found.name == info[-stage]["module"]


def test_the_last_block_before_a_class_token_is_searched_for_a_layer() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3)
    found = [find_layers(model, torch.rand(1, 3, 64, 64), f"stage:{stage}")[0] for stage in range(3)]
    # Behind the last attention only the class token matters: blocks.2 has no gradient at the patches.
    assert [layer.name for layer in found] == ["blocks.0", "blocks.1", "blocks.2.norm1"]
