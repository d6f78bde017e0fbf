"""The batches that a training loop reads from any data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from attnguide import Recipe
from attnguide.data.procedural.faces import FaceSample
from attnguide.errors import InputError
from attnguide.pairs import IGNORE_INDEX
from attnguide_gradcam_iou.finetune._settings import whole_number

__all__ = ["Batch", "as_loader", "batches", "has_class_indices"]


class Batch(NamedTuple):
    """Images `(B, C, H, W)`; attributes; masks as `MaskPrior` takes them.

    Attributes are floats `(B, K)`, NaN where unknown, or class indices `(B,)`, −100 where unknown.
    """

    images: Tensor
    attributes: Tensor
    masks: Any = None

    @property
    def annotations(self) -> dict[str, Any]:
        """Annotations for `guide.loss`."""
        return {} if self.masks is None else {"mask": self.masks}

    @property
    def painted(self) -> bool:
        """Whether any sample has its own mask; a mask of NaN or −1 means "none"."""
        if isinstance(self.masks, Tensor):
            return bool((self.masks >= 0).any())
        return self.masks is not None and any(mask is not None for mask in self.masks)


def batches(loader: DataLoader[Any], device: torch.device) -> Iterator[Batch]:
    """Read batches, and move images and attributes to a device.

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
        moved = images.as_subclass(Tensor).to(device, non_blocking=True)
        yield Batch(moved, attributes.to(device, non_blocking=True), *parts[2:])


def has_class_indices(loader: DataLoader[Any], device: torch.device) -> bool:
    """Whether the data give a class index for each image, instead of attributes."""
    first = next(batches(loader, device), None)
    return first is not None and first.attributes.ndim == 1


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
