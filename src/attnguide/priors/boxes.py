"""Bounding boxes."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert
from torchvision.tv_tensors import BoundingBoxes

from attnguide.errors import InputError
from attnguide.functional import may_read
from attnguide.interfaces import PriorMaps, TargetPrior
from attnguide.pairs import Pairs
from attnguide.trace import Trace

__all__ = ["BoxPrior"]

#: How far a box may reach beyond the border of an image, as a share of its side, before that counts.
_BESIDE = 0.05
_REMEDY = "Boxes of larger originals are scaled by the same factor as the images."


class BoxPrior(TargetPrior):
    """Boxes `(x1, y1, x2, y2)` in pixels of the images; a cell of the map is the share that a box covers.

    With `guide.loss(labels, boxes=…)` boxes are a tensor `(B, 4)` or `(B, n, 4)`, or a list with one entry
    for each sample: `(n, 4)`, `(4,)`, a `tv_tensors.BoundingBoxes` of any format, or None. A row of NaN or −1
    means "no box"; a sample without a box drops out. The map is the same for every class of a sample.

    Args:
        dilation: Share of its width and height by which each box grows, half of it on each side, since boxes
            are often drawn tight, or where some context may count (Rao et al., ICCV 2023).
        jitter: How far each edge moves at random, at most, as a share of the box's side, in [0, 0.5): to see
            how much the guidance depends on exact boxes. It comes before the dilation.
        seed: Seed of the jitter, at least 0. It depends on it and the box alone: a box moves the same way
            each time, as if it had been drawn there.

    Raises:
        InputError: If a setting has a wrong value.
    """

    def __init__(self, *, dilation: float = 0.0, jitter: float = 0.0, seed: int = 0) -> None:
        if not (isinstance(dilation, (int, float)) and 0 <= dilation < math.inf):
            raise InputError(f"dilation={dilation!r} must be a share of the box's sides, at least 0.")
        if not (isinstance(jitter, (int, float)) and 0 <= jitter < 0.5):
            raise InputError(f"jitter={jitter!r} must be a share of the box's sides in [0, 0.5).")
        if type(seed) is not int or seed < 0:
            raise InputError(f"seed={seed!r} must be a number of at least 0.")
        self.dilation, self.jitter, self.seed = dilation, jitter, seed
        self._warned = False

    def __call__(self, trace: Trace, pairs: Pairs, size: tuple[int, int], *, boxes: Any) -> PriorMaps:
        """Draw the boxes of each pair's sample.

        Raises:
            InputError: If the shape does not fit the batch, a box has no area inside the image, holds NaN
                next to numbers, or is in pixels of a larger image.

        Warns:
            UserWarning: Once, if most boxes reach beyond the right or lower edge of their images.
        """
        batch = len(trace.logits)
        device = trace.logits.device
        if boxes is None:
            boxes = [None] * batch
        if not isinstance(boxes, (Tensor, np.ndarray, list, tuple)):
            raise InputError(f"boxes must be a tensor, an array or a list, got {type(boxes).__name__}.")
        entries = list(boxes)
        if len(entries) != batch:
            raise InputError(
                f"boxes have {len(entries)} entries, the batch has {batch} samples; give one each, None for "
                "missing."
            )
        if isinstance(boxes, BoundingBoxes):  # iteration gives plain tensors
            _check_canvas(boxes, trace.image_size)
            entries = [_as_xyxy(boxes, "boxes")[index] for index in range(batch)]
        for entry in entries:
            _check_canvas(entry, trace.image_size)
        rows = [_rows(entry, sample).to(device, non_blocking=True) for sample, entry in enumerate(entries)]
        table = pad_sequence(rows, batch_first=True, padding_value=torch.nan)  # (B, n, 4)
        present = ~table.isnan().all(dim=2)
        _check(table, present, trace.image_size)
        if may_read(table) and bool(present.any()):
            self._check_scale(table[present], trace.image_size)
        maps = _cover(self._moved(table).nan_to_num(0.0), size, trace.image_size)
        weights = present.any(dim=1).to(maps)
        if self.jitter:  # a box at the border may have left the image
            weights = weights * (maps.amax(dim=(1, 2)) > 0)
        sample = pairs.sample
        return PriorMaps(maps[sample], weights[sample])

    def _moved(self, table: Tensor) -> Tensor:
        """Move the edges of boxes `(B, n, 4)` at random, and dilate what that gives."""
        if self.jitter:
            # A generator for each box, so that neither order nor batch counts.
            draws = [
                np.random.default_rng([self.seed, *box.view(np.uint32).tolist()]).uniform(-1, 1, 4)
                for box in table.flatten(0, 1).cpu().numpy()
            ]
            moves = torch.from_numpy(np.stack(draws)).to(table).view(table.shape)
            table = table + self.jitter * moves * _sides(table)
        if self.dilation:
            table = table + self.dilation / 2 * table.new_tensor([-1.0, -1, 1, 1]) * _sides(table)
        return table

    def __repr__(self) -> str:
        settings = [f"dilation={self.dilation}"] if self.dilation else []
        settings += [f"jitter={self.jitter}", f"seed={self.seed}"] if self.jitter else []
        return f"BoxPrior({', '.join(settings)})"

    def _check_scale(self, boxes: Tensor, image_size: tuple[int, int]) -> None:
        """Refuse boxes in pixels of larger images; in doubt, warn once.

        A larger image shares its upper left corner with the image, so that boxes leave it to the right and
        downwards alone.

        Args:
            boxes: `(N, 4)`, at least one.
            image_size: `(H, W)`.
        """
        sides = boxes.new_tensor([image_size[1], image_size[0]])
        beyond = boxes[:, 2:] > sides * (1 + _BESIDE)
        if bool((boxes[:, :2] < -sides * _BESIDE).any()):
            return
        height, width = image_size
        found = (
            f"x up to {float(boxes[:, 2].max()):.4g}, y up to {float(boxes[:, 3].max()):.4g}; the images are "
            f"{width}×{height} pixels. {_REMEDY}"
        )
        count = int(beyond.any(dim=1).sum())
        if bool((boxes[:, 2:] > 2 * sides).any()):
            raise InputError(f"boxes reach far beyond their images, {count} of {len(boxes)}: {found}")
        if 2 * count > len(boxes) and not self._warned:
            self._warned = True
            warnings.warn(
                f"{count} of {len(boxes)} boxes reach beyond the right or lower edge of their images, and "
                f"are cut off there: {found}",
                stacklevel=2,
            )


def _sides(boxes: Tensor) -> Tensor:
    """Width, height, width and height of boxes `(…, 4)`."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return torch.cat([sides, sides], dim=-1)


