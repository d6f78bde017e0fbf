"""Where rows and columns are, and which layer is looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from tests.helpers.models import CLASSES, batch, cnn, tiny_vit
from torch import Tensor, nn

import attnguide as ag
from attnguide.capture.calls import Tap
from attnguide.errors import InputError, LayerError
from attnguide.layers import _memory as memory, candidates, choose, find_layers, list_candidates, stages
from attnguide.layers._layout import assume, codes, decode, fit
from attnguide.testing import snapshot
from attnguide.trace import Layer, Layout

VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}

# ----------------------------------------------------------------- shapes alone


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
def test_an_assumed_layout(shape: tuple[int, ...], image: tuple[int, int], expected: Layout | None) -> None:
    assert assume(shape, image) == expected
    assert expected is None or expected.fits(shape)


def test_spatial_brings_every_layout_to_the_same_form() -> None:
    features = torch.rand(2, 5, 4, 6)
    row_by_row = features.flatten(2)
    shuffled = torch.randperm(24)
    ends = torch.rand(2, 5, 1), torch.rand(2, 5, 2)
    forms = {
        Layout("nchw", (4, 6)): features,
        Layout("nhwc", (4, 6)): features.permute(0, 2, 3, 1),
        Layout("tokens", (4, 6), 1): torch.cat([ends[0], row_by_row], 2).transpose(1, 2),
        Layout("tokens", (4, 6), 1, 2): torch.cat([ends[0], row_by_row, ends[1]], 2).transpose(1, 2),
        Layout("nct", (4, 6), 0, 2): torch.cat([row_by_row, ends[1]], 2),
        Layout("tokens", (4, 6), order=tuple(shuffled.argsort().tolist())): row_by_row[
            :, :, shuffled
        ].transpose(1, 2),
    }
    for layout, output in forms.items():
        assert layout.fits(tuple(output.shape))
        assert not layout.fits((*output.shape, 1))
        torch.testing.assert_close(layout.spatial(output), features)
        torch.testing.assert_close(layout.flat(output), row_by_row)
    tokens = torch.rand(2, 25, 5)
    assert Layout("tokens", (4, 6), 1).spatial(tokens).data_ptr() == tokens[:, 1:].data_ptr()  # no copy
    assert str(Layout("tokens", (4, 6), 1)) == "tokens 4×6, 1 prefix"


# ------------------------------------------------------------------ measurement


def positions(grid: tuple[int, int], noise: float = 0.0) -> tuple[Tensor, Tensor]:
    height, width = grid
    rows = (torch.arange(height).float() + 0.5).div(height).repeat_interleave(width)
    columns = (torch.arange(width).float() + 0.5).div(width).repeat(height)
    return rows + noise * torch.randn(len(rows)), columns + noise * torch.randn(len(columns))


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (6, 10), (12, 4)])
@pytest.mark.parametrize("extras", [(0, 0), (1, 0), (0, 1), (5, 0)])
def test_measured_positions_tell_the_arrangement(
    noise: float, grid: tuple[int, int], extras: tuple[int, int]
) -> None:
    size = (grid[0] * 16, grid[1] * 16)
    rows, columns = positions(grid, noise)
    prefix, suffix = extras
    if prefix + suffix > len(rows) // 10:
        return
    ends = torch.full((prefix,), 0.5), torch.full((suffix,), 0.5)
    found = fit(
        "tokens",
        (len(rows) + prefix + suffix,),
        torch.cat([ends[0], rows, ends[1]]),
        torch.cat([ends[0], columns, ends[1]]),
        size,
    )
    assert found is not None
    assert found[1] == Layout("tokens", grid, prefix, suffix)
    assert found[0] > 0.85
    # Turned by a quarter, and read as a map of channels last.
    turned = fit("nhwc", (grid[1], grid[0]), *(p.view(grid).t().flatten() for p in (rows, columns)), size)
    assert turned is not None
    output = torch.rand(1, 3, *grid)
    torch.testing.assert_close(turned[1].spatial(output.transpose(2, 3).movedim(1, -1)), output)


def test_places_that_all_see_the_same_tell_nothing() -> None:
    flat = torch.full((49,), 0.5) + 1e-5 * torch.randn(49)
    found = fit("tokens", (49,), flat, flat, (224, 224))
    assert found is not None
    assert found[0] == 0


@pytest.mark.parametrize(("grid", "prefix"), [((4, 4), 0), ((6, 10), 0), ((7, 5), 2)])
def test_patches_out_of_order_are_decoded(grid: tuple[int, int], prefix: int) -> None:
    size = (grid[0] * 8, grid[1] * 8)
    patterns = codes(grid, size)
    cells = torch.nn.functional.adaptive_avg_pool2d(patterns, grid).flatten(1)
    shuffled = torch.randperm(cells.shape[1])
    # Every place also sees a little of all the others.
    answers = cells[:, shuffled] + 0.3 * cells.mean(dim=1, keepdim=True)
    answers = torch.cat([torch.full((len(cells), prefix), 0.3), answers], dim=1)
    layout = decode("tokens", grid, prefix, answers)
    assert layout is not None
    values = torch.arange(cells.shape[1]).float()
    tokens = torch.cat([torch.zeros(prefix), values[shuffled]])[None, :, None]
    torch.testing.assert_close(layout.spatial(tokens).flatten(), values)
    assert decode("tokens", grid, prefix, torch.ones_like(answers)) is None


class Arranged(nn.Module):
    """A network of patches whose tokens are in an order of its own."""

    def __init__(self, order: Tensor, prefix: int = 0, suffix: int = 0, first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 8, stride=8)
        self.norm = nn.LayerNorm(12)
        self.body = nn.Linear(12, 12)
        self.act = nn.GELU()
        self.head = nn.Linear(12, CLASSES)
        self.register_buffer("order", order)
        self.extras = nn.Parameter(torch.randn(1, prefix + suffix, 12))
        self.prefix, self.first = prefix, first

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)[:, self.order]
        extras = self.extras.expand(len(tokens), -1, -1)
        tokens = torch.cat([extras[:, : self.prefix], tokens, extras[:, self.prefix :]], dim=1)
        tokens = self.norm(tokens)
        tokens = self.act(self.body(tokens))
        return self.head(tokens.mean(dim=1))


def moves_where_the_image_changed(model: nn.Module, size: tuple[int, int], cell: int = 8) -> bool:
    """Change one patch after the other, and see whether the map changes there and nowhere else."""
    images = torch.rand(1, 3, *size)
    base = ag.explain(model, images, "layer_attention", size=None).maps[0, 0]
    grid = size[0] // cell, size[1] // cell
    if base.shape != grid:
        return False
    for row in range(grid[0]):
        for column in range(grid[1]):
            changed = images.clone()
            changed[..., row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] += 1
            moved = (ag.explain(model, changed, "layer_attention", size=None).maps[0, 0] - base).abs()
            if int(moved.argmax()) != row * grid[1] + column:
                return False
    return True


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
@pytest.mark.parametrize("extras", [(0, 0), (1, 0), (0, 1), (3, 0)])
@pytest.mark.parametrize("kind", ["row by row", "column by column", "shuffled", "windows"])
def test_any_order_of_patches_is_found(size: tuple[int, int], extras: tuple[int, int], kind: str) -> None:
    height, width = size[0] // 8, size[1] // 8
    index = torch.arange(height * width)
    order = {
        "row by row": index,
        "column by column": index.view(height, width).t().flatten(),
        "shuffled": torch.randperm(height * width),
        "windows": index.view(height // 2, 2, width // 2, 2).transpose(1, 2).flatten(),
    }[kind]
    model = Arranged(order, *extras).eval()
    (layer,) = find_layers(model, torch.rand(2, 3, *size))
    assert layer.how == "measured"
    assert layer.agreement > 0.9
    assert layer.layout.grid == (height, width)
    assert moves_where_the_image_changed(model, size)


def test_channels_last_and_turned_maps() -> None:
    class Last(nn.Module):
        def __init__(self, turned: bool) -> None:
            super().__init__()
            self.conv, self.act, self.head = nn.Conv2d(3, 8, 8, 8), nn.GELU(), nn.Linear(8, CLASSES)
            self.turned = turned

        def forward(self, images: Tensor) -> Tensor:
            features = (
                self.conv(images).permute(0, 3, 2, 1) if self.turned else self.conv(images).movedim(1, 3)
            )
            return self.head(self.act(features).mean(dim=(1, 2)))

    for turned in (False, True):
        for size in ((64, 64), (32, 56)):
            model = Last(turned).eval()
            # Eight channels, eight rows, eight columns: the shape tells nothing.
            assert moves_where_the_image_changed(model, size)
            assert find_layers(model, torch.rand(1, 3, *size))[0].shortcuts.pooled == "head:input"


def test_one_of_several_tensors_and_calls() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.act = nn.Conv2d(3, 8, 8, 8), nn.GELU()
            self.split, self.head = Split(), nn.Linear(8, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            first = self.act(self.stem(images))
            _, second = self.split(first)
            return self.head(self.act(second).amax(dim=(2, 3)) + first.amax(dim=(2, 3)))

    model, images = Several().eval(), torch.rand(2, 3, 64, 64)
    found = {candidate.layer.name for candidate in list_candidates(model, images)}
    assert {"stem", "act#0", "split[1]", "act"} <= found
    assert "split" not in found  # it carries through what act gave
    with pytest.raises(LayerError, match="name the layer that made it"):
        find_layers(model, images, layer="split")
    assert find_layers(model, images)[0].name == "act"
    first, second = ag.explain(model, images, layer="act#0").maps, ag.explain(model, images, layer="act").maps
    assert not torch.equal(first, second)
    torch.testing.assert_close(
        ag.explain(model, images, "layer_attention", layer="split[1]", size=None).maps[:, 0],
        -ag.explain(model, images, "layer_attention", layer="act#0", size=None).maps[:, 0],
    )
    with ag.Guide(model, layer=["act#0", "split[1]"]) as guide:
        labels, masks = torch.tensor([0, 1]), batch(2, 64)[2]
        model(images)
        assert bool(guide.loss(labels, mask=masks).isfinite())


class Split(nn.Module):
    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features, -features


@pytest.mark.parametrize("text", ["norm", "norm#0", "blocks.2[1]", "blocks.2#1[0][key]", "fc:input"])
def test_names_of_tensors(text: str) -> None:
    assert str(Tap.parse(text)) == text


# -------------------------------------------------------------------- the probe


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


def test_what_a_model_keeps_between_passes_is_left_alone() -> None:
    # Attention biases are looked up once in evaluation mode, and kept; here they are zero at first.
    model = timm.create_model("levit_128s", num_classes=CLASSES).eval()
    keeper = next(module for module in model.modules() if hasattr(module, "attention_bias_cache"))
    images = torch.rand(2, 3, 224, 224)
    ag.explain(model, images)
    assert not keeper.attention_bias_cache
    with torch.no_grad():
        answer = model(images)
        kept = next(iter(keeper.attention_bias_cache.values()))
        ag.explain(model, images)
        assert next(iter(keeper.attention_bias_cache.values())) is kept
        torch.testing.assert_close(model(images), answer)


def test_candidates_tell_what_they_are() -> None:
    found = {
        candidate.layer.name: candidate for candidate in list_candidates(cnn(), torch.rand(2, 3, 32, 48))
    }
    last = found["block4"]
    assert (last.channels, last.layer.layout, last.type, last.usable) == (
        16,
        Layout("nchw", (4, 6)),
        "Sequential",
        True,
    )
    assert last.names == ("block4.2", "block4")
    assert last.layer.spread > 0.5
    assert last.layer.how == "measured"
    assert last.layer.shortcuts.pooled == "pool"
    assert str(last).startswith("block4: nchw 4×6, measured (agreement 0.")
    assert "head" not in found
    assumed = {c.layer.name: c for c in list_candidates(cnn(), torch.rand(2, 3, 32, 48), measure=False)}
    assert (assumed["block4"].layer.how, assumed["block4"].layer.layout) == ("assumed", last.layer.layout)


@pytest.mark.parametrize(
    ("name", "side", "layer"),
    [
        ("resnet10t", 64, "layer4"),
        ("test_efficientnet", 64, "bn2"),
        ("regnetx_002", 64, "s4"),
        ("deit_tiny_distilled_patch16_224", 64, "blocks.11.norm1"),
        ("test_vit4", 96, None),
        ("mobilevit_xxs", 64, "final_conv"),
        ("poolformerv2_s12", 64, None),
        ("test_mambaout", 160, None),
        ("levit_128s", 224, None),
        ("pit_ti_224", 224, "transformers.2.blocks.3.norm1"),
        ("crossvit_tiny_240", 240, None),
    ],
)
def test_models_of_timm(name: str, side: int, layer: str | None) -> None:
    options = {"img_size": side} if "deit" in name or "vit4" in name else {}
    model = timm.create_model(name, num_classes=CLASSES, **options)
    images = torch.rand(2, 3, side, side)
    found = choose(model, list_candidates(model, images)).layer
    assert layer is None or found.name == layer
    assert found.layout.grid[0] >= 2
    assert ag.explain(model, images, size=None).maps.shape[-2:] == found.layout.grid


def test_models_of_torchvision() -> None:
    for name, layer in (
        ("squeezenet1_1", None),
        ("mobilenet_v2", "features"),
        ("shufflenet_v2_x0_5", "conv5"),
        ("swin_t", "permute"),
    ):
        model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
        (found,) = find_layers(model, torch.rand(2, 3, 160, 160))
        assert layer is None or found.name == layer
        assert found.how in ("measured", "inherited")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings", "name", "layout"),
    [
        ("ViT", VIT, "vit.layers.1.layernorm_before", Layout("tokens", (14, 14), 1)),
        ("DeiT", VIT, "deit.layers.1.layernorm_before", Layout("tokens", (14, 14), 2)),
        ("Beit", VIT, None, Layout("tokens", (14, 14), 1)),
        ("Dinov2", VIT | {"image_size": 224}, None, Layout("tokens", (16, 16), 1)),
        ("Swin", {"embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4]}, None, None),
        ("ConvNext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, None, Layout("nchw", (7, 7))),
    ],
)
def test_models_of_transformers(
    family: str, settings: dict[str, Any], name: str | None, layout: Layout | None
) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(num_labels=CLASSES, **settings)
    model = getattr(transformers, f"{family}ForImageClassification")(config)
    images, labels, masks = batch(2, 224)
    (layer,) = find_layers(model.eval(), images)
    assert layer.how == "measured"
    assert name is None or layer.name == name
    assert layout is None or layer.layout == layout
    assert ag.explain(model, images).maps.shape == (2, 1, 224, 224)
    with ag.Guide(model) as guide:
        loss = F.cross_entropy(model(pixel_values=images).logits, labels) + guide.loss(labels, mask=masks)
        loss.backward()
    assert sum(bool(w.grad is not None and w.grad.any()) for w in model.parameters()) > 10


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_than_three(channels: int) -> None:
    model = timm.create_model("resnet10t", num_classes=CLASSES, in_chans=channels)
    assert ag.explain(model, torch.rand(2, channels, 64, 96)).maps.shape == (2, 1, 64, 96)


def test_a_model_with_a_head_for_distillation() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, num_classes=CLASSES)
    model.set_distilled_training(True)
    model.train()
    with ag.Guide(model) as guide:
        model(torch.rand(2, 3, 64, 64))
        guide.loss(torch.tensor([0, 1]), mask=batch(2, 64)[2]).backward()
    # In evaluation mode the answer is the mean of both heads, so that both are guided.
    for head in (model.head, model.head_dist):
        assert bool(head.weight.grad.any())


def test_a_spatial_dropout_before_the_pooling_is_part_of_the_gradient() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 4, 1),
        nn.GELU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    assert find_layers(model, torch.rand(2, 3, 32, 32), "1")[0].shortcuts.pooled is None
    model[2].p = 0.0
    memory.forget()
    assert find_layers(model, torch.rand(2, 3, 32, 32), "1")[0].shortcuts.pooled == "3"


def test_global_maximum_pooling_leaves_the_layer_usable() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=4, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    (found,) = find_layers(model, torch.rand(2, 3, 32, 32))
    assert found.name in ("0", "1")
    assert found.shortcuts.pooled is None


def test_a_class_token_alone_is_nowhere_to_look() -> None:
    # What follows the last attention reaches the answer through the class token only.
    model, images = tiny_vit(depth=2), torch.rand(2, 3, 32, 32)
    assert find_layers(model, images)[0].name == "blocks.1.norm1"
    with pytest.raises(LayerError, match=r"do not depend on layer 'blocks\.1'.*layer='auto'"):
        ag.explain(model, images, layer="blocks.1")
    ag.explain(model, images, "layer_attention", layer="blocks.1")  # asks for no gradient


def test_a_head_of_zeros_does_not_hide_the_layers() -> None:
    model = cnn()
    nn.init.zeros_(model.head.weight)
    assert find_layers(model, torch.rand(2, 3, 32, 32))[0].name == "block4"
    assert not bool(model.head.weight.any())


def test_probabilities_as_an_answer() -> None:
    model = nn.Sequential(cnn(), nn.Softmax(dim=1))
    assert find_layers(model, torch.rand(2, 3, 32, 32))[0].name == "0.block4"


def test_a_frozen_model_is_probed_too() -> None:
    model = cnn().requires_grad_(False)
    assert find_layers(model, torch.rand(2, 3, 32, 32))[0].name == "block4"


# ------------------------------------------------------------------ what is asked


def test_stages_patterns_and_several_layers() -> None:
    model, images = timm.create_model("resnet10t", num_classes=CLASSES), torch.rand(2, 3, 64, 64)

    def names(layer: Any) -> list[str]:
        return [found.name for found in find_layers(model, images, layer)]

    assert names("stage:-1") == ["layer4"]
    assert names("stage:-2") == ["layer3"]
    assert names(["stage:-2", "auto", "layer4"]) == ["layer3", "layer4"]
    assert names("layer?") == ["layer1", "layer2", "layer3", "layer4"]
    assert names("layer*.0") == [f"layer{n}.0" for n in (1, 2, 3, 4)]
    assert [group[-1].layer.name for group in stages(list_candidates(model, images))][-1] == "layer4"
    vit = tiny_vit(depth=3)
    small = torch.rand(2, 3, 32, 32)
    assert [found.name for found in find_layers(vit, small, "blocks.*.norm1")] == [
        f"blocks.{n}.norm1" for n in (0, 1, 2)
    ]
    assert find_layers(vit, small, "stage:-2")[0].name == "blocks.1"
    with pytest.raises(LayerError, match=r"'stage:9'.*has \d stages.*layer4"):
        names("stage:9")
    with pytest.raises(LayerError, match="a stage has a number"):
        names("stage:last")
    with pytest.raises(LayerError, match=r"'conv\*\*x' matches no module"):
        names("conv**x")
    with pytest.raises(LayerError, match="names no layer"):
        names([])


@pytest.mark.parametrize("combine", ["mean", "max", "product"])
def test_maps_of_several_layers_are_joined(combine: str) -> None:
    model, images = cnn(), torch.rand(2, 3, 32, 32)
    found = ag.explain(
        model, images, "layer_attention", layer=["block2", "block4"], combine=combine, size=None
    )
    assert list(found.by_layer) == ["block2", "block4"]
    assert found.layer == "block2 + block4"
    one, other = (
        ag.functional.resize(ag.functional.unit(maps[:, 0]), tuple(found.maps.shape[-2:]))
        for maps in found.by_layer.values()
    )
    expected = {"mean": (one + other) / 2, "max": torch.maximum(one, other), "product": one * other}[combine]
    torch.testing.assert_close(found.maps[:, 0], expected)
    with pytest.raises(ag.AttnGuideError, match=r"combine='sum'.*mean, max, product"):
        ag.explain(model, images, layer=["block3", "block4"], combine="sum")


def test_guiding_several_layers() -> None:
    model = cnn().eval()
    images, labels, masks = batch()

    def value(**settings: Any) -> float:
        with ag.Guide(model, terms=[ag.Term(loss="cosine", **settings)]) as guide:
            model(images)
            loss = float(guide.loss(labels, mask=masks).detach())
            assert [record.layer for record in guide.records()] == (
                ["block3.2 + block4"] if "combine" in settings else guide.layers
            )
            return loss

    apart = value(layer=["block3.2", "block4"])
    assert apart == pytest.approx((value(layer="block3.2") + value(layer="block4")) / 2, rel=1e-5)
    assert value(layer=["block3.2", "block4"], combine="mean") != pytest.approx(apart)


def test_names_are_checked() -> None:
    model = nn.DataParallel(cnn())
    assert find_layers(model, torch.rand(1, 3, 32, 32), "module.block4")[0].name == "block4"
    with pytest.raises(LayerError, match=r"no layer 'blck4'\. Did you mean 'block4'\?"):
        find_layers(model, torch.rand(1, 3, 32, 32), "blck4")


def test_a_model_without_a_spread_lists_what_there_is() -> None:
    class Corner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, CLASSES, 1, stride=4)

        def forward(self, images: Tensor) -> Tensor:
            return self.conv(images)[:, :, 0, 0]

    with pytest.raises(LayerError, match=r"(?s)Corner.*conv: nchw 8×8.*gradient over 2%"):
        find_layers(Corner(), torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("build", "remedy"),
    [
        (lambda: timm.create_model("resnet10t", features_only=True), "features_only"),
        (lambda: timm.create_model("resnet10t", num_classes=0), "num_classes=0"),
    ],
    ids=["features only", "without a head"],
)
def test_models_without_classes_get_a_clear_answer(build: Callable[[], nn.Module], remedy: str) -> None:
    model, images = build(), torch.rand(2, 3, 64, 64)
    with pytest.raises(ag.AttnGuideError, match=remedy):
        ag.explain(model, images)
    with ag.Guide(model), pytest.raises(ag.AttnGuideError, match=remedy):
        model(images)


# ------------------------------------------------------------------------ memory


def counted(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_the_choice_is_remembered_for_each_size() -> None:
    model = cnn()
    calls = counted(model)
    # Measured once; one forward of another size tells how many rows and columns there are.
    for side, fewest, most in ((32, 2, 5), (32, 0, 0), (48, 1, 1), (32, 0, 0)):
        calls.clear()
        find_layers(model, torch.rand(2, 3, side, side))
        assert fewest <= len(calls) <= most
    # A model of the same making needs no probe.
    twin = cnn()
    calls = counted(twin)
    find_layers(twin, torch.rand(2, 3, 48, 48))
    assert not calls
    other = cnn(width=5)
    calls = counted(other)
    find_layers(other, torch.rand(2, 3, 48, 48))
    assert calls


def test_a_guide_looks_for_its_layer_once() -> None:
    model, (images, labels, masks) = tiny_vit(depth=2), batch()
    model.passes = 0
    model.register_forward_pre_hook(lambda model, _: setattr(model, "passes", model.passes + 1))
    calls = counted(model)
    with ag.Guide(model) as guide:
        numbers = []
        for _ in range(3):
            model(images)
            guide.loss(labels, mask=masks)
            numbers.append(len(calls))
    assert numbers[1:] == [numbers[0] + 1, numbers[0] + 2]


def test_many_sizes_are_carried_over() -> None:
    model = tiny_vit(depth=2, dynamic_img_size=True)
    for side in range(32, 32 + 8 * 8, 8):
        assert find_layers(model, torch.rand(1, 3, side, 64))[0].how == "measured"
    calls = counted(model)
    (layer,) = find_layers(model, torch.rand(1, 3, 96, 40))
    assert (layer.how, layer.layout, len(calls)) == ("inherited", Layout("tokens", (12, 5), 1), 1)
    for _ in range(300):
        images = torch.empty(1, 3, 8 + _, 8)
        memory.remember(model, images, memory.Question(("auto",)), [layer], probed=False)
    assert len(memory._of_models[model]) <= 256


@pytest.mark.parametrize(
    "name", ["resnet10t", "efficientnet_lite0", "convnext_atto", "mobilenetv3_small_050"]
)
@pytest.mark.parametrize("side", [(96, 128), (64, 64), (192, 160)])
def test_what_is_carried_over_to_another_size_is_what_is_measured_there(
    name: str, side: tuple[int, int]
) -> None:
    model, images = timm.create_model(name, num_classes=CLASSES), torch.rand(2, 3, *side)
    memory.forget()
    (measured,) = find_layers(model, images)
    memory.forget()
    find_layers(model, torch.rand(2, 3, 128, 128))
    (carried,) = find_layers(model, images)
    assert (carried.name, carried.layout, carried.shortcuts) == (
        measured.name,
        measured.layout,
        measured.shortcuts,
    )


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_what_was_seen_at_a_layer_of_the_same_shape_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNGUIDE_CACHE", str(tmp_path))
    name, options = ("resnet10t", {}) if kind == "cnn" else ("vit_tiny_patch16_224", {"depth": 2})
    options = {**options, "dynamic_img_size": True} if kind == "vit" else options
    model = timm.create_model(name, num_classes=CLASSES, **options)
    layouts_of = candidates._layouts

    def unclear(subject: Any, outputs: Any, seeds: Any) -> Any:
        found = layouts_of(subject, outputs, seeds)
        return {index: (layout, "inherited", float("nan")) for index, (layout, _, _) in found.items()}

    monkeypatch.setattr(candidates, "_layouts", unclear)
    memory.forget()
    (first,) = find_layers(model, torch.rand(1, 3, 64, 64))
    assert first.how == "inherited"
    # Rows and columns that are axes are so at any size, and for the next process. An order of tokens is not.
    calls = counted(model)
    find_layers(model, torch.rand(1, 3, 48, 48))
    assert (len(calls) == 1) == (kind == "cnn")
    memory.forget()
    calls.clear()
    (again,) = find_layers(model, torch.rand(1, 3, 64, 64))
    assert (not calls) == (kind == "cnn")
    assert (again.name, again.layout) == (first.name, first.layout)


def test_a_deeper_layer_that_larger_images_bring_is_not_missed() -> None:
    model, sides = timm.create_model("resnet10t", num_classes=CLASSES), (32, 224, 48)
    names = [find_layers(model, torch.rand(1, 3, side, side))[0].name for side in sides]
    for side, name in zip(sides, names, strict=True):
        memory.forget()
        assert find_layers(model, torch.rand(1, 3, side, side))[0].name == name


def test_a_pooling_of_fixed_windows_is_the_mean_at_one_size_alone() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()
            )
            self.pool, self.fc = nn.AvgPool2d(8), nn.Linear(8, CLASSES)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.fc(self.pool(self.features(images)).flatten(1))

    model = Fixed()
    (small,) = find_layers(model, torch.rand(2, 3, 32, 32), "features")
    (large,) = find_layers(model, images := torch.rand(2, 3, 36, 36), "features")
    assert (small.shortcuts.pooled, large.shortcuts.pooled) == ("pool", None)
    maps = ag.explain(model, images, layer="features", size=None).maps
    memory.forget()
    torch.testing.assert_close(maps, ag.explain(model, images, layer="features", size=None).maps)


# ----------------------------------------------------------------- stored layers


@pytest.mark.parametrize("build", [cnn, tiny_vit])
def test_a_layer_is_stored_and_used_without_measuring(build: Callable[[], nn.Module]) -> None:
    model, images = build(), torch.rand(2, 3, 32, 32)
    maps = ag.explain(model, images).maps
    (layer,) = find_layers(model, images)
    stored = Layer.from_dict(json.loads(json.dumps(layer.to_dict())))
    assert stored == layer
    memory.forget()
    other = build()
    other.load_state_dict(model.state_dict())
    calls = counted(other)
    torch.testing.assert_close(ag.explain(other, images, layer=stored).maps, maps)
    assert len(calls) == 2  # one tells that it fits
    calls.clear()
    ag.explain(other, images, layer=[stored])
    assert len(calls) == 1
    # Who names it gets what is measured.
    find_layers(other, images, layer.name)
    assert len(calls) > 2


def test_a_stored_layer_of_another_size() -> None:
    model = cnn()
    (layer,) = find_layers(model, torch.rand(2, 3, 32, 32))
    images = torch.rand(2, 3, 48, 40)
    expected = ag.explain(model, images).maps
    torch.testing.assert_close(ag.explain(model, images, layer=layer).maps, expected)
    vit = tiny_vit(dynamic_img_size=True)
    (layer,) = find_layers(vit, torch.rand(2, 3, 32, 32))
    with pytest.raises(LayerError, match="found for images of another size"):
        ag.explain(vit, torch.rand(2, 3, 48, 48), layer=layer)
    with pytest.raises(LayerError, match="no layer"):
        ag.explain(vit, torch.rand(2, 3, 32, 32), layer=replace(layer, name="nowhere"))


@pytest.mark.parametrize(
    "broken", [{}, {"name": "a"}, {"layout": {"kind": "nchw"}}, 3, {"layout": 3, "shortcuts": {}}]
)
def test_values_that_are_no_layer(broken: Any) -> None:
    with pytest.raises(InputError, match="is not a layer"):
        Layer.from_dict(broken)


def test_a_layer_without_an_agreement_is_stored() -> None:
    (layer,) = find_layers(cnn(), torch.rand(1, 3, 32, 32), measure=False)
    again = Layer.from_dict(json.loads(json.dumps(layer.to_dict(), allow_nan=False)))
    assert repr(again) == repr(layer)


def test_a_replaced_pooling_is_noticed() -> None:
    model, images = timm.create_model("resnet10t", num_classes=CLASSES), torch.rand(2, 3, 64, 64)
    assert find_layers(model, images)[0].shortcuts.pooled == "global_pool.pool"
    model.reset_classifier(CLASSES, global_pool="max")
    assert find_layers(model, images)[0].shortcuts.pooled is None


def test_the_choice_for_a_named_model_is_kept_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNGUIDE_CACHE", str(tmp_path))

    def found() -> tuple[Any, int]:
        model = timm.create_model("resnet10t", num_classes=CLASSES)
        calls = counted(model)
        return find_layers(model, torch.rand(2, 3, 64, 64))[0], len(calls)

    layer, calls = found()
    assert calls == 2
    (file,) = (tmp_path / "layers").glob("resnet10t-*.json")
    memory.forget()
    again = found()
    assert again == (layer, 0)
    memory.forget()
    file.write_text(json.dumps([{"name": "layer4"}]))  # broken, or of another version
    measured, calls = found()
    assert (measured.layout, calls) == (layer.layout, 2)
    find_layers(cnn(), torch.rand(2, 3, 32, 32))
    assert len(list((tmp_path / "layers").iterdir())) == 1  # a class of the user's own may change


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTNGUIDE_CACHE", str(tmp_path / "file"))
    model = timm.create_model("resnet10t", num_classes=CLASSES)
    assert find_layers(model, torch.rand(2, 3, 64, 64))[0].name == "layer4"


def test_layer_attention_does_not_take_rounding_for_a_map() -> None:
    """What an untrained normalisation leaves of the mean is nothing, not a direction to be guided along."""
    model, images = tiny_vit(), torch.rand(2, 3, 32, 32)
    last = ag.explain(model, images).layer
    assert isinstance(model.get_submodule(last), torch.nn.LayerNorm)
    with pytest.warns(UserWarning, match="layer attention is zero everywhere: the layer normalises"):
        found = ag.explain(model, images, "layer_attention", layer=last, size=None)
    assert not found.maps.any()
    own = ag.explain(model, images, "layer_attention", size=None)
    assert own.layer == last.rpartition(".")[0].replace("1", "0")  # the block before
    assert own.maps.any()
    with ag.Guide(model, source="layer_attention", loss="cosine", layer=last) as guide:
        model(images)
        with pytest.warns(UserWarning, match="layer attention is zero"):
            guide.loss(torch.tensor([0, 1]), mask=torch.eye(32)).backward()
    gradients = [each.grad.norm() for each in model.parameters() if each.grad is not None]
    assert max(gradients, default=0.0) == 0.0
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.normal_()
    assert ag.explain(model, images, "layer_attention", layer=last, size=None).maps.any()


class Frozen(nn.Module):
    """A trunk that runs without gradients, as in linear probing, and a head."""

    def __init__(self, mode: Callable[[], AbstractContextManager[object]]) -> None:
        super().__init__()
        self.trunk, self.head, self.mode = cnn()[:4], nn.LazyLinear(CLASSES), mode

    def forward(self, images: Tensor) -> Tensor:
        with self.mode():
            features = self.trunk(images).mean(dim=(2, 3))
        return self.head(features.clone())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_trunk_without_gradients(mode: Callable[[], AbstractContextManager[object]]) -> None:
    model, (images, *_) = Frozen(mode).eval(), batch()
    model(images)
    with pytest.raises(LayerError, match=r"requires_grad_\(False\)"):
        ag.explain(model, images)
    with ag.Guide(model), pytest.raises(LayerError, match=r"requires_grad_\(False\)"):
        model(images)
    # A source that needs no gradient sees the trunk.
    assert ag.explain(model, images, "layer_attention").layer.startswith("trunk")
