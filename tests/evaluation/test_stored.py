"""What is measured by stored maps is what is measured by maps that are made anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from tests.helpers.pictures import picture

import attnguide as ag
from attnguide import models
from attnguide.errors import InputError
from attnguide.evaluation import evaluate_folder, evaluate_maps, mask_reader, single_label_images
from attnguide.models import LoadedModel

Call = Callable[..., Result]
CLASSES = ("cat", "dog", "fish")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for number, name in enumerate(CLASSES):
        for index in range(3):
            picture(tmp_path / "data" / name / f"{index}.png", 3 * number + index)
    return tmp_path / "data"


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    values = np.zeros((50, 40), dtype=np.uint8)
    values[10:40, 5:50] = 255
    Image.fromarray(values).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return models.load("resnet10t", num_classes=3, class_names=CLASSES)


def test_stored_maps_give_the_same_numbers(
    data: Path, masks: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    ag.explain_dataset(data, tmp_path / "maps", model=loaded, targets="all", workers=0, progress=False)
    _, images = single_label_images(loaded, data)
    reader = mask_reader(masks, loaded.classes)
    expected = evaluate_folder(loaded, images, reader)
    found = evaluate_maps(ag.read_maps(tmp_path / "maps"), loaded, images, reader)
    assert not found.failures
    for name in CLASSES:
        summary = expected.classes[name].summary()
        summary.pop("witness")  # not stored
        assert found.classes[name].summary() == pytest.approx(summary, abs=2e-3)
    (data / "cat" / "0.png").rename(data / "cat" / "new.png")
    _, images = single_label_images(loaded, data)
    late = evaluate_maps(ag.read_maps(tmp_path / "maps"), loaded, images, reader)
    assert [path.name for path in late.failures] == ["new.png"]


def test_maps_that_are_not_enough(data: Path, masks: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    settings = {"workers": 0, "progress": False}
    ag.explain_dataset(data, tmp_path / "few", model=loaded, **settings)
    with pytest.raises(InputError, match="Make them with --target all"):
        evaluate_maps(ag.read_maps(tmp_path / "few"), loaded, [], mask_reader(masks, CLASSES))
    ag.explain_dataset(data, tmp_path / "all", model=loaded, targets="all", **settings)
    other = models.load("resnet10t", num_classes=3, class_names=CLASSES)
    other.model.get_submodule("fc").weight.data += 1
    with pytest.raises(InputError, match="other weights or preprocessing"):
        evaluate_maps(ag.read_maps(tmp_path / "all"), other, [], mask_reader(masks, CLASSES))


def test_the_command(data: Path, masks: Path, call: Call, tmp_path: Path) -> None:
    model = ("--model", "resnet10t", "--num-classes", 3)
    call(
        "explain",
        data,
        *model,
        "--format",
        "parquet",
        "--target",
        "all",
        "--out",
        tmp_path / "m",
        "--workers",
        0,
    )
    result = call("evaluate", data, *model, "--masks", masks, "--maps", tmp_path / "m")
    assert "energy in mask" in result.output
    assert "input gradient" not in result.output
    refused = call("evaluate", data, *model, "--maps", tmp_path / "m", "--metrics", "road", status=2)
    assert "--metrics runs the model, which --maps does not" in refused.output
