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
from tests.helpers.state import snapshot
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attnguide as ag
from attnguide.capture.second_order import smooth
from attnguide.errors import GuidanceError, InputError
from attnguide.functional import may_read, reading
from attnguide.guiding import terms
from attnguide.layers import find_layers
from attnguide.pairs import Pairs, resolve


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


@pytest.mark.parametrize("inplace", [False, True])
def test_hard_sigmoids_get_a_second_derivative(inplace: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 4, 1),
        nn.GELU(),
        nn.Conv2d(8, 8, 1),
        nn.Hardsigmoid(inplace=inplace),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    ).eval()
    images, labels, masks = batch()
    with torch.no_grad():
        plain = model(images)
    before = snapshot(model)
    with ag.Guide(model, layer="1", loss="cosine") as guide:
        torch.testing.assert_close(model(images), plain, rtol=0, atol=0)
        loss = guide.loss(labels, mask=masks)
        (gradient,) = torch.autograd.grad(loss, model[2].weight)
    assert bool(gradient.any())
    assert snapshot(model) == before
    # Finite differences, away from the kinks.
    step, weight = 1e-3, model[2].weight
    direction = gradient / gradient.norm()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
        with ag.Guide(model, layer="1", loss="cosine") as guide:
            model(images)
            values.append(float(guide.loss(labels, mask=masks).detach()))
        with torch.no_grad():
            weight.sub_(sign * step * direction)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.05)


def test_gelus_keep_their_values_and_derivatives() -> None:
    model = nn.GELU()
    hooks = smooth(model)
    values = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    assert torch.equal(model(values), F.gelu(values))
    assert torch.autograd.gradcheck(model, values)
    assert torch.autograd.gradgradcheck(model, values)
    hooks[""].remove()
    assert "GeluBackward" in type(model(values).grad_fn).__name__


# ---------------------------------------------------------------------- drawing


def test_a_draw_stands_for_all_pairs() -> None:
    logits = torch.randn(5, 12)
    labels = (torch.rand(5, 12) > 0.4).float()
    labels[3] = 0
    pairs = resolve("labels", logits, labels)
    worth = torch.rand(len(pairs))
    counted = torch.rand(len(pairs)) > 0.2
    exact = float((worth * counted).sum())
    sums = []
    for _ in range(3000):
        index, stands_for = pairs.draw(4, counted, 5)
        assert bool(counted[index].all())
        assert int(pairs.sample[index].bincount().max()) <= 4
        sums.append(float((worth[index] * stands_for).sum()))
    mean, error = torch.tensor(sums).mean(), torch.tensor(sums).std() / len(sums) ** 0.5
    assert abs(float(mean) - exact) < 5 * float(error)
    index, stands_for = pairs.draw(12, counted, 5)  # all there are
    assert torch.equal(index, counted.nonzero()[:, 0])
    assert bool((stands_for == 1).all())
    assert len(Pairs.of(pairs.sample[:0], pairs.cls[:0]).draw(2, counted[:0], 5)[0]) == 0


def test_drawing_is_the_default_only_where_classes_cost() -> None:
    images, _, masks = batch()
    labels = torch.ones(4, 12)

    def pairs_of(model: nn.Module, **settings: Any) -> int:
        with ag.Guide(model, terms=[ag.Term(targets="all", **settings)]) as guide:
            model(images)
            guide.loss(labels, mask=masks)
            return len(guide.records()[0].pairs)

    assert pairs_of(cnn(classes=12)) == 48
    assert pairs_of(tiny_vit(classes=12)) == 16
    assert pairs_of(tiny_vit(classes=12), max_classes=None) == 48
    assert pairs_of(tiny_vit(classes=12), max_classes=7) == 28
    assert pairs_of(tiny_vit(classes=12), source="layer_attention") == 48
    for wrong in (0, -1, "some", 1.5):
        with pytest.raises(InputError, match="max_classes="):
            ag.Guide(cnn(), terms=[ag.Term(max_classes=wrong)])


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
    with ag.Guide(
        far, terms=[ag.Term(targets=targets, max_classes=2 if case == "drawn" else "auto")]
    ) as guide:
        guide._steps = 1  # the first step checks values
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
        _, mean = bound._compare(bound.layers, trace, dense, dense.present.float(), {"mask": masks})
    torch.testing.assert_close(mean, sparse.detach(), check_dtype=False)


# ---------------------------------------------------------------------- compiling


def test_what_was_compiled_in_place_is_explained_but_not_guided() -> None:
    model, images = cnn().eval(), batch()[0]
    plain = ag.explain(model, images)
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    assert torch.equal(ag.explain(model, images).maps, plain.maps)
    assert model._compiled_call_impl is compiled
    with pytest.raises(GuidanceError, match=r"the model was compiled in place.*guide\.compile"):
        ag.Guide(model)
    model._compiled_call_impl = None
    model.block4.compile(backend="eager")
    with ag.Guide(model), pytest.raises(GuidanceError, match=r"module 'block4' was compiled in place"):
        model(images)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_comes_before_the_layer_is_compiled() -> None:
    model = cnn().eval()
    images, labels, masks = batch()

    def step() -> tuple[float, Tensor]:
        model.zero_grad()
        loss = F.cross_entropy(model(images), labels) + guide.loss(labels, mask=masks)
        loss.backward()
        return float(loss.detach()), model.block1[0].weight.grad.clone()

    with ag.Guide(model) as guide:
        eager = step()
        assert guide.compile(images, backend="aot_eager") == [
            "block1",
            "block2",
            "block3",
            "block4.0",
            "block4.1",
        ]
        compiled = step()
        assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
        torch.testing.assert_close(compiled[1], eager[1], rtol=1e-4, atol=1e-6)
    assert all(module._compiled_call_impl is None for module in model.modules())
    with pytest.raises(GuidanceError, match="removed"):
        guide.compile(images)


def test_compiling_has_clear_limits() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    with ag.Guide(model, layer="0") as guide, pytest.raises(GuidanceError, match="nothing to compile"):
        guide.compile(batch()[0])
    with pytest.raises(InputError, match=r"compiled as a whole.*guide\.compile"):
        ag.Guide(torch.compile(cnn()))


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
