"""The standard alignment losses, thin classes around [functional][attnguide.functional]."""

from __future__ import annotations

from torch import Tensor

from attnguide import functional
from attnguide.interfaces import AlignmentLoss

__all__ = ["MSE", "Cosine", "Energy", "IoU"]


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


class MSE(AlignmentLoss):
    """Mean squared difference; see [`functional.mse`][attnguide.functional.mse]."""

    def __call__(self, attribution: Tensor, prior: Tensor) -> Tensor:
        """Compare maps `(N, h, w)`; losses `(N,)`."""
        return functional.mse(attribution, prior)
