"""Painted masks and annotation files."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

CLASSES = ["Smiling", "Wearing_Lipstick", "Bald"]


def paint(path, values, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = values if isinstance(values, Image.Image) else Image.fromarray(np.asarray(values, dtype=np.uint8))
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def region(height=4, width=6, rows=slice(0, 2), columns=slice(0, 3), value=255):
    values = np.zeros((height, width), dtype=np.uint8)
    values[rows, columns] = value
    return values


def write(path, document):
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def without(entry, key):
    return {name: value for name, value in entry.items() if name != key}
