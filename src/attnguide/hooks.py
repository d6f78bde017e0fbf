"""Connects to a model through hooks, and takes everything off again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnguide.errors import GuidanceError, InputError, LayerError

__all__ = ["Recorder", "Shard", "evaluating", "find_images", "find_logits", "replace_logits", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside `DataParallel` or `DistributedDataParallel` wrappers.

    Raises:
        InputError: If it is no module, or was compiled as a whole.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the model must be a torch.nn.Module, got {type(model).__name__}.")
    if hasattr(model, "_orig_mod"):
        raise InputError(
            "a model that was compiled as a whole hides its features from hooks. Pass the model as it was before torch.compile."
        )
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and restore the training flag of every module one by one."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        # Assigned, not model.train(): partly frozen models have their own idea of which modules train.
        for module, training in flags:
            module.training = training


def find_images(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the images among the arguments of a forward call: the first tensor with rows and columns."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim >= 3:
            return value
    got = ", ".join(type(value).__name__ for value in (*args, *kwargs.values())) or "nothing"
    raise InputError(f"no image tensor (B, C, H, W) among the arguments of the model's forward; got {got}.")


def _logits_key(output: Any) -> Any:
    """Return where in an output the logits are: None for the output itself, `.name`, or a key."""
    if isinstance(output, Tensor):
        return None
    if isinstance(output, Mapping) and not isinstance(getattr(output, "logits", None), Tensor):
        if "logits" in output:
            return "logits"
        pairs: Any = output.items()
    elif isinstance(getattr(output, "logits", None), Tensor):
        return ".logits"
    else:
        pairs = enumerate(output) if isinstance(output, (tuple, list)) else ()
    for key, value in pairs:
        if isinstance(value, Tensor) and value.ndim in (1, 2):
            return key
    raise GuidanceError(
        f"no logits in the model's output of type {type(output).__name__}: expected a tensor (B, K), or a tuple, a dict or "
        "an object with .logits that holds one."
    )


def find_logits(output: Any) -> Tensor:
    """Return the logits `(B, K)` in a model's output: a tensor, a tuple, a dict, or an object with `.logits`.

    One logit for each sample, `(B,)`, is one class, `(B, 1)`.

    Raises:
        GuidanceError: If there are none.
    """
    key = _logits_key(output)
    logits: Tensor = output if key is None else output.logits if key == ".logits" else output[key]
    if logits.ndim == 1:
        logits = logits[:, None]
    if logits.ndim != 2:
        raise GuidanceError(
            f"the model's output has shape {tuple(logits.shape)}; a classifier gives logits (B, K). "
            "Models without a head, or with a map of scores, cannot be explained by class."
        )
    return logits


def replace_logits(output: Any, logits: Tensor) -> Any:
    """Return the output with other logits in the place where [`find_logits`][attnguide.hooks.find_logits] finds them."""
    key = _logits_key(output)
    if key is None:
        return logits.view_as(output)
    if key == ".logits":
        output.logits = logits
        return output
    if isinstance(output, Mapping):
        return type(output)({**output, key: logits})  # type: ignore[call-arg]
    parts = [logits if index == key else part for index, part in enumerate(output)]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


class _MathAttention:
    """Makes scaled dot-product attention use its composite implementation, the only one with a second derivative.

    The switch is global to the process, so that it is counted: overlapping users in several threads share it, the last one restores it.
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


@dataclass
class Shard:
    """What one replica of the model saw in its last forward pass; there is one, or one a device under `DataParallel`."""

    images: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    unfused: bool = False

    def fuse(self) -> None:
        """Give fused attention back."""
        if self.unfused:
            self.unfused = False
            _math_attention.release()


