"""Measures classifiers, and compares them, by maps that were stored, without running them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from attnguide import functional, metrics, visual
from attnguide.capture.model_state import weights_digest
from attnguide.data._addresses import is_remote
from attnguide.data.images import image_size
from attnguide.data.maps import MapRow, Maps
from attnguide.dataset import preprocessing_of
from attnguide.errors import DataError, InputError
from attnguide.evaluation.compare import Change, Comparison, Overlays, collect_changes
from attnguide.evaluation.evaluate import (
    ClassResult,
    Evaluation,
    ImageResult,
    LabeledImage,
    MaskFor,
    preprocess_mask,
)
from attnguide.masks.class_names import ClassNames
from attnguide.models import LoadedModel

__all__ = ["compare_maps", "draw_maps", "evaluate_maps", "missing_images"]


def evaluate_maps(
    maps: Maps,
    loaded: LoadedModel,
    images: Sequence[LabeledImage],
    mask_for: MaskFor,
    *,
    threshold: float = 0.5,
    advance: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Measure accuracy, and compare stored maps with masks.

    Args:
        maps: What [`read_maps`][attnguide.read_maps] gives, of all classes of each image.
        loaded: The model that they were made with.
        images: The files.
        mask_for: Returns the mask of an image.
        threshold: Threshold of the IoU.
        advance: Called with the number of images that are done.

    Returns:
        The same as [`evaluate_folder`][attnguide.evaluation.evaluate_folder] gives, to the precision of the
        stored maps, without the gradient of the images, which is not stored. Images without a map are among
        the failures.

    Raises:
        InputError: If the maps are of another model, or not of all classes.
    """
    result = Evaluation({name: ClassResult() for name in loaded.classes})
    records = _records(maps, loaded, images, mask_for, threshold, result.failures, result.empty)
    for record in records:
        result.classes[loaded.classes[record.image.cls]].add(record)
        advance(1)
    return result


def compare_maps(
    before: Maps,
    after: Maps,
    models: tuple[LoadedModel, LoadedModel],
    images: Sequence[LabeledImage],
    mask_for: MaskFor,
    *,
    group_of: Callable[[Path], str | None] = lambda path: None,
    threshold: float = 0.5,
    advance: Callable[[int], None] = lambda count: None,
) -> Comparison:
    """Compare two states of a model by their stored maps.

    Args:
        before: Maps of the model before, of all classes of each image.
        after: Maps of the model after.
        models: The models that they were made with.
        images: The files, and those of [`missing_images`][attnguide.evaluation.missing_images].
        mask_for: Returns the mask of an image.
        group_of: Returns the group of an image, or None.
        threshold: Threshold of the IoU.
        advance: Called with the number of images that are done, of both.

    Returns:
        The same as [`compare_folder`][attnguide.evaluation.compare_folder] gives, to the precision of the
        stored maps, without the gradient of the images. Images without a map are among the failures. Images
        that are no longer there have predictions, and no scores.

    Raises:
        InputError: If the maps are of other models, not of all classes, or made in two ways.
    """
    for key in ("source", "layer", "evidence"):
        if before.settings[key] != after.settings[key]:
            raise InputError(
                f"{before.address} and {after.address} hold maps made in two ways: {key} is "
                f"{before.settings[key]!r} and {after.settings[key]!r}. Make both in the same way."
            )
    failures: dict[Path, str] = {}
    empty: list[Path] = []
    first = {
        record.image.path: record
        for record in _records(before, models[0], images, mask_for, threshold, failures, empty, advance)
    }
    second = {
        record.image.path: record
        for record in _records(after, models[1], images, mask_for, threshold, failures, [], advance)
    }
    both = [image.path for image in images if image.path in first and image.path in second]
    changes = (Change(first[path], second[path]) for path in both)
    result = collect_changes(models[0].classes, changes, failures, empty, group_of)
    result.gone = [path for path in both if not path.exists()]
    return result


def missing_images(maps: Maps, loaded: LoadedModel, root: Path) -> list[LabeledImage]:
    """List images of a folder that has a subfolder for each class, which have maps but are no longer there.

    Args:
        maps: Their maps.
        loaded: The model, whose classes the subfolders are.
        root: The folder.
    """
    folder, names = root.resolve(), ClassNames(loaded.classes)
    found: dict[Path, LabeledImage] = {}
    for batch in maps.batches(["key"]):
        for key in dict.fromkeys(batch.column("key").to_pylist()):
            path = Path(key).resolve()
            if is_remote(key) or not path.is_relative_to(folder) or path in found or path.exists():
                continue
            inside = path.relative_to(folder)
            name = names.find(inside.parts[0]) if len(inside.parts) > 1 else None
            if name is not None:
                found[path] = LabeledImage(root / inside, loaded.classes.index(name))
    return list(found.values())


