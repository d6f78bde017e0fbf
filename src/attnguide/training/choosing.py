"""Chooses λ and the epoch by accuracy on validation images with exchanged surroundings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnguide.errors import InputError

__all__ = ["Tried", "choose_epoch", "choose_weight"]


@dataclass(frozen=True)
class Tried:
    """A λ that was tried.

    Attributes:
        weight: The λ.
        score: Accuracy that it reached, in [0, 1].
        error: Standard error of the accuracy.
    """

    weight: float
    score: float
    error: float


def choose_weight(tried: Sequence[Tried]) -> Tried:
    """Choose the largest λ within one standard error of the best.

    Differences below the error say nothing, and of what is equally good as far as one can see, more guidance
    is the safer choice: a shortcut that validation images do not show cannot be used either.

    Args:
        tried: At least one λ with what it reached; the error is that of the best of them.

    Returns:
        The chosen one.

    Raises:
        InputError: If there is none.
    """
    if not tried:
        raise InputError("there is no λ to choose from.")
    best = max(tried, key=lambda each: each.score)
    return max(
        (each for each in tried if each.score >= best.score - best.error), key=lambda each: each.weight
    )


def choose_epoch(scores: Sequence[float | None]) -> int:
    """Choose the epoch of the highest score, the first of several.

    Not the earliest within one standard error: on few validation images that stops before a network has
    learned its task. Over 75 finished runs of `benchmarks/effect.py` the best epoch lost 0.1 to 0.2 points of
    test accuracy to the best epoch of the test, 1.2 at most; the earliest within one error 0.1 to 0.35, 2.2
    at most.

    Args:
        scores: Scores of the epochs; None and NaN count as the lowest.

    Returns:
        Its position, from 0.

    Raises:
        InputError: If there is no epoch.
    """
    if not scores:
        raise InputError("there is no epoch to choose from.")
    known = [-1.0 if score is None or score != score else score for score in scores]
    return known.index(max(known))
