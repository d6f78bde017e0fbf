"""Reads painted masks: one image, a template for all images, or a folder with masks for each image.

For annotations drawn as shapes, in LabelMe and COCO files, see
[`read_labelme`][attnguide.masks.read_labelme] and
[`read_coco`][attnguide.masks.read_coco].
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from attnguide.data.files import natural_key
from attnguide.data.images import IMAGE_SUFFIXES, load_image
from attnguide.errors import DataError, InputError
from attnguide.masks._levels import is_gray, read_levels
from attnguide.masks.class_names import ClassNames
from attnguide.masks.legends import LegendEntry, find_legend, read_legend
from attnguide.masks.sizes import Size, as_size, resize

__all__ = ["MaskFolder", "Template", "images_in", "load_template", "read_mask"]


class Template(NamedTuple):
    """One region per class, painted once for all images.

    Attributes:
        masks: `(K, H, W)` in [0, 1]; all NaN, "no annotation", for a class without a region.
        painted: The classes that have a region, in the order of the model's classes.
    """

    masks: Tensor
    painted: tuple[str, ...]


def read_mask(path: str | Path, size: Size | None = None) -> Tensor:
    """Read one painted mask.

    If any pixel is not fully opaque, the mask is the opacity: all that was painted on a transparent layer, in
    any colour. Otherwise it is the luminance, white being inside. In a grey image with no value but 0 and 1,
    1 is inside.

    Args:
        path: An image file, best a PNG.
        size: Size of the result, reached by `resize`; that of the
            image if None.

    Returns:
        Float tensor `(H, W)` in [0, 1].

    Raises:
        DataError: The file cannot be read as an image.
        InputError: The size is not positive.
    """
    return resize(torch.from_numpy(read_levels(path)).float(), size)


def load_template(
    path: str | Path, classes: Sequence[str], size: Size | None = None, *, legend: str | Path | None = None
) -> Template:
    """Load a template: regions painted once for all images, such as the mouth of aligned faces.

    It is either a folder with a mask for each class, named like the class (`Wearing_Lipstick.png` and
    `wearing lipstick.png` are the same), or one image whose palette indices, grey values or colours a legend
    explains. A value may stand for several classes, and a class may have several values; values that the
    legend does not list are background.

    Args:
        path: The folder, or the image, which should be a PNG since JPEG blurs labels.
        classes: Names of the model's classes, in the order of its logits.
        size: Size of the masks; that of the first one (in natural order) if None.
        legend: A `.json`, `.csv` or `.toml` file; by default the one next to the image that has its name, or
            the name `legend`. See [`read_legend`][attnguide.masks.read_legend].

    Returns:
        The masks, and which classes have one.

    Raises:
        DataError: A file cannot be read, a region is empty, a class has two files, or there is no legend.
        InputError: There are no classes, the size is not positive, or a folder is given a legend.
        UnknownNameError: A file or the legend names an unknown class.
    """
    path, names = Path(path), ClassNames(classes)
    if size is not None:
        size = as_size(size)
    if not path.is_dir():
        regions = _read_labels(path, names, Path(legend) if legend is not None else None)
    elif legend is None:
        regions = _read_folder(path, names)
    else:
        raise InputError(f"the legend {legend} is for one image, but {path} is a folder. Leave it out.")
    masks = names.stack(regions, size)
    return Template(masks, tuple(name for name in names.names if name in regions))


def _read_folder(folder: Path, names: ClassNames) -> dict[str, Tensor]:
    files: dict[str, Path] = {}
    for path in images_in(folder):
        _add(files, names.get(path.stem, path), path)
    if not files:
        raise DataError(f"{folder} holds no image. Put a mask there for each class, named like the class.")
    regions = {name: read_mask(path) for name, path in files.items()}
    for name, region in regions.items():
        if not region.any():
            raise DataError(
                f"{files[name]}: the region of {name!r} is empty. Paint it in white or on a transparent "
                "layer, or remove the file if the class has no region."
            )
    return regions


def _read_labels(path: Path, names: ClassNames, legend: Path | None) -> dict[str, Tensor]:
    image = load_image(path)
    legend = legend or find_legend(path)
    entries = [entry for entry in read_legend(legend) if entry.classes]
    if not entries:
        raise DataError(f'{legend} names no class. Add an entry, such as "1": {names.names[0]!r}.')
    values = _values(image, path, legend, entries)
    regions: dict[str, npt.NDArray[np.bool_]] = {}
    for entry in entries:
        region = values[entry.is_color] == entry.value
        if not region.any():
            raise DataError(
                f"{path}: the region of {', '.join(map(repr, entry.classes))} is empty: no pixel has the "
                f"value {entry.key}. Paint it, or remove the entry from {legend}."
            )
        for label in entry.classes:
            name = names.get(label, f"{legend}, entry {entry.key!r}")
            regions[name] = regions[name] | region if name in regions else region
    return {name: torch.from_numpy(region).float() for name, region in regions.items()}


def _values(
    image: Image.Image, path: Path, legend: Path, entries: Sequence[LegendEntry]
) -> dict[bool, npt.NDArray[np.int64]]:
    """Return the values of the legend's kinds: indices (False), colours 0xRRGGBB (True), or both."""
    values: dict[bool, npt.NDArray[np.int64]] = {}
    if any(entry.is_color for entry in entries):
        if image.mode.startswith("I") or image.mode == "F":
            raise DataError(f"{path} has no colours, but {legend} lists some. List grey values instead.")
        red, green, blue, opacity = np.moveaxis(np.asarray(image.convert("RGBA"), dtype=np.int64), -1, 0)
        # A transparent pixel has a colour, but was not painted.
        values[True] = np.where(opacity > 0, red << 16 | green << 8 | blue, -1)
    if not all(entry.is_color for entry in entries):
        if not (is_gray(image) or image.mode in ("1", "P")):
            raise DataError(
                f"{path} is a colour image (mode {image.mode}), but {legend} lists indices. Save it with a "
                "palette or in grey, or list colours as #rrggbb."
            )
        values[False] = np.asarray(image, dtype=np.int64)
    return values


