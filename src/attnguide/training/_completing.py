"""Completes the masks of a training: images without one get a predicted one, a file in its folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from attnguide import functional
from attnguide.data.files import atomic_write, read_json
from attnguide.data.images import read_image
from attnguide.errors import AttnGuideError, InputError
from attnguide.masks import MaskCompletion
from attnguide.models.loaded_model import check_aspect
from attnguide.priors import BoxPrior
from attnguide.training.engine import joined
from attnguide.training.images import Batch, Images
from attnguide.training.listing import Sample
from attnguide.training.preparing import Prepared

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["completed"]

FOLDER, _REPORT = "completed-masks", "report.json"
#: Largest number of images that are learned from; all positions that a completion reads come from fewer.
_LEARNED_FROM = 500
_BATCH = 32


def completed(
    prepared: Prepared,
    folder: Path,
    accelerator: Accelerator,
    *,
    keep: bool = False,
    show: bool = False,
    on_note: Callable[[str], object] = lambda line: None,
) -> Prepared:
    """Give images without a mask a predicted one, where `masks.complete` says so.

    Learns from the masks of the training images or, if there are none, from their boxes, which hold more than
    the object. What is predicted are PNG files of the images' sizes in the folder `completed-masks`, beside a
    report; black throughout where nothing was found. A run with the same settings uses them again.

    Args:
        prepared: The training.
        folder: Its folder.
        accelerator: The device, and the processes, of which each predicts its share.
        keep: Use the masks that are there in any case, since the training has begun with them.
        show: Whether to show a bar on stderr.
        on_note: Called with a line that says what was found.

    Returns:
        The training, whose images know their predicted masks.

    Raises:
        InputError: If there is nothing to learn from, or the masks are those of single classes.
        DataError: If an image or a mask cannot be read.
        LayerError: If the model has no layers with rows and columns.
    """
    if prepared.settings.masks is None or not prepared.settings.masks.complete:
        return prepared
    files = _files([*prepared.train.samples, *prepared.validation.samples], folder / FOLDER)
    table = prepared.settings.as_table()
    settings = {name: table[name] for name in ("data", "model", "masks")} | {"from": prepared.loaded.weights}
    file = folder / FOLDER / _REPORT
    report: Any = read_json(file) if file.exists() else {}
    if not report or not (keep or report["settings"] == settings):
        report = {**_complete(prepared, files, accelerator, show), "settings": settings}
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            file.parent.mkdir(exist_ok=True)  # where every image has its own mask, nothing made it
            with atomic_write(file) as temporary:
                temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    on_note(_line(report, folder / FOLDER))
    train, plain, validation = (
        images.of([replace(sample, completed=files[sample.path]) for sample in images.samples])
        for images in (prepared.train, prepared.plain, prepared.validation)
    )
    return replace(prepared, train=train, plain=plain, validation=validation)


def _files(samples: Sequence[Sample], target: Path) -> dict[Path, Path]:
    """The file of each image's predicted mask: it lies and is called like the image."""
    paths = {sample.path: sample.path.absolute() for sample in samples}
    root = os.path.commonpath([path.parent for path in paths.values()])
    return {
        image: target / path.relative_to(root).with_name(f"{path.name}.png") for image, path in paths.items()
    }


def _line(report: dict[str, Any], target: Path) -> str:
    overlap, learned = report["overlap"], report["learned_from"]
    return (
        f"Masks: {report['given']} images have one, {report['completed']} got a predicted one, and in "
        f"{report['nothing']} nothing was found. "
        + (f"Fewer than five {learned} to learn from, so none was held out. " if overlap is None else "")
        + ("" if overlap is None else f"Overlap with {learned} that were held out: {overlap:.0%}. ")
        + f"Look at them: {target}"
    )


