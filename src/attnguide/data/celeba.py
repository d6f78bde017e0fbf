"""Reads CelebA from the files of its release."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.datasets.celeba import CSV

from attnguide.data.files import read_text
from attnguide.data.images import read_image
from attnguide.errors import DataError, InputError, UnknownNameError

__all__ = ["CelebA"]

_SPLITS = {"train": 0, "valid": 1, "test": 2}


class CelebA(torchvision.datasets.CelebA):  # type: ignore[misc]
    """CelebA with its binary attributes as float labels.

    Unlike torchvision's class it reads any folder in the format of the release, for example a part of it:
    torchvision compares checksums, which only the full release has. The five lists in `root/celeba` must name
    the same images in the same order, and every image of the split must be in the folder
    `root/celeba/img_align_celeba`, or in the folder `images`.

    Args:
        root: Folder that contains the folder `celeba`.
        split: `"train"`, `"valid"`, `"test"` or `"all"`.
        attributes: Names of the attributes to return, in that order; all 40 if None.
        transform: Applied to the image, a PIL image of mode RGB.
        target_transform: Applied to the labels.
        images: Folder of the images: aligned and cropped by default, `"img_celeba"` for the original ones.

    Attributes:
        classes: Names of the attributes that the labels hold.

    Raises:
        DataError: Files are missing, are not in CelebA's format, or list different images.
        InputError: `attributes` is empty or a single string.
        UnknownNameError: There is no such split or attribute.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        attributes: Sequence[str] | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Tensor], Any] | None = None,
        images: str = "img_align_celeba",
    ) -> None:
        if split not in (*_SPLITS, "all"):
            raise UnknownNameError("split of CelebA", split, (*_SPLITS, "all"))
        if attributes is not None and (isinstance(attributes, str) or not attributes):
            raise InputError(f"attributes must be a sequence of at least one name, got {attributes!r}.")
        root = Path(root).expanduser()
        self._folder, self._images = root / self.base_folder, images
        self._check_files()
        # The split is taken below, because torchvision cannot take one of a single image.
        super().__init__(root, split="all", transform=transform, target_transform=target_transform)
        self.split = split
        if split != "all":
            self._select(split)
        self.classes = list(self.attr_names if attributes is None else attributes)
        for name in self.classes:
            if name not in self.attr_names:
                raise UnknownNameError("attribute of CelebA", name, self.attr_names)
        self._columns = [self.attr_names.index(name) for name in self.classes]
        self._check_images()

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return an image and its labels.

        Args:
            index: Number of the image in the split.

        Returns:
            The image, and float labels `(len(classes),)` of 0 and 1, each as its transform leaves it.

        Raises:
            DataError: The image cannot be read.
        """
        image: Any = read_image(self._folder / self._images / self.filename[index])
        labels: Any = self.attr[index, self._columns].float()
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            labels = self.target_transform(labels)
        return image, labels

    def _check_files(self) -> None:
        names = [name for _, _, name in self.file_list if name.endswith(".txt")]
        missing = [name for name in names if not (self._folder / name).is_file()]
        if not (self._folder / self._images).is_dir():
            missing.append(f"{self._images}/")
        if missing:
            raise DataError(
                f"no CelebA in {self._folder.absolute()}: {', '.join(missing)} missing. Give as root the "
                f"folder that holds {self.base_folder!r}; torchvision.datasets.CelebA(root, download=True) "
                "fetches it."
            )

    def _check_integrity(self) -> bool:
        """Skip the check of torchvision, which `_check_files` replaces."""
        return True

    def _load_csv(self, filename: str, header: int | None = None) -> CSV:
        """Read an annotation file as torchvision does, but report the line of an error.

        Args:
            filename: Name of the file in the folder.
            header: Number of the line that names the columns, counted from 0.

        Returns:
            Names of the columns, names of the images, and values as an integer tensor.

        Raises:
            DataError: The file is malformed, or lists other images than the partition file.
        """
        path = self._folder / filename
        # In some releases the lines end in a space, which would add an empty field.
        reader = csv.reader(read_text(path).splitlines(), delimiter=" ", skipinitialspace=True)
        rows = [[field for field in row if field] for row in reader]
        start = 0 if header is None else header + 1
        names = [] if header is None else rows[header] if header < len(rows) else []
        index: list[str] = []
        data: list[list[int]] = []
        for number, row in enumerate(rows[start:], start + 1):
            if not row:
                continue
            try:
                values = [int(field) for field in row[1:]]
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}. Restore the line.") from error
            if not values or (data and len(values) != len(data[0])):
                raise DataError(
                    f"{path}, line {number}: {len(values)} values, expected "
                    f"{len(data[0]) if data else 'some'}. Restore the line."
                )
            index.append(row[0])
            data.append(values)
        if not data:
            raise DataError(f"{path} lists no image. Restore the file.")
        table = CSV(names, index, torch.tensor(data))
        self._check_table(path, table)
        return table

    def _check_table(self, path: Path, table: CSV) -> None:
        if path.name == "list_eval_partition.txt":
            self._partition = table
        # Rows are matched by number, so images in another order would silently get wrong labels.
        elif table.index != self._partition.index:
            pairs = zip([*table.index, "nothing"], [*self._partition.index, "nothing"], strict=False)
            here, there = next(pair for pair in pairs if pair[0] != pair[1])
            raise DataError(
                f"{path} lists {here} where list_eval_partition.txt lists {there}. All lists must name the "
                "same images in the same order."
            )
        if path.name == "list_attr_celeba.txt":
            if len(table.header) != table.data.shape[1]:
                raise DataError(
                    f"{path}: line 2 names {len(table.header)} attributes, but the rows have "
                    f"{table.data.shape[1]} values. Restore the file."
                )
            if (wrong := (table.data.abs() != 1).any(dim=1)).any():
                image = table.index[int(wrong.nonzero()[0])]
                raise DataError(
                    f"{path}: {image} has an attribute that is neither -1 nor 1. Restore the row."
                )

    def _select(self, split: str) -> None:
        chosen = self._partition.data[:, 0] == _SPLITS[split]
        if not chosen.any():
            raise DataError(
                f"{self._folder / 'list_eval_partition.txt'} has no image with {_SPLITS[split]}, the split "
                f"{split!r}. Choose another split, or 'all'."
            )
        self.filename = [self._partition.index[number] for number in chosen.nonzero()[:, 0]]
        for name in ("attr", "identity", "bbox", "landmarks_align"):
            setattr(self, name, getattr(self, name)[chosen])

    def _check_images(self) -> None:
        folder = self._folder / self._images
        there = {path.name for path in folder.iterdir()}
        missing = [name for name in self.filename if name not in there]
        if missing:
            raise DataError(
                f"{folder} lacks {len(missing)} of {len(self.filename)} images of the split {self.split!r}, "
                f"such as {', '.join(missing[:3])}. Add them, or take their rows out of the five lists."
            )
