"""Faces with expressions and landmarks, in the formats of their releases.

Each sample is an [`ExpressionSample`][attnguide_action_units.datasets.ExpressionSample].
`classes` names the classes in the order of the labels, and `labels` holds all labels, known without reading
an image:

```python
data = RAFDB(root, "train", landmarks="rafdb.npz", transform=transform)
prior = ActionUnitPrior(classes=data.classes)
```
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms
from torchvision.tv_tensors import Image

from attnguide.data.files import natural_key, read_text
from attnguide.data.images import read_image
from attnguide.errors import DataError, InputError, UnknownNameError
from attnguide_action_units.landmarks import FaceLandmarks, to_68
from attnguide_action_units.tables import LandmarkTable, read_landmarks

__all__ = ["RAFDB", "AffectNet", "ExpressionSample", "FaceTable"]


class ExpressionSample(NamedTuple):
    """A face, or several faces with a leading axis.

    A named tuple, so that it can be unpacked, collated, and passed through `torchvision.transforms.v2`.
    """

    image: Tensor
    """`tv_tensors.Image`, float32 `(3, H, W)` in [0, 1]."""
    label: Tensor
    """int64 scalar, an index into `classes`."""
    landmarks: Tensor
    """`FaceLandmarks`, `(68, 2)`: x and y in pixels; NaN for a face without landmarks."""


class FaceTable(Dataset[ExpressionSample]):
    """Image files with labels and landmarks.

    Args:
        files: Image files.
        labels: Index into `classes` for each image.
        points: Landmarks `(N, 68, 2)` in pixels of the images; NaN for an image without landmarks.
        classes: Names of the expressions.
        transform: Function that is applied to each whole sample; `torchvision.transforms.v2` moves image and
            landmarks together.

    Raises:
        DataError: If there are no images, or files are missing.
        InputError: If the lengths differ.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Sequence[int] | Tensor,
        points: Tensor,
        classes: Sequence[str],
        transform: Callable[[ExpressionSample], Any] | None = None,
    ) -> None:
        self.files, self.classes, self.transform = list(files), tuple(classes), transform
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        self.points = to_68(points)
        if not len(self.files) == len(self.labels) == len(points):
            raise InputError(
                f"{len(self.files)} files, {len(self.labels)} labels and {len(points)} sets of landmarks: "
                "give one of each per image."
            )
        if not self.files:
            raise DataError("the data set has no images.")
        missing = [file for file in self.files if not file.is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self.files)} images are missing, the first is {missing[0]}."
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> ExpressionSample:
        """Read one face.

        Raises:
            DataError: If the image cannot be read.
        """
        picture = read_image(self.files[index]).convert("RGB")
        image = Image(transforms.to_dtype(transforms.pil_to_tensor(picture), torch.float32, scale=True))
        landmarks = FaceLandmarks(self.points[index].clone(), canvas_size=tuple(image.shape[-2:]))
        sample = ExpressionSample(image, self.labels[index], landmarks)
        return sample if self.transform is None else self.transform(sample)

    @property
    def without_landmarks(self) -> int:
        """Number of images without landmarks: these are trained on, but not guided."""
        return int(self.points.isnan().flatten(1).all(dim=1).sum())


class RAFDB(FaceTable):
    """RAF-DB, the seven basic expressions, as released.

    In `root` lie `EmoLabel/list_patition_label.txt` and `Image/aligned/` (or `Image/original/`); or `root` is
    the folder around `basic`, which holds them.

    Args:
        root: Folder of the release.
        split: Split, `"train"` or `"test"`.
        landmarks: A table of landmarks in pixels of these images, or its file; see
            [`read_landmarks`][attnguide_action_units.tables.read_landmarks].
        images: Version of the images, `"aligned"` or `"original"`.
        transform: See [`FaceTable`][attnguide_action_units.datasets.FaceTable].

    Raises:
        DataError: If files are missing, or the list is not in its format.
        UnknownNameError: If the split is unknown.
    """

    #: The release numbers them from 1 to 7.
    CLASSES = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        landmarks: str | Path | LandmarkTable | None = None,
        images: str = "aligned",
        transform: Callable[[ExpressionSample], Any] | None = None,
    ) -> None:
        if split not in ("train", "test"):
            raise UnknownNameError("split of RAF-DB", split, ("train", "test"))
        if images not in ("aligned", "original"):
            raise UnknownNameError("kind of images of RAF-DB", images, ("aligned", "original"))
        root = Path(root).expanduser()
        root = root / "basic" if (root / "basic").is_dir() else root
        file = root / "EmoLabel" / "list_patition_label.txt"
        names, labels = [], []
        for number, line in enumerate(read_text(file).splitlines(), start=1):
            if not line.strip():
                continue
            name, _, label = line.strip().partition(" ")
            if label.strip() not in {str(index) for index in range(1, 8)}:
                raise DataError(
                    f"{file}, line {number}: {line!r} is not 'NAME LABEL' with a label of 1 to 7."
                )
            if name.startswith(split):
                names.append(name)
                labels.append(int(label) - 1)
        ending = "_aligned" if images == "aligned" else ""
        paths = [Path(name) for name in names]
        files = [root / "Image" / images / f"{path.stem}{ending}{path.suffix}" for path in paths]
        super().__init__(files, labels, _points(files, names, landmarks), self.CLASSES, transform)


