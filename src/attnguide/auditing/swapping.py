"""Cuts images along their masks and swaps the parts between images, to see which predictions change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnguide.capture.logits import find_logits
from attnguide.pairs import Pairs

__all__ = ["Swaps", "swap"]

#: Side at which masks are compared when partners are chosen.
_COARSE = 16
#: About this many swaps of each kind are made in all, at least one and at most eight for each prediction.
_SWAPS = 1000


@dataclass(frozen=True)
class Swaps:
    """Share of the swaps that change each prediction; NaN where there was no partner.

    Attributes:
        cls: The class that a prediction is about, `(N,)`.
        outside: What is outside the mask comes from an image with another prediction, `(N,)`.
        chance: The same from an image with the same prediction: the effect of noise and of the cut, `(N,)`.
        inside: What is inside the mask comes from an image with another prediction, `(N,)`.
    """

    cls: Tensor
    outside: Tensor
    chance: Tensor
    inside: Tensor


@torch.no_grad()
def swap(
    model: nn.Module,
    images: Tensor,
    logits: Tensor,
    truth: Tensor,
    pairs: Pairs,
    masks: Tensor,
    batch_size: int,
) -> Swaps:
    """Cut images along their masks, and swap the parts between two of them.

    Partners are drawn by the model's *predictions*: whatever these depend on differs between two images with
    different predictions, and not between two with the same one, whether or not it has to do with the labels.
    Both combinations of the two are tried, so that a shortcut is found that only adds evidence. Where either
    of the two masks allows the model to look, nothing is swapped: else the other image's object would come in
    from outside.

    Args:
        model: Any classifier, in evaluation mode.
        images: `(B, C, H, W)`.
        logits: The model's logits, `(B, K)`.
        truth: Class indices `(B,)`, or positives `(B, K)` where each class is predicted by itself.
        pairs: The predictions to test.
        masks: Where the model may look for each pair, `(N, H, W)` in [0, 1]. An image without a pair is cut
            along the mask of its partner.
        batch_size: Number of images at once.
    """
    by_class = truth.ndim == 2 or logits.shape[1] == 1
    # A model that gives each image one class makes one prediction; a multi-label model one for each class.
    questions = torch.unique(pairs.cls).tolist() if by_class else [None]
    count = len(pairs) if by_class else len(torch.unique(pairs.sample))
    draws = min(max(_SWAPS // max(count, 1), 1), 8)
    changes = []
    for question in questions:
        if question is None:
            chosen, labels = torch.ones_like(pairs.cls, dtype=torch.bool), truth
        else:
            chosen, labels = pairs.cls == question, truth.view(len(images), -1)[:, question]
        cut = _Cut(model, images, logits, question, pairs.sample[chosen], masks[chosen], batch_size)
        changes.append(cut.swap(labels, draws))
    return Swaps(*(torch.cat(parts) for parts in zip(*changes, strict=True)))


class _Cut:
    """Images with one prediction each, to be cut along masks.

    Args:
        model: Any classifier, in evaluation mode.
        images: `(B, C, H, W)`.
        logits: The model's logits, `(B, K)`.
        question: The class whose presence is predicted; None: the prediction is the class.
        sample: The image of each mask, `(N,)`; several masks of an image count as their union.
        masks: `(N, H, W)`.
        batch_size: Number of images at once.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        logits: Tensor,
        question: int | None,
        sample: Tensor,
        masks: Tensor,
        batch_size: int,
    ) -> None:
        self.model, self.images, self.question, self.batch_size = model, images, question, batch_size
        self.predictions = self._predicted(logits)
        self.has_mask = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        self.has_mask[sample] = True
        self.masks = images.new_zeros(len(images), *masks.shape[1:])
        index = sample[:, None, None].expand_as(masks)
        self.masks.scatter_reduce_(0, index, masks.to(self.masks), "amax")
        self.fits = self._fits()

    def _fits(self) -> Tensor:
        """Whether what lies outside of both masks is at least half of what lies outside of either, `(B, B)`.

        Two images with an object each fit nearly always; two with a forbidden corner each, if it is the same.
        """
        forbidden = 1 - F.adaptive_avg_pool2d(self.masks[:, None].float(), _COARSE).flatten(1)
        area = forbidden.sum(dim=1)
        alike = 2 * forbidden @ forbidden.T >= torch.maximum(area[:, None], area)
        return alike | ~self.has_mask[:, None] | ~self.has_mask

    def swap(self, labels: Tensor, draws: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Swap parts of each image that has a mask with `draws` others; class and changes as in `Swaps`."""
        same = self.predictions[:, None] == self.predictions
        # Where all predictions are the same, labels must do.
        others = labels[:, None] != labels if bool(same.all()) else ~same
        rows = self.has_mask.nonzero()[:, 0]
        image = rows[:, None].expand(-1, draws)
        partner = self._partners(others, draws)[rows]
        alike = self._partners(same.fill_diagonal_(False), draws)
        alike_partner = alike.gather(0, partner.clamp(min=0))
        kept, taken = self._mixed(image, partner), self._mixed(partner, image)
        outside = (self._changed(kept, image) + self._changed(taken, partner)) / 2
        inside = (self._changed(kept, partner) + self._changed(taken, image)) / 2
        controls = ((image, alike[rows]), (partner, alike_partner))
        chance = [self._changed(self._mixed(own, other), own) for own, other in controls]
        cls = self.predictions[rows] if self.question is None else torch.full_like(rows, self.question)
        kinds = outside, torch.stack(chance).nanmean(dim=0), inside
        changes = [torch.where(partner < 0, torch.nan, changed).nanmean(dim=1) for changed in kinds]
        return cls, changes[0], changes[1], changes[2]

    def _partners(self, allowed: Tensor, draws: int) -> Tensor:
        """Draw partners of each image, `(B, draws)`, that fit if any does; −1 where none is allowed."""
        best = allowed & self.fits
        chances = torch.where(best.any(dim=1, keepdim=True), best, allowed).float()
        possible = chances.any(dim=1, keepdim=True)
        generator = torch.Generator(allowed.device).manual_seed(0)
        drawn = torch.multinomial(
            torch.where(possible, chances, 1.0), draws, replacement=True, generator=generator
        )
        return torch.where(possible, drawn, -1)

    def _mixed(self, inside: Tensor, outside: Tensor) -> Tensor:
        """Predictions for one image inside and another outside, `(M, draws)`; −1 where one is missing."""
        predictions = torch.full_like(inside, -1)
        present = ((inside >= 0) & (outside >= 0)).nonzero(as_tuple=True)
        for part in torch.split(torch.stack(present), self.batch_size, dim=1):
            place = part[0], part[1]
            kept, other = inside[place], outside[place]
            mine, theirs = self._mask(kept, other), self._mask(other, kept)
            fits = self.fits[kept, other][:, None, None]
            stays = torch.where(fits, torch.maximum(mine, theirs), mine)[:, None]
            logits = find_logits(self.model(self.images[kept] * stays + self.images[other] * (1 - stays)))
            predictions[place] = self._predicted(logits)
        return predictions

    def _predicted(self, logits: Tensor) -> Tensor:
        """Predictions, int64: the class; or 1 where the class in question is present, 0 where it is not."""
        return logits.argmax(dim=1) if self.question is None else (logits[:, self.question] > 0).long()

    def _mask(self, image: Tensor, partner: Tensor) -> Tensor:
        """Masks of images, or of their partners where there is none."""
        return self.masks[torch.where(self.has_mask[image], image, partner)]

    def _changed(self, predictions: Tensor, image: Tensor) -> Tensor:
        """1 where a prediction is not the image's own, 0 where it is, NaN where there is none."""
        return torch.where(predictions < 0, torch.nan, (predictions != self.predictions[image]).float())
