"""The contact sheet of a run, made from its index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from attnguide import functional, visual
from attnguide.commands.explain.index import writing
from attnguide.data.images import read_image, save_picture
from attnguide.errors import DataError
from attnguide.models import LoadedModel

__all__ = ["NAME", "write_sheet"]

NAME = "contact_sheet.png"
#: Largest number of images, largest number of maps of each, and side of a picture in pixels.
_IMAGES, _MAPS, _CELL = 100, 4, 192


def write_sheet(folder: Path, lines: Sequence[dict[str, Any]], loaded: LoadedModel, alpha: float) -> Path:
    """Show each image and its maps on one page.

    Of many images, a hundred spread evenly over the run are shown; of many maps, those of the highest scores.

    Args:
        folder: The output folder.
        lines: The index, not empty.
        loaded: The model, which prepares the images.
        alpha: Opacity of overlays.

    Returns:
        The file, written atomically.
    """
    by_image: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_image.setdefault(line["image"], []).append(line)
    groups = list(by_image.values())
    shown = (
        [groups[index * len(groups) // _IMAGES] for index in range(_IMAGES)]
        if len(groups) > _IMAGES
        else groups
    )
    shown = [sorted(maps, key=lambda line: -line["score"])[:_MAPS] for maps in shown]
    width = 1 + max(map(len, shown))
    pictures: list[Image.Image | None] = []
    captions: list[str] = []
    for maps in shown:
        original = _original(maps[0], loaded)
        pictures += [
            None if original is None else visual.to_pil(original),
            *(_overlay(folder, line, original, alpha) for line in maps),
        ]
        captions += [
            Path(maps[0]["image"]).name,
            *(f"{_percent(line['score'])}  {line['class_name']}" for line in maps),
        ]
        padding = width - 1 - len(maps)
        pictures += [None] * padding
        captions += [""] * padding
    page = visual.contact_sheet(pictures, captions, cell=_CELL, group=width)
    with writing(folder, NAME) as temporary:
        # Pillow's default takes four times as long for hardly a smaller file.
        save_picture(page, temporary, compress_level=1)
    return folder / NAME


def _percent(score: float) -> str:
    return f"{score:.0%}" if score >= 0.1 else f"{score:.1%}"


def _original(line: dict[str, Any], loaded: LoadedModel) -> Tensor | None:
    try:
        return loaded.displayed(loaded.read(line["image"])[None])[0]
    except DataError:  # explained by an earlier run, and gone since
        return None


def _overlay(folder: Path, line: dict[str, Any], original: Tensor | None, alpha: float) -> Image.Image | None:
    files = {Path(file).suffix: folder / file for file in line["files"]}
    if ".png" in files:
        return read_image(files[".png"])
    if original is None:
        return None
    raw = torch.from_numpy(_raw_map(next(iter(files.values()))))
    sized = functional.resize(raw[None], (original.shape[-2], original.shape[-1]))
    return visual.to_pil(visual.overlay(original[None], visual.scaled(sized)[None], alpha)[0, 0])


def _raw_map(file: Path) -> npt.NDArray[np.float32]:
    """Read the raw map `(h, w)` of a file, which an earlier run may have written."""
    try:
        return _read_map(file)
    # A damaged file can make numpy fail in many ways: EOFError, BadZipFile, ValueError, KeyError, …
    except Exception as error:
        raise DataError(
            f"{file} is not a map that attnguide wrote ({error}). Remove it, and go on with --resume."
        ) from error


def _read_map(file: Path) -> npt.NDArray[np.float32]:
    with file.open("rb") as opened:
        saved = np.load(opened)
        raw = np.asarray(saved if file.suffix == ".npy" else saved["map"])
    if raw.ndim != 2 or raw.dtype != np.float32 or not np.isfinite(raw).all():
        raise ValueError(f"{raw.dtype} values of shape {raw.shape}")
    return raw
