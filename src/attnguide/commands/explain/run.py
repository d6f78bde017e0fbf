"""Explains many images: files are read ahead, batches explained, and maps written in parallel."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnguide import functional, visual
from attnguide.commands.explain.index import Index, writing
from attnguide.commands.explain.names import class_slugs
from attnguide.data.images import save_picture
from attnguide.data.records import Record
from attnguide.dataset import Batch, decoded_batches, naming_readers
from attnguide.errors import AttnGuideError, InputError, is_out_of_memory
from attnguide.explanation import Explanation, explain
from attnguide.models import LoadedModel
from attnguide.models._targets import Target
from attnguide.pairs import Evidence

__all__ = ["Request", "explain_files"]

_WORKERS = 4
#: So many batches may wait for their files to be written, while the next ones are explained.
_BEHIND = 2


@dataclass(frozen=True)
class Request:
    """Settings of a run.

    Attributes:
        source: Name of the attribution source.
        target: Classes to explain.
        layer: Names of layers, or `"auto"`.
        evidence: `"logit"` or `"decision"`.
        formats: Formats to write, of `"png"`, `"npz"` and `"npy"`.
        full_size: Whether raw maps are as large as the model's input, not as the layer.
        alpha: Opacity of overlays.
        batch_size: Number of images in a batch.
        device: Device of the model.
        workers: Number of processes that read images.
    """

    source: str
    target: Target
    layer: str | list[str]
    evidence: Evidence
    formats: tuple[str, ...]
    full_size: bool
    alpha: float
    batch_size: int
    device: torch.device
    workers: int


def read_files(loaded: LoadedModel, images: Sequence[tuple[Path, str]], request: Request) -> Iterator[Batch]:
    """Start to read image files ahead, in processes of their own; gives batches in order.

    Args:
        loaded: The model.
        images: Files, each with the name of its output files.
        request: Settings of the run.
    """

    def wanted() -> Iterator[tuple[int, list[Record]]]:
        for start in range(0, len(images), request.batch_size):
            yield start, [(str(path), str(path)) for path, _ in images[start : start + request.batch_size]]

    # For a batch, starting processes is not worth while.
    workers = 0 if len(images) <= request.batch_size else request.workers
    return decoded_batches(loaded, wanted, workers=workers, pin=request.device.type == "cuda")


def explain_files(
    loaded: LoadedModel,
    images: Sequence[tuple[Path, str]],
    batches: Iterable[Batch],
    request: Request,
    index: Index,
    advance: Callable[[int], None],
) -> list[tuple[Path, str]]:
    """Explain image files and write the maps into the folder of the index.

    Args:
        loaded: The model, on the device of the request.
        images: Files, each with the name of its output files.
        batches: What `read_files` gives for them.
        request: Settings of the run.
        index: Receives a line for each map.
        advance: Called with the number of images that are done.

    Returns:
        Files that were skipped, with the reason.

    Raises:
        AttnGuideError: If nothing can be explained at all: an unknown layer, no memory, no space on the disk.
    """
    slugs = class_slugs(loaded.classes)
    skipped = []
    with _pool() as pool, naming_readers():
        #: Maps that are being written while the next batches are explained.
        waiting: deque[_Saving] = deque()
        try:
            for batch in batches:
                read = images[batch.part : batch.part + len(batch.keys)]
                skipped += [(read[number][0], reason) for number, reason in batch.errors.items()]
                if batch.images is not None:
                    good = [image for number, image in enumerate(read) if number not in batch.errors]
                    jobs, bad = _jobs(loaded, good, _explained(loaded, batch.images, request), slugs)
                    waiting.append(
                        [(job.name, pool.submit(_save, job, index.folder, request)) for job in jobs]
                    )
                    skipped += bad
                if len(waiting) > _BEHIND:
                    _list(waiting.popleft(), index)
                advance(len(read))
                # The warning of a slow source is about one batch; from now on the progress shows the time.
                warnings.filterwarnings("ignore", "slow source")
            while waiting:
                _list(waiting.popleft(), index)
        except BaseException:
            _list_begun([each for saving in waiting for each in saving], index)
            raise
        finally:
            index.write()
    return skipped


#: Maps of a batch that are being written: name of the image, and what will be the line of the index.
_Saving = list[tuple[str, "Future[dict[str, Any]]"]]


def _list(saving: _Saving, index: Index) -> None:
    """Add the maps of a batch to the index when they are written."""
    # Image by image: after an interruption one is done only if all of its maps are there.
    for _, group in groupby(saving, key=lambda each: each[0]):
        index.add([future.result() for _, future in group])


def _list_begun(saving: _Saving, index: Index) -> None:
    """Stop writing maps, and add the images to the index whose maps are written already."""
    stopped = {name for name, future in saving if future.cancel()}
    for name, group in groupby(saving, key=lambda each: each[0]):
        futures = [future for _, future in group]
        if name not in stopped and not any(future.exception() for future in futures):
            index.add([future.result() for future in futures])


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    # Each worker computes alone: teams of threads inside threads would wait for each other.
    pool = ThreadPoolExecutor(_WORKERS, initializer=lambda: torch.set_num_threads(1))
    # Reading an image suppresses warnings for a moment, a switch of the whole process. Several threads may
    # leave it in the wrong position.
    with warnings.catch_warnings():
        try:
            yield pool
        finally:
            # Waits for files that are being written, so that an interruption leaves none half done.
            pool.shutdown(cancel_futures=True)


def _explained(loaded: LoadedModel, images: Tensor, request: Request) -> Explanation:
    images = images.to(request.device)
    try:
        # At the layer's own size: a thousand classes at the size of the image would fill the memory.
        return explain(
            loaded.model,
            images,
            request.source,
            request.target.of_images(loaded.model, images),
            request.layer,
            None,
            evidence=request.evidence,
        )
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            lower = max(1, request.batch_size // 2)
            raise AttnGuideError(
                f"no memory left on {request.device} for a batch of {len(images)} images. Try --batch-size "
                f"{lower}"
                + (" --resume." if request.batch_size > 1 else ", a smaller model, or --device cpu.")
            ) from error
        raise


@dataclass(frozen=True)
class _Job:
    """A map to be written."""

    image: Path
    name: str
    slug: str
    cls: int
    class_name: str
    score: float
    logit: float
    layer: str
    model: str
    map: Tensor  # (h, w), at the layer's size
    picture: Tensor  # (3, H, W) in [0, 1]


def _jobs(
    loaded: LoadedModel, images: Sequence[tuple[Path, str]], explanation: Explanation, slugs: Sequence[str]
) -> tuple[list[_Job], list[tuple[Path, str]]]:
    logits = explanation.logits.float().cpu()
    if logits.shape[1] != len(slugs):
        raise InputError(
            f"{loaded.name} gives {logits.shape[1]} logits, but has {len(slugs)} classes. Check "
            "--num-classes."
        )
    scores = loaded.probabilities(logits)
    maps, pictures = explanation.maps.float().cpu(), loaded.displayed(explanation.images).cpu()
    jobs, bad = [], []
    for row, (path, name) in enumerate(images):
        if not bool(torch.isfinite(logits[row]).all() and torch.isfinite(maps[row]).all()):
            bad.append(
                (
                    path,
                    f"{path}: the logits or the map have NaN or infinite values. Check the model's weights.",
                )
            )
            continue
        for column, cls in enumerate(explanation.classes[row].tolist()):
            if cls >= 0:
                jobs.append(
                    _Job(
                        path,
                        name,
                        slugs[cls],
                        cls,
                        loaded.classes[cls],
                        float(scores[row, cls]),
                        float(logits[row, cls]),
                        explanation.layer,
                        loaded.name,
                        maps[row, column],
                        pictures[row],
                    )
                )
    return jobs, bad


def _save(job: _Job, folder: Path, request: Request) -> dict[str, Any]:
    """Write the files of one map and return its line of the index."""
    sized = functional.resize(job.map[None], (job.picture.shape[-2], job.picture.shape[-1]))
    raw = (sized[0] if request.full_size else job.map).numpy()
    files = [f"{job.name}_{job.slug}.{suffix}" for suffix in request.formats]
    for file, suffix in zip(files, request.formats, strict=True):
        with writing(folder, file) as temporary:
            if suffix == "png":
                overlay = visual.overlay(job.picture[None], visual.scaled(sized)[None], request.alpha)
                # Four times as fast as Pillow's default, and the files are hardly larger.
                save_picture(visual.to_pil(overlay[0, 0]), temporary, compress_level=1)
            elif suffix == "npy":
                np.save(temporary, raw)
            else:
                np.savez_compressed(temporary, map=raw, **_about(job, request))
    return {
        "image": str(job.image),
        "name": job.name,
        "files": files,
        "class": job.cls,
        "class_name": job.class_name,
        "score": job.score,
        "logit": job.logit,
        "layer": job.layer,
        "source": request.source,
        "model": job.model,
        "size": list(raw.shape),
    }


def _about(job: _Job, request: Request) -> dict[str, Any]:
    return {
        "cls": job.cls,
        "class_name": job.class_name,
        "score": job.score,
        "logit": job.logit,
        "layer": job.layer,
        "source": request.source,
    }
