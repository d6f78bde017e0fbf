"""Models by name, and weights from files."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import time

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tests.helpers.pictures import CLASSES, picture

from attnguide import models
from attnguide.data.images import read_image
from attnguide.errors import DataError, InputError
from attnguide.models.checkpoints import read_weights
from attnguide.models.embedded_model import EMBEDDED

TINY = "test_efficientnet"


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(1)
    return timm.create_model(TINY, num_classes=7).state_dict()


def test_a_timm_model_comes_with_its_own_preprocessing(tmp_path):
    loaded = models.load(TINY)
    assert not loaded.model.training
    assert loaded.weights == "random"
    assert loaded.classes[0] == "tench"
    assert len(loaded.classes) == 1000
    data = timm.data.resolve_model_data_config(loaded.model)
    path = picture(tmp_path / "a.png", size=(300, 200))
    expected = timm.data.create_transform(**data, is_training=False)(read_image(path))
    assert torch.equal(loaded.read(path), expected)
    assert expected.shape[-2:] == loaded.size


def test_displayed_undoes_the_normalization(tmp_path):
    loaded = models.load(TINY)
    path = tmp_path / "grey.png"
    Image.new("RGB", (200, 200), (200, 100, 50)).save(path)
    shown = loaded.displayed(loaded.read(path)[None])
    expected = torch.tensor([200, 100, 50])[:, None, None] / 255
    torch.testing.assert_close(shown[0], expected.expand_as(shown[0]), atol=1e-5, rtol=0)


def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = (models.load(TINY).model.state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_torchvision():
    loaded = models.load("torchvision/squeezenet1_1", num_classes=3)
    assert loaded.classes == ("class 0", "class 1", "class 2")
    assert loaded.mean == (0.485, 0.456, 0.406)
    assert loaded.size == (224, 224)


def test_torchvision_infers_the_number_of_classes(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(torchvision.models.squeezenet1_1(num_classes=4).state_dict(), path)
    assert len(models.load("torchvision/squeezenet1_1", checkpoint=path).classes) == 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet5", "Did you mean resnet50"),
        ("torchvision/resnt18", "Did you mean resnet18"),
        ("resnet50.a9_in1k", "resnet50.a1_in1k"),
        ("", "unknown model ''"),
    ],
)
def test_unknown_names(name, expected):
    with pytest.raises(InputError, match=expected):
        models.load(name)


@pytest.mark.parametrize("wrapper", ["", "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "model."])
def test_wrapped_checkpoints(tmp_path, weights, wrapper, prefix):
    content = {prefix + name: value for name, value in weights.items()}
    path = tmp_path / "w.pth"
    torch.save(
        {wrapper: content, "epoch": 3, "args": argparse.Namespace(lr=0.1)} if wrapper else content, path
    )
    loaded = models.load(TINY, checkpoint=path)
    assert len(loaded.classes) == 7
    assert loaded.weights == "checkpoint"
    assert torch.equal(loaded.model.state_dict()["classifier.weight"], weights["classifier.weight"])


def test_safetensors(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    assert len(models.load(TINY, checkpoint=tmp_path / "w.safetensors").classes) == 7


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, weights, save):
    path, victim = tmp_path / "w.pth", tmp_path / "victim"
    save({"state_dict": weights, "extra": Evil(victim)}, path)
    with pytest.raises(DataError, match=r"never unpickles one[\s\S]*safetensors"):
        read_weights(path)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "empty"), (b"hello" * 50, "w.pth"), (b"PK\x03\x04" + b"\0" * 99, "not a checkpoint of PyTorch")],
)
def test_files_that_are_no_checkpoints(tmp_path, content, expected):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(DataError, match=expected):
        read_weights(path)


def test_truncated_files(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pth")
    save_file(weights, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DataError, match=name):
            read_weights(path)


def test_a_checkpoint_without_weights(tmp_path):
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "w.pth")
    with pytest.raises(DataError, match="'epoch', 'lr'"):
        read_weights(tmp_path / "w.pth")


def test_a_checkpoint_of_another_model_lists_what_differs(tmp_path, weights):
    weights = dict(weights)
    weights["surplus"] = weights.pop("conv_stem.weight")
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"conv_stem.weight missing; surplus unexpected"):
        models.load(TINY, checkpoint=tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"classifier.weight is \(7, 256\), not \(5, 256\)"):
        models.load(TINY, checkpoint=tmp_path / "w.safetensors", num_classes=5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pretrained": True, "checkpoint": "w.pth"}, "Choose one"),
        ({"num_classes": 0}, "at least 1"),
        ({"class_names": ["a", "b"]}, "2 class names"),
    ],
)
def test_arguments_that_do_not_fit(options, expected):
    with pytest.raises(InputError, match=expected):
        models.load(TINY, **options)


def test_pretrained_without_a_network_is_one_quick_error(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(DataError, match=r"pretrained weights of test_vit.* downloaded nor found"):
        models.load("test_vit", pretrained=True)
    assert time.monotonic() - start < 20
    assert not constants.HF_HUB_OFFLINE


def test_the_embedded_classifier(faces, tmp_path):
    loaded = models.embedded(faces)
    assert loaded.classes == CLASSES
    assert loaded.multi_label
    assert loaded.name == "attnguide/faces"
    assert loaded.read(picture(tmp_path / "a.png")).shape == (3, 32, 32)
    logits = loaded.model(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(loaded.probabilities(logits), logits.sigmoid())


def test_the_embedded_classifier_is_missing_or_something_else(tmp_path, weights, monkeypatch):
    monkeypatch.setattr("attnguide.models.embedded_model.EMBEDDED", tmp_path / "faces.safetensors")
    with pytest.raises(DataError, match="lacks the embedded classifier"):
        models.embedded()
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match="not a classifier that attnguide saved"):
        models.embedded(tmp_path / "w.safetensors")


def test_one_logit_is_a_question_of_its_own():
    loaded = models.load(TINY, num_classes=1)
    assert loaded.probabilities(torch.zeros(2, 1)).tolist() == [[0.5], [0.5]]


def test_an_elongated_image_is_refused(tmp_path):
    Image.new("RGB", (3000, 2)).save(tmp_path / "line.png")
    with pytest.raises(DataError, match="3000×2"):
        models.load(TINY).read(tmp_path / "line.png")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", 10**9),
        ("size", "224"),
        ("width", 10**8),
        ("reduction", 5),
        ("classes", []),
        ("classes", "ab"),
        ("mean", [0.5, 0.5]),
        ("mean", [float("nan")] * 3),
        ("std", [0.2, 0.2, 0.0]),
    ],
)
def test_metadata_of_an_embedded_classifier_is_checked(key, value, tmp_path):
    with safe_open(EMBEDDED, "pt") as file:
        about = dict(file.metadata())
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(weights, tmp_path / "x.safetensors", metadata={**about, key: json.dumps(value)})
    with pytest.raises(DataError, match=r"x\.safetensors is not a classifier that attnguide saved"):
        models.load(checkpoint=tmp_path / "x.safetensors")


def test_the_number_of_classes_of_an_averaged_model(tmp_path):
    model = timm.create_model("resnet10t", num_classes=7)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.save(averaged.state_dict(), tmp_path / "w.pt")
    loaded = models.load("resnet10t", checkpoint=tmp_path / "w.pt")
    assert len(loaded.classes) == 7
    assert torch.equal(loaded.model.fc.weight, model.fc.weight)
