"""The prior of the regions that show an attribute."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.models import cnn
from torch import Tensor

import attnguide as ag
from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.errors import AttnGuideError
from attnguide_segmentation.prior import SegmentationPrior
from attnguide_segmentation.regions import REGIONS, as_masks

CLASSES = ("lipstick", "black_hair", "young", "eyeglasses")


def guided(regions: Tensor | None, prior: SegmentationPrior) -> tuple[Tensor, list[tuple[int, str]]]:
    """Return the maps that guided, and whose they are."""
    model = cnn(len(CLASSES))
    faces = ProceduralFaces(2, 32).stack()
    labels = torch.ones(2, len(CLASSES))
    with ag.Guide(model, prior=prior, loss="energy") as guide:
        model(faces.image.as_subclass(Tensor))
        guide.loss(labels, regions=regions).backward()
        (record,) = guide.records()
    pairs = zip(record.pairs.sample.tolist(), record.pairs.cls.tolist(), strict=True)
    return record.prior, [(sample, CLASSES[cls]) for sample, cls in pairs]


def test_attributes_are_where_their_regions_are() -> None:
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    labels[:, 16:, :16] = REGIONS.index("mouth")
    labels[0, :16, 16:] = REGIONS.index("hair")
    drawn, pairs = guided(labels, SegmentationPrior(classes=CLASSES))
    half = drawn.shape[-1] // 2
    # Nobody shows youth, or glasses without eyes.
    assert pairs == [(0, "lipstick"), (0, "black_hair"), (1, "lipstick")]
    assert drawn[0, half:, :half].eq(1).all()
    assert drawn[0].sum() == half * half
    assert drawn[1, :half, half:].eq(1).all()


def test_regions_are_found_in_the_images() -> None:
    seen = []

    def mouths(images: Tensor) -> Tensor:
        seen.append(images.shape)
        return as_masks(torch.full((len(images), 8, 8), REGIONS.index("mouth")))

    _, pairs = guided(None, SegmentationPrior(classes=CLASSES, parser=mouths))
    assert seen == [(2, 3, 32, 32)]
    assert pairs == [(0, "lipstick"), (1, "lipstick")]


def test_a_prior_for_other_classes() -> None:
    with pytest.raises(AttnGuideError, match="the model has 4 classes, the prior knows 40"):
        guided(torch.zeros(2, 32, 32).long(), SegmentationPrior())
    with pytest.raises(AttnGuideError, match="regions have 1 entries, the batch has 2"):
        guided(torch.zeros(1, 32, 32).long(), SegmentationPrior(classes=CLASSES))
    with pytest.raises(AttnGuideError, match=r"attribute 'lipstik'.*Did you mean"):
        SegmentationPrior(classes=["lipstik"])
