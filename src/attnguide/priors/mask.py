"""Masks: for all images, per image, per image and class, or one template per class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from attnguide import functional
from attnguide.errors import InputError
from attnguide.interfaces import PriorMaps, TargetPrior
from attnguide.pairs import Pairs
from attnguide.trace import Trace

__all__ = ["MaskPrior"]

#: Tells "not passed" from None, which means "no sample of this batch is annotated".
_NOT_PASSED: Any = object()


class MaskPrior(TargetPrior):
    """Masks in [0, 1], of any size; resized to the attribution by area averaging.

    With `guide.loss(labels, mask=…)` a mask is a tensor or array

    - `(H, W)`: one for all samples,
    - `(B, H, W)` or `(B, 1, H, W)`: one for each sample,
    - `(B, K, H, W)`: one for each sample and class,

    or a list with one entry for each sample: `(H, W)`, `(K, H, W)`, or None. A sample has no annotation where its entry is None, or its
    whole mask is NaN or `ignore_value`; such pairs drop out.

    Args:
        template: `(K, H, W)`, one region for each class, painted once for aligned images, or `(H, W)` for all classes. NaN: the
            class has none. Used when `guide.loss` is given no mask.
        ignore_value: Marks a mask as missing where NaN is not possible.
        empty: What to do with a mask that is zero everywhere: `"error"`, or `"skip"`, for pipelines whose crops may lose
            the region; the pair then drops out.

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
            self._checked(self.template.reshape(-1, *self.template.shape[-2:]), "template of class")

    def __call__(
        self, trace: Trace, pairs: Pairs, size: tuple[int, int], *, mask: Any = _NOT_PASSED
    ) -> PriorMaps:
        """Pick, check and resize the mask of each pair.

        Raises:
            InputError: If there is no mask, or it has a shape that does not fit the batch, values outside [0, 1], NaN next
                to numbers, or (unless `empty="skip"`) no positive value.
        """
        device = trace.logits.device
        if mask is _NOT_PASSED:
            if self.template is None:
                raise InputError(
                    "prior 'mask' needs masks: pass guide.loss(labels, mask=…) (mask=None for a batch without any), or give "
                    "MaskPrior(template) when the guide is built."
                )
            planes, index = self._of_template(self.template, trace, pairs)
        elif mask is None:
            count = len(pairs)
            return PriorMaps(torch.zeros(count, *size, device=device), torch.zeros(count, device=device))
        elif isinstance(mask, (list, tuple)):
            return self._of_list(mask, trace, pairs, size)
        else:
            planes, index = self._of_tensor(_as_float(mask, "mask"), trace, pairs)
        planes, weights = self._checked(planes, "mask of")
        maps = functional.resize(planes, size).to(device, non_blocking=True)
        weights = weights.to(device, non_blocking=True)
        return PriorMaps(maps[index], weights[index])

    # Each of these returns planes (M, H, W) and, for each pair, which plane is its own.

    def _of_template(self, template: Tensor, trace: Trace, pairs: Pairs) -> tuple[Tensor, Tensor]:
        classes = trace.logits.shape[1]
        if template.ndim == 2:
            return template[None], torch.zeros_like(pairs.cls)
        if len(template) != classes:
            raise InputError(
                f"the template has {len(template)} regions, the model has {classes} classes. Give one for each class, NaN "
                "where a class has none."
            )
        return template, pairs.cls

    def _of_tensor(self, mask: Tensor, trace: Trace, pairs: Pairs) -> tuple[Tensor, Tensor]:
        batch, classes = trace.logits.shape
        if mask.ndim == 2:
            return mask[None], torch.zeros_like(pairs.sample)
        if mask.ndim == 4 and mask.shape[:2] == (batch, 1):
            mask = mask[:, 0]
        if mask.ndim == 3 and len(mask) == batch:
            return mask, pairs.sample
        if mask.ndim == 4 and mask.shape[:2] == (batch, classes):
            # Only the planes that are asked for: the others need not be valid, and are not worth resizing.
            chosen = mask[pairs.sample.to(mask.device), pairs.cls.to(mask.device)]
            return chosen, torch.arange(len(pairs), device=pairs.sample.device)
        raise InputError(
            f"mask has shape {tuple(mask.shape)}; for {batch} samples and {classes} classes it must be (H, W), ({batch}, H, W), "
            f"({batch}, 1, H, W) or ({batch}, {classes}, H, W). A template of one region per class goes to MaskPrior(template)."
        )

    def _of_list(self, masks: Sequence[Any], trace: Trace, pairs: Pairs, size: tuple[int, int]) -> PriorMaps:
        """Masks of various sizes, or none: resized sample by sample to planes `(B, K or 1, h, w)`."""
        batch, classes = trace.logits.shape
        if len(masks) != batch:
            raise InputError(
                f"mask has {len(masks)} entries, the batch has {batch} samples; give one each, None for missing."
            )
        missing = torch.full((1, *size), torch.nan)
        rows = []
        for sample, mask in enumerate(masks):
            plane = missing if mask is None else _as_float(mask, f"mask of sample {sample}").cpu()
            plane = plane[None] if plane.ndim == 2 else plane
            if plane.ndim != 3 or len(plane) not in (1, classes):
                raise InputError(
                    f"mask of sample {sample} has shape {tuple(plane.shape)}; it must be (H, W) or ({classes}, H, W)."
                )
            if mask is not None:
                checked, weights = self._checked(plane, f"mask of sample {sample}, plane")
                resized = functional.resize(checked, size)
                plane = torch.where(weights[:, None, None] > 0, resized, torch.nan)
            rows.append(plane.expand(classes, *size))
        planes = torch.stack(rows).to(trace.logits.device, non_blocking=True)[pairs.sample, pairs.cls]
        weights = (~planes.isnan().flatten(1).all(1)).to(planes)
        return PriorMaps(planes.nan_to_num(0.0), weights)

    def _checked(self, planes: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Return planes with missing ones as zeros, and a weight for each; raise one error that names the first culprit."""
        flat = planes.flatten(1)
        absent = flat.isnan() | (flat == self.ignore_value)
        missing = absent.all(dim=1)
        empty = ~missing & (flat.nan_to_num(1.0).amax(dim=1) == 0)
        partly = ~missing & absent.any(dim=1)
        outside = ~missing & ((flat < 0) | (flat > 1) | flat.isinf()).any(dim=1)
        # One question to the device instead of three; it is nearly always answered with no.
        if bool((partly | outside | (empty if self.empty == "error" else partly)).any()):
            for wrong, complaint in (
                (
                    partly,
                    "is NaN or ignore_value in places; only a whole mask can be missing, so fill or drop it",
                ),
                (outside, "has values outside [0, 1]; divide by 255 if it is an 8-bit image"),
                (empty, "is empty; pass None (or NaN) for 'no annotation', or build MaskPrior(empty='skip')"),
            ):
                if bool(wrong.any()):
                    index = int(wrong.nonzero()[0])
                    values = f"minimum {flat[index].min().item():g}, maximum {flat[index].max().item():g}"
                    subject = what if planes.shape[0] == 1 and "sample" in what else f"{what} {index}"
                    raise InputError(f"{subject} {complaint} ({values}).")
        weights = (~(missing | empty)).to(planes)
        return torch.where(missing[:, None, None], torch.zeros_like(planes), planes), weights

    def __repr__(self) -> str:
        shape = None if self.template is None else tuple(self.template.shape)
        return f"MaskPrior(template={shape}, empty={self.empty!r})"


def _as_float(mask: Any, what: str) -> Tensor:
    """Return a mask of any numeric type as a plain float tensor."""
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(np.ascontiguousarray(mask))
    if not isinstance(mask, Tensor):
        raise InputError(f"{what} must be a tensor, an array or a list of them, got {type(mask).__name__}.")
    mask = mask.as_subclass(Tensor)  # type: ignore[no-untyped-call]  # a tv_tensor has done its work by now
    if mask.numel() == 0:
        raise InputError(f"{what} of shape {tuple(mask.shape)} has no pixels.")
    return functional.full_precision(mask) if mask.is_floating_point() else mask.float()
