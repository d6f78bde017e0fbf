"""Fused attention is switched off where it must be differentiated twice, and given back."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["Attention"]


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
