"""Shows what a training would do with its first images, without training."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from attnguide import visual
from attnguide.data.files import atomic_write
from attnguide.data.images import save_picture
from attnguide.guiding.guide import Guide
from attnguide.guiding.intervention import Intervention
from attnguide.training._completing import completed
from attnguide.training.engine import accelerator_on, joined, united
from attnguide.training.images import Batch, Loader, unseeded
from attnguide.training.preparing import Prepared, prepare
from attnguide.training.running import annotated_batch
from attnguide.training.settings import Settings

__all__ = ["dry_run"]

#: Largest number of images that are drawn.
_DRAWN = 16


def dry_run(settings: Settings, picture: Path, device: torch.device | None = None) -> str:
    """Draw the first batch of a training with its masks, and check that the guidance reaches the weights.

    Args:
        settings: The settings of the training.
        picture: The PNG file to write.
        device: The device; by default the one that Accelerate chooses.

    Returns:
        What was found, as lines of text.

    Raises:
        InputError: As for [`train`][attnguide.training.train].
        DataError: As for it.
        GuidanceError: If the guidance reaches no weight.
    """
    accelerator = accelerator_on(device, settings.train.precision)
    notes: list[str] = []
    with unseeded():
        prepared = completed(prepare(settings), picture.parent, accelerator, show=True, on_note=notes.append)
    method, train, place = prepared.method, settings.train, accelerator.device
    lines = [
        *notes,
        f"{len(prepared.train)} images to train on, {len(prepared.validation)} to validate; classes: "
        + ", ".join(prepared.loaded.classes[:10])
        + (" …" if len(prepared.loaded.classes) > 10 else ""),
        f"model {prepared.loaded.name}, {prepared.loaded.weights} weights; guidance: {method.recipe}, λ = "
        + ("chosen by trial" if method.weight is None else f"{method.weight:g}"),
    ]
    with unseeded():
        batch = next(Loader(prepared.train, train.batch_size, train.seed).epoch(0))[0]
        pictures = _pictures(prepared, batch)
        if method.kind != "none":
            weight = method.weight or max(method.weights, default=0) or 1.0
            model = prepared.fresh().to(place)
            guidance = method.on(model, weight)
            annotated = annotated_batch(prepared, train.batch_size).to(place)
            if isinstance(guidance, Guide):
                with guidance:
                    report = guidance.check(annotated.images, annotated.labels, **annotated.annotations)
                    lines.append(str(report))
            if isinstance(guidance, Intervention):
                masks = united(annotated.annotations.get("mask"))
                model.train()
                both = guidance(annotated.images, annotated.labels, mask=masks)
                changed = both.batch.exchanged
                lines.append(
                    f"intervention at {guidance.layer!r}: {int(changed.sum())} of {len(changed)} images with "
                    "a mask "
                    f"get other surroundings; loss {float(both.loss.detach()):.4g}"
                )
                shown = prepared.loaded.displayed(both.batch.images.cpu()[:_DRAWN])
                pictures += [(visual.to_pil(image), "exchanged") for image in shown]
    sheet = visual.contact_sheet([p for p, _ in pictures], [text for _, text in pictures], cell=200)
    with atomic_write(picture) as temporary:
        save_picture(sheet, temporary)
    lines.append(f"The first batch, with its masks: {picture}")
    return "\n".join(lines)


def _pictures(prepared: Prepared, batch: Batch) -> list[tuple[Image.Image, str]]:
    """The images of a batch, brighter where to look, with their labels."""
    masks = _masks(prepared, batch)
    found: list[tuple[Image.Image, str]] = []
    for number, image in enumerate(prepared.loaded.displayed(batch.images[:_DRAWN])):
        label = batch.labels[number]
        if label.ndim:
            names = [prepared.loaded.classes[cls] for cls in (label == 1).nonzero()[:, 0].tolist()]
        else:
            names = [prepared.loaded.classes[int(label)]] if int(label) >= 0 else ["unknown"]
        mask = None if masks is None else masks[number]
        if mask is None or bool(mask.isnan().all()):
            found.append((visual.to_pil(image), f"{', '.join(names)} (no mask)"))
            continue
        gray = image.mean(dim=0, keepdim=True).expand_as(image)
        found.append((visual.to_pil(torch.lerp(gray * 0.35, image, mask)), ", ".join(names)))
    return found


def _masks(prepared: Prepared, batch: Batch) -> Tensor | None:
    prior = prepared.method.prior
    if prior is None:
        return united(batch.annotations.get("mask"))
    return joined(prior, batch, len(prepared.loaded.classes))
