"""The CAM family agrees with captum and with pytorch-grad-cam, value for value."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torchvision
from captum.attr import LayerGradCam, LayerGradientXActivation
from torch import Tensor, nn

import attnguide as ag
from attnguide.sources.grad_cam import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports plotting and optional packages
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

OURS = {
    "grad_cam": GradCAM,
    "grad_cam_plus_plus": GradCAMPlusPlus,
    "layer_cam": LayerCAM,
    "hires_cam": HiResCAM,
    "xgrad_cam": XGradCAM,
}
THEIRS = {
    "grad_cam": pytorch_grad_cam.GradCAM,
    "grad_cam_plus_plus": pytorch_grad_cam.GradCAMPlusPlus,
    "layer_cam": pytorch_grad_cam.LayerCAM,
    "hires_cam": pytorch_grad_cam.HiResCAM,
    "xgrad_cam": pytorch_grad_cam.XGradCAM,
}


def from_torchvision(name: str) -> nn.Module:
    return torchvision.models.get_model(name, weights=None)


# How it is built, the layer that "auto" must find, and how its output becomes (B, C, h, w).
MODELS: dict[str, tuple[Any, str, Any]] = {
    "timm resnet18": (lambda: timm.create_model("resnet18"), "layer4", None),
    "torchvision resnet18": (lambda: from_torchvision("resnet18"), "layer4", None),
    "torchvision vgg11": (lambda: from_torchvision("vgg11"), "features.19", None),
    "torchvision alexnet": (lambda: from_torchvision("alexnet"), "features.11", None),
    "timm mobilenetv3": (lambda: timm.create_model("mobilenetv3_small_050"), "blocks.5", None),
    "timm convnext": (lambda: timm.create_model("convnext_atto"), "stages.3", None),
    "timm vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=96),
        "blocks.11.norm1",
        lambda x: x[:, 1:].reshape(len(x), 6, 6, -1).permute(0, 3, 1, 2),
    ),
    "timm swin": (
        # A normalisation follows its last layer, so that gradient times feature sums up to nearly nothing.
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=96).double(),
        "norm",
        lambda x: x.permute(0, 3, 1, 2),
    ),
}
TARGETS = [3, 7]


@dataclass
class Case:
    """A model, the layer by hand, and what pytorch-grad-cam saw there."""

    model: nn.Module
    images: Tensor
    layer: str
    transform: Any
    activations: Any
    gradients: Any


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(1)
    build, layer, transform = MODELS[request.param]
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh weights leave some paths all but closed
            if parameter.ndim <= 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    images = torch.rand(2, 3, 96, 96).to(next(model.parameters()))
    targets = [ClassifierOutputTarget(cls) for cls in TARGETS]
    with pytorch_grad_cam.GradCAM(model, [model.get_submodule(layer)], transform) as cam:
        cam(images, targets)
        record = cam.activations_and_grads
        activations, gradients = (part[0].detach().numpy() for part in (record.activations, record.gradients))
    return Case(model, images, layer, transform, activations, gradients)


def ours(model: nn.Module, images: Tensor, source: Any, layer: str = "auto") -> Tensor:
    found = ag.explain(model, images, source, [(0, TARGETS[0]), (1, TARGETS[1])], layer, size=None)
    assert found.classes.tolist() == [[TARGETS[0]], [TARGETS[1]]]
    return found.maps[:, 0]


def assert_same(mine: Tensor, theirs: Tensor) -> None:
    assert mine.shape == theirs.shape
    assert theirs.abs().amax() > 0
    limit = 1e-5 * theirs.abs().amax(dim=(1, 2), keepdim=True)
    assert bool(((mine - theirs).abs() <= limit).all()), ((mine - theirs).abs() / limit).amax()


def test_the_layer_is_the_one_that_people_choose_by_hand(case: Case) -> None:
    assert ag.layers.find_layers(case.model, case.images)[0].name == case.layer


@pytest.mark.parametrize("name", OURS)
def test_pytorch_grad_cam(case: Case, name: str) -> None:
    module = case.model.get_submodule(case.layer)
    with THEIRS[name](case.model, [module], reshape_transform=case.transform) as cam:
        raw = cam.get_cam_image(case.images, module, None, case.activations, case.gradients, False)
    raw = torch.from_numpy(raw)
    assert_same(ours(case.model, case.images, OURS[name](relu=False), case.layer), raw)
    if bool((raw > 0).any(dim=2).any(dim=1).all()):
        assert_same(ours(case.model, case.images, name, case.layer), raw.relu())


@pytest.mark.parametrize("case", ["timm resnet18", "torchvision resnet18"], indirect=True)
def test_cam_is_the_weights_of_the_classifier_times_the_features(case: Case) -> None:
    head = case.model.get_submodule("fc")
    features = torch.from_numpy(case.activations)
    weighted = torch.einsum("bchw,bc->bhw", features, head.weight[TARGETS]) / features[0, 0].numel()
    lowest = weighted.amin(dim=(1, 2), keepdim=True)
    assert_same(ours(case.model, case.images, "cam"), (weighted - lowest).detach())


def test_captum(case: Case) -> None:
    model, images, transform = case.model, case.images, case.transform
    module, targets = model.get_submodule(case.layer), torch.tensor(TARGETS)
    product = LayerGradientXActivation(model, module).attribute(images, targets).detach()
    product = product if transform is None else transform(product)
    assert_same(ours(model, images, HiResCAM(relu=False)), product.sum(dim=1))
    if transform is None:  # captum takes axis 1 for the channels
        cam = LayerGradCam(model, module).attribute(images, targets).detach()[:, 0]
        assert_same(ours(model, images, GradCAM(relu=False)), cam)


def test_a_layer_before_an_in_place_relu_is_seen_as_it_was_made() -> None:
    torch.manual_seed(2)
    model = from_torchvision("vgg11").eval()
    outside = copy.deepcopy(model)
    for module in outside.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    images = torch.rand(2, 3, 96, 96)
    cam = LayerGradCam(outside, outside.features[18]).attribute(images, torch.tensor(TARGETS)).detach()[:, 0]
    assert bool((cam < 0).any())
    assert_same(ours(model, images, GradCAM(relu=False), layer="features.18"), cam)
