"""captum's attributions by name: the same values, and nothing left behind."""

from __future__ import annotations

from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
import torchvision
from tests.helpers.models import batch, cnn, smooth_cnn, tiny_vit
from torch import Tensor

import attnguide as ag
from attnguide.errors import GuidanceError, InputError
from attnguide.parts.registry import registry
from attnguide.parts.standard import CAPTUM_OF_IMAGES, CAPTUM_OF_LAYERS
from attnguide.sources.captum import Captum
from attnguide.sources.grad_cam import GradCAM
from attnguide.testing import snapshot

#: A grid would take too long, and lets nothing else be seen.
QUICK: dict[str, dict[str, Any]] = {
    "KernelShap": {"n_samples": 40},
    "Lime": {"n_samples": 40},
    "ShapleyValueSampling": {"n_samples": 1},
}
#: Reads single modules, as `LRP` does.
NEEDS_A_MODULE = {"LayerLRP": "block4.0"}


@pytest.mark.parametrize("name", [*CAPTUM_OF_IMAGES, *CAPTUM_OF_LAYERS])
def test_every_attribution_explains_a_convolutional_network(name: str) -> None:
    torch.manual_seed(1)
    model, (images, _, _) = cnn().train(), batch()
    source = Captum(name, **QUICK[name]) if name in QUICK else f"captum:{name}"
    layer = NEEDS_A_MODULE.get(name, "auto")
    before, draws = snapshot(model), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    found = ag.explain(model, images, source, [0, 3], layer=layer, size=None)
    again = ag.explain(model, images, source, [0, 3], layer=layer, size=None)
    assert snapshot(model) == before
    assert np.random.get_state()[1].tolist() == draws  # type: ignore[union-attr]
    assert torch.equal(found.maps, again.maps)
    grid = (32, 32) if name in CAPTUM_OF_IMAGES else tuple(found.maps.shape[2:])
    assert found.maps.shape == (4, 2, *grid)
    assert bool(found.maps.isfinite().all())
    if name not in ("Lime", "LayerActivation"):  # sparse, and the same for all classes
        assert not torch.equal(found.maps[:, 0], found.maps[:, 1])
        assert bool(found.maps.flatten(2).any(dim=2).all())


def test_none_of_captums_attributions_of_images_is_missing() -> None:
    kinds = {
        name
        for name, kind in vars(captum.attr).items()
        if isinstance(kind, type)
        and issubclass(kind, captum.attr.Attribution)
        and hasattr(kind, "attribute")
        and not name.startswith(("Neuron", "LLM", "RemoteLLM"))
    }
    others = {"DataLoaderAttribution", "LimeBase"}  # of whole data sets; what Lime is made of
    assert kinds - others == {*CAPTUM_OF_IMAGES, *CAPTUM_OF_LAYERS}
    assert {f"captum:{name}" for name in kinds - others} <= set(registry().names("source"))


def test_the_values_are_captums() -> None:
    model, (images, labels, _) = cnn().eval(), batch()

    def ours(source: Any, layer: str = "auto") -> Tensor:
        return ag.explain(model, images, source, "labels", layer=layer, labels=labels, size=None).maps[:, 0]

    theirs = captum.attr.IntegratedGradients(model).attribute(images, target=labels, n_steps=9)
    torch.testing.assert_close(ours(Captum("IntegratedGradients", n_steps=9)), theirs.sum(dim=1))
    theirs = captum.attr.Occlusion(model).attribute(
        images, target=labels, sliding_window_shapes=(3, 4, 4), strides=(3, 2, 2)
    )
    torch.testing.assert_close(ours("captum:Occlusion"), theirs.sum(dim=1))
    theirs = captum.attr.LayerGradCam(model, model.block3).attribute(images, target=labels)
    torch.testing.assert_close(ours("captum:LayerGradCam", "block3"), theirs[:, 0])
    torch.testing.assert_close(ours("captum:LayerGradCam", "block3"), ours(GradCAM(relu=False), "block3"))


def test_a_decision_against_a_class_turns_the_sign() -> None:
    model, (images, _, _) = cnn().eval(), batch()
    logit = ag.explain(model, images, "captum:InputXGradient", "all").maps
    found = ag.explain(model, images, "captum:InputXGradient", "all", evidence="decision")
    sign = torch.where(found.logits < 0, -1.0, 1.0)[:, :, None, None]
    torch.testing.assert_close(found.maps, logit * sign)


@pytest.mark.parametrize("name", ["Saliency", "InputXGradient", "IntegratedGradients"])
@pytest.mark.parametrize("build", [cnn, tiny_vit])
def test_those_made_of_gradients_guide(name: str, build: Any) -> None:
    model, (images, labels, masks) = build(), batch()
    before = snapshot(model)
    with ag.Guide(model, source=f"captum:{name}", loss="mse") as guide:
        assert guide.check(images, labels, mask=masks).unreached == []
    assert snapshot(model) == before


