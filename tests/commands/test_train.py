"""`attnguide train`: what it says, and what the other commands do with its files."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from PIL import Image
from tests.helpers.recipes import network, pictures, recipe

from attnguide.commands.train import _EXAMPLE
from attnguide.parts.hookspecs import Part
from attnguide.parts.registry import Owned, registry
from attnguide.training import read_settings

pytest.importorskip("accelerate")

QUICK = "[train]\nepochs = 2\nbatch_size = 8\nlearning_rate = 0.003\ntensorboard = false\n"


def test_without_arguments_it_explains_itself(call) -> None:
    text = call("train").stdout
    assert "Three lines are enough" in text
    assert "attnguide train photos.toml --out run" in text


def test_the_example_can_be_read(tmp_path: Path) -> None:
    lines = [
        line[2:] for line in _EXAMPLE.splitlines() if line.startswith("  ") and not line.startswith("  $")
    ]
    three = "\n".join(lines[:4])
    assert len(tomllib.loads(three)) == 3
    more = "\n".join(lines[4:])
    (tmp_path / "all.toml").write_text('masks = "masks"\n' + more.replace('recipe = "right-for-real"', ""))
    settings = read_settings(tmp_path / "all.toml")
    assert settings.train.precision == "bf16"


def test_a_run_and_what_comes_after_it(call, tmp_path: Path) -> None:
    path = recipe(tmp_path, QUICK)
    out = tmp_path / "run"
    done = call("train", path, "--out", out, "--device", "cpu")
    assert "epoch 1: loss" in done.stderr
    assert f"Weights: {out / 'model.safetensors'}, with λ = 10" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("What changed: attnguide"))
    measured = json.loads(
        call("evaluate", tmp_path / "photos", "--checkpoint", out / "model.safetensors", "--json").stdout
    )
    assert set(measured["classes"]) == {"blue", "red"}
    call(*line.removeprefix("What changed: attnguide ").split())
    assert (out / "report.html").exists()
    maps = tmp_path / "maps"
    image = tmp_path / "photos" / "red" / "0.png"
    call("explain", image, "--checkpoint", out / "model.safetensors", "--target", "red", "--out", maps)
    assert (maps / "0_red.png").exists()
    assert "holds a training already" in call("train", path, "--out", out, status=2).stderr
    result = json.loads(call("train", "--resume", "--out", out, "--device", "cpu", "--json").stdout)
    assert len(result["epochs"]) == 2


def test_options_alone(call, tmp_path: Path) -> None:
    pictures(tmp_path)
    options = (
        "--data",
        tmp_path / "photos",
        "--checkpoint",
        network(tmp_path),
        "--masks",
        tmp_path / "masks",
    )
    more = ("--epochs", 1, "--weight", 2, "--set", "train.optimizer=sgd", "--set", "train.tensorboard=false")
    out = tmp_path / "run"
    (tmp_path / "masks/red/11.png").unlink()
    done = call("train", *options, *more, "--complete", "--out", out, "--device", "cpu")
    assert "Masks: 23 images have one" in done.stderr
    settings = tomllib.loads((out / "recipe.toml").read_text())
    assert settings["train"]["optimizer"] == "sgd"
    assert settings["intervention"] == {"weight": 2.0}
    assert tomllib.loads((out / "recipe.toml").read_text())["train"]["epochs"] == 1


def test_a_prior_of_a_plugin(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    middle = Owned(Part("prior", "middle", "tests.helpers.recipes:Middle", "the middle"), "extra")
    monkeypatch.setitem(registry().parts, ("prior", "middle"), [middle])
    path = recipe(tmp_path, QUICK)
    text = path.read_text().replace('masks = "masks"\n', "")
    path.write_text(text)
    done = call(
        "train", path, "--prior", "middle", "--epochs", 1, "--out", tmp_path / "run", "--device", "cpu"
    )
    assert "energy in the masks" in done.stderr


def test_a_dry_run(call, tmp_path: Path) -> None:
    path = recipe(tmp_path, QUICK)
    done = call("train", path, "--out", tmp_path / "run", "--dry-run", "--device", "cpu")
    assert "20 images to train on, 4 to validate; classes: blue, red" in done.stdout
    assert " of 8 images with a mask get other surroundings; loss" in done.stdout
    done = call("train", path, "--prior", "mask", "--out", tmp_path / "run", "--dry-run", "--device", "cpu")
    assert "at block4; reaches" in done.stdout
    with Image.open(tmp_path / "run" / "dry-run.png") as picture:
        assert min(picture.size) > 200
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["dry-run.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos.toml"], "Give --out FOLDER"),
        (["absent.toml", "--out", "o"], "absent.toml cannot be read as TOML: No such file"),
        (["photos.toml", "--out", "o", "--weight", "much"], "--weight 'much' must be a number, or auto"),
        (["photos.toml", "--out", "o", "--set", "epochs"], "must be NAME=VALUE"),
        (
            ["photos.toml", "--out", "o", "--set", "train.epoch=3"],
            "photos.toml has an unknown setting train.epoch",
        ),
        (["photos.toml", "--out", "o", "--masks", "absent"], "absent does not exist"),
        (["photos.toml", "--out", "o", "--data", "absent"], "data.path = absent does not exist"),
        (["photos.toml", "--out", "o", "--model", "resnet81"], "unknown model 'resnet81'"),
        (["photos.toml", "--out", "o", "--prior", "mosk"], "unknown prior 'mosk'. Did you mean 'mask'"),
        (["gradcam-uoi", "--out", "o"], "unknown recipe 'gradcam-uoi'"),
        (["gradcam-iou", "--out", "o"], "lacks data"),
    ],
)
def test_mistakes(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    recipe(tmp_path, QUICK)
    monkeypatch.chdir(tmp_path)
    assert message in call("train", *arguments, "--device", "cpu", status=2).stderr.replace("\n", " ")
