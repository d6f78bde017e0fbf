"""Reads the images of a training with their masks, in batches that depend on seed, epoch and number alone."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from attnguide.data.images import image_size, read_image
from attnguide.errors import AttnGuideError, InputError
from attnguide.evaluation.evaluate import MaskFor, preprocess_mask
from attnguide.masks.folders import read_mask
from attnguide.masks.inside import Inside
from attnguide.masks.sizes import check_fit, resize
from attnguide.models import LoadedModel
from attnguide.training.listing import Sample
from attnguide.training.settings import AugmentSettings

__all__ = ["Batch", "Images", "Loader", "seed_of", "seeding", "unseeded"]

#: Annotations that transforms move along with the image.
_MOVED = ("boxes", "landmarks")


class Batch(NamedTuple):
    """Images `(B, C, H, W)`, labels, and what a prior reads.

    Labels are class indices `(B,)`, −100 where unknown, or floats `(B, K)`, NaN where unknown.
    """

    images: Tensor
    labels: Tensor
    annotations: Mapping[str, Any] = {}

    def to(self, device: torch.device) -> Batch:
        """Move images and labels to a device; annotations are moved by the priors that read them."""
        mask = self.annotations.get("mask")
        moved = {"mask": mask.to(device, non_blocking=True)} if isinstance(mask, Tensor) else {}
        return Batch(
            self.images.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            {**self.annotations, **moved},
        )


def seed_of(*numbers: int) -> int:
    """Mix numbers that say when and where random numbers are used into a seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seeding(*numbers: int) -> None:
    """Seed all generators of the process; so a checkpoint needs to hold the state of none."""
    seed = seed_of(*numbers)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def unseeded() -> Iterator[None]:
    """Give the process its random state back at the end."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


class Images(Dataset[Any]):
    """Image files with labels and annotations, varied at random or as the model's own preprocessing has them.

    Args:
        samples: The files.
        loaded: The model, whose preprocessing is used.
        mask_for: Returns the mask of an image and class; None if the prior reads none.
        inside: Values that are inside in masks that a table names.
        augment: How images are varied; None for the model's own preprocessing alone.
        annotations: Names of what the prior reads, other than `mask`.
        reads_masks: Whether it reads masks.
        seed: Seed of the variation.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        loaded: LoadedModel,
        *,
        mask_for: MaskFor | None = None,
        inside: Inside | None = None,
        augment: AugmentSettings | None = None,
        annotations: Sequence[str] = (),
        reads_masks: bool = True,
        seed: int = 0,
    ) -> None:
        self.samples, self.loaded, self.mask_for, self.inside = samples, loaded, mask_for, inside
        self.annotations, self.seed, self.reads_masks = tuple(annotations), seed, reads_masks
        if augment is None and any(name in _MOVED for name in annotations):
            augment = AugmentSettings(crop=1.0, flip=0.0)  # moves boxes and landmarks as the images
        self._transform = None if augment is None else _transform(augment, loaded)
        others = [name for name in annotations if name not in _MOVED]
        if augment is not None and augment.moves and others:
            raise InputError(
                f"augment moves what is in an image, and cannot move {others[0]}= along. Give augment = "
                '"none", or augment = { crop = 1.0, flip = 0.0 }.'
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """Return the sample of an epoch and a number; an error as it is, since workers would wrap it."""
        epoch, number = key
        try:
            with torch.random.fork_rng(devices=[]):
                # Images are read on the CPU; the generators of accelerators stay as they are.
                torch.default_generator.manual_seed(seed_of(self.seed, epoch, number))
                return self._read(self.samples[number])
        except AttnGuideError as error:
            return error

    def _read(self, sample: Sample) -> tuple[Tensor, int | tuple[float, ...], dict[str, Any]]:
        picture = read_image(sample.path)
        masks = self._masks(sample) if self.reads_masks else {}
        moved = {
            name: None if (value := sample.annotations.get(name)) is None else _wrapped(name, value, picture)
            for name in self.annotations
        }
        if self._transform is None:
            image = self.loaded.prepared(picture, sample.path)
            planes = {cls: preprocess_mask(self.loaded, mask, picture.size) for cls, mask in masks.items()}
        else:
            stacked = [resize(mask, (picture.height, picture.width), sample.path) for mask in masks.values()]
            planes_in = tv_tensors.Mask(torch.stack(stacked)) if stacked else None
            image, planes_out, moved = self._transform(picture, planes_in, moved)
            planes = (
                {} if planes_out is None else dict(zip(masks, planes_out.as_subclass(Tensor), strict=True))
            )
        found = {cls: plane for cls, plane in planes.items() if bool(plane.any())}
        annotations = {**moved, "mask": found} if self.reads_masks else moved
        return image.as_subclass(Tensor), sample.label, annotations

    def annotated(self, most: int) -> list[int]:
        """Numbers of images that have what the prior reads, at most so many, of all classes.

        Raises:
            DataError: If a mask cannot be read.
        """
        order = np.random.default_rng(self.seed).permutation(len(self.samples))
        found = (int(number) for number in order if self._is_annotated(self.samples[number]))
        return sorted(islice(found, most))

    def _is_annotated(self, sample: Sample) -> bool:
        if self.reads_masks and any(bool(mask.any()) for mask in self._masks(sample).values()):
            return True
        others = self.annotations
        return not self.reads_masks and all(sample.annotations.get(name) is not None for name in others)

    def subset(self, numbers: Sequence[int]) -> Images:
        """Return some of the images."""
        return self.of([self.samples[number] for number in numbers])

    def of(self, samples: Sequence[Sample]) -> Images:
        """Return other images, read in the same way."""
        other = copy.copy(self)
        other.samples = samples
        return other

    def _masks(self, sample: Sample) -> dict[int, Tensor]:
        """The masks of the sample's classes, or the predicted one."""
        own = self.own_masks(sample)
        if own or sample.completed is None or not sample.completed.exists():
            return own
        return {-1: read_mask(sample.completed)}

    def own_masks(self, sample: Sample) -> dict[int, Tensor]:
        """Read the masks of the sample's classes that were given; key −1 for one that is every class's.

        Raises:
            DataError: If a mask cannot be read, or does not fit the image.
        """
        if sample.mask is not None:
            own = read_mask(sample.mask, inside=self.inside)
            check_fit(own.shape, image_size(sample.path), sample.mask, sample.path)
            return {-1: own}
        if self.mask_for is None or sample.label == -100:
            return {}
        classes = [sample.label] if isinstance(sample.label, int) else range(len(sample.label))
        found = {cls: mask for cls in classes if (mask := self.mask_for(sample.path, cls)) is not None}
        first = next(iter(found.values()), None)
        if first is not None and (
            isinstance(sample.label, int)
            or (len(found) == len(sample.label) and all(torch.equal(first, mask) for mask in found.values()))
        ):
            return {-1: first}
        return found


def _transform(augment: AugmentSettings, loaded: LoadedModel) -> v2.Transform:
    size = list(loaded.size)
    bicubic = v2.InterpolationMode.BICUBIC
    steps: list[v2.Transform] = []
    if augment.crop < 1:
        steps.append(
            v2.RandomResizedCrop(size, scale=(augment.crop, 1.0), interpolation=bicubic, antialias=True)
        )
    else:
        steps += [v2.Resize(max(size), interpolation=bicubic, antialias=True), v2.CenterCrop(size)]
    if augment.rotate:
        steps.append(v2.RandomRotation(augment.rotate, v2.InterpolationMode.BILINEAR))
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip(augment.flip))
    if augment.jitter:
        steps.append(v2.ColorJitter(augment.jitter, augment.jitter, augment.jitter))
    steps += [v2.ToImage(), v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
    return v2.Compose([*steps, v2.Normalize(list(loaded.mean), list(loaded.std))])


def _wrapped(name: str, value: Tensor, picture: Image.Image) -> Tensor:
    """Numbers in pixels of an image file as transforms move them along."""
    canvas, found = (picture.height, picture.width), value
    if name == "boxes":
        found = tv_tensors.BoundingBoxes(value.reshape(-1, 4), format="XYXY", canvas_size=canvas)
    if name == "landmarks":
        found = tv_tensors.KeyPoints(value.reshape(-1, 2), canvas_size=canvas)
    return found


def _collate(items: Sequence[Any]) -> Batch | AttnGuideError:
    """Make a batch of samples; an error instead if there is one."""
    error = next((item for item in items if isinstance(item, AttnGuideError)), None)
    if error is not None:
        return error
    images = torch.stack([image for image, _, _ in items])
    labels = torch.tensor([label for _, label, _ in items])
    names = [name for name in items[0][2] if name != "mask"]
    annotations: dict[str, Any] = {}
    for name in names:
        values = [_trimmed(parts[name], images.shape) for _, _, parts in items]
        annotations[name] = values if name in _MOVED else _joined(values)
    if "mask" not in items[0][2]:
        return Batch(images, labels, annotations)
    masks = [parts["mask"] for _, _, parts in items]
    if all(set(each) <= {-1} for each in masks):
        missing = torch.full(images.shape[-2:], math.nan)
        annotations["mask"] = torch.stack([each.get(-1, missing) for each in masks])
    else:
        count = labels.shape[1]
        annotations["mask"] = [
            (dict.fromkeys(range(count), each[-1]) if -1 in each else each) or None for each in masks
        ]
    return Batch(images, labels, annotations)


def _joined(values: list[Tensor | None]) -> Any:
    """Make one tensor of values of one shape, NaN where there is none; None if there is none at all."""
    given = [value for value in values if value is not None]
    if not given:
        return None
    if any(value.shape != given[0].shape for value in given):
        return values
    missing = torch.full_like(given[0], math.nan)
    return torch.stack([missing if value is None else value for value in values])


def _trimmed(value: Any, shape: Sequence[int]) -> Any:
    """Keep the boxes of which something is left in the image."""
    if isinstance(value, tv_tensors.BoundingBoxes):
        value = value.as_subclass(Tensor)
        left = (value[:, 2] - value[:, 0] > 1) & (value[:, 3] - value[:, 1] > 1)
        return value[left] if bool(left.any()) else None
    return value.as_subclass(Tensor) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Loader:
    """The batches of an epoch, the same for any number of processes and parts together.

    An epoch is divided evenly into steps of at most `batch_size` images; process `rank` of `world` gets its
    share of a step, in `parts` parts.

    Attributes:
        images: The images.
        batch_size: Largest number of images of a step.
        seed: Seed of the order; None keeps it.
        workers: Number of processes that read.
        rank: Number of this process.
        world: Number of processes.
        parts: Number of parts of a step.

    Raises:
        InputError: If a step has too few images for all processes and parts.
    """

    images: Images
    batch_size: int
    seed: int | None = None
    workers: int = 0
    rank: int = 0
    world: int = 1
    parts: int = 1

    def __post_init__(self) -> None:
        smallest = len(self.images) // self.steps
        if smallest < self.world * self.parts:
            raise InputError(
                f"the {len(self.images)} images are divided into steps of {smallest}, which cannot be shared "
                "by "
                f"{self.world} processes in {self.parts} parts. Lower train.accumulate, or raise "
                "train.batch_size."
            )

    @property
    def steps(self) -> int:
        """Number of steps of an epoch."""
        return max(1, math.ceil(len(self.images) / self.batch_size))

    def epoch(self, number: int, start: int = 0) -> Iterator[list[Batch]]:
        """Read an epoch, from a step on.

        Raises:
            DataError: If an image or a mask cannot be read.
        """
        order = np.arange(len(self.images))
        if self.seed is not None:
            order = np.random.default_rng((self.seed, number)).permutation(len(self.images))
        own = [
            [(number, int(index)) for index in step[self.rank * self.parts + part :: self.world * self.parts]]
            for step in np.array_split(order, self.steps)[start:]
            for part in range(self.parts)
        ]
        # Its own generator, since a loader draws a seed for its workers from the process's.
        loader = DataLoader(
            self.images,
            batch_sampler=own,
            collate_fn=_collate,
            num_workers=self.workers,
            generator=torch.Generator(),
        )
        parts: list[Batch] = []
        for batch in loader:
            if isinstance(batch, AttnGuideError):
                raise batch
            parts.append(batch)
            if len(parts) == self.parts:
                yield parts
                parts = []

    def single(self) -> Iterator[Batch]:
        """Read the images once, in their order and one batch at a time."""
        for parts in self.epoch(-1 % 2**32):
            yield from parts
