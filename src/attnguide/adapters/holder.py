"""Holds adapters on a model: their hooks, the layers that they read, their output and their loss."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attnguide.adapters._parallel import Synchronizer
from attnguide.adapters.folding import Folded
from attnguide.capture.calls import Call
from attnguide.capture.logits import LogitsSpec, check_spec, replace_logits
from attnguide.capture.model_state import unwrap
from attnguide.capture.recorder import Plan, Recorder, Recording
from attnguide.data.files import atomic_write
from attnguide.errors import GuidanceError, InputError
from attnguide.functional import full_precision_mode, reading
from attnguide.interfaces import Adapter, check_annotations
from attnguide.layers import check_layer, find_layers
from attnguide.parts.registry import registry
from attnguide.trace import Layer, Trace, trace_of

__all__ = ["AdapterSet"]


class AdapterSet:
    """Adapters on a model, with parameters, an output and a loss of their own.

    ```python
    adapters = AdapterSet(model, [MyAdapter()])
    optimizer = torch.optim.AdamW([*model.parameters(), *adapters.parameters()])
    loss = criterion(model(images), labels) + adapters.loss(labels)  # the adapters' logits
    adapters.save("adapters.safetensors")
    adapters.remove()
    ```

    It stands alone where nothing is guided. A [`Guide`][attnguide.Guide] with `adapters=` takes it over: the
    guide's `loss` then includes that of the adapters, and `guide.remove()` removes both.

    In the processes of `DistributedDataParallel` the adapters stay equal: the first process sends their
    weights before the first pass that is trained, gradients are averaged when those of the model are (also
    with `no_sync()`), and buffers are then sent again.

    Args:
        model: Any classifier, wrapped for parallel training or not.
        adapters: The adapters.
        companions: Modules that the adapters use and that are not saved with them; a folded model holds them.
        measure: Measure the layout of the layers that the adapters read.
        logits: Which part of the model's output is the logits, as in [`explain`][attnguide.explain].

    Raises:
        LayerError: If the model has no such layer.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[Adapter] = (),
        *,
        companions: Sequence[nn.Module] = (),
        measure: bool = True,
        logits: LogitsSpec = None,
    ) -> None:
        check_spec(logits)
        self.model, self.companions = model, list(companions)
        self.measure, self.logits = measure, logits
        self._adapters = tuple(adapters)
        self.modules = nn.ModuleList(adapters)
        self._requested = [
            check_layer(model, adapter.layer) for adapter in adapters if adapter.layer is not None
        ]
        self._readers = [adapter for adapter in adapters if adapter.layer is not None]
        #: The layers that the readers read, found at the first forward.
        self.layers: list[Layer] = []
        self._steps = 0
        self._recorder: Recorder | None = None
        self._synchronizer: Synchronizer | None = None
        # Not among the library's own: these hooks change what others see.
        self._hooks: list[RemovableHandle] = []
        self._removed = False
        if adapters:
            self._recorder = Recorder(
                model, plan=self._plan, after=self.predict, adapters=self.modules, logits=logits
            )
            self.put_on_hooks()

    @classmethod
    def put_on(
        cls, model: nn.Module, adapters: Sequence[Adapter], images: Tensor | None = None, **options: Any
    ) -> Self:
        """Put adapters on a model, with its type and on its device.

        Args:
            model: Any classifier.
            adapters: The adapters.
            images: Some images on the device to use; by default that of the model.
            **options: Further arguments of the constructor.

        Returns:
            The adapters on the model.
        """
        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        place = weight.device if images is None else images.device
        return cls(model, [adapter.to(place, weight.dtype) for adapter in adapters], **options)

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(unwrap(self.model)).__name__}: {', '.join(map(repr, self))})"

    # ------------------------------------------------------ training

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the adapters, for the optimizer."""
        return self.modules.parameters()

    def loss(self, labels: Tensor, **annotations: Any) -> Tensor:
        """Return the sum of the adapters' own losses for the last forward pass of the model.

        Args:
            labels: Class indices `(B,)`, or multi-hot `(B, K)` floats or bools.
            **annotations: What the adapters read.

        Returns:
            A scalar; an exact zero with a graph where no adapter has a loss.

        Raises:
            GuidanceError: If there was no forward, it ran without gradients, or the adapters were removed or
                belong to a guide.
            InputError: If annotations are missing or unknown.
        """
        check_annotations(self._adapters, annotations)
        if self._removed:
            raise GuidanceError("these adapters were removed from their model; put them on again.")
        if self._recorder is None:
            raise GuidanceError("these adapters belong to a guide: guide.loss includes their losses.")
        recordings = self._recorder.recordings
        if not recordings:
            raise GuidanceError("loss was called before a forward; call model(images) first.")
        shards = sorted(recordings.values(), key=lambda shard: shard.images.device.index or 0)
        trace = trace_of(
            shards,
            self.plain_layers,
            differentiable=True,
            adapters=self._adapters,
            model=unwrap(self.model),
        )
        if not trace.logits.requires_grad:
            raise GuidanceError(
                "the last forward recorded no graph: it ran under torch.no_grad() or inference_mode(), or "
                "every parameter is frozen. Run it with gradients enabled; skip the loss in validation."
            )
        # An empty sum is an exact zero with a graph, whatever the logits are.
        total = trace.logits.flatten()[:0].sum().float()
        with full_precision_mode(trace.logits.device), nullcontext() if self._steps else reading():
            for loss in self.losses(trace, labels, annotations):
                total = total + loss
        self._steps += 1
        return total

    def losses(self, trace: Trace, labels: Tensor, annotations: Mapping[str, Any]) -> Iterator[Tensor]:
        """Yield the loss of each adapter that has one.

        Args:
            trace: A forward pass with the layers of the adapters among others.
            labels: As for `loss`.
            annotations: What the adapters, and others, read.
        """
        for adapter, layer in zip(self._readers, self.layers, strict=True):
            own = {name: value for name, value in annotations.items() if name in adapter.annotations}
            loss = adapter.loss(trace.at(layer.name), labels, **own)
            if loss is not None:
                yield loss

    # ------------------------------------------------------ a forward pass

    def find(self, call: Call) -> None:
        """Find the layers that the adapters read, for images of this size."""
        names = [layer.name for layer in self.layers] or self._requested
        self.layers = [
            find_layers(self.model, call.images, name, measure=self.measure, call=call)[0] for name in names
        ]

    @property
    def plain_layers(self) -> list[Layer]:
        """The layers, each once, without shortcuts: an adapter may use the whole feature."""
        return list({layer.name: layer.plain() for layer in self.layers}.values())

    def predict(self, recording: Recording, output: Any) -> Any:
        """Compute the adapters' logits, and return the output with them in place of the model's own."""
        for adapter, layer in zip(self._readers, self.layers, strict=True):
            logits = adapter(trace_of([recording], [layer.plain()], differentiable=True))
            if logits is not None:
                recording.logits = logits
                output = replace_logits(output, logits, self.logits)
        return output

    def _plan(self, call: Call) -> Plan:
        self.find(call)
        return Plan([layer.name for layer in self.layers])

    # ------------------------------------------------------ coming and going

    def put_on_hooks(self) -> None:
        """Put the hooks of the adapters on the model; none stays if one cannot be put on."""
        try:
            if self._adapters:
                self._synchronizer = Synchronizer(unwrap(self.model), self.modules)
            for adapter in self._adapters:
                self._hooks += adapter.attach(unwrap(self.model))
        except BaseException:
            self.remove()
            raise

    def hand_over(self) -> None:
        """Stop standing alone: a guide records the passes from now on, and puts the hooks on again."""
        self.remove()
        self._removed = False

    def remove(self) -> None:
        """Remove every hook. May be called twice."""
        if self._recorder is not None:
            self._recorder.remove()
            self._recorder = None
        if self._synchronizer is not None:
            self._synchronizer.remove()
            self._synchronizer = None
        for handle in self._hooks:
            handle.remove()
        self._hooks = []
        self._removed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def save(self, path: str | Path) -> None:
        """Save settings and weights of the adapters, without the model.

        Args:
            path: The `.safetensors` file, written atomically.

        Raises:
            InputError: If an adapter has no name and settings, or the file cannot be written.
        """
        about, weights = [], {}
        for index, adapter in enumerate(self):
            if not adapter.name:
                known = ", ".join(registry().names("adapter"))
                raise InputError(
                    f"{type(adapter).__name__} is not saved: it has no `name`, and no `settings` to make it "
                    f"again with. Those of {known} are."
                )
            about.append({"kind": adapter.name, **adapter.settings})
            for name, value in adapter.state_dict().items():
                weights[f"{index}.{name}"] = value.detach().cpu().contiguous()
        with atomic_write(path) as temporary:
            save_file(weights, temporary, metadata={"adapters": json.dumps(about)})

    def fold(self, images: Tensor) -> Folded:
        """Remove the adapters from the model, and make one module of both.

        Args:
            images: Some images, `(B, 3, H, W)`, of the size that it will be used with.

        Returns:
            A module that gives logits for images, to be exported, or used as it is. It holds the model
            itself, not a copy.
        """
        self.find(Call.of((images,), {}, self.logits))
        layers = iter(self.layers)
        read = [None if adapter.layer is None else next(layers) for adapter in self]
        self.remove()
        return Folded(unwrap(self.model), self._adapters, read, self.companions, self.logits)
