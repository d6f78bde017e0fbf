"""Records the forward passes of a model through hooks, and takes everything off again."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attnguide.capture.attention_reader import AttentionReader, Note
from attnguide.capture.calls import Call, Tap, images_name, replace, select
from attnguide.capture.class_token import ClassToken
from attnguide.capture.derivatives import Derivatives
from attnguide.capture.logits import LogitsSpec, find_logits
from attnguide.capture.model_state import ModelState, empty_caches, muting, state_of, unwrap
from attnguide.capture.own_hooks import Handles
from attnguide.capture.parallel import Shards, parallel_of, shards_of
from attnguide.capture.second_order import Fusion, SecondOrder
from attnguide.errors import GuidanceError, LayerError
from attnguide.trace import Shard

__all__ = [
    "Plan",
    "Recorder",
    "Recording",
    "adapters_of",
    "aside",
    "recorders_of",
]


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Run forward passes that the recorders on a model see, and forget afterwards.

    A guide's adapters take part in such a pass, but `guide.loss` still finds the pass that came before it.

    Args:
        model: The model, without a wrapper.
    """
    kept = []
    for recorder in recorders_of(model):
        kept.append((recorder, recorder.recordings))
        recorder.recordings = {}
    try:
        yield
    finally:
        for recorder, recordings in kept:
            recorder.clear()
            recorder.recordings = recordings


def recorders_of(model: nn.Module) -> list[Recorder]:
    """List the recorders on a model, given without a wrapper."""
    hooks = model._forward_pre_hooks.values()
    return [
        owner
        for hook in hooks
        if isinstance(owner := getattr(hook, "__self__", None), Recorder) and not owner.inert
    ]


def adapters_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """List the adapters on a model, given without a wrapper."""
    return tuple(adapter for recorder in recorders_of(model) for adapter in recorder.adapters)


@dataclass(frozen=True)
class Plan:
    """What is recorded of a forward pass.

    Attributes:
        layers: Names of layers, to be differentiated with respect to: `"input"` for the images, or see
            `Tap`.
        watched: Names of other tensors after them, recorded as they are.
        attention: Names of modules whose attention probabilities are recorded.
        class_token: Names of modules of which only the first tokens matter; for each the number of tokens,
            and whether it is attention.
    """

    layers: Sequence[str]
    watched: Sequence[str] = ()
    attention: Sequence[str] = ()
    class_token: Mapping[str, tuple[int, bool]] = field(default_factory=dict)


@dataclass
class Recording(Shard):
    """A recording with what the recorder and its riders need while the pass runs.

    Attributes:
        calls: Number of calls of each module.
        fusion: Whether attention is fused.
        derivatives: The second derivatives of what comes after the layers.
        class_token: Names of the modules in which only the first tokens get a graph.
        parallel: The wrapper for several processes that the pass runs in.
    """

    calls: Counter[str] = field(default_factory=Counter)
    fusion: Fusion | None = None
    derivatives: Derivatives | None = None
    class_token: frozenset[str] = frozenset()
    parallel: DistributedDataParallel | None = None


