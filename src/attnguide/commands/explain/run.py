"""Explains many images: files are read ahead, batches explained, and maps written in parallel."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
from attnguide.capture.logits import find_logits
from attnguide.capture.model_state import evaluating
from attnguide.commands.explain.index import Index, writing
from attnguide.commands.explain.names import class_slugs
from attnguide.commands.explain.targets import Target
from attnguide.data.images import save_picture
from attnguide.errors import AttnGuideError, DataError, InputError
from attnguide.explanation import Explanation, explain
from attnguide.models import LoadedModel
from attnguide.pairs import Evidence

__all__ = ["Request", "explain_files"]

_WORKERS = 4
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


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


def explain_files(
    loaded: LoadedModel,
    images: Sequence[tuple[Path, str]],
    request: Request,
    index: Index,
    advance: Callable[[int], None],
) -> list[tuple[Path, str]]:
    """Explain image files and write the maps into the folder of the index.

    Args:
        loaded: The model.
        images: Files, each with the name of its output files.
        request: Settings of the run.
        index: Receives a line for each map.
        advance: Called with the number of images that are done.

    Returns:
        The images that could not be explained, with the reasons.

    Raises:
        AttnGuideError: If nothing can be explained at all: an unknown layer, no memory, no space on the disk.
    """
    loaded.model.to(request.device)
    slugs = class_slugs(loaded.classes)
    skipped = []
    with _pool() as pool:
        try:
            for batch in _read_ahead(pool, loaded.read, images, request.batch_size):
                good, tensors = [], []
                for (path, name), future in batch:
                    try:
                        tensors.append(future.result())
                        good.append((path, name))
                    except DataError as error:
                        skipped.append((path, str(error)))
                if good:
                    explanation = _explained(loaded, torch.stack(tensors), request)
                    jobs, bad = _jobs(loaded, good, explanation, slugs)
                    saved = pool.map(lambda job: _save(job, index.folder, request), jobs)
                    # Image by image: after an interruption one is done only if all of its maps are there.
                    for _, lines in groupby(saved, key=lambda line: line["name"]):
                        index.add(list(lines))
                    skipped += bad
                advance(len(batch))
                # The warning of a slow source is about one batch; from now on the progress shows the time.
                warnings.filterwarnings("ignore", "slow source")
        finally:
            index.write()
    return skipped


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


_Read = list[tuple[tuple[Path, str], "Future[Tensor]"]]


def _read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[Path], Tensor], images: Sequence[tuple[Path, str]], size: int
) -> Iterator[_Read]:
    """Yield batches of images, and start to read the next batch before it is needed."""
    ahead: deque[_Read] = deque()
    for start in range(0, len(images), size):
        ahead.append([(image, pool.submit(read, image[0])) for image in images[start : start + size]])
        if len(ahead) > 1:
            yield ahead.popleft()
    yield from ahead


def _explained(loaded: LoadedModel, images: Tensor, request: Request) -> Explanation:
    images = images.to(request.device)
    try:
        logits = None
        if request.target.needs_logits:
            with torch.no_grad(), evaluating(loaded.model):
                logits = find_logits(loaded.model(images))
        # At the layer's own size: a thousand classes at the size of the image would fill the memory.
        return explain(
            loaded.model,
            images,
            request.source,
            request.target.of(logits),
            request.layer,
            None,
            evidence=request.evidence,
        )
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or any(text in str(error).lower() for text in _NO_MEMORY):
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
                # Three times as fast as Pillow's default, and the files are hardly larger.
                save_picture(visual.to_pil(overlay[0, 0]), temporary, compress_level=3)
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
