"""The state of a model: its mode in the library's own passes, and whether it has changed."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from attnguide.capture.own_hooks import is_observed
from attnguide.errors import InputError

__all__ = [
    "ModelState",
    "empty_caches",
    "evaluating",
    "modules_of",
    "muted",
    "muting",
    "state_of",
    "uncached_autocast",
    "unwrap",
    "weights_digest",
]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside `DataParallel` or `DistributedDataParallel` wrappers.

    Raises:
        InputError: If it is not a module, or was compiled as a whole.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the model must be a torch.nn.Module, got {type(model).__name__}.")
    if hasattr(model, "_orig_mod"):
        raise InputError(
            "a model that was compiled as a whole hides its features from hooks. Pass the model as it was "
            "before torch.compile; guide.compile(images) then compiles all that comes before the layer."
        )
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model


def modules_of(model: nn.Module) -> list[nn.Module]:
    """List all modules, some perhaps twice; several times as fast as `model.modules()`."""
    modules: list[nn.Module] = []
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is not None:
            modules.append(module)
            stack.extend(module._modules.values())
    return modules


def weights_digest(model: nn.Module) -> str:
    """Return a digest of a model's weights and buffers, by which processes know the same model."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            plain = value.detach().cpu().contiguous().flatten()
            digest.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
    return digest.hexdigest()[:32]


class ModelState(NamedTuple):
    """What can be seen of a model without running it, in one walk over its modules.

    Attributes:
        modules: All modules.
        snapshot: A number that changes when modules are replaced or compiled, or when plain settings of the
            outer modules change. Numbers among the settings do not count: a model may count its passes.
        checkpointing: Whether activations are checkpointed: modules run again in the backward pass.
    """

    modules: list[nn.Module]
    snapshot: int
    checkpointing: bool

    def is_observed(self, own: set[int] | None = None) -> bool:
        """Whether somebody else's hooks see the modules, or a backward pass runs them again.

        Args:
            own: Ids of hooks that do not count; the library's own by default.
        """
        return self.checkpointing or is_observed(self.modules, own)


def state_of(model: nn.Module) -> ModelState:
    """Walk over the modules of a model once, and return its state."""
    modules = modules_of(model)
    settings = [
        (key, value)
        for module in (model, *model._modules.values())
        if module is not None
        for key, value in vars(module).items()
        if key[0] != "_" and key != "training" and isinstance(value, (bool, str))
    ]
    compiled = [id(module) for module in modules if module._compiled_call_impl is not None]
    # Among the attributes, not by getattr(): that is slow where there is none.
    checkpointing = [module for module in modules if module.__dict__.get("grad_checkpointing")]
    snapshot = hash((tuple(settings), tuple(map(id, modules)), tuple(compiled)))
    return ModelState(modules, snapshot, bool(checkpointing))


#: One lock for each model, as long as it lives.
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_lock_of_locks = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, uncompiled, and restore the flags of every module one by one.

    One thread does so at a time: others wait until the flags are restored.

    What modules keep for themselves between forward passes (timm's transformers keep attention biases that
    they have looked up) starts empty and is restored too: it was made from other weights, or with a graph.
    """
    with _lock_of_locks:
        lock = _locks.setdefault(unwrap(model), threading.RLock())
    with lock:
        flags = [(module, module.training, module._compiled_call_impl) for module in modules_of(model)]
        kept = [(cache, dict(cache)) for cache in _caches(model)]
        try:
            for cache, _ in kept:
                cache.clear()
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
            for cache in _caches(model):
                cache.clear()
            for cache, content in kept:
                cache.update(content)


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


class Muting(threading.local):
    """Whether passes that recorders ignore are running in this thread.

    Attributes:
        depth: How many of them, one inside the other.
    """

    depth = 0


muting = Muting()


@contextmanager
def muted() -> Iterator[None]:
    """Run forward passes that recorders ignore: probes of the library itself."""
    muting.depth += 1
    try:
        yield
    finally:
        muting.depth -= 1


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
