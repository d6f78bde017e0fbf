"""Do a model's answers follow what is inside of masks, or what is outside? Images are cut and swapped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnguide.capture.calls import find_logits
from attnguide.pairs import Pairs

__all__ = ["Exchanges", "exchange"]

#: Side at which masks are compared when partners are chosen.
_COARSE = 16
#: About so many exchanges are made of each kind, at least one and at most eight for an answer.
_EXCHANGES = 1000


@dataclass(frozen=True)
class Exchanges:
    """Share of the answers that change; NaN where there was no partner.

    Attributes:
        cls: The class that an answer is about, `(N,)`.
        outside: When what is outside is exchanged for that of an image with another answer, `(N,)`.
        chance: The same with an image of the same answer: what noise, and the cut itself, change, `(N,)`.
        inside: When what is inside is exchanged for that of an image with another answer, `(N,)`.
    """

    cls: Tensor
    outside: Tensor
    chance: Tensor
    inside: Tensor


@torch.no_grad()
def exchange(
    model: nn.Module,
    images: Tensor,
    logits: Tensor,
    truth: Tensor,
    pairs: Pairs,
    masks: Tensor,
    batch_size: int,
) -> Exchanges:
    """Cut images along their masks, and swap the parts between two of them.

    Partners are drawn by the model's *answers*: whatever these follow differs between two images with
    different answers, and not between two with the same one, whether or not it has to do with the labels.
    Both combinations of the two are tried, so that a shortcut is found that only adds evidence. Where either
    of the two masks allows to look, nothing is exchanged: else the other image's object would come in from
    outside.

    Args:
        model: The model, in evaluation mode.
        images: `(B, C, H, W)`.
        logits: The model's, `(B, K)`.
        truth: Class indices `(B,)`, or positives `(B, K)` where each class is a question of its own.
        pairs: The predictions to try.
        masks: Where the model may look for each, `(N, H, W)` in [0, 1]. An image without a pair is cut along
            the mask of its partner.
        batch_size: Number of images at once.
    """
    several = truth.ndim == 2 or logits.shape[1] == 1
    # A model that gives each image one class answers one question, one that says yes or no to classes many.
    questions = torch.unique(pairs.cls).tolist() if several else [None]
    count = len(pairs) if several else len(torch.unique(pairs.sample))
    draws = min(max(_EXCHANGES // max(count, 1), 1), 8)
    found = []
    for question in questions:
        if question is None:
            asked, labels = torch.ones_like(pairs.cls, dtype=torch.bool), truth
        else:
            asked, labels = pairs.cls == question, truth.view(len(images), -1)[:, question]
        cut = _Cut(model, images, logits, question, pairs.sample[asked], masks[asked], batch_size)
        found.append(cut.exchange(labels, draws))
    return Exchanges(*(torch.cat(each) for each in zip(*found, strict=True)))


class _Cut:
    """Images with their answers to one question, to be cut along masks.

    Args:
        model: The model, in evaluation mode.
        images: `(B, C, H, W)`.
        logits: The model's, `(B, K)`.
        question: The class asked for; None: which one it is.
        sample: The image of each mask, `(N,)`; of several its union counts.
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
        self.answers = self._read(logits)
        self.known = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        self.known[sample] = True
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
        return alike | ~self.known[:, None] | ~self.known

    def exchange(self, labels: Tensor, draws: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Exchange each image that has a mask with so many others; class and changes as in `Exchanges`."""
        same = self.answers[:, None] == self.answers
        # Where all answers are the same, labels must do.
        others = labels[:, None] != labels if bool(same.all()) else ~same
        rows = self.known.nonzero()[:, 0]
        image = rows[:, None].expand(-1, draws)
        partner = self._drawn(others, draws)[rows]
        alike = self._drawn(same.fill_diagonal_(False), draws)
        beside = alike.gather(0, partner.clamp(min=0))
        own, given = self._answers(image, partner), self._answers(partner, image)
        outside = (self._turned(own, image) + self._turned(given, partner)) / 2
        inside = (self._turned(own, partner) + self._turned(given, image)) / 2
        controls = ((image, alike[rows]), (partner, beside))
        chance = [self._turned(self._answers(kept, other), kept) for kept, other in controls]
        cls = self.answers[rows] if self.question is None else torch.full_like(rows, self.question)
        kinds = outside, torch.stack(chance).nanmean(dim=0), inside
        changes = [torch.where(partner < 0, torch.nan, each).nanmean(dim=1) for each in kinds]
        return cls, changes[0], changes[1], changes[2]

    def _drawn(self, allowed: Tensor, draws: int) -> Tensor:
        """Partners of each image, `(B, draws)`: of those that fit, if any does; −1 if none is allowed."""
        best = allowed & self.fits
        chances = torch.where(best.any(dim=1, keepdim=True), best, allowed).float()
        some = chances.any(dim=1, keepdim=True)
        generator = torch.Generator(allowed.device).manual_seed(0)
        drawn = torch.multinomial(
            torch.where(some, chances, 1.0), draws, replacement=True, generator=generator
        )
        return torch.where(some, drawn, -1)

    def _answers(self, inside: Tensor, outside: Tensor) -> Tensor:
        """Answers to one image inside and another outside, `(M, draws)`; −1 where one is missing."""
        said = torch.full_like(inside, -1)
        present = ((inside >= 0) & (outside >= 0)).nonzero(as_tuple=True)
        for which in torch.split(torch.stack(present), self.batch_size, dim=1):
            place = which[0], which[1]
            kept, other = inside[place], outside[place]
            mine, theirs = self._mask(kept, other), self._mask(other, kept)
            fits = self.fits[kept, other][:, None, None]
            stays = torch.where(fits, torch.maximum(mine, theirs), mine)[:, None]
            logits = find_logits(self.model(self.images[kept] * stays + self.images[other] * (1 - stays)))
            said[place] = self._read(logits)
        return said

    def _read(self, logits: Tensor) -> Tensor:
        """Answers to the question, int64: the class; or 1 for yes, 0 for no."""
        return logits.argmax(dim=1) if self.question is None else (logits[:, self.question] > 0).long()

    def _mask(self, image: Tensor, partner: Tensor) -> Tensor:
        """Masks of images, or of their partners where there is none."""
        return self.masks[torch.where(self.known[image], image, partner)]

    def _turned(self, said: Tensor, image: Tensor) -> Tensor:
        """1 where an answer is another than the image's own, 0 where not, NaN where there is none."""
        return torch.where(said < 0, torch.nan, (said != self.answers[image]).float())
