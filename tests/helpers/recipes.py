"""A folder of small pictures with masks, and a small network to train on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from attnguide import Pairs, PriorMaps, TargetPrior, Trace
from attnguide.models import small_cnn, write_embedded

SIDE = 32


def pictures(root: Path, count: int = 12, *, masks: int | None = None) -> Path:
    """Write `photos/red` and `photos/blue`, squares on noise, and `masks` for the first of each."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(("blue", "red")):
        for folder in (root / "photos" / name, root / "masks" / name):
            folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = rng.integers(0, 120, (SIDE, SIDE, 3), dtype=np.uint8)
            row, column = rng.integers(0, SIDE - 12, 2)
            pixels[row : row + 12, column : column + 12] = 0
            pixels[row : row + 12, column : column + 12, 2 - 2 * number] = 255
            Image.fromarray(pixels).save(root / "photos" / name / f"{index}.png")
            if masks is None or index < masks:
                mask = np.zeros((SIDE, SIDE), np.uint8)
                mask[row : row + 12, column : column + 12] = 255
                Image.fromarray(mask).save(root / "masks" / name / f"{index}.png")
    return root


def network(root: Path, *, classes: int = 2, multi_label: bool = False, width: int = 4) -> Path:
    """Write a small network with random weights, in the format of the embedded one."""
    torch.manual_seed(0)
    path = root / "network.safetensors"
    write_embedded(
        path,
        small_cnn(classes, width=width),
        classes=[f"class {n}" for n in range(classes)],
        size=SIDE,
        width=width,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        multi_label=multi_label,
    )
    return path


def recipe(root: Path, text: str = "") -> Path:
    """Write pictures, a network, and `photos.toml`, whose three lines are followed by a text."""
    pictures(root)
    network(root)
    path = root / "photos.toml"
    path.write_text(
        f'data = "photos"\nmodel = {{ checkpoint = "network.safetensors" }}\nmasks = "masks"\n{text}'
    )
    return path


class Middle(TargetPrior):
    """Looks at the middle of every image, and reads no annotation."""

    def __call__(self, trace: Trace, pairs: Pairs, size: tuple[int, int]) -> PriorMaps:
        maps = torch.zeros(len(pairs), *size, device=trace.images.device)
        maps[:, size[0] // 4 : -(size[0] // 4) or None, size[1] // 4 : -(size[1] // 4) or None] = 1
        return PriorMaps(maps, torch.ones(len(pairs), device=maps.device))
