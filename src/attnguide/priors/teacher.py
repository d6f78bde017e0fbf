"""The maps of another model: look where this model looks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnguide import functional
from attnguide.capture.logits import find_logits
from attnguide.capture.model_state import weights_digest
from attnguide.errors import InputError
from attnguide.explanation import explain
from attnguide.interfaces import AttributionSource, PriorMaps
from attnguide.models.loaded_model import LoadedModel
from attnguide.priors.finding import (
    FindingPrior,
    Normalization,
    normalization_of,
    own_copy,
    renormalized,
)

__all__ = ["Teacher", "TeacherPrior"]

#: A teacher: a model, or a checkpoint or name that it is loaded by.
Teacher = nn.Module | LoadedModel | str | Path


class TeacherPrior(FindingPrior):
    """Where a teacher looks for the same class (explanation distillation).

    The teacher is copied, so that it stays as it is while the model is trained. Its map is scaled to a
    maximum of 1; a map that shows nothing drops out, and so does a class that the teacher does not know.

    Args:
        model: The teacher, or several, whose scaled maps are averaged. By default the guided model as it is
            at its first batch, such as before fine-tuning. A text is a checkpoint of `attnguide train`,
            `"run/model.safetensors"`, or the name of a model with published weights, as for
            [`models.load`][attnguide.models.load]; it is loaded at the first batch.
        source: Attribution source of the teacher.
        layer: Layer of the teacher.
        classes: The teacher's class for each class of the guided model, None where it has none. By default
            both have the same classes.
        threshold: Share of the maximum from which on a position is inside; None for the map itself.
        normalization: Mean and standard deviation of the images that the guided model sees; a teacher that is
            loaded by its name, or a `LoadedModel`, gets images as it wants them. By default as the guided
            model says itself, else those of the teacher.
        cache: Folder of regions; see [`FindingPrior`][attnguide.priors.FindingPrior].

    Raises:
        InputError: If a model is none, or the threshold is not in (0, 1].
    """

    by_class = True

    def __init__(
        self,
        model: Teacher | Sequence[Teacher] | None = None,
        *,
        source: str | AttributionSource = "grad_cam",
        layer: str | list[str] = "auto",
        classes: Sequence[int | None] | None = None,
        threshold: float | None = None,
        normalization: Normalization | None = None,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__(cache)
        if threshold is not None and not (isinstance(threshold, (int, float)) and 0 < threshold <= 1):
            raise InputError(f"threshold={threshold!r} must be in (0, 1], a share of the map's maximum.")
        listed: list[Any] = (
            [] if model is None else list(model) if isinstance(model, (list, tuple)) else [model]
        )
        #: Teachers that are loaded later, by name.
        self.named = [str(teacher) for teacher in listed if isinstance(teacher, (str, Path))]
        self.models: list[nn.Module] = []
        #: How each teacher wants its images normalised; None for as they are.
        self._wants: list[Normalization | None] = []
        for teacher in listed:
            if not isinstance(teacher, (str, Path)):
                self._add(teacher)
        self.source, self.layer, self.threshold = source, layer, threshold
        self.normalization = normalization
        self.classes = None if classes is None else tuple(classes)
        for cls in self.classes or ():
            if cls is not None and (type(cls) is not int or cls < 0):
                raise InputError(f"classes= has {cls!r}; give the numbers of the teacher's classes, or None.")
        #: Number of the guided model's classes, and whether those of the teachers were compared with it.
        self._wanted: int | None = None
        self._compared = False

    def prepare(self, model: nn.Module | None, classes: int) -> None:
        """Load teachers, or copy the guided model if there are none, and check the classes."""
        while self.named:
            self._add(load_teacher(self.named[0]))
            del self.named[0]
        if not self.models:
            if model is None:
                raise InputError("prior 'teacher' needs a model: TeacherPrior(model).")
            self._add(model)
        if self.normalization is None and any(self._wants):
            self.normalization = normalization_of(model)
        self._wanted = classes
        if self.classes is not None and len(self.classes) != classes:
            raise InputError(
                f"classes= has {len(self.classes)} entries, the guided model has {classes} classes. Give the "
                "teacher's class of each, None where it has none."
            )

    def settings(self) -> str:
        """Return source, layer, threshold and the teachers' weights."""
        weights = "+".join(weights_digest(teacher) for teacher in self.models)
        changed = f"{self.normalization} {self._wants}" if any(self._wants) else ""
        return f"teacher {self.source!r} {self.layer} {self.classes} {self.threshold} {weights}{changed}"

    def _add(self, teacher: nn.Module | LoadedModel) -> None:
        self.models.append(own_copy(teacher))
        self._wants.append((teacher.mean, teacher.std) if isinstance(teacher, LoadedModel) else None)

    def find(self, images: Tensor, classes: Tensor) -> PriorMaps:
        """Explain the class of each image by the teachers.

        Raises:
            InputError: If a teacher has another number of classes than the guided model and there is no
                mapping, or does not have a class of the mapping.
        """
        if not self._compared:
            self._compare(images)
        known = [cls if self.classes is None else self.classes[cls] for cls in classes.tolist()]
        rows = [row for row, cls in enumerate(known) if cls is not None]
        pairs = [(place, int(known[row] or 0)) for place, row in enumerate(rows)]
        total: Tensor | None = None
        for teacher, wanted in zip(self.models, self._wants, strict=True) if rows else ():
            teacher.to(images.device)
            chosen = images[rows]
            if wanted is not None and self.normalization is not None:
                chosen = renormalized(chosen, self.normalization, wanted)
            with torch.no_grad():
                found = explain(teacher, chosen, self.source, pairs, self.layer, None)
            maps = found.maps[:, 0].clamp(min=0)  # evidence against a class is not where to look
            unit = maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
            size = unit.shape[-2:] if total is None else total.shape[-2:]
            sized = functional.resize(unit, (size[0], size[1]))
            total = sized if total is None else total + sized
        if total is None:
            return PriorMaps(images.new_zeros(len(images), 1, 1), images.new_zeros(len(images)))
        mean = total / len(self.models)
        if self.threshold is not None:
            mean = (mean >= self.threshold * mean.amax(dim=(1, 2), keepdim=True)).to(mean) * (mean > 0)
        maps = mean.new_zeros(len(images), *mean.shape[-2:])
        maps[rows] = mean
        return PriorMaps(maps, (maps.amax(dim=(1, 2)) > 0).to(maps))

    def _compare(self, images: Tensor) -> None:
        """Refuse teachers that do not have the classes that are asked for."""
        for teacher in self.models:
            with torch.no_grad():
                count = find_logits(teacher.to(images.device)(images[:1])).shape[1]
            name = type(teacher).__name__
            if self.classes is None and self._wanted not in (None, count):
                raise InputError(
                    f"the teacher {name} has {count} classes, the guided model has {self._wanted}. Give "
                    "TeacherPrior(classes=[…]): the teacher's class of each, None where it has none."
                )
            for cls in self.classes or ():
                if cls is not None and cls >= count:
                    raise InputError(f"classes= has {cls}; the teacher {name} has {count} classes.")
        self._compared = True

    def __repr__(self) -> str:
        names = ", ".join([*(type(teacher).__name__ for teacher in self.models), *self.named])
        return f"TeacherPrior([{names}], source={self.source!r}, threshold={self.threshold})"


def load_teacher(name: str) -> LoadedModel:
    """Load a checkpoint that says what it is, or a model with its published weights.

    Raises:
        InputError: If the name is unknown, or the checkpoint does not say which model it is of.
        DataError: If the file or the weights cannot be had.
    """
    from attnguide.models.loading import load  # here, since it brings the libraries of models

    if Path(name).suffix in (".safetensors", ".pt", ".pth"):
        return load(checkpoint=name)
    return load(name, pretrained=True)
