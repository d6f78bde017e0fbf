"""Makes operations differentiable twice, which guiding needs of all that follows the layer looked at.

Fused attention is switched off there, and given back; activations without a second derivative get one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["Attention", "smooth"]


class _MathAttention:
    """Makes attention use its composite implementation, the only one with a second derivative.

    The switch is global to the process, so that it is counted: overlapping users in several threads share it,
    the last one restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._switch: AbstractContextManager[None] | None = None

    def acquire(self) -> None:
        with self._lock:
            if self._users == 0:
                self._switch = sdpa_kernel(SDPBackend.MATH)
                self._switch.__enter__()
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._switch is not None:
                self._switch.__exit__(None, None, None)
                self._switch = None


_math_attention = _MathAttention()


class Attention:
    """How attention runs for one forward pass: fused, or so that it can be differentiated twice."""

    def __init__(self) -> None:
        self.unfused = False
        self._backward = False

    def unfuse(self) -> None:
        """Keep attention from fusing."""
        if not self.unfused:
            _math_attention.acquire()
            self.unfused = True

    def fuse(self) -> None:
        """Give fused attention back."""
        self._backward = False
        if self.unfused:
            self.unfused = False
            _math_attention.release()

    # Activation checkpointing runs the model again in a backward pass. What comes after the layer has to run
    # as it did then, unfused, and what comes before it fused.

    def begin_backward(self, _gradient: Tensor) -> None:
        """Hook of the loss, where a backward pass begins."""
        self.unfuse()
        self._backward = True
        # In case the pass ends before it comes to the layer.
        torch.autograd.Variable._execution_engine.queue_callback(self.end_backward)

    def end_backward(self, _gradient: Tensor | None = None) -> None:
        """Hook of the layer's output."""
        if self._backward:
            self.fuse()


@contextmanager
def smooth(model: nn.Module) -> Iterator[None]:
    """Give every hard sigmoid of a model a second derivative; its values stay what they are."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Hardsigmoid):
                swap = _Swap()
                stack.callback(module.register_forward_pre_hook(swap.keep).remove)
                stack.callback(module.register_forward_hook(swap.replace).remove)
        yield


class _Swap(threading.local):
    """Replaces the output of a hard sigmoid by the same values, with all derivatives."""

    given: Tensor | None = None

    def keep(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Keep the input; the module, which may work in place, is given a copy."""
        self.given = args[0]
        return (args[0].detach().clone(),)

    def replace(self, module: nn.Module, args: object, output: Any) -> Any:
        """Compute the output anew."""
        given, self.given = self.given, None
        return output if given is None else _HardSigmoid.apply(given)

    def __reduce__(self) -> tuple[type[_Swap], tuple[()]]:
        """A copy of a guided model has hooks of its own."""
        return _Swap, ()


class _HardSigmoid(torch.autograd.Function):
    """The hard sigmoid, whose derivative is a constant on each of its pieces."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward((values > -3) & (values < 3))
        return F.hardsigmoid(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        inside: Tensor = ctx.saved_tensors[0]
        return gradient * inside / 6
