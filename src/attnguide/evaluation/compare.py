"""Compares a model before and after guidance, on the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from attnguide import functional, visual
from attnguide.errors import InputError
from attnguide.evaluation.evaluate import (
    ClassResult,
    Evaluation,
    ImageResult,
    LabeledImage,
    MaskFor,
    measure_images,
    read_batches,
)
from attnguide.explanation import explain
from attnguide.models import LoadedModel

__all__ = [
    "Change",
    "ChangeKind",
    "Comparison",
    "Overlays",
    "check_comparable",
    "collect_changes",
    "compare_folder",
    "draw_overlays",
]

#: Kinds of changes: more energy in the mask, less of it; predictions that became right, that became wrong.
ChangeKind = Literal["rose", "fell", "righted", "wronged"]


@dataclass(frozen=True)
class Change:
    """The results of one image, before and after.

    Attributes:
        before: Result of the model before.
        after: Result of the model after.
    """

    before: ImageResult
    after: ImageResult

    @property
    def image(self) -> LabeledImage:
        """The file and its class."""
        return self.before.image

    @property
    def probability(self) -> float:
        """Change of the probability of the true class."""
        return self.after.probability - self.before.probability

    @property
    def energy(self) -> float | None:
        """Change of the energy in the mask; None without a mask."""
        if "energy" not in self.before.scores:
            return None
        return self.after.scores["energy"] - self.before.scores["energy"]


@dataclass
class Comparison:
    """The results of a model before and after.

    Attributes:
        names: Names of the classes, in the order of the logits.
        before: Results before, by class.
        after: Results after, by class.
        groups: Results before and after, by group; empty without groups.
        changes: Results by image, in the order of the files.
        gone: Images that are no longer there, of which maps are stored: predictions, and no scores.
    """

    names: tuple[str, ...]
    before: Evaluation
    after: Evaluation
    groups: dict[str, tuple[ClassResult, ClassResult]] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    gone: list[Path] = field(default_factory=list)

    @property
    def failures(self) -> dict[Path, str]:
        """Files that could not be read, with the reason."""
        return self.before.failures

    def largest(self, kind: ChangeKind) -> list[Change]:
        """Return all changes of a kind, the largest first.

        They are ordered by the change of the energy in the mask, or, where the prediction became right or
        wrong, of the probability of the true class.
        """
        moved = [(change.energy, change) for change in self.changes if change.energy is not None]
        if kind == "rose":
            return [change for by, change in sorted(moved, key=lambda pair: -pair[0]) if by > 0]
        if kind == "fell":
            return [change for by, change in sorted(moved, key=lambda pair: pair[0]) if by < 0]
        right = kind == "righted"
        flipped = [
            change
            for change in self.changes
            if (change.before.right, change.after.right) == (not right, right)
        ]
        return sorted(flipped, key=lambda change: -change.probability if right else change.probability)


def check_comparable(before: LoadedModel, after: LoadedModel, files: Sequence[Path]) -> None:
    """Check that two models can be compared image by image.

    Args:
        before: The model before.
        after: The model after.
        files: Files of their weights, for the error.

    Raises:
        InputError: If their classes or their preprocessing differ.
    """
    for what, old, new in (
        ("classes", before.classes, after.classes),
        ("sizes of images", before.size, after.size),
        ("means of images", before.mean, after.mean),
        ("standard deviations of images", before.std, after.std),
    ):
        if old != new:
            raise InputError(
                f"{files[0]} and {files[1]} have different {what}: {_listed(old)} and {_listed(new)}. "
                "Compare two states of one model."
            )


def _listed(values: Sequence[object]) -> str:
    more = f" … ({len(values)} in all)" if len(values) > 4 else ""
    return ", ".join(map(str, values[:4])) + more


def compare_folder(
    before: LoadedModel,
    after: LoadedModel,
    images: Sequence[LabeledImage],
    mask_for: MaskFor,
    *,
    group_of: Callable[[Path], str | None] = lambda path: None,
    source: str = "grad_cam",
    layer: str | list[str] = "auto",
    threshold: float = 0.5,
    batch_size: int = 32,
    device: torch.device | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Comparison:
    """Measure two states of one model on the same images.

    Args:
        before: The model before.
        after: The model after; with the same classes and preprocessing.
        images: The files.
        mask_for: Returns the mask of an image.
        group_of: Returns the group of an image, or None.
        source: Attribution source.
        layer: Layer to explain.
        threshold: Threshold of the IoU.
        batch_size: Number of images at once.
        device: Device of the models; by default that of the first.
        advance: Called with the number of images that are done.
    """
    failures: dict[Path, str] = {}
    empty: list[Path] = []
    records = measure_images(
        [before, after],
        images,
        mask_for,
        failures,
        empty,
        source=source,
        layer=layer,
        threshold=threshold,
        batch_size=batch_size,
        device=device,
        advance=advance,
    )
    changes = (Change(old, new) for old, new in records)
    return collect_changes(before.classes, changes, failures, empty, group_of)


def collect_changes(
    names: tuple[str, ...],
    changes: Iterable[Change],
    failures: dict[Path, str],
    empty: list[Path],
    group_of: Callable[[Path], str | None],
) -> Comparison:
    """Sort changes by class and by group.

    Args:
        names: Names of the classes.
        changes: Results of each image.
        failures: Files that could not be read, which are added while `changes` are drawn.
        empty: Files whose mask has no pixel inside; likewise.
        group_of: Returns the group of an image, or None.
    """
    first, second = (Evaluation({name: ClassResult() for name in names}, failures, empty) for _ in range(2))
    result = Comparison(names, first, second)
    for change in changes:
        result.changes.append(change)
        old, new = change.before, change.after
        name, group = names[old.image.cls], group_of(old.image.path)
        pairs = [(first.classes[name], second.classes[name])]
        if group is not None:
            pairs.append(result.groups.setdefault(group, (ClassResult(), ClassResult())))
        for was, now in pairs:
            was.add(old)
            now.add(new)
    return result


@dataclass(frozen=True)
class Overlays:
    """The maps of an image's true class, laid over it.

    Attributes:
        before: Overlay of the model before; the map alone if the image is no longer there.
        after: The same of the model after.
        mask: Mask after the model's preprocessing, `(H, W)`; None where there is none.
        layer: The explained layer.
        gone: Whether the image is no longer there.
    """

    before: Image.Image
    after: Image.Image
    mask: Tensor | None
    layer: str
    gone: bool = False


def draw_overlays(
    before: LoadedModel,
    after: LoadedModel,
    images: Sequence[LabeledImage],
    mask_for: MaskFor,
    *,
    source: str = "grad_cam",
    layer: str | list[str] = "auto",
    batch_size: int = 32,
) -> Mapping[Path, Overlays]:
    """Lay the maps of both models over a few images, which are read again.

    Each map shows what counts as energy: its positive part, scaled by its maximum.

    Args:
        before: The model before.
        after: The model after.
        images: The files.
        mask_for: Returns the mask of an image.
        source: Attribution source.
        layer: Layer to explain.
        batch_size: Number of images at once.

    Returns:
        Overlays by file, without files that can no longer be read.
    """
    device = next(before.model.parameters()).device
    drawn: dict[Path, Overlays] = {}
    for batch in read_batches(before, images, mask_for, {}, [], batch_size=batch_size):
        pixels = torch.stack([sample.pixels for sample in batch]).to(device)
        pairs = [(row, sample.image.cls) for row, sample in enumerate(batch)]
        overlays = []
        for loaded in (before, after):
            shown = explain(loaded.model, pixels, source, pairs, layer)
            maps = functional.unit(shown.maps[:, 0])[:, None]
            overlays.append(visual.overlay(loaded.displayed(pixels), maps)[:, 0])
        for sample, old, new in zip(batch, *overlays, strict=True):
            pictures = visual.to_pil(old), visual.to_pil(new)
            drawn[sample.image.path] = Overlays(*pictures, sample.mask, shown.layer)
    return drawn
