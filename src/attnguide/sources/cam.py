"""Every method of pytorch-grad-cam, as `cam:NAME`.

The layer and the layout of its output are found by this library, so that transformers need no
`reshape_transform`. The maps are what pytorch-grad-cam returns: of the size of the images, in [0, 1]. The
extra `attnguide[grad-cam]` installs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from attnguide.capture.calls import Tap
from attnguide.capture.logits import LogitsSpec, find_logits
from attnguide.capture.model_state import modules_of
from attnguide.errors import GuidanceError, InputError, nearest
from attnguide.interfaces import AttributionSource
from attnguide.pairs import Pairs
from attnguide.parts.standard import CAMS
from attnguide.sources._running import model_of, reproducible, running
from attnguide.trace import Layout, Trace

__all__ = ["PytorchGradCAM"]

#: Arguments of the call; all others are the constructor's.
_OF_CALL = ("alpha", "aug_smooth", "comparison_categories", "eigen_smooth")
#: Methods that run the model once for each channel of the layer.
_BY_CHANNEL = ("AblationCAM", "ScoreCAM")


class PytorchGradCAM(AttributionSource):
    """A method of pytorch-grad-cam.

    Args:
        method: Name of a class of `pytorch_grad_cam`, such as `"ScoreCAM"`.
        **options: Arguments of its constructor, or of its call: `aug_smooth`, `eigen_smooth`, and of FinerCAM
            `alpha` and `comparison_categories`.

    Raises:
        InputError: If there is no such method, or pytorch-grad-cam is not installed.
    """

    needs_gradient = False
    differentiable = False

    def __init__(self, method: str, **options: Any) -> None:
        if method not in CAMS:
            raise InputError(f"pytorch-grad-cam has no method {method!r}.{nearest(method, CAMS)}")
        self.method, self.options = method, options
        self._class()

    def __call__(self, trace: Trace, pairs: Pairs) -> Tensor:
        """Compute the maps `(N, H, W)` in [0, 1], of the size of the images.

        Raises:
            GuidanceError: If pytorch-grad-cam cannot explain this model with this method.
        """
        model = model_of(self, trace)
        maps = trace.images.new_zeros(len(pairs), *self.size(trace))
        # ShapleyCAM differentiates twice, with a graph that begins at the weights.
        twice = self.method == "ShapleyCAM"
        kept = _kept(model, frozen=not twice)
        with running(model, trace.images, fused=not twice), kept, _silent(), torch.enable_grad():
            # One by one: ScoreCAM holds a copy of the image for each channel.
            for number, (sample, cls, sign) in enumerate(
                zip(pairs.sample.tolist(), pairs.cls.tolist(), pairs.sign.tolist(), strict=True)
            ):
                image = trace.images[sample : sample + 1].detach().clone().requires_grad_()
                maps[number] = self._map(model, trace, image, cls, sign)
        return maps

    def size(self, trace: Trace) -> tuple[int, int]:
        """Size of the images."""
        return trace.image_size

    def passes(self, trace: Trace) -> int:
        """Return how many times the model runs for each pair: for some methods once for each channel."""
        if self.method in _BY_CHANNEL:
            return int(trace.feature.spatial.shape[1])
        return 30 if self.method == "SESS" else 3

    def _map(self, model: nn.Module, trace: Trace, image: Tensor, cls: int, sign: float) -> Tensor:
        layers = [] if self.method == "FullGrad" else [self._module(trace, model)]
        layout = trace.feature.layout
        given = {name: value for name, value in self.options.items() if name not in _OF_CALL}
        called = {name: value for name, value in self.options.items() if name in _OF_CALL}
        if self.method == "AblationCAM":
            given = {"ablation_layer": _ablation(layout), **given}
        if self.method == "FinerCAM":
            called = {"target_idx": cls, **called}  # which it compares with the classes most like it
            targets = None
        else:
            targets = [lambda logits: logits[..., cls]]  # of one image, or of several
        reshape = None if layout.kind == "nchw" or not layers else layout.spatial
        cam = None
        try:
            with reproducible(image.device):  # each by itself, whatever else is explained with it
                cam = self._class()(_Logits(model, trace.output, sign), layers, reshape, **given)
                found = cam(image, targets, **called)
        # Each method has its own requirements of a model, and its own errors.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise GuidanceError(
                f"{self!r} cannot explain {type(model).__name__} at layer {trace.feature.layer!r}: "
                f"{type(error).__name__}: {reason}."
            ) from error
        finally:
            _forget(cam)
        result = torch.as_tensor(found[0], dtype=image.dtype, device=image.device)
        if not bool(result.isfinite().all()):
            raise GuidanceError(
                f"{self!r} gives NaN or infinite values for class {cls} of {type(model).__name__}. Choose "
                "another method."
            )
        return result

    def _module(self, trace: Trace, model: nn.Module) -> nn.Module:
        tap = Tap.parse(trace.feature.layer)
        if tap.call is not None or tap.path:
            raise GuidanceError(
                f"{self!r} cannot read layer {trace.feature.layer!r}. Name a module that runs once and gives "
                "one tensor."
            )
        return model.get_submodule(tap.module)

    def _class(self) -> Any:
        try:
            import pytorch_grad_cam
        except ImportError as error:
            raise InputError(
                f"cam:{self.method} needs pytorch-grad-cam: pip install 'attnguide[grad-cam]'."
            ) from error
        found = getattr(pytorch_grad_cam, self.method, None)
        if found is None:
            raise InputError(
                f"the installed pytorch-grad-cam has no {self.method}; upgrade it: pip install -U grad-cam."
            )
        return found

    def __repr__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"PytorchGradCAM({self.method!r}{options})"


def __getattr__(name: str) -> Callable[..., PytorchGradCAM]:
    """Return a method by its name, for the registry: `attnguide.sources.cam:ScoreCAM`."""
    if name in CAMS:
        return partial(PytorchGradCAM, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Logits(nn.Module):
    """A model that gives its logits alone, negated for evidence against a class."""

    def __init__(self, model: nn.Module, output: LogitsSpec, sign: float) -> None:
        super().__init__()
        self.model, self.output, self.sign = model, output, sign

    def forward(self, images: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not images.requires_grad:
            images = images.detach().requires_grad_()  # where the graph begins, since the weights are frozen
        return self.sign * find_logits(self.model(images), self.output)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Leave the gradients, which may be a training step's."""


