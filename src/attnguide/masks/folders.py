"""Reads painted masks: one image, a template for all images, or a folder with masks for each image.

For annotations drawn as shapes, in LabelMe and COCO files, see
[`read_labelme`][attnguide.masks.read_labelme] and
[`read_coco`][attnguide.masks.read_coco].
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from attnguide.data.files import check_file, natural_key
from attnguide.data.images import IMAGE_SUFFIXES, image_size, load_image
from attnguide.errors import DataError, InputError
from attnguide.masks._levels import is_gray, packed_colors, read_levels
from attnguide.masks.class_names import ClassNames
from attnguide.masks.inside import Inside, as_inside
from attnguide.masks.legends import LegendEntry, find_legend, legend_among, read_legend
from attnguide.masks.sizes import Size, as_size, check_fit, resize

__all__ = ["MaskFolder", "Template", "images_in", "load_template", "read_mask"]


class Template(NamedTuple):
    """One region per class, painted once for all images.

    Attributes:
        masks: `(K, H, W)` in [0, 1]; all NaN, "no annotation", for a class without a region.
        painted: The classes that have a region, in the order of the model's classes.
    """

    masks: Tensor
    painted: tuple[str, ...]


def read_mask(path: str | Path, size: Size | None = None, *, inside: Inside | None = None) -> Tensor:
    """Read one painted mask, whatever its bit depth, palette or colour.

    Without `inside` the file itself must show what is inside, by the first of these rules that fits:

    1. Opacity: if it varies, the mask is the opacity, all that was painted on a transparent layer.
    2. A palette: index 0 is outside, and the only other index inside. Beside another index, 255 and the
       colour `#e0e0c0`, VOC's marks of pixels that no class claims, are outside. A palette of greys with more
       than two indices is a grey image.
    3. Two grey values, of which one is 0: the other is inside, be it 1, 128, 255 or 65535.
    4. Two colours, of which one is black: the other is inside; VOC's `#e0e0c0` beside them is outside.
    5. More grey values: a soft mask, divided by the largest value that the file can hold: 255, 65535 for 16
       and 32 bits, 1 for floats. It must begin within a tenth of 0 and reach four fifths of that value:
       16-bit files of values up to 255 do not, and JPEG's noise around black and white does.

    Several classes in one file (areas of more than two values), photographs, and masks that are faint
    throughout are an error, which shows what was found; `inside` says what is meant.
    [`load_template`][attnguide.masks.load_template] and [`MaskFolder`][attnguide.masks.MaskFolder] also take
    a legend, which names the class of each value.

    Args:
        path: An image file, best a PNG.
        size: Size of the result, reached by stretching; that of the image if None.
        inside: What is inside: palette indices or grey values as the file holds them (`15`, `[1, 2]`,
            `"1-20"`), colours (`"#ff0000"`), or `"gray"` for a soft mask of any range. All other values are
            outside.

    Returns:
        Float tensor `(H, W)` in [0, 1].

    Raises:
        DataError: The file cannot be read as an image, does not show what is inside, or is upright where the
            size is not (or the reverse).
        InputError: The size is not positive, or `inside` is not as above.
    """
    return resize(torch.from_numpy(read_levels(path, inside)).float(), size, path)


def load_template(
    path: str | Path,
    classes: Sequence[str],
    size: Size | None = None,
    *,
    legend: str | Path | None = None,
    inside: Inside | None = None,
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
        inside: Values that are inside, in the files of a folder; see
            [`read_mask`][attnguide.masks.read_mask].

    Returns:
        The masks, and which classes have one.

    Raises:
        DataError: A file cannot be read, a region is empty, a class has two files, or there is no legend.
        InputError: There are no classes, the size is not positive, a folder is given a legend, or one image
            `inside`.
        UnknownNameError: A file or the legend names an unknown class.
    """
    path, names = Path(path), ClassNames(classes)
    if size is not None:
        size = as_size(size)
    if not path.is_dir():
        if inside is not None:
            raise InputError(f"inside is for a folder of masks, but {path} is one image. Give it a legend.")
        check_file(path)
        legend = find_legend(path) if legend is None else Path(legend)
        regions = _read_labels(path, names, legend, _named_entries(legend, names))
    elif legend is None:
        regions = _read_folder(path, names, inside)
    else:
        raise InputError(f"the legend {legend} is for one image, but {path} is a folder. Leave it out.")
    masks = names.stack(regions, size)
    return Template(masks, tuple(name for name in names.names if name in regions))


