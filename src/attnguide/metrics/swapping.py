"""How good predictions are when what is outside of the masks comes from other images."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from attnguide.capture.logits import find_logits
from attnguide.capture.model_state import evaluating
from attnguide.errors import InputError
from attnguide.masks.swapping import SwapOutside
from attnguide.metrics.faithfulness import Held
from attnguide.pairs import IGNORE_INDEX

__all__ = ["SwappedAccuracy", "swapped_accuracy"]


@torch.no_grad()
def swapped_accuracy(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: Any,
    *,
    draws: int = 4,
    partners: Literal["any", "other"] = "any",
    generator: torch.Generator | None = None,
) -> Tensor:
    """How often each image is predicted right when what is outside of its mask comes from another image.

    A model that does not look outside hardly notices; one that relies on a shortcut there falls, and no
    clean test set is needed to see it. The model runs in evaluation mode and comes back as it was.

    Args:
        model: Any classifier.
        images: `(B, C, H, W)`, as the model takes them, at least two with a mask.
        labels: Class indices `(B,)`, −100 where unknown; or `(B, K)` of 0 and 1, NaN where unknown.
        masks: Where to look, as for [`SwapOutside`][attnguide.masks.SwapOutside].
        draws: Number of other images that each image gets its outside from, one after the other.
        partners: Which images these are, see [`SwapOutside`][attnguide.masks.SwapOutside].
        generator: Source of the random numbers, on the device of the images; PyTorch's own if left out.

    Returns:
        Share of the draws, and with `(B, K)` of the known labels, that are predicted right: `(B,)` in [0, 1].
        NaN for an image that has no mask, no label, or no partner.

    Raises:
        InputError: If images, labels or masks do not fit, or there are no draws.
    """
    if type(draws) is not int or draws < 1:
        raise InputError(f"draws={draws!r} must be a number of at least 1.")
    swap = SwapOutside(partners, empty="skip")
    scores = []
    with evaluating(model):
        for _ in range(draws):
            with warnings.catch_warnings():  # an image without a partner is NaN
                warnings.filterwarnings("ignore", "none of the .* could be given another outside")
                swapped = swap(images, labels, masks, generator=generator)
            logits = find_logits(model(swapped.images))
            scores.append(torch.where(swapped.exchanged, _right(logits, labels.to(logits.device)), torch.nan))
    # Which images have partners is the same in every draw.
    return torch.stack(scores).mean(dim=0)


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the known labels of each image that are predicted right, `(B,)`; NaN without any."""
    if labels.ndim == 1:
        right = (logits.argmax(dim=1) == labels).float()
        return right.masked_fill(labels == IGNORE_INDEX, torch.nan)
    if labels.shape != logits.shape:
        raise InputError(f"labels have shape {tuple(labels.shape)}, logits {tuple(logits.shape)}.")
    right = ((logits > 0) == (labels > 0.5)).float()
    return right.masked_fill(labels.isnan(), torch.nan).nanmean(dim=1)


class SwappedAccuracy(Metric):
    """Mean of [`swapped_accuracy`][attnguide.metrics.swapped_accuracy] over all images that have a mask.

    λ and the epoch can be chosen by it on validation images like those of the training, which share their
    shortcut.

    ```python
    metric = ag.metrics.SwappedAccuracy(model)
    for images, labels, masks in loader:
        metric.update(images, labels, masks)
    metric.compute(), metric.standard_error
    ```

    The same batches in the same order get the same other outsides again, after every epoch and for every
    model, so that differences are not those of the draws. Partners come from the batch; give batches of many
    images that have masks.

    Args:
        model: Any classifier.
        draws: Number of other images that each image gets its outside from.
        partners: Which images these are, see [`SwapOutside`][attnguide.masks.SwapOutside].
        seed: Seed of the draws, at least 0; they depend on it and the number of the batch alone.

    Attributes:
        count: Number of images so far, `int64`; those without a mask, a label or a partner are not counted.

    Raises:
        InputError: If the seed is not a whole number of at least 0.
    """

    full_state_update = False
    higher_is_better = True
    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        draws: int = 4,
        partners: Literal["any", "other"] = "any",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if type(seed) is not int or seed < 0:
            raise InputError(f"seed={seed!r} must be a number of at least 0.")
        self._model = Held(model)
        self.draws, self.partners, self.seed = draws, partners, seed
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Tensor, labels: Tensor, masks: Any) -> None:
        """Add a batch; see [`swapped_accuracy`][attnguide.metrics.swapped_accuracy]."""
        generator = torch.Generator(images.device).manual_seed(self.seed + self.update_count)
        scores = swapped_accuracy(
            self._model.model,
            images,
            labels,
            masks,
            draws=self.draws,
            partners=self.partners,
            generator=generator,
        )
        scores = scores[~scores.isnan()].double().to(self.total.device)
        self.total += scores.sum()
        self.squares += scores.square().sum()
        self.count += len(scores)

    def compute(self) -> Tensor:
        """Return the mean so far, a scalar; NaN before any image that has a mask and a partner."""
        return (self.total / self.count).float()

    @property
    def standard_error(self) -> Tensor:
        """Standard error of the mean over the images of this process, a scalar; NaN below two images.

        The draws of an image are not independent, so an image counts once, however many draws it has.
        """
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp(min=0)
        # A count of 1 gives 0/0, which is NaN as it should be.
        return (variance / (self.count - 1)).sqrt().float()
