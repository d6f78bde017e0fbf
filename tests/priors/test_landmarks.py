"""Gaussians at points, and parts of a face, against formulas by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.helpers.models import batch, cnn
from torch import Tensor

import attnguide as ag
from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.errors import InputError
from attnguide.functional import resize
from attnguide.masks import face_parts
from attnguide.priors import LandmarkPrior

IMAGES, LABELS, _ = batch()


def record(prior: LandmarkPrior, landmarks: Any) -> Any:
    model = cnn().eval()
    with ag.Guide(model, source="grad_cam", prior=prior, layer="block2") as guide:
        model(IMAGES)
        guide.loss(LABELS, landmarks=landmarks)
        return guide.records()[0]


def test_gaussians_are_those_of_the_formula() -> None:
    points = torch.tensor([[[8.0, 4.0], [20.0, 30.0]]] * 4)
    found = record(LandmarkPrior(sigma=0.1), points).prior
    side = found.shape[-1]
    centers = (torch.arange(side) + 0.5) * 32 / side
    sigma = 3.2
    expected = torch.zeros(side, side)
    for x, y in points[0].tolist():
        for row in range(side):
            for column in range(side):
                distance = (centers[column] - x) ** 2 + (centers[row] - y) ** 2
                value = torch.exp(-distance / (2 * sigma**2))
                expected[row, column] = torch.maximum(expected[row, column], value)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


def test_parts_of_a_face_are_those_of_face_parts() -> None:
    landmarks = ProceduralFaces(4, size=32).stack().landmarks.as_subclass(Tensor)
    found = record(LandmarkPrior(parts=["mouth", "nose"]), landmarks).prior
    masks = face_parts(landmarks, (32, 32))
    torch.testing.assert_close(
        found, resize(masks[:, [3, 4]].amax(dim=1), (found.shape[-2], found.shape[-1]))
    )


def test_samples_without_a_point_in_the_image_drop_out() -> None:
    nan = float("nan")
    listed = [None, [[nan, nan], [-1, -1]], [[40.0, 3.0]], [[3.0, 3.0], [nan, nan]]]
    assert record(LandmarkPrior(), listed).pairs.sample.tolist() == [3]
    assert len(record(LandmarkPrior(), None).pairs) == 0


def test_chosen_points() -> None:
    points = torch.tensor([[[8.0, 4.0], [20.0, 30.0]]] * 4)
    torch.testing.assert_close(
        record(LandmarkPrior(points=[1]), points).prior, record(LandmarkPrior(), points[:, 1:]).prior
    )


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"sigma": 0}, "sigma=0"),
        ({"points": []}, "points="),
        ({"parts": ["mouht"]}, "Did you mean 'mouth'"),
        ({"parts": "nose", "points": [1]}, "exclude"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        LandmarkPrior(**settings)


@pytest.mark.parametrize(
    ("landmarks", "settings", "what"),
    [
        (torch.zeros(3, 2, 2), {}, "got 3"),
        (torch.zeros(4, 2, 3), {}, r"give \(P, 2\)"),
        ([[[float("inf"), 1.0]]] * 4, {}, "infinite"),
        ([[[float("nan"), 1.0]]] * 4, {}, "half missing"),
        (torch.ones(4, 5, 2), {"parts": ["nose"]}, "need 68"),
        (torch.ones(4, 5, 2), {"points": [5]}, "counted from 0"),
        ("points", {}, "an entry for each"),
    ],
)
def test_landmarks_that_do_not_fit(landmarks: Any, settings: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        record(LandmarkPrior(**settings), landmarks)
