"""Finds the modules that attend to all patches, and the tokens that the logits are computed from."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from attnguide.capture.attention_reader import Reading
from attnguide.capture.calls import Call
from attnguide.capture.model_state import evaluating, muted, state_of
from attnguide.capture.own_hooks import in_this_thread
from attnguide.capture.recorder import adapters_of
from attnguide.errors import LayerError
from attnguide.layers._probe import Subject
from attnguide.trace import Attending

__all__ = ["find_attention"]


#: What was found for a model, by the number of tokens and how it was called; with what the model was like.
_known: WeakKeyDictionary[nn.Module, dict[tuple[int, tuple[str, ...]], tuple[int, Attending]]]
_known = WeakKeyDictionary()


def find_attention(model: nn.Module, images: Tensor, tokens: int, *, call: Call | None = None) -> Attending:
    """Find the attention among all tokens; once for a model, a number of tokens, and how it is called.

    Args:
        model: Any classifier, unwrapped.
        images: Images that it accepts, `(B, C, H, W)`; one is run.
        tokens: Number of tokens of the layer that is looked at.
        call: How the model is called with the images, if not `model(images)`.

    Returns:
        The modules, and the tokens that the logits are computed from.

    Raises:
        LayerError: If there are none, as in networks of convolutions, or of windows; if a module attends
            several times; if activations are checkpointed; or if an adapter answers in place of the model.
    """
    if adapters_of(model):
        raise LayerError(
            "an adapter answers in place of the model, from its features: which tokens the answer is read "
            "from is not known. Choose a source of another kind, such as grad_cam."
        )
    model_state = state_of(model)
    if model_state.checkpointing:
        raise LayerError(
            f"{type(model).__name__} checkpoints activations: it computes attention anew in the backward "
            "pass, where it cannot be read. Switch that off, model.set_grad_checkpointing(False), or choose "
            "a source of another kind."
        )
    key, state = (tokens, () if call is None else call.signature), model_state.snapshot
    known = _known.setdefault(model, {}).get(key)
    if known is not None and known[0] == state:
        return known[1]
    running: list[str] = []
    found: dict[str, Tensor] = {}
    again: set[str] = set()

    def note(probabilities: Tensor) -> Tensor:
        if len(probabilities) != 1 or probabilities.shape[-1] != tokens:
            return probabilities
        again.update({running[-1]} & found.keys())
        found[running[-1]] = probabilities = probabilities.detach().requires_grad_()
        return probabilities

    subject = Subject.of(model, images, call)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(evaluating(subject.model))
        stack.enter_context(muted())
        for name, module in subject.model.named_modules():
            enter, leave = (
                in_this_thread(partial(_enter, running, name)),
                in_this_thread(partial(_leave, running)),
            )
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        with Reading(note):
            output = subject.run(images[:1].detach())
        if not found:
            raise LayerError(
                f"{type(model).__name__} has no attention among all of its {tokens} tokens, which attention "
                "sources read: it is a network of convolutions, or attends within windows or among channels. "
                "Choose a source of another kind, such as grad_cam."
            )
        if again:
            raise LayerError(
                f"{', '.join(sorted(again))} attends several times in one pass, which attention sources "
                "cannot follow. Choose a source of another kind, such as grad_cam."
            )
        last = list(found.values())[-1]
        logits = subject.find_logits(output)
        slopes = torch.linspace(1, 2, logits.numel(), device=logits.device).view_as(logits).to(logits)
        (gradient,) = torch.autograd.grad(logits, last, slopes)
    reading = gradient.abs().amax(dim=(0, 1, 3)) > 0
    attending = Attending(tuple(found), tuple(reading.nonzero()[:, 0].tolist()))
    _known[model][key] = state, attending
    return attending


def _enter(running: list[str], name: str, module: nn.Module, args: object) -> None:
    running.append(name)


def _leave(running: list[str], module: nn.Module, args: object, output: object) -> None:
    running.pop()
