"""Connects to a model through hooks, and takes everything off again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnguide.errors import GuidanceError, InputError, LayerError

__all__ = [
    "Recorder",
    "Shard",
    "aside",
    "evaluating",
    "find_images",
    "find_logits",
    "muted",
    "replace_logits",
    "unwrap",
]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside `DataParallel` or `DistributedDataParallel` wrappers.

    Raises:
        InputError: If it is no module, or was compiled as a whole.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the model must be a torch.nn.Module, got {type(model).__name__}.")
    if hasattr(model, "_orig_mod"):
        raise InputError(
            "a model that was compiled as a whole hides its features from hooks. Pass the model as it was "
            "before torch.compile."
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


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Run forward passes that the recorders attached to a model see, and forget afterwards.

    A guide's adapters take part in such a pass, but `guide.loss` still finds the pass that came before it.
    """
    hooks = unwrap(model)._forward_pre_hooks.values()
    owners = [owner for hook in hooks if isinstance(owner := getattr(hook, "__self__", None), Recorder)]
    kept = [(recorder, recorder.put_away()) for recorder in owners]
    try:
        yield
    finally:
        for recorder, shards in kept:
            recorder.bring_back(shards)


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
        if isinstance(output.get("logits"), Tensor):
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
        f"no logits in the model's output of type {type(output).__name__}: expected a tensor (B, K), or a "
        "tuple, a dict or an object with .logits that holds one."
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
            f"the model's output has shape {tuple(logits.shape)}; a classifier gives logits (B, K). Models "
            "without a head, or with a map of scores, cannot be explained by class."
        )
    return logits


def replace_logits(output: Any, logits: Tensor) -> Any:
    """Return the output with other logits where [`find_logits`][attnguide.hooks.find_logits] finds them."""
    key = _logits_key(output)
    if key is None:
        return _like(output, logits)
    if key == ".logits":
        logits = _like(output.logits, logits)
        if hasattr(output, "_replace"):  # a named tuple
            return output._replace(logits=logits)
        output.logits = logits
        return output
    logits = _like(output[key], logits)
    if isinstance(output, Mapping):
        return type(output)({**output, key: logits})  # type: ignore[call-arg]
    parts = [logits if index == key else part for index, part in enumerate(output)]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


def _like(old: Tensor, logits: Tensor) -> Tensor:
    """Drop the class axis where the model has none."""
    return logits[:, 0] if old.ndim == 1 and logits.ndim == 2 else logits


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


@dataclass
class Shard:
    """What one replica of the model saw in its last forward; under `DataParallel` one a device."""

    images: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    attention: Attention = field(default_factory=Attention)


