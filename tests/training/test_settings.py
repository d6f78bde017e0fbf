"""Settings are read from three lines, and mistakes name the file and the setting."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from attnguide.errors import InputError, UnknownNameError
from attnguide.training import AugmentSettings, LoopSettings, Settings, method_of, read_settings


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


THREE = 'data = "photos"\nmodel = "resnet18"\nmasks = "masks"\n'


def test_three_lines_are_enough(tmp_path: Path) -> None:
    settings = read_settings(write(tmp_path, THREE))
    assert settings.data.path == tmp_path / "photos"
    assert settings.masks is not None
    assert settings.masks.path == tmp_path / "masks"
    assert (settings.model.name, settings.model.pretrained) == ("resnet18", "auto")
    assert settings.train == LoopSettings()
    method = method_of(settings)
    assert (method.kind, method.recipe, method.weight) == ("intervention", "right-for-real", 10.0)


def test_all_settings_go_through_a_file_and_back(tmp_path: Path) -> None:
    text = THREE + (
        'augment = "none"\n[guide]\nsource = { name = "hires_cam", relu = false }\nweight = "auto"\n'
        "[train]\nepochs = 3\nlearning_rate = 1\nweights = [0, 0.5]\n"
    )
    settings = read_settings(write(tmp_path, text))
    assert settings.augment == AugmentSettings(crop=1.0, flip=0.0)
    again = tmp_path / "elsewhere" / "all.toml"
    again.parent.mkdir()
    again.write_text(settings.as_toml())
    assert read_settings(again) == settings
    assert tomllib.loads(settings.as_toml())["train"]["weights"] == [0.0, 0.5]


def test_options_replace_what_a_file_says(tmp_path: Path) -> None:
    overrides = {"train.epochs": 2, "data.path": Path("other"), "masks": "m", "guide.prior": "boxes"}
    settings = read_settings(write(tmp_path, THREE), overrides)
    assert (settings.train.epochs, settings.data.path) == (2, Path("other"))
    assert settings.masks is not None
    assert settings.masks.path == Path("m")
    assert settings.guide == {"prior": "boxes"}


def test_a_recipe_by_name_brings_its_training() -> None:
    settings = read_settings("gradcam-iou", {"data": "d", "model": "m", "masks": "k", "train.batch_size": 5})
    assert (settings.train.epochs, settings.train.learning_rate, settings.train.batch_size) == (6, 1e-4, 5)
    assert method_of(settings).options["evidence"] == "decision"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data = ", "cannot be read as TOML"),
        ('model = "m"\n', "lacks data"),
        (THREE + "[trian]\n", "unknown table trian. Did you mean 'train'"),
        (THREE + "[train]\nepoch = 3\n", "unknown setting train.epoch. Did you mean 'epochs'"),
        (THREE + "[train]\nepochs = 0\n", "train.epochs = 0 must be a number of at least 1"),
        (THREE + "[train]\nepochs = 2.5\n", "train.epochs = 2.5 must be a whole number"),
        (THREE + "[train]\nlearning_rate = nan\n", "train.learning_rate = nan must be"),
        (THREE + '[train]\nselect = "best"\n', 'select = \'best\' must be "auto" or "last" or'),
        (THREE + "[augment]\ncrop = 2\n", "augment.crop = 2 must be a number from 0.01 to 1"),
        (THREE + 'augment = "strong"\n', "augment = 'strong' must be a table"),
        (THREE + "[guide]\nwieght = 1\n", "unknown setting 'wieght'. Did you mean 'weight'"),
        (THREE + "train = 3\n", "train = 3 must be a table"),
        ('data = { path = "" }\nmodel = "m"\n', "data.path = '' must be a path"),
        (
            'data = "d"\nmodel = { name = "m", freeze = "head" }\n',
            "freeze = 'head' must be a list or \"backbone\"",
        ),
    ],
)
def test_mistakes_name_file_and_setting(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_settings(write(tmp_path, text))
    assert message in str(caught.value)
    assert "mine.toml" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_settings(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"guide": {}, "intervention": {}}, "are two methods"),
        ({"recipe": "none", "guide": {"weight": 1}}, "leave out"),
        ({"recipe": "right-for-real", "guide": {"weight": 1}}, "is an intervention"),
        ({"recipe": "rrr", "intervention": {"weight": 1}}, "is a guide"),
        ({"guide": {"weight": -1}}, "guide.weight = -1 must be"),
        ({"guide": {"weight": "auto"}, "train": {"weights": [-1]}}, "train.weights"),
    ],
)
def test_methods_that_contradict(more: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        method_of(read_settings({"data": "d", "model": "m", "masks": "k", **more}))


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="mean 'right-for-real'"):
        read_settings("right-for-rael", {"data": "d", "model": "m"})


def test_weights_to_choose_from() -> None:
    def method(**more: object) -> tuple[float | None, tuple[float, ...]]:
        settings: Settings = read_settings({"data": "d", "model": "m", "masks": "k", **more})
        found = method_of(settings)
        return found.weight, found.weights

    assert method(intervention={"weight": "auto"}) == (None, (0.0, 0.1, 1.0, 10.0))
    assert method(recipe="right-for-real", intervention={"weight": "auto"}) == (None, (0.0, 1.0, 10.0, 100.0))
    assert method(guide={"weight": "auto"}, train={"weights": [3, 1]}) == (None, (1.0, 3.0))
    assert method(recipe="none") == (0.0, ())
