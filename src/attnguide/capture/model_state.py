"""Modes in which a model runs for the library's own purposes, restored afterwards exactly."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

__all__ = [
    "empty_caches",
    "evaluating",
    "full_precision_mode",
    "is_muted",
    "modules_of",
    "muted",
    "uncached_autocast",
]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, uncompiled, and restore the flags of every module one by one.

    What modules keep for themselves between forward passes (timm's transformers keep attention biases that
    they have looked up) starts empty and is restored too: it was made from other weights, or with a graph.
    """
    flags = [(module, module.training, module._compiled_call_impl) for module in modules_of(model)]
    kept = [(cache, dict(cache)) for cache in _caches(model)]
    try:
        empty_caches(model)
        # Assigned, not model.eval() and model.train(): partly frozen models have their own idea of which
        # modules train.
        for module, training, compiled in flags:
            if training:
                module.training = False
            if compiled is not None:  # compiled code would be made anew, with hooks in it
                module._compiled_call_impl = None
        yield
    finally:
        for module, training, compiled in flags:
            if module.training != training:
                module.training = training
            if compiled is not None:
                module._compiled_call_impl = compiled
        empty_caches(model)
        for cache, content in kept:
            cache.update(content)


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """All modules, some perhaps twice; several times as fast as `model.modules()`."""
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None:
            yield module
            waiting.extend(module._modules.values())


def empty_caches(model: nn.Module) -> None:
    """Drop what modules keep between forward passes; when they train, it is out of date."""
    for cache in _caches(model):
        cache.clear()


#: Modules that keep something between forward passes, looked for once for each model.
_keepers: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()


def _caches(model: nn.Module) -> list[dict[Any, Any]]:
    if model not in _keepers:
        _keepers[model] = WeakSet(module for module in model.modules() if any(map(_is_cache, vars(module))))
    return [
        value
        for module in _keepers[model]
        for key, value in vars(module).items()
        if _is_cache(key)
        and isinstance(value, dict)
        and all(isinstance(each, Tensor) for each in value.values())
    ]


def _is_cache(name: str) -> bool:
    """Whether models of timm, and those made after them, keep tensors under this name."""
    return name.endswith("attention_bias_cache")


class _Muting(threading.local):
    """How many probes are running in this thread."""

    depth = 0


_muting = _Muting()


@contextmanager
def muted() -> Iterator[None]:
    """Run forward passes that no recorder takes notice of: probes of the library's own."""
    _muting.depth += 1
    try:
        yield
    finally:
        _muting.depth -= 1


def is_muted() -> bool:
    """Whether such a pass is running in this thread."""
    return _muting.depth > 0


@contextmanager
def full_precision_mode(device: torch.device) -> Iterator[None]:
    """Leave autocast, for what half precision would spoil; a device without autocast has nothing to leave."""
    if not torch.amp.is_autocast_available(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def uncached_autocast(device: torch.device) -> Iterator[None]:
    """Stay in autocast if the caller is in it, but keep none of the weights that it casts."""
    if not torch.amp.is_autocast_available(device.type):
        yield
        return
    kind = device.type
    with torch.autocast(
        kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
    ):
        yield
