"""Explains data sets of any size, part by part, with any number of processes, which may end at any time."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from attnguide import __version__
from attnguide.capture.logits import find_logits
from attnguide.capture.model_state import evaluating, weights_digest
from attnguide.cli.console import progress as shown_progress
from attnguide.data._addresses import Place, read_content
from attnguide.data.images import rgb_image
from attnguide.data.maps import (
    SETTINGS,
    Maps,
    arrow,
    check_parts,
    differences,
    error_table,
    map_table,
    part_number,
    writing_part,
)
from attnguide.data.records import Record, open_records
from attnguide.errors import AttnGuideError, DataError, InputError, is_out_of_memory
from attnguide.explanation import Explanation, explain
from attnguide.interfaces import AttributionSource
from attnguide.layers import LayerSpec, find_layers
from attnguide.models import LoadedModel, load
from attnguide.models._targets import parse_target
from attnguide.pairs import Evidence
from attnguide.parts.registry import registry
from attnguide.trace import Layer

__all__ = ["Batch", "DatasetReport", "Request", "Run", "explain_batch", "explain_dataset", "explained"]

#: What gives a model: its name, the model, or a function that loads it in each process.
ModelSpec = str | LoadedModel | nn.Module | Callable[[], LoadedModel]

#: Seconds for which another process than the first waits for the layer that the first one measures.
_WAIT = 60.0
#: So many images are tried to find one to measure the layer with.
_TRIES = 1000
#: Settings that are measured, by one process for all.
_MEASURED = ("layers", "shape", "logits")
#: So many errors are kept to be shown.
_REASONS = 10
#: Largest number of processes that read images, if none is given.
_MOST_WORKERS = 16


@dataclass(frozen=True)
class DatasetReport:
    """What a process has done.

    Attributes:
        out: The folder with the maps.
        parts: Number of parts that this process wrote.
        images: Number of images in them.
        failed: Number of those that have an error instead of a map.
        missing: Number of parts of the whole data set that are not there yet: those of other processes.
        reasons: The first of the errors.
    """

    out: str
    parts: int
    images: int
    failed: int
    missing: int
    reasons: tuple[str, ...] = ()

    def maps(self) -> Maps:
        """Read the maps."""
        return Maps(self.out)


@dataclass(frozen=True)
class Request:
    """What to explain of each image.

    Attributes:
        source: Name of the attribution source, or the source itself.
        targets: Classes, as `attnguide explain --target` takes them.
        layer: Where to look.
        evidence: `"logit"` or `"decision"`.
        batch_size: Number of images in a batch.
        device: Device of the model.
    """

    source: str | AttributionSource
    targets: str
    layer: LayerSpec
    evidence: Evidence
    batch_size: int
    device: torch.device


def explain_dataset(
    data: Any,
    out: str | Path,
    *,
    model: ModelSpec | None = None,
    source: str | AttributionSource = "grad_cam",
    targets: str = "predicted",
    layer: LayerSpec = "auto",
    evidence: Evidence = "logit",
    rows: int = 4096,
    batch_size: int = 32,
    workers: int | None = None,
    device: str | torch.device = "auto",
    rank: int | None = None,
    world_size: int | None = None,
    engine: Literal["processes", "ray"] = "processes",
    progress: bool = True,
) -> DatasetReport:
    """Explain a data set of any size, into Parquet files.

    The data set is cut into parts of `rows` images. Each becomes one file, which appears when it is complete.
    A run that was interrupted goes on with the parts that are missing, with any number of processes. Of
    several processes, each with its `RANK` and `WORLD_SIZE`, each explains every `WORLD_SIZE`-th part; they
    need not know of each other. Memory does not grow with the number of images.

    ```python
    ag.explain_dataset("photos", "maps", model="resnet50.a1_in1k")
    for row in ag.read_maps("maps"):
        print(row.key, row.cls, row.score, row.map.shape)
    ```

    Args:
        data: A folder, file, pattern, CSV or Parquet table, WebDataset tar files, an address such as
            `s3://bucket/photos`, a list of those, or any data set with `len` and indices; see
            [`open_records`][attnguide.data.open_records].
        out: Folder of the results: a path, or an address of fsspec. It also holds `settings.json`, and in it
            the layer, which is measured once for all processes.
        model: A name as in [`models.load`][attnguide.models.load] (with published weights), a
            [`LoadedModel`][attnguide.models.LoadedModel], a function that returns one, or any classifier if
            the data set gives prepared images. None: the small embedded one.
        source: An attribution source.
        targets: Classes of each image: `"predicted"`, `"all"`, `"top:3"`, or indices and names with commas.
        layer: Where to look; see [`explain`][attnguide.explain].
        evidence: `"logit"`, or `"decision"`: for a negative logit the evidence is the negated logit.
        rows: Images in a part. A tar file is one part, whatever it holds.
        batch_size: Images at once.
        workers: Processes that read and decode images; by default one less than there are processors for
            each process, at least one. 0: none.
        device: `"auto"`: an accelerator if there is one, that of `LOCAL_RANK` if there are several.
        rank: Number of this process; by default that in the environment, `RANK`, else 0.
        world_size: Number of processes; by default `WORLD_SIZE`, else 1.
        engine: `"ray"`: the parts are explained by actors of Ray, wherever its cluster has room.
        progress: Show a progress bar on stderr.

    Returns:
        What this process has done. Images that could not be explained are rows with an error.

    Raises:
        InputError: If there are no images, the folder holds maps made with other settings, or cannot be
            written to.
        DataError: If no image can be read, or a table or tar file is damaged.
        LayerError: If no layer will do.
        UnknownNameError: If the source or a class is unknown.
    """
    settings: dict[str, Any] = {
        "model": model,
        "source": source,
        "targets": targets,
        "layer": layer,
        "evidence": evidence,
        "rows": rows,
        "batch_size": batch_size,
        "workers": workers,
        "device": device,
    }
    if engine == "ray":
        return _with_ray(data, out, settings, progress=progress)
    if engine != "processes":
        raise InputError(f"engine={engine!r} is unknown: choose 'processes' or 'ray'.")
    number, count = place_in_world(rank, world_size)
    run = Run(data, out, **settings)
    run.prepare(number, count)
    mine = run.missing(number, count)
    batches = run.read(mine)  # starts processes, and so before the thread of the bar
    total = run.images_in(mine)
    bar = shown_progress("Explaining", total, unit="images", show=progress, keep=True)
    with naming_readers(), bar as advance:
        return run.report(run.explain(batches, advance))


def place_in_world(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """Return the number of this process and that of all, by default from the environment.

    Raises:
        InputError: If only one of them is known, or they contradict each other.
    """
    if rank is None and world_size is None:
        texts = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]
        if texts == [None, None]:
            return 0, 1
        if None in texts or not all(str(text).isdecimal() for text in texts):
            raise InputError(
                f"RANK={texts[0]} and WORLD_SIZE={texts[1]} in the environment must both be whole numbers. A "
                "launcher such as torchrun sets both; unset them to explain everything in one process."
            )
        rank, world_size = (int(str(text)) for text in texts)
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise InputError(f"rank={rank} and world_size={world_size} must fit: 0 to world_size − 1.")
    return rank, world_size


@dataclass(frozen=True)
class PartReport:
    """What one part holds.

    Attributes:
        number: Its number.
        images: Number of images.
        failed: Number of those that have an error.
        reasons: The first errors.
    """

    number: int
    images: int
    failed: int
    reasons: tuple[str, ...]


class Run:
    """Explains parts of a data set, any of them, in any order.

    Args:
        data: The data set.
        out: Folder of the results.
        model: What gives the model.
        others: As for [`explain_dataset`][attnguide.explain_dataset].
    """

    def __init__(
        self,
        data: Any,
        out: str | Path,
        *,
        model: ModelSpec | None,
        source: str | AttributionSource,
        targets: str,
        layer: LayerSpec,
        evidence: Evidence,
        rows: int,
        batch_size: int,
        workers: int | None,
        device: str | torch.device,
    ) -> None:
        # What fails at once comes before what takes long.
        attribution: AttributionSource = registry().create("source", source, AttributionSource)
        if evidence not in ("logit", "decision"):
            raise InputError(f"evidence={evidence!r} is unknown: choose 'logit' or 'decision'.")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size={batch_size!r} must be a whole number of at least 1.")
        self.place = Place(out)
        self.place.make()
        self.records = open_records(data, rows)
        self.workers = count_workers(workers)
        self._attribution, self._model = attribution, model
        self._request = Request(source, targets, layer, evidence, batch_size, torch.device("cpu"))
        self._device = device
        self._settings: dict[str, Any] = {}
        self._shape: tuple[int, ...] = ()

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model, on its device."""
        loaded = loaded_model(self._model)
        loaded.model.to(self._used_device)
        return loaded

    @cached_property
    def _used_device(self) -> torch.device:
        return used_device(self._device)

    def prepare(self, rank: int = 0, world_size: int = 1, *, clear: bool = True) -> None:
        """Find the layer, or the one that another process has found, and compare the settings with its own.

        Args:
            rank: Number of this process.
            world_size: Number of processes.
            clear: Remove what processes that were killed left of this process's parts.

        Raises:
            InputError: If the folder holds maps made with other settings.
        """
        own = self._own_settings()
        text = self.place.read(SETTINGS)
        patience = time.monotonic() + (_WAIT if rank else 0)
        while text is None and time.monotonic() < patience:
            time.sleep(0.2)
            text = self.place.read(SETTINGS)
        if text is None:
            found = {**own, **self._measured()}
            with self.place.writing(SETTINGS, exclusive=True) as path:
                path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            # That of a process that was faster, if there is one.
            text = self.place.read(SETTINGS)
        try:
            settings = json.loads(text or b"")
            layers = [Layer.from_dict(values) for values in settings["layers"]]
            self._shape, count = tuple(settings["shape"]), int(settings["logits"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.place.path(SETTINGS)} was not written by attnguide ({error}). Choose another folder."
            ) from error
        before = {key: value for key, value in settings.items() if key not in _MEASURED}
        if before != own:
            raise InputError(
                f"{self.place} holds maps made with other settings: {differences(before, own)}. Give the "
                "same, or another folder."
            )
        if not self.loaded.classes:  # a plain classifier, whose classes have numbers alone
            self.loaded = replace(self.loaded, classes=tuple(map(str, range(count))))
        self._settings = settings
        self._request = replace(self._request, layer=layers, device=self._used_device)
        if clear:
            self.clear(rank, world_size)

    def _own_settings(self) -> dict[str, Any]:
        request, loaded = self._request, self.loaded
        layer = request.layer
        listed = [layer] if isinstance(layer, (str, Layer)) else list(layer)
        settings = {
            "attnguide": __version__,
            "data": self.records.about,
            "model": loaded.name,
            "weights": weights_digest(loaded.model),
            "classes": hashlib.sha256(json.dumps(loaded.classes).encode()).hexdigest()[:16],
            "multi_label": loaded.multi_label,
            "preprocessing": preprocessing_of(loaded),
            "source": request.source if isinstance(request.source, str) else repr(request.source),
            "targets": request.targets,
            "layer": [each.to_dict() if isinstance(each, Layer) else each for each in listed],
            "evidence": request.evidence,
        }
        return dict(json.loads(json.dumps(settings)))

    def _measured(self) -> dict[str, Any]:
        """Measure the layer with the first image that can be read."""
        decoder = Decoder(self.loaded, self.records.items, None)
        reasons = []
        numbers = range(self.records.parts)
        for key, content in islice((each for part in numbers for each in self.records.part(part)), _TRIES):
            try:
                image = decoder.prepared(key, content)
            except Exception as error:  # noqa: BLE001  (a data set of the user's may raise anything)
                reasons.append(f"{key}: {error}")
                continue
            images = image[None].to(self._used_device)
            asked = self._attribution.layers(self._request.layer)
            layers = find_layers(self.loaded.model, images, asked)
            with torch.no_grad(), evaluating(self.loaded.model):
                count = find_logits(self.loaded.model(images)).shape[1]
            found = [layer.to_dict() for layer in layers]
            return {"layers": found, "shape": list(image.shape), "logits": count}
        raise DataError(
            f"none of the first {len(reasons)} images can be read. The first: {next(iter(reasons), 'none')}"
        )

    def clear(self, rank: int = 0, world_size: int = 1) -> None:
        """Remove what processes that were killed left of this process's parts."""
        names = self.place.names()
        for name in names:
            wanted = re.match(r"\.attnguide-(part-\d+\.parquet)-", name)
            number = None if wanted is None else part_number(wanted[1])
            if number is not None and number % world_size == rank:
                self.place.remove(name)
        for name in self.place.leftovers(SETTINGS, names):  # there is one already
            self.place.remove(name)

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Return the numbers of the parts of a process that are not there yet.

        Raises:
            InputError: If a part was made with other settings.
        """
        there = {number for name in self.place.names() if (number := part_number(name)) is not None}
        mine = range(rank, self.records.parts, world_size)
        whole, damaged = check_parts(self.place, sorted(there.intersection(mine)), self._settings)
        if damaged:
            warnings.warn(
                f"{len(damaged)} parts are damaged, such as {damaged[0]}; they are made again.", stacklevel=3
            )
        return [number for number in mine if number not in whole]

    def images_in(self, parts: Sequence[int]) -> int | None:
        """Return the number of images in parts; None if it is known after reading only."""
        counts = [self.records.count(number) for number in parts]
        return None if None in counts else sum(count for count in counts if count is not None)

    def report(self, parts: Iterable[PartReport]) -> DatasetReport:
        """Add up what parts hold."""
        done = list(parts)
        there = {number for name in self.place.names() if (number := part_number(name)) is not None}
        return DatasetReport(
            str(self.place),
            len(done),
            sum(part.images for part in done),
            sum(part.failed for part in done),
            len(set(range(self.records.parts)) - there),
            tuple(islice((reason for part in done for reason in part.reasons), _REASONS)),
        )

    def read(self, parts: Sequence[int]) -> Iterator[Batch]:
        """Start to read the images of parts ahead; gives at least one batch for each."""

        def wanted() -> Iterator[tuple[int, list[Record]]]:
            for part in parts:
                waiting = iter(self.records.part(part))
                yield part, list(islice(waiting, size))
                while batch := list(islice(waiting, size)):
                    yield part, batch

        size = self._request.batch_size
        total = self.images_in(parts)
        return decoded_batches(
            self.loaded,
            wanted,
            # For a batch, starting processes is not worth while.
            workers=0 if total is not None and total <= size else self.workers,
            items=self.records.items,
            shape=self._shape,
            pin=self._used_device.type == "cuda",
        )

    def explain(
        self, batches: Iterable[Batch], advance: Callable[[float], object] = lambda count: None
    ) -> Iterator[PartReport]:
        """Explain images and write each part into its file; yields a report when it is there.

        Args:
            batches: What `read` gives.
            advance: Called with numbers of images that are done.
        """
        for number, group in groupby(batches, key=lambda batch: batch.part):
            images, reasons = 0, []
            with writing_part(self.place, number, self._settings) as write:
                for batch in group:
                    table, errors = explain_batch(self.loaded, batch, self._request)
                    write(table)
                    images += len(batch.keys)
                    reasons += errors
                    advance(len(batch.keys))
            yield PartReport(number, images, len(reasons), tuple(reasons[:_REASONS]))


# ------------------------------------------------------------------------ the model


def loaded_model(model: ModelSpec | None) -> LoadedModel:
    """Load a model, or make a plain module one."""
    if model is None:
        return load()
    if isinstance(model, str):
        return load(model, pretrained=True)
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, nn.Module):
        return LoadedModel(
            model.eval(), (), _Unprepared(), (0.0,), (1.0,), False, type(model).__name__, (0, 0), "checkpoint"
        )
    if not callable(model):
        raise InputError(
            f"model={model!r:.60} must be a name, a classifier, a LoadedModel, or a function that "
            "returns one."
        )
    made = model()
    if not isinstance(made, (LoadedModel, nn.Module)):
        raise InputError(f"the function for the model returned {made!r:.60}, not a LoadedModel.")
    return loaded_model(made)


class _Unprepared:
    """Stands for the preprocessing of a classifier that comes without one."""

    def __repr__(self) -> str:
        return "none"

    def __call__(self, image: Image.Image) -> Tensor:
        raise InputError(
            "the model has no preprocessing. Let the data set give prepared images (C, H, W), or give the "
            "model as a LoadedModel: attnguide.models.load."
        )


def preprocessing_of(loaded: LoadedModel) -> str:
    """Describe the preprocessing of a model; without the address of an object."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(loaded.transform))


