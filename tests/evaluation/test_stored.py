"""What is measured by stored maps is what is measured by maps that are made anew."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from tests.helpers.animals import animals, painted, weights
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


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two states of a network."""
    return weights(tmp_path / "before.safetensors", 4), weights(tmp_path / "after.safetensors", 8)


@pytest.fixture
def report(tmp_path: Path, pair: tuple[Path, Path], call: Call) -> Callable[..., tuple[str, Result]]:
    """Explains the animals with both, and writes a page of the maps; or of the models, as it did before."""
    painted(tmp_path / "square.png", slice(4, 20), slice(8, 32))
    stored = [tmp_path / f"maps-{checkpoint.stem}" for checkpoint in pair]
    for checkpoint, out in zip(pair, stored, strict=True):
        loaded = models.load(checkpoint=checkpoint)
        data = animals(tmp_path / "animals")
        ag.explain_dataset(data, out, model=loaded, targets="all", workers=0, progress=False)

    def written(*options: object, maps: bool = True, status: int = 0) -> tuple[str, Result]:
        page = tmp_path / "page.html"
        given = ["--before", pair[0], "--after", pair[1], "--masks", tmp_path / "square.png", "--out", page]
        given += ["--maps", *stored] if maps else []
        result = call("report", tmp_path / "animals", *given, *options, status=status)
        return (page.read_text() if page.exists() else ""), result

    return written


def test_a_report_of_stored_maps_is_that_of_the_models(report: Callable[..., tuple[str, Result]]) -> None:
    found, result = report("--threshold", 0.3)
    expected, live = report("--threshold", 0.3, maps=False)
    assert "gradient of the images" not in result.output
    stated = [line for line in live.stdout.splitlines() if "gradient" not in line]
    assert result.stdout.splitlines() == stated
    # The same images in the same order in each gallery, with the same pictures but for half precision.
    names = re.findall(r"<bdi>([^<]+)</bdi>", expected)
    assert names
    assert re.findall(r"<bdi>([^<]+)</bdi>", found) == names
    for one, other in zip(pictures(found), pictures(expected), strict=True):
        assert np.abs(one - other).mean() < 1
    assert "no longer there" not in found
    assert re.findall(r"<path d", found)


def pictures(page: str) -> list[np.ndarray]:
    sources = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each))), dtype=float) for each in sources]


def test_a_report_without_some_of_the_images(
    report: Callable[..., tuple[str, Result]], tmp_path: Path
) -> None:
    before, _ = report()
    (gone, *_) = re.findall(r"<bdi>([^<]+)</bdi>", before.partition("Predictions that became")[2])
    (tmp_path / "animals" / gone).unlink()
    page, result = report()
    assert f"1 of 9 images are no longer there, such as {tmp_path / 'animals' / gone};" in flat(result.stderr)
    assert "1 image no longer there" in page
    # Its prediction counts as before, its maps are shown alone, and it has no energy in the mask.
    accuracy = [line for line in result.stdout.splitlines() if line.startswith("accuracy")]
    assert accuracy == [line for line in report()[1].stdout.splitlines() if line.startswith("accuracy")]
    card = page.partition(f"<bdi>{gone}</bdi>")[2].partition("</article>")[0]
    assert "The image is no longer there: the maps alone." in card
    assert "energy in mask" not in card
    assert len(pictures(card)) == 2
    assert page.count("The image is no longer there") == 1
    assert "9 images, 8 of them with a mask" in page


def flat(text: str) -> str:
    return " ".join(text.split())


def test_maps_that_do_not_belong_to_the_models(
    report: Callable[..., tuple[str, Result]], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    swapped = ("--maps", tmp_path / "maps-after", tmp_path / "maps-before")
    page, result = report(*swapped, maps=False, status=2)
    assert not page
    assert "maps-after were made with" in flat(result.stderr)
    assert "with other weights" in flat(result.stderr)
    other = models.load(checkpoint=pair[1])
    ag.explain_dataset(
        tmp_path / "animals", tmp_path / "cam", model=other, targets="all", source="layer_cam", workers=0,
        progress=False,
    )  # fmt: skip
    _, result = report("--maps", tmp_path / "maps-before", tmp_path / "cam", maps=False, status=2)
    assert "source is 'grad_cam' and 'layer_cam'" in flat(result.stderr)