class Recorder:
    """Records the images, the logits and the outputs of chosen layers of each forward pass.

    Args:
        model: The model, wrapped for parallel training or not.
        cut: Start a graph at the first layer that is reached; for forwards that run under `no_grad`. Else the
            graph that the forward makes is used as it is.
        second_order: Attention after a recorded layer runs in an implementation that can be differentiated
            twice.
        before: Called with the images as a forward begins.
        after: Called with the finished shard and the model's output; what it returns, if not None, replaces
            the output.
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
        self._before, self._after = before, after
        self._shards: dict[torch.device, Shard] = {}
        self.inert = False  # true in a copy of the model
        self._parallel = False  # whether a wrapper's forward is running, whose replicas make a shard each
        self._open = threading.local()
        self._hooks = ExitStack()
        with ExitStack() as stack:
            if model is not self.model:
                self._keep(stack, model.register_forward_pre_hook(self._begin_wrapper, with_kwargs=True))
                self._keep(stack, model.register_forward_hook(self._end_wrapper, always_call=True))
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
                self._keep(stack, modules[layer].register_forward_hook(partial(self._tap, layer)))
            self._hooks.push(stack.pop_all().__exit__)

    @contextmanager
    def differentiating(self) -> Iterator[None]:
        """Take gradients of the last pass."""
        shards = self.shards if self.second_order else []
        try:
            for shard in shards:
                shard.attention.unfuse()
            yield
        finally:
            for shard in shards:
                shard.attention.fuse()

    def follow(self, loss: Tensor) -> None:
        """See to attention when the backward pass of a loss made of the last pass begins."""
        if self.second_order and loss.requires_grad:
            for shard in self.shards:
                loss.register_hook(shard.attention.begin_backward)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Take every hook off and forget the last pass. May be called twice."""
        self._hooks.close()
        self.clear()

    def clear(self) -> None:
        """Forget the last pass, and free its graph."""
        for shard in self._shards.values():
            shard.attention.fuse()
        self._shards.clear()

    def put_away(self) -> dict[torch.device, Shard]:
        """Hand the last pass over, as if there had been none."""
        shards, self._shards = self._shards, {}
        return shards

    def bring_back(self, shards: dict[torch.device, Shard]) -> None:
        """Take back what `put_away` gave, in place of whatever was recorded since."""
        self.clear()
        self._shards = shards

    def __reduce__(self) -> tuple[Callable[[], Recorder], tuple[()]]:
        """A copy of a guided model (averaged weights, a file) is not guided: its hooks do nothing."""
        return _inert, ()

    @property
    def shards(self) -> list[Shard]:
        """What the last forward left, in batch order; empty before the first forward."""
        return [shard for _, shard in sorted(self._shards.items(), key=lambda item: item[0].index or 0)]

    def _begin_wrapper(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Prepare for replicas, which run in threads of their own."""
        if _muting.depth or self.inert:
            return
        self.clear()
        if self._before is not None:
            # The images may still be elsewhere: DataParallel takes them from anywhere.
            place = next(self.model.parameters(), None)
            images = find_images(args, kwargs)
            self._before(images if place is None else images.to(place.device))
        self._parallel = True

    def _end_wrapper(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._parallel = False

    # The root's hooks open and close the recording, so that a layer that runs again later (activation
    # checkpointing recomputes it in the backward pass) does not overwrite what the forward saw.

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _muting.depth or self.inert:
            return
        images = find_images(args, kwargs)
        if not self._parallel:
            self.clear()
            if self._before is not None:
                self._before(images)
        previous = self._shards.pop(images.device, None)
        if previous is not None:
            previous.attention.fuse()  # a forward that was interrupted left it open
        self._shards[images.device] = self._open.shard = Shard(images)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if _muting.depth or self.inert:
            return None
        shard: Shard | None = getattr(self._open, "shard", None)
        self._open.shard = None
        if shard is None:
            return None
        shard.attention.fuse()
        if output is None:  # the forward raised; hooks are called all the same
            return None
        shard.logits = find_logits(output)
        return None if self._after is None else self._after(shard, output)

    def _tap(self, layer: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        shard: Shard | None = None if _muting.depth or self.inert else getattr(self._open, "shard", None)
        if shard is None:
            return None
        feature = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(feature, Tensor):
            raise LayerError(
                f"layer {layer!r} gives {type(feature).__name__}, not a tensor; choose another layer."
            )
        if self.cut:
            # Before detach(): a tensor made under no_grad would stay outside the graph.
            torch.set_grad_enabled(True)
        if torch.is_grad_enabled() and not feature.requires_grad and feature.is_floating_point():
            # The graph starts here: the trunk ran without one, or is frozen and the head alone is to be
            # guided.
            feature = feature.detach().requires_grad_()
        if self.second_order and not shard.attention.unfused and feature.requires_grad:
            shard.attention.unfuse()
            feature.register_hook(shard.attention.end_backward)  # type: ignore[no-untyped-call]
        shard.features[layer] = feature
        # The model goes on with a copy: a tail that works in place must not change what was recorded.
        passed_on = feature.clone()
        if isinstance(output, Tensor):
            return passed_on
        rest = (passed_on, *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)


def _inert() -> Recorder:
    """A recorder that is attached to nothing, for the hooks in a copy of a model."""
    recorder = Recorder(nn.Identity())
    recorder.remove()
    recorder.inert = True
    return recorder
