"""DecoyMNIST: digits with a grey patch that gives the label away in training and misleads in the test.

Two protocols share the name. Their figures must not be compared with each other:

- `"xil"`: 4×4 pixels in a random corner; the patch of a test image belongs to a random digit (Ross et al.,
  IJCAI 2017; settings and figures of Friedrich et al., "A typology for exploring the mitigation of shortcut
  behavior", 2022). Values in [0, 1].
- `"cdep"`: 5×5 pixels in a random corner; the grey on a test image is 25·y, that of about the opposite digit
  (Rieger et al., ICML 2020). Values in [−1, 1], and all four corners are forbidden.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset

from attnguide.errors import DataError, UnknownNameError

__all__ = ["DecoyMNIST", "Protocol", "read_digits"]

#: Published protocols of DecoyMNIST.
Protocol = Literal["xil", "cdep"]
_SIDE = 28


@dataclass(frozen=True)
class _Patch:
    """Size of the patches, and their grey on test images.

    Attributes:
        side: Side of the patch, in pixels.
        adversarial: Whether the grey on a test image is 25·y, not that of a random digit.
        low: Smallest value of the images; the largest is 1.
    """

    side: int
    adversarial: bool
    low: float


_PATCHES: dict[Protocol, _Patch] = {"xil": _Patch(4, False, 0.0), "cdep": _Patch(5, True, -1.0)}


class DecoyMNIST(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Digits with a patch in a corner whose grey is 255 − 25·y in training.

    Args:
        root: A file `mnist.npz` (arrays `x_train`, `y_train`, `x_test`, `y_test`), or the folder that
            `torchvision.datasets.MNIST(root, download=True)` fills.
        split: `"train"` or `"test"`.
        protocol: `"xil"` or `"cdep"`.
        seed: Seed of the corners, and of the digits whose patch test images get.
        honest: Give test images the patch of their own digit, as training images, for validation in the
            distribution of the training data.
        decoy: Add patches; without, the images are those of MNIST.

    Attributes:
        images: `(N, 1, 28, 28)`, float32 in the protocol's range.
        labels: `(N,)`, int64.
        masks: Where to look, `(N, 28, 28)`, 0 where patches are and 1 elsewhere.
        classes: Names of the digits.

    Raises:
        DataError: If there are no digits.
        UnknownNameError: If there is no such split or protocol.
    """

    def __init__(
        self,
        root: str | Path,
        split: Literal["train", "test"] = "train",
        *,
        protocol: Protocol = "xil",
        seed: int = 0,
        honest: bool = False,
        decoy: bool = True,
    ) -> None:
        if protocol not in get_args(Protocol):
            raise UnknownNameError("protocol of DecoyMNIST", protocol, get_args(Protocol))
        patch = _PATCHES[protocol]
        pixels, self.labels = read_digits(root, split)
        self.classes = [str(digit) for digit in range(10)]
        generator = torch.Generator().manual_seed(seed)
        corner = torch.randint(4, (len(pixels),), generator=generator)
        random = torch.randint(10, (len(pixels),), generator=generator)
        places = _corners(patch.side)
        if decoy:
            gray = 255 - 25 * self.labels
            if split == "test" and not honest:
                gray = 25 * self.labels if patch.adversarial else 255 - 25 * random
            pixels = torch.where(places[corner], gray.byte()[:, None, None], pixels)
        self.images = (pixels.float()[:, None] / 255) * (1 - patch.low) + patch.low
        forbidden = places.any(dim=0).expand(len(pixels), -1, -1) if protocol == "cdep" else places[corner]
        self.masks = (~forbidden).float()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return an image `(1, 28, 28)`, its label, and where to look, `(28, 28)`."""
        return self.images[index], self.labels[index], self.masks[index]


def read_digits(root: str | Path, split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Read MNIST.

    Args:
        root: A file `mnist.npz`, or the folder of torchvision's MNIST.
        split: `"train"` or `"test"`.

    Returns:
        Pixels `(N, 28, 28)`, uint8, and labels `(N,)`, int64.

    Raises:
        DataError: If there are no digits, or they have another format.
        UnknownNameError: If there is no such split.
    """
    if split not in ("train", "test"):
        raise UnknownNameError("split of MNIST", split, ("train", "test"))
    path = Path(root).expanduser()
    if path.is_dir():
        try:
            digits = torchvision.datasets.MNIST(path, train=split == "train")
        except RuntimeError as error:
            raise DataError(
                f"no MNIST in {path.absolute()}: torchvision.datasets.MNIST({str(root)!r}, download=True) "
                "fetches it, or give a file mnist.npz."
            ) from error
        pixels, labels = digits.data, digits.targets
    else:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                pixels = torch.from_numpy(arrays[f"x_{split}"])
                labels = torch.from_numpy(arrays[f"y_{split}"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path.absolute()} cannot be read as mnist.npz with x_{split} and y_{split}: {error}."
            ) from error
    if pixels.dtype != torch.uint8 or pixels.shape != (len(labels), _SIDE, _SIDE):
        raise DataError(
            f"{path.absolute()}: expected bytes (N, 28, 28) and N labels, got {tuple(pixels.shape)} of "
            f"{pixels.dtype} and {len(labels)}."
        )
    return pixels, labels.long()


def _corners(side: int) -> Tensor:
    """Return the four possible places of a patch, bools `(4, 28, 28)`."""
    places = torch.zeros(4, _SIDE, _SIDE, dtype=torch.bool)
    for index, (row, column) in enumerate((r, c) for r in (0, _SIDE - side) for c in (0, _SIDE - side)):
        places[index, row : row + side, column : column + side] = True
    return places
