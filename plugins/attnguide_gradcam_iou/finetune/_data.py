"""The batches that a training loop reads from any data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from attnguide import Guide, Recipe
from attnguide.capture.logits import find_logits
from attnguide.capture.model_state import evaluating
from attnguide.data.procedural import FaceSample
from attnguide.errors import InputError
from attnguide.pairs import IGNORE_INDEX
from attnguide.priors import MaskPrior
from attnguide.training import Batch
from attnguide_gradcam_iou.finetune._settings import whole_number

__all__ = ["as_loader", "batches", "check_data", "has_class_indices"]


def batches(loader: DataLoader[Any]) -> Iterator[Batch]:
    """Read batches.

    Raises:
        InputError: If the data do not have the form `(image, attributes)` or `(image, attributes, mask)`.
    """
    for batch in loader:
        parts = batch[:2] if isinstance(batch, FaceSample) else batch
        if not isinstance(parts, (tuple, list)) or len(parts) not in (2, 3):
            got = f"{len(parts)} parts" if isinstance(parts, (tuple, list)) else type(parts).__name__
            raise InputError(
                f"the data give {got}, expected (image, attributes) or (image, attributes, mask)."
            )
        images, attributes = parts[0], parts[1]
        if not isinstance(images, Tensor) or images.ndim != 4 or not isinstance(attributes, Tensor):
            raise InputError(
                f"the data give {_kind(images)} and {_kind(attributes)}, expected images (B, C, H, W) and "
                "attributes (B, K) as tensors. Does the data set lack a transform?"
            )
        attributes = attributes.as_subclass(Tensor)
        if attributes.ndim != 1 or attributes.is_floating_point() or attributes.dtype == torch.bool:
            attributes = attributes.float()
            attributes = attributes[:, None] if attributes.ndim == 1 else attributes
            attributes = attributes.masked_fill(attributes == IGNORE_INDEX, torch.nan)
        yield Batch(images.as_subclass(Tensor), attributes, {"mask": parts[2]} if len(parts) == 3 else {})


def check_data(guide: Guide, loader: DataLoader[Any], device: torch.device) -> None:
    """Refuse data that do not fit the model, and a guidance that reaches no weight.

    Raises:
        InputError: If the data do not fit.
        GuidanceError: If the guidance reaches no weight.
    """
    prior, model = guide.terms[0].prior, guide.model
    has_template = isinstance(prior, MaskPrior) and prior.template is not None
    needs_masks = prior == "mask" or (isinstance(prior, MaskPrior) and prior.template is None)
    for batch in batches(loader):
        batch, masks = batch.to(device), batch.annotations.get("mask")
        if masks is not None and has_template:
            raise InputError("the data give masks, and there is a template too. Give one of them.")
        if masks is None and needs_masks:
            raise InputError(
                "there are no regions to look at. Give template=, or data of (image, attributes, mask)."
            )
        if needs_masks and not _painted(masks):
            continue  # masks may be rare
        with torch.no_grad(), evaluating(model):
            count = find_logits(model(batch.images)).shape[1]
        if batch.labels.ndim == 1 and int(batch.labels.max()) >= count:
            raise InputError(
                f"the data give class {int(batch.labels.max())}, but the model has {count} outputs. "
                f"Give it a head: with_head(model, {int(batch.labels.max()) + 1})."
            )
        if batch.labels.ndim == 2 and batch.labels.shape[1] != count:
            raise InputError(
                f"attributes have shape {tuple(batch.labels.shape)}, but the model has {count} "
                f"outputs. Give it a head: with_head(model, {batch.labels.shape[-1]})."
            )
        if any(term.weight > 0 for term in guide.terms):
            guide.check(batch.images, batch.labels, **batch.annotations)
        return
    raise InputError("no sample of the training data has a mask, or there is no sample.")


def _painted(masks: Any) -> bool:
    """Whether any sample has its own mask; a mask of NaN or −1 means "none"."""
    if isinstance(masks, Tensor):
        return bool((masks >= 0).any())
    return masks is not None and any(mask is not None for mask in masks)


def has_class_indices(loader: DataLoader[Any]) -> bool:
    """Whether the data give a class index for each image, instead of attributes."""
    first = next(batches(loader), None)
    return first is not None and first.labels.ndim == 1


def as_loader(
    data: Any, name: str, batch_size: int | None, recipe: Recipe, seed: int | None = None
) -> DataLoader[Any]:
    """Make a loader of a data set, shuffled if a seed is given; a loader is returned as it is.

    Raises:
        InputError: If the data are neither, there are no samples, or a loader comes with a batch size.
    """
    if isinstance(data, DataLoader):
        if batch_size is not None:
            raise InputError(f"{name} is a loader, which has its own batch size. Leave out batch_size=.")
        return data
    size = whole_number("batch_size", batch_size, recipe)
    if isinstance(data, IterableDataset):
        return DataLoader(data, size)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or not len(data):
        raise InputError(f"{name} must be a data set of at least one sample or a DataLoader, got {data!r}.")
    if seed is None:
        return DataLoader(data, size)
    # Batch normalisation cannot train on a single image.
    single = len(data) > size and len(data) % size == 1
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, size, shuffle=True, drop_last=single, generator=generator)


def _kind(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
