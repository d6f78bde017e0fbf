"""Where rows and columns are, and which layer is looked at."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from tests.helpers.models import CLASSES, cnn, tiny_vit
from tests.helpers.state import snapshot
from torch import Tensor, nn

import attnguide as ag
from attnguide.errors import LayerError
from attnguide.layers import choose, find_layer, layout_of, list_candidates
from attnguide.trace import Layout


@pytest.mark.parametrize(
    ("shape", "image", "expected"),
    [
        ((2, 512, 7, 7), (224, 224), Layout("nchw", (7, 7))),
        ((2, 7, 7, 512), (224, 224), Layout("nhwc", (7, 7))),
        ((2, 8, 8, 8), (64, 64), Layout("nchw", (8, 8))),
        ((2, 64, 6, 10), (48, 80), Layout("nchw", (6, 10))),
        ((2, 6, 10, 64), (48, 80), Layout("nhwc", (6, 10))),
        ((2, 64, 5, 7), (33, 50), Layout("nchw", (5, 7))),
        ((2, 196, 192), (224, 224), Layout("tokens", (14, 14))),
        ((2, 197, 192), (224, 224), Layout("tokens", (14, 14), 1)),
        ((2, 198, 192), (224, 224), Layout("tokens", (14, 14), 2)),
        ((2, 201, 192), (224, 224), Layout("tokens", (14, 14), 5)),
        ((2, 60 + 1, 32), (48, 80), Layout("tokens", (6, 10), 1)),
        ((2, 512, 1, 1), (224, 224), None),
        ((2, 512), (224, 224), None),
        ((2, 3, 5), (224, 224), None),
        ((2, 192, 150), (224, 224), None),
        ((2, 3, 448, 448), (224, 224), None),
        ((2, 64, 14, 2), (224, 224), None),
    ],
)
def test_layout(shape: tuple[int, ...], image: tuple[int, int], expected: Layout | None) -> None:
    assert layout_of(shape, image) == expected


def test_spatial_brings_every_layout_to_the_same_form() -> None:
    features = torch.rand(2, 5, 3, 4)
    tokens = torch.cat([torch.rand(2, 1, 5), features.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(Layout("nchw", (3, 4)).spatial(features), features)
    torch.testing.assert_close(Layout("nhwc", (3, 4)).spatial(features.permute(0, 2, 3, 1)), features)
    found = Layout("tokens", (3, 4), 1).spatial(tokens)
    torch.testing.assert_close(found, features)
    assert found.data_ptr() == tokens[:, 1:].data_ptr()  # no copy
    assert str(Layout("tokens", (3, 4), 1)) == "tokens 3×4, 1 prefix"


def test_the_probe_leaves_no_trace() -> None:
    model = cnn()
    images = torch.rand(2, 3, 32, 32)
    before = snapshot(model)
    with torch.inference_mode():
        list_candidates(model, images)
    with torch.no_grad():
        list_candidates(model, images)
    list_candidates(model, images)
    assert snapshot(model) == before


def test_candidates_tell_what_they_are() -> None:
    found = {candidate.name: candidate for candidate in list_candidates(cnn(), torch.rand(2, 3, 32, 48))}
    last = found["block4"]
    assert (last.channels, last.layout, last.type, last.usable) == (
        16,
        Layout("nchw", (4, 6)),
        "Sequential",
        True,
    )
    assert last.names == ("block4.2", "block4")
    assert last.spread > 0.5
    assert "head" not in found


@pytest.mark.parametrize(
    ("name", "side", "layer"),
    [
        ("resnet10t", 64, "layer4"),
        ("test_efficientnet", 64, None),
        ("regnetx_002", 64, None),
        ("deit_tiny_distilled_patch16_224", 64, "blocks.11.norm1"),
        ("test_vit4", 96, None),
        ("mobilevit_xxs", 64, None),
        ("poolformerv2_s12", 64, None),
    ],
)
def test_models_of_timm(name: str, side: int, layer: str | None) -> None:
    options = {"img_size": side} if "deit" in name or "vit4" in name else {}
    model = timm.create_model(name, num_classes=CLASSES, **options)
    images = torch.rand(2, 3, side, side)
    found = choose(model, list_candidates(model, images))
    assert layer is None or found.name == layer
    assert found.layout.grid[0] >= 2
    assert ag.explain(model, images, size=None).maps.shape[-2:] == found.layout.grid


def test_models_of_torchvision() -> None:
    for name, layer in (
        ("squeezenet1_1", None),
        ("mobilenet_v2", "features.18"),
        ("shufflenet_v2_x0_5", None),
    ):
        model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
        found = find_layer(model, torch.rand(2, 3, 96, 96))
        assert layer is None or found in (layer, "features")


def test_global_maximum_pooling_leaves_the_layer_usable() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=4, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    assert find_layer(model, torch.rand(2, 3, 32, 32)) in ("0", "1")


def test_a_class_token_alone_is_nowhere_to_look() -> None:
    # What follows the last attention reaches the answer through the class token only.
    assert find_layer(tiny_vit(depth=2), torch.rand(2, 3, 32, 32)) == "blocks.1.norm1"


def test_a_head_of_zeros_does_not_hide_the_layers() -> None:
    model = cnn()
    nn.init.zeros_(model.head.weight)
    assert find_layer(model, torch.rand(2, 3, 32, 32)) == "block4"
    assert not bool(model.head.weight.any())


def test_probabilities_as_an_answer() -> None:
    model = nn.Sequential(cnn(), nn.Softmax(dim=1))
    assert find_layer(model, torch.rand(2, 3, 32, 32)) == "0.block4"


def test_a_frozen_model_is_probed_too() -> None:
    model = cnn().requires_grad_(False)
    assert find_layer(model, torch.rand(2, 3, 32, 32)) == "block4"


def test_the_choice_is_remembered_for_each_shape() -> None:
    model, calls = cnn(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    for side, count in ((32, 1), (32, 1), (48, 2), (32, 2)):
        find_layer(model, torch.rand(2, 3, side, side))
        assert len(calls) == count


def test_names_are_checked() -> None:
    model = nn.DataParallel(cnn())
    assert find_layer(model, torch.rand(1, 3, 32, 32), "module.block4") == "block4"
    with pytest.raises(LayerError, match=r"no layer 'blck4'\. Did you mean 'block4'\?"):
        find_layer(model, torch.rand(1, 3, 32, 32), "blck4")


def test_a_model_without_a_spread_lists_what_there_is() -> None:
    class Corner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, CLASSES, 1, stride=4)

        def forward(self, images: Tensor) -> Tensor:
            return self.conv(images)[:, :, 0, 0]

    with pytest.raises(LayerError, match=r"(?s)Corner.*conv: nchw 8×8, gradient over 2%"):
        find_layer(Corner(), torch.rand(2, 3, 32, 32))
