"""Losses by position; see [`pointwise_loss`][attnguide.functional.pointwise_loss]."""

from __future__ import annotations

import torch
from torch import Tensor

from attnguide import functional
from attnguide.functional import Distance, Mode, Reduction, Scale
from attnguide.interfaces import AlignmentLoss

__all__ = ["L1", "MSE", "PPCE", "Outside", "Pointwise"]


class Pointwise(AlignmentLoss):
    """A distance at each position; the other losses are special cases.

    Args:
        distance: `"absolute"`, `"squared"` or `"cross_entropy"`.
        mode: `"match"`: like the prior everywhere; `"suppress"`: nothing outside; `"reward"`: full inside.
        scale: How maps are scaled before: `"unit"`, `"signed"` or `"none"`.
        reduction: `"mean"` over the positions that count, or `"sum"`.

    Raises:
        InputError: If a choice is unknown or impossible.
    """

    def __init__(
        self, distance: Distance, mode: Mode, scale: Scale = "unit", reduction: Reduction = "mean"
    ) -> None:
        self.distance, self.mode, self.scale, self.reduction = distance, mode, scale, reduction
        nothing = torch.zeros(1, 1, 1)
        self(nothing, nothing)  # a wrong choice is refused here, not in the first step

    def __call__(self, attribution: Tensor, prior: Tensor) -> Tensor:
        """Compare maps `(N, h, w)`; losses `(N,)`."""
        return functional.pointwise_loss(
            attribution, prior, self.distance, self.mode, self.scale, self.reduction
        )

    def __repr__(self) -> str:
        settings = f"mode={self.mode!r}, scale={self.scale!r}, reduction={self.reduction!r}"
        return f"{type(self).__name__}({settings})"


class L1(Pointwise):
    """Mean absolute difference (Rao et al., ICCV 2023)."""

    def __init__(self, *, mode: Mode = "match", scale: Scale = "unit", reduction: Reduction = "mean") -> None:
        super().__init__("absolute", mode, scale, reduction)


class MSE(Pointwise):
    """Mean squared difference; with `reduction="sum"` HINT, as defined by Friedrich et al. (2022)."""

    def __init__(self, *, mode: Mode = "match", scale: Scale = "unit", reduction: Reduction = "mean") -> None:
        super().__init__("squared", mode, scale, reduction)


class PPCE(Pointwise):
    """Pixel-wise cross entropy that rewards evidence inside the prior (Rao et al., ICCV 2023)."""

    def __init__(self, *, mode: Mode = "reward", reduction: Reduction = "mean") -> None:
        super().__init__("cross_entropy", mode, "unit", reduction)


class Outside(Pointwise):
    """Squared attribution where it is forbidden (Rao et al., ICCV 2023, after Ross et al., IJCAI 2017).

    Each map is scaled to a largest magnitude of 1, signs kept, so that λ means the same for any source and
    model. "Right for the right reasons" itself, on gradients as they are: `scale="none"`, `reduction="sum"`.
    """

    def __init__(
        self, *, mode: Mode = "suppress", scale: Scale = "signed", reduction: Reduction = "mean"
    ) -> None:
        super().__init__("squared", mode, scale, reduction)
