"""Losses by position; see [`pointwise_loss`][attnguide.functional.pointwise_loss]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnguide import functional
from attnguide.errors import InputError
from attnguide.functional import Distance, Mode, Reduction, Scale
from attnguide.interfaces import AlignmentLoss

__all__ = ["L1", "MSE", "PPCE", "InsideOutside", "Outside", "Pointwise"]


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


class InsideOutside(AlignmentLoss):
    """Squared attribution outside the prior, and what is missing inside (RobustViT, Chefer et al., 2022).

    See [`functional.inside_outside_loss`][attnguide.functional.inside_outside_loss].

    Args:
        inside: Weight of what is missing inside.
        outside: Weight of what is outside.

    Raises:
        InputError: If a weight is negative or not finite, or both are 0.
    """

    def __init__(self, *, inside: float = 0.3, outside: float = 2.0) -> None:
        for name, value in (("inside", inside), ("outside", outside)):
            if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise InputError(f"{name}={value!r} must be a finite number of at least 0.")
        if not inside and not outside:
            raise InputError("inside=0 and outside=0 leave nothing to compare. Give one a weight.")
        self.inside, self.outside = inside, outside

    def __call__(self, attribution: Tensor, prior: Tensor) -> Tensor:
        """Compare maps `(N, h, w)`; losses `(N,)`."""
        return functional.inside_outside_loss(attribution, prior, self.inside, self.outside)

    def __repr__(self) -> str:
        return f"InsideOutside(inside={self.inside}, outside={self.outside})"
