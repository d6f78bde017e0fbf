"""Names of output files: readable, safe on any file system, and unique."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["class_slugs", "image_names"]

#: File systems allow 255 bytes; the class and a suffix need room too.
_BYTES = 150


def class_slugs(classes: Sequence[str]) -> list[str]:
    """Turn class names into unique parts of file names.

    They have no underscore, so that `NAME_CLASS` can be split again.

    Args:
        classes: Name of each class.

    Returns:
        A slug for each, of letters, digits, points and hyphens; duplicates end in the class index.
    """
    used: set[str] = set()
    slugs = []
    for index, name in enumerate(classes):
        plain = unicodedata.normalize("NFC", name).casefold()
        slug = _cut(re.sub(r"[^\w.]+|_", "-", plain).strip("-."), 60) or f"class-{index}"
        while slug in used:
            slug += f"-{index}"
        used.add(slug)
        slugs.append(slug)
    return slugs


def image_names(images: Iterable[Path], known: dict[str, str]) -> dict[Path, str]:
    """Give each image a name for its output files.

    Folders below the common parent folder are kept. Of equal names (`1.jpg` and `1.png`), the later one gets
    its suffix, and a number if that is not enough.

    Args:
        images: The image files.
        known: Names of earlier runs, by absolute path of the image; these stay.

    Returns:
        A name for each image, with `/` between folders.
    """
    images = list(images)
    # Not resolve(): it would follow links.
    absolute = {image: os.path.abspath(image) for image in images}  # noqa: PTH100
    root = _common_folder(absolute.values())
    used = {name.casefold() for name in known.values()}
    names = {}
    for image, path in absolute.items():
        if path in known:
            names[image] = known[path]
            continue
        relative = Path(os.path.relpath(path, root) if root else image.name)
        folders = [_cut(_on_one_line(part), _BYTES) for part in relative.parts[:-1]]
        stem = _cut(_on_one_line(relative.stem), _BYTES)
        suffix = _on_one_line(relative.suffix).removeprefix(".")
        candidates = [stem, f"{stem}-{suffix}"]
        name = next((n for n in (_joined(folders, c) for c in candidates) if n.casefold() not in used), None)
        number = 2
        while name is None or name.casefold() in used:
            name, number = _joined(folders, f"{stem}-{suffix}-{number}"), number + 1
        used.add(name.casefold())
        names[image] = name
    return names


def _common_folder(paths: Iterable[str]) -> str:
    try:
        return os.path.commonpath([Path(path).parent for path in paths])
    except ValueError:  # no paths, or on several drives
        return ""


def _joined(folders: Sequence[str], stem: str) -> str:
    return "/".join([*folders, stem])


def _on_one_line(text: str) -> str:
    """Replace control characters and line breaks, which file systems allow, by hyphens."""
    return "".join("-" if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)


def _cut(text: str, limit: int) -> str:
    # Through the file system's own encoding, since names need not be valid Unicode.
    return os.fsdecode(os.fsencode(text)[:limit]) if len(os.fsencode(text)) > limit else text