def test_saliency_guides_as_the_gradient_does() -> None:
    model, (images, labels, masks) = smooth_cnn().eval(), batch(3)
    values = []
    for source in ("captum:InputXGradient", "input_x_gradient"):
        with ag.Guide(model, source=source, loss="cosine") as guide:
            model(images)
            loss = guide.loss(labels, mask=masks)
            values.append(torch.autograd.grad(loss, next(iter(model.parameters())))[0])
    torch.testing.assert_close(values[0], values[1], rtol=1e-3, atol=1e-7)


def test_the_others_say_that_they_cannot_guide() -> None:
    with pytest.raises(GuidanceError, match=r"Captum\('Occlusion'\) is not differentiable"):
        ag.Guide(cnn(), source="captum:Occlusion")


def test_activations_that_work_in_place_are_no_obstacle() -> None:
    model = torchvision.models.resnet18(num_classes=3)
    images = torch.rand(2, 3, 64, 64)
    before = snapshot(model)
    found = ag.explain(model, images, "captum:GuidedBackprop")
    assert float(found.maps.abs().amax()) > 0
    assert all(module.inplace for module in model.modules() if isinstance(module, torch.nn.ReLU))
    assert snapshot(model) == before


def test_what_captum_refuses_is_told_and_leaves_nothing() -> None:
    model = torchvision.models.resnet18(num_classes=3)  # uses each activation twice
    images = torch.rand(2, 3, 64, 64)
    before = snapshot(model)
    with pytest.raises(GuidanceError, match=r"Captum\('DeepLift'\) cannot explain ResNet: .*ReLU"):
        ag.explain(model, images, "captum:DeepLift")
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["FeaturePermutation", "LayerFeaturePermutation"])
def test_permutation_is_among_all_images(name: str) -> None:
    """However many classes are asked of each: the map of a pair is the same."""
    model, images = cnn().eval(), batch(4)[0]
    labels = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0]]).float()
    several = ag.explain(model, images, f"captum:{name}", "labels", labels=labels)
    first = ag.explain(model, images, f"captum:{name}", [(0, 0), (1, 1), (2, 2), (3, 0)])
    torch.testing.assert_close(several.maps[:, :1], first.maps)


def test_bad_input() -> None:
    images = batch()[0]
    with pytest.raises(GuidanceError, match=r"Name a single module, such as a convolution\."):
        ag.explain(cnn(), images, "captum:LayerLRP", layer="block4")
    with pytest.raises(InputError, match=r"no attribution of images 'Saliencies'.*Saliency"):
        Captum("Saliencies")
    with pytest.raises(ag.AttnGuideError, match="captum:Saliency"):
        ag.explain(cnn(), images, "captum:Salience")
    with pytest.raises(InputError, match="looks at the images, not at layer 'block2'"):
        ag.explain(cnn(), images, "captum:Saliency", layer="block2")
    with pytest.raises(InputError, match="at least two, got one"):
        ag.explain(cnn(), images[:1], "captum:FeaturePermutation")
    with pytest.raises(GuidanceError, match="channels first"):
        ag.explain(tiny_vit(), images, "captum:LayerGradCam")
    with pytest.raises(GuidanceError, match="n_step"):
        ag.explain(cnn(), images, Captum("IntegratedGradients", n_step=3))


def test_integrated_gradients_guide_by_all_their_steps() -> None:
    model, (images, labels, masks) = smooth_cnn().double().eval(), batch(8)
    weight = model[0].weight
    with ag.Guide(model, source="captum:IntegratedGradients", loss="cosine") as guide:

        def compute() -> Tensor:
            model(images.double())
            return guide.loss(labels, mask=masks.double())

        (gradient,) = torch.autograd.grad(compute(), [weight])
        direction = torch.randn(weight.shape, dtype=torch.float64)
        values = []
        for step in (1e-5, -2e-5, 1e-5):
            with torch.no_grad():
                weight += step * direction
            values.append(float(compute().detach()))
    assert float((gradient * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


def test_a_magnitude_stays_one_for_a_decision_against_a_class() -> None:
    model, (images, _, _) = cnn().eval(), batch()
    found = ag.explain(model, images, "captum:Saliency", "all", evidence="decision")
    assert bool((found.logits < 0).any())
    assert float(found.maps.min()) >= 0


def test_what_guides_have_put_on_a_model_is_not_ignored() -> None:
    class Doubling(ag.Adapter):
        def forward(self, trace: ag.Trace) -> Tensor:
            return 2 * trace.logits

    model, (images, _, _) = cnn(), batch()
    guide = ag.Guide(model, terms=[], adapters=[Doubling()])
    with guide, pytest.raises(GuidanceError, match="without the adapters on it"):
        ag.explain(model, images, "captum:Saliency")