def _read_folder(folder: Path, names: ClassNames, inside: Inside | None) -> dict[str, Tensor]:
    files: dict[str, Path] = {}
    for path in images_in(folder):
        _add(files, names.get(path.stem, path), path)
    if not files:
        raise DataError(f"{folder} holds no image. Put a mask there for each class, named like the class.")
    regions = {name: read_mask(path, inside=inside) for name, path in files.items()}
    for name, region in regions.items():
        if not region.any():
            raise DataError(
                f"{files[name]}: the region of {name!r} is empty. Paint it in white or on a transparent "
                "layer, or remove the file if the class has no region."
            )
    return regions


def _named_entries(legend: Path, names: ClassNames) -> list[LegendEntry]:
    """Read the entries of a legend that name classes; an error if there are none."""
    entries = [entry for entry in read_legend(legend) if entry.classes]
    if not entries:
        raise DataError(f'{legend} names no class. Add an entry, such as "1": {names.names[0]!r}.')
    return entries


def _read_labels(
    path: Path, names: ClassNames, legend: Path, entries: Sequence[LegendEntry], *, complete: bool = True
) -> dict[str, Tensor]:
    """Read the regions of the classes that a legend names; all must be there, if `complete`."""
    values = _values(load_image(path), path, legend, entries)
    regions: dict[str, npt.NDArray[np.bool_]] = {}
    for entry in entries:
        region = values[entry.is_color] == entry.value
        if complete and not region.any():
            raise DataError(
                f"{path}: the region of {', '.join(map(repr, entry.classes))} is empty: no pixel has the "
                f"value {entry.key}. Paint it, or remove the entry from {legend}."
            )
        for label in entry.classes:
            name = names.get(label, f"{legend}, entry {entry.key!r}")
            regions[name] = regions[name] | region if name in regions else region
    return {name: torch.from_numpy(region).float() for name, region in regions.items() if region.any()}


