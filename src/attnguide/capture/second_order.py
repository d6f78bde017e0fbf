"""Makes operations differentiable twice, which guiding needs of everything after the guided layer.

Fused attention is switched off there, and on again; activations without a second derivative get one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.backends import cuda

from attnguide.capture.derivatives import differentiate_gelu, differentiate_silu
from attnguide.capture.own_hooks import Handles, is_observed

__all__ = ["Fusion", "SecondOrder", "smooth"]

#: Implementations of attention, as the switches of `torch.backends.cuda` name them; they hold for CPUs too.
_KERNELS = ("flash", "mem_efficient", "cudnn", "math")


class _MathAttention:
    """Makes attention use its composite implementation, the only one with a second derivative.

    The switches are global to the process, so that users are counted: overlapping ones in several threads
    share them, and the last one restores what was set. (`torch.nn.attention.sdpa_kernel` has to be left in
    the thread and context in which it was entered; a backward pass may end in another.)
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._kept: dict[str, bool] = {}

    def acquire(self) -> None:
        with self._lock:
            if self._users == 0:
                self._kept = {name: getattr(cuda, f"{name}_sdp_enabled")() for name in _KERNELS}
                for name in _KERNELS:
                    getattr(cuda, f"enable_{name}_sdp")(name == "math")
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for name, enabled in self._kept.items():
                    getattr(cuda, f"enable_{name}_sdp")(enabled)


_math_attention = _MathAttention()


class Fusion:
    """Whether attention is fused in one forward pass and the backward passes through it.

    Attributes:
        held: Set while gradients are computed, whatever passes begin and end meanwhile.
    """

    def __init__(self) -> None:
        self.unfused = False
        self.held = False
        self._backward = False

    def unfuse(self) -> None:
        """Keep attention from fusing."""
        if not self.unfused:
            _math_attention.acquire()
            self.unfused = True

    def fuse(self) -> None:
        """Let attention fuse again."""
        self._backward = False
        if self.unfused:
            self.unfused = False
            _math_attention.release()

    # Activation checkpointing runs the model again in a backward pass. What comes after the layer has to run
    # as it did then, unfused, and what comes before it fused.

    def begin_backward(self, _gradient: Tensor) -> None:
        """Switch to composite attention; called at the loss and the logits, where a backward pass begins."""
        if self.held or self._backward:
            return
        self.unfuse()
        self._backward = True
        # In case the pass ends before it comes to the layer.
        torch.autograd.Variable._execution_engine.queue_callback(self.end_backward)

    def end_backward(self, _gradient: Tensor | None = None) -> None:
        """Switch back: called when the backward pass has reached the layer's output."""
        if self._backward and not self.held:
            self.fuse()


class SecondOrder:
    """Rider of a recorder: makes everything after the recorded layers differentiable twice.

    Args:
        model: The model, without a wrapper.
    """

    def __init__(self, model: nn.Module) -> None:
        self._smoothed = smooth(model)

    @property
    def hook_ids(self) -> set[int]:
        """Ids of its hooks."""
        return {number for handles in self._smoothed.values() for number in handles.ids}

    def reached(self, fusion: Fusion, feature: Tensor) -> None:
        """Keep attention from fusing after a recorded layer with a graph."""
        if not fusion.unfused and feature.requires_grad:
            fusion.unfuse()
            feature.register_hook(fusion.end_backward)  # type: ignore[no-untyped-call]

    @contextmanager
    def held(self, fusions: Sequence[Fusion]) -> Iterator[None]:
        """Keep attention from fusing while gradients of a pass are computed."""
        _math_attention.acquire()
        for fusion in fusions:
            fusion.held = True
        try:
            yield
        finally:
            for fusion in fusions:
                fusion.held = False
            _math_attention.release()

    def follow(self, tensor: Tensor, fusions: Sequence[Fusion]) -> None:
        """Keep attention from fusing in the backward passes that begin at a tensor."""
        if tensor.requires_grad:
            for fusion in fusions:
                tensor.register_hook(fusion.begin_backward)  # type: ignore[no-untyped-call]

    def leave_alone(self, modules: Sequence[str]) -> None:
        """Remove the hooks from activations inside modules that come before the layers."""
        for name, handles in self._smoothed.items():
            if any(name == outer or name.startswith(f"{outer}.") for outer in modules):
                handles.remove()

    def remove(self) -> None:
        """Remove all hooks."""
        for handles in self._smoothed.values():
            handles.remove()


