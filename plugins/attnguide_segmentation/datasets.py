"""Faces with label maps, in the formats of their releases: Helen, CelebAMask-HQ, LaPa, and any folder.

Each sample is a [`ParsingSample`][attnguide_segmentation.datasets.ParsingSample], whose labels are merged
into the seven `REGIONS`:

```python
data = lapa(root, "train", transform=v2.Resize((96, 96)))
image, regions = data[0]
```
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms
from torchvision.tv_tensors import Image, Mask

from attnguide.data.files import natural_key, read_text
from attnguide.data.images import IMAGE_SUFFIXES, load_image, read_image
from attnguide.errors import DataError, InputError, UnknownNameError
from attnguide_segmentation.regions import REGIONS, merged

__all__ = ["LabelMaps", "ParsingSample", "celebamask", "helen", "lapa", "read_labels"]

Scheme = str | Sequence[str] | Mapping[int, str]
#: The parts of CelebAMask-HQ in the order in which they are painted over each other, as its own tools do.
#: Glasses are looked through.
_CELEBAMASK = {
    "skin": "face_skin", "l_brow": "eyebrows", "r_brow": "eyebrows", "l_eye": "eyes", "r_eye": "eyes",
    "nose": "nose", "mouth": "mouth", "u_lip": "mouth", "l_lip": "mouth", "neck": "background",
    "neck_l": "background", "cloth": "background", "hair": "hair", "hat": "background",
}  # fmt: skip
_HELEN_LABELS = 11


class ParsingSample(NamedTuple):
    """A face and its regions, or several faces with a leading axis.

    A named tuple, so that it can be unpacked, collated, and passed through `torchvision.transforms.v2`.
    """

    image: Tensor
    """`tv_tensors.Image`, float32 `(3, H, W)` in [0, 1]."""
    regions: Tensor
    """`tv_tensors.Mask`, uint8 `(H, W)`, indices into `REGIONS`."""


class LabelMaps(Dataset[ParsingSample]):
    """Image files, each with its label map.

    Args:
        images: Image files.
        labels: File of each image whose pixels are labels, or several files, read by `read`.
        scheme: Meaning of the labels; see [`merged`][attnguide_segmentation.regions.merged].
        transform: Function that is applied to each whole sample; `torchvision.transforms.v2` moves image and
            regions together.
        read: Function that reads the labels of an image, `(H, W)`, from its entry of `labels` and `(H, W)`.

    Raises:
        DataError: If there are no images, or files are missing.
        InputError: If the numbers of images and label maps differ.
    """

    def __init__(
        self,
        images: Sequence[Path],
        labels: Sequence[Any],
        scheme: Scheme = "helen",
        transform: Callable[[ParsingSample], Any] | None = None,
        *,
        read: Callable[[Any, tuple[int, int]], Tensor] | None = None,
    ) -> None:
        self.images, self.labels, self.scheme, self.transform = list(images), list(labels), scheme, transform
        self._read = read or _one_file
        if len(self.images) != len(self.labels):
            raise InputError(
                f"there are {len(self.images)} images and {len(self.labels)} label maps; give one per image."
            )
        if not self.images:
            raise DataError("the data set has no images.")
        missing = [file for file in self.images if not file.is_file()]
        missing += [file for file in self.labels if isinstance(file, Path) and not file.exists()]
        if missing:
            raise DataError(f"{len(missing)} files are missing, the first is {missing[0]}.")

    @classmethod
    def in_folders(
        cls,
        images: str | Path,
        labels: str | Path,
        scheme: Scheme = "helen",
        transform: Callable[[ParsingSample], Any] | None = None,
    ) -> LabelMaps:
        """Pair the images of a folder with label maps of the same names, as PNG, in another.

        Raises:
            DataError: If there are no images, or one has no label map.
        """
        files = _images_in(Path(images).expanduser())
        maps = [Path(labels).expanduser() / f"{file.stem}.png" for file in files]
        return cls(files, maps, scheme, transform)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ParsingSample:
        """Read one face.

        Raises:
            DataError: If a file cannot be read, has another size than its image, or holds unknown labels.
        """
        picture = read_image(self.images[index])
        image = Image(transforms.to_dtype(transforms.pil_to_tensor(picture), torch.float32, scale=True))
        size = (picture.height, picture.width)
        labels = self._read(self.labels[index], size)
        if tuple(labels.shape) != size:
            raise DataError(
                f"the label map of {self.images[index]} is {labels.shape[0]}×{labels.shape[1]} pixels, the "
                f"image {size[0]}×{size[1]}."
            )
        try:
            regions = merged(labels, self.scheme)
        except InputError as error:
            raise DataError(f"{self.images[index]}: {error}") from error
        sample = ParsingSample(image, Mask(regions))
        return sample if self.transform is None else self.transform(sample)


def read_labels(file: str | Path) -> Tensor:
    """Read a label map: the grey values, or palette indices, of an image file.

    Returns:
        uint8 `(H, W)`.

    Raises:
        DataError: If the file is missing or broken, or is in colour.
    """
    picture = load_image(file)
    if picture.mode not in ("L", "P", "1", "I;16", "I"):
        raise DataError(f"{file} is of mode {picture.mode}; a label map is grey, or has a palette.")
    values = np.asarray(picture).astype(np.int64)
    if values.max(initial=0) > 255:
        raise DataError(f"{file} holds the label {int(values.max())}; labels are below 256.")
    return torch.from_numpy(values.astype(np.uint8))


def _one_file(file: Path, size: tuple[int, int]) -> Tensor:
    return read_labels(file)


def lapa(
    root: str | Path, split: str = "train", *, transform: Callable[[ParsingSample], Any] | None = None
) -> LabelMaps:
    """Read LaPa as released: `SPLIT/images/N.jpg` and `SPLIT/labels/N.png`.

    Args:
        root: The folder that holds `train`, `val` and `test`.
        split: Name of one of these folders.
        transform: See [`LabelMaps`][attnguide_segmentation.datasets.LabelMaps].

    Raises:
        UnknownNameError: If the split is unknown.
        DataError: If files are missing.
    """
    if split not in ("train", "val", "test"):
        raise UnknownNameError("split of LaPa", split, ("train", "val", "test"))
    folder = Path(root).expanduser() / split
    return LabelMaps.in_folders(folder / "images", folder / "labels", "lapa", transform)


def helen(
    root: str | Path, split: str = "train", *, transform: Callable[[ParsingSample], Any] | None = None
) -> LabelMaps:
    """Read the label maps of Helen as released by Smith et al. (CVPR 2013).

    That is `images/NAME.jpg`, `labels/NAME/NAME_lbl00.png` to `lbl10.png` (the share of each label in each
    pixel), and the lists `exemplars.txt`, `tuning.txt` and `testing.txt` of lines `NUMBER , NAME`.

    Args:
        root: The folder that holds these.
        split: Split, `"train"` (exemplars), `"val"` (tuning) or `"test"`.
        transform: See [`LabelMaps`][attnguide_segmentation.datasets.LabelMaps].

    Raises:
        UnknownNameError: If the split is unknown.
        DataError: If files are missing.
    """
    lists = {"train": "exemplars.txt", "val": "tuning.txt", "test": "testing.txt"}
    if split not in lists:
        raise UnknownNameError("split of Helen", split, lists)
    root = Path(root).expanduser()
    lines = [line.strip() for line in read_text(root / lists[split]).splitlines() if line.strip()]
    names = [line.rpartition(",")[2].strip() for line in lines]
    return LabelMaps(
        [root / "images" / f"{name}.jpg" for name in names],
        [root / "labels" / name for name in names],
        "helen",
        transform,
        read=_helen_labels,
    )


def _helen_labels(folder: Path, size: tuple[int, int]) -> Tensor:
    """Return the label with the largest share in each pixel."""
    files = [folder / f"{folder.name}_lbl{number:02}.png" for number in range(_HELEN_LABELS)]
    layers = [np.asarray(load_image(file).convert("L")) for file in files]
    shapes = {layer.shape for layer in layers}
    if len(shapes) > 1:
        raise DataError(f"the label maps in {folder} have different sizes: {sorted(shapes)}.")
    return torch.from_numpy(np.stack(layers).argmax(axis=0).astype(np.uint8))


def celebamask(root: str | Path, *, transform: Callable[[ParsingSample], Any] | None = None) -> LabelMaps:
    """Read CelebAMask-HQ as released: `CelebA-HQ-img/N.jpg` and a mask for each part of a face.

    The masks are `CelebAMask-HQ-mask-anno/F/NNNNN_PART.png` in folders F of 2,000 faces; they are resized to
    the images, which are twice as large. Parts that a face lacks have no file.

    Args:
        root: The folder that holds these.
        transform: See [`LabelMaps`][attnguide_segmentation.datasets.LabelMaps].

    Raises:
        DataError: If files are missing.
    """
    root = Path(root).expanduser()
    images = _images_in(root / "CelebA-HQ-img")
    numbers = []
    for file in images:
        if not file.stem.isdecimal():
            raise DataError(f"{file} is not named by a number, as the images of CelebAMask-HQ are.")
        numbers.append(int(file.stem))
    masks = [root / "CelebAMask-HQ-mask-anno" / str(number // 2000) / f"{number:05}" for number in numbers]
    for file, mask in zip(images, masks, strict=True):
        if not mask.with_name(f"{mask.name}_skin.png").is_file():
            raise DataError(f"{file} has no mask {mask.name}_skin.png in {mask.parent}.")
    return LabelMaps(images, [str(mask) for mask in masks], REGIONS, transform, read=_celebamask_labels)


def _celebamask_labels(stem: str, size: tuple[int, int]) -> Tensor:
    regions = np.zeros(size, dtype=np.uint8)
    for part, region in _CELEBAMASK.items():
        file = Path(f"{stem}_{part}.png")
        if file.is_file():
            picture = load_image(file).convert("L")
            # Masks are half as large as the images.
            picture = picture.resize((size[1], size[0]), 0)
            regions[np.asarray(picture) > 127] = REGIONS.index(region)
    return torch.from_numpy(regions)


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the folder of the unpacked data set.")
    files = sorted(
        (file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES), key=natural_key
    )
    if not files:
        raise DataError(f"{folder} holds no images.")
    return files
