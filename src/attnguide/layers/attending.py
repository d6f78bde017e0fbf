"""Finds the attention among all patches of a transformer, and which tokens its answer is read from."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attnguide.attention import Reading
from attnguide.errors import LayerError
from attnguide.layers.probe import stand_ins
from attnguide.modes import evaluating, modules_of, muted
from attnguide.outputs import find_logits

__all__ = ["Attending", "find_attention"]


@dataclass(frozen=True)
class Attending:
    """How a model attends.

    Attributes:
        modules: Names of the modules that attend among all tokens, in the order in which they run.
        readers: The tokens that the answer is read from: the class token, or all patches.
    """

    modules: tuple[str, ...]
    readers: tuple[int, ...]


#: What was found for a model, with what the model was.
_known: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], Attending]] = WeakKeyDictionary()


def find_attention(model: nn.Module, images: Tensor, tokens: int) -> Attending:
    """Find the attention among all tokens; found once for a model and a number of tokens.

    Args:
        model: Any classifier, unwrapped.
        images: Images that it accepts, `(B, C, H, W)`; one is run.
        tokens: How many tokens there are at least: one for each position of the layer that is looked at.

    Returns:
        The modules, and the tokens that the answer is read from.

    Raises:
        LayerError: If there are none, as in networks of convolutions, or of windows.
    """
    state = (tokens, *map(id, modules_of(model)))
    known = _known.get(model)
    if known is not None and known[0] == state:
        return known[1]
    running: list[str] = []
    found: dict[str, Tensor] = {}

    def note(probabilities: Tensor) -> Tensor:
        if len(probabilities) != 1 or probabilities.shape[-1] < tokens:
            return probabilities
        found[running[-1]] = probabilities = probabilities.detach().requires_grad_()
        return probabilities

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(muted())
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(partial(_enter, running, name)).remove)
            stack.callback(module.register_forward_hook(partial(_leave, running)).remove)
        with Reading(note):
            output = functional_call(model, stand_ins(model), (images[:1].detach(),))
        if not found:
            raise LayerError(
                f"{type(model).__name__} has no attention among all of its {tokens} patches, which attention "
                "sources read: it is a network of convolutions, or attends within windows. Choose a source "
                "of another kind, such as grad_cam."
            )
        last = list(found.values())[-1]
        logits = find_logits(output)
        slopes = torch.linspace(1, 2, logits.numel(), device=logits.device).view_as(logits).to(logits)
        (gradient,) = torch.autograd.grad(logits, last, slopes)
    reading = gradient.abs().amax(dim=(0, 1, 3)) > 0
    attending = Attending(tuple(found), tuple(reading.nonzero()[:, 0].tolist()))
    _known[model] = state, attending
    return attending


def _enter(running: list[str], name: str, module: nn.Module, args: object) -> None:
    running.append(name)


def _leave(running: list[str], module: nn.Module, args: object, output: object) -> None:
    running.pop()
