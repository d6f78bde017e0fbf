"""Connects to a model through hooks, and takes everything off again."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnguide.capture.attention_reader import Note, read
from attnguide.capture.calls import Call, Tap, find_logits, images_name, replace, select
from attnguide.capture.class_token import FewRows
from attnguide.capture.model_state import empty_caches, is_muted, modules_of
from attnguide.capture.own_hooks import Handles, is_observed
from attnguide.capture.second_order import Attention, smooth
from attnguide.errors import InputError, LayerError

__all__ = [
    "Recorder",
    "Shard",
    "adapters_of",
    "aside",
    "is_answered_beside",
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
            "before torch.compile; guide.compile(images) then compiles all that comes before the layer."
        )
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Run forward passes that the recorders attached to a model see, and forget afterwards.

    A guide's adapters take part in such a pass, but `guide.loss` still finds the pass that came before it.
    """
    kept = [(recorder, recorder.put_away()) for recorder in _recorders(unwrap(model))]
    try:
        yield
    finally:
        for recorder, shards in kept:
            recorder.bring_back(shards)


def _recorders(model: nn.Module) -> list[Recorder]:
    """Those that are attached to a model."""
    hooks = model._forward_pre_hooks.values()
    return [owner for hook in hooks if isinstance(owner := getattr(hook, "__self__", None), Recorder)]


def is_answered_beside(model: nn.Module) -> bool:
    """Whether something attached to the model may answer in its place: its own head then tells nothing."""
    return any(recorder.answers and not recorder.inert for recorder in _recorders(unwrap(model)))


def adapters_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """The adapters that guides hold on a model."""
    return tuple(
        adapter
        for recorder in _recorders(unwrap(model))
        if not recorder.inert
        for adapter in recorder.adapters
    )


@dataclass
class Shard:
    """What one replica of the model saw in its last forward; under `DataParallel` one a device."""

    images: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    calls: Counter[str] = field(default_factory=Counter)
    attention: Attention = field(default_factory=Attention)
    idle: frozenset[str] = frozenset()
    attended: dict[str, Tensor] = field(default_factory=dict)