def smooth(model: nn.Module) -> dict[str, Handles]:
    """Give hard sigmoids of a model a second derivative, GELUs and SiLUs a cheaper one; their values stay.

    An activation with hooks of others is left as it is, since these would see the difference.

    Returns:
        The hooks, by the names of the modules.
    """
    hooks: dict[str, Handles] = {}
    for name, module in model.named_modules():
        twin = _twin(module)
        if twin is not None:
            swap, own = _Swap(twin), Handles()
            own.keep(module.register_forward_pre_hook(swap.keep))
            own.keep(module.register_forward_hook(swap.replace, prepend=True))
            hooks[name] = own
    return hooks


def _twin(module: nn.Module) -> type[torch.autograd.Function] | None:
    if type(module) is nn.Hardsigmoid:
        return _HardSigmoid
    if type(module) is nn.GELU and module.approximate == "none":
        return _Gelu
    if type(module) is nn.SiLU:
        return _Silu
    return None


class _Swap(threading.local):
    """Gives the output of an activation the derivatives of another implementation of it, the twin."""

    def __init__(self, twin: type[torch.autograd.Function]) -> None:
        self.twin = twin
        self.given: Tensor | None = None

    def keep(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        """Keep the input; a module that works in place is given a copy."""
        self.given = None
        if (
            len(args) != 1
            or not isinstance(args[0], Tensor)
            or not torch.is_grad_enabled()
            or is_observed([module])
            # These of vectors cost nothing; and where they lie behind a pooling, gradients are batched, in
            # which a function of ours has no second derivative.
            or (
                self.twin in (_Gelu, _Silu)
                and args[0].numel() == len(args[0]) * max(args[0].shape[1:], default=1)
            )
        ):
            return None
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

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, output: Tensor) -> Tensor:
        return output.detach()  # not a view: what follows may work in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward((inputs[0] > -3) & (inputs[0] < 3))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        inside: Tensor = ctx.saved_tensors[0]
        return gradient * inside / 6, None


class _Swapped(torch.autograd.Function):
    """An activation whose output is known already, with a derivative of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, output: Tensor) -> Tensor:
        return output.detach()  # not a view: what follows may work in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])


class _Gelu(_Swapped):
    """The GELU x·Φ(x). PyTorch's own second derivative goes through fourteen large temporary tensors."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, None]:
        (values,) = ctx.saved_tensors
        return _GeluGradient.apply(gradient, values), None


class _GeluGradient(torch.autograd.Function):
    """The derivative Φ(x) + x·φ(x) times a gradient; its own derivative is φ(x)·(2 − x²)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, values: Tensor) -> Tensor:
        result: Tensor = torch.ops.aten.gelu_backward(gradient, values)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor]:
        return differentiate_gelu(outer, *ctx.saved_tensors)


class _Silu(_Swapped):
    """The SiLU x·σ(x). PyTorch's own first derivative makes large temporary tensors if it gets a graph."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, None]:
        (values,) = ctx.saved_tensors
        return _SiluGradient.apply(gradient, values), None


class _SiluGradient(torch.autograd.Function):
    """The derivative of the SiLU times a gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, values: Tensor) -> Tensor:
        result: Tensor = torch.ops.aten.silu_backward(gradient, values)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor]:
        return differentiate_silu(outer, *ctx.saved_tensors)
