"""A folder of masks: PNG files as the prior `mask` reads them, and `masks.json`, which lists the classes.

A template's masks are `<class>.png`; masks of single images `<class>/<image>.png`, or `<image>.png` if there
are no classes. Each is written in one step, so that no file is ever incomplete.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from attnguide.data.files import atomic_write, read_json
from attnguide.data.images import IMAGE_SUFFIXES
from attnguide.errors import DataError, InputError
from attnguide.masks import check_fit, class_key, read_levels

__all__ = ["INDEX", "Bits", "MaskStore", "recorded_classes"]

#: A mask: `(H, W)`, bool.
Bits = npt.NDArray[np.bool_]

#: Describes the masks, for people and for the page when it opens again.
INDEX = "masks.json"


class MaskStore:
    """A folder of masks.

    Args:
        root: The folder; made if it does not exist.
        classes: Names of the classes; empty if masks are for whole images.
        template: Whether there is one mask for each class, or one for each image and class.

    Raises:
        InputError: If the folder cannot be used, a class name cannot be a file name, or the folder holds
            masks of other classes.
    """

    def __init__(self, root: Path, classes: Sequence[str], *, template: bool) -> None:
        self.root, self.classes, self.template = root, tuple(classes), template
        self._lock = threading.Lock()
        for name in self.classes:
            _check_name(name)
        keys = [class_key(name) for name in self.classes]
        if len(set(keys)) < len(keys):
            doubled = next(name for name, key in zip(self.classes, keys, strict=True) if keys.count(key) > 1)
            raise InputError(f"two classes are called {doubled!r}. Give them names that differ.")
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{root} cannot be a folder of masks: {error.strerror}. Choose another --out."
            ) from error
        before = recorded_classes(root)
        if before is not None and not {class_key(name) for name in before} <= set(keys):
            raise InputError(
                f"{root / INDEX} lists masks for {', '.join(before)}, not only for "
                f"{', '.join(self.classes) or 'whole images'}. Give the same classes, or another --out."
            )
        self._files = self._found()

    def record(self, about: Mapping[str, Any]) -> None:
        """Write the index: the classes, and a description of the masks."""
        document = {"classes": list(self.classes), **about}
        with self._lock, atomic_write(self._checked(self.root / INDEX)) as temporary:
            temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def read(self, stem: str, cls: int, size: tuple[int, int] | None = None) -> Bits | None:
        """Read a mask.

        Args:
            stem: Name of the image; ignored for a template.
            cls: The class; 0 if there are no classes.
            size: Rows and columns that the mask is resized to; None for the size of its file.

        Returns:
            `(H, W)`, True where at least half of a pixel is painted; None if there is no mask.

        Raises:
            DataError: If the file cannot be read, does not show what is inside, or has other proportions than
                the size.
            InputError: If the file is a link out of the folder.
        """
        path = self._files.get(self._place(stem, cls))
        if path is None:
            return None
        levels = read_levels(self._checked(path))
        if size is not None and levels.shape != size:
            check_fit(levels.shape, size, path, "its image")
            image = Image.fromarray(levels.astype(np.float32))
            levels = np.asarray(image.resize(size[::-1], Image.Resampling.NEAREST), dtype=np.float64)
        return levels >= 0.5

    def write(self, stem: str, cls: int, mask: Bits) -> None:
        """Write a mask, or remove its file if the mask is empty.

        Raises:
            InputError: If the file cannot be written, or lies behind a link out of the folder.
        """
        key, path = self._place(stem, cls), self._path(stem, cls)
        painted = bool(mask.any())
        with self._lock:
            before = self._files.get(key)
            if painted:
                if not path.parent.exists():
                    self._checked(path.parent).mkdir()
                with atomic_write(self._checked(path)) as temporary:
                    image = Image.fromarray(mask.astype(np.uint8) * 255)
                    # A mask consists of runs of equal pixels.
                    image.save(temporary, format="PNG", compress_type=zlib.Z_RLE)
                self._files[key] = path
            else:
                self._files.pop(key, None)
            # A file of another spelling, or of a mask that is now empty.
            if before is not None and not (painted and before == path):
                self._checked(before).unlink(missing_ok=True)

    def painted(self, stem: str) -> list[int]:
        """List the classes that have a mask for an image."""
        return [cls for cls in range(max(1, len(self.classes))) if self._place(stem, cls) in self._files]

    def count(self, stems: Sequence[str]) -> int:
        """Count the images that have a mask."""
        painted = {stem for stem, _ in self._files}
        return sum(stem in painted for stem in stems)

    def next_to_paint(self, stems: Sequence[str], after: int) -> int | None:
        """Return the next image without a mask, from the first again after the last; None if all have one."""
        painted = {stem for stem, _ in self._files}
        order = [*range(after + 1, len(stems)), *range(after + 1)]
        return next((number for number in order if stems[number] not in painted), None)

    def _place(self, stem: str, cls: int) -> tuple[str, int]:
        return ("" if self.template else stem, cls)

    def _path(self, stem: str, cls: int) -> Path:
        if not self.classes:
            return self.root / f"{stem}.png"
        name = self.classes[cls]
        return self.root / f"{name}.png" if self.template else self.root / name / f"{stem}.png"

    def _checked(self, path: Path) -> Path:
        """Refuse a path that a link leads out of the folder."""
        root = self.root.resolve()
        if path.is_symlink() or not path.parent.resolve().is_relative_to(root):
            raise InputError(f"{path} is a link, or in one, that leads out of {root}. Remove the link.")
        return path

    def _found(self) -> dict[tuple[str, int], Path]:
        """Find existing masks, under any spelling of their class; InputError if others are among them."""
        number = {class_key(name): cls for cls, name in enumerate(self.classes)}
        found: dict[tuple[str, int], Path] = {}
        for path in sorted(self.root.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir() and not path.is_symlink():
                inside = [file for file in sorted(path.iterdir()) if _is_mask(file)]
                if inside and (self.template or not self.classes):
                    raise self._mixed(inside[0], "of a class in a single image")
                if class_key(path.name) in number:
                    found.update({(file.stem, number[class_key(path.name)]): file for file in inside})
                    continue
                for file in inside:
                    if class_key(file.stem) not in number:
                        raise self._mixed(file, "of no class")
                    found[path.name, number[class_key(file.stem)]] = file
            elif _is_mask(path):
                if self.classes and not self.template:
                    raise self._mixed(path, "of a whole image, or of a template")
                if not self.template:
                    found[path.stem, 0] = path
                elif class_key(path.stem) in number:
                    found["", number[class_key(path.stem)]] = path
                else:
                    raise self._mixed(path, "of no class")
        return found

    def _mixed(self, path: Path, what: str) -> InputError:
        kind = "the template" if self.template else "single images"
        named = f"{kind} and the classes {', '.join(self.classes)}" if self.classes else "whole images"
        return InputError(
            f"{path} is a mask {what}, and cannot lie among masks of {named}. Move it, or "
            "choose another --out."
        )


def recorded_classes(root: Path) -> list[str] | None:
    """Read the classes of the masks in a folder from its index; None if it has no index.

    Raises:
        DataError: If the index cannot be read.
    """
    path = root / INDEX
    if not path.exists():
        return None
    document = read_json(path)
    classes = document.get("classes") if isinstance(document, dict) else None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise DataError(f"{path} does not list the classes. Correct or remove it; the masks stay.")
    return classes


def _is_mask(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _check_name(name: str) -> None:
    """Refuse a class name that cannot be a file name."""
    bad = not name.strip() or name.startswith(".") or any(c in '/\\:*?"<>|' or ord(c) < 32 for c in name)
    if bad or len(name.encode()) > 200:
        raise InputError(
            f"class {name!r} cannot be the name of a file. Use letters, digits, spaces, _ and -, and no dot "
            "in front."
        )