def _complete(
    prepared: Prepared, files: dict[Path, Path], accelerator: Accelerator, show: bool
) -> dict[str, Any]:
    """Predict this process's share of the masks, and write them; return what was found in all processes."""
    from attnguide.cli.console import progress

    images, device = prepared.plain, accelerator.device
    workers = prepared.settings.train.workers
    numbers = images.annotated(_LEARNED_FROM)
    learned = "masks" if numbers else "boxes"
    if not numbers:
        order = np.random.default_rng(prepared.settings.train.seed).permutation(len(images.samples))
        boxed = [int(each) for each in order if images.samples[each].annotations.get("boxes") is not None]
        numbers = sorted(boxed[:_LEARNED_FROM])
    if not numbers:
        raise InputError(
            f"masks.complete: none of the {len(images.samples)} training images has a mask to learn from, or "
            "boxes in a column of data.path. Paint a few: attnguide annotate."
        )
    completion = MaskCompletion(prepared.fresh().to(device))
    whole = _Whole(images, [images.samples[number] for number in numbers], own=learned == "masks")
    completion.fit(
        ((batch.pixels.to(device), batch.regions.to(device)) for batch in _batches(whole, workers)),
        coarse=learned == "boxes",
    )
    rank, world = accelerator.process_index, accelerator.num_processes
    share = [*prepared.train.samples, *prepared.validation.samples][rank::world]
    counts = torch.zeros(3, dtype=torch.long, device=device)
    with progress("Completing masks", len(share), unit="images", show=show) as advance:
        for batch in _batches(_Whole(images, share), workers):
            if len(batch.pixels):
                masks = completion(batch.pixels.to(device), within=batch.regions.to(device)).cpu()
                for mask, sample, size in zip(masks, batch.samples, batch.sizes, strict=True):
                    _save(mask.nan_to_num(0.0), size, files[sample.path])
                found = int((~masks.isnan()).flatten(1).any(dim=1).sum())
                counts += torch.tensor([0, found, len(masks) - found], device=device)
            counts[0] += batch.asked - len(batch.pixels)
            advance(batch.asked)
    if world > 1:
        counts = accelerator.reduce(counts, "sum")
    given, predicted, nothing = counts.tolist()
    overlap = None if math.isnan(completion.iou) else completion.iou
    return {
        "given": given,
        "completed": predicted,
        "nothing": nothing,
        "learned_from": learned,
        "overlap": overlap,
    }


class _Part(NamedTuple):
    """Whole images as the model's input, regions `(B, H, W)`, NaN where there is none, and their sizes."""

    pixels: Tensor
    regions: Tensor
    samples: list[Sample]
    sizes: list[tuple[int, int]]
    asked: int


class _Whole(Dataset[Any]):
    """Whole images, squeezed into the model's input, with their regions.

    Args:
        images: Where masks are read, and for which model.
        samples: The images.
        own: Images with their own masks; otherwise those without one, with their boxes.
    """

    def __init__(self, images: Images, samples: Sequence[Sample], *, own: bool = False) -> None:
        self.images, self.samples, self.own = images, samples, own

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Any:
        """Return an image; None if it is not wanted; an error as it is, since workers would wrap it."""
        try:
            return self._read(self.samples[number])
        except AttnGuideError as error:
            return error

    def _read(self, sample: Sample) -> Any:
        masks = self.images.own_masks(sample)
        if set(masks) - {-1}:
            raise InputError(
                "masks.complete needs one mask for each image, and these are different for its classes: "
                f"those of {sample.path}."
            )
        if self.own != bool(masks):
            return None
        picture, loaded = read_image(sample.path), self.images.loaded
        check_aspect(picture, sample.path)
        height, width = loaded.size
        pixels = pil_to_tensor(picture.resize((width, height), Image.Resampling.BICUBIC)).float() / 255
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (loaded.mean, loaded.std))
        pixels = (pixels - mean) / deviation
        boxes = sample.annotations.get("boxes")
        if boxes is not None:
            scale = torch.tensor([width / picture.width, height / picture.height] * 2)
            boxes = boxes.reshape(-1, 4) * scale
        mask = functional.resize(masks[-1][None], loaded.size)[0] if masks else None
        return pixels, mask, boxes, sample, picture.size


def _batches(whole: _Whole, workers: int) -> Iterator[_Part]:
    prior = BoxPrior()
    for items in DataLoader(whole, _BATCH, num_workers=workers, collate_fn=list, generator=torch.Generator()):
        for item in items:
            if isinstance(item, AttnGuideError):
                raise item
        wanted = [item for item in items if item is not None]
        if not wanted:
            yield _Part(torch.empty(0), torch.empty(0), [], [], len(items))
            continue
        images, masks, boxes, samples, sizes = (list(each) for each in zip(*wanted, strict=True))
        pixels = torch.stack(images)
        labels = torch.zeros(len(pixels), dtype=torch.long)
        regions = (
            torch.stack(masks) if whole.own else joined(prior, Batch(pixels, labels, {"boxes": boxes}), 2)
        )
        yield _Part(pixels, regions, samples, sizes, len(items))


def _save(mask: Tensor, size: tuple[int, int], file: Path) -> None:
    """Write a mask as black and white, of an image's width and height."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        Image.fromarray((mask * 255).byte().numpy()).resize(size, Image.Resampling.NEAREST).save(
            temporary, "PNG"
        )
