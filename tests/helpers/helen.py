"""A Helen of a few small images, in the layout of its release with label maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def make_helen(root: Path, split: str = "exemplars", names: Sequence[str] = ("a_1",), size: int = 8) -> None:
    """Write a list and its faces; row r of each has the label r % 11."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(np.zeros((size, size, 3), dtype=np.uint8)).save(root / "images" / f"{name}.jpg")
        folder = root / "labels" / name
        folder.mkdir(parents=True)
        for number in range(11):
            values = np.full((size, size), 10, dtype=np.uint8)
            values[number::11, :] = 200
            Image.fromarray(values).save(folder / f"{name}_lbl{number:02}.png")
    lines = [f"{number} , {name}\n" for number, name in enumerate(names, 1)]
    (root / f"{split}.txt").write_text("".join(lines))
