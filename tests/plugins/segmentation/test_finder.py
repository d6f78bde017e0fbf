"""Regions by parser, by landmarks, by file; and the parser that says what it does not know."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tests.helpers.models import cnn
from tests.helpers.real_data import RealData
from torch import Tensor

import attnguide as ag
from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.errors import AttnGuideError
from attnguide_segmentation.adapted import attach
from attnguide_segmentation.finder import RegionFinder
from attnguide_segmentation.parser import Parser, load_parser, save_parser
from attnguide_segmentation.parsing import ParsingNetwork
from attnguide_segmentation.prior import SegmentationPrior
from attnguide_segmentation.regions import REGIONS, around_landmarks, merged

FACES = ProceduralFaces(4, 96, seed=21).stack()
IMAGES = FACES.image.as_subclass(Tensor)
POINTS = FACES.landmarks.as_subclass(Tensor)


def inside(masks: Tensor, name: str) -> Tensor:
    return masks[:, REGIONS.index(name)] > 0


# --------------------------------------------------------------------- landmarks


def test_regions_around_landmarks_are_where_the_face_is_drawn() -> None:
    masks = around_landmarks(POINTS, (96, 96))
    assert masks.shape == (4, 7, 96, 96)
    truth = merged(FACES.segmentation.as_subclass(Tensor))
    for name in ("eyes", "eyebrows", "mouth", "nose"):
        found, drawn = inside(masks, name), truth == REGIONS.index(name)
        assert (found & drawn).sum() > 0.7 * drawn.sum(), name
    assert not inside(masks, "hair").any()
    assert not (inside(masks, "face_skin") & inside(masks, "mouth")).any()
    whole = masks[:, [REGIONS.index(name) for name in ("background", "face_skin")]].sum(dim=1)
    assert bool(((whole == 1) | (masks[:, 3:].amax(dim=1) == 1)).all())
    assert not around_landmarks([None, POINTS[0]], (96, 96))[0].any()


def test_adapters_use_landmarks_by_name() -> None:
    model = cnn(5).eval()
    with attach(model, IMAGES, "ssp", "ssg", regions="landmarks") as adapted:
        with pytest.raises(AttnGuideError, match=r"no landmarks were given for this forward pass"):
            model(IMAGES)
        adapted.finder.give(landmarks=POINTS)
        by_landmarks = model(IMAGES)
        adapted.finder.give(around_landmarks(POINTS, (96, 96)))
        torch.testing.assert_close(model(IMAGES.clone()), by_landmarks)
        with pytest.raises(AttnGuideError, match="no landmarks were given"):
            model(IMAGES.clone())  # those of the last pass are not kept
        adapted.finder.give(landmarks=POINTS[:2])
        with pytest.raises(AttnGuideError, match="given for 2 images, the model was called with 4"):
            model(IMAGES.clone())


def test_the_prior_uses_landmarks_by_name() -> None:
    classes = ("lipstick", "black_hair", "eyeglasses")
    points = [POINTS[0], None, POINTS[2], POINTS[3]]
    prior = SegmentationPrior(classes=classes, parser="landmarks")
    model = cnn(3)
    with ag.Guide(model, prior=prior) as guide:
        model(IMAGES)
        guide.loss(torch.ones(4, 3), landmarks=points)
        (record,) = guide.records()
        model(IMAGES)
        with pytest.raises(AttnGuideError, match=r"needs landmarks: guide\.loss\(labels, landmarks=…\)"):
            guide.loss(torch.ones(4, 3))
        model(IMAGES)
        with pytest.raises(AttnGuideError, match="landmarks have 3 entries, the batch has 4"):
            guide.loss(torch.ones(4, 3), landmarks=points[:3])
    pairs = list(zip(record.pairs.sample.tolist(), record.pairs.cls.tolist(), strict=True))
    # Hair has no landmarks, and the second face has none at all.
    assert pairs == [(0, 0), (0, 2), (2, 0), (2, 2), (3, 0), (3, 2)]
    height = record.prior.shape[-1]
    rows = torch.arange(height, dtype=torch.float32)[:, None] + 0.5
    lips, eyes = ((record.prior[n] * rows).sum() / record.prior[n].sum() * 96 / height for n in (0, 1))
    assert float(lips) == pytest.approx(float(POINTS[0, 48:60, 1].mean()), abs=96 / height)
    assert float(eyes) == pytest.approx(float(POINTS[0, 36:48, 1].mean()), abs=96 / height)


def test_landmarks_of_a_larger_original() -> None:
    finder = RegionFinder("landmarks")
    finder.give(landmarks=POINTS * 8)
    with pytest.warns(UserWarning, match="all 4 faces lie outside their images, of 96 rows and 96 columns"):
        finder(IMAGES)
    moved = POINTS.clone()
    moved[1:] += 200  # cropped away: these say nothing
    finder.give(landmarks=moved)
    assert finder(IMAGES.clone()).flatten(1).any(dim=1).tolist() == [True, False, False, False]


# --------------------------------------------------------------- names and files


def test_finders_by_name_and_by_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = Parser(ParsingNetwork(4), size=32)
    save_parser(tmp_path / "own.safetensors", own)
    expected = load_parser(tmp_path / "own.safetensors")(IMAGES)
    for file in (tmp_path / "own.safetensors", str(tmp_path / "own.safetensors")):
        torch.testing.assert_close(RegionFinder(file)(IMAGES.clone()), expected)
    torch.testing.assert_close(RegionFinder("face_parser")(IMAGES), RegionFinder()(IMAGES))
    with pytest.raises(AttnGuideError, match=r"landmark'.*[Dd]id you mean 'landmarks'"):
        RegionFinder("landmark")
    with pytest.raises(AttnGuideError, match="does not exist"):
        SegmentationPrior(parser=tmp_path / "none.safetensors")
    with pytest.raises(AttnGuideError, match="landmarks give 7 regions, 16 are needed"):
        attach(cnn(5), IMAGES, "boxes", regions="landmarks")
    with pytest.raises(AttnGuideError, match="either regions or landmarks"):
        RegionFinder().give()
    kept = pickle.loads(pickle.dumps(RegionFinder("landmarks")))
    assert kept.by_landmarks


# ------------------------------------------- what the embedded parser does not know


def quiet(parser: Parser, images: Tensor) -> bool:
    """Whether the parser has nothing to say about these images."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        parser(images)
    return not seen


