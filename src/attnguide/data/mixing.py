"""Mixup and CutMix with the masks that belong to the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnguide.errors import InputError

__all__ = ["Mixed", "mix"]

#: Shares of an image below this are rounding errors.
_LEAST = 1e-5


class Mixed(NamedTuple):
    """A mixed batch.

    Attributes:
        images: Mixed images `(B, C, H, W)`.
        labels: What the mixer made of the labels, `(B, K)`, for your own loss.
        guidance: Arguments of `guide.loss`: `labels` `(B, K)` with the one or two classes of each image,
            `mask` with a mask for each of these, and `sample_weight` `(B, K)` with their shares.
    """

    images: Tensor
    labels: Tensor
    guidance: dict[str, Any]


def mix(
    mixer: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    images: Tensor,
    labels: Tensor,
    masks: Tensor | np.ndarray[Any, Any] | Sequence[Any] | None,
) -> Mixed:
    """Mix images and labels by a mixer, and find the mask and the weight of each class in each image.

    A mixed image has the class of one image, with that image's mask, and the class of the other, with the
    other's. Their weights are the shares of the two images. A mask counts where its image is to be seen, so
    that CutMix cuts masks too; a class whose region was cut away drops out. Where both images have one class,
    its region is the union of both masks, and it drops out if one of them is missing.

    ```python
    mixed = mix(v2.MixUp(num_classes=10), images, labels, masks)
    loss = criterion(model(mixed.images), mixed.labels) + guide.loss(**mixed.guidance)
    ```

    Args:
        mixer: A function of images and labels that mixes each image with at most one other of the batch:
            `Mixup` of timm, `MixUp`, `CutMix` or a `RandomChoice` of torchvision, or your own. How it mixes
            is seen from further channels that the images get: each holds one binary digit of their numbers,
            as −1 and 1.
        images: `(B, C, H, W)`, floats.
        labels: Class indices `(B,)`.
        masks: `(B, H, W)` or `(B, 1, H, W)`, of the size of the images, with NaN or −1 everywhere for a
            missing one; or a list of `(H, W)` and None; or None.

    Returns:
        The mixed batch, its masks on the CPU.

    Raises:
        InputError: If something does not fit, or the mixer does more than to mix each image with another.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise InputError(
            f"images to mix must be floats (B, C, H, W), got {tuple(images.shape)} of {images.dtype}."
        )
    batch = len(images)
    if labels.shape != (batch,) or labels.is_floating_point() or bool((labels < 0).any()):
        raise InputError(f"labels to mix must be class indices ({batch},), got {labels!r}.")
    regions = _listed(masks, (batch, images.shape[2], images.shape[3]))
    digits = _digits(batch, images)
    given = torch.cat([images.to(digits.dtype), digits.expand(-1, -1, *images.shape[2:])], dim=1)
    mixed, targets = mixer(given, labels)
    if mixed.shape != given.shape or targets.ndim != 2:
        raise InputError(
            f"the mixer made {tuple(mixed.shape)} and labels {tuple(targets.shape)} of images "
            f"{tuple(given.shape)} and labels ({batch},); the size must stay, and labels become (B, K)."
        )
    channels = images.shape[1]
    partner, share = _shares(digits, mixed[:, channels:])
    guidance = _guidance(labels.cpu(), regions, partner.cpu(), share.cpu(), targets.shape[1])
    return Mixed(mixed[:, :channels].to(images.dtype), targets, guidance)


def _listed(masks: Any, size: tuple[int, int, int]) -> list[Tensor | None]:
    """Return a mask `(H, W)` on the CPU for each image, None for none."""
    batch, *sides = size
    entries = [None] * batch if masks is None else list(masks)
    if len(entries) != batch:
        raise InputError(f"there are {len(entries)} masks for {batch} images; give None for a missing one.")
    found: list[Tensor | None] = []
    for sample, entry in enumerate(entries):
        mask = None if entry is None else torch.as_tensor(entry).detach().cpu().as_subclass(Tensor).float()
        if mask is not None and mask.shape == (1, *sides):
            mask = mask[0]
        if mask is not None and mask.shape != (*sides,):
            raise InputError(
                f"mask {sample} has shape {tuple(mask.shape)}, the images are {sides[0]}×{sides[1]}; resize "
                "masks to the size of the images before they are mixed."
            )
        missing = mask is None or bool(mask.isnan().all()) or bool((mask == -1).all())
        found.append(None if missing else mask)
    return found


def _digits(batch: int, images: Tensor) -> Tensor:
    """Return the binary digits of the numbers of images, −1 or 1, `(B, D, 1, 1)`."""
    count = max(1, (batch - 1).bit_length())
    numbers = torch.arange(batch, device=images.device)[:, None]
    bits = (numbers >> torch.arange(count, device=images.device)) & 1
    kind = torch.promote_types(images.dtype, torch.float32)
    return (2 * bits - 1).to(kind)[..., None, None]


def _shares(digits: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
    """Find out how images were mixed: the partner of each, `(B,)`, and the share of its own, `(B, H, W)`."""
    # A digit changes where the partner's differs from one's own.
    changed = ((mixed - digits).abs() > 2 * _LEAST).flatten(2).any(dim=2)
    places = torch.arange(digits.shape[1], device=digits.device)
    numbers = torch.arange(len(digits), device=digits.device)
    partner = numbers ^ (changed.long() << places).sum(dim=1)
    seen = changed.long().argmax(dim=1)
    share = (mixed[numbers, seen] * digits[numbers, seen] + 1) / 2
    share = torch.where((1 - share) < _LEAST, 1.0, torch.where(share < _LEAST, 0.0, share))
    known = partner < len(digits)
    other = digits[torch.where(known, partner, numbers)]
    expected = share[:, None] * digits + (1 - share[:, None]) * other
    if not bool(known.all()) or not bool(((mixed - expected).abs() < 1e-3).all()):
        raise InputError(
            "the mixer does more than to mix each image with another one of the batch: moved, normalized or "
            "several images cannot be told apart. Do that before or after."
        )
    return partner, share


def _guidance(
    labels: Tensor, regions: Sequence[Tensor | None], partner: Tensor, share: Tensor, classes: int
) -> dict[str, Any]:
    batch = len(labels)
    weight = torch.zeros(batch, classes)
    masks: list[dict[int, Tensor] | None] = []
    for sample in range(batch):
        other, own = int(partner[sample]), share[sample]
        parts: dict[int, list[tuple[Tensor | None, Tensor]]] = {}
        for number, part in ((sample, own), (other, 1 - own)):
            if float(part.mean()) > 0:
                weight[sample, labels[number]] += part.mean()
                parts.setdefault(int(labels[number]), []).append((regions[number], part))
        found = {cls: _union(seen) for cls, seen in parts.items()}
        masks.append({cls: mask for cls, mask in found.items() if mask is not None} or None)
    return {"labels": weight > 0, "mask": masks, "sample_weight": weight}


def _union(parts: Sequence[tuple[Tensor | None, Tensor]]) -> Tensor | None:
    """Join masks where their images are to be seen; None if one is missing, or nothing is left of them."""
    masks, seen = [], []
    for mask, part in parts:
        if mask is None:
            return None
        masks.append(mask)
        seen.append(torch.where(part > 0, mask, 0.0))
    union = torch.stack(seen).amax(dim=0)
    # A mask that was empty before is a mistake, which the prior reports.
    gone = not bool(union.any()) and all(bool(mask.any()) for mask in masks)
    return None if gone else union
