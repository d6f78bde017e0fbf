"""The data that fine-tuning takes."""

from __future__ import annotations

from tests.helpers.models import cnn
from tests.plugins.gradcam_iou.samples import (
    CLASSES,
    SIZE,
    quick,
    samples,
    template,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from attnguide.data.procedural.faces import ProceduralFaces


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
