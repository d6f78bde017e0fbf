"""Which classes of an image are explained, as `--target` writes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnguide.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor

    from attnguide.pairs import Targets

__all__ = ["Target", "parse_target"]


@dataclass(frozen=True)
class Target:
    """A choice of classes.

    Attributes:
        named: What [`explain`][attnguide.explain] takes as it is: `"predicted"`, `"all"` or class
            indices; None if the answer of the model decides.
        top: So many classes of the highest logits; 0 for those that the model says yes to, and the likeliest
            if it says yes to none.
    """

    named: str | tuple[int, ...] | None
    top: int = 0

    @property
    def needs_logits(self) -> bool:
        """Whether the model must have answered before the classes are known."""
        return self.named is None

    def of(self, logits: Tensor | None) -> Targets:
        """Choose the classes for the answers of the model, logits `(B, K)`."""
        if self.named is not None or logits is None:
            return self.named or "predicted"
        order = logits.argsort(dim=1, descending=True)
        rows = []
        for sample, classes in enumerate(order.tolist()):
            count = self.top or max(1, int((logits[sample] > 0).sum()))
            rows += [(sample, cls) for cls in classes[:count]]
        return rows


def parse_target(text: str, classes: Sequence[str], multi_label: bool) -> Target:
    """Read `predicted`, `all`, `top:3`, or class indices and names with commas between them.

    Args:
        text: What the user wrote.
        classes: Name of each class of the model.
        multi_label: Whether several classes can be predicted at once.

    Returns:
        The choice.

    Raises:
        UnknownNameError: If there is no such class; the nearest is offered.
        InputError: If an index is out of range, or several classes have the name.
    """
    if text == "all":
        return Target("all")
    if text == "predicted":
        return Target(None) if multi_label and len(classes) > 1 else Target("predicted")
    if found := re.fullmatch(r"top:?(\d+)", text):
        if not int(found[1]):
            raise InputError(f"--target {text} asks for no class. Write top:1 or more.")
        return Target(None, top=min(int(found[1]), len(classes)))
    # A name may have a comma in it.
    parts = [text] if _matches(text, classes) else [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise InputError(
            "--target is empty. Write predicted, all, top:3, or classes with commas between them."
        )
    # Twice the same class would be twice the same file.
    return Target(tuple(dict.fromkeys(_class(part, classes) for part in parts)))


def _class(text: str, classes: Sequence[str]) -> int:
    if text.isascii() and text.isdigit():
        if int(text) >= len(classes):
            raise InputError(
                f"--target {text} is out of range: the model has classes 0 to {len(classes) - 1}."
            )
        return int(text)
    found = _matches(text, classes)
    if not found:
        raise UnknownNameError("class", text, classes)
    if len(found) > 1:
        raise InputError(
            f"--target {text} is the name of classes {', '.join(map(str, found))}. Give the index instead."
        )
    return found[0]


def _matches(text: str, classes: Sequence[str]) -> list[int]:
    return [index for index, name in enumerate(classes) if name.casefold() == text.casefold()]
