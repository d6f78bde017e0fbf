"""The prior `action_units`: what is drawn for whom, and what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.models import cnn
from torch import Tensor
from torchvision.transforms import v2

import attnguide as ag
from attnguide.data.procedural.faces import EXPRESSIONS, ProceduralFaces
from attnguide.errors import InputError, UnknownNameError
from attnguide.models.networks import small_cnn
from attnguide_action_units.codebook import default
from attnguide_action_units.evaluation import evaluate
from attnguide_action_units.landmarks import FaceLandmarks
from attnguide_action_units.prior import CLASSES, ActionUnitPrior

FACES = ProceduralFaces(12, 64, seed=3).stack()
POINTS = FACES.landmarks.as_subclass(Tensor)


def weights_of(landmarks: Any, labels: Tensor = FACES.expression, **options: Any) -> list[float]:
    return ActionUnitPrior(**options).draw(landmarks, labels, (16, 16), (64, 64)).weights.tolist()


def test_the_recipe_guides() -> None:
    assert EXPRESSIONS == CLASSES
    model = cnn(7)
    with ag.Guide.from_recipe(model, "au-codebook") as guide:
        model(FACES.image)
        loss = guide.loss(FACES.expression, landmarks=FACES.landmarks)
        loss.backward()
        (record,) = guide.records()
    assert guide.terms[0].weight == 9
    torch.testing.assert_close(loss.detach(), 9 * record.losses.mean())
    present = FACES.expression[record.pairs.sample]
    assert torch.equal(record.pairs.cls, present)
    assert not bool((present == 0).any())  # neutral faces are not guided
    assert len(present) == int((FACES.expression != 0).sum())
    drawn = ActionUnitPrior().draw(FACES.landmarks, FACES.expression, (8, 8), (64, 64))
    torch.testing.assert_close(record.prior, drawn.maps[record.pairs.sample])
    assert sum(w.grad is not None and bool(w.grad.any()) for w in model.parameters()) > 4
    assert not list(guide.parameters())


def test_who_drops_out() -> None:
    happy = torch.ones(4, dtype=torch.long)
    points = POINTS[:4].clone()
    assert weights_of(points, happy) == [1, 1, 1, 1]
    assert weights_of(points, torch.tensor([0, 1, 0, 2])) == [0, 1, 0, 1]
    assert weights_of([points[0], None, points[2], None], happy) == [1, 0, 1, 0]
    assert weights_of(None, happy) == [0, 0, 0, 0]
    points[1], points[2] = torch.nan, -1
    points[3] += 1000
    assert weights_of(points, happy) == [1, 0, 0, 0]
    # Only landmarks that the map hangs on matter: the jaw does not for happiness, but does for fear.
    points = POINTS[:1].clone()
    points[0, 4] = torch.tensor([-5.0, 40.0])
    assert weights_of(points, happy[:1]) == [1]
    assert weights_of(points, torch.tensor([4])) == [0]


def test_units_and_generic_maps() -> None:
    labels = torch.tensor([0, 5])
    generic = ActionUnitPrior(generic=True).draw(POINTS[:2], labels, (32, 32), (64, 64))
    assert generic.weights.tolist() == [1, 1]
    parts = [
        ActionUnitPrior(units=[number]).draw(POINTS[:2], labels, (64, 64), (64, 64)).maps
        for number in default().units
    ]
    whole = ActionUnitPrior(generic=True).draw(POINTS[:2], labels, (64, 64), (64, 64)).maps
    torch.testing.assert_close(whole, torch.stack(parts).amax(dim=0), atol=0.02, rtol=0)
    # Neither needs to know the classes of the model.
    model = cnn(4)
    with ag.Guide(model, source="layer_attention", prior=ActionUnitPrior(generic=True)) as guide:
        model(FACES.image)
        assert bool(guide.loss(FACES.expression % 4, landmarks=FACES.landmarks) > 0)


def test_other_numbers_of_points_are_understood() -> None:
    five = torch.stack(
        [POINTS[:, 36:42].mean(1), POINTS[:, 42:48].mean(1), POINTS[:, 30], POINTS[:, 48], POINTS[:, 54]], 1
    )
    exact = ActionUnitPrior().draw(POINTS, FACES.expression, (16, 16), (64, 64))
    rough = ActionUnitPrior().draw(five, FACES.expression, (16, 16), (64, 64))
    assert torch.equal(exact.weights, rough.weights)
    alike = torch.nn.functional.cosine_similarity(exact.maps.flatten(1), rough.maps.flatten(1))
    assert float(alike[exact.weights > 0].mean()) > 0.8


def test_a_flip_of_image_and_landmarks_flips_the_map() -> None:
    landmarks = FaceLandmarks(POINTS, canvas_size=(64, 64))
    flipped = v2.functional.horizontal_flip(landmarks)
    prior = ActionUnitPrior()
    plain = prior.draw(landmarks, FACES.expression, (32, 32), (64, 64)).maps
    mirrored = prior.draw(flipped, FACES.expression, (32, 32), (64, 64)).maps
    torch.testing.assert_close(mirrored, plain.flip(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("landmarks", "match"),
    [
        (POINTS[:, :67], "67 landmarks belong to none of the known schemes"),
        (POINTS[:5], "landmarks have 5 entries, the batch has 12 samples"),
        (POINTS[:, :, 0], "landmarks"),
        ("points.npz", "must be a tensor, an array or a list, got str"),
        (POINTS.flip(2), "sample 0 is mirrored.*x and y may be swapped"),
        (POINTS * torch.tensor([-1.0, 1.0]) + 64, "is mirrored.*FaceLandmarks"),
        (POINTS.index_fill(1, torch.tensor([7]), torch.nan), r"landmark 7 of sample 0 is \[nan, nan\]"),
        (POINTS.index_fill(1, torch.tensor([7]), torch.inf), r"landmark 7 of sample 0 is \[inf, inf\]"),
        (POINTS * 0 + 5, "less than two pixels wide"),
        (POINTS / 64, "less than two pixels wide.*not shares of the image"),
    ],
)
def test_bad_landmarks(landmarks: Any, match: str) -> None:
    model = cnn(7)
    with ag.Guide.from_recipe(model, "au-codebook") as guide:
        model(FACES.image)
        with pytest.raises(InputError, match=match):
            guide.loss(FACES.expression, landmarks=landmarks)


def test_bad_settings() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown expression 'joy'.*happiness"):
        ActionUnitPrior(classes=["joy"])
    with pytest.raises(UnknownNameError, match=r"unknown action unit '3'"):
        ActionUnitPrior(units=[3])
    for wrong in ({"classes": []}, {"classes": "fear"}, {"units": []}, {"units": [1], "generic": True}):
        with pytest.raises(InputError):
            ActionUnitPrior(**wrong)  # type: ignore[arg-type]
    model = cnn(8)
    with ag.Guide.from_recipe(model, "au-codebook") as guide:
        model(FACES.image)
        with pytest.raises(InputError, match=r"8 classes, the prior knows the expressions of 7: neutral, .*"):
            guide.loss(FACES.expression, landmarks=FACES.landmarks)
    silent = ActionUnitPrior(classes=["neutral", "neutral"])
    assert silent.draw(POINTS, FACES.expression % 2, (8, 8), (64, 64)).weights.sum() == 0


def test_a_prior_can_be_copied() -> None:
    prior = ActionUnitPrior()
    expected = prior.draw(POINTS, FACES.expression, (8, 8), (64, 64)).maps
    for twin in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):
        assert torch.equal(twin.draw(POINTS, FACES.expression, (8, 8), (64, 64)).maps, expected)
        assert repr(twin) == repr(prior)


def test_values_on_an_accelerator_are_not_waited_for() -> None:
    points = POINTS.to("meta")
    maps, weights = ActionUnitPrior().draw(points, FACES.expression.to("meta"), (8, 8), (64, 64))
    assert maps.device.type == weights.device.type == "meta"
    assert maps.shape == (12, 8, 8)


def test_evaluation_is_the_mean_cosine() -> None:
    model = cnn(7).eval()
    prior = ActionUnitPrior()
    batches = [
        (FACES.image[:5], FACES.expression[:5], POINTS[:5]),
        (FACES.image[5:], FACES.expression[5:], POINTS[5:]),
    ]
    report = evaluate(model, batches, prior, layers=["block3", "block4"], cams=["grad_cam"])
    seen = ag.explain(model, FACES.image, "grad_cam", "labels", "block4", size=None, labels=FACES.expression)
    maps, weights = prior.draw(POINTS, FACES.expression, seen.maps.shape[-2:], (64, 64))
    cosines = torch.nn.functional.cosine_similarity(seen.maps[:, 0].flatten(1), maps.flatten(1))
    assert report.cams["grad_cam"] == pytest.approx(float(cosines[weights > 0].mean()), abs=1e-5)
    assert list(report.attention) == ["block3", "block4"]
    assert (report.samples, report.compared) == (12, int((weights > 0).sum()))
    assert report.accuracy == pytest.approx(float((seen.logits.argmax(1) == FACES.expression).float().mean()))
    assert "CAM-COS grad_cam" in str(report)
    with pytest.raises(InputError, match="no batches"):
        evaluate(model, [], prior)


def test_a_face_too_small_to_be_drawn_drops_out() -> None:
    prior = ActionUnitPrior()
    small = POINTS[:1] / 8 + 200
    assert prior.draw(small, torch.tensor([1]), (4, 4), (2000, 2000)).weights.tolist() == [0]
    assert prior.draw(POINTS[:1], torch.tensor([1]), (4, 4), (64, 64)).weights.tolist() == [1]


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (torch.tensor([7]), "label 7 of sample 0 is none of the 7 classes"),
        (torch.tensor([-1]), "label -1 of sample 0"),
        (torch.tensor([1.0]), "must be indices of classes"),
        (torch.zeros(1, 7).long(), r"got \(1, 7\) of torch.int64"),
        ("happiness", "integers, got str"),
        (None, "integers, got NoneType"),
    ],
)
def test_bad_labels_to_draw(labels: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        ActionUnitPrior().draw(POINTS[:1], labels, (8, 8), (64, 64))


def test_labels_that_need_not_be_there() -> None:
    maps, weights = ActionUnitPrior(generic=True).draw(POINTS[:2], None, (8, 8), (64, 64))
    assert maps.shape == (2, 8, 8)
    assert weights.tolist() == [1, 1]
    drawn = ActionUnitPrior().draw(POINTS[:3], [1, -100, 0], (8, 8), (64, 64))
    assert drawn.weights.tolist() == [1, 0, 0]
    assert ActionUnitPrior().draw([], [], (8, 8), (64, 64)).maps.shape == (0, 8, 8)


def test_a_class_without_action_units_and_a_codebook_from_a_file(tmp_path: Path) -> None:
    prior = ActionUnitPrior(classes=[*CLASSES, None])
    assert prior.draw(POINTS[:2], [7, 1], (8, 8), (64, 64)).weights.tolist() == [0, 1]
    file = tmp_path / "mine.toml"
    file.write_text("""[expressions]
