"""Measures a classifier by maps that were stored, without running it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from attnguide import functional, metrics
from attnguide.capture.model_state import weights_digest
from attnguide.data.images import image_size
from attnguide.data.maps import MapRow, Maps
from attnguide.dataset import preprocessing_of
from attnguide.errors import DataError, InputError
from attnguide.evaluation.evaluate import (
    ClassResult,
    Evaluation,
    ImageResult,
    LabeledImage,
    MaskFor,
    preprocess_mask,
)
from attnguide.models import LoadedModel

__all__ = ["evaluate_maps"]


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
    _check(maps, loaded)
    result = Evaluation({name: ClassResult() for name in loaded.classes})
    wanted = {str(image.path.resolve()): image for image in images}
    for key, group in groupby(maps, key=lambda row: row.key):
        image = wanted.pop(str(Path(key).resolve()), None)
        if image is not None:
            try:
                record = _measured(loaded, image, list(group), mask_for, threshold, result.empty)
                result.classes[loaded.classes[image.cls]].add(record)
            except DataError as error:
                result.failures[image.path] = str(error)
            advance(1)
    for image in wanted.values():
        result.failures[image.path] = f"{image.path} has no stored map. Explain the folder again."
    return result


def _check(maps: Maps, loaded: LoadedModel) -> None:
    settings = maps.settings
    if settings["targets"] != "all":
        raise InputError(
            f"the maps are of the classes {settings['targets']!r}; the map of an image's own class and the "
            "probabilities of all are needed. Make them with --target all."
        )
    if settings["weights"] != weights_digest(loaded.model) or settings["preprocessing"] != preprocessing_of(
        loaded
    ):
        raise InputError(
            f"the maps were made with {settings['model']}, with other weights or preprocessing than "
            f"{loaded.name} has here. Give the same --model, --checkpoint or --pretrained."
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
    mask = mask_for(image.path, image.cls)
    if mask is not None:
        height, width = image_size(image.path)
        mask = preprocess_mask(loaded, mask, (width, height))
        if not bool(mask.any()):
            empty.append(image.path)
            mask = None
    scores = {} if mask is None else dict(_scores(torch.from_numpy(own.map), mask, threshold))
    return ImageResult(image, int(best.index or 0), float(best.score or 0), own.score, scores)


def _scores(raw: Tensor, mask: Tensor, threshold: float) -> Iterator[tuple[str, float]]:
    sized, masks = functional.resize(raw[None], (mask.shape[-2], mask.shape[-1])), mask[None]
    yield "energy", metrics.energy_in_mask(sized, masks).item()
    yield "iou", metrics.iou(sized, masks, threshold=threshold).item()
    yield "pointing", metrics.pointing_game(sized, masks).item()
    yield "area", mask.mean().item()
