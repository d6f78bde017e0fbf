"""The data that fine-tuning takes."""

from __future__ import annotations

from pathlib import Path

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
from torch.utils.data import DataLoader, IterableDataset

from attnguide.data.celeba import CelebA
from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.masks import WithMasks


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
    paint(tmp_path / "parts" / "bald" / "000003.png", corner())
    whole, parts = (
        WithMasks(data, tmp_path / "masks", 16),
        WithMasks(data, tmp_path / "parts", 16, data.classes),
    )
    (epoch,) = quick(cnn(2), whole, validation=parts, batch_size=2)
    assert epoch.iou is not None
