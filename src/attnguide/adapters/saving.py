"""Loads adapters that were saved apart from their model, and finds the sizes that adapters have to fit."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from attnguide.capture.logits import find_logits
from attnguide.capture.model_state import evaluating, unwrap
from attnguide.capture.recorder import Plan, Recorder, aside
from attnguide.data.files import check_file
from attnguide.errors import DataError
from attnguide.interfaces import Adapter
from attnguide.layers import find_layers
from attnguide.models.checkpoints import load_into
from attnguide.parts.registry import registry
from attnguide.trace import Trace

__all__ = ["SavedAdapters", "feature_sizes", "trace_for"]


class SavedAdapters:
    """Adapters in a file that [`AdapterSet.save`][attnguide.adapters.AdapterSet.save] wrote.

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
            self._kinds = [str(settings["kind"]) for settings in self.settings]
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


def trace_for(adapter: Adapter, model: nn.Module, images: Tensor) -> Trace:
    """Run a model in evaluation mode without a graph, and return the trace that an adapter on it gets.

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
    source = find_layers(model, images, layer)[0]
    with ExitStack() as stack:
        for context in (torch.no_grad(), evaluating(model), aside(unwrap(model))):
            stack.enter_context(context)
        recorder = Recorder(model)
        stack.callback(recorder.remove)
        recorder.record(Plan([source.name]))
        logits = find_logits(model(images[:1]))
        (recording,) = recorder.recordings.values()
        feature = recording.features[source.name]
    return source.layout.flat(feature).shape[1], logits.shape[1]