def _check_canvas(boxes: Any, image_size: tuple[int, int]) -> None:
    """Refuse boxes that say that they belong to images of another size."""
    if isinstance(boxes, BoundingBoxes) and tuple(boxes.canvas_size) != tuple(image_size):
        height, width = boxes.canvas_size
        raise InputError(
            f"boxes are in pixels of {width}×{height} images, the model sees {image_size[1]}×{image_size[0]} "
            "pixels. Transform them along with the images."
        )


def _as_xyxy(boxes: Any, what: str) -> Tensor:
    if isinstance(boxes, BoundingBoxes):
        converted: Tensor = box_convert(boxes.as_subclass(Tensor).float(), boxes.format.value.lower(), "xyxy")
        return converted
    try:
        tensor = torch.as_tensor(boxes, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} must be (x1, y1, x2, y2), got {boxes!r}: {error}.") from error
    if tensor.shape[-1:] != (4,):
        raise InputError(f"{what} must be (x1, y1, x2, y2), got a tensor of shape {tuple(tensor.shape)}.")
    return tensor


def _rows(entry: Any, sample: int) -> Tensor:
    """Return the boxes of one sample, `(n, 4)`, at least one row; a row of NaN means "no box"."""
    if entry is None:
        return torch.full((1, 4), torch.nan)
    boxes = _as_xyxy(entry, f"boxes of sample {sample}").reshape(-1, 4)
    if not len(boxes):
        return boxes.new_full((1, 4), torch.nan)
    return torch.where((boxes == -1).all(dim=1, keepdim=True), torch.nan, boxes)


def _check(table: Tensor, present: Tensor, image_size: tuple[int, int]) -> None:
    height, width = image_size
    x1, y1, x2, y2 = table.unbind(dim=2)
    # NaN compares false, so that a box with a NaN among numbers is wrong too.
    right = (x2.clamp(max=width) > x1.clamp(min=0)) & (y2.clamp(max=height) > y1.clamp(min=0))
    wrong = present & ~right
    if may_read(wrong) and bool(wrong.any()):
        sample, row = (int(value) for value in wrong.nonzero()[0])
        raise InputError(
            f"box {row} of sample {sample}, {table[sample, row].tolist()}, has no area inside the "
            f"{width}×{height} image. Boxes are (x1, y1, x2, y2) in pixels with x1 < x2 and y1 < y2; a row "
            f"of NaN or −1 means 'no box'. {_REMEDY}"
        )


def _cover(boxes: Tensor, size: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Compute how much of each cell the box covers that covers most of it: `(B, n, 4)` to `(B, h, w)`."""
    rows = _overlap(boxes[..., 1], boxes[..., 3], size[0], image_size[0])
    columns = _overlap(boxes[..., 0], boxes[..., 2], size[1], image_size[1])
    return (rows[..., :, None] * columns[..., None, :]).amax(dim=1)


def _overlap(start: Tensor, stop: Tensor, cells: int, length: int) -> Tensor:
    """Compute the share of each cell along a side that lies between start and stop, `(B, n, cells)`."""
    edges = torch.linspace(0, length, cells + 1, device=start.device)
    inside = torch.minimum(stop[..., None], edges[1:]) - torch.maximum(start[..., None], edges[:-1])
    return (inside / (length / cells)).clamp(0, 1)
