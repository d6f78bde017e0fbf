"""Measures how much of the image a position of a layer depends on, and reads what layers give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attnguide.capture.calls import INPUT, Tap, images_name, select
from attnguide.capture.model_state import evaluating, muted, unwrap
from attnguide.capture.own_hooks import Handles, in_this_thread
from attnguide.layers._probe import stand_ins
from attnguide.trace import Layer

__all__ = ["outputs_of", "reach"]

#: Share of the squared gradient that the pixels have which a position is said to depend on.
_HELD = 0.9


@contextmanager
def outputs_of(model: nn.Module, layers: Sequence[Layer]) -> Iterator[dict[str, Tensor]]:
    """Collect what layers give in the passes that run meanwhile, `(B, C, h, w)`, by their names."""
    found: dict[str, Tensor] = {}
    handles = Handles()

    def keep(layer: Layer, tap: Tap) -> None:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = select(args if tap.given else output, tap.path)
            if tensor is not None and (tap.call is None or layer.name not in found):
                # What comes next may work in place.
                found[layer.name] = layer.layout.spatial(tensor).clone()

        handles.keep(model.get_submodule(tap.module).register_forward_hook(in_this_thread(hook)))

    try:
        for layer in layers:
            keep(layer, Tap.parse(layer.name))
        yield found
    finally:
        handles.remove()


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
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model), muted():
        images.requires_grad_()
        inside = [layer for layer in layers if layer.name not in (INPUT, images_name(model))]
        with outputs_of(model, inside) as outputs:
            functional_call(model, weights, (images,))
        pixel = 1 / (images.shape[-2] * images.shape[-1])
        return {
            layer.name: _share(outputs.get(layer.name), images) if layer in inside else pixel
            for layer in layers
        }


def _share(output: Tensor | None, images: Tensor) -> float:
    if output is None or not output.requires_grad:
        return float("nan")
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
