"""Recipes: settings of a method, read from a file or by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers.models import batch, cnn
from tests.helpers.parts import standard

import attnguide as ag
from attnguide.errors import AttnGuideError, InputError, PluginError, UnknownNameError
from attnguide.guiding.recipe import load_recipe

GOOD = """
about = "For the tests."

[guide]
source = { name = "hires_cam", relu = false }
prior = { name = "mask", empty = "skip" }
loss = "cosine"
weight = 0.25
layer = "block3"
targets = [0, 2]
evidence = "decision"
max_classes = 1

[train]
epochs = 3
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_file(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    recipe = load_recipe(file)
    assert (recipe.name, recipe.about, recipe.train) == ("mine", "For the tests.", {"epochs": 3})
    assert load_recipe(str(file)).guide.keys() == recipe.guide.keys()
    model = cnn().eval()
    guide = ag.Guide.from_recipe(model, file)
    (term,) = guide.terms
    assert repr(term.source) == "HiResCAM(relu=False)"
    assert (term.prior.empty, term.loss, term.weight) == ("skip", "cosine", 0.25)  # type: ignore[union-attr]
    assert (term.layer, term.targets, term.evidence) == ("block3", [0, 2], "decision")
    assert term.max_classes == 1
    images, labels, masks = batch()
    model(images)
    assert bool(guide.loss(labels, mask=masks).isfinite())
    assert ag.Guide.from_recipe(cnn(), file, weight=2.0, loss="mse").terms[0].weight == 2.0


def test_an_empty_file_has_the_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, ""))
    assert recipe.guide == recipe.train == {}
    assert vars(ag.Guide.from_recipe(cnn(), written(tmp_path, "")).terms[0]) == vars(ag.Term())


@pytest.mark.parametrize(
    ("text", "kind", "parts"),
    [
        ("[guide", InputError, "mine.toml cannot be read"),
        ("[gide]", InputError, "unknown table 'gide'.*mean 'guide'"),
        ("[guide]\nwieght = 1", InputError, "unknown setting 'wieght'.*mean 'weight'"),
        ("guide = 3", InputError, "3 must be a table"),
        ("train = 3", InputError, "train = 3 must be a table"),
        ("[guide]\nsource = 3", InputError, "source = 3 must be a name"),
        ("[guide]\nsource = { relu = false }", InputError, "has no name"),
        ('[guide]\nsource = { name = "gradcam" }', UnknownNameError, "mean 'grad_cam'"),
        ('[guide]\nsource = { name = "grad_cam", rlu = 1 }', PluginError, "source 'grad_cam'.*rlu"),
        ('[guide]\nprior = { name = "mask", empty = "no" }', InputError, "empty='no'"),
        ('[guide]\nloss = "iuo"', UnknownNameError, "loss 'iuo'"),
        ("[guide]\nweight = -1", InputError, "weight=-1"),
        ('[guide]\nlayer = "blck"', AttnGuideError, "no layer 'blck'"),
        ('[guide]\ntargets = ["nose"]', InputError, "targets"),
        ('[guide]\nevidence = "no"', InputError, "evidence='no'"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, kind: type[Exception], parts: str) -> None:
    with pytest.raises(kind, match=parts):
        ag.Guide.from_recipe(cnn(), written(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.toml cannot be read"):
        load_recipe(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary\.toml cannot be read"):
        load_recipe(tmp_path / "binary.toml")
    with pytest.raises(UnknownNameError, match="recipe 'no-such-recipe'"):
        load_recipe("no-such-recipe")


@pytest.mark.parametrize("name", standard("recipe"))
def test_every_registered_recipe_builds_a_guide(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.about
    torch.manual_seed(0)
    settings = {**recipe.guide, "layer": "auto"}
    with ag.Guide(cnn(), **settings) as guide:
        assert guide.terms


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "9" * 5000, "[guide]\nlayer = 3"])
def test_nesting_and_numbers_without_an_end(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(AttnGuideError):
        ag.Guide.from_recipe(cnn(), tmp_path / "mine.toml")


@pytest.mark.parametrize("value", ['"no"', "0", "{ a = 1 }"])
def test_a_switch_is_true_or_false(tmp_path: Path, value: str) -> None:
    (tmp_path / "mine.toml").write_text(f'[guide]\nsource = {{ name = "grad_cam", relu = {value} }}')
    with pytest.raises(InputError, match=r"source 'grad_cam': relu = .* must be true or false"):
        load_recipe(tmp_path / "mine.toml")


def test_an_intervention(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, '[intervention]\nweight = 2.0\npartners = "any"'))
    assert (recipe.intervention, recipe.guide) == ({"weight": 2.0, "partners": "any"}, {})
    with pytest.raises(InputError, match=r"unknown setting 'weigth'.*weight"):
        load_recipe(written(tmp_path, "[intervention]\nweigth = 2.0"))
    with pytest.raises(InputError, match="both tables"):
        load_recipe(written(tmp_path, "[intervention]\n[guide]"))
