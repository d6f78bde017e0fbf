"""Fine-tuning towards what was painted, in the background: started, watched and stopped from the page."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset, Subset

from attnguide import functional
from attnguide.data.files import atomic_write
from attnguide.data.images import read_image
from attnguide.errors import AttnGuideError, InputError
from attnguide.explanation import explain
from attnguide.models import LoadedModel
from attnguide_gradcam_iou.evaluation import Labelled, as_seen, mask_reader
from attnguide_gradcam_iou.finetune import Epoch, finetune

__all__ = ["FineTuning", "Progress"]

_BATCH = 16
#: The share of the images that is for validation.
_HELD_OUT = 0.2


@dataclass
class Progress:
    """How far it is.

    Attributes:
        state: What is going on.
        step: Batches that are done.
        steps: Batches in all.
        before: Accuracy and overlap, the soft IoU, on the validation images before the training.
        epochs: What each epoch brought.
        error: Why it failed.
        file: Where the weights are.
    """

    state: Literal["idle", "running", "done", "stopped", "failed"] = "idle"
    step: int = 0
    steps: int = 0
    before: dict[str, float] = field(default_factory=dict)
    epochs: list[Epoch] = field(default_factory=list)
    error: str = ""
    file: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For the page."""
        return asdict(self)


class _Stopped(Exception):  # noqa: N818  (no error)
    """Ends a training that is no longer wanted."""


class FineTuning:
    """Fine-tunes a copy of a model on labelled images, towards masks.

    Args:
        loaded: The model; it stays as it is. One class for each image.
        images: Labelled files.
        masks: The folder that is painted in.
        out: Where the weights go, a `.safetensors` file.
        device: Where to train.
        on_model: Given the model that was trained, also when it was stopped.

    Raises:
        InputError: If there are fewer than two images.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        images: Sequence[Labelled],
        masks: Path,
        out: Path,
        device: torch.device,
        on_model: Callable[[LoadedModel], None],
    ) -> None:
        if len(images) < 2:
            raise InputError("fine-tuning needs at least two labelled images. Give more by --data.")
        self.loaded, self.images, self.masks = loaded, images, masks
        self.out, self.device, self.on_model = out, device, on_model
        self.progress = Progress()
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
            # Never in the way when the server ends.
            self._thread = threading.Thread(
                target=self._run, args=(epochs, weight, learning_rate), daemon=True
            )
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
        tuned = replace(self.loaded, model=copy.deepcopy(self.loaded.model))
        data = _Painted(self.loaded, self.images, self.masks)
        train, held_out = _split([each.cls for each in self.images])
        per_epoch = sum(-(-len(part) // _BATCH) for part in (train, held_out))
        self.progress.steps = epochs * per_epoch
        self.progress.before = _measured(tuned, Subset(data, held_out), self.device)

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
            )
        except _Stopped:
            state = "stopped"
        weights = {
            name: value.detach().cpu().contiguous() for name, value in tuned.model.state_dict().items()
        }
        with atomic_write(self.out) as temporary:
            save_file(weights, temporary)
        self.progress.file = str(self.out)
        self.on_model(tuned)
        self.progress.state = state


class _Painted(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Labelled images with what was painted for them: image, class, and mask; NaN where there is none."""

    def __init__(self, loaded: LoadedModel, images: Sequence[Labelled], masks: Path) -> None:
        self.loaded, self.images = loaded, images
        self.mask_for = mask_reader(masks, loaded.classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return an image, its class and its mask."""
        labelled = self.images[index]
        picture = read_image(labelled.path)
        image = self.loaded.prepared(picture, labelled.path)
        mask = self.mask_for(labelled.path, labelled.cls)
        seen = None if mask is None else as_seen(self.loaded, mask, picture.size)
        if seen is None or not bool(seen.any()):
            seen = torch.full(image.shape[-2:], torch.nan)
        return image, torch.tensor(labelled.cls), seen


def _split(classes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Positions for training and for validation, drawn class by class, the same each time."""
    generator = torch.Generator().manual_seed(0)
    train: list[int] = []
    held_out: list[int] = []
    for cls in sorted(set(classes)):
        own = [n for n, each in enumerate(classes) if each == cls]
        own = [own[n] for n in torch.randperm(len(own), generator=generator).tolist()]
        count = min(max(1, round(_HELD_OUT * len(own))), len(own) - 1)
        held_out += own[:count]
        train += own[count:]
    if not held_out:  # one image of each class
        held_out = train
    return sorted(train), sorted(held_out)


def _measured(loaded: LoadedModel, data: Subset[Any], device: torch.device) -> dict[str, float]:
    """Accuracy, and the mean soft IoU of Grad-CAM and mask."""
    right, overlaps = 0, []
    loaded.model.to(device)
    for start in range(0, len(data), _BATCH):
        samples = [data[n] for n in range(start, min(start + _BATCH, len(data)))]
        images = torch.stack([sample[0] for sample in samples]).to(device)
        labels = torch.stack([sample[1] for sample in samples]).to(device)
        masks = torch.stack([sample[2] for sample in samples]).to(device)
        shown = explain(loaded.model, images, "grad_cam", list(enumerate(labels.tolist())))
        right += int((shown.logits.argmax(dim=1) == labels).sum())
        maps = next(iter(shown.raw.values()))[:, 0].float()
        there = ~masks.isnan().flatten(1).any(dim=1)
        prior = functional.resize(masks[there], (maps.shape[-2], maps.shape[-1]))
        overlaps += (-functional.iou(maps[there], prior)).exp().tolist()
    overlap = sum(overlaps) / len(overlaps) if overlaps else 0.0
    return {"accuracy": right / len(data), "iou": overlap}
