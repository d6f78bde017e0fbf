"""Losses that compare a whole map with its prior, thin classes around [functional][attnguide.functional]."""

from __future__ import annotations

from torch import Tensor

from attnguide import functional
from attnguide.interfaces import AlignmentLoss

__all__ = ["KL", "Cosine", "Dice", "Energy", "IoU", "StandardisedCosine"]


class IoU(AlignmentLoss):
    """Negative logarithm of the soft IoU; see [`functional.iou`][attnguide.functional.iou]."""

    def __call__(self, attribution: Tensor, prior: Tensor) -> Tensor:
        """Compare maps `(N, h, w)`; losses `(N,)`."""
        return functional.iou(attribution, prior)


class Cosine(AlignmentLoss):
    """One minus the cosine; see [`functional.cosine`][attnguide.functional.cosine]."""

    def __call__(self, attribution: Tensor, prior: Tensor) -> Tensor:
        """Compare maps `(N, h, w)`; losses `(N,)`."""
        return functional.cosine(attribution, prior)


class Energy(AlignmentLoss):
    """Share of the attribution outside the prior; see [`functional.energy`][attnguide.functional.energy]."""

    def __call__(self, attribution: Tensor, prior: Tensor) -> Tensor:
        """Compare maps `(N, h, w)`; losses `(N,)`."""
        return functional.energy(attribution, prior)


class Dice(AlignmentLoss):
    """One minus the soft Dice coefficient; see [`functional.dice`][attnguide.functional.dice]."""

    def __call__(self, attribution: Tensor, prior: Tensor) -> Tensor:
        """Compare maps `(N, h, w)`; losses `(N,)`."""
        return functional.dice(attribution, prior)


class KL(AlignmentLoss):
    """Divergence of where the model looks from the prior; see [`functional.kl`][attnguide.functional.kl]."""

    def __call__(self, attribution: Tensor, prior: Tensor) -> Tensor:
        """Compare maps `(N, h, w)`; losses `(N,)`."""
        return functional.kl(attribution, prior)


class StandardisedCosine(AlignmentLoss):
    """One minus the correlation.

    See [`functional.standardised_cosine`][attnguide.functional.standardised_cosine].
    """

    def __call__(self, attribution: Tensor, prior: Tensor) -> Tensor:
        """Compare maps `(N, h, w)`; losses `(N,)`."""
        return functional.standardised_cosine(attribution, prior)
