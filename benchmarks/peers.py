"""What others do: explanations by other libraries, and guidance as research code writes it.

The libraries' calls are the ones that their documentation shows. All get the layer that attnguide finds, and
all maps end up as large as the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

#: Explainers by name, and the package that each needs.
PACKAGES = {"captum": "captum", "torch-cam": "torchcam", "pytorch-grad-cam": "pytorch_grad_cam"}


@dataclass(frozen=True)
class View:
    """A layer's output seen as `(B, C, h, w)`, and put back."""

    there: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]


def view_of(model: str) -> View:
    """The view for a family of models, which a user of the other libraries has to write."""
    if model.startswith("swin"):
        return View(lambda y: y.permute(0, 3, 1, 2), lambda seen, _: seen.permute(0, 2, 3, 1))
    if model.startswith("vit"):
        return View(_patches, lambda seen, y: torch.cat([y[:, :1], seen.flatten(2).transpose(1, 2)], dim=1))
    return View(lambda y: y, lambda seen, _: seen)


def _patches(tokens: Tensor) -> Tensor:
    patches = tokens[:, 1:].transpose(1, 2)  # without the class token
    side = isqrt(patches.shape[2])
    return patches.unflatten(2, (side, side))


# ------------------------------------------------------------------ explaining

Explainer = Callable[[nn.Module, Tensor, str, View, Sequence[int]], Tensor]


def captum(model: nn.Module, images: Tensor, layer: str, view: View, classes: Sequence[int]) -> Tensor:
    """Captum: a forward for each class; the layer has to give channels first."""
    from captum.attr import LayerAttribution, LayerGradCam

    with _tapped(model.get_submodule(layer), view) as tap:
        explainer = LayerGradCam(model, tap)
        maps = [
            LayerAttribution.interpolate(
                explainer.attribute(images, target=cls, relu_attributions=True), images.shape[-2:], "bilinear"
            )
            for cls in classes
        ]
    return torch.cat(maps, dim=1)


@contextmanager
def _tapped(module: nn.Module, view: View) -> Iterator[nn.Module]:
    """Lead a module's output through another module, in another layout."""
    tap = nn.Identity()
    handle = module.register_forward_hook(lambda _module, _args, y: view.back(tap(view.there(y)), y))
    try:
        yield tap
    finally:
        handle.remove()


def torch_cam(model: nn.Module, images: Tensor, layer: str, view: View, classes: Sequence[int]) -> Tensor:
    """torch-cam: one forward, whose graph is kept for all classes."""
    from torchcam.methods import GradCAM

    with GradCAM(model, layer, reshape_transform=view.there) as explainer:
        logits = model(images)
        maps = [explainer(cls, logits, retain_graph=cls != classes[-1])[0] for cls in classes]
    # Its maps are as large as the layer's; a user scales them up.
    return F.interpolate(torch.stack(maps, dim=1), images.shape[-2:], mode="bilinear")


def pytorch_grad_cam(
    model: nn.Module, images: Tensor, layer: str, view: View, classes: Sequence[int]
) -> Tensor:
    """pytorch-grad-cam: a forward and a backward for each class; scales with OpenCV, image by image."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with GradCAM(model, [model.get_submodule(layer)], reshape_transform=view.there) as explainer:
        maps = [
            torch.from_numpy(explainer(images, [ClassifierOutputTarget(cls)] * len(images)))
            for cls in classes
        ]
    return torch.stack(maps, dim=1)


EXPLAINERS: dict[str, Explainer] = {
    name: explainer
    for name, explainer in (
        ("captum", captum),
        ("torch-cam", torch_cam),
        ("pytorch-grad-cam", pytorch_grad_cam),
    )
    if find_spec(PACKAGES[name])
}


# --------------------------------------------------------------------- guiding


def twice_differentiable(model: nn.Module, images: Tensor) -> Tensor:
    """A forward that can be differentiated twice, which one with fused attention cannot."""
    with sdpa_kernel(SDPBackend.MATH):
        logits: Tensor = model(images)
    return logits


def second_forward(
    model: nn.Module, images: Tensor, labels: Tensor, masks: Tensor, layer: str, view: View
) -> Tensor:
    """Grad-CAM with −ln IoU as research code adds it: a second forward pass, differentiated twice.

    One forward serves all classes, although much published code runs one for each.

    Args:
        model: Classifier in training mode.
        images: `(B, C, H, W)`.
        labels: Class indices `(B,)`: one map for each image; or multi-hot `(B, K)`: a map for each class.
        masks: `(B, H, W)` or `(B, K, H, W)`.
        layer: Name of the layer.
        view: The layer's output as `(B, C, h, w)`.

    Returns:
        The mean loss.
    """
    features: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda _module, _args, y: features.append(y))
    logits = twice_differentiable(model, images)
    hook.remove()
    scores = logits.T if labels.ndim == 2 else logits.gather(1, labels[:, None]).T
    maps = []
    for score in scores:
        (gradient,) = torch.autograd.grad(score.sum(), features[0], create_graph=True)
        weights = view.there(gradient).mean(dim=(2, 3), keepdim=True)
        maps.append((weights * view.there(features[0])).sum(dim=1).relu())
    cams = torch.stack(maps, dim=1)
    cams = cams / (cams.amax(dim=(2, 3), keepdim=True) + 1e-6)
    wanted = F.interpolate(masks if masks.ndim == 4 else masks[:, None], cams.shape[-2:], mode="area")
    overlap = torch.minimum(cams, wanted).sum(dim=(2, 3))
    union = torch.maximum(cams, wanted).sum(dim=(2, 3))
    return -((overlap + 1e-6) / (union + 1e-6)).log().mean()


def input_gradient(logits: Tensor, images: Tensor, labels: Tensor, masks: Tensor) -> Tensor:
    """The penalty of Ross et al. (IJCAI 2017): squared gradient at the input, outside the mask.

    Args:
        logits: Logits of a forward pass under `twice_differentiable`.
        images: Images of that pass, which require a gradient.
        labels: Labels `(B,)` of classes that exclude each other, or `(B, K)` of classes that do not.
        masks: `(B, H, W)`, or `(B, K, H, W)`: then what no class may use counts.

    Returns:
        The penalty, a mean over the images.
    """
    multi_hot = labels.ndim == 2
    chances = F.logsigmoid(logits) + F.logsigmoid(-logits) if multi_hot else logits.log_softmax(dim=1)
    (gradient,) = torch.autograd.grad(chances.sum(), images, create_graph=True)
    allowed = masks.amax(dim=1, keepdim=True) if masks.ndim == 4 else masks[:, None]
    forbidden = 1 - F.interpolate(allowed, images.shape[-2:])
    return (forbidden * gradient).square().sum() / len(images)
