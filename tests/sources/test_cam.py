"""`cam:NAME` is pytorch-grad-cam, handed the right layer and the right way to reshape its output."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam
import timm
import torch
from pytorch_grad_cam.ablation_layer import AblationLayerVit
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from tests.helpers.models import batch, cnn, tiny_vit
from torch import Tensor, nn

import attnguide as ag
from attnguide.errors import GuidanceError, InputError
from attnguide.parts.standard import CAMS
from attnguide.sources import PytorchGradCAM
from attnguide.testing import snapshot

IMAGES, LABELS, _ = batch()


def patches(output: Tensor) -> Tensor:
    """The tokens behind the class token, as pytorch-grad-cam's documentation reshapes them."""
    side = round((output.shape[1] - 1) ** 0.5)
    return output[:, 1:].reshape(len(output), side, side, -1).permute(0, 3, 1, 2)


def channels_last(output: Tensor) -> Tensor:
    return output.permute(0, 3, 1, 2)


def expected(
    method: str, model: nn.Module, layer: str, reshape: Any, images: Tensor, classes: tuple[int, ...] = (1,)
) -> Tensor:
    kind, options = getattr(pytorch_grad_cam, method), {}
    reshape = None if method == "FullGrad" else reshape  # which looks at convolutions
    if method == "AblationCAM" and reshape is not None:
        options = {"ablation_layer": AblationLayerVit()}
    maps = []
    for image, cls in ((image, cls) for image in images for cls in classes):
        np.random.seed(0)
        torch.manual_seed(0)
        cam = kind(model, [model.get_submodule(layer)], reshape, **options)
        if method == "FinerCAM":
            maps.append(cam(image[None], None, target_idx=cls)[0])
        else:
            maps.append(cam(image[None], [ClassifierOutputTarget(cls)])[0])
        if hasattr(cam, "activations_and_grads"):
            cam.activations_and_grads.activations = []  # views, which it cannot detach in place
    return torch.as_tensor(np.stack(maps)).unflatten(0, (len(images), len(classes)))


@pytest.mark.parametrize("method", [name for name in CAMS if name != "RandomCAM"])
@pytest.mark.parametrize(("build", "reshape"), [(cnn, None), (tiny_vit, patches)], ids=["cnn", "vit"])
def test_maps_are_those_of_pytorch_grad_cam(
    method: str, build: Callable[..., nn.Module], reshape: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build().eval()
    with torch.random.fork_rng():
        for weight in model.parameters():  # zeros, such as fresh heads, would hide mistakes
            if not bool(weight.any()):
                nn.init.normal_(weight, std=0.1)
    before = snapshot(model)
    if method == "ShapleyCAM" and reshape is not None:
        with pytest.raises(GuidanceError, match="cannot explain VisionTransformer at layer 'blocks"):
            ag.explain(model, IMAGES[:2], f"cam:{method}", [0, 3])
        return  # pytorch-grad-cam cannot, either
    found = ag.explain(model, IMAGES[:2], f"cam:{method}", [0, 3])
    assert snapshot(model) == before
    assert capsys.readouterr().err == ""  # no progress bars
    reference = expected(method, model, found.layer, reshape, IMAGES[:2], (0, 3))
    torch.testing.assert_close(found.maps, reference, rtol=0, atol=1e-5)
    assert float(found.maps.max()) > 0


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "test_convnext"])
def test_layouts_of_other_families(name: str) -> None:
    options = {"img_size": 64, "window_size": 2} if name.startswith("swin") else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=4, **options).eval()
        images = torch.rand(1, 3, 64, 64)
    found = ag.explain(model, images, "cam:HiResCAM", [1])
    reshape = channels_last if name.startswith("swin") else None
    reference = expected("HiResCAM", model, found.layer, reshape, images)
    torch.testing.assert_close(found.maps, reference, rtol=0, atol=1e-5)


def test_gradients_of_a_training_step_stay() -> None:
    model = cnn()
    nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
    before = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    ag.explain(model, IMAGES, "cam:GradCAM")
    after = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert len(after) == len(before)
    assert all(map(torch.equal, before, after))


def test_a_module_that_was_exchanged_comes_back_after_an_error() -> None:
    model = cnn().eval()
    before = snapshot(model)
    with pytest.raises(GuidanceError, match="cannot explain"):
        ag.explain(model, IMAGES, PytorchGradCAM("AblationCAM", ratio_channels_to_ablate="all"))
    assert snapshot(model) == before


def test_options_go_to_the_constructor_or_to_the_call() -> None:
    model = cnn().eval()
    found = ag.explain(model, IMAGES[:1], PytorchGradCAM("GradCAM", eigen_smooth=True), [1])
    cam = pytorch_grad_cam.GradCAM(model, [model.get_submodule(found.layer)])
    reference = cam(IMAGES[:1], [ClassifierOutputTarget(1)], eigen_smooth=True)
    torch.testing.assert_close(found.maps[0], torch.as_tensor(reference), rtol=0, atol=1e-5)


def test_how_often_the_model_runs() -> None:
    model, calls = cnn().eval(), []
    ag.explain(model, IMAGES[:1])  # the layer is known from now on
    counted = []
    monitored = PytorchGradCAM("ScoreCAM")
    passes = monitored.passes
    monitored.passes = lambda trace: counted.append(passes(trace)) or 0  # type: ignore[method-assign]
    handle = model.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    ag.explain(model, IMAGES[:1], monitored)
    handle.remove()
    # One pass of explain, one of pytorch-grad-cam, and one for each channel.
    assert sum(calls) == 2 + counted[0]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="Did you mean 'ScoreCAM'"):
        PytorchGradCAM("ScoreKAM")
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(InputError, match=r"pip install 'attnguide\[grad-cam\]'"):
        ag.explain(cnn(), IMAGES, "cam:ScoreCAM")
    monkeypatch.undo()
    with pytest.raises(GuidanceError, match="not differentiable"):
        ag.Guide(cnn(), source="cam:GradCAM")
