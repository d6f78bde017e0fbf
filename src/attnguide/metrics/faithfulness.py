"""Faithfulness of maps, tested on the model: by occlusion, deletion and insertion."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torchvision.transforms.v2.functional as T
from torch import Tensor, nn

from attnguide.capture.logits import find_logits
from attnguide.capture.model_state import evaluating, unwrap
from attnguide.capture.recorder import aside
from attnguide.errors import InputError, nearest
from attnguide.metrics._mean import MeanMetric

__all__ = ["Baseline", "Deletion", "Insertion", "deletion", "insertion", "occlusion"]


@torch.no_grad()
def occlusion(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    *,
    window: int = 16,
    stride: int = 8,
    batch_size: int = 512,
) -> Tensor:
    """Occlusion maps: how far the logit of the class falls when a window is covered.

    A window slides over the image and is filled with the image's mean colour; each pixel gets the mean fall
    over the windows that cover it (Zeiler and Fergus, ECCV 2014). The model runs in evaluation mode and comes
    back as it was.

    Args:
        model: Any classifier.
        images: `(B, C, H, W)`.
        classes: The class to explain in each image, `(B,)`, int64; or (image, class) pairs `(N, 2)`, for
            which each image is occluded once.
        window: Side of the window in pixels.
        stride: Step of the window in pixels.
        batch_size: Number of occluded images in one forward pass.

    Returns:
        Maps `(B, H, W)` or `(N, H, W)`: positive where there is evidence for the class.

    Raises:
        InputError: If window or stride do not fit the images, or the classes do not.
    """
    batch, _, height, width = images.shape
    sample, cls = _paired(classes, batch)
    if not 0 < stride <= window <= min(height, width):
        limit = min(height, width)
        raise InputError(f"window={window} and stride={stride}: 0 < stride ≤ window ≤ {limit} is needed.")
    rows, columns = _starts(height, window, stride), _starts(width, window, stride)
    covers = torch.zeros(len(rows) * len(columns), height, width, device=images.device, dtype=images.dtype)
    for index, (row, column) in enumerate((r, c) for r in rows for c in columns):
        covers[index, row : row + window, column : column + window] = 1
    mean = images.mean(dim=(2, 3), keepdim=True)
    falls = images.new_empty(len(sample), len(covers))
    work = torch.arange(batch * len(covers), device=images.device)
    with evaluating(model), aside(unwrap(model)):
        plain = torch.cat([find_logits(model(part)) for part in torch.split(images, batch_size)])
        _check_classes(cls, plain)
        for chunk in torch.split(work, batch_size):
            image, number = chunk // len(covers), chunk % len(covers)
            stays = 1 - covers[number][:, None]
            logits = find_logits(model(images[image] * stays + mean[image] * (1 - stays)))
            pair, place = (sample[:, None] == image).nonzero(as_tuple=True)
            fall = plain[sample[pair], cls[pair]] - logits[place, cls[pair]]
            falls[pair, number[place]] = fall.to(falls)
    return (falls @ covers.flatten(1)).view(-1, height, width) / covers.sum(0)


def _paired(classes: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Return the image and the class of each pair."""
    if classes.shape == (batch,):
        return torch.arange(batch, device=classes.device), classes
    if classes.ndim == 2 and classes.shape[1] == 2:
        if bool(((classes[:, 0] < 0) | (classes[:, 0] >= batch)).any()):
            raise InputError(f"pairs name images that do not exist: the batch has 0 to {batch - 1}.")
        return classes[:, 0], classes[:, 1]
    raise InputError(
        f"classes of shape {tuple(classes.shape)} do not fit {batch} images: give ({batch},), or pairs "
        "(N, 2)."
    )


