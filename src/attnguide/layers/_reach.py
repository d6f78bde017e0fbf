"""Measures how much of the image a position of a layer depends on, and finds layers that see little."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attnguide.capture.calls import INPUT, Call, Tap, images_name
from attnguide.capture.model_state import evaluating, muted, unwrap
from attnguide.capture.parallel import refuse_sharded
from attnguide.functional import full_precision_mode
from attnguide.layers._outputs import Given, given_at, outputs_of
from attnguide.layers._probe import stand_ins
from attnguide.layers.candidates import list_candidates, stages
from attnguide.trace import Layer

__all__ = ["find_local", "reach"]

#: Share of the squared gradient that the pixels have which a position is said to depend on.
_HELD = 0.9
#: A local layer has so many rows and columns at least, so that it can follow the outline of an object.
_FINE = 24


def reach(model: nn.Module, images: Tensor, layers: Sequence[Layer]) -> dict[str, float]:
    """Measure the share of the image that a position in the middle of a layer depends on.

    It is the smallest share of the pixels that have 90 % of the squared gradient of that position's features:
    the effective receptive field (Luo et al., NeurIPS 2016), which is smaller than the computed one and
    depends on the weights and images. Where it is large, features inside a region hold what is outside of it.

    Args:
        model: Any classifier; it stays as it is.
        images: `(B, C, H, W)`; the share is a mean over them. Photographs show most.
        layers: Layers, as [`find_layers`][attnguide.layers.find_layers] gives them.

    Returns:
        A share in (0, 1] for each layer; NaN where no gradient arrives, as from a layer that does not run.
    """
    model, images = unwrap(model), images.detach().clone()
    weights = stand_ins(model)  # branches that are all zero in a fresh model, and would hide what they see
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        full_precision_mode(images.device),
        evaluating(model),
        muted(),
    ):
        images.requires_grad_()
        taps = {
            layer.name: Tap.parse(layer.name)
            for layer in layers
            if layer.name not in (INPUT, images_name(model))
        }
        with outputs_of(model, taps.values(), cloned=True) as calls:
            functional_call(model, weights, (images,))
        pixel = 1 / (images.shape[-2] * images.shape[-1])
        return {
            layer.name: _share(layer, given_at(calls, taps[layer.name]), images)
            if layer.name in taps
            else pixel
            for layer in layers
        }


def _share(layer: Layer, given: Given | None, images: Tensor) -> float:
    if given is None or not given.tensor.requires_grad:
        return float("nan")
    output = layer.layout.spatial(given.tensor)
    middle = output[:, :, output.shape[2] // 2, output.shape[3] // 2]
    # A random mixture of the channels stands for all of them.
    signs = torch.randint(2, middle.shape[1:], generator=torch.Generator().manual_seed(0)) * 2 - 1
    (gradient,) = torch.autograd.grad((middle * signs.to(middle)).sum(), images, retain_graph=True)
    energy = gradient.square().sum(dim=1).flatten(1).double()
    energy = energy.sort(dim=1, descending=True).values
    total = energy.sum(dim=1, keepdim=True)
    enough = (energy.cumsum(dim=1) < _HELD * total).sum(dim=1) + 1
    shares = enough / energy.shape[1]
    return float(torch.where(total[:, 0] > 0, shares, torch.nan).nanmean())


def find_local(
    model: nn.Module, images: Tensor, *, most: float = 0.01, call: Call | None = None
) -> Layer | None:
    """Find the deepest stage of a convolutional network whose positions see little of the image.

    Its features inside an object hold hardly anything of what is around it.

    Args:
        model: Any classifier; it stays as it is.
        images: Images that it accepts, `(B, C, H, W)`. Their size counts and not what they show: it is
            measured on noise, so that all processes of a training find the same.
        most: The largest share of the image that a position may see, as
            [`reach`][attnguide.layers.reach] measures it.
        call: How the model is called with the images, if not `model(images)`.

    Returns:
        The layer; None if there is none, as in vision transformers, where each block sees everything, and
        with small images. It has at least 24 rows and columns.

    Raises:
        GuidanceError: If the model was sharded before.
    """
    refuse_sharded(model, "a local layer is found")
    noise = torch.randn(2, *images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)
    ends = [group[-1].layer for group in stages(list_candidates(model, images, measure=False, call=call))]
    ends = [end for end in ends if end.layout.has_axes and min(end.layout.grid) >= _FINE]
    seen = reach(model, noise, ends)
    return next((layer for layer in reversed(ends) if seen[layer.name] <= most), None)
