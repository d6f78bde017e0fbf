"""`attnguide evaluate`, against explanations and metrics put together by hand."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from tests.helpers.animals import CLASSES, COUNTS, SIDE, animals, painted, weights
from tests.helpers.pictures import picture

import attnguide as ag
from attnguide import models
from attnguide.cli.main import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights(tmp_path_factory.mktemp("weights") / "animals.safetensors", seed=4)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return animals(tmp_path / "data")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def found(*arguments: object) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def by_hand(checkpoint: Path, data: Path, name: str, cls: int, mask: torch.Tensor) -> dict[str, float]:
    loaded = models.embedded(checkpoint)
    images = torch.stack([loaded.read(path) for path in sorted((data / name).glob("*.png"))])
    shown = ag.explain(loaded.model, images, "grad_cam", [cls])
    witness = ag.explain(loaded.model, images, "input_gradient", [cls])
    return {
        "accuracy": float((shown.logits.argmax(dim=1) == cls).float().mean()),
        "energy": float(ag.metrics.energy_in_mask(shown.maps[:, 0], mask).mean()),
        "iou": float(ag.metrics.iou(shown.maps[:, 0], mask, threshold=0.3).mean()),
        "pointing": float(ag.metrics.pointing_game(shown.maps[:, 0], mask).mean()),
        "witness": float(ag.metrics.energy_in_mask(witness.maps[:, 0], mask).mean()),
        "area": float(mask.mean()),
    }


def test_one_mask_for_all(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    mask = painted(tmp_path / "mask.png", slice(4, 20), slice(8, 32))
    result = found(data, "--checkpoint", checkpoint, "--masks", mask, "--threshold", 0.3, "--batch-size", 2)
    truth = torch.zeros(SIDE, SIDE)
    truth[4:20, 8:32] = 1
    assert list(result["classes"]) == list(CLASSES)
    for cls, (name, count) in enumerate(COUNTS.items()):
        row = result["classes"][CLASSES[cls]]
        assert (row["images"], row["masks"]) == (count, count)
        assert {key: row[key] for key in row if key not in ("images", "masks")} == pytest.approx(
            by_hand(checkpoint, data, name, cls, truth), abs=1e-5
        )
    rows = list(result["classes"].values())
    assert result["mean of the classes"]["energy"] == pytest.approx(sum(row["energy"] for row in rows) / 3)
    right = sum(row["accuracy"] * row["images"] for row in rows)
    assert result["all"]["accuracy"] == pytest.approx(right / 9)
    assert result["worst class"]["accuracy"] == min(row["accuracy"] for row in rows)


def test_a_template_and_masks_of_single_images(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    painted(tmp_path / "template" / "fish.png", slice(0, 16), slice(0, 32))
    result = found(data, "--checkpoint", checkpoint, "--masks", tmp_path / "template")
    assert [row["masks"] for row in result["classes"].values()] == [0, 0, 2]
    assert result["classes"]["fish"]["area"] == pytest.approx(0.5)
    assert "energy" not in result["classes"]["cat"]
    painted(tmp_path / "single" / "cat1.png", slice(0, 8), slice(0, 32))
    painted(tmp_path / "single" / "big_dog" / "big_dog3.png", slice(0, 32), slice(0, 24))
    result = found(data, "--checkpoint", checkpoint, "--masks", tmp_path / "single")
    assert [row["masks"] for row in result["classes"].values()] == [1, 1, 0]
    assert result["classes"]["cat"]["area"] == pytest.approx(0.25)
    assert result["classes"]["Big dog"]["area"] == pytest.approx(0.75)


def test_a_mask_is_for_its_image_and_class_alone(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Images of two classes with one name; a mask that is broken; an accent that is written in two ways."""
    for folder, name in (("cat", "1"), ("big_dog", "1"), ("Fish", unicodedata.normalize("NFD", "é"))):
        picture(data / folder / f"{name}.png", 1, (SIDE, SIDE))
    masks = tmp_path / "masks"
    painted(masks / "cat" / "1.png", slice(0, 8), slice(0, 32))
    painted(masks / "Fish" / (unicodedata.normalize("NFC", "é") + ".png"), slice(0, 16), slice(0, 32))
    (masks / "._hidden.png").write_bytes(b"what a file system leaves behind")
    result = found(data, "--checkpoint", checkpoint, "--masks", masks)
    assert [row["masks"] for row in result["classes"].values()] == [1, 0, 1]
    assert result["classes"]["cat"]["area"] == pytest.approx(0.25)
    (masks / "big_dog").mkdir()
    (masks / "big_dog" / "1.png").write_bytes(b"no image")
    failing = call(data, "--checkpoint", checkpoint, "--masks", masks, "--json")
    assert failing.exit_code == 1
    result = json.loads(failing.stdout)
    assert [row["masks"] for row in result["classes"].values()] == [1, 0, 1]
    assert len(result["skipped"]) == 1


