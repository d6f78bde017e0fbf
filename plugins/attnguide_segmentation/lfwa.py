"""LFWA: the faces of LFW with CelebA's forty attributes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from attnguide.data.files import check_file
from attnguide.data.images import read_image
from attnguide.errors import DataError, UnknownNameError

__all__ = ["LFWA"]


class LFWA(Dataset[tuple[Any, Tensor]]):
    """LFWA as released: `lfw/NAME/NAME_0001.jpg`, `lfw_att_40.mat` and `indices_train_test.mat`.

    The tables are of MATLAB's version 7.3, which is HDF5: reading them needs `pip install attnguide[lfwa]`.

    Args:
        root: The folder that holds these.
        split: Split, `"train"` or `"test"`.
        transform: Function that is applied to the image, a PIL image of mode RGB.

    Attributes:
        classes: Names of the forty attributes.

    Raises:
        DataError: If files are missing, or the tables have another form.
        UnknownNameError: If the split is unknown.
    """

    def __init__(
        self, root: str | Path, split: str = "train", *, transform: Callable[[Any], Any] | None = None
    ) -> None:
        if split not in ("train", "test"):
            raise UnknownNameError("split of LFWA", split, ("train", "test"))
        self._folder, self.transform = Path(root).expanduser(), transform
        names, self.classes, labels = self._read("lfw_att_40.mat", _labels)
        chosen = self._read("indices_train_test.mat", lambda file: _array(file, f"indices_img_{split}"))
        chosen = chosen.flatten().astype(int) - 1  # numbers begin with 1
        if labels.shape != (len(names), len(self.classes)):
            raise DataError(
                f"lfw_att_40.mat has labels of shape {tuple(labels.shape)} for {len(names)} images and "
                f"{len(self.classes)} attributes."
            )
        self.files = [self._folder / "lfw" / names[index].replace("\\", "/") for index in chosen]
        self.labels = labels[torch.as_tensor(chosen)]
        missing = [file for file in self.files if not file.is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self.files)} images are missing, the first is {missing[0]}."
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        """Return an image, as the transform leaves it, and its labels `(40,)` of 0 and 1.

        Raises:
            DataError: If the image cannot be read.
        """
        image: Any = read_image(self.files[index])
        return image if self.transform is None else self.transform(image), self.labels[index]

    def _read(self, name: str, take: Callable[[Any], Any]) -> Any:
        """Read a value from a table."""
        path = check_file(self._folder / name)
        try:
            import h5py
        except ImportError as error:
            raise DataError(
                f"{path} is HDF5, and h5py is not installed: pip install attnguide[lfwa]."
            ) from error
        try:
            with h5py.File(path, "r") as file:
                return take(file)
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not the table of LFWA ({type(error).__name__}: {error}).") from error


def _array(file: Any, name: str) -> Any:
    # MATLAB counts columns first.
    return np.asarray(file[name]).T


def _labels(file: Any) -> tuple[list[str], tuple[str, ...], Tensor]:
    """Names of the images and the attributes, and the labels `(N, K)`."""

    def texts(name: str) -> list[str]:
        # A cell array refers to one array of letters for each cell.
        return [
            "".join(map(chr, np.asarray(file[cell]).flatten())).strip()
            for cell in _array(file, name).flatten()
        ]

    labels = torch.from_numpy(_array(file, "label").astype(np.float32))
    return texts("name"), tuple(texts("AttrName")), labels
