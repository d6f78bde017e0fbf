"""Layer-wise relevance propagation by zennit, as `zennit:NAME`; the extra `attnguide[zennit]`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnguide.capture.calls import INPUT, images_name
from attnguide.errors import GuidanceError, InputError, nearest
from attnguide.interfaces import AttributionSource
from attnguide.pairs import Pairs
from attnguide.parts.standard import ZENNIT
from attnguide.sources._running import Scores, model_of, running
from attnguide.trace import Trace

__all__ = ["Zennit"]

#: Modules with weights that the rules know; what holds others is refused.
_KNOWN = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
)
#: Composites that have no rule for weights, and so hold for any model.
_ANY = ("BetaSmooth", "DeconvNet", "GuidedBackprop")


class Zennit(AttributionSource):
    """Relevance of each pixel by a composite of zennit, summed over the channels.

    The rules are for convolutions, linear layers and batch normalization; a model with weights in other
    modules, such as layer normalization, is refused.

    Args:
        composite: Name of a class of `zennit.composites`, such as `"EpsilonPlusFlat"`.
        **options: Arguments of the composite, such as `epsilon`.

    Raises:
        InputError: If there is no such composite, or zennit is not installed.
    """

    needs_gradient = False
    differentiable = False
    layer = INPUT

    def __init__(self, composite: str, **options: Any) -> None:
        if composite not in ZENNIT:
            raise InputError(f"zennit has no composite {composite!r}.{nearest(composite, ZENNIT)}")
        self.composite, self.options = composite, options
        self._class()

    def __call__(self, trace: Trace, pairs: Pairs) -> Tensor:
        """Compute the maps `(N, H, W)`, signed.

        Raises:
            InputError: If a layer was named: relevance is that of the pixels.
            GuidanceError: If zennit has no rules for this model.
        """
        model = model_of(self, trace)
        if trace.feature.layer != images_name(model):
            raise InputError(
                f"{self!r} looks at the images, not at layer {trace.feature.layer!r}: leave it out."
            )
        if self.composite not in _ANY:
            self._check(model)
        maps = trace.images.new_zeros(pairs.slots, len(trace.images), *self.size(trace))
        with running(model, trace.images), torch.enable_grad():
            for slot in range(pairs.slots):
                part = pairs.select((pairs.slot == slot).nonzero()[:, 0])
                maps[slot, part.sample] = self._relevance(trace, model, part)
        return maps[pairs.slot, pairs.sample]

    def size(self, trace: Trace) -> tuple[int, int]:
        """Size of the images."""
        return trace.image_size

    def _relevance(self, trace: Trace, model: nn.Module, pairs: Pairs) -> Tensor:
        images = pairs.pick(trace.images).detach().clone().requires_grad_()
        options = dict(self.options)
        if self.composite == "EpsilonGammaBox":  # the box that the pixels lie in
            low, high = images.detach().amin(dim=(0, 2, 3)), images.detach().amax(dim=(0, 2, 3))
            options = {
                "low": low[:, None, None].expand_as(images),
                "high": high[:, None, None].expand_as(images),
                **options,
            }
        scores = Scores(model, trace.output)
        classes = pairs.cls + trace.logits.shape[1] * (pairs.sign < 0)
        try:
            composite = self._class()(canonizers=[_canonizer(model)], **options)
            with composite.context(scores) as changed:
                output = changed(images)
                chosen = torch.zeros_like(output).scatter(1, classes[:, None], 1.0)
                # The relevance to begin with is the logit itself.
                (relevance,) = torch.autograd.grad(output, images, chosen * output.detach())
        # zennit and the model may raise anything.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise GuidanceError(
                f"{self!r} cannot explain {type(model).__name__}: {type(error).__name__}: {reason}."
            ) from error
        result: Tensor = relevance.sum(dim=1)
        return result

    def _check(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if not isinstance(module, _KNOWN) and any(True for _ in module.parameters(recurse=False)):
                raise GuidanceError(
                    f"{self!r} has no rule for {name or 'the model'} ({type(module).__name__}): zennit knows "
                    "convolutions, linear layers and batch normalization. Choose another source."
                )

    def _class(self) -> Any:
        try:
            from zennit import composites
        except ImportError as error:
            raise InputError(
                f"zennit:{self.composite} needs zennit: pip install 'attnguide[zennit]'."
            ) from error
        return getattr(composites, self.composite)

    def __repr__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"Zennit({self.composite!r}{options})"


def _canonizer(model: nn.Module) -> Any:
    """Return what brings a model into a form that the rules are for: batch normalization is merged."""
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.torchvision import ResNetCanonizer

    return (
        ResNetCanonizer()
        if type(model).__module__ == "torchvision.models.resnet"
        else SequentialMergeBatchNorm()
    )


def __getattr__(name: str) -> Callable[..., Zennit]:
    """Return a composite by its name, for the registry: `attnguide.sources.zennit:EpsilonPlus`."""
    if name in ZENNIT:
        return partial(Zennit, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
