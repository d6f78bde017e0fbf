"""Adapters on a model: saved apart from it, loaded again, and folded with it into one module."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attnguide.adapters.folding import Folded
from attnguide.capture.calls import Call, find_logits
from attnguide.capture.model_state import evaluating
from attnguide.capture.recorder import Recorder, aside, unwrap
from attnguide.data.files import atomic_write, check_file
from attnguide.errors import DataError, InputError
from attnguide.guiding.guide import Guide
from attnguide.interfaces import Adapter
from attnguide.layers import find_layers
from attnguide.models.checkpoints import load_into
from attnguide.parts.registry import registry
from attnguide.trace import Trace

__all__ = ["Adapted", "SavedAdapters", "feature_sizes", "seen_by"]


class Adapted(Guide):
    """A guide whose adapters can be saved apart from the model, and folded with it into one module.

    The plugins' `attach` and `load_adapters` make it; it takes terms of guidance like any other guide.
    """

    @classmethod
    def put_on(
        cls, model: nn.Module, adapters: Sequence[Adapter], images: Tensor | None = None, **guide: Any
    ) -> Self:
        """Put adapters on a model, with its type and on its device.

        Args:
            model: Any classifier.
            adapters: The adapters.
            images: Some images on the device to use; by default that of the model.
            **guide: Further arguments of [`Guide`][attnguide.Guide]; without any term there is none.

        Returns:
            The guide that holds the adapters.
        """
        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        place = weight.device if images is None else images.device
        ready = [adapter.to(place, weight.dtype) for adapter in adapters]
        # Without a word about guidance, there is none.
        settings = guide if guide.keys() - {"second_order", "measure"} else {"terms": [], **guide}
        return cls(model, adapters=ready, **settings)

    def save(self, path: str | Path) -> None:
        """Save settings and weights of the adapters, without the model.

        Args:
            path: The `.safetensors` file, written atomically.

        Raises:
            InputError: If an adapter does not tell its name and settings, or the file cannot be written.
        """
        about, weights = [], {}
        for index, adapter in enumerate(self._adapter_modules()):
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
        """Take the adapters off the model, and make one module of the model and the adapters.

        Args:
            images: Some images, `(B, 3, H, W)`, of the size that it will be used with.

        Returns:
            A module that gives logits for images, to be exported, or used as it is. It holds the model
            itself, not a copy.
        """
        self._find_layers(Call.of((images,), {}))
        layers = iter(self._adapter_layers)
        adapters = self._adapter_modules()
        read = [None if adapter.layer is None else next(layers) for adapter in adapters]
        self.remove()
        return Folded(unwrap(self.model), adapters, read, self._companions())

    def _companions(self) -> list[nn.Module]:
        """What the adapters use, and is not saved with them."""
        return []


class SavedAdapters:
    """Adapters in a file that [`Adapted.save`][attnguide.adapters.Adapted.save] wrote.

    Args:
        path: The file.

    Attributes:
        settings: What each adapter is made with, and its name as `"kind"`.

    Raises:
        DataError: If the file is missing, or not of that format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = check_file(path)
        try:
            with safe_open(self.path, "pt") as file:
                self.settings: list[dict[str, Any]] = json.loads((file.metadata() or {})["adapters"])
                self._weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self._kinds = [str(one["kind"]) for one in self.settings]
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise self._wrong(error) from error

    def make(self, kinds: Sequence[str], **given: Any) -> list[Adapter]:
        """Make the adapters, with their weights.

        Args:
            kinds: Which adapters are expected.
            **given: What was not saved; each adapter is given what its constructor takes.

        Returns:
            The adapters.

        Raises:
            DataError: If the file holds others, or their settings or weights do not fit.
        """
        adapters: list[Adapter] = []
        for index, (kind, settings) in enumerate(zip(self._kinds, self.settings, strict=True)):
            if kind not in kinds:
                raise DataError(
                    f"{self.path} holds an adapter {kind!r}; expected {', '.join(kinds)}. Load it with the "
                    "function of its own plugin."
                )
            try:
                adapter = _made(kind, settings, given)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise self._wrong(error) from error
            start = f"{index}."
            own = {
                name.removeprefix(start): value
                for name, value in self._weights.items()
                if name.startswith(start)
            }
            load_into(adapter, own, self.path)
            adapters.append(adapter)
        return adapters

    def _wrong(self, error: Exception) -> DataError:
        return DataError(
            f"{self.path} does not hold adapters that attnguide saved ({type(error).__name__}: {error})."
        )


def _made(kind: str, settings: Mapping[str, Any], given: Mapping[str, Any]) -> Adapter:
    made: Any = registry().load_part("adapter", kind)
    takes = inspect.signature(made).parameters
    own = {name: value for name, value in settings.items() if name != "kind"}
    adapter: Adapter = made(**own, **{name: value for name, value in given.items() if name in takes})
    return adapter


def seen_by(adapter: Adapter, model: nn.Module, images: Tensor) -> Trace:
    """Run a model in evaluation mode without a graph, and return what an adapter on it is given.

    Args:
        adapter: The adapter.
        model: The model that a guide holds it on, wrapped or not.
        images: `(B, 3, H, W)`, on the model's device.
    """
    traces: list[Trace] = []

    def keep(module: nn.Module, args: tuple[Trace, ...], output: object) -> None:
        traces.append(args[0])

    model = unwrap(model)  # no replicas: one pass, one trace
    handle = adapter.register_forward_hook(keep)
    try:
        with evaluating(model), torch.no_grad():
            model(images)
    finally:
        handle.remove()
    (trace,) = traces
    return trace


def feature_sizes(model: nn.Module, images: Tensor, layer: str = "auto") -> tuple[int, int]:
    """Find what an adapter has to fit: channels of a layer, and the number of classes.

    Args:
        model: Any classifier.
        images: Some images, `(B, 3, H, W)`.
        layer: The layer.

    Returns:
        C and K.

    Raises:
        LayerError: If the model has no such layer.
    """
    found = find_layers(model, images, layer)[0]
    with ExitStack() as stack:
        for context in (torch.no_grad(), evaluating(model), aside(model)):
            stack.enter_context(context)
        recorder = Recorder(model)
        stack.callback(recorder.remove)
        recorder.attach([found.name])
        logits = find_logits(model(images[:1]))
        feature = recorder.shards[0].features[found.name]
    return found.layout.flat(feature).shape[1], logits.shape[1]
