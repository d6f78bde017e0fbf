"""Finds the modules of a model that an adapter changes: those after a layer, and the first convolution."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnguide.capture.calls import Tap
from attnguide.capture.model_state import evaluating, muted
from attnguide.errors import LayerError
from attnguide.layers import find_layers
from attnguide.trace import Layer

__all__ = ["Gate", "find_gate", "first_convolution"]

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
)  # fmt: skip
_POOLINGS = (nn.MaxPool2d, nn.AvgPool2d)
#: SSG gates the stage whose grid is nearest to this share of the image's, by default.
_SCALE = 1 / 8


@dataclass(frozen=True)
class Gate:
    """The place of SSG in a model.

    Attributes:
        after: Name of the layer that is gated.
        channels: Number of its channels.
        through: Names of the activations and the pooling that its output passes.
        instead_of: Name of the module whose output is replaced.
    """

    after: str
    channels: int
    through: tuple[str, ...]
    instead_of: str


@dataclass(frozen=True)
class _Step:
    """A run of a module without children: the address and version of its input and of its output."""

    name: str
    module: nn.Module
    input: tuple[int, int]
    output: tuple[int, int]


def find_gate(model: nn.Module, images: Tensor, layer: str | None = None) -> Gate:
    """Find the convolution behind a layer's output, and the pooling that follows.

    The search goes back from the layer over activation and normalisation, and then forward over them to the
    pooling, as long as the input of each module is exactly the output of the one before.

    Args:
        model: The model.
        images: Some images, `(B, 3, H, W)`.
        layer: A layer, as in `find_layers`; by default the stage at about an eighth of the image's size.

    Returns:
        The place of the gate.

    Raises:
        LayerError: If the layer is unknown, or its output has no rows and columns behind the channels.
    """
    chosen = _default(model, images) if layer is None else find_layers(model, images, layer)[0]
    name, module = chosen.name, Tap.parse(chosen.name).module
    steps, outputs, calls = _run(model, images)
    if chosen.layout.kind != "nchw" or chosen.layout.order is not None:
        raise LayerError(
            f"layer {name!r} is arranged as {chosen.layout}; SSG gates rows and columns behind the channels. "
            "Choose another layer, or SSP."
        )
    if calls[module] > 1:
        raise LayerError(
            f"module {module!r} runs {calls[module]} times in a forward pass, and SSG cannot tell the calls "
            "apart. Name the block that holds it."
        )
    gives = {step.output: step for step in steps}
    takes = {step.input: step for step in reversed(steps)}
    if module not in outputs:
        raise LayerError(
            f"layer {name!r} gives no tensor (B, C, h, w), which SSG gates. Choose another one, or SSP."
        )
    after, state, shape = module, *outputs[module]
    # Back to the convolution, if its output is only normalised and activated.
    while (step := gives.get(state)) is not None and isinstance(step.module, (*_NORMS, *_ACTIVATIONS)):
        before = gives.get(step.input)
        if before is None:
            break
        state, after = step.input, before.name
    shape = outputs[after][1]
    through, instead_of = [], after
    while (step := takes.get(state)) is not None and isinstance(
        step.module, (*_NORMS, *_ACTIVATIONS, *_POOLINGS)
    ):
        # The adapter has its own normalisation.
        if not isinstance(step.module, _NORMS):
            through.append(step.name)
        state, instead_of = step.output, step.name
        if isinstance(step.module, _POOLINGS):
            break
    return Gate(after, shape[1], tuple(through), instead_of)


def _default(model: nn.Module, images: Tensor) -> Layer:
    """Find the stage at about an eighth of the image's size, or the block around it if it runs again."""
    calls = _run(model, images)[2]
    best: tuple[float, Layer] | None = None
    for stage in range(16):
        try:
            candidate = find_layers(model, images, f"stage:{stage}")[0]
        except LayerError:
            break
        share = candidate.layout.grid[0] / images.shape[-2]
        misfit = max(share / _SCALE, _SCALE / share)
        if best is None or misfit < best[0] - 1e-6:
            best = (misfit, candidate)
    chosen = best[1] if best is not None else find_layers(model, images)[0]
    name = Tap.parse(chosen.name).module
    while calls[name] > 1 and "." in name:
        name = name.rpartition(".")[0]
    return chosen if calls[name] > 1 or name == chosen.name else find_layers(model, images, name)[0]


def first_convolution(model: nn.Module, images: Tensor) -> tuple[str, nn.Conv2d]:
    """Find the convolution whose input are the images.

    Raises:
        LayerError: If the model does not begin with a convolution.
    """
    for step in _run(model, images)[0]:
        if isinstance(step.module, nn.Conv2d):
            module = step.module
            plain = type(module).forward is nn.Conv2d.forward and module.padding_mode == "zeros"
            if module.in_channels == images.shape[1] and plain and module.groups == 1:
                return step.name, module
            break
    raise LayerError(
        "the model does not begin with a plain convolution of the images, to which masks could be added."
    )


def _run(
    model: nn.Module, images: Tensor
) -> tuple[list[_Step], dict[str, tuple[tuple[int, int], tuple[int, ...]]], Counter[str]]:
    """Run the model; note inputs and outputs of modules without children, outputs of all, and their calls."""
    steps: list[_Step] = []
    calls: Counter[str] = Counter()
    outputs: dict[str, tuple[tuple[int, int], tuple[int, ...]]] = {}
    alive: list[Tensor] = []  # an address is only unique while its tensor lives
    entered: dict[str, tuple[int, int]] = {}
    handles = []

    def state(tensor: Tensor) -> tuple[int, int]:
        alive.append(tensor)
        return id(tensor), tensor._version

    def enter(name: str, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            entered[name] = state(args[0])

    def leave(name: str, module: nn.Module, output: object) -> None:
        calls[name] += 1
        if not isinstance(output, Tensor):
            return
        if output.ndim == 4:
            outputs[name] = state(output), tuple(output.shape)
        # A module that returns its input (an identity) is ignored.
        if name in entered and not any(True for _ in module.children()) and state(output) != entered[name]:
            steps.append(_Step(name, module, entered[name], state(output)))

    try:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(lambda _, args, name=name: enter(name, args)))
                handles.append(
                    module.register_forward_hook(
                        lambda module, _, output, name=name: leave(name, module, output)
                    )
                )
        with torch.inference_mode(False), torch.no_grad(), evaluating(model), muted():
            model(images[:2].clone())
    finally:
        for handle in handles:
            handle.remove()
    # A module that runs several times is not a step of a chain.
    return [step for step in steps if calls[step.name] == 1], outputs, calls