def _values(
    image: Image.Image, path: Path, legend: Path, entries: Sequence[LegendEntry]
) -> dict[bool, npt.NDArray[np.int64]]:
    """Return the values of the legend's kinds: indices (False), colours 0xRRGGBB (True), or both."""
    values: dict[bool, npt.NDArray[np.int64]] = {}
    if any(entry.is_color for entry in entries):
        if image.mode.startswith("I") or image.mode == "F":
            raise DataError(f"{path} has no colours, but {legend} lists some. List grey values instead.")
        values[True] = packed_colors(image, path)
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
    `<stem>/<class>.png`, if it is for one class. A subfolder named like a class is for that class. With a
    legend the files in the root hold several classes each: a class is annotated where its values occur.

    Args:
        root: The folder.
        classes: Names of the model's classes, in the order of its logits; None if masks are for whole images.
        size: Size of the masks; that of each mask itself if None.
        inside: Values that are inside; see [`read_mask`][attnguide.masks.read_mask].
        legend: A `.json`, `.csv` or `.toml` file, which names the classes of the values in the files of the
            root; by default the file `legend` in the folder, if there is one.

    Raises:
        DataError: The folder holds no image, or two masks for one purpose; or the legend cannot be read.
        InputError: The root is not a folder, the size is not positive, there are masks or a legend for
            classes but no `classes`, or `inside` has other things than values, or comes with a legend.
        UnknownNameError: The name of a mask is not a class.
    """

    def __init__(
        self,
        root: str | Path,
        classes: Sequence[str] | None = None,
        size: Size | None = None,
        *,
        inside: Inside | None = None,
        legend: str | Path | None = None,
    ) -> None:
        self.root = Path(root)
        self._names = None if classes is None else ClassNames(classes)
        self._size = None if size is None else as_size(size)
        self._inside = None if inside is None else as_inside(inside)
        self._whole: dict[str, Path] = {}
        self._parts: dict[str, dict[str, Path]] = {}
        self._owners: dict[Path, Path] = {}
        if not self.root.is_dir():
            raise InputError(f"{self.root} is not a folder. Give the folder that holds the masks.")
        legend = legend_among(self.root, "legend") if legend is None else Path(legend)
        self._regions = None if legend is None else self._reader_of_labels(legend)
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

    def _reader_of_labels(self, legend: Path) -> Callable[[Path], dict[str, Tensor]]:
        """Return a function that reads the regions of the classes in a file."""
        if self._names is None:
            raise InputError(f"{legend} names classes. Pass classes, or inside= and no legend.")
        if self._inside is not None:
            raise InputError(f"inside and the legend {legend} exclude each other. Leave one of them out.")
        names, entries = self._names, _named_entries(legend, self._names)
        return lambda path: _read_labels(path, names, legend, entries, complete=False)

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

    def file(self, image: str | Path, name: str | None = None) -> Path | None:
        """Return the file of an image's mask; None without one.

        Args:
            image: Path or name of the image; the image itself is not read.
            name: The class of the mask, for images that have a mask for each class.
        """
        stem = _stem(image)
        return self._whole.get(stem) or (None if name is None else self._parts.get(stem, {}).get(name))

    def get(self, image: str | Path) -> Tensor | None:
        """Read the mask of an image.

        Args:
            image: Path or name of the image; the image itself is not read.

        Returns:
            None without a mask. Without `classes` a float tensor `(H, W)` in [0, 1]. With them `(K, H, W)`,
            all NaN, "no annotation", for a class without a mask; a mask for the whole image is every class's.

        Raises:
            DataError: A mask cannot be read, does not show what is inside, is the image itself, or was used
                for an image of the same name in another folder.
        """
        stem = _stem(image)
        whole, parts = self._whole.get(stem), self._parts.get(stem, {})
        self.claim(image)
        if whole is not None and self._names is not None and self._regions is not None:
            return self._names.stack(self._regions(whole), self._size or load_image(whole).size[::-1])
        if whole is not None:
            mask = read_mask(whole, self._size, inside=self._inside)
            return mask if self._names is None else mask.repeat(len(self._names.names), 1, 1)
        if self._names is None or not parts:
            return None
        regions = {name: read_mask(path, inside=self._inside) for name, path in parts.items()}
        return self._names.stack(regions, self._size)

    def get_class(self, image: str | Path, name: str) -> Tensor | None:
        """Read the mask of an image for one class only.

        Args:
            image: Path or name of the image; the image itself is not read.
            name: Name of the class.

        Returns:
            `(H, W)` in [0, 1]; None without a mask.

        Raises:
            DataError: As for `get`.
        """
        path = self.file(image, name)
        if path is None:
            return None
        self._claim(path, image)
        if self._regions is None or path not in self._whole.values():
            return read_mask(path, self._size, inside=self._inside)
        region = self._regions(path).get(name)
        return None if region is None else resize(region, self._size, path)

    def claim(self, image: str | Path, name: str | None = None) -> None:
        """Note that an image has its mask here, so that images of one name are found before any is read.

        Args:
            image: Path or name of the image.
            name: The class of the mask, for images that have a mask for each class; None for all of them.

        Raises:
            DataError: The mask is that of another image, or the image itself.
        """
        for path in self._files(image) if name is None else filter(None, [self.file(image, name)]):
            self._claim(path, image)

    def check_fit(self, image: str | Path) -> None:
        """Check that the masks of an image have its proportions.

        Args:
            image: Path of the image, of which the size is read.

        Raises:
            DataError: They have others, or a file cannot be read.
        """
        for path in self._files(image):
            check_fit(image_size(path), image_size(image), path, image)

    def _files(self, image: str | Path) -> list[Path]:
        stem = _stem(image)
        return [self._whole[stem]] if stem in self._whole else list(self._parts.get(stem, {}).values())

    def _claim(self, path: Path, image: str | Path) -> None:
        """Refuse a mask that is the image, or that belongs to another image of that name."""
        image = Path(image)
        if path.name == image.name and path.resolve() == image.resolve():
            raise DataError(f"{path} is the image itself, not its mask. Give the folder of the masks.")
        owner = self._owners.setdefault(path, image)
        if owner is not image and not _may_be_one(owner, image):
            raise DataError(
                f"{path} is the mask of {owner}, and cannot be that of {image} too. Put the masks into a "
                "folder for each class, <class>/<image>, or rename the images."
            )


def _may_be_one(first: Path, second: Path) -> bool:
    """Whether two paths may name one file: one may be relative, or a name alone."""
    length = min(len(first.parts), len(second.parts))
    return first.parts[-length:] == second.parts[-length:] or first.absolute() == second.absolute()


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
