"""Makes operations differentiable twice, which guiding needs of all that follows the layer looked at.

Fused attention is switched off there, and given back; activations without a second derivative get one.
"""

from __future__ import annotations

import math
import threading
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

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


def smooth(model: nn.Module) -> dict[str, list[RemovableHandle]]:
    """Give a model's hard sigmoids a second derivative, and its GELUs a cheaper one; their values stay.

    Returns:
        The hooks that see to it, by the names of the modules.
    """
    hooks = {}
    for name, module in model.named_modules():
        twin = _twin(module)
        if twin is not None:
            swap = _Swap(twin)
            hooks[name] = [
                module.register_forward_pre_hook(swap.keep),
                module.register_forward_hook(swap.replace, prepend=True),
            ]
    return hooks


def _twin(module: nn.Module) -> type[torch.autograd.Function] | None:
    if type(module) is nn.Hardsigmoid:
        return _HardSigmoid
    if type(module) is nn.GELU and module.approximate == "none":
        return _Gelu
    return None


class _Swap(threading.local):
    """Gives the output of an activation the derivatives of a twin."""

    def __init__(self, twin: type[torch.autograd.Function]) -> None:
        self.twin = twin
        self.given: Tensor | None = None

    def keep(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Keep the input; a module that works in place is given a copy."""
        self.given = args[0]
        return (args[0].detach().clone() if getattr(module, "inplace", False) else args[0].detach(),)

    def replace(self, module: nn.Module, args: object, output: Any) -> Any:
        """Give the output the derivatives of the twin."""
        given, self.given = self.given, None
        return output if given is None else self.twin.apply(given, output)

    def __reduce__(self) -> tuple[type[_Swap], tuple[type[torch.autograd.Function]]]:
        """A copy of a guided model has hooks of its own."""
        return _Swap, (self.twin,)


class _HardSigmoid(torch.autograd.Function):
    """The hard sigmoid, whose derivative is a constant on each of its pieces."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward((values > -3) & (values < 3))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        inside: Tensor = ctx.saved_tensors[0]
        return gradient * inside / 6, None


class _Gelu(torch.autograd.Function):
    """The GELU x·Φ(x). PyTorch's own second derivative goes through fourteen large temporary tensors."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, None]:
        (values,) = ctx.saved_tensors
        return _GeluGradient.apply(gradient, values), None


class _GeluGradient(torch.autograd.Function):
    """The derivative Φ(x) + x·φ(x) times a gradient; its own derivative is φ(x)·(2 − x²)."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(gradient, values)
        result: Tensor = torch.ops.aten.gelu_backward(gradient, values)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor]:
        gradient, values = ctx.saved_tensors
        square = values.square()
        density = square.mul(-0.5).exp_()
        slope = square.neg_().add_(2).mul_(density).mul_(1 / math.sqrt(2 * math.pi))
        return torch.ops.aten.gelu_backward(outer, values), slope.mul_(gradient).mul_(outer)
