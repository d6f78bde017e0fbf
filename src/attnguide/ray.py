"""Explains in a pipeline of Ray Data: an actor class for `map_batches`.

For whole data sets there is `explain_dataset(…, engine="ray")`.

```python
import ray
from functools import partial
from attnguide.models import load
from attnguide.ray import Explainer

images = ray.data.read_images("s3://bucket/photos", include_paths=True)
model = partial(load, "resnet50.a1_in1k", pretrained=True)
actors = ray.data.ActorPoolStrategy(min_size=1, max_size=8)
maps = images.map_batches(Explainer, fn_constructor_args=(model,), compute=actors, num_gpus=1)
maps.write_parquet("s3://bucket/maps")
```
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attnguide.dataset import Decoder, Request, explain_batch, loaded_model, used_device
from attnguide.errors import InputError
from attnguide.interfaces import AttributionSource
from attnguide.layers import LayerSpec
from attnguide.models import LoadedModel
from attnguide.pairs import Evidence
from attnguide.parts.registry import registry
from attnguide.trace import Layer

__all__ = ["Explainer"]

#: Columns in which Ray's readers give images, and what they are called.
_IMAGES, _KEYS = ("image", "bytes", "path"), ("key", "path", "__key__")


class Explainer:
    """Explains the batches of a `ray.data.Dataset`: an actor class for its `map_batches`.

    Takes batches with a column `image` (arrays `(H, W, 3)` of `read_images`), `bytes` (encoded images of
    `read_binary_files`) or `path`. Gives tables as [`read_maps`][attnguide.read_maps] does, to be written by
    `write_parquet`. An image that cannot be explained is a row with an error.

    Args:
        model: A function that returns a [`LoadedModel`][attnguide.models.LoadedModel], or the name of one:
            each actor loads its own.
        source: An attribution source.
        targets: Classes, as `attnguide explain --target` takes them.
        layer: Where to look; what `Layer.to_dict` gave, so that all actors look at the same one.
        evidence: `"logit"` or `"decision"`.
        device: `"auto"`: the GPU that Ray gives the actor, else the CPU.

    Raises:
        InputError: If the model or the settings are wrong.
    """

    def __init__(
        self,
        model: str | Callable[[], LoadedModel] | None = None,
        source: str | AttributionSource = "grad_cam",
        targets: str = "predicted",
        layer: LayerSpec | Mapping[str, Any] = "auto",
        evidence: Evidence = "logit",
        device: str = "auto",
    ) -> None:
        registry().create("source", source, AttributionSource)
        chosen = used_device(device)
        self._loaded = loaded_model(model)
        self._loaded.model.to(chosen)
        where: LayerSpec = Layer.from_dict(layer) if isinstance(layer, Mapping) else layer
        self._request = Request(source, targets, where, evidence, 1, chosen)

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """Explain a batch of columns; returns a table of Arrow."""
        column = next((name for name in _IMAGES if name in batch), None)
        if column is None:
            raise InputError(
                f"the batch has the columns {', '.join(batch)}: one of {', '.join(_IMAGES)} must hold the "
                "images."
            )
        key = next((name for name in _KEYS if name in batch), None)
        images = list(batch[column])
        keys = (
            [f"image{number}" for number in range(len(images))] if key is None else list(map(str, batch[key]))
        )
        decoder = Decoder(self._loaded, [*map(_picture, images)], None)
        read = decoder[0, list(zip(keys, range(len(keys)), strict=True))]
        return explain_batch(self._loaded, read, self._request)[0]


def _picture(value: Any) -> Any:
    """Make a picture of an array; bytes and paths stay what they are."""
    from PIL import Image

    return Image.fromarray(value) if isinstance(value, np.ndarray) else value