class Recorder:
    """Records the images, the logits and the outputs of chosen layers of each forward pass.

    Args:
        model: The model, wrapped for parallel training or not.
        cut: Start a graph at the first layer that is reached; for forwards that run under `no_grad`. Else the graph that the
            forward makes is used as it is.
        second_order: Attention after a recorded layer runs in an implementation that can be differentiated twice.
        before: Called with the images as a forward begins.
        after: Called with the finished shard and the model's output; what it returns, if not None, replaces the output.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        cut: bool = False,
        second_order: bool = False,
        before: Callable[[Tensor], None] | None = None,
        after: Callable[[Shard, Any], Any] | None = None,
    ) -> None:
        self.model = unwrap(model)
        self.cut, self.second_order = cut, second_order
        self.enabled = True
        self._before, self._after = before, after
        self._shards: dict[torch.device, Shard] = {}
        self._open = threading.local()
        self._hooks = ExitStack()
        with ExitStack() as stack:
            if model is not self.model:
                self._keep(stack, model.register_forward_pre_hook(lambda *_: self.clear()))
            self._keep(stack, self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._keep(stack, self.model.register_forward_hook(self._end, always_call=True))
            self._hooks = stack.pop_all()

    @staticmethod
    def _keep(stack: ExitStack, handle: torch.utils.hooks.RemovableHandle) -> None:
        stack.callback(handle.remove)

    def attach(self, layers: Sequence[str]) -> None:
        """Record the named layers too.

        Raises:
            LayerError: If the model has no module of that name.
        """
        modules = dict(self.model.named_modules())
        with ExitStack() as stack:
            for layer in layers:
                if layer not in modules:
                    raise LayerError(f"the model has no module {layer!r}.")
                self._keep(stack, modules[layer].register_forward_hook(self._tap(layer)))
            self._hooks.push(stack.pop_all().__exit__)

    def remove(self) -> None:
        """Take every hook off and forget the last pass. May be called twice."""
        self._hooks.close()
        self.clear()

    def clear(self) -> None:
        """Forget the last pass, and free its graph."""
        for shard in self._shards.values():
            shard.fuse()
        self._shards.clear()

    @property
    def shards(self) -> list[Shard]:
        """What the last forward left, in batch order; empty before the first forward."""
        return [shard for _, shard in sorted(self._shards.items(), key=lambda item: item[0].index or 0)]

    # The root's hooks open and close the recording, so that a layer that runs again later (activation checkpointing recomputes
    # it in the backward pass) does not overwrite what the forward saw.

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.enabled:
            return
        images = find_images(args, kwargs)
        if self._before is not None:
            self._before(images)
        previous = self._shards.pop(images.device, None)
        if previous is not None:
            previous.fuse()  # a forward that was interrupted left it open
        self._shards[images.device] = self._open.shard = Shard(images)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        shard: Shard | None = getattr(self._open, "shard", None)
        self._open.shard = None
        if not self.enabled or shard is None:
            return None
        shard.fuse()
        if output is None:  # the forward raised; hooks are called all the same
            return None
        shard.logits = find_logits(output)
        return None if self._after is None else self._after(shard, output)

    def _tap(self, layer: str) -> Callable[..., Any]:
        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            shard: Shard | None = getattr(self._open, "shard", None)
            if not self.enabled or shard is None:
                return None
            feature = output[0] if isinstance(output, (tuple, list)) and output else output
            if not isinstance(feature, Tensor):
                raise LayerError(
                    f"layer {layer!r} gives {type(feature).__name__}, not a tensor; choose another layer."
                )
            if self.cut:
                torch.set_grad_enabled(
                    True
                )  # before detach(): a tensor made under no_grad would stay outside the graph
            if torch.is_grad_enabled() and not feature.requires_grad:
                # The graph starts here: the trunk ran without one, or is frozen and the head alone is to be guided.
                feature = feature.detach().requires_grad_()
            if self.second_order and not shard.unfused and torch.is_grad_enabled():
                _math_attention.acquire()
                shard.unfused = True
            shard.features[layer] = feature
            # The model goes on with a copy: a tail that works in place must not change what was recorded.
            passed_on = feature.clone()
            if isinstance(output, Tensor):
                return passed_on
            rest = (passed_on, *output[1:])
            return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)

        return record
