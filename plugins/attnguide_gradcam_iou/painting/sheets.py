"""Sheets to paint on: images one by one, or one template for all of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from attnguide.data.images import find_images, read_image
from attnguide.errors import DataError, InputError

__all__ = ["AVERAGED", "LONGEST", "Sheets", "find_sheets", "mean_image", "spaced"]

#: Larger images are painted at this length of their longer side, in pixels.
LONGEST = 2048
#: Greatest number of images in a mean, evenly spaced among all.
AVERAGED = 200
#: Number of pictures in memory.
_KEPT = 4


@dataclass
class Sheets:
    """The pictures to paint on; each is read when it is shown, and only the last few are kept.

    Attributes:
        paths: Image files: the sheets, or the images that the template stands for.
        template: The one picture to paint on; None to paint on each image.
        about: Description of the template, for the record.
        links: Number of images of a folder that were left out, as links to elsewhere.
        file: The template's file, if it has one.
    """

    paths: Sequence[Path]
    template: Image.Image | None = None
    about: str | None = None
    links: int = 0
    file: Path | None = None
    _kept: OrderedDict[int, Image.Image] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self.paths) if self.template is None else 1

    def name(self, number: int) -> str:
        """Name of a sheet on the page."""
        return self.paths[number].name if self.template is None else self.about or "template"

    def stem(self, number: int) -> str:
        """Name of a sheet's masks; a template's masks are named like their classes."""
        return self.paths[number].stem if self.template is None else ""

    def files(self, number: int) -> list[Path]:
        """The file that a sheet is read from, or the files that it is the mean of."""
        if self.template is None:
            return [self.paths[number]]
        return spaced(self.paths, AVERAGED) if self.file is None else [self.file]

    def picture(self, number: int) -> Image.Image:
        """Read a sheet, RGB, at most `LONGEST` pixels long; DataError if its file cannot be read."""
        if self.template is not None:
            return self.template
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        picture = _shrunk(read_image(self.paths[number]))
        with self._lock:
            self._kept[number] = picture
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return picture


def find_sheets(
    images: Sequence[str],
    template: str | None,
    out: Path,
    advance: Callable[[int, int], None] = lambda done, of: None,
) -> Sheets:
    """Find the images or the template to paint on.

    Args:
        images: Files, folders and patterns.
        template: `"average"` for the mean of the images, or an image file; None to paint on each image.
        out: Folder of the masks; images in it are left out.
        advance: Called while a mean is computed, with the number of images that are done, and of all.

    Raises:
        InputError: If there are no images, two would share one mask, or they lie in the folder of the masks.
        DataError: If the template cannot be read.
    """
    paths, links = _within(images) if images else ([], 0)
    painted = out.resolve()
    others = [path for path in paths if not path.resolve().is_relative_to(painted)]
    if paths and not others:
        raise InputError(f"the images lie in {out}, where the masks go. Choose another --out.")
    if template is None:
        if not others:
            raise InputError("there is nothing to paint on. Give images, or --template FILE.")
        _check_stems(others)
        return Sheets(others, links=links)
    if template != "average":
        file = Path(template)
        if file.resolve().is_relative_to(painted):
            raise InputError(f"the template {file} lies in {out}, where the masks go. Choose another --out.")
        return Sheets(others, _shrunk(read_image(file)), file.name, links, file)
    if not others:
        raise InputError("--template average is the mean of images. Give aligned images, or a folder.")
    chosen = spaced(others, AVERAGED)
    mean, skipped = mean_image(chosen, advance)
    about = f"average of {len(chosen) - skipped} images"
    return Sheets(others, mean, f"{about} ({skipped} could not be read)" if skipped else about, links)


def spaced(paths: Sequence[Path], most: int) -> list[Path]:
    """Return at most `most` of the files, evenly spaced."""
    return [paths[int(n)] for n in np.linspace(0, len(paths) - 1, min(len(paths), most))]


def mean_image(
    paths: Sequence[Path], advance: Callable[[int, int], None] = lambda done, of: None
) -> tuple[Image.Image, int]:
    """Average aligned images, resized to the size of the first; see `find_sheets`.

    Returns:
        The mean, RGB, and the number of files that could not be read.

    Raises:
        DataError: If none can be read.
    """
    total: np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None = None
    size, count, last = (0, 0), 0, ""
    for done, path in enumerate(paths, 1):
        try:
            picture = _shrunk(read_image(path))
        except DataError as error:
            last = str(error)
        else:
            size = picture.size if total is None else size
            values = np.asarray(picture.resize(size, Image.Resampling.BILINEAR), dtype=np.float64)
            total = values if total is None else total + values
            count += 1
        advance(done, len(paths))
    if total is None:
        raise DataError(f"none of the {len(paths)} images can be read. The last one: {last}")
    return Image.fromarray(np.rint(total / count).astype(np.uint8)), len(paths) - count


def _within(images: Sequence[str]) -> tuple[list[Path], int]:
    """List images, and count the links out of the listed folders, which are left out."""
    paths = find_images(images)
    named = {Path(image).absolute() for image in images}
    roots = [folder.resolve() for folder in map(Path, images) if folder.is_dir()]
    kept = [
        path
        for path in paths
        if not path.is_symlink()
        or path.absolute() in named
        or any(path.resolve().is_relative_to(root) for root in roots)
    ]
    if not kept:
        raise InputError(f"all {len(paths)} images are links to other folders. Give these folders.")
    return kept, len(paths) - len(kept)


def _check_stems(paths: Sequence[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in paths:
        if path.stem in seen:
            raise InputError(
                f"{seen[path.stem]} and {path} would share one mask, {path.stem}.png. Rename one of them, or "
                "paint their folders one after the other."
            )
        seen[path.stem] = path


def _shrunk(picture: Image.Image) -> Image.Image:
    """Shrink a picture to at most `LONGEST` pixels on its longer side."""
    picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return picture
