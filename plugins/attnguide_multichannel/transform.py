"""Intentional transformation of masks: makes attributes rely more, or less, on chosen channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from attnguide.errors import InputError
from attnguide_multichannel.attention import MultiChannel

__all__ = ["emphasized", "important", "suppressed", "transformed"]


@contextmanager
def transformed(adapter: MultiChannel, factors: Tensor) -> Iterator[None]:
    """Multiply the masks by factors inside the context.

    Args:
        adapter: The multi-channel attention.
        factors: Factor for each attribute and channel, `(K, C)`, at least 0.

    Raises:
        InputError: If the shape is wrong, or a factor is negative or not finite.
    """
    own = adapter.masking.factors
    if factors.shape != own.shape:
        raise InputError(f"factors have shape {tuple(factors.shape)}; expected {tuple(own.shape)}.")
    if not bool(((factors >= 0) & factors.isfinite()).all()):
        raise InputError("factors must be finite and at least 0.")
    before = own.clone()
    own.copy_(before * factors.to(before))
    try:
        yield
    finally:
        own.copy_(before)


@contextmanager
def emphasized(
    adapter: MultiChannel, importance: Tensor, *, share: float = 0.25, factor: float = 0.0
) -> Iterator[None]:
    """Let each attribute rely on its important channels: the masks of the others are multiplied by a factor.

    Args:
        adapter: The multi-channel attention.
        importance: Importance `(K, C)`, from an analysis.
        share: Share of the channels that are important, in (0, 1].
        factor: Factor on the masks of the others.
    """
    chosen = important(importance, share)
    with transformed(adapter, torch.where(chosen, 1.0, factor)):
        yield


@contextmanager
def suppressed(
    adapter: MultiChannel,
    importance: Tensor,
    attribute: int,
    of: Sequence[int],
    *,
    share: float = 0.25,
    factor: float = 0.0,
) -> Iterator[None]:
    """Keep an attribute from relying on channels that are important to others, which occur together with it.

    A channel that is more important to the attribute itself than to the others is kept.

    Args:
        adapter: The multi-channel attention.
        importance: Importance `(K, C)`, from an analysis.
        attribute: Index of the attribute.
        of: Indices of the others.
        share: Share of the channels that are important to each, in (0, 1].
        factor: Factor on the masks of these channels.
    """
    chosen = important(importance, share)
    relative = importance / importance.sum(dim=1, keepdim=True).clamp(min=1e-12)
    others = list(of)
    theirs = chosen[others].any(dim=0) & (relative[others].amax(dim=0) > relative[attribute])
    factors = torch.ones_like(importance)
    factors[attribute, theirs] = factor
    with transformed(adapter, factors):
        yield


def important(importance: Tensor, share: float) -> Tensor:
    """Select the channels that are important to each attribute.

    Args:
        importance: Importance `(K, C)`.
        share: Share of the channels, in (0, 1]; at least one.

    Returns:
        Bools `(K, C)`.

    Raises:
        InputError: If the share is out of range.
    """
    if not 0 < share <= 1:
        raise InputError(f"share={share} must be above 0 and at most 1.")
    count = max(1, round(share * importance.shape[1]))
    chosen = torch.zeros_like(importance, dtype=torch.bool)
    return chosen.scatter(1, importance.topk(count, dim=1).indices, value=True)
