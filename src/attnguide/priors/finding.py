"""What priors have in common that find the region in the images themselves, with a model of their own."""

from __future__ import annotations

import copy
import hashlib
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from attnguide import functional
from attnguide.capture.model_state import unwrap
from attnguide.data.files import atomic_write
from attnguide.data.images import load_image
from attnguide.errors import InputError
from attnguide.interfaces import PriorMaps, TargetPrior
from attnguide.models.loaded_model import LoadedModel
from attnguide.models.preprocessing import preprocessing_of
from attnguide.pairs import Pairs
from attnguide.trace import Trace

__all__ = ["IMAGENET", "FindingPrior", "Normalization", "normalization_of", "own_copy", "renormalized"]

#: Mean and standard deviation of each channel, which were subtracted from images in [0, 1] and divided by.
Normalization = tuple[Sequence[float], Sequence[float]]
IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class FindingPrior(TargetPrior):
    """A prior that needs no annotation: it finds the region in the image.

    A pair drops out (weight 0) if no region is found. Nothing that it computes has a gradient.

    Args:
        cache: Folder in which each region is kept as a PNG file, so that the model of the prior runs once for
            an image and not once an epoch. Files are named by the image's content and the settings: with
            random augmentation each image is a new one, and regions are better written beforehand, by
            `attnguide masks`. An image without a region has a black file.

    Attributes:
        by_class: Whether each class has a region of its own.
        names: Names of the guided model's classes, where they are known; a training sets them.
        normalization: Mean and standard deviation of the images that the guided model sees, where they are
            known; a training sets them, too.
        found: Number of pairs so far that had a region.
        missing: Number of pairs so far that had none.
    """

    by_class: bool = False
    names: Sequence[str] = ()
    normalization: Normalization | None = None

    def __init__(self, cache: str | Path | None = None) -> None:
        self.cache = None if cache is None else Path(cache)
        self.found, self.missing = 0, 0
        self._warned = False
        #: Digest of the settings, taken once: they hold the weights of a model that stays as it is.
        self._digest: str | None = None

    @abstractmethod
    def find(self, images: Tensor, classes: Tensor) -> PriorMaps:
        """Find the region in each image.

        Args:
            images: `(N, C, H, W)`, as the guided model sees them.
            classes: Class of each image, `(N,)`.

        Returns:
            Maps `(N, h, w)` in [0, 1] of any resolution, and weights `(N,)`: 0 where there is no region.
        """

    def prepare(self, model: nn.Module | None, classes: int) -> None:
        """Get ready for a guided model with a number of classes; called before the first images."""

    def settings(self) -> str:
        """Return what the regions depend on, for the names of files in the cache."""
        return repr(self)

    def __call__(self, trace: Trace, pairs: Pairs, size: tuple[int, int]) -> PriorMaps:
        """Find the region of each pair, once for images that have several pairs, and resize it."""
        self.prepare(trace.model, trace.logits.shape[1])
        images = trace.images.detach()
        wanted = torch.stack([pairs.sample, pairs.cls if self.by_class else torch.zeros_like(pairs.cls)], 1)
        unique, index = torch.unique(wanted, dim=0, return_inverse=True)
        with torch.no_grad():
            maps, weights = self._cached(images[unique[:, 0]], unique[:, 1], size)
        maps, weights = maps[index].to(images.device), weights[index].to(images.device)
        self._count(weights)
        return PriorMaps(maps, weights)

    def _count(self, weights: Tensor) -> None:
        missing = int((weights == 0).sum())
        self.found, self.missing = self.found + len(weights) - missing, self.missing + missing
        if missing and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__} finds no region for {missing} of {len(weights)} pairs of this batch; "
                "they are left out, and the prior's `missing` counts them from now on.",
                stacklevel=2,
            )

    def _cached(self, images: Tensor, classes: Tensor, size: tuple[int, int]) -> PriorMaps:
        """Take regions from the cache, and find those that are not in it."""
        if self.cache is None:
            maps, weights = self.find(images, classes)
            return PriorMaps(functional.resize(maps.float(), size).clamp(0, 1), weights)
        files = [self._file(image, cls) for image, cls in zip(images, classes.tolist(), strict=True)]
        new = [number for number, file in enumerate(files) if not file.is_file()]
        if new:
            maps, weights = self.find(images[new], classes[new])
            for number, plane, weight in zip(new, maps, weights.tolist(), strict=True):
                _write(files[number], plane if weight else torch.zeros_like(plane))
        read = [_read(file) for file in files]
        sized = torch.cat([functional.resize(plane[None], size) for plane in read])
        present = torch.tensor([float(bool(plane.any())) for plane in read])
        return PriorMaps(sized.to(images.device), present.to(images.device))

    def _file(self, image: Tensor, cls: int) -> Path:
        if self._digest is None:
            self._digest = self.settings()
        digest = hashlib.sha256(self._digest.encode())
        digest.update(image.float().cpu().contiguous().numpy().tobytes())
        suffix = f"_{cls}" if self.by_class else ""
        return (self.cache or Path()) / f"{digest.hexdigest()[:24]}{suffix}.png"


def _write(file: Path, plane: Tensor) -> None:
    levels = (plane.float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {file.parent}: {error.strerror}.") from error
    with atomic_write(file) as temporary:
        Image.fromarray(levels).save(temporary, "PNG")


def _read(file: Path) -> Tensor:
    return torch.from_numpy(np.array(load_image(file).convert("L"))).float() / 255


def own_copy(model: Any) -> nn.Module:
    """Return a copy of a model that nothing guides or trains, in evaluation mode.

    Raises:
        InputError: If it is not a model.
    """
    model = model.model if isinstance(model, LoadedModel) else model
    if not isinstance(model, nn.Module):
        raise InputError(f"model={model!r:.60} must be a torch.nn.Module or a LoadedModel.")
    copied = copy.deepcopy(unwrap(model)).eval().requires_grad_(False)
    for weight in copied.parameters():
        weight.grad = None
    return copied


def normalization_of(model: nn.Module | None) -> Normalization | None:
    """How the images that a model sees are normalised, as the model says itself; None if it does not."""
    try:
        known = None if model is None else preprocessing_of(model)
    except InputError:
        known = None
    return (known.mean, known.std) if known and known.mean else None


def renormalized(images: Tensor, now: Normalization, wanted: Normalization) -> Tensor:
    """Turn images `(N, C, H, W)` of one normalization into those of another."""
    (mean, std), (own_mean, own_std) = now, wanted
    a, b, c, d = (images.new_tensor(values)[:, None, None] for values in (mean, std, own_mean, own_std))
    return (images * b + a - c) / d