def test_hidden_files_are_no_templates(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    painted(tmp_path / "template" / "fish.png", slice(0, 16), slice(0, 32))
    (tmp_path / "template" / "._fish.png").write_bytes(b"what a file system leaves behind")
    result = found(data, "--checkpoint", checkpoint, "--masks", tmp_path / "template")
    assert result["all"]["masks"] == 2


def test_masks_of_which_none_fits_are_told(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    painted(tmp_path / "masks" / "zebra.png", slice(0, 8), slice(0, 32))
    result = call(data, "--checkpoint", checkpoint, "--masks", tmp_path / "masks")
    assert result.exit_code == 1
    assert "accuracy" in result.stdout
    assert "None of the 9 images has a mask in" in result.stderr


def test_masks_are_cropped_as_images_are(checkpoint: Path, tmp_path: Path) -> None:
    """Twice as wide as high: the middle is seen, which the mask covers by half."""
    for name in COUNTS:
        picture(tmp_path / "wide" / name / "a.png", 1, (64, 128))
    values = np.zeros((64, 128), dtype=np.uint8)
    values[:, :64] = 255
    Image.fromarray(values).save(tmp_path / "wide.png")
    result = found(tmp_path / "wide", "--checkpoint", checkpoint, "--masks", tmp_path / "wide.png")
    assert result["all"]["area"] == pytest.approx(0.5, abs=0.02)


def test_masks_in_one_palette(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Class 1 of a VOC palette is a region like any other; two classes in one file are not."""
    values = np.zeros((SIDE, SIDE), dtype=np.uint8)
    values[4:20, 8:32] = 1
    painted(tmp_path / "white.png", slice(4, 20), slice(8, 32))
    plain = found(data, "--checkpoint", checkpoint, "--masks", tmp_path / "white.png")

    def saved(name: str) -> Path:
        image = Image.fromarray(values, "L").convert("P")
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.save(tmp_path / name)
        return tmp_path / name

    palette = found(data, "--checkpoint", checkpoint, "--masks", saved("one.png"))
    assert palette["all"] == plain["all"]
    values[25:, 25:] = 2
    several = saved("several.png")
    result = call(data, "--checkpoint", checkpoint, "--masks", several)
    assert result.exit_code == 2
    assert "2 (#008000): 49" in result.stderr
    assert "--inside" in result.stderr
    assert found(data, "--checkpoint", checkpoint, "--masks", several, "--inside", "1")["all"] == plain["all"]
    (tmp_path / "legend.json").write_text('{"1": "cat", "#008000": "fish"}')
    result = found(data, "--checkpoint", checkpoint, "--masks", several)
    assert [row["masks"] for row in result["classes"].values()] == [3, 0, 2]
    assert result["classes"]["fish"]["area"] == pytest.approx(49 / SIDE**2)


def test_one_mask_is_not_for_two_images_of_one_name(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    for folder in ("cat", "big_dog"):
        picture(data / folder / "1.png", 1, (SIDE, SIDE))
    painted(tmp_path / "masks" / "1.png", slice(0, 8), slice(0, 32))
    result = call(data, "--checkpoint", checkpoint, "--masks", tmp_path / "masks")
    assert result.exit_code == 2
    assert "masks/1.png is the mask of" in result.stderr
    assert "cat/1.png" in result.stderr
    assert "big_dog/1.png" in result.stderr


def test_the_photographs_are_not_their_masks(checkpoint: Path, data: Path) -> None:
    result = call(data, "--checkpoint", checkpoint, "--masks", data)
    assert result.exit_code == 2
    assert "is the image itself" in result.stderr


def test_photographs_elsewhere_are_not_masks(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    for index in range(3):
        picture(tmp_path / "masks" / f"cat{index}.png", index, (SIDE, SIDE))
    result = call(data, "--checkpoint", checkpoint, "--masks", tmp_path / "masks", "--json")
    assert result.exit_code == 1
    assert result.stderr.count("looks like a photograph") == 3
    assert json.loads(result.stdout)["all"]["masks"] == 0


def test_a_mask_in_the_unrotated_frame(checkpoint: Path, tmp_path: Path) -> None:
    """The photograph is stored on its side, and so is its mask, which has no EXIF orientation."""
    data = animals(tmp_path / "data")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(data / "cat" / "a.png", 1, (40, 60))
    Image.open(data / "cat" / "a.png").save(data / "cat" / "a.jpg", exif=exif)
    (data / "cat" / "a.png").unlink()
    (tmp_path / "masks").mkdir()
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[:10, :20] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    result = call(data, "--checkpoint", checkpoint, "--masks", tmp_path / "masks", "--json")
    assert result.exit_code == 1
    assert "masks/a.png has 60×40 pixels, but" in result.stderr
    assert "cat/a.jpg has 40×60, upright" in result.stderr
    Image.fromarray(np.rot90(mask, -1).copy()).save(tmp_path / "masks" / "a.png")
    result = found(data, "--checkpoint", checkpoint, "--masks", tmp_path / "masks")
    assert result["all"]["masks"] == 1


def test_masks_without_a_pixel_inside_are_counted(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    painted(tmp_path / "masks" / "cat0.png", slice(0, 8), slice(0, 32))
    painted(tmp_path / "masks" / "cat1.png", slice(0, 0), slice(0, 0))
    result = call(data, "--checkpoint", checkpoint, "--masks", tmp_path / "masks", "--json")
    assert result.exit_code == 0
    assert "masks of 1 images have no pixel inside" in result.stderr
    assert json.loads(result.stdout)["all"]["masks"] == 1
    assert json.loads(result.stdout)["empty masks"] == [str(data / "cat" / "cat1.png")]
    result = call(data, "--checkpoint", checkpoint, "--masks", tmp_path / "masks", "--inside", "7")
    assert result.exit_code == 1
    assert "masks of 2 images" in result.stderr
    (tmp_path / "empty.png").write_bytes((tmp_path / "masks" / "cat1.png").read_bytes())
    assert call(data, "--checkpoint", checkpoint, "--masks", tmp_path / "empty.png").exit_code == 2
    assert call(data, "--checkpoint", checkpoint, "--inside", "7").exit_code == 2


def test_the_table_and_what_is_skipped(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    (data / "cat" / "broken.png").write_text("no image")
    mask = painted(tmp_path / "mask.png", slice(4, 20), slice(8, 32))
    result = call(data, "--checkpoint", checkpoint, "--masks", mask)
    assert result.exit_code == 1
    for text in ("Big dog", "energy in mask", "mean of the classes", "Worst class: "):
        assert text in result.stdout
    assert result.stderr.count("broken.png") == 1
    assert "energy" not in call(data, "--checkpoint", checkpoint).stdout


def test_classes_without_names_are_the_folders_in_order(data: Path, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), file)
    result = found(data, "--model", "test_resnet", "--checkpoint", file)
    assert list(result["classes"]) == ["Fish", "big_dog", "cat"]
    assert result["all"]["images"] == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--checkpoint", "CKPT"], "is not a folder"),
        (["DATA/cat", "--checkpoint", "CKPT"], "has no subfolder"),
        (["DATA", "--checkpoint", "CKPT", "--masks", "nothing.png"], "nothing.png does not exist"),
        (["DATA", "--checkpoint", "CKPT", "--source", "grad_kam"], "grad_cam"),
        (["DATA"], "needs a model that gives each image"),
        (
            ["DATA", "--model", "test_resnet", "--num-classes", "5"],
            "3 subfolders, but the model has 5 classes",
        ),
    ],
)
def test_bad_input(arguments: list[str], message: str, checkpoint: Path, data: Path) -> None:
    places = {"DATA": str(data), "CKPT": str(checkpoint)}
    given = [places.get(each, each.replace("DATA", str(data))) for each in arguments]
    result = call(*given)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_folder_that_is_no_class(checkpoint: Path, data: Path) -> None:
    picture(data / "horse" / "a.png")
    result = call(data, "--checkpoint", checkpoint)
    assert result.exit_code == 2
    assert "horse" in result.stderr


def test_a_class_whose_images_are_not_read_is_not_left_out(checkpoint: Path, data: Path) -> None:
    for path in (data / "cat").iterdir():
        path.rename(path.with_suffix(".heic"))
    result = call(data, "--checkpoint", checkpoint)
    assert result.exit_code == 2
    assert "images of formats that are not read" in result.stderr


def test_further_measures_need_no_mask(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    names = "deletion,insertion,road,confidence_change,sensitivity"
    result = found(data, "--checkpoint", checkpoint, "--metrics", names)
    loaded = models.embedded(checkpoint)
    images = torch.stack([loaded.read(path) for path in sorted((data / "cat").glob("*.png"))])
    cls = torch.zeros(len(images)).long()
    maps = ag.explain(loaded.model, images, "grad_cam", [0]).maps[:, 0]
    row = result["classes"]["cat"]
    assert row["masks"] == 0
    assert row["road"] == pytest.approx(
        float(ag.metrics.road(loaded.model, images, maps, cls).mean()), abs=1e-3
    )
    change = ag.metrics.confidence_change(loaded.model, images, maps, cls)
    assert row["confidence_change"] == pytest.approx(float(change.mean()), abs=1e-4)
    curves = ag.metrics.deletion(loaded.model, images, maps, cls)
    assert row["deletion"] == pytest.approx(float(torch.trapezoid(curves, dx=1 / 20).mean()), abs=1e-4)
    assert row["sensitivity"] >= 0
    shown = call(data, "--checkpoint", checkpoint, "--metrics", "road")
    assert "ROAD" in shown.output
    wrong = call(data, "--checkpoint", checkpoint, "--metrics", "roat")
    assert wrong.exit_code == 2
    assert "Did you mean 'road'" in wrong.output
