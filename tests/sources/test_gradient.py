"""Gradients of the images, and the images as a layer, against autograd."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from tests.helpers.models import batch, cnn, tiny_vit
from torch import Tensor, nn

import attnguide as ag
from attnguide.errors import InputError
from attnguide.losses.pointwise import Outside
from attnguide.sources.gradient import Gradient, GradientTimesInput

MODELS = pytest.mark.parametrize("build", [cnn, tiny_vit])


def gradient(model: nn.Module, images: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(score(model(images)), images)[0]


@MODELS
def test_gradients_of_the_images_agree_with_autograd(build: Callable[[], nn.Module]) -> None:
    model, (images, labels, _) = build().eval(), batch()
    of_logits = gradient(model, images, lambda logits: logits.gather(1, labels[:, None]).sum())
    summed = nn.CrossEntropyLoss(reduction="sum")
    of_label = gradient(model, images, lambda logits: -summed(logits, labels))
    of_all = gradient(model, images, lambda logits: logits.log_softmax(dim=1).sum())
    given = images.clone()
    for source, expected in (
        ("input_gradient", of_logits.norm(dim=1)),
        ("input_x_gradient", (of_logits * images).sum(dim=1)),
        (Gradient(score="cross_entropy"), of_label.norm(dim=1)),
        (GradientTimesInput(score="cross_entropy"), (of_label * images).sum(dim=1)),
        (Gradient(score="log_probabilities"), of_all.norm(dim=1)),
        (GradientTimesInput(score="log_probabilities"), (of_all * images).sum(dim=1)),
    ):
        found = ag.explain(model, images, source, "labels", labels=labels)
        assert found.layer == "input"
        torch.testing.assert_close(found.maps[:, 0], expected, rtol=1e-4, atol=1e-7)
    several = ag.explain(model, images, Gradient(score="cross_entropy"), "all").maps
    for cls in range(several.shape[1]):
        of_class = gradient(model, images, lambda logits, cls=cls: logits.log_softmax(dim=1)[:, cls].sum())
        torch.testing.assert_close(several[:, cls], of_class.norm(dim=1), rtol=1e-4, atol=1e-7)
    assert torch.equal(images, given)
    assert not images.requires_grad


def test_a_gradient_at_a_layer() -> None:
    model, (images, _, _) = cnn().eval(), batch()
    found = ag.explain(model, images, "input_gradient", [1], layer="block3", size=None)
    features: Tensor = model[:3](images).detach().requires_grad_()  # type: ignore[index]
    (expected,) = torch.autograd.grad(model[3:](features)[:, 1].sum(), features)  # type: ignore[index]
    torch.testing.assert_close(found.maps[:, 0], expected.norm(dim=1))


@MODELS
def test_any_source_looks_at_the_images(build: Callable[[], nn.Module]) -> None:
    model, (images, _, _) = build().eval(), batch()
    at_images = ag.explain(model, images, "hires_cam", [2], layer="input")
    product = ag.explain(model, images, "input_x_gradient", [2])
    torch.testing.assert_close(at_images.maps, product.maps.relu())
    both = ag.explain(model, images, "grad_cam", [2], layer=["input", "auto"])
    assert list(both.raw) == ["input", ag.layers.find_layers(model, images)[0].name]
    torch.testing.assert_close(
        both.raw["input"], ag.explain(model, images, "grad_cam", [2], layer="input").raw["input"]
    )


def test_right_for_the_right_reasons_is_what_the_paper_penalises() -> None:
    model, (images, labels, masks) = cnn().eval(), batch()
    own = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(own).log_softmax(dim=1).sum(), own, create_graph=True)
    expected = ((1 - masks)[:, None] * expected).square().sum()
    weights = list(model.parameters())
    wanted = torch.autograd.grad(expected, weights, allow_unused=True)
    loss = Outside(scale="none", reduction="sum")
    with ag.Guide(model, source=Gradient(score="log_probabilities"), loss=loss, weight=len(images)) as guide:
        model(images)
        found = guide.loss(labels, mask=masks)
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=0)
        for ours, theirs in zip(torch.autograd.grad(found, weights, allow_unused=True), wanted, strict=True):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("score", ["logit", "cross_entropy", "log_probabilities"])
def test_the_guidance_reaches_every_weight(score: str) -> None:
    model, (images, labels, masks) = cnn(), batch()
    source = Gradient(score=score)  # type: ignore[arg-type]
    with ag.Guide(model, source=source, loss="outside") as guide:
        assert guide.check(images, labels, mask=masks).unreached == []
        assert guide.layers == ["input"]


def test_an_unknown_score_is_refused() -> None:
    with pytest.raises(InputError, match=r"score='logits' is unknown.*logit"):
        Gradient(score="logits")  # type: ignore[arg-type]


def test_one_logit_has_no_softmax() -> None:
    model, (images, _, masks) = cnn(classes=1), batch()
    with ag.Guide.from_recipe(model, "rrr") as guide:
        model(images)
        with pytest.raises(ag.AttnGuideError, match="score='logit'"):
            guide.loss(torch.ones(4), mask=masks)


def test_a_module_called_input_is_not_the_images() -> None:
    layers = OrderedDict(
        input=nn.Conv2d(3, 8, 3, 2, 1), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(8, 4)
    )
    model, (images, labels, masks) = nn.Sequential(layers).eval(), batch()
    assert ag.explain(model, images, "grad_cam", size=None).maps.shape[-2:] == (16, 16)
    assert ag.explain(model, images, "hires_cam", layer="input", size=None).layer == "input"
    found = ag.explain(model, images, "input_gradient", [1], size=None)
    expected = gradient(model, images, lambda logits: logits[:, 1].sum()).norm(dim=1)
    torch.testing.assert_close(found.maps[:, 0], expected)
    with ag.Guide(model, source="input_gradient", loss="outside") as guide:
        assert guide.check(images, labels, mask=masks).reached
