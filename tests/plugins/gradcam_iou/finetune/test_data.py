"""The data that fine-tuning takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers.celeba import make_celeba
from tests.helpers.models import cnn
from tests.plugins.gradcam_iou.samples import (
    CLASSES,
    SIZE,
    TO_TENSOR,
    corner,
    paint,
    quick,
    samples,
    template,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, StackDataset, Subset

from attnguide.data.celeba import CelebA
from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.errors import DataError, InputError
from attnguide_gradcam_iou.finetune import WithMasks


def test_faces_and_loaders_and_streams_go_in_as_they_are() -> None:
    faces = ProceduralFaces(8, SIZE)
    model = cnn(len(faces.classes))
    quick(model, faces, template=faces.region_mask("mouth"), batch_size=4)
    quick(model, DataLoader(faces, 4), validation=DataLoader(faces, 8), template=faces.region_mask("mouth"))

    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter(samples(8))

    quick(cnn(), Stream(), template=template(), batch_size=4, progress=True)


def test_a_last_single_image_does_not_break_batch_normalisation() -> None:
    model = nn.Sequential(cnn(8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))  # needs two images at least
    quick(model, samples(9), template=template(), batch_size=4)


def test_masks_of_single_celeba_images(tmp_path: Path) -> None:
    make_celeba(tmp_path, 6, size=(60, 70))
    data = CelebA(tmp_path, "all", attributes=["Smiling", "Bald"], transform=TO_TENSOR)
    paint(tmp_path / "masks" / "000002.png", corner())
    whole = WithMasks(data, tmp_path / "masks", 16)
    assert len(whole) == 6
    assert whole[1][2].shape == (16, 16)
    assert whole[1][2].sum() == 64
    assert bool(whole[0][2].isnan().all())
    paint(tmp_path / "parts" / "bald" / "000003.png", corner())
    parts = WithMasks(data, tmp_path / "parts", 16, data.classes)
    assert parts[2][2].shape == (2, 16, 16)
    assert parts[0][2].shape == (2, 16, 16)
    model = cnn(2)
    (epoch,) = quick(model, whole, validation=parts, batch_size=2)
    assert epoch.iou is not None
    with pytest.raises(InputError, match=r"0 names for 3 samples.*names="):
        WithMasks(Subset(data, [0, 1, 2]), tmp_path / "masks", 16)
    with pytest.raises(DataError, match=r"none of the images, such as a\.jpg"):
        WithMasks(StackDataset(torch.zeros(1)), tmp_path / "masks", 16, names=["a.jpg"])
