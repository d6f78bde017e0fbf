"""Explains with Ray: an actor class for `map_batches`, and the parts of a data set on a cluster.

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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from attnguide.cli.console import progress as shown_progress
from attnguide.data.maps import arrow
from attnguide.dataset import (
    DatasetReport,
    Decoder,
    PartReport,
    Request,
    Run,
    explain_batch,
    loaded_model,
    used_device,
)
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


# -------------------------------------------------------------------- whole data sets


class PartExplainer:
    """An actor that explains whole parts and writes them; what is written stays, whatever ends the actor."""

    def __init__(self, data: Any, out: str, settings: dict[str, Any]) -> None:
        self._run = Run(data, out, **settings)
        self._run.prepare()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Explain the parts of a batch, `part`, and report them."""
        numbers = [int(number) for number in batch["part"]]
        done = [asdict(report) for report in self._run.explain(self._run.read(numbers))]
        return {
            "number": [report["number"] for report in done],
            "images": [report["images"] for report in done],
            "failed": [report["failed"] for report in done],
            "reasons": ["\n".join(report["reasons"]) for report in done],
        }


def explain_with_ray(
    data: Any, out: str | Path, settings: dict[str, Any], *, progress: bool = True
) -> DatasetReport:
    """Explain the parts of a data set that are missing by actors of Ray; see `explain_dataset`.

    A part that an actor was killed in is explained again by another actor. What has been written is known by
    the files, so that a run goes on after its driver was killed as well.
    """
    arrow()
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("engine='ray' needs Ray: pip install 'attnguide[ray]'") from error
    if settings["workers"] is None:
        settings = {**settings, "workers": 0}  # the actors themselves work side by side
    run = Run(data, out, **settings)
    run.prepare()
    missing = run.missing()
    if not missing:
        return run.report([])
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    gpus = 1 if used_device(settings["device"]).type == "cuda" else 0
    total = run.images_in(missing)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    most = max(1, int(resources.get("GPU" if gpus else "CPU", 1)))
    parts = ray.data.from_items([{"part": number} for number in missing]).repartition(len(missing))
    found = parts.map_batches(
        PartExplainer,
        fn_constructor_args=(data, str(out), settings),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(most, len(missing))),
        num_cpus=1,
        num_gpus=gpus,
    )
    with shown_progress("Explaining", total, unit="images", show=progress, keep=True) as advance:
        return run.report(_reports(found.iter_rows(), advance))


def _reports(rows: Any, advance: Callable[[float], object]) -> Iterator[PartReport]:
    for row in rows:
        advance(row["images"])
        reasons = tuple(filter(None, row["reasons"].split("\n")))
        yield PartReport(row["number"], row["images"], row["failed"], reasons)