def used_device(device: str | torch.device) -> torch.device:
    if isinstance(device, torch.device):
        return device
    from attnguide.cli.options import pick_device

    local = os.environ.get("LOCAL_RANK", "")
    if device == "auto" and local.isdecimal() and torch.cuda.is_available():
        device = f"cuda:{int(local) % torch.cuda.device_count()}"
    return pick_device(device)


def count_workers(workers: int | None = None) -> int:
    """Return the number of processes that read images, by default one less than there are processors.

    Raises:
        InputError: If it is not a number of processes.
    """
    if workers is None:
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
        each = processors // max(1, int(beside) if beside.isdecimal() else 1)
        return max(1, min(_MOST_WORKERS, each - 1))
    if not isinstance(workers, int) or workers < 0:
        raise InputError(f"workers={workers!r} must be a whole number, at least 0.")
    return workers


# --------------------------------------------------------------------- reading ahead


@dataclass(frozen=True)
class Batch:
    """Images of one part that were read.

    Attributes:
        part: Number of the part.
        keys: What they are called.
        errors: Why some could not be read, by their number.
        images: The others, in order, `(B, C, H, W)`; None if there are none.
    """

    part: int
    keys: list[str]
    errors: dict[int, str]
    images: Tensor | None

    def pin_memory(self) -> Batch:
        """Copy the images to memory from which they are copied to a GPU meanwhile; called by the loader."""
        return self if self.images is None else replace(self, images=self.images.pin_memory())


