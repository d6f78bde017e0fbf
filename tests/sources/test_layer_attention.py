"""Layer attention is the mean over the channels, the same for every class."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from tests.helpers.models import CLASSES, batch, cnn, tiny_vit
from torch import Tensor, nn

import attnguide as ag
from attnguide.errors import LayerError

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


@pytest.mark.parametrize(
    "make",
    [
        lambda: torchvision.models.swin_t(weights=None, num_classes=7),
        lambda: torchvision.models.swin_v2_t(weights=None, num_classes=7),
        lambda: timm.create_model("swinv2_cr_tiny_ns_224", num_classes=7, img_size=64, window_size=2),
        lambda: timm.create_model("pvt_v2_b0", num_classes=7),
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64, depth=2),
    ],
    ids=["swin_t", "swin_v2_t", "swinv2_cr", "pvt_v2", "vit"],
)
def test_the_automatic_layer_is_no_rearranged_layer_norm(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    shown = ag.explain(make().eval(), torch.rand(1, 3, 64, 64), "layer_attention", size=None)
    assert shown.maps.abs().max() > 1e-4  # a layer norm that is not trained has a mean of about 1e-8


def test_no_gradient_is_needed_anywhere_in_the_model() -> None:
    class NoGrad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torchvision.models.resnet18(weights=None, num_classes=5)

        @torch.no_grad()
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.body(images)
            return logits

    model, images = NoGrad().eval(), torch.rand(2, 3, 64, 64)
    shown = ag.explain(model, images, "layer_attention", size=None)
    expected = ag.explain(model.body, images, "layer_attention", size=None)
    assert shown.layer == f"body.{expected.layer}"
    torch.testing.assert_close(shown.maps, expected.maps)
    with pytest.raises(LayerError, match="no_grad"):
        ag.explain(model, images, "grad_cam")
