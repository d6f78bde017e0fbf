"""A model and its adapters as one module, without this library's hooks between them: to export it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from attnguide.capture.calls import Tap, select
from attnguide.capture.logits import LogitsSpec, find_logits, replace_logits
from attnguide.interfaces import Adapter
from attnguide.trace import Feature, Layer, Trace

__all__ = ["Folded"]


class Folded(nn.Module):
    """Runs the model and its adapters, and gives logits `(B, K)`.

    Made by `Adapted.fold(images)`. It holds all weights, and goes through `torch.export.export` as it is:

    ```python
    program = torch.export.export(adapted.fold(images).eval(), (images,))
    ```

    Args:
        model: The model.
        adapters: Its adapters, on the model or not.
        layers: The layer that each adapter reads, None for none.
        companions: What the adapters use, to be moved and exported along.
        logits: Which part of the model's output is the logits.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[Adapter],
        layers: Sequence[Layer | None],
        companions: Sequence[nn.Module] = (),
        logits: LogitsSpec = None,
    ) -> None:
        super().__init__()
        self._logits = logits
        self.model, self.adapters = model, nn.ModuleList(adapters)
        self.companions = nn.ModuleList(companions)
        self._layers = tuple(layers)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits `(B, K)`."""
        features: dict[str, Tensor] = {}
        with self._hooked(features):
            output = self.model(images)
        for adapter, layer in zip(self.adapters, self._layers, strict=True):
            if layer is None or not isinstance(adapter, Adapter):
                continue
            feature = Feature(layer.name, (features[layer.name],), layer.layout)
            logits = adapter(Trace(images, find_logits(output, self._logits), {layer.name: feature}))
            if logits is not None:
                output = replace_logits(output, logits, self._logits)
        return find_logits(output, self._logits)

    @contextmanager
    def _hooked(self, features: dict[str, Tensor]) -> Iterator[None]:
        """Put plain hooks on the model for one pass."""
        with ExitStack() as stack:
            for adapter, layer in zip(self.adapters, self._layers, strict=True):
                if isinstance(adapter, Adapter):
                    for handle in adapter.attach(self.model):
                        stack.callback(handle.remove)
                if layer is not None:
                    tap = Tap.parse(layer.name)
                    keep = _keep(features, layer.name, tap)
                    handle = self.model.get_submodule(tap.module).register_forward_hook(keep)
                    stack.callback(handle.remove)
            yield


def _keep(features: dict[str, Tensor], name: str, tap: Tap) -> Callable[..., None]:
    calls = 0

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal calls
        if tap.call in (None, calls):
            feature = select(output, tap.path)
            if feature is not None:
                features[name] = feature
        calls += 1

    return hook