class Decoder(Dataset[Batch]):
    """Reads batches of images: what the processes of a `DataLoader` do."""

    def __init__(self, loaded: LoadedModel, items: Any, shape: tuple[int, ...] | None) -> None:
        # The model itself stays where it is.
        self._loaded = replace(loaded, model=nn.Identity())
        self._items, self._shape = items, shape

    def __getitem__(self, wanted: tuple[int, list[Record]]) -> Batch:
        part, records = wanted
        images: list[Tensor] = []
        errors: dict[int, str] = {}
        for number, (key, content) in enumerate(records):
            try:
                image = self.prepared(key, content)
            except DataError as error:
                errors[number] = str(error)
            # Whatever is wrong with an image, and whatever a data set of the user's raises: the others go on.
            except Exception as error:  # noqa: BLE001
                errors[number] = f"{key}: {type(error).__name__}: {error}"
            else:
                if self._shape and tuple(image.shape) != self._shape:
                    errors[number] = f"{key} has the shape {tuple(image.shape)}, the first one {self._shape}."
                else:
                    images.append(image)
        return Batch(part, [key for key, _ in records], errors, torch.stack(images) if images else None)

    def prepared(self, key: str, content: str | bytes | int) -> Tensor:
        """Read an image and prepare it for the model, `(C, H, W)`."""
        item: Any = content
        if isinstance(content, int):
            item = self._items[content]
            if isinstance(item, Mapping):
                item = next((item[name] for name in ("image", "pixel_values", "img") if name in item), item)
            elif isinstance(item, (tuple, list)):
                item = item[0]
        if isinstance(item, Tensor):
            if item.ndim != 3 or not item.is_floating_point():
                raise DataError(
                    f"{key} is a tensor of {item.dtype} and shape {tuple(item.shape)}. Give floats "
                    "(C, H, W), normalised as in training."
                )
            return item
        if isinstance(item, Image.Image):
            return self._loaded.prepared(item.convert("RGB"), key)
        if isinstance(item, (str, Path)):
            item = read_content(str(item))
        if not isinstance(item, (bytes, Path)):
            raise DataError(f"{key} is {type(item).__name__}: give a tensor, a picture, bytes or a path.")
        return self._loaded.prepared(rgb_image(item, key), key)


