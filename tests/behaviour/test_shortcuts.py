"""What is computed the cheap way is what the expensive way gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from tests.helpers.models import CLASSES, batch, cnn, tiny_vit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attnguide as ag
from attnguide.errors import InputError
from attnguide.functional import may_read, reading
from attnguide.guiding import terms
from attnguide.layers import find_layers
from attnguide.pairs import resolve


def deep_head() -> nn.Module:
    """A CNN whose pooled features go through two layers."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4, padding=1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(8, 10, 1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(10, CLASSES),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "pooled and linear": cnn,
    "pooled and deeper": deep_head,
    "class token": lambda: tiny_vit(depth=2),
    "mean of tokens": lambda: tiny_vit(depth=2, global_pool="avg"),
}


def by_hand(model: nn.Module, images: Tensor, layer: str, cls: int) -> Tensor:
    """Grad-CAM from the definition: a hook, one backward pass, no shortcut."""
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _m, _a, output: kept.append(output))
    logits = model(images)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[:, cls].sum(), kept[0])
    (found,) = find_layers(model, images, layer)
    return ag.functional.grad_cam(found.layout.spatial(kept[0]), found.layout.spatial(gradient)).detach()


@pytest.mark.parametrize("name", MODELS)
def test_shortcuts_are_found_and_exact(name: str) -> None:
    model, images = MODELS[name]().eval(), batch()[0]
    (layer,) = find_layers(model, images)
    assert (layer.shortcuts.pooled is not None) == (name != "class token")
    assert layer.shortcuts.head is not None
    assert bool(layer.shortcuts.rowwise) == (name == "class token")
    found = ag.explain(model, images, targets="all", size=None)
    for cls in range(CLASSES):
        torch.testing.assert_close(
            found.maps[:, cls], by_hand(model, images, layer.name, cls), rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("targets", ["labels", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_guiding_by_shortcuts_gives_the_same_gradients(
    name: str, targets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name]().double().eval()  # single precision amplifies what is left of rounding
    images, labels, masks = batch()
    images = images.double()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        with ag.Guide(model, terms=[ag.Term(targets=targets, max_classes=None)]) as guide:
            logits = model(images)
            (F.cross_entropy(logits, labels) + guide.loss(labels, mask=masks)).backward()
        return {
            key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None
        }

    fast = gradients()
    find = terms.find_layers
    monkeypatch.setattr(terms, "find_layers", lambda *a, **k: [layer.plain() for layer in find(*a, **k)])
    slow = gradients()
    assert fast.keys() == slow.keys()
    for key, expected in slow.items():
        torch.testing.assert_close(fast[key], expected, rtol=1e-6, atol=1e-9, msg=key)


def test_others_who_look_at_patches_get_their_gradient() -> None:
    model = tiny_vit(depth=2).double().eval()
    images = batch()[0].double()
    (layer,) = find_layers(model, images)
    assert layer.shortcuts.queries == ("blocks.1.attn",)
    assert layer.shortcuts.rowwise == ("blocks.1.attn.proj", "blocks.1.norm2", "blocks.1.mlp", "norm")
    seen: list[Tensor] = []

    def gradients(guided: bool) -> dict[str, Tensor]:
        model.zero_grad()
        guide = ag.Guide(model) if guided else None
        seen.clear()
        handle = model.norm.register_forward_hook(lambda _m, _a, output: seen.append(output))
        (model(images).sum() + seen[-1][:, 1:].square().sum()).backward()
        handle.remove()
        if guide is not None:
            guide.remove()
        return {key: weight.grad.clone() for key, weight in model.named_parameters()}

    plain, guided = gradients(False), gradients(True)
    for key, expected in plain.items():
        torch.testing.assert_close(guided[key], expected, rtol=1e-6, atol=1e-9, msg=key)


def test_a_model_that_gives_more_than_logits_keeps_all_of_its_graph() -> None:
    class WithTokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = tiny_vit(depth=2)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            tokens = self.body.forward_features(images)
            return {"logits": self.body.forward_head(tokens), "tokens": tokens}

    (layer,) = find_layers(WithTokens().eval(), batch()[0])
    assert layer.name == "body.blocks.1.norm1"
    assert layer.shortcuts.queries == layer.shortcuts.rowwise == ()


# -------------------------------------------------------------- without waiting


class NoWaiting(TorchDispatchMode):
    """Fails where a value is read from a tensor, or a shape depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert "_local_scalar_dense" not in name, "a value was read"
        assert "nonzero" not in name, "a shape depends on values"
        assert "masked_select" not in name, "a shape depends on values"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["pooled and linear", "class token"])
@pytest.mark.parametrize("case", ["classes", "attributes", "all", "drawn"])
def test_a_step_on_an_accelerator_waits_for_nothing(name: str, case: str) -> None:
    # Tensors without data stand for those of an accelerator: they have no values that could be read.
    classes = 4 if case in ("classes", "attributes") else 9
    build: Callable[[], nn.Module] = {
        "pooled and linear": lambda: cnn(classes),
        "class token": lambda: tiny_vit(classes, depth=2),
    }[name]
    model = build()
    images, labels, masks = batch()
    find_layers(model, images)  # a twin with values: what it found is remembered for both
    labels = labels if case == "classes" else (torch.rand(4, classes) > 0.5).float()
    far = build().to("meta")
    targets = "labels" if case in ("classes", "attributes") else "all"
    term = ag.Term(targets=targets, max_classes=2 if case == "drawn" else "auto")
    with ag.Guide(far, terms=[term]) as guide:
        guide._checked = True  # the first step checks values
        with NoWaiting():
            loss = F.mse_loss(far(images.to("meta")), torch.zeros(4, classes, device="meta"))
            loss = loss + guide.loss(labels.to("meta"), mask=masks.to("meta"))
            loss.backward()
    assert loss.device.type == "meta"
    assert all(weight.grad is not None for weight in far.parameters() if weight.requires_grad)


def test_values_may_be_read_on_the_cpu_or_when_allowed() -> None:
    near, far = torch.zeros(1), torch.zeros(1, device="meta")
    assert may_read(near)
    assert not may_read(far)
    with reading():
        assert may_read(far)
    assert not may_read(far)


def test_pairs_that_fill_a_place_do_not_count() -> None:
    # What an accelerator computes, computed here: all pairs, absent ones with weight zero.
    model = cnn().eval()
    images, _, masks = batch()
    labels = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 1, 0]])
    with ag.Guide(model) as guide:
        model(images)
        sparse = guide.loss(labels, mask=masks)
        bound, trace = guide._bound[0], guide._trace()
        every = resolve("all", trace.logits)
        dense = replace(every, present=labels.flatten().bool())
        assert torch.equal(dense.compact().cls, resolve("labels", trace.logits, labels).cls)
        present = dense.present.float()
        _, part = bound._compare(bound.layers, trace, dense, present, {"mask": masks}, (0, 0))
    torch.testing.assert_close(part.losses / part.weights, sparse.detach(), check_dtype=False)


# --------------------------------------------------------------- other libraries


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Swin", "ConvNext", "Beit", "Dinov2"])
def test_image_classifiers_of_transformers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    common = {"num_labels": CLASSES, "image_size": 64, "patch_size": 16}
    plain = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    settings: dict[str, Any] = {
        "Swin": {"patch_size": 4, "embed_dim": 12, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4},
        "ConvNext": {"patch_size": 4, "hidden_sizes": [12, 24], "depths": [1, 2], "num_stages": 2},
    }.get(kind, plain)
    config = getattr(transformers, f"{kind}Config")(**{**common, **settings})
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    images, labels, masks = batch(2, 64)
    (layer,) = find_layers(model, images)
    assert layer.how == "measured"
    assert ag.explain(model, images).maps.shape == (2, 1, 64, 64)
    with ag.Guide(model) as guide:
        model(pixel_values=images)
        guide.loss(labels, mask=masks).backward()
    assert any(bool(weight.grad.any()) for weight in model.parameters() if weight.grad is not None)


def test_patches_made_beforehand_get_a_clear_answer() -> None:
    model = timm.create_model("resnet10t", num_classes=CLASSES)
    patches = {"patches": torch.rand(1, 4, 48), "patch_coord": torch.zeros(1, 4, 2)}
    with pytest.raises(InputError, match="pass the images themselves"):
        ag.explain(model, patches)
    with ag.Guide(model), pytest.raises(InputError, match="pass the images themselves"):
        model(patches)
