"""Compiles the part of a model that comes before the layers looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnguide.capture.calls import Tap, images_name
from attnguide.capture.model_state import evaluating, muted
from attnguide.capture.own_hooks import in_this_thread
from attnguide.errors import GuidanceError
from attnguide.trace import Layer

__all__ = ["check_uncompiled", "compile_before"]


def check_uncompiled(model: nn.Module, layers: Sequence[Layer] = ()) -> None:
    """Refuse to guide what was compiled in place, as by `model.compile()`, with a layer inside.

    Raises:
        GuidanceError: If the model, or a module that holds one of the layers, was compiled.
    """
    inside = [layer.name for layer in layers if layer.name != images_name(model)]
    steps = [Tap.parse(name).module.split(".") for name in inside]
    names = ["", *(".".join(path[: end + 1]) for path in steps for end in range(len(path)))]
    for name in names:
        if model.get_submodule(name)._compiled_call_impl is not None:
            raise GuidanceError(
                f"{f'module {name!r}' if name else 'the model'} was compiled in place, which hides its "
                "inside from hooks. Guide it before it is compiled, and call guide.compile(images), which "
                "compiles all that comes before the layer."
            )


def compile_before(
    model: nn.Module, layers: Sequence[Layer], images: Tensor, options: Mapping[str, Any]
) -> list[str]:
    """Compile every module that is done before the first of the layers begins, in place.

    Args:
        model: The unwrapped model.
        layers: The layers looked at.
        images: `(B, C, H, W)`; the first is run, to see in which order modules run.
        options: Options of `torch.compile`.

    Returns:
        Names of the modules, the largest that come before the layers.

    Raises:
        GuidanceError: If there are none.
    """
    at_images = any(layer.name == images_name(model) for layer in layers)
    targets = set() if at_images else {Tap.parse(layer.name).module for layer in layers}
    done = {} if at_images else _done_before(model, targets, images)
    # The largest that are done; a module that holds a target is never among them.
    names = [name for name in done if not any(name.startswith(f"{other}.") for other in done)]
    modules = {name: model.get_submodule(name) for name in names}
    names = [name for name, module in modules.items() if any(True for _ in module.parameters())]
    if not names:
        named = " and ".join(layer.name for layer in layers)
        raise GuidanceError(
            f"no module of {type(model).__name__} runs before {named}, so that there is nothing to compile. "
            "Guide a later layer, or train without compiling."
        )
    for name in names:
        modules[name].compile(**options)
    return names


def _done_before(model: nn.Module, targets: set[str], images: Tensor) -> dict[str, None]:
    """Names of the modules that have run once and for all when the first target is reached."""
    done: dict[str, None] = {}
    late: set[str] = set()
    reached: list[str] = []

    def note(name: str, module: nn.Module, args: object, output: object) -> None:
        if name in targets:
            reached.append(name)
        if reached:
            late.add(name)
        else:
            done[name] = None

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(muted())
        for name, module in model.named_modules():
            if name:
                stack.callback(module.register_forward_hook(in_this_thread(partial(note, name))).remove)
        model(images[:1].detach())
    return {
        name: None
        for name in done
        # A module that runs again later would take its compiled code there.
        if name not in late and not any(target.startswith(f"{name}.") for target in targets)
    }