def decoded_batches(
    loaded: LoadedModel,
    wanted: Callable[[], Iterator[tuple[int, list[Record]]]],
    *,
    workers: int,
    items: Any = None,
    shape: tuple[int, ...] | None = None,
    pin: bool = False,
) -> Iterator[Batch]:
    """Start to read images ahead, in processes of their own.

    Args:
        loaded: The model, whose preprocessing is used.
        wanted: Returns an iterator over batches: a number, and the images.
        workers: Number of processes; 0 for none.
        items: The data set that images of whole numbers are items of.
        shape: Shape that the images must have; None for any.
        pin: Whether to put them where a GPU copies them from meanwhile.

    Returns:
        The batches, in order.
    """
    loader: DataLoader[Batch] = DataLoader(
        Decoder(loaded, items, shape),
        batch_size=None,
        sampler=_Stream(wanted),
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_silent_when_left,
        # Starting afresh would import torch again, which takes seconds.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    return iter(loader)


def _silent_when_left(number: int) -> None:
    """Make a process that reads images say nothing when the one that it reads for has ended.

    The thread that hands on tensors prints then that its connection broke.
    """
    shown = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, (EOFError, ConnectionError)):
            shown(kind, error, trace)

    sys.excepthook = show


@contextmanager
def naming_readers() -> Iterator[None]:
    """Turn the error of a process that reads images and ends into one that says what to do.

    PyTorch raises it from a signal handler, wherever this process happens to be.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or isinstance(error, AttnGuideError):
            raise
        raise AttnGuideError(
            f"a process that reads images ended ({error}). If memory ran out, take fewer workers or a "
            "smaller batch, and run the same command again."
        ) from error


class _Stream:
    """Gives a loader what a generator yields; a sampler is all that it asks to be."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return self._make()