def draw_maps(
    before: Maps,
    after: Maps,
    loaded: LoadedModel,
    images: Sequence[LabeledImage],
    mask_for: MaskFor,
) -> dict[Path, Overlays]:
    """Lay stored maps over a few images, as [`draw_overlays`][attnguide.evaluation.draw_overlays] does.

    Args:
        before: Maps of the model before.
        after: Maps of the model after.
        loaded: One of the models, for its preprocessing.
        images: The files; if one is no longer there, its maps are drawn alone.
        mask_for: Returns the mask of an image.

    Returns:
        Overlays by file.
    """
    rows = [_own_rows(maps, images) for maps in (before, after)]
    drawn: dict[Path, Overlays] = {}
    for image in images:
        shown, mask = None, None
        with suppress(DataError):  # it was there when it was explained
            shown = loaded.displayed(loaded.read(image.path)[None])
            mask = _mask(loaded, image, mask_for)
        size = loaded.size if shown is None else (shown.shape[-2], shown.shape[-1])
        pictures = []
        for own in rows:
            unit = functional.unit(functional.resize(torch.from_numpy(own[image.path].map)[None], size))
            pixels = visual.colorize(unit)[0] if shown is None else visual.overlay(shown, unit[None])[0, 0]
            pictures.append(visual.to_pil(pixels))
        layer = rows[0][image.path].layer or ""
        drawn[image.path] = Overlays(pictures[0], pictures[1], mask, layer, gone=shown is None)
    return drawn


def _own_rows(maps: Maps, images: Sequence[LabeledImage]) -> dict[Path, MapRow]:
    """Return the map of each image's own class."""
    import pyarrow.compute as pc

    wanted = {str(image.path.resolve()): image for image in images}
    keys = {
        key
        for batch in maps.batches(["key"])
        for key in batch.column("key").to_pylist()
        if str(Path(key).resolve()) in wanted
    }
    found = {}
    for row in maps.where(pc.field("key").isin([*keys])):
        image = wanted[str(Path(row.key).resolve())]
        if row.index == image.cls and row.map is not None:
            found[image.path] = row
    return found


def _records(
    maps: Maps,
    loaded: LoadedModel,
    images: Sequence[LabeledImage],
    mask_for: MaskFor,
    threshold: float,
    failures: dict[Path, str],
    empty: list[Path],
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[ImageResult]:
    """Measure images by their maps, in the order of these."""
    _check(maps, loaded)
    wanted = {str(image.path.resolve()): image for image in images}
    for key, group in groupby(maps, key=lambda row: row.key):
        image = wanted.pop(str(Path(key).resolve()), None)
        if image is not None:
            try:
                yield _measured(loaded, image, list(group), mask_for, threshold, empty)
            except DataError as error:
                failures[image.path] = str(error)
            advance(1)
    for image in wanted.values():
        failures[image.path] = f"{image.path} has no map in {maps.address}. Explain the folder again."


def _check(maps: Maps, loaded: LoadedModel) -> None:
    settings = maps.settings
    if settings["targets"] != "all":
        raise InputError(
            f"the maps in {maps.address} are of the classes {settings['targets']!r}; the map of an "
            "image's own class and the probabilities of all are needed. Make them with --target all."
        )
    if settings["weights"] != weights_digest(loaded.model) or settings["preprocessing"] != preprocessing_of(
        loaded
    ):
        raise InputError(
            f"the maps in {maps.address} were made with {settings['model']}, with other weights or "
            f"preprocessing than {loaded.name} has here. Give the same model and weights."
        )


def _measured(
    loaded: LoadedModel,
    image: LabeledImage,
    rows: Sequence[MapRow],
    mask_for: MaskFor,
    threshold: float,
    empty: list[Path],
) -> ImageResult:
    """Measure one image, of which there is a row for each class."""
    by_class = {row.index: row for row in rows}
    own = by_class.get(image.cls)
    if own is None or own.map is None or own.score is None:
        raise DataError(rows[0].error or f"{image.path} has no map of its class.")
    best = max(rows, key=lambda row: row.logit if row.logit is not None else float("-inf"))
    mask = _mask(loaded, image, mask_for) if image.path.exists() else None
    if mask is not None and not bool(mask.any()):
        empty.append(image.path)
        mask = None
    scores = {} if mask is None else dict(_scores(torch.from_numpy(own.map), mask, threshold))
    return ImageResult(image, int(best.index or 0), float(best.score or 0), own.score, scores)


def _mask(loaded: LoadedModel, image: LabeledImage, mask_for: MaskFor) -> Tensor | None:
    """Return the mask of an image as the model sees it."""
    mask = mask_for(image.path, image.cls)
    if mask is None:
        return None
    height, width = image_size(image.path)
    return preprocess_mask(loaded, mask, (width, height))


def _scores(raw: Tensor, mask: Tensor, threshold: float) -> Iterator[tuple[str, float]]:
    sized, masks = functional.resize(raw[None], (mask.shape[-2], mask.shape[-1])), mask[None]
    yield "energy", metrics.energy_in_mask(sized, masks).item()
    yield "iou", metrics.iou(sized, masks, threshold=threshold).item()
    yield "pointing", metrics.pointing_game(sized, masks).item()
    yield "area", mask.mean().item()