def test_the_embedded_parser_is_sure_of_drawn_faces() -> None:
    hard = ProceduralFaces(48, 96, seed=31, pose=2.0, clutter=1.0, noise=0.12).stack().image
    plain = ProceduralFaces(48, 96, seed=32).stack().image
    for images in (hard.as_subclass(Tensor), plain.as_subclass(Tensor)):
        assert all(quiet(load_parser(), part) for part in images.split(4))
    assert sum(quiet(load_parser(), one) for one in plain.as_subclass(Tensor).split(1)) == 48


def test_it_says_once_that_it_is_unsure() -> None:
    parser = load_parser()
    blots = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    strange = F.interpolate(blots, size=96, mode="bicubic")
    with pytest.warns(UserWarning, match=r"drawn faces only, and its regions in 4 of 4 images are probably"):
        parser(strange)
    assert quiet(parser, strange)
    assert quiet(Parser(parser.network, size=96), strange)  # another parser may know such images


def test_it_is_unsure_of_photographs(real_data: RealData) -> None:
    with np.load(real_data.path("fer_faces/fer_faces.npz"), allow_pickle=False) as table:
        files = [str(name) for name in table["files"][np.abs(table["yaw"]) < 0.4]][::20]
    faces = torch.stack([read(real_data.path("fer_faces/images") / Path(name).name) for name in files])
    unsure = [not quiet(load_parser(), one) for one in faces.split(1)]
    assert np.mean(unsure) > 0.95
    assert not any(quiet(load_parser(), part) for part in faces.split(8))
    document = json.loads(real_data.path("dlib_faces/dlib_faces.json").read_text(encoding="utf-8"))
    scenes = [read(real_data.path(f"dlib_faces/{entry['file']}"))[None] for entry in document["images"]]
    assert sum(not quiet(load_parser(), scene) for scene in scenes) >= len(scenes) - 2


def read(path: Path) -> Tensor:
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
