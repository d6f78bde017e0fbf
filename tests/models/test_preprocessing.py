"""How images become the input of a model: of timm, torchvision and transformers, and by a given transform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torchvision.models import ResNet18_Weights
from torchvision.transforms import Compose, Normalize, ToTensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from attnguide.errors import DataError, InputError
from attnguide.models import load, preprocessing_of

PHOTO = Image.effect_noise((90, 70), 80).convert("RGB")


def test_models_of_timm_say_how_they_want_their_images() -> None:
    model = timm.create_model("resnet10t", num_classes=3)
    found = preprocessing_of(model)
    expected: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    images, names = found.read(PHOTO)
    torch.testing.assert_close(images[0], expected(PHOTO))
    assert names == ("image0",)
    assert found.mean == tuple(model.pretrained_cfg["mean"])
    assert found.class_names == ()  # three classes are not ImageNet's
    assert preprocessing_of(timm.create_model("resnet10t")).class_names[282] == "tiger cat"


def test_a_loaded_model_knows_everything() -> None:
    loaded = load()
    found = preprocessing_of(loaded)
    torch.testing.assert_close(found.read([PHOTO])[0][0], loaded.transform(PHOTO))
    assert (found.mean, found.std, found.class_names) == (loaded.mean, loaded.std, loaded.classes)


def test_weights_of_torchvision_bring_a_transform_and_names() -> None:
    weights = ResNet18_Weights.DEFAULT
    found = preprocessing_of(torch.nn.Identity(), weights)
    torch.testing.assert_close(found.read(PHOTO)[0][0], weights.transforms()(PHOTO))
    assert found.class_names[282] == "tiger cat"
    assert found.mean == tuple(weights.transforms().mean)
    assert preprocessing_of(torch.nn.Identity(), weights.transforms()).std == tuple(weights.transforms().std)


def test_an_image_processor_of_transformers(tmp_path: Path) -> None:
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1] * 3, image_std=[0.2] * 3)
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config.image_size, config.id2label = 32, {0: "cat", 1: "dog"}
    model = ViTForImageClassification(config)
    with pytest.raises(InputError, match="AutoImageProcessor"):  # neither a folder nor in the cache
        preprocessing_of(model)
    found = preprocessing_of(model, processor)
    expected = processor(images=PHOTO, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found.read(PHOTO)[0][0], expected)
    assert found.mean == (0.1,) * 3
    assert found.class_names == ("cat", "dog")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    saved = preprocessing_of(ViTForImageClassification.from_pretrained(tmp_path))
    torch.testing.assert_close(saved.read(PHOTO)[0][0], expected)


def test_mean_and_std_of_a_transform_are_found() -> None:
    transform = Compose([ToTensor(), Normalize([0.5] * 3, [0.25] * 3)])
    found = preprocessing_of(torch.nn.Identity(), transform)
    assert (found.mean, found.std) == ((0.5,) * 3, (0.25,) * 3)
    assert preprocessing_of(torch.nn.Identity(), ToTensor()).mean == ()


def test_what_cannot_be_prepared(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a function"):
        preprocessing_of(torch.nn.Identity(), 3)
    given = preprocessing_of(torch.nn.Identity(), ToTensor())
    with pytest.raises(InputError, match=r"2 sizes, such as \(3, 5, 6\) and \(3, 70, 90\)"):
        given.read([PHOTO, PHOTO.resize((6, 5))])
    with pytest.raises(InputError, match="is empty"):
        given.read([])
    with pytest.raises(DataError, match="Crop it"):
        given.read(Image.new("RGB", (200, 2)))
    with pytest.raises(InputError, match=r"gives Image for image0"):
        preprocessing_of(torch.nn.Identity(), lambda image: image).read(PHOTO)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.png"):
        given.read(tmp_path / "a.png")
