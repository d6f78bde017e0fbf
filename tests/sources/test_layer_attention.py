"""Layer attention is the mean over the channels, the same for every class."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.models import CLASSES, batch, cnn, tiny_vit

import attnguide as ag

IMAGES = batch()[0]


def test_maps_are_means_over_the_channels() -> None:
    model = cnn().eval()
    with torch.no_grad():
        expected = model[:2](IMAGES).mean(dim=1)
    found = ag.explain(model, IMAGES, "layer_attention", "all", layer="block2", size=None)
    assert found.maps.shape == (4, CLASSES, 8, 8)
    for cls in range(CLASSES):
        torch.testing.assert_close(found.maps[:, cls], expected)


def test_the_mean_behind_a_layer_norm_is_only_rounding() -> None:
    model = tiny_vit().eval()
    with pytest.warns(UserWarning, match="layer attention is zero everywhere"):
        found = ag.explain(model, IMAGES, "layer_attention", layer="blocks.1.norm1", size=None)
    assert not bool(found.maps.any())
    chosen = ag.explain(model, IMAGES, "layer_attention", size=None)
    assert "norm" not in chosen.layer
    assert bool(chosen.maps.any())
