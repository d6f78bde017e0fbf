"""Reads `--target`: the classes of an image to explain."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnguide.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from attnguide.pairs import Targets

__all__ = ["Target", "parse_target"]


@dataclass(frozen=True)
class Target:
    """A choice of classes.

    Attributes:
        named: Argument of [`explain`][attnguide.explain]: `"predicted"`, `"all"` or class indices; None if
            the logits determine the classes.
        top: Number of classes with the highest logits; 0 for all predicted classes of a multi-label model, or
            the most likely class if none is predicted.
    """

    named: str | tuple[int, ...] | None
    top: int = 0

    @property
    def needs_logits(self) -> bool:
        """Whether the classes depend on the logits."""
        return self.named is None

    def of_images(self, model: nn.Module, images: Tensor) -> Targets:
        """Choose the classes of images, for which the model runs if they depend on its logits."""
        if not self.needs_logits:
            return self.of(None)
        import torch

        from attnguide.capture.logits import find_logits
        from attnguide.capture.model_state import evaluating

        with torch.no_grad(), evaluating(model):
            return self.of(find_logits(model(images)))

    def of(self, logits: Tensor | None) -> Targets:
        """Choose the classes by the logits `(B, K)`."""
        if self.named is not None or logits is None:
            return self.named or "predicted"
        order = logits.argsort(dim=1, descending=True)
        rows = []
        for sample, classes in enumerate(order.tolist()):
            count = self.top or max(1, int((logits[sample] > 0).sum()))
            rows += [(sample, cls) for cls in classes[:count]]
        return rows


def parse_target(text: str, classes: Sequence[str], multi_label: bool) -> Target:
    """Read `predicted`, `all`, `top:3`, or class indices and names separated by commas.

    Args:
        text: Value of the option.
        classes: Name of each class of the model.
        multi_label: Whether several classes can be predicted at once.

    Returns:
        The choice.

    Raises:
        UnknownNameError: If there is no such class; the most similar name is suggested.
        InputError: If an index is out of range, or several classes have the name.
    """
    if text == "all":
        return Target("all")
    if text == "predicted":
        return Target(None) if multi_label and len(classes) > 1 else Target("predicted")
    if match := re.fullmatch(r"top:?([0-9]{1,9})", text):
        if not int(match[1]):
            raise InputError(f"--target {text} selects no class. Write top:1 or more.")
        return Target(None, top=min(int(match[1]), len(classes)))
    # A name may contain a comma.
    parts = [text] if _matches(text, classes) else [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise InputError("--target is empty. Write predicted, all, top:3, or classes separated by commas.")
    # A repeated class would give the same file again.
    return Target(tuple(dict.fromkeys(_class(part, classes) for part in parts)))


def _class(text: str, classes: Sequence[str]) -> int:
    if text.isascii() and text.isdigit():
        # Python reads no number of thousands of digits.
        if len(text) > 9 or int(text) >= len(classes):
            raise InputError(
                f"--target {text:.40} is out of range: the model has classes 0 to {len(classes) - 1}."
            )
        return int(text)
    indices = _matches(text, classes)
    if not indices:
        raise UnknownNameError("class", text, classes)
    if len(indices) > 1:
        raise InputError(
            f"--target {text} is the name of classes {', '.join(map(str, indices))}. Give the index instead."
        )
    return indices[0]


def _matches(text: str, classes: Sequence[str]) -> list[int]:
    return [index for index, name in enumerate(classes) if name.casefold() == text.casefold()]