def _check_classes(classes: Tensor, logits: Tensor) -> None:
    """Refuse classes that the model does not have, and −1, which would be the last one."""
    wrong = classes[(classes < 0) | (classes >= logits.shape[1])]
    if len(wrong):
        raise InputError(
            f"class {int(wrong[0])} does not exist: the model has classes 0 to {logits.shape[1] - 1}."
        )


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows start along a side; the last one ends at the edge."""
    return sorted({*range(0, length - window, stride), length - window})


# ------------------------------------------------------------- deletion, insertion

#: What replaces a deleted pixel: the image's mean colour, the blurred image, or zeros.
Baseline = Literal["mean", "blur", "zero"]


def deletion(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    *,
    steps: int = 20,
    baseline: Baseline = "mean",
    multi_label: bool = False,
    batch_size: int = 256,
) -> Tensor:
    """Deletion curves: the probability of the class while pixels are deleted, the most important first.

    With a faithful map it falls fast (Petsiuk et al., BMVC 2018). The model runs in evaluation mode and comes
    back as it was.

    Args:
        model: Any classifier.
        images: `(B, C, H, W)`.
        maps: Attributions `(B, H, W)`, any scale; where they tie, the upper left goes first.
        classes: The class of each map, `(B,)`, int64.
        steps: Number of equal parts in which pixels are deleted.
        baseline: What replaces them: `"mean"`: the image's mean colour; `"blur"`: the image, blurred by a
            45th of its height; `"zero"`.
        multi_label: Whether the probabilities are sigmoids, as with a single logit; else a softmax.
        batch_size: Number of images in one forward pass.

    Returns:
        `(B, steps + 1)` in [0, 1], from the whole image to the baseline; their area is the mean of the
        trapezoids.

    Raises:
        InputError: If shapes do not fit, a map is not finite, or the model has no such class.
    """
    return _curve(model, images, maps, classes, steps, baseline, multi_label, batch_size, deleting=True)


def insertion(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    *,
    steps: int = 20,
    baseline: Baseline = "blur",
    multi_label: bool = False,
    batch_size: int = 256,
) -> Tensor:
    """Insertion curves: the probability of the class while pixels are inserted, the most important first.

    As [`deletion`][attnguide.metrics.deletion], from the baseline to the whole image; with a
    faithful map it rises fast.

    Args:
        model: Any classifier.
        images: `(B, C, H, W)`.
        maps: `(B, H, W)`.
        classes: `(B,)`.
        steps: Number of equal parts in which pixels are inserted.
        baseline: What a pixel replaces.
        multi_label: Whether the probabilities are sigmoids; else a softmax.
        batch_size: Number of images in one forward pass.

    Returns:
        `(B, steps + 1)` in [0, 1].

    Raises:
        InputError: If shapes do not fit, a map is not finite, or the model has no such class.
    """
    return _curve(model, images, maps, classes, steps, baseline, multi_label, batch_size, deleting=False)


def area(curves: Tensor) -> Tensor:
    """Area under curves `(B, steps + 1)` over [0, 1], by trapezoids; `(B,)`."""
    return (curves[:, :-1] + curves[:, 1:]).mean(dim=1) / 2


class Held:
    """Holds a model that a copy of the metric shares."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __deepcopy__(self, memo: Any) -> Held:
        return self


class Deletion(MeanMetric):
    """Mean area under the [deletion][attnguide.metrics.deletion] curve; low is faithful.

    Args:
        model: Any classifier.
        **options: Options of `deletion`: `steps`, `baseline`, `multi_label`, `batch_size`.
    """

    higher_is_better = False
    curve: ClassVar[Any] = staticmethod(deletion)

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self._model = Held(model)
        self._options = options

    def score(self, images: Tensor, maps: Tensor, classes: Tensor) -> Tensor:
        """Compute the areas of a batch, `(B,)`."""
        return area(type(self).curve(self._model.model, images, maps, classes, **self._options))


class Insertion(Deletion):
    """Mean area under the [insertion][attnguide.metrics.insertion] curve; high is faithful.

    Args:
        model: Any classifier.
        **options: Options of `insertion`: `steps`, `baseline`, `multi_label`, `batch_size`.
    """

    higher_is_better = True
    curve: ClassVar[Any] = staticmethod(insertion)


@torch.no_grad()
def _curve(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    steps: int,
    baseline: Baseline,
    multi_label: bool,
    batch_size: int,
    *,
    deleting: bool,
) -> Tensor:
    batch, _, height, width = images.shape
    if maps.shape != (batch, height, width) or classes.shape != (batch,):
        raise InputError(
            f"images {tuple(images.shape)} need maps {(batch, height, width)} and classes {(batch,)}, got "
            f"{tuple(maps.shape)} and {tuple(classes.shape)}."
        )
    if not bool(maps.isfinite().all()):
        raise InputError("maps are not finite: the model or the source gave NaN or infinity.")
    if not 1 <= steps <= height * width:
        raise InputError(f"steps={steps} must be from 1 to the number of pixels, {height * width}.")
    absent = _absent(images, baseline)
    start, end = (images, absent) if deleting else (absent, images)
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1).view(batch, height, width)
    counts = [round(height * width * step / steps) for step in range(steps + 1)]
    curves = images.new_empty(batch, steps + 1, dtype=torch.float32)
    with evaluating(model), aside(unwrap(model)):
        _check_classes(classes, find_logits(model(images[:1])))
        for index in torch.split(torch.arange(batch * (steps + 1), device=images.device), batch_size):
            sample, step = index // (steps + 1), index % (steps + 1)
            limit = torch.tensor(counts, device=images.device)[step]
            mixed = torch.where((rank[sample] < limit[:, None, None])[:, None], end[sample], start[sample])
            logits = find_logits(model(mixed)).float()
            probabilities = logits.sigmoid() if multi_label or logits.shape[1] == 1 else logits.softmax(dim=1)
            curves[sample, step] = probabilities.gather(1, classes[sample][:, None])[:, 0]
    return curves


def _absent(images: Tensor, baseline: Baseline) -> Tensor:
    if baseline == "mean":
        return images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    if baseline == "zero":
        return torch.zeros_like(images)
    if baseline == "blur":
        sigma = max(images.shape[-2] / 45, 0.5)
        size = min(2 * round(3 * sigma) + 1, 2 * min(images.shape[-2:]) - 1)
        blurred: Tensor = T.gaussian_blur(images, [size, size], [sigma, sigma])
        return blurred
    raise InputError(f"baseline={baseline!r} is unknown.{nearest(str(baseline), ('mean', 'blur', 'zero'))}")