def _ablation(layout: Layout) -> nn.Module:
    """Return what takes the place of a layer for AblationCAM: one channel of each copy is left out."""
    from pytorch_grad_cam.ablation_layer import AblationLayer, AblationLayerVit

    layer: nn.Module = AblationLayer() if layout.channels_first else AblationLayerVit()
    return layer


def _forget(cam: Any) -> None:
    """Let go of what was recorded: pytorch-grad-cam would detach it in place, which views refuse."""
    recorded = getattr(cam, "activations_and_grads", None)
    if recorded is not None:
        recorded.activations, recorded.gradients = [], []


@contextmanager
def _kept(model: nn.Module, *, frozen: bool) -> Iterator[None]:
    """Keep gradients from the weights' `.grad`, and put modules back that were exchanged."""
    modules = [(module, dict(module._modules)) for module in dict.fromkeys(modules_of(model))]
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    required = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(not frozen)
        yield
    finally:
        for weight, before in zip(weights, required, strict=True):
            weight.requires_grad_(before)
        for module, children in modules:
            if dict(module._modules) != children:
                module._modules.clear()
                module._modules.update(children)


@contextmanager
def _silent() -> Iterator[None]:
    """Show no progress bar for each image."""
    from pytorch_grad_cam import ablation_cam, score_cam

    bars = [(module, module.tqdm) for module in (ablation_cam, score_cam)]
    try:
        for module, _ in bars:
            module.tqdm = SimpleNamespace(tqdm=lambda items, *args, **options: items)
        yield
    finally:
        for module, bar in bars:
            module.tqdm = bar
