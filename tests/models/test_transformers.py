"""Classifiers of transformers by name and from folders, in the commands too."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tests.helpers.pictures import picture
from tests.helpers.recipes import pictures

from attnguide import audit, models
from attnguide.data.images import read_image
from attnguide.errors import DataError, InputError
from attnguide.masks import read_mask

transformers = pytest.importorskip("transformers")


def vit(kind: str = "ViTForImageClassification", **settings: Any) -> Any:
    torch.manual_seed(3)
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, id2label={0: "cat, feline", 1: "dog", 2: "LABEL_2"}, **settings,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "vit"
    vit().save_pretrained(folder)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4] * 3)
    processor.save_pretrained(folder)
    return folder


def test_a_folder_comes_with_weights_names_and_preprocessing(folder: Path, tmp_path: Path) -> None:
    loaded = models.load(f"hf:{folder}")
    assert loaded.classes == ("cat", "dog", "class 2")
    assert (loaded.size, loaded.mean, loaded.std) == ((32, 32), (0.4,) * 3, (0.5,) * 3)
    assert loaded.weights == "pretrained"
    assert not loaded.model.training
    file = picture(tmp_path / "a.png")
    pixels = loaded.read(file)
    own = transformers.AutoImageProcessor.from_pretrained(folder)(read_image(file), return_tensors="pt")
    torch.testing.assert_close(pixels[None], own["pixel_values"])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(pixels[None]).logits, vit()(**own).logits)


def test_other_weights_and_other_classes(folder: Path, tmp_path: Path) -> None:
    trained = vit()
    torch.nn.init.normal_(trained.classifier.weight)
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    loaded = models.load(f"hf:{folder}", checkpoint=tmp_path / "w.pt")
    assert loaded.weights == "checkpoint"
    torch.testing.assert_close(loaded.model.classifier.weight, trained.classifier.weight)
    five = models.load(f"hf:{folder}", num_classes=5)
    assert len(five.classes) == five.model.classifier.out_features == 5
    torch.testing.assert_close(five.model.vit.embeddings.cls_token, trained.vit.embeddings.cls_token)


def test_the_configuration_says_multi_label(tmp_path: Path, folder: Path) -> None:
    vit(problem_type="multi_label_classification").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    assert models.load(f"hf:{tmp_path}").multi_label


def test_what_is_no_classifier_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder '\./nowhere'"):
        models.load("hf:./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no config.json"):
        models.load(f"hf:{tmp_path / 'empty'}")
    backbone = tmp_path / "backbone"
    vit("ViTModel").save_pretrained(backbone)
    (backbone / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    with pytest.raises(DataError, match=r"no weights for 'classifier.bias' and 1 more"):
        models.load(f"hf:{backbone}")
    text = tmp_path / "text"
    transformers.BertConfig(hidden_size=8, num_attention_heads=1, intermediate_size=8).save_pretrained(text)
    (text / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    with pytest.raises(InputError, match="bert model, for which transformers has no image classifier"):
        models.load(f"hf:{text}")
    broken = tmp_path / "broken"
    vit().save_pretrained(broken)
    (broken / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read as a classifier of transformers"):
        models.load(f"hf:{broken}")


@pytest.mark.parametrize("name", ["hf:nobody/nothing", "hf-hub:nobody/nothing"])
def test_without_a_network_it_is_one_quick_error(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(DataError, match=r"nobody/nothing can neither be downloaded nor found"):
        models.load(name)
    assert time.monotonic() - start < 20


def test_a_folder_of_timm(tmp_path: Path) -> None:
    model = timm.create_model("test_efficientnet", num_classes=7)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)  # type: ignore[attr-defined]
    loaded = models.load(f"local-dir:{tmp_path}")
    assert loaded.weights == "pretrained"
    assert len(loaded.classes) == 7
    torch.testing.assert_close(loaded.model.classifier.weight, model.classifier.weight)
    with pytest.raises(DataError, match=r"holds no config.json"):
        models.load(f"local-dir:{tmp_path / 'nowhere'}")


def resnet() -> Any:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1] * 4, layer_type="basic", num_labels=2
    )
    return transformers.ResNetForImageClassification(config)


@pytest.mark.parametrize("make", [vit, pytest.param(resnet, marks=pytest.mark.nightly)])
def test_a_training_and_what_comes_after_it(make: Any, folder: Path, tmp_path: Path, call: Any) -> None:
    pytest.importorskip("accelerate")
    pictures(tmp_path)
    make().save_pretrained(tmp_path / "own")
    (tmp_path / "own/preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    model, masks = ("--model", f"hf:{tmp_path / 'own'}"), ("--masks", tmp_path / "masks")
    options = ("--epochs", 1, "--device", "cpu", "--set", "train.tensorboard=false")
    for name, more in (("exchanged", ()), ("maps", ("--prior", "mask", "--weight", 1))):
        run = tmp_path / name
        call("train", "--data", tmp_path / "photos", *model, *masks, *options, *more, "--out", run)
        after = ("--checkpoint", run / "model.safetensors")
        assert "Worst class" in call("evaluate", tmp_path / "photos", *after, *masks).stdout
        assert "Worst class" in call("evaluate", tmp_path / "photos", *after, *masks, *model).stdout
    call("explain", tmp_path / "photos/red", *after, "--out", tmp_path / "shown")
    weights = ("--before", run / "start.safetensors", "--after", run / "model.safetensors")
    call("report", tmp_path / "photos", *weights, *masks, "--out", tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 1000
    loaded = models.load(checkpoint=run / "model.safetensors")
    files = sorted((tmp_path / "photos").rglob("*.png"))
    images = torch.stack([loaded.read(file) for file in files])
    regions = torch.stack([read_mask(tmp_path / "masks" / file.parent.name / file.name) for file in files])
    labels = torch.tensor([loaded.classes.index(file.parent.name) for file in files])
    with warnings.catch_warnings(record=True):
        assert str(audit(loaded.model, images, labels, regions)).startswith("24 pairs, 24 swaps")


def test_commands_take_them(folder: Path, tmp_path: Path, call: Any) -> None:
    for index, label in enumerate(["cat", "dog"]):
        (tmp_path / label).mkdir()
        picture(tmp_path / label / f"{index}.png")
    shown = call("layers", f"hf:{folder}", "--json")
    assert "layernorm_before" in json.dumps(json.loads(shown.output))
    call("explain", tmp_path / "cat", "--model", f"hf:{folder}", "--out", tmp_path / "out")
    assert any((tmp_path / "out").rglob("*.png"))
