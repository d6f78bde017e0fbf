"""Fine-tuning towards what was painted, in the background: started, watched and stopped from the page."""

from __future__ import annotations

import copy
import csv
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset, Subset

from attnguide.data.files import atomic_write, read_text
from attnguide.data.images import read_image
from attnguide.errors import AttnGuideError, DataError, InputError
from attnguide.evaluation.evaluate import as_seen, mask_reader
from attnguide.masks.class_names import ClassNames
from attnguide.models.loading import LoadedModel
from attnguide_gradcam_iou.finetune import Epoch, finetune

__all__ = ["Answered", "FineTuning", "Progress", "read_answers"]

_BATCH = 16
#: The share of the images that is for validation.
_HELD_OUT = 0.2


@dataclass(frozen=True)
class Answered:
    """An image file and what the model should answer: its class, or for each attribute 1, 0, or NaN."""

    path: Path
    answer: int | tuple[float, ...]


@dataclass
class Progress:
    """How far it is.

    Attributes:
        state: What is going on.
        step: Batches that are done.
        steps: Batches in all.
        epochs: What each epoch brought; the first entry tells what there was before.
        error: Why it failed.
        file: Where the weights are.
    """

    state: Literal["idle", "running", "done", "stopped", "failed"] = "idle"
    step: int = 0
    steps: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    error: str = ""
    file: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For the page; NaN is None."""
        told = asdict(self)
        told["epochs"] = [
            {name: None if value != value else value for name, value in epoch.items()}
            for epoch in told["epochs"]
        ]
        return told


class _Stopped(Exception):  # noqa: N818  (no error)
    """Ends a training that is no longer wanted."""


class FineTuning:
    """Fine-tunes a copy of a model on labelled images, towards masks.

    Args:
        loaded: The model; it stays as it is.
        images: Files, with classes or attributes as the model has them.
        masks: The folder that is painted in; the new weights become its `finetuned.safetensors`.
        device: Where to train.
        on_model: Given the model that was trained, also when it was stopped.
        checkpoint: Where the model's weights come from. What a `.safetensors` file tells besides them is told
            again.

    Raises:
        InputError: If there are fewer than two images.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        images: Sequence[Answered],
        masks: Path,
        device: torch.device,
        on_model: Callable[[LoadedModel], None],
        checkpoint: Path | None = None,
    ) -> None:
        if len(images) < 2:
            raise InputError("fine-tuning needs at least two labelled images. Give more by --data.")
        self.loaded, self.images, self.masks = loaded, images, masks
        self.out, self.device, self.on_model = masks / "finetuned.safetensors", device, on_model
        self.checkpoint = checkpoint
        self.progress = Progress()
        # Copied before anything looks at the model: what looks puts hooks on it meanwhile.
        self._fresh = copy.deepcopy(loaded.model)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, epochs: int, weight: float, learning_rate: float) -> None:
        """Begin.

        Raises:
            InputError: If it is going on already, or a number is out of range.
        """
        if not 1 <= epochs <= 1000 or not 0 <= weight <= 1e6 or not 0 < learning_rate <= 10:
            raise InputError(
                f"epochs={epochs}, weight={weight:g}, learning_rate={learning_rate:g}: give 1 to 1000 "
                "epochs, a weight from 0 to 1e6, and a learning rate above 0, up to 10."
            )
        with self._lock:
            if self.progress.state == "running":
                raise InputError("a fine-tuning is going on. Stop it first.")
            self.progress = Progress("running")
            self._stop.clear()
            # A daemon, so that it is never in the way when the server ends.
            settings = (epochs, weight, learning_rate)
            self._thread = threading.Thread(target=self._run, args=settings, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End after the batch that is being computed; what was learned till then is kept."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until nothing is going on."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, epochs: int, weight: float, learning_rate: float) -> None:
        try:
            self._tune(epochs, weight, learning_rate)
        except AttnGuideError as error:
            self.progress.error, self.progress.state = str(error), "failed"
        except Exception as error:  # whatever it was, the page shall not wait for ever
            logging.getLogger(__name__).exception("the fine-tuning failed")
            self.progress.error, self.progress.state = f"{type(error).__name__}: {error}", "failed"

    def _tune(self, epochs: int, weight: float, learning_rate: float) -> None:
        tuned = replace(self.loaded, model=copy.deepcopy(self._fresh))
        data = _Painted(self.loaded, self.images, self.masks)
        train, held_out = _split([each.answer for each in self.images])
        batches = [math.ceil(len(part) / _BATCH) for part in (train, held_out)]
        self.progress.steps = epochs * sum(batches) + batches[1]

        def on_step() -> None:
            self.progress.step += 1
            if self._stop.is_set():
                raise _Stopped

        state: Literal["done", "stopped"] = "done"
        try:
            finetune(
                tuned.model,
                Subset(data, train),
                validation=Subset(data, held_out),
                epochs=epochs,
                learning_rate=learning_rate,
                guidance_weight=weight,
                batch_size=_BATCH,
                device=self.device,
                on_epoch=self.progress.epochs.append,
                on_step=on_step,
                measure_before=True,
            )
        except _Stopped:
            state = "stopped"
        state_dict = tuned.model.state_dict()
        weights = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
        with atomic_write(self.out) as temporary:
            save_file(weights, temporary, metadata=_metadata(self.checkpoint))
        self.progress.file = str(self.out)
        self.on_model(tuned)
        self.progress.state = state


