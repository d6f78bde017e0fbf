"""Finds the layer to look at, and how its output is arranged.

A layer is named explicitly, or found: by the model's own metadata (timm's `feature_info`), else by a probe.
Either way the output that a forward really gave is checked: it must have rows and columns, and for an
automatic choice the logits' gradient must be spread over them. The last such output is the target: the
deepest place where "where" still has a meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attnguide.errors import LayerError, nearest
from attnguide.hooks import evaluating, find_logits, muted, unwrap
from attnguide.trace import Layout

__all__ = ["Candidate", "check_name", "choose", "find_layer", "layout_of", "list_candidates", "stand_ins"]

#: Numbers of tokens that models put before the patches: class token, distillation token, registers.
_PREFIXES = (0, 1, 2, 5, 3, 4, 8, 9)
#: Share of positions that must carry a gradient; global max pooling leaves few, a class token none.
_SPREAD = 0.1
#: Modules that hand on what they are given: their output says nothing about who made it.
_PASS_ON = (nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Identity, nn.Unflatten)
#: Modules whose output only resamples or projects what another layer found.
_PASSIVE = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.Linear, nn.MaxPool2d, nn.Upsample)


@dataclass(frozen=True)
class Candidate:
    """A layer whose output has rows and columns.

    Attributes:
        name: Name of the module; the outermost where several hand on the same output.
        names: All their names, from the one that made it outwards.
        type: Name of its class.
        shape: Shape of its output for the probe's images.
        layout: How the output is arranged.
        spread: Share of the positions that carry a gradient of the logits, 0 to 1.
        active: Whether the layer computes features of its own; pooling and projections inside attention
            don't.
        how: How the layer was found: `"feature_info"` or `"probe"`.
    """

    name: str
    names: tuple[str, ...]
    type: str
    shape: tuple[int, ...]
    layout: Layout
    spread: float
    active: bool
    how: str = "probe"

    @property
    def usable(self) -> bool:
        """Whether the automatic choice may take it."""
        return self.active and self.spread > _SPREAD

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[1] if self.layout.kind == "nchw" else self.shape[-1]


def layout_of(
    shape: tuple[int, ...], image_size: tuple[int, int], prefix: int | None = None
) -> Layout | None:
    """Tell rows, columns and channels of an output from its shape.

    Args:
        shape: Shape of the output: `(B, C, h, w)`, `(B, h, w, C)` or `(B, tokens, C)`.
        image_size: `(H, W)` of the images; the grid must have their proportions, to within one cell.
        prefix: Number of prefix tokens, if the model tells it; tried first.

    Returns:
        The layout, or None if the output has no rows and columns.
    """
    if len(shape) == 4:
        grids = {"nchw": (shape[2], shape[3]), "nhwc": (shape[1], shape[2])}
        fitting = [
            (_misfit(grid, image_size), kind) for kind, grid in grids.items() if _fits(grid, image_size)
        ]
        # On a tie the order of the dictionary decides: channels first is the convention.
        kind = min(fitting, key=lambda item: item[0])[1] if fitting else None
        return None if kind is None else Layout("nchw" if kind == "nchw" else "nhwc", grids[kind])
    if len(shape) == 3:
        prefixes = _PREFIXES if prefix is None else (prefix, *_PREFIXES)
        for count in prefixes:
            grid = _grid(shape[1] - count, image_size)
            if grid is not None:
                return Layout("tokens", grid, count)
    return None


def _misfit(grid: tuple[int, int], image_size: tuple[int, int]) -> float:
    """By how many rows a grid misses the proportions of the image."""
    return abs(grid[0] - grid[1] * image_size[0] / image_size[1])


def _fits(grid: tuple[int, int], image_size: tuple[int, int]) -> bool:
    inside = grid[0] <= image_size[0] and grid[1] <= image_size[1]
    return inside and grid[0] * grid[1] >= 4 and _misfit(grid, image_size) < 1


def _grid(tokens: int, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of so many patches, or None."""
    if tokens < 4:
        return None
    guess = isqrt(round(tokens * image_size[1] / image_size[0]))
    for width in (guess, guess + 1):
        if width and tokens % width == 0 and _fits((tokens // width, width), image_size):
            return tokens // width, width
    return None


def check_name(model: nn.Module, layer: str) -> str:
    """Return the name of a layer as the unwrapped model knows it.

    Raises:
        LayerError: If there is no such module; the nearest is offered.
    """
    names = [name for name, _ in unwrap(model).named_modules() if name]
    name = layer.removeprefix("module.")
    if name in names:
        return name
    raise LayerError(f"the model has no layer {layer!r}.{nearest(name, names)}")


def list_candidates(model: nn.Module, images: Tensor) -> list[Candidate]:
    """Run a probe and list every layer whose output has rows and columns.

    Costs one forward and one backward pass of at most two images. Training flags, buffers and gradients of
    the model are left as they were.

    Args:
        model: Any classifier.
        images: Images that it accepts, `(B, C, H, W)`; the first two are used.

    Returns:
        Candidates in the order in which they ran.
    """
    model = unwrap(model)
    image_size = (images.shape[-2], images.shape[-1])
    prefix = getattr(model, "num_prefix_tokens", None)
    outputs: dict[
        int, tuple[Tensor, list[str]]
    ] = {}  # by identity of the output, in order of its last appearance

    def record(name: str, output: object) -> None:
        if (
            isinstance(output, Tensor)
            and output.is_floating_point()
            and layout_of(output.shape, image_size, prefix)
        ):
            _, names = outputs.pop(id(output), (output, []))
            outputs[id(output)] = (output, [*names, name])

    # The probe may be called from a validation loop that records no graph.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluating(model),
        muted(),
        _watching(model, record),
    ):
        probe = images[:2].detach().clone()
        # A frozen model has a graph only if it begins at the images.
        probe.requires_grad_(probe.is_floating_point())
        logits = find_logits(functional_call(model, stand_ins(model), (probe,))).float()
        # Unequal weights: probabilities, which sum to one, would have no gradient otherwise.
        score = (logits * torch.linspace(1, 2, logits.shape[1], device=logits.device)).sum()
        found = list(outputs.values())
        gradients = (
            torch.autograd.grad(score, [output for output, _ in found], allow_unused=True)
            if found and score.requires_grad and all(output.requires_grad for output, _ in found)
            else [None] * len(found)
        )
    modules = dict(model.named_modules())
    candidates = []
    for (output, names), gradient in zip(found, gradients, strict=True):
        layout = layout_of(output.shape, image_size, prefix)
        assert layout is not None  # noqa: S101  (recorded only with a layout)
        active = not isinstance(modules[names[0]], _PASSIVE) and not _inside_attention(names[0], modules)
        spread = 0.0 if gradient is None else _spread(layout.spatial(gradient))
        name = names[-1]
        candidates.append(
            Candidate(
                name, tuple(names), type(modules[name]).__name__, tuple(output.shape), layout, spread, active
            )
        )
    return candidates


def stand_ins(model: nn.Module) -> dict[str, Tensor]:
    """Stand-ins for all-zero weights, as in some models' fresh heads: no gradient would pass them."""
    return {
        name: torch.linspace(-1, 1, weight.numel(), device=weight.device).view_as(weight).to(weight.dtype)
        for name, weight in model.named_parameters()
        if weight.ndim >= 2 and not bool(weight.any())
    }


def _pass_to(
    record: Callable[[str, object], None], name: str, module: nn.Module, args: object, output: object
) -> None:
    record(name, output)


@contextmanager
def _watching(model: nn.Module, record: Callable[[str, object], None]) -> Iterator[None]:
    """Call `record(name, output)` after every module's forward."""
    handles = []
    try:
        for name, module in model.named_modules():
            if name and not isinstance(module, _PASS_ON):
                handles.append(module.register_forward_hook(partial(_pass_to, record, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _spread(gradient: Tensor) -> float:
    """Share of the positions of `(B, C, h, w)` at which any channel has a gradient."""
    size = gradient.float().abs().amax(dim=1)
    return float((size > 1e-6 * size.amax()).float().mean()) if bool(size.amax() > 0) else 0.0


def _inside_attention(name: str, modules: dict[str, nn.Module]) -> bool:
    steps = name.split(".")
    ancestors = (modules[".".join(steps[:depth])] for depth in range(1, len(steps)))
    return any("attention" in type(ancestor).__name__.lower() for ancestor in ancestors)


def choose(model: nn.Module, candidates: list[Candidate]) -> Candidate:
    """Choose the layer: the last that the model's metadata names, if it passes, else the last that passes.

    Raises:
        LayerError: If none passes; the candidates are listed.
    """
    usable = [candidate for candidate in candidates if candidate.usable]
    if not usable:
        listed = "\n".join(f"  {c.name}: {c.layout}, gradient over {c.spread:.0%}" for c in candidates[-12:])
        raise LayerError(
            f"no layer of {type(unwrap(model)).__name__} has rows and columns and a gradient spread over "
            "them, so that there is nothing to look at. Name one with layer='…', or use a larger image or "
            "a model with a "
            "classifier head." + (f" Layers with rows and columns:\n{listed}" if listed else "")
        )
    named = _last_of_metadata(model)
    for candidate in usable:
        if named in candidate.names:
            return replace(candidate, name=named, how="feature_info")
    return usable[-1]


def _last_of_metadata(model: nn.Module) -> str | None:
    """Name of the last feature module in timm's metadata, or None."""
    info = getattr(unwrap(model), "feature_info", None)
    info = getattr(info, "info", info)
    last = info[-1] if isinstance(info, list) and info else None
    module = last.get("module") if isinstance(last, dict) else None
    return module if isinstance(module, str) else None


_found: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], str]] = WeakKeyDictionary()


def find_layer(model: nn.Module, images: Tensor, layer: str = "auto") -> str:
    """Return the name of the layer to look at.

    An automatic choice is made once for a model and a shape of images, and remembered as long as the model
    lives.

    Args:
        model: Any classifier.
        images: Images that it accepts, `(B, C, H, W)`.
        layer: A module's name, or `"auto"`.

    Returns:
        A name in `model.named_modules()`.

    Raises:
        LayerError: If the name is unknown, or no layer passes.
    """
    if layer != "auto":
        return check_name(model, layer)
    model = unwrap(model)
    known = _found.setdefault(model, {})
    key = tuple(images.shape[1:])
    if key not in known or known[key] not in dict(model.named_modules()):
        known[key] = choose(model, list_candidates(model, images)).name
    return known[key]