class Recorder:
    """Records the images, the logits and the outputs of chosen layers of each forward pass.

    Three riders do more during a pass: `SecondOrder`,
    `AttentionReader` and
    `ClassToken`; each exists only where it is needed.

    Args:
        model: The model, wrapped for parallel training or not.
        plan: Returns what to record, given how the model is called. It is called as a forward begins, and
            again
            only when the model, the size of the images or the adapters have changed. Without it, what was
            given to `record` is recorded.
        cut: Start a graph at the first layer that is reached; for forwards that run under `no_grad`. Else the
            graph that the forward makes is used as it is.
        differentiated_twice: Everything after a recorded layer runs in implementations that can be
            differentiated twice.
        after: Called with the finished recording and the model's output; what it returns, if not None,
            replaces the output.
        adapters: The adapters whose output `after` returns.
        logits: Which part of the model's output is the logits; see `find_logits`.

    Attributes:
        recordings: The recordings of the last forward by device; empty before the first.
        shards: What `fully_shard` was called on.
        inert: Set in a copy of the model, where the hooks do nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        plan: Callable[[Call], Plan] | None = None,
        cut: bool = False,
        differentiated_twice: bool = False,
        after: Callable[[Recording, Any], Any] | None = None,
        adapters: nn.ModuleList | None = None,
        logits: LogitsSpec = None,
    ) -> None:
        self.model, self.logits = unwrap(model), logits
        self.adapters = nn.ModuleList() if adapters is None else adapters
        self.replaces_output = after is not None
        self.recordings: dict[torch.device, Recording] = {}
        self.shards = Shards()
        self.inert = False
        self.second_order: SecondOrder | None = None
        self._attention: AttentionReader | None = None
        self._class_token: ClassToken | None = None
        self._cut, self._plan, self._after = cut, plan, after
        self._images = images_name(self.model)
        #: What the last plan was made for, and the modules that it names.
        self._planned_for: tuple[object, ...] | None = None
        self._planned: list[ReferenceType[nn.Module]] = []
        self._state: ModelState | None = None
        self._parallel = False  # whether a wrapper's forward is running, whose replicas make a recording each
        self._open = threading.local()
        #: The thread whose passes are recorded. A map is made in one thread, and others may run the model.
        self._thread = threading.get_ident() if cut else None
        self._recorded: set[str] = set()
        self._handles = Handles()
        keep = self._handles.keep
        with ExitStack() as stack:
            stack.callback(self._handles.remove)
            if model is not self.model:
                keep(model.register_forward_pre_hook(self._begin_wrapper, with_kwargs=True))
                keep(model.register_forward_hook(self._end_wrapper, always_call=True))
            keep(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
            # Other hooks shall see the output that replaces the model's own.
            keep(self.model.register_forward_hook(self._end, always_call=True, prepend=self.replaces_output))
            if differentiated_twice:
                self.second_order = SecondOrder(self.model)
            stack.pop_all()

    # ------------------------------------------------------ what is recorded

    def record(self, plan: Plan) -> None:
        """Record what a plan says from the next pass on; hooks that are there already stay.

        Raises:
            LayerError: If the model has no module of that name.
        """
        self._record_tensors(plan)
        if plan.attention:
            self._attention = self._attention or AttentionReader(self.model, self._note_of)
            self._attention.attach(plan.attention)
        if plan.class_token:
            self._class_token = self._class_token or ClassToken(self.model, self._keeps_graph)
        if self._class_token is not None:
            self._class_token.leave_out(plan.class_token)

    def _record_tensors(self, plan: Plan) -> None:
        modules: dict[str, nn.Module] = {}
        wanted: dict[str, dict[str, Tap]] = {}
        targets: set[str] = set()
        if self._recorded.issuperset((*plan.layers, *plan.watched)):
            return
        if self._images in plan.layers:
            self._recorded.add(self._images)
        for name in (*plan.layers, *plan.watched):
            if name == self._images:
                continue
            tap = Tap.parse(name)
            try:
                modules[tap.module] = self.model.get_submodule(tap.module)
            except AttributeError:
                raise LayerError(f"the model has no module {tap.module!r}.") from None
            if name in plan.layers:
                targets.add(tap.module)
            if name not in self._recorded:
                wanted.setdefault(tap.module, {})[name] = tap
        # The output of another recorder's adapters has to depend on what this one records.
        first = not self.replaces_output and bool(adapters_of(self.model))
        for name, taps in wanted.items():
            module = modules[name]
            inputs = {text: tap for text, tap in taps.items() if tap.given}
            outputs = {text: tap for text, tap in taps.items() if not tap.given}
            if inputs:
                self._handles.keep(module.register_forward_pre_hook(partial(self._record_input, inputs)))
            if outputs:
                hook = partial(self._record_output, name, outputs, name in targets)
                self._handles.keep(module.register_forward_hook(hook, prepend=first))
        self._recorded |= {text for taps in wanted.values() for text in taps}

    def prepare(self) -> None:
        """Make the last pass cheap to differentiate twice; called before the first gradient is taken."""
        for recording in self.recordings.values():
            if recording.logits is not None and recording.derivatives is None:
                # A weight is recorded with the input of its layer; it comes from before all layers.
                features = (x for x in recording.features.values() if not isinstance(x, nn.Parameter))
                recording.derivatives = Derivatives(recording.logits, features)

    def remove(self) -> None:
        """Remove every hook, and forget the last pass. May be called twice."""
        self._handles.remove()
        for rider in (self.second_order, self._attention, self._class_token):
            if rider is not None:
                rider.remove()
        self.shards.restore()
        self.clear()

    def clear(self) -> None:
        """Forget the last pass, and free its graph."""
        for recording in self.recordings.values():
            if recording.fusion is not None:
                recording.fusion.fuse()
        self.recordings = {}

    def __reduce__(self) -> tuple[Callable[[], Recorder], tuple[()]]:
        """A copy of a guided model (averaged weights, a file) is not guided: its hooks do nothing."""
        return _inert, ()

    # ------------------------------------------------------ hooks of the root

    # They open and close the recording, so that a layer that runs again later (activation checkpointing
    # recomputes it in the backward pass) does not overwrite what the forward recorded.

    def _begin_wrapper(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Prepare for replicas, which run in threads of their own."""
        if muting.depth or self.inert:
            return
        self.clear()
        if self._plan is not None:
            # The images may still be elsewhere: DataParallel takes them from anywhere.
            place = next(self.model.parameters(), None)
            call = Call.of(args, kwargs, self.logits)
            if place is not None and call.images.device != place.device:
                args, kwargs = call.arguments(call.images.to(place.device))
                call = Call.of(args, kwargs, self.logits)
            self._update(call, self._plan)
        self._parallel = True

    def _end_wrapper(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._parallel = False

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if torch.compiler.is_compiling() and not self.inert:
            _refuse_compiled(type(self.model).__name__)
        # PyTorch leaves the keyword arguments out if another thread removes the hook at this moment.
        if muting.depth or self.inert or kwargs is None or self._thread not in (None, threading.get_ident()):
            return None
        call = Call.of(args, kwargs, self.logits)
        images = call.images
        if not self._parallel:
            if self.recordings:
                self.clear()
            if torch.is_grad_enabled():
                empty_caches(self.model)
            if self._plan is not None:
                self._update(call, self._plan)
        previous = self.recordings.pop(images.device, None)
        if previous is not None and previous.fusion is not None:
            previous.fusion.fuse()  # a forward that was interrupted left it open
        recording = Recording(images, parallel=None if self._cut else parallel_of(self.model))
        self.recordings[images.device] = self._open.recording = recording
        if self.second_order is not None:
            recording.fusion = Fusion()
        if self._class_token is not None and self._class_token.modules and not self._is_watched(module):
            recording.class_token = self._class_token.modules
        self._state = None
        if self._images not in self._recorded:
            return None
        feature = recording.features[self._images] = self._start_graph(recording, images)
        return call.arguments(feature.clone())

    def _update(self, call: Call, make_plan: Callable[[Call], Plan]) -> None:
        """Switch the adapters to the model's mode, and make a new plan if anything has changed."""
        if self.adapters.training != self.model.training:
            self.adapters.train(self.model.training)
        state = self._state = state_of(self.model)
        self.shards.modules = shards_of(state.modules)
        if self.second_order is not None and torch.is_grad_enabled():
            self.shards.keep_whole()
        key = (state.snapshot, call.images.shape[1:], call.signature, adapters_of(self.model))
        # A reference is gone where a new module took the place, perhaps with the same id.
        if key != self._planned_for or None in [reference() for reference in self._planned]:
            self._planned_for = None
            plan = make_plan(call)
            self.record(plan)
            names = {Tap.parse(name).module for name in (*plan.layers, *plan.watched) if name != self._images}
            names |= {*plan.attention, *plan.class_token}
            self._planned = [ref(self.model.get_submodule(name)) for name in names]
            self._planned_for = key

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        recording: Recording | None = getattr(self._open, "recording", None)
        if recording is None or muting.depth or self.inert:
            return None
        self._open.recording = None
        if recording.fusion is not None:
            recording.fusion.fuse()
        if output is None:  # the forward raised; hooks are called all the same
            return None
        distilled = self.logits is None and getattr(self.model, "distilled_training", False)
        find = _mean_of_two if distilled else find_logits
        recording.logits = find(output, self.logits)
        if self.second_order is not None and recording.fusion is not None:
            self.second_order.follow(recording.logits, [recording.fusion])
        return None if self._after is None else self._after(recording, output)

    # ---------------------------------------------------- hooks of the layers

    def _record_input(self, taps: Mapping[str, Tap], module: nn.Module, args: tuple[Any, ...]) -> None:
        recording = self._recording()
        if recording is not None and args and isinstance(args[0], Tensor):
            recording.features.update(dict.fromkeys(taps, args[0]))
            # The weights of the moment: a replica has its own, and a probe may have put others in place.
            if isinstance(module, nn.Linear):
                recording.features.update({f"{tap.module}:weight": module.weight for tap in taps.values()})

    def _record_output(
        self,
        module_name: str,
        taps: Mapping[str, Tap],
        starts_graph: bool,
        module: nn.Module,
        args: tuple[Any, ...],
        output: Any,
    ) -> Any:
        recording = self._recording()
        if recording is None:
            return None
        call = recording.calls[module_name]
        recording.calls[module_name] += 1
        changed = None
        for name, tap in taps.items():
            if tap.call not in (None, call):  # without a number the last call stays
                continue
            feature = output if isinstance(output, Tensor) and not tap.path else select(output, tap.path)
            if feature is None:
                raise LayerError(
                    f"layer {name!r} gives {type(output).__name__}, without a tensor there; choose "
                    "another layer."
                )
            if not starts_graph:
                recording.features[name] = feature
                continue
            feature = recording.features[name] = self._start_graph(recording, feature)
            # The model goes on with a copy: a tail that works in place must not change what was recorded.
            copy = feature.clone()
            output = changed = copy if isinstance(output, Tensor) else replace(output, tap.path, copy)
        return changed

    def _start_graph(self, recording: Recording, feature: Tensor) -> Tensor:
        """Make sure that a graph reaches, or begins at, a layer's output."""
        if self._cut:
            # Before detach(): a tensor made under no_grad would stay outside the graph.
            torch.set_grad_enabled(True)
        if torch.is_grad_enabled() and not feature.requires_grad and feature.is_floating_point():
            # The graph starts here: the trunk ran without one, or is frozen and the head alone is to be
            # guided.
            feature = feature.detach().requires_grad_()
        if self.second_order is not None and recording.fusion is not None:
            self.second_order.reached(recording.fusion, feature)
        return feature

    def _note_of(self, name: str) -> Note | None:
        """What records the probabilities of an attention module; None while nothing is recorded."""
        recording = self._recording()
        if recording is None:
            return None

        def note(probabilities: Tensor) -> Tensor:
            recording.attended[name] = self._start_graph(recording, probabilities)
            return recording.attended[name]

        return note

    def _keeps_graph(self, name: str) -> bool:
        """Whether a module has to keep the graph of all tokens now."""
        recording = self._recording()
        return recording is None or name not in recording.class_token

    def _is_watched(self, module: nn.Module) -> bool:
        """Whether others may see, or a backward pass runs again, what modules do to all tokens."""
        state = state_of(module) if self._state is None or self._parallel else self._state
        own = set(self._handles.ids)
        for rider in (self.second_order, self._attention, self._class_token):
            if rider is not None:
                own |= rider.hook_ids
        return state.is_observed(own)

    def _recording(self) -> Recording | None:
        """The recording of the forward that is running in this thread."""
        return None if muting.depth or self.inert else getattr(self._open, "recording", None)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse_compiled(name: str) -> None:
    """Stop a compiled forward at once: tracing hooks takes minutes, and what is compiled hides its layers.

    Raises:
        GuidanceError: Always.
    """
    raise GuidanceError(
        f"{name} was compiled after hooks were put on it. Run the model as it was before torch.compile; "
        "guide.compile(images) compiles all that comes before the guided layers."
    )


def _mean_of_two(output: Any, which: LogitsSpec) -> Tensor:
    """Return the logits of timm's models that train two heads (distillation): the mean, as they evaluate."""
    if not (isinstance(output, tuple) and len(output) == 2):
        return find_logits(output, which)
    return (find_logits(output[0]) + find_logits(output[1])) / 2


def _inert() -> Recorder:
    """Make a recorder that is attached to nothing, for the hooks in a copy of a model."""
    recorder = Recorder(nn.Identity())
    recorder.remove()
    recorder.inert = True
    return recorder