# ---------------------------------------------------------------------- explaining


def explain_batch(loaded: LoadedModel, batch: Batch, request: Request) -> tuple[Any, list[str]]:
    """Explain the images of a batch.

    Returns:
        A table with their rows, in order, and the reasons of those that have no map.
    """
    if batch.images is None:
        reasons = [batch.errors[number] for number in range(len(batch.keys))]
        return error_table(batch.keys, reasons), reasons
    explanation = explained(loaded, batch.images, request)
    good = [number for number in range(len(batch.keys)) if number not in batch.errors]
    errors = {
        good[number]: f"{batch.keys[good[number]]}: {why}" for number, why in explanation.skipped.items()
    }
    errors |= batch.errors
    for number in good:
        key = batch.keys[number]
        if key.encode(errors="replace").decode() != key:
            errors.setdefault(number, f"{key!r}: a table holds no name that is not Unicode. Change it.")
    logits = explanation.logits.float()
    if logits.shape[1] != len(loaded.classes):
        raise InputError(
            f"{loaded.name} gives {logits.shape[1]} logits, but has {len(loaded.classes)} classes. Check the "
            "number of classes."
        )
    chosen = explanation.classes.clamp_min(0)
    probabilities = loaded.probabilities(logits).gather(1, chosen)
    count, shape = len(batch.keys), explanation.maps.shape[1:]
    maps = torch.zeros(count, *shape)
    classes = torch.full((count, shape[0]), -1)
    picked = torch.zeros(2, count, shape[0])
    maps[good] = explanation.maps.float().cpu()
    classes[good] = explanation.classes.cpu()
    picked[:, good] = torch.stack([logits.gather(1, chosen), probabilities]).cpu()
    table = map_table(
        batch.keys,
        maps.numpy(),
        classes.numpy(),
        picked[0].numpy(),
        picked[1].numpy(),
        names=loaded.classes,
        layer=explanation.layer,
        errors=errors,
    )
    return table, [errors[number] for number in sorted(errors)]