def _metadata(checkpoint: Path | None) -> dict[str, str] | None:
    """What a file of weights tells besides them, such as the structure of the small network."""
    if checkpoint is None or checkpoint.suffix != ".safetensors":
        return None
    with safe_open(checkpoint, "pt") as file:
        told: dict[str, str] | None = file.metadata()
    return told


class _Painted(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Images with answers and with what was painted for them; NaN where there is no mask."""

    def __init__(self, loaded: LoadedModel, images: Sequence[Answered], masks: Path) -> None:
        self.loaded, self.images = loaded, images
        self.mask_for = mask_reader(masks, loaded.classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return an image, its answer, and its mask `(h, w)`, or `(K, h, w)` for K attributes."""
        one = self.images[index]
        picture = read_image(one.path)
        image = self.loaded.prepared(picture, one.path)
        missing = torch.full(image.shape[-2:], torch.nan)

        def mask(cls: int) -> Tensor:
            painted = self.mask_for(one.path, cls)
            seen = None if painted is None else as_seen(self.loaded, painted, picture.size)
            return missing if seen is None or not bool(seen.any()) else seen

        if isinstance(one.answer, int):
            return image, torch.tensor(one.answer), mask(one.answer)
        return image, torch.tensor(one.answer), torch.stack([mask(cls) for cls in range(len(one.answer))])


def read_answers(table: Path, folder: Path, classes: Sequence[str]) -> list[Answered]:
    """Read what each image has of several attributes.

    Args:
        table: A CSV file: its first row names the file and the attributes, the others give a file relative to
            the folder, and for each attribute 1, 0 or −1 (as CelebA writes "no"), or nothing if unknown.
        folder: Where the images are.
        classes: The model's attributes; one without a column is unknown, a column that is none is an error.

    Raises:
        DataError: If the table cannot be read, or tells something else.
        UnknownNameError: If a column names no attribute of the model.
    """
    rows = list(csv.reader(read_text(table).splitlines(), skipinitialspace=True))
    if len(rows) < 2 or len(rows[0]) < 2:
        raise DataError(f"{table} tells nothing. Its first row is file,{','.join(classes[:2])},…")
    names = ClassNames(classes)
    columns = [names.names.index(names.get(name, f"{table}, first row")) for name in rows[0][1:]]
    found = []
    for line, row in enumerate(rows[1:], 2):
        if not row:
            continue
        cells = [cell.strip() for cell in row[1:]]
        if len(row) != len(rows[0]) or not all(cell in _ANSWERS for cell in cells):
            raise DataError(
                f"{table}, line {line}: expected a file and {len(columns)} answers of 1, 0 or -1, got "
                f"{','.join(row)[:60]!r}."
            )
        answer = [math.nan] * len(classes)
        for column, cell in zip(columns, cells, strict=True):
            answer[column] = _ANSWERS[cell]
        found.append(Answered(folder / row[0], tuple(answer)))
    lost = [each.path for each in found if not each.path.is_file()]
    if lost:
        raise DataError(f"{table} tells of {lost[0]}, which is no file, and of {len(lost) - 1} more.")
    return found


_ANSWERS = {"1": 1.0, "0": 0.0, "-1": 0.0, "": math.nan}


def _split(answers: Sequence[object]) -> tuple[list[int], list[int]]:
    """Positions for training and for validation, drawn answer by answer, the same each time."""
    generator = torch.Generator().manual_seed(0)
    train: list[int] = []
    held_out: list[int] = []
    kinds: list[object] = sorted(set(answers), key=str) if isinstance(answers[0], int) else [None]
    for kind in kinds:
        own = [n for n, each in enumerate(answers) if kind is None or each == kind]
        own = [own[n] for n in torch.randperm(len(own), generator=generator).tolist()]
        count = min(max(1, round(_HELD_OUT * len(own))), len(own) - 1)
        held_out += own[:count]
        train += own[count:]
    # Where each class has one image.
    return sorted(train), sorted(held_out or train)
