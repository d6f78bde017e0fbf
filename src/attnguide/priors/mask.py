"""Masks: for all images, per image, per image and class, or one template per class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from attnguide import functional
from attnguide.errors import InputError
from attnguide.functional import may_read
from attnguide.interfaces import PriorMaps, TargetPrior
from attnguide.masks.sizes import check_proportions
from attnguide.pairs import Pairs
from attnguide.trace import Trace

__all__ = ["MaskPrior"]

#: The default of `mask`, since None means "no sample of this batch is annotated".
_NOT_PASSED: Any = object()


class MaskPrior(TargetPrior):
    """Masks in [0, 1], of the images' proportions and any size, resized to the attribution by area averaging.

    With `guide.loss(labels, mask=…)` a mask is a tensor or array

    - `(H, W)`: one for all samples,
    - `(B, H, W)` or `(B, 1, H, W)`: one for each sample,
    - `(B, K, H, W)`: one for each sample and class,

    or a list with one entry for each sample: `(H, W)`, `(K, H, W)`, a dict of a mask `(H, W)` for each class
    index that has one, or None. A sample has no annotation where its entry is None, or its whole mask is NaN
    or `ignore_value`; such pairs drop out.

    Args:
        template: `(K, H, W)`, one region for each class, painted once for aligned images, or `(H, W)` for all
            classes. NaN: the class has none. Used when `guide.loss` is given no mask.
        ignore_value: Marks a mask as missing where NaN is not possible.
        empty: What to do with a mask that is zero everywhere: `"error"`, or `"skip"`, for pipelines whose
            crops may lose the region; the pair then drops out.

    Raises:
        InputError: If the template is empty, holds values outside [0, 1], or has another shape.
    """

    def __init__(
        self,
        template: Tensor | np.ndarray[Any, Any] | None = None,
        *,
        ignore_value: float = -1.0,
        empty: Literal["error", "skip"] = "error",
    ) -> None:
        if empty not in ("error", "skip"):
            raise InputError(f"empty={empty!r} must be 'error' or 'skip'.")
        self.ignore_value, self.empty = ignore_value, empty
        self.template = None if template is None else _as_float(template, "template")
        if self.template is not None:
            if self.template.ndim not in (2, 3):
                raise InputError(f"template must be (K, H, W) or (H, W), got {tuple(self.template.shape)}.")
            planes = self.template.reshape(-1, *self.template.shape[-2:])
            size = planes.shape[-2], planes.shape[-1]
            self._prepared(planes, torch.arange(len(planes)), size, _subject_of_template)

    def __call__(
        self, trace: Trace, pairs: Pairs, size: tuple[int, int], *, mask: Any = _NOT_PASSED
    ) -> PriorMaps:
        """Pick, check and resize the mask of each pair.

        Masks of no pair need not be valid.

        Raises:
            InputError: If there is no mask, or it has a shape that does not fit the batch, other proportions
                than the images, values outside [0, 1], NaN next to numbers, or (unless `empty="skip"`) no
                positive value.
        """
        device = trace.logits.device
        if mask is None:
            count = len(pairs)
            return PriorMaps(torch.zeros(count, *size, device=device), torch.zeros(count, device=device))
        if mask is _NOT_PASSED:
            planes, index = self._of_template(trace, pairs)
            _check_proportions(planes, trace, "the template")
            maps, weights = self._prepared(planes, index, size, _subject_of_template)
        elif isinstance(mask, (list, tuple)):
            return self._of_list(mask, trace, pairs, size)
        else:
            planes, index = self._of_tensor(mask, trace, pairs)
            if planes.shape[-2:] != trace.images.shape[-2:]:
                _check_proportions(planes, trace, "mask")
            maps, weights = self._prepared(planes, index, size, lambda plane: _subject(plane, index, pairs))
        maps, weights = maps.to(device, non_blocking=True), weights.to(device, non_blocking=True)
        if index is pairs.sample:
            return PriorMaps(pairs.pick(maps), pairs.pick(weights))
        index = index.to(device)
        return PriorMaps(maps[index], weights[index])

    def _of_template(self, trace: Trace, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return planes `(M, H, W)` of the template, and the plane of each pair."""
        template = self.template
        if template is None:
            raise InputError(
                "prior 'mask' needs masks: pass guide.loss(labels, mask=…) (mask=None for a batch "
                "without any), or give MaskPrior(template) when the guide is built."
            )
        classes = trace.logits.shape[1]
        if template.ndim == 2:
            return template[None], torch.zeros_like(pairs.cls)
        if len(template) != classes:
            raise InputError(
                f"the template has {len(template)} regions, the model has {classes} classes. Give one for "
                "each class, NaN where a class has none."
            )
        return template, pairs.cls

    def _of_tensor(self, mask: Any, trace: Trace, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return planes `(M, H, W)` of a tensor or an array, and the plane of each pair."""
        batch, classes = trace.logits.shape
        mask = _as_float(mask, "mask").to(trace.logits.device, non_blocking=True)
        if mask.ndim == 2:
            return mask[None], torch.zeros_like(pairs.sample)
        if mask.ndim == 4 and mask.shape[:2] == (batch, 1):
            mask = mask[:, 0]
        if mask.ndim == 3 and len(mask) == batch:
            return mask, pairs.sample
        if mask.ndim == 4 and mask.shape[:2] == (batch, classes):
            # Only the planes of pairs: the others are not worth resizing.
            chosen = mask[pairs.sample.to(mask.device), pairs.cls.to(mask.device)]
            return chosen, torch.arange(len(pairs), device=pairs.sample.device)
        raise InputError(
            f"mask has shape {tuple(mask.shape)}; for {batch} samples and {classes} classes it must be (H, "
            f"W), ({batch}, H, W), ({batch}, 1, H, W) or ({batch}, {classes}, H, W). A template of one "
            "region per class goes to MaskPrior(template)."
        )

    def _of_list(self, masks: Sequence[Any], trace: Trace, pairs: Pairs, size: tuple[int, int]) -> PriorMaps:
        """Prepare masks of various sizes, each by itself."""
        batch, classes = trace.logits.shape
        if len(masks) != batch:
            raise InputError(
                f"mask has {len(masks)} entries, the batch has {batch} samples; give one each, None for "
                "missing."
            )
        maps = torch.zeros(len(pairs), *size)
        weights = torch.zeros(len(pairs))
        positions: list[list[int]] = [[] for _ in range(batch)]
        for position, sample in enumerate(pairs.sample.tolist()):
            positions[sample].append(position)
        chosen = pairs.cls.cpu()
        for sample, mask in enumerate(masks):
            if mask is None:
                continue
            if isinstance(mask, Mapping):
                own = torch.tensor(positions[sample], dtype=torch.long)
                for cls, plane in self._by_class(mask, sample, classes):
                    where = own[chosen[own] == cls]
                    name = _subject_of_list(sample, classes, cls)
                    resized, counts = self._prepared(plane[None], torch.zeros_like(where), size, name)
                    maps[where], weights[where] = resized[0].to(maps), counts[0].to(weights)
                continue
            planes = _as_float(mask, f"mask of sample {sample}").cpu()
            planes = planes[None] if planes.ndim == 2 else planes
            if planes.ndim != 3 or len(planes) not in (1, classes):
                raise InputError(
                    f"mask of sample {sample} has shape {tuple(planes.shape)}; it must be (H, W) or "
                    f"({classes}, H, W)."
                )
            _check_proportions(planes, trace, f"mask of sample {sample}")
            where = torch.tensor(positions[sample], dtype=torch.long)
            index = torch.zeros_like(where) if len(planes) == 1 else chosen[where]
            name = _subject_of_list(sample, len(planes))
            resized, counts = self._prepared(planes, index, size, name)
            maps[where], weights[where] = resized[index].to(maps), counts[index].to(weights)
        device = trace.logits.device
        return PriorMaps(maps.to(device, non_blocking=True), weights.to(device, non_blocking=True))

    def _by_class(self, masks: Mapping[Any, Any], sample: int, classes: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the classes of a sample that have a mask, and the masks `(H, W)`."""
        for cls, mask in masks.items():
            if type(cls) is not int or not 0 <= cls < classes:
                raise InputError(
                    f"the masks of sample {sample} name a class {cls!r}; classes are indices from 0 to "
                    f"{classes - 1}."
                )
            if mask is None:
                continue
            plane = _as_float(mask, f"mask of sample {sample}, class {cls},").cpu()
            if plane.ndim != 2:
                raise InputError(
                    f"mask of sample {sample}, class {cls}, has shape {tuple(plane.shape)}; it must be "
                    "(H, W)."
                )
            yield cls, plane

    def _prepared(
        self, planes: Tensor, index: Tensor, size: tuple[int, int], name: Callable[[int], str]
    ) -> tuple[Tensor, Tensor]:
        """Check the planes of pairs, and resize all; missing ones become zeros.

        Args:
            planes: `(M, H, W)`.
            index: The plane of each pair, `(N,)`; the other planes are not checked.
            size: Size of the attribution.
            name: Describes a plane, for the error about the first that is wrong.

        Returns:
            Maps `(M, *size)` and a weight for each, `(M,)`.
        """
        flat = planes.flatten(1)
        readable = may_read(flat)
        if readable and flat.numel() and not 0 <= self.ignore_value <= 1:
            # Nearly always nothing is missing, empty or wrong, and two passes show it.
            least, most = flat.aminmax()  # NaN if there is one
            if bool(least >= 0) and bool(most <= 1) and bool((flat.amax(dim=1) > 0).all()):
                planes = planes.clone() if planes.is_inference() else planes  # a graph may hold it
                return functional.resize(planes, size), torch.ones_like(flat[:, 0])
        used = torch.zeros(len(planes), dtype=torch.bool, device=planes.device)
        used[index.to(planes.device)] = True
        absent = flat.isnan() | (flat == self.ignore_value)
        missing = absent.all(dim=1) | ~used
        empty = ~missing & (flat.nan_to_num(1.0).amax(dim=1) == 0)
        partly = ~missing & absent.any(dim=1)
        outside = ~missing & ((flat < 0) | (flat > 1)).any(dim=1)
        # The device is read once instead of three times.
        if readable and bool((partly | outside | (empty if self.empty == "error" else partly)).any()):
            for wrong, complaint in (
                (
                    partly,
                    "is NaN or ignore_value in places; only a whole mask can be missing, so fill or drop it",
                ),
                (outside, "has values outside [0, 1]; divide by 255 if it is an 8-bit image"),
                (empty, "is empty; pass None (or NaN) for 'no annotation', or build MaskPrior(empty='skip')"),
            ):
                if bool(wrong.any()):
                    plane = int(wrong.nonzero()[0])
                    values = f"minimum {flat[plane].min().item():g}, maximum {flat[plane].max().item():g}"
                    raise InputError(f"{name(plane)} {complaint} ({values}).")
        weights = (~(missing | empty)).to(planes)
        present = torch.where(missing[:, None, None], torch.zeros_like(planes), planes)
        return functional.resize(present, size), weights

    def __repr__(self) -> str:
        shape = None if self.template is None else tuple(self.template.shape)
        return f"MaskPrior(template={shape}, empty={self.empty!r})"


def _check_proportions(planes: Tensor, trace: Trace, what: str) -> None:
    if trace.images.ndim == 4:  # patches made beforehand have no proportions
        check_proportions(planes.shape, trace.image_size, what)


def _subject(plane: int, index: Tensor, pairs: Pairs) -> str:
    """Describe a plane by the first pair that uses it."""
    pair = int((index == plane).nonzero()[0])
    return f"mask of sample {int(pairs.sample[pair])}, class {int(pairs.cls[pair])},"


def _subject_of_template(plane: int) -> str:
    return f"template of class {plane}"


def _subject_of_list(sample: int, count: int, first: int = 0) -> Callable[[int], str]:
    return lambda plane: f"mask of sample {sample}" + (f", class {first + plane}," if count > 1 else "")


def _as_float(mask: Any, what: str) -> Tensor:
    """Return a mask of any numeric type as a plain float tensor."""
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(np.ascontiguousarray(mask))
    if not isinstance(mask, Tensor):
        raise InputError(f"{what} must be a tensor, an array or a list of them, got {type(mask).__name__}.")
    mask = mask.as_subclass(Tensor)  # a tv_tensor has done its work by now
    if mask.is_complex():
        raise InputError(f"{what} must hold real numbers, got {mask.dtype}.")
    if mask.numel() == 0:
        raise InputError(f"{what} of shape {tuple(mask.shape)} has no pixels.")
    return functional.full_precision(mask) if mask.is_floating_point() else mask.float()