def explained(loaded: LoadedModel, images: Tensor, request: Request) -> Explanation:
    """Explain a batch at the layer's own size, and say what helps where memory does not suffice."""
    try:
        images = images.to(request.device, non_blocking=True)
        target = parse_target(request.targets, loaded.classes, loaded.multi_label)
        return explain(
            loaded.model,
            images,
            request.source,
            target.of_images(loaded.model, images),
            request.layer,
            None,
            evidence=request.evidence,
            errors="skip",
        )
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise AttnGuideError(
                f"no memory left on {request.device} for a batch of {len(images)} images. Take a batch of "
                f"{max(1, request.batch_size // 2)}, a smaller model, or the CPU."
            ) from error
        raise


# ------------------------------------------------------------------------ on a Ray cluster


class _PartExplainer:
    """An actor that explains whole parts and writes them; what is written stays, whatever ends the actor."""

    def __init__(self, data: Any, out: str, settings: dict[str, Any]) -> None:
        self._run = Run(data, out, **settings)
        self._run.prepare(clear=False)  # other actors are writing

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


def _with_ray(
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
    resources: dict[str, float] = ray.cluster_resources()
    most = max(1, int(resources.get("GPU" if gpus else "CPU", 1)))
    parts = ray.data.from_items([{"part": number} for number in missing]).repartition(len(missing))
    found = parts.map_batches(
        _PartExplainer,
        fn_constructor_args=(data, str(out), settings),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(most, len(missing))),
        num_cpus=1,
        num_gpus=gpus,
    )
    with shown_progress("Explaining", total, unit="images", show=progress, keep=True) as advance:
        report = run.report(_reports(found.iter_rows(), advance))
    run.clear()  # what actors left that were killed
    return report


def _reports(rows: Any, advance: Callable[[float], object]) -> Iterator[PartReport]:
    for row in rows:
        advance(row["images"])
        reasons = tuple(filter(None, row["reasons"].split("\n")))
        yield PartReport(row["number"], row["images"], row["failed"], reasons)
