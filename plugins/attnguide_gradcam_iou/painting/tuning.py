"""Fine-tuning towards the painted masks, in the background; the page starts and stops it."""

from __future__ import annotations

import copy
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

from attnguide.data.files import atomic_write, read_rows
from attnguide.data.images import read_image
from attnguide.errors import AttnGuideError, DataError, InputError
from attnguide.evaluation import mask_reader, preprocess_mask
from attnguide.masks import ClassNames
from attnguide.models import LoadedModel
from attnguide.training import draw_share
from attnguide_gradcam_iou.finetune import Epoch, finetune

__all__ = ["FineTuning", "LabeledImage", "Progress", "read_attributes"]

_BATCH = 16
#: Share of the images that are held out for validation.
_HELD_OUT = 0.2


@dataclass(frozen=True)
class LabeledImage:
    """An image file with its label: a class index, or for each attribute 1, 0, or NaN if unknown."""

    path: Path
    label: int | tuple[float, ...]


@dataclass
class Progress:
    """Progress of a fine-tuning.

    Attributes:
        state: State of the fine-tuning.
        step: Number of batches that are done.
        steps: Number of batches in all.
        epochs: Losses and scores of each epoch; the first entry holds the scores before.
        error: Reason of a failure.
        file: File of the new weights.
    """

    state: Literal["idle", "running", "done", "stopped", "failed"] = "idle"
    step: int = 0
    steps: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    error: str = ""
    file: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Convert to values for JSON; NaN becomes None."""
        values = asdict(self)
        values["epochs"] = [
            {name: None if value != value else value for name, value in epoch.items()}
            for epoch in values["epochs"]
        ]
        return values


class _Stopped(Exception):  # noqa: N818  (no error)
    """Ends a training that the user has stopped."""


class FineTuning:
    """Fine-tunes a copy of a model on labelled images, towards masks.

    Args:
        loaded: The model; it stays as it is.
        images: LabeledImage image files.
        masks: Folder of the masks; the new weights become its `finetuned.safetensors`.
        device: Device to train on.
        on_model: Function that receives the trained model, also of a training that was stopped.
        checkpoint: File of the model's weights; the metadata of a `.safetensors` file are kept.

    Raises:
        InputError: If there are fewer than two images.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        images: Sequence[LabeledImage],
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
        # Copied before maps are computed: for that time there are hooks on the model.
        self._fresh = copy.deepcopy(loaded.model)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, epochs: int, weight: float, learning_rate: float) -> None:
        """Start the training; InputError if one is running, or a number is out of range."""
        if not 1 <= epochs <= 1000 or not 0 <= weight <= 1e6 or not 0 < learning_rate <= 10:
            raise InputError(
                f"epochs={epochs!r:.20}, weight={weight!r:.20}, learning_rate={learning_rate!r:.20}: give 1 "
                "to 1000 epochs, a weight from 0 to 1e6, and a learning rate above 0, up to 10."
            )
        with self._lock:
            if self.progress.state == "running":
                raise InputError("a fine-tuning is running. Stop it first.")
            self.progress = Progress("running")
            self._stop.clear()
            # A daemon, so that the server can end at any time.
            settings = (epochs, weight, learning_rate)
            self._thread = threading.Thread(target=self._run, args=settings, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop after the current batch; the weights so far are kept."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the training has ended."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, epochs: int, weight: float, learning_rate: float) -> None:
        try:
            self._tune(epochs, weight, learning_rate)
        except AttnGuideError as error:
            self.progress.error, self.progress.state = str(error), "failed"
        except Exception as error:  # any failure must be shown: the page waits for an end
            logging.getLogger(__name__).exception("the fine-tuning failed")
            self.progress.error, self.progress.state = f"{type(error).__name__}: {error}", "failed"

    def _tune(self, epochs: int, weight: float, learning_rate: float) -> None:
        tuned = replace(self.loaded, model=copy.deepcopy(self._fresh))
        data = _Painted(self.loaded, self.images, self.masks)
        train, held_out = draw_share([image.label for image in self.images], _HELD_OUT)
        held_out = held_out or train  # if each class has one image, it is for both
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
    """Read the metadata of a file of weights, such as the structure of the small network."""
    if checkpoint is None or checkpoint.suffix != ".safetensors":
        return None
    with safe_open(checkpoint, "pt") as file:
        metadata: dict[str, str] | None = file.metadata()
    return metadata


class _Painted(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Images with labels and painted masks; NaN where there is no mask."""

    def __init__(self, loaded: LoadedModel, images: Sequence[LabeledImage], masks: Path) -> None:
        self.loaded, self.images = loaded, images
        pairs = (
            (image.path, cls)
            for image in images
            for cls in ([image.label] if isinstance(image.label, int) else range(len(image.label)))
        )
        self.mask_for = mask_reader(masks, loaded.classes, pairs)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return an image, its label, and its mask `(h, w)`, or `(K, h, w)` for K attributes."""
        path, label = self.images[index].path, self.images[index].label
        picture = read_image(path)
        image = self.loaded.prepared(picture, path)
        missing = torch.full(image.shape[-2:], torch.nan)

        def mask(cls: int) -> Tensor:
            painted = self.mask_for(path, cls)
            cropped = None if painted is None else preprocess_mask(self.loaded, painted, picture.size)
            return missing if cropped is None or not bool(cropped.any()) else cropped

        if isinstance(label, int):
            return image, torch.tensor(label), mask(label)
        return image, torch.tensor(label), torch.stack([mask(cls) for cls in range(len(label))])


def read_attributes(table: Path, folder: Path, classes: Sequence[str]) -> list[LabeledImage]:
    """Read the attributes of images.

    Args:
        table: A CSV file: its first row is `file` and the names of attributes; each other row holds a file
            relative to the folder, and for each attribute 1, 0 or −1 (CelebA's "no"), or nothing if unknown.
        folder: Folder of the images.
        classes: The model's attributes; an attribute without a column is unknown.

    Raises:
        DataError: If the table cannot be read, or has another form.
        UnknownNameError: If a column is not an attribute of the model.
    """
    rows = read_rows(table)
    if len(rows) < 2 or len(rows[0]) < 2:
        raise DataError(f"{table} is empty. Its first row must be file,{','.join(classes[:2])},…")
    names = ClassNames(classes)
    columns = [names.names.index(names.get(name, f"{table}, first row")) for name in rows[0][1:]]
    images = []
    for line, row in enumerate(rows[1:], 2):
        cells = row[1:]
        if len(row) != len(rows[0]) or not all(cell in _LABELS for cell in cells):
            raise DataError(
                f"{table}, line {line}: expected a file and {len(columns)} labels of 1, 0 or -1, got "
                f"{','.join(row)[:60]!r}."
            )
        label = [math.nan] * len(classes)
        for column, cell in zip(columns, cells, strict=True):
            label[column] = _LABELS[cell]
        images.append(LabeledImage(folder / row[0].replace("\\", "/"), tuple(label)))
    missing = [image.path for image in images if not image.path.is_file()]
    if missing:
        raise DataError(f"{table} lists {len(missing)} files that do not exist; the first is {missing[0]}.")
    return images


_LABELS = {"1": 1.0, "0": 0.0, "-1": 0.0, "": math.nan}