doubt = [14]
[[unit]]
number = 14
name = "dimpler"
regions = [{ at = [48], radii = [0.2, 0.2] }]
""")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[guide]\nsource = 'layer_attention'\nloss = 'cosine'\n"
        f"prior = {{ name = 'action_units', codebook = '{file}', classes = ['doubt'] }}\n"
    )
    with ag.Guide.from_recipe(small_cnn(1), recipe) as guide:
        assert guide.terms[0].prior.codebook.units[14].name == "dimpler"


def test_autocast_does_not_change_a_map() -> None:
    prior = ActionUnitPrior()
    labels = torch.arange(7)
    expected = prior.draw(POINTS[:7], labels, (28, 28), (64, 64)).maps
    with torch.autocast("cpu", torch.bfloat16):
        found = prior.draw(POINTS[:7], labels, (28, 28), (64, 64)).maps
    assert torch.equal(found, expected)


def drawn_weights(landmarks: Any, prior: ActionUnitPrior | None = None) -> list[float]:
    prior = prior or ActionUnitPrior(generic=True)
    return prior.draw(landmarks, None, (16, 16), (64, 64)).weights.tolist()


@pytest.mark.parametrize("factor", [2.5, 8.0])
@pytest.mark.parametrize("faces", [slice(0, 12), slice(0, 2)])
def test_landmarks_in_pixels_of_larger_originals(factor: float, faces: slice) -> None:
    points = POINTS[faces]
    high = points.flatten(0, 1).amax(dim=0) * factor
    message = rf"outside of the images, in all {len(points)} faces: x from .* to {float(high[0]):.4g}, y from"
    with pytest.raises(InputError, match=message + r".*64×64 pixels.*scaled"):
        drawn_weights(points * factor)
    model = cnn(7)
    with ag.Guide.from_recipe(model, "au-codebook") as guide:
        model(FACES.image[faces])
        with pytest.raises(InputError, match=message):
            guide.loss(FACES.expression[faces], landmarks=points * factor)


def test_one_face_of_a_larger_original() -> None:
    with pytest.raises(InputError, match="in all 1 faces"):
        drawn_weights(POINTS[:1] * 4)


def test_faces_that_reach_beyond_the_right_and_lower_edge() -> None:
    prior = ActionUnitPrior(generic=True)
    with pytest.warns(UserWarning, match=r"12 of 12 faces reach beyond.*64×64 pixels.*left out.*scaled"):
        drawn_weights(POINTS * 1.5, prior)
    drawn_weights(POINTS * 1.5, prior)  # once


def test_faces_at_the_border_are_fine() -> None:
    points = POINTS.clone()
    points[:, 16, 0] = 65.5  # the end of the jaw is a little outside
    assert weights_of(points) == weights_of(POINTS)
    cropped = POINTS.clone()
    cropped[:6] += 40  # cut by random crops, on all sides
    cropped[6:] -= 40
    assert drawn_weights(cropped) == [0] * 12


def test_landmarks_that_know_the_size_of_their_images() -> None:
    points = FaceLandmarks(POINTS, canvas_size=(64, 64))
    assert drawn_weights(points) == [1] * 12
    large = FaceLandmarks(POINTS, canvas_size=(96, 80))
    mixed = [*POINTS[:11], FaceLandmarks(POINTS[11], canvas_size=(96, 80))]
    for landmarks in (large, mixed):
        with pytest.raises(InputError, match="pixels of 80×96 images, the model sees 64×64"):
            drawn_weights(landmarks)
