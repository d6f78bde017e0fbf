"""Losses of a whole map and its prior: thin classes around [functional][attnguide.functional]."""

from __future__ import annotations

from torch import Tensor

from attnguide import functional
from attnguide.interfaces import AlignmentLoss

__all__ = ["KL", "Correlation", "Cosine", "Dice", "Energy", "IoU"]


class IoU(AlignmentLoss):
    """Negative logarithm of the soft IoU; see [`functional.iou_loss`][attnguide.functional.iou_loss]."""

    def __call__(self, attribution: Tensor, prior: Tensor) -> Tensor:
        """Compare maps `(N, h, w)`; losses `(N,)`."""
        return functional.iou_loss(attribution, prior)


class Cosine(AlignmentLoss):
    """One minus the cosine; see [`functional.cosine_loss`][attnguide.functional.cosine_loss]."""

    def __call__(self, attribution: Tensor, prior: Tensor) -> Tensor:
        """Compare maps `(N, h, w)`; losses `(N,)`."""
        return functional.cosine_loss(attribution, prior)


class Energy(AlignmentLoss):
    """Share of the attribution outside the prior; see [`energy_loss`][attnguide.functional.energy_loss]."""

    def __call__(self, attribution: Tensor, prior: Tensor) -> Tensor:
        """Compare maps `(N, h, w)`; losses `(N,)`."""
        return functional.energy_loss(attribution, prior)


class Dice(AlignmentLoss):
    """One minus the soft Dice coefficient; see [`functional.dice_loss`][attnguide.functional.dice_loss]."""

    def __call__(self, attribution: Tensor, prior: Tensor) -> Tensor:
        """Compare maps `(N, h, w)`; losses `(N,)`."""
        return functional.dice_loss(attribution, prior)


class KL(AlignmentLoss):
    """Divergence of the attribution from the prior; see [`kl_loss`][attnguide.functional.kl_loss]."""

    def __call__(self, attribution: Tensor, prior: Tensor) -> Tensor:
        """Compare maps `(N, h, w)`; losses `(N,)`."""
        return functional.kl_loss(attribution, prior)


class Correlation(AlignmentLoss):
    """One minus the correlation.

    See [`functional.correlation_loss`][attnguide.functional.correlation_loss].
    """

    def __call__(self, attribution: Tensor, prior: Tensor) -> Tensor:
        """Compare maps `(N, h, w)`; losses `(N,)`."""
        return functional.correlation_loss(attribution, prior)
