"""A folder of noise in three classes, small networks that tell them apart, and painted masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tests.helpers.pictures import picture

from attnguide import models
from attnguide.models.networks import small_cnn

CLASSES = ("cat", "Big dog", "fish")
COUNTS = {"cat": 3, "big_dog": 4, "Fish": 2}
SIDE = 32


def animals(folder: Path, *, seed: int = 0) -> Path:
    for number, (name, count) in enumerate(COUNTS.items()):
        for index in range(count):
            picture(folder / name / f"{name}{index}.png", seed + 10 * number + index, (SIDE, SIDE))
    return folder


def weights(path: Path, seed: int, *, classes: Sequence[str] = CLASSES, favourite: int | None = None) -> Path:
    """A random network of the embedded format, which answers with its favourite class if it has one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = small_cnn(len(classes), width=4, reduction=8)
    if favourite is not None:
        *_, bias = (each.bias for each in model.modules() if isinstance(each, torch.nn.Linear))
        with torch.no_grad():
            bias[favourite] += 100
    settings: dict[str, Any] = {"size": SIDE, "width": 4, "reduction": 8, "multi_label": False}
    models.write_embedded(path, model, classes=classes, mean=(0.5,) * 3, std=(0.25,) * 3, **settings)
    return path


def painted(path: Path, rows: slice, columns: slice) -> Path:
    values = np.zeros((SIDE, SIDE), dtype=np.uint8)
    values[rows, columns] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path