class AffectNet(FaceTable):
    """AffectNet, as released: `images/N.jpg` and `annotations/N_exp.npy`, `N_lnd.npy`.

    Args:
        root: The folder that holds `train_set` and `val_set`.
        split: Split, `"train"` or `"val"`.
        classes: Number of classes: 7, or 8 with contempt, which has no action units: give the prior
            `classes=[*data.classes[:7], None]`. Faces with other labels are left out, and counted in
            `left_out`.
        transform: See [`FaceTable`][attnguide_action_units.datasets.FaceTable].

    Attributes:
        left_out: Number of images of other classes.

    Raises:
        DataError: If files are missing or broken.
        InputError: If `classes` is neither 7 nor 8.
        UnknownNameError: If the split is unknown.
    """

    CLASSES = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt")

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        classes: int = 7,
        transform: Callable[[ExpressionSample], Any] | None = None,
    ) -> None:
        if split not in ("train", "val"):
            raise UnknownNameError("split of AffectNet", split, ("train", "val"))
        if classes not in (7, 8):
            raise InputError(f"classes={classes} must be 7, or 8 with contempt.")
        folder = Path(root).expanduser() / f"{split}_set"
        annotations = sorted((folder / "annotations").glob("*_exp.npy"), key=natural_key)
        if not annotations:
            raise DataError(
                f"{folder / 'annotations'} holds no N_exp.npy; give the folder that holds train_set."
            )
        files, labels, points = [], [], []
        for file in annotations:
            label = _number(file)
            if not 0 <= label < classes:
                continue
            name = file.name.removesuffix("_exp.npy")
            files.append(folder / "images" / f"{name}.jpg")
            labels.append(label)
            points.append(_landmarks_of(file.with_name(f"{name}_lnd.npy")))
        self.left_out = len(annotations) - len(files)
        stacked = torch.stack(points) if points else torch.empty(0, 68, 2)
        super().__init__(files, labels, stacked, self.CLASSES[:classes], transform)


def _points(
    files: Sequence[Path], names: Sequence[str], landmarks: str | Path | LandmarkTable | None
) -> Tensor:
    points = torch.full((len(files), 68, 2), torch.nan)
    if landmarks is None:
        return points
    table = landmarks if isinstance(landmarks, LandmarkTable) else read_landmarks(landmarks)
    for index, (file, name) in enumerate(zip(files, names, strict=True)):
        face = table.of(file)
        face = table.of(name) if face is None else face
        if face is not None:
            points[index] = face
    if files and bool(points.isnan().all()):
        raise DataError(
            f"the table of landmarks names none of the images, such as {files[0].name}; it names "
            f"{', '.join(table.names[:3]) or 'nothing'}."
        )
    return points


def _array(file: Path) -> np.ndarray[Any, Any]:
    try:
        array: np.ndarray[Any, Any] = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    return array


def _number(file: Path) -> int:
    array = _array(file)
    try:
        return int(array.item())
    except (TypeError, ValueError) as error:
        raise DataError(f"{file} must hold one number, got {array!r:.60}: {error}") from error


def _landmarks_of(file: Path) -> Tensor:
    array = _array(file)
    if array.size != 136:
        raise DataError(f"{file} holds {array.size} numbers, not x and y of 68 landmarks.")
    return to_68(array.astype(np.float32).reshape(68, 2))
