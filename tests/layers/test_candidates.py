"""Candidates: every layer with rows and columns, and which the automatic choice takes."""

from __future__ import annotations

import pytest
import torch
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
