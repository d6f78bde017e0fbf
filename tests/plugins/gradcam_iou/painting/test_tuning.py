"""Fine-tuning from the painting page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.plugins.gradcam_iou.helpers import picture

from attnguide import models
from attnguide.data.procedural.faces import ATTRIBUTES, ProceduralFaces, template
from attnguide.errors import DataError, InputError, UnknownNameError
from attnguide.models import write_embedded
from attnguide.models.networks import small_cnn
from attnguide.visual import to_pil
from attnguide_gradcam_iou.painting.store import MaskStore
from attnguide_gradcam_iou.painting.tuning import FineTuning, LabeledImage, read_attributes


def test_labels_of_attributes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / "images" / f"{name}.png")
    table = tmp_path / "labels.csv"
    table.write_text("file,Big_Nose,hat\na.png,1,-1\n\nb.png, 0,\n")
    images = read_attributes(table, tmp_path / "images", ["hat", "smile", "big nose"])
    assert [image.path.name for image in images] == ["a.png", "b.png"]
    assert str(images[0].label) == "(0.0, nan, 1.0)"
    assert str(images[1].label) == "(nan, nan, 0.0)"
    for text, message in (
        ("file,hat\n", "labels.csv is empty"),
        ("file,cap\na.png,1\n", "cap"),
        ("file,hat\na.png,yes\n", "line 2: expected a file and 1 labels"),
        ("file,hat\na.png,1,0\n", "line 2"),
        ("file,hat\nc.png,1\nd.png,1\n", r"2 files that do not exist; the first is .*c\.png"),
    ):
        table.write_text(text)
        with pytest.raises((DataError, UnknownNameError), match=message):
            read_attributes(table, tmp_path / "images", ["hat", "smile"])


@pytest.mark.slow
@pytest.mark.parametrize("multi_label", [False, True])
def test_fine_tuning_raises_the_overlap(tmp_path: Path, multi_label: bool) -> None:
    faces = ProceduralFaces(48, seed=2, prevalence={"lipstick": 0.5}).stack()
    lipstick = faces.attributes[:, ATTRIBUTES.index("lipstick")].long().tolist()
    paths = []
    for number, image in enumerate(faces.image):
        paths.append(tmp_path / f"{number}.png")
        to_pil(image).save(paths[-1])
    classes = ["mole", "lipstick"] if multi_label else ["bare", "lipstick"]
    store = MaskStore(tmp_path / "masks", classes, template=True)
    side = faces.image.shape[-1]
    for cls in range(2):
        store.write("", cls, (template("mouth", side) > 0.5).numpy())
    checkpoint = tmp_path / "model.safetensors"
    write_embedded(
        checkpoint,
        small_cnn(2, width=8).eval(),
        classes=classes,
        size=side,
        width=8,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        multi_label=multi_label,
    )
    loaded = models.embedded(checkpoint)
    answers = [
        LabeledImage(p, (float("nan"), float(y)) if multi_label else y)
        for p, y in zip(paths, lipstick, strict=True)
    ]
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    given: list[models.LoadedModel] = []
    out = tmp_path / "masks" / "finetuned.safetensors"
    tuning = FineTuning(loaded, answers, tmp_path / "masks", torch.device("cpu"), given.append, checkpoint)
    tuning.start(epochs=6, weight=1.0, learning_rate=3e-3)
    tuning.wait(120)
    progress = tuning.progress
    assert (progress.state, progress.error) == ("done", "")
    assert progress.step == progress.steps
    assert [epoch.number for epoch in progress.epochs] == list(range(7))
    first, last = progress.epochs[0].iou, progress.epochs[-1].iou
    assert first is not None
    assert last is not None
    assert last > first + 0.05
    json.dumps(progress.as_dict(), allow_nan=False)
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    weights = load_file(out)
    assert models.embedded(out).classes == tuple(classes)
    assert all(torch.equal(value, weights[name]) for name, value in given[0].model.state_dict().items())
    with pytest.raises(InputError, match="learning_rate=0"):
        tuning.start(epochs=1, weight=1.0, learning_rate=0)


def test_a_fine_tuning_that_cannot_be(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{n}.png") for n in range(4)]
    loaded = models.load("torchvision/squeezenet1_1", num_classes=2)
    images = [LabeledImage(path, n % 2) for n, path in enumerate(paths)]
    (tmp_path / "masks").mkdir()
    tuning = FineTuning(loaded, images, tmp_path / "masks", torch.device("cpu"), print)
    tuning.start(epochs=1, weight=1.0, learning_rate=1e-3)
    tuning.wait(60)
    assert tuning.progress.state == "failed"
    assert "holds no mask" in tuning.progress.error
    with pytest.raises(InputError, match="at least two"):
        FineTuning(loaded, images[:1], tmp_path, torch.device("cpu"), print)