class MaskFolder:
    """Masks of single images, found by the stem of the image: its name without folder and suffix.

    A mask is `<stem>.png` in the root, if it is for the whole image, or `<class>/<stem>.png` or
    `<stem>/<class>.png`, if it is for one class. A subfolder named like a class is for that class.

    Args:
        root: The folder.
        classes: Names of the model's classes, in the order of its logits; None if masks are for whole images.
        size: Size of the masks; that of each mask itself if None.

    Raises:
        DataError: The folder holds no image, or two masks for one purpose.
        InputError: The root is not a folder, the size is not positive, or there are masks for classes but no
            `classes`.
        UnknownNameError: The name of a mask is not a class.
    """

    def __init__(
        self, root: str | Path, classes: Sequence[str] | None = None, size: Size | None = None
    ) -> None:
        self.root = Path(root)
        self._names = None if classes is None else ClassNames(classes)
        self._size = None if size is None else as_size(size)
        self._whole: dict[str, Path] = {}
        self._parts: dict[str, dict[str, Path]] = {}
        if not self.root.is_dir():
            raise InputError(f"{self.root} is not a folder. Give the folder that holds the masks.")
        for path in images_in(self.root):
            _add(self._whole, _stem(path), path)
        for folder in sorted(self.root.iterdir()):
            if folder.is_dir() and not folder.name.startswith("."):
                self._add_folder(folder)
        if not len(self):
            raise DataError(
                f"{self.root} holds no mask. Masks are images, named like the images to which they belong."
            )
        for stem in self._whole.keys() & self._parts.keys():
            raise DataError(
                f"{self._whole[stem]} is a mask for the whole image, but there are others for its classes: "
                f"{', '.join(map(str, self._parts[stem].values()))}. Keep one kind."
            )

    def _add_folder(self, folder: Path) -> None:
        for path in images_in(folder):
            if self._names is None:
                raise InputError(f"{path} is a mask for one class. Pass classes, or remove its folder.")
            name, stem = self._names.find(folder.name), _stem(path)
            if name is None:
                name, stem = self._names.get(path.stem, path), _composed(folder.name)
            _add(self._parts.setdefault(stem, {}), name, path)

    def __len__(self) -> int:
        """Number of images that have a mask."""
        return len(self._whole.keys() | self._parts.keys())

    def __contains__(self, image: str | Path) -> bool:
        return (stem := _stem(image)) in self._whole or stem in self._parts

    def get(self, image: str | Path) -> Tensor | None:
        """Read the mask of an image.

        Args:
            image: Path or name of the image; the image itself is not read.

        Returns:
            None without a mask. Without `classes` a float tensor `(H, W)` in [0, 1]. With them `(K, H, W)`,
            all NaN, "no annotation", for a class without a mask; a mask for the whole image is every class's.

        Raises:
            DataError: A mask cannot be read.
        """
        stem = _stem(image)
        if stem in self._whole:
            mask = read_mask(self._whole[stem], self._size)
            return mask if self._names is None else mask.repeat(len(self._names.names), 1, 1)
        if self._names is None or stem not in self._parts:
            return None
        regions = {name: read_mask(path) for name, path in self._parts[stem].items()}
        return self._names.stack(regions, self._size)

    def get_class(self, image: str | Path, name: str) -> Tensor | None:
        """Read the mask of an image for one class only.

        Args:
            image: Path or name of the image; the image itself is not read.
            name: Name of the class.

        Returns:
            `(H, W)` in [0, 1]; None without a mask.

        Raises:
            DataError: The mask cannot be read.
        """
        stem = _stem(image)
        path = self._whole.get(stem) or self._parts.get(stem, {}).get(name)
        return None if path is None else read_mask(path, self._size)


def _stem(image: str | Path) -> str:
    return _composed(Path(image).stem)


def _composed(name: str) -> str:
    """Write accents one way: some file systems give `é` as two characters."""
    return unicodedata.normalize("NFC", name)


def images_in(folder: Path) -> list[Path]:
    """List a folder's image files in natural order, hidden ones left out."""
    paths = (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    return sorted((path for path in paths if path.is_file()), key=natural_key)


def _add(files: dict[str, Path], name: str, path: Path) -> None:
    if name in files:
        raise DataError(f"{path} and {files[name]} are both for {name!r}. Keep one.")
    files[name] = path
