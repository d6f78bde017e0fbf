"""Every image attribution of captum, as `captum:NAME`.

captum runs the model itself, in evaluation mode, as often as the method needs. Attributions are summed over
the channels. Baselines are zeros, which is the mean colour of images that were standardised; regions to leave
out are the cells of a grid. Every argument of `attribute()` can be set, as in
`Captum("IntegratedGradients", n_steps=100)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import factorial, prod
from typing import Any

import captum.attr
import torch
from captum.attr._utils.lrp_rules import EpsilonRule
from torch import Tensor, nn

from attnguide.capture.calls import INPUT, Tap, images_name
from attnguide.errors import GuidanceError, InputError, nearest
from attnguide.interfaces import AttributionSource
from attnguide.pairs import Pairs
from attnguide.parts.standard import CAPTUM_OF_IMAGES, CAPTUM_OF_LAYERS
from attnguide.sources._running import Scores, model_of, running
from attnguide.trace import Feature, Trace

__all__ = ["Captum"]

#: Methods made of gradients alone: with gradients that can be differentiated in turn they can guide.
_DIFFERENTIABLE = ("InputXGradient", "IntegratedGradients", "Saliency")
#: The side of the grid of regions, for methods that leave regions out.
_CELLS = {
    "FeatureAblation": 8,
    "FeaturePermutation": 8,
    "KernelShap": 6,
    "Lime": 6,
    "ShapleyValueSampling": 6,
    "ShapleyValues": 2,
}
#: Default arguments of the methods.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "GradientShap": {"n_samples": 8},
    "IntegratedGradients": {"n_steps": 32, "internal_batch_size": 64},
    "InternalInfluence": {"n_steps": 32, "internal_batch_size": 64},
    "KernelShap": {"n_samples": 200},
    "LayerConductance": {"n_steps": 32, "internal_batch_size": 64},
    "LayerGradientShap": {"n_samples": 8},
    "LayerIntegratedGradients": {"n_steps": 32, "internal_batch_size": 64},
    "Lime": {"n_samples": 200},
    "NoiseTunnel": {"nt_samples": 8, "stdevs": 0.1},
    "Occlusion": {"perturbations_per_eval": 16},
    "ShapleyValueSampling": {"n_samples": 10},
}
#: Modules that only change the shape of a tensor.
_ARRANGE = (nn.Flatten, nn.Identity, nn.Unflatten)


class Captum(AttributionSource):
    """An attribution of captum.

    Args:
        method: Name of a class of `captum.attr`, such as `"IntegratedGradients"`; those that attribute a
            neuron, text or training data are not among them. `"NoiseTunnel"` smooths `"Saliency"`.
        **options: Arguments of the method's `attribute()`.

    Raises:
        InputError: If captum has no such method, or the method does not attribute images.
    """

    needs_gradient = False

    def __init__(self, method: str, **options: Any) -> None:
        known = (*CAPTUM_OF_IMAGES, *CAPTUM_OF_LAYERS)
        if method not in known:
            raise InputError(f"captum has no attribution of images {method!r}.{nearest(method, known)}")
        self.method, self.options = method, options
        self.of_layer = method in CAPTUM_OF_LAYERS
        self.layer = "auto" if self.of_layer or method == "GuidedGradCam" else INPUT
        self.differentiable = self.only_gradients = method in _DIFFERENTIABLE

    def __call__(self, trace: Trace, pairs: Pairs) -> Tensor:
        """Compute the maps `(N, h, w)`, signed.

        Raises:
            InputError: If a layer was named for an attribution of the images.
            GuidanceError: If captum cannot explain this model with this method.
        """
        model = model_of(self, trace)
        if self.layer == INPUT and trace.feature.layer != images_name(model):
            raise InputError(
                f"{self!r} looks at the images, not at layer {trace.feature.layer!r}: leave it out."
            )
        maps = trace.images.new_zeros(pairs.slots, len(trace.images), *self.size(trace))
        with running(model, trace.images):
            for slot in range(pairs.slots):
                part = pairs.select((pairs.slot == slot).nonzero()[:, 0])
                if self.method.endswith("Permutation"):  # permutes among all images
                    values = self._attributed(trace, model, _for_all(part, trace.logits))[part.sample]
                else:
                    values = self._attributed(trace, model, part)
                maps = maps.index_put((torch.full_like(part.sample, slot), part.sample), values.to(maps))
        return maps[pairs.slot, pairs.sample]

    def size(self, trace: Trace) -> tuple[int, int]:
        """Size of the images, or of the layer."""
        return trace.feature.layout.grid if self.of_layer else trace.image_size

    def passes(self, trace: Trace) -> int:
        """Return how many times captum runs the model for each pair, forward and backward counted apart."""
        options = {**_DEFAULTS.get(self.method, {}), **self.options}
        cells = _CELLS.get(self.method, 0) ** 2
        if self.method in ("LayerFeatureAblation", "LayerFeaturePermutation"):
            cells = prod(trace.feature.layout.grid)
        counts = {
            "n_steps": 3,
            "nt_samples": 3,
            "n_samples": 1 if self.method in ("KernelShap", "Lime") else cells + 1 if cells else 3,
        }
        for name, each in counts.items():
            if name in options:
                return int(options[name]) * each
        if self.method == "Occlusion":
            where = {**self._inputs(trace, trace.images), **options}
            steps = where.get("strides") or where["sliding_window_shapes"]
            sizes = zip(trace.images.shape[1:], where["sliding_window_shapes"], _each(steps), strict=True)
            return prod(-(-max(0, size - window) // step) + 1 for size, window, step in sizes)
        if self.method == "ShapleyValues":
            return factorial(cells) * cells
        return cells or 3

    def _attributed(self, trace: Trace, model: nn.Module, pairs: Pairs) -> Tensor:
        images = pairs.pick(trace.images)
        kind = getattr(captum.attr, "Saliency" if self.method == "NoiseTunnel" else self.method)
        if self.method.endswith("Permutation") and len(images) < 2:
            raise InputError(f"{self!r} permutes regions between images: it needs at least two, got one.")
        # LayerFeaturePermutation would select the class twice.
        one_score = self.method == "LayerFeaturePermutation"
        classes = pairs.cls + trace.logits.shape[1] * (pairs.sign < 0)
        arguments: tuple[Any, ...] = (Scores(model, trace.output, classes if one_score else None),)
        if self.of_layer or self.method == "GuidedGradCam":
            arguments += (self._module(trace, model),)
        options = {**self._inputs(trace, images), **_DEFAULTS.get(self.method, {}), **self.options}
        if self.method != "LayerActivation" and not one_score:
            options["target"] = classes
        if trace.differentiable and self.method == "IntegratedGradients":
            options["internal_batch_size"] = None  # captum detaches every batch but the first
        if self.method.endswith("LRP"):  # captum removes the rules after each pass
            for module in model.modules():
                if isinstance(module, _ARRANGE) and not hasattr(module, "rule"):
                    module.rule = EpsilonRule()
        try:
            attribution = kind(*arguments)
            if trace.differentiable:
                attribution.gradient_func = _gradients
            if self.method == "NoiseTunnel":
                attribution = captum.attr.NoiseTunnel(attribution)
            result = attribution.attribute(images, **options)
        # Each method of captum has its own requirements of a model, and its own errors.
        except Exception as error:
            hint = " Name a single module, such as a convolution." if self.method == "LayerLRP" else ""
            raise GuidanceError(
                f"{self!r} cannot explain {type(model).__name__}: {type(error).__name__}: {error}.{hint}"
            ) from error
        values: Tensor = result[0] if isinstance(result, tuple) else result
        if not self.of_layer:
            return values.sum(dim=1)
        if self.method == "LayerGradCam":
            return values[:, 0]
        return trace.feature.layout.spatial(values).sum(dim=1)

    def _module(self, trace: Trace, model: nn.Module) -> nn.Module:
        tap = Tap.parse(trace.feature.layer)
        if (
            tap.call is not None
            or tap.path
            or (self.method in ("GuidedGradCam", "LayerGradCam") and trace.feature.layout.kind != "nchw")
        ):
            raise GuidanceError(
                f"{self!r} cannot read layer {trace.feature.layer!r} ({trace.feature.layout}). Name a module "
                "that runs once and gives one tensor, channels first."
            )
        return model.get_submodule(tap.module)

    def _inputs(self, trace: Trace, images: Tensor) -> dict[str, Any]:
        """Return the arguments of the method that depend on the images or the layer."""
        if self.method in ("LayerFeatureAblation", "LayerFeaturePermutation"):
            return {"layer_mask": _positions(trace.feature)}  # all channels of a position together
        channels, height, width = images.shape[1:]
        if self.method in _CELLS:
            return {"feature_mask": _cells(height, width, _CELLS[self.method], images.device)}
        if self.method == "Occlusion":
            window = (channels, -(-height // 8), -(-width // 8))
            return {"sliding_window_shapes": window, "strides": (channels, *(-(-s // 2) for s in window[1:]))}
        if self.method in ("GradientShap", "LayerGradientShap"):
            return {"baselines": torch.zeros_like(images[:1])}
        if self.method in ("DeepLiftShap", "LayerDeepLiftShap"):
            return {"baselines": torch.zeros_like(images[:1]).repeat(2, 1, 1, 1)}  # it needs several
        return {}

    def __repr__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"Captum({self.method!r}{options})"


def __getattr__(name: str) -> Callable[..., Captum]:
    """Return a method by its name, for the registry: `attnguide.sources.captum:Saliency`."""
    if name in CAPTUM_OF_IMAGES or name in CAPTUM_OF_LAYERS:
        return partial(Captum, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _for_all(pairs: Pairs, logits: Tensor) -> Pairs:
    """Add a pair of any class for each image without one: captum needs a target for every image."""
    classes = pairs.cls.new_zeros(len(logits)).index_put((pairs.sample,), pairs.cls)
    sign = pairs.sign.new_ones(len(logits)).index_put((pairs.sample,), pairs.sign)
    return replace(Pairs.one_each(classes), sign=sign)


def _gradients(
    forward_fn: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    target_ind: Tensor,
    *others: Any,
    **more: Any,
) -> tuple[Tensor, ...]:
    """Compute the gradients that captum needs, with a graph; the names of arguments are captum's."""
    with torch.enable_grad():
        scores = forward_fn(*inputs).gather(1, target_ind[:, None])
        return torch.autograd.grad(scores.sum(), inputs, create_graph=True)


def _each(steps: int | tuple[int, ...]) -> tuple[int, ...]:
    """Strides along channels, rows and columns, which captum takes as one number too."""
    return (steps,) * 3 if isinstance(steps, int) else steps


def _positions(feature: Feature) -> Tensor:
    """Number the positions of a layer, in the layer's own layout."""
    shape = feature.parts[0].shape
    places = shape[2:] if feature.layout.channels_first else shape[1:-1]
    numbers = torch.arange(prod(places), device=feature.parts[0].device).view(1, *places)
    return numbers.unsqueeze(1 if feature.layout.channels_first else -1)


def _cells(height: int, width: int, side: int, device: torch.device) -> Tensor:
    """Number the cells of a grid, `(1, 1, H, W)`."""
    rows = torch.arange(height, device=device) * min(side, height) // height
    columns = torch.arange(width, device=device) * min(side, width) // width
    return (rows[:, None] * min(side, width) + columns)[None, None]
