"""Which models and images can be worked with: others are refused in one sentence, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.lazy import LazyModuleMixin

from attnguide.capture.model_state import modules_of, unwrap
from attnguide.errors import InputError

__all__ = ["check_images", "no_images", "suitable"]

#: Packages whose modules compute with integers, which have no gradient.
_QUANTIZED = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torch.ao.nn.sparse.quantized",
)


def suitable(model: nn.Module) -> nn.Module:
    """Return the model without wrappers for parallel training, if its layers can be looked at.

    Raises:
        InputError: If it is not a module, or it, or a module inside, was scripted, traced, exported or
            quantized, or has no weights yet.
    """
    inner = unwrap(model)
    for module in modules_of(inner):
        problem = _problem(module)
        if problem is not None:
            name = next(
                (name for name, each in _named(inner) if each is module and name), type(module).__name__
            )
            raise InputError(f"{'the model' if module is inner else f'module {name!r}'} {problem}")
    return inner


def _named(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Names of all modules; scripted modules list none themselves."""
    found = []
    for key, module in model._modules.items():
        if module is not None:
            name = f"{prefix}{key}"
            found += [(name, module), *_named(module, f"{name}.")]
    return found


def _problem(module: nn.Module) -> str | None:
    """Say why a module cannot be worked with; None if it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return (
            "was scripted or traced by torch.jit, which hides its layers and takes no hooks. Pass the model "
            "as it was before, with the same weights."
        )
    if isinstance(module, GraphModule) and _is_exported(module):
        return (
            "was exported by torch.export, which leaves one program without layers. Pass the model as it was "
            "before, with the same weights."
        )
    kind = type(module).__module__
    if kind.startswith("torch.export"):
        return (
            "was exported by torch.export, and its program is fixed to the shapes of that call. Pass the "
            "model as it was before, with the same weights."
        )
    if kind.startswith(_QUANTIZED) or any(_is_quantized(weight) for weight in module._parameters.values()):
        return (
            f"is quantized ({type(module).__name__}): integers have no gradient, so that nothing can be "
            "attributed or guided. Pass the model as it was before its quantization."
        )
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return (
            f"is lazy ({type(module).__name__}) and has no weights before the model's first forward pass. "
            "Run the model on one batch first."
        )
    return None


def _is_exported(module: GraphModule) -> bool:
    """Whether a graph consists of operations, as torch.export makes it, rather than of modules."""
    nodes = list(module.graph.nodes)
    operations = any(isinstance(node.target, torch._ops.OpOverload) for node in nodes)
    return operations and not any(
        node.op == "call_module" and "guard" not in str(node.target) for node in nodes
    )


def _is_quantized(weight: Tensor | None) -> bool:
    return weight is not None and (weight.is_quantized or type(weight).__module__.startswith("torchao."))


def check_images(images: Any) -> None:
    """Refuse what is not a batch of images.

    Args:
        images: What the model is to be given.

    Raises:
        InputError: If it is not a tensor `(B, C, H, W)` with at least one image.
    """
    if isinstance(images, Tensor) and images.ndim == 4 and len(images):
        return
    got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
    remedy = _remedy([images]) or "Add a batch axis: images[None]."
    raise InputError(f"images must be a tensor (B, C, H, W) with at least one image, got {got}. {remedy}")


def no_images(given: Sequence[Any]) -> InputError:
    """Make the error for a forward pass without images.

    Args:
        given: All arguments of the model's forward.

    Returns:
        The error, which names what was given.
    """
    got = ", ".join(type(value).__name__ for value in given) or "nothing"
    shapes = [str(tuple(value.shape)) for value in given if isinstance(value, Tensor)]
    got += f", of shape {', '.join(shapes)}" if shapes else ""
    return InputError(
        f"no image tensor (B, C, H, W) among the arguments of the model's forward; got {got}. "
        f"{_remedy(given)}".rstrip()
    )


def _remedy(given: Sequence[Any]) -> str:
    """Say what can be done about arguments that are not images."""
    tensors = [value for value in given if isinstance(value, Tensor)]
    if any(isinstance(value, Mapping) and "patches" in value for value in given):
        return (
            "Patches made beforehand have no rows and columns: pass the images themselves; models with "
            "native resolution (NaFlex) take them too."
        )
    if any(value.ndim == 5 for value in tensors):
        return "Five axes are those of videos or volumes, which are not supported: only images are."
    if any(isinstance(value, (Mapping, list, tuple)) for value in given):
        return (
            "Let the model's forward take the images as an argument of their own, perhaps through a wrapper."
        )
    if any(value.ndim == 2 or not value.is_floating_point() for value in tensors):
        return "Models of text, ids or tables have no image to look at."
    return ""
