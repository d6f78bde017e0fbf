"""What methods of other libraries need, which run the model themselves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnguide.capture.logits import LogitsSpec, find_logits
from attnguide.capture.model_state import evaluating, modules_of, muted
from attnguide.errors import GuidanceError, InputError
from attnguide.interfaces import AttributionSource
from attnguide.trace import Trace

__all__ = ["Scores", "model_of", "prepared", "reproducible", "running"]

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def model_of(source: AttributionSource, trace: Trace) -> nn.Module:
    """Return the model of a trace, for a source that runs it again.

    Raises:
        GuidanceError: If adapters are on the model.
        InputError: If the trace does not know it.
    """
    if trace.adapters:
        raise GuidanceError(
            f"{source!r} runs the model again, without the adapters on it, such as "
            f"{type(trace.adapters[0]).__name__}. Choose another source, or fold the adapters in."
        )
    if trace.model is None:
        raise InputError(f"{source!r} needs the model, which this trace does not know.")
    return trace.model


@contextmanager
def running(model: nn.Module, images: Tensor, *, fused: bool = False) -> Iterator[None]:
    """Let another library run a model, which comes back as it was: modes and hooks.

    Args:
        model: The model.
        images: Images on its device.
        fused: Whether fused attention may run, which cannot be differentiated twice.
    """
    with ExitStack() as stack:
        contexts: tuple[AbstractContextManager[Any], ...] = (
            muted(),
            evaluating(model),
            prepared(model),
            reproducible(images.device),
            warnings.catch_warnings(),
            nullcontext() if fused else sdpa_kernel(SDPBackend.MATH),
        )
        for context in contexts:
            stack.enter_context(context)
        warnings.simplefilter("ignore")
        yield


class Scores(nn.Module):
    """A model that gives logits and negated logits, whose classes stand for evidence against a class.

    Args:
        model: Any classifier.
        output: Which part of its output is the logits.
        classes: Class of each image whose score alone is given; None for all.
    """

    def __init__(self, model: nn.Module, output: LogitsSpec = None, classes: Tensor | None = None) -> None:
        super().__init__()
        self.model, self.output, self.classes = model, output, classes
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        logits = find_logits(self.model(images), self.output)
        scores = torch.cat([logits, -logits], dim=1)
        return scores if self.classes is None else scores.gather(1, self.classes[:, None])[:, 0]


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Switch off in-place activations.

    Afterwards all is as it was; hooks and rules that captum leaves after an error are removed.
    """
    modules = list(dict.fromkeys(modules_of(model)))
    hooks = [(getattr(module, kind), set(getattr(module, kind))) for module in modules for kind in _KINDS]
    in_place = [module for module in modules if getattr(module, "inplace", False) is True]
    ruled = {module for module in modules if hasattr(module, "rule")}
    try:
        for module in in_place:
            module.inplace = False  # type: ignore[assignment]
        yield
    finally:
        for module in in_place:
            module.inplace = True  # type: ignore[assignment]
        for module in set(modules) - ruled:
            if hasattr(module, "rule"):
                del module.rule
        for now, before in hooks:
            for number in set(now) - before:
                del now[number]


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Draw the same numbers each time, and leave the global generators as they are."""
    state = np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            np.random.seed(0)
            yield
    finally:
        np.random.set_state(state)