class Recorder:
    """Records the images, the logits and the outputs of chosen layers of each forward pass.

    Args:
        model: The model, wrapped for parallel training or not.
        cut: Start a graph at the first layer that is reached; for forwards that run under `no_grad`. Else the
            graph that the forward makes is used as it is.
        second_order: Attention after a recorded layer runs in an implementation that can be differentiated
            twice.
        before: Called as a forward begins, with how the model was called.
        after: Called with the finished shard and the model's output; what it returns, if not None, replaces
            the output.
        adapters: Those that answer in `after`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        cut: bool = False,
        second_order: bool = False,
        before: Callable[[Call], None] | None = None,
        after: Callable[[Shard, Any], Any] | None = None,
        adapters: Sequence[nn.Module] = (),
    ) -> None:
        self.model = unwrap(model)
        self._images = images_name(self.model)
        self.adapters = tuple(adapters)
        self.cut, self.second_order = cut, second_order
        self.answers = after is not None
        self._before, self._after = before, after
        self._shards: dict[torch.device, Shard] = {}
        self.inert = False  # true in a copy of the model
        self._parallel = False  # whether a wrapper's forward is running, whose replicas make a shard each
        self._open = threading.local()
        self._attached: set[str] = set()
        self._attending: set[str] = set()
        self._idle: frozenset[str] = frozenset()
        self._hooked_idle: set[str] = set()
        self._smoothed: dict[str, Handles] = {}
        self._handles = Handles()
        keep = self._handles.keep
        with ExitStack() as stack:
            stack.callback(self._handles.remove)
            if model is not self.model:
                keep(model.register_forward_pre_hook(self._begin_wrapper, with_kwargs=True))
                keep(model.register_forward_hook(self._end_wrapper, always_call=True))
            keep(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
            # Whoever else is attached shall see the answer that replaces the model's own.
            keep(self.model.register_forward_hook(self._end, always_call=True, prepend=self.answers))
            if second_order:
                self._smoothed = smooth(self.model)
            stack.pop_all()

    def attach(self, layers: Sequence[str], watched: Sequence[str] = ()) -> None:
        """Record the named layers too; a name that is attached already is left alone.

        Args:
            layers: Names of layers, to be differentiated with respect to: `"input"` for the images, or see
                `Tap`.
            watched: Names of other tensors behind them, recorded as they are.

        Raises:
            LayerError: If the model has no module of that name.
        """
        if self._images in layers:
            self._attached.add(self._images)
        if self._attached.issuperset((*layers, *watched)):
            return
        modules: dict[str, nn.Module] = {}
        wanted: dict[str, dict[str, Tap]] = {}
        for name in (*layers, *watched):
            if name == self._images:
                continue
            tap = Tap.parse(name)
            try:
                modules[tap.module] = self.model.get_submodule(tap.module)
            except AttributeError:
                raise LayerError(f"the model has no module {tap.module!r}.") from None
            if name not in self._attached:
                wanted.setdefault(tap.module, {})[name] = tap
        targets = {Tap.parse(name).module for name in layers if name != self._images}
        # An answer from what another recorder sees has to depend on what this one sees.
        first = not self.answers and is_answered_beside(self.model)
        for module, taps in wanted.items():
            given = {name: tap for name, tap in taps.items() if tap.given}
            if given:
                look = partial(self._look_at_input, given)
                self._handles.keep(modules[module].register_forward_pre_hook(look))
            if len(given) < len(taps):
                gives = {name: tap for name, tap in taps.items() if not tap.given}
                tap_output = partial(self._tap, module, gives, module in targets)
                self._handles.keep(modules[module].register_forward_hook(tap_output, prepend=first))
        self._attached |= {name for taps in wanted.values() for name in taps}

    def attach_attention(self, modules: Sequence[str]) -> None:
        """Record what modules attend to as well; one that is attached already is left alone."""
        for name in modules:
            if name not in self._attending:
                hook = partial(read, partial(self._noting, name))
                module = self.model.get_submodule(name)
                # Before others that look at its output, which is another tensor then.
                self._handles.keep(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
                self._attending.add(name)

    def leave_out(self, idle: Mapping[str, tuple[int, bool]]) -> None:
        """Keep no graph from now on for what modules do to tokens that the answer does not depend on.

        They do as usual while somebody else has hooks on the model, who may look at these tokens, and while
        checkpointing runs them again in a backward pass.

        Args:
            idle: Names of modules; for each the number of tokens, from the first, that the answer does depend
                on, and whether it is attention.
        """
        self._idle = frozenset(idle)
        for name, (prefix, attends) in idle.items():
            if name not in self._hooked_idle:
                module = self.model.get_submodule(name)
                rows = FewRows(prefix, attends, partial(self._is_busy, name))
                self._handles.keep(module.register_forward_pre_hook(rows.before, with_kwargs=True))
                # Before others that look at its output.
                self._handles.keep(module.register_forward_hook(rows.after, prepend=True, with_kwargs=True))
                self._hooked_idle.add(name)

    def leave_alone(self, modules: Sequence[str]) -> None:
        """Take hooks off activations inside of modules that come before the layers."""
        for name, handles in self._smoothed.items():
            if any(name == outer or name.startswith(f"{outer}.") for outer in modules):
                handles.remove()

    @contextmanager
    def differentiating(self) -> Iterator[None]:
        """Take gradients of the last pass."""
        with ExitStack() as stack:
            for shard in self.shards if self.second_order else []:
                stack.enter_context(shard.attention.held())
            yield

    def follow(self, tensor: Tensor, *shards: Shard) -> None:
        """See to attention when a backward pass begins at a tensor that was made of the last pass."""
        if self.second_order and tensor.requires_grad:
            for shard in shards or self.shards:
                tensor.register_hook(shard.attention.begin_backward)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Take every hook off and forget the last pass. May be called twice."""
        self._handles.remove()
        for handles in self._smoothed.values():
            handles.remove()
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

    def _is_busy(self, name: str) -> bool:
        """Whether a module has to do all of its work now."""
        shard = self._shard()
        return shard is None or name not in shard.idle

    def __reduce__(self) -> tuple[Callable[[], Recorder], tuple[()]]:
        """A copy of a guided model (averaged weights, a file) is not guided: its hooks do nothing."""
        return _inert, ()

    @property
    def shards(self) -> list[Shard]:
        """What the last forward left, in batch order; empty before the first forward."""
        return [shard for _, shard in sorted(self._shards.items(), key=lambda item: item[0].index or 0)]

    def _begin_wrapper(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Prepare for replicas, which run in threads of their own."""
        if is_muted() or self.inert:
            return
        self.clear()
        if self._before is not None:
            # The images may still be elsewhere: DataParallel takes them from anywhere.
            place = next(self.model.parameters(), None)
            call = Call.of(args, kwargs)
            if place is not None and call.images.device != place.device:
                args, kwargs = call.arguments(call.images.to(place.device))
                call = Call.of(args, kwargs)
            self._before(call)
        self._parallel = True

    def _end_wrapper(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._parallel = False

    # The root's hooks open and close the recording, so that a layer that runs again later (activation
    # checkpointing recomputes it in the backward pass) does not overwrite what the forward saw.

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_muted() or self.inert:
            return None
        call = Call.of(args, kwargs)
        images = call.images
        if not self._parallel:
            self.clear()
            if torch.is_grad_enabled():
                empty_caches(self.model)
            if self._before is not None:
                self._before(call)
        previous = self._shards.pop(images.device, None)
        if previous is not None:
            previous.attention.fuse()  # a forward that was interrupted left it open
        shard = self._shards[images.device] = self._open.shard = Shard(images)
        if self._idle and not self._is_watched(module):
            shard.idle = self._idle
        if self._images not in self._attached:
            return None
        feature = shard.features[self._images] = self._beginning(shard, images)
        return call.arguments(feature.clone())

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if is_muted() or self.inert:
            return None
        shard = self._shard()
        self._open.shard = None
        if shard is None:
            return None
        shard.attention.fuse()
        if output is None:  # the forward raised; hooks are called all the same
            return None
        shard.logits = _answer(self.model, output)
        self.follow(shard.logits, shard)
        return None if self._after is None else self._after(shard, output)

    def _is_watched(self, model: nn.Module) -> bool:
        """Whether somebody may see, or run again, what modules do to all tokens."""
        own = self._handles.ids.union(*(handles.ids for handles in self._smoothed.values()))
        return is_observed(modules_of(model), own) or any(
            getattr(module, "grad_checkpointing", False) for module in modules_of(model)
        )

    def _look_at_input(self, taps: Mapping[str, Tap], module: nn.Module, args: tuple[Any, ...]) -> None:
        shard = self._shard()
        if shard is not None and args and isinstance(args[0], Tensor):
            shard.features.update(dict.fromkeys(taps, args[0]))
            # The weights of the moment: a replica has its own, and a probe may have put others in place.
            if isinstance(module, nn.Linear):
                shard.features.update({f"{tap.module}:weight": module.weight for tap in taps.values()})

    def _tap(
        self,
        module_name: str,
        taps: Mapping[str, Tap],
        begin: bool,
        module: nn.Module,
        args: tuple[Any, ...],
        output: Any,
    ) -> Any:
        shard = self._shard()
        if shard is None:
            return None
        call = shard.calls[module_name]
        shard.calls[module_name] += 1
        changed = None
        for name, tap in taps.items():
            if tap.call not in (None, call):  # without a number the last call stays
                continue
            feature = select(output, tap.path)
            if feature is None:
                raise LayerError(
                    f"layer {name!r} gives {type(output).__name__}, without a tensor there; choose "
                    "another layer."
                )
            if not begin:
                shard.features[name] = feature
                continue
            feature = shard.features[name] = self._beginning(shard, feature)
            # The model goes on with a copy: a tail that works in place must not change what was recorded.
            output = changed = replace(output, tap.path, feature.clone())
        return changed

    def _noting(self, name: str) -> Note | None:
        """What looks at the probabilities of an attention module."""
        shard = self._shard()
        if shard is None:
            return None

        def note(probabilities: Tensor) -> Tensor:
            shard.attended[name] = self._beginning(shard, probabilities)
            return shard.attended[name]

        return note

    def _shard(self) -> Shard | None:
        """The recording of the forward that is running in this thread."""
        return None if is_muted() or self.inert else getattr(self._open, "shard", None)

    def _beginning(self, shard: Shard, feature: Tensor) -> Tensor:
        """See to it that a graph reaches, or begins at, a layer's output."""
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
        return feature


def _answer(model: nn.Module, output: Any) -> Tensor:
    """Return the logits; of timm's models that train two heads (distillation) the mean, as they evaluate."""
    if getattr(model, "distilled_training", False) and isinstance(output, tuple) and len(output) == 2:
        return (find_logits(output[0]) + find_logits(output[1])) / 2
    return find_logits(output)


def _inert() -> Recorder:
    """A recorder that is attached to nothing, for the hooks in a copy of a model."""
    recorder = Recorder(nn.Identity())
    recorder.remove()
    recorder.inert = True
    return recorder
