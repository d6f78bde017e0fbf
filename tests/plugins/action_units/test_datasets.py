"""Folders of RAF-DB and AffectNet, made small; and the command that finds landmarks."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from attnguide.cli.main import main
from attnguide.errors import DataError, InputError, UnknownNameError
from attnguide_action_units import extraction
from attnguide_action_units.datasets import RAFDB, AffectNet, FaceTable
from attnguide_action_units.landmarks import FROM_MESH, FaceLandmarks
from attnguide_action_units.tables import LandmarkTable, read_landmarks


def picture(path: Path, shade: int = 128) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (shade, shade, shade)).save(path)


@pytest.fixture
def rafdb(tmp_path: Path) -> Path:
    rows = [("train_00001", 5), ("train_00002", 7), ("test_0001", 4)]
    for name, _ in rows:
        picture(tmp_path / "basic/Image/aligned" / f"{name}_aligned.jpg")
    labels = tmp_path / "basic/EmoLabel/list_patition_label.txt"
    labels.parent.mkdir()
    labels.write_text("".join(f"{name}.jpg {label}\n" for name, label in rows))
    return tmp_path


def test_rafdb(rafdb: Path) -> None:
    table = LandmarkTable(("train_00001_aligned.jpg",), torch.rand(1, 68, 2))
    data = RAFDB(rafdb, landmarks=table)
    assert (len(data), data.without_landmarks) == (2, 1)
    assert [data.classes[label] for label in data.labels] == ["sadness", "neutral"]
    assert [RAFDB(rafdb / "basic", "test").classes[3]] == ["happiness"]
    sample = data[0]
    assert sample.image.shape == (3, 30, 40)
    assert isinstance(sample.landmarks, FaceLandmarks)
    torch.testing.assert_close(sample.landmarks.as_subclass(torch.Tensor), table.points[0])
    flipped = RAFDB(rafdb, landmarks=table, transform=v2.RandomHorizontalFlip(1.0))[0]
    torch.testing.assert_close(
        v2.functional.horizontal_flip(flipped.landmarks).as_subclass(torch.Tensor), table.points[0]
    )
    images, labels, landmarks = next(iter(DataLoader(data, batch_size=2)))
    assert (images.shape, labels.tolist(), landmarks.shape) == ((2, 3, 30, 40), [4, 6], (2, 68, 2))


def test_rafdb_that_is_broken(rafdb: Path) -> None:
    with pytest.raises(UnknownNameError, match="'valid'"):
        RAFDB(rafdb, "valid")
    with pytest.raises(UnknownNameError, match="'raw'"):
        RAFDB(rafdb, images="raw")
    with pytest.raises(DataError, match="2 of 2 images are missing"):
        RAFDB(rafdb, images="original")
    with pytest.raises(DataError, match="names none of the images"):
        RAFDB(rafdb, landmarks=LandmarkTable(("other.jpg",), torch.rand(1, 68, 2)))
    (rafdb / "basic/EmoLabel/list_patition_label.txt").write_text("train_00001.jpg 5\ntrain_00002.jpg 8\n")
    with pytest.raises(DataError, match=r"line 2: 'train_00002\.jpg 8'"):
        RAFDB(rafdb)
    with pytest.raises(DataError, match="does not exist"):
        RAFDB(rafdb / "elsewhere")


@pytest.fixture
def affectnet(tmp_path: Path) -> Path:
    for number, label in ((2, 1), (10, 7), (3, 8)):
        picture(tmp_path / f"train_set/images/{number}.jpg", number)
        folder = tmp_path / "train_set/annotations"
        folder.mkdir(exist_ok=True)
        np.save(folder / f"{number}_exp.npy", str(label))
        np.save(folder / f"{number}_lnd.npy", np.arange(136) + number)
    return tmp_path


def test_affectnet(affectnet: Path) -> None:
    seven, eight = AffectNet(affectnet), AffectNet(affectnet, classes=8)
    assert (len(seven), seven.left_out, len(eight), eight.left_out) == (1, 2, 2, 1)
    assert seven.classes[int(seven[0].label)] == "happiness"
    assert seven[0].landmarks[3].tolist() == [8.0, 9.0]
    assert [file.name for file in eight.files] == ["2.jpg", "10.jpg"]
    with pytest.raises(InputError, match="classes=6"):
        AffectNet(affectnet, classes=6)
    with pytest.raises(UnknownNameError, match="'test'"):
        AffectNet(affectnet, "test")
    with pytest.raises(DataError, match=r"holds no N_exp\.npy"):
        AffectNet(affectnet, "val")
    np.save(affectnet / "train_set/annotations/2_lnd.npy", np.arange(134))
    with pytest.raises(DataError, match=r"2_lnd\.npy holds 134 numbers"):
        AffectNet(affectnet)


def test_a_list_of_files(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(InputError, match="1 files, 2 labels"):
        FaceTable([tmp_path / "a.png"], [0, 1], torch.rand(1, 68, 2), ["neutral"])
    with pytest.raises(DataError, match="no images"):
        FaceTable([], [], torch.rand(0, 68, 2), ["neutral"])


# ------------------------------------------------------------------------- landmarks


class Mesh:
    """Stands for mediapipe's face mesh: finds a face in bright images."""

    def __init__(self, **_: Any) -> None: ...

    def process(self, image: np.ndarray[Any, Any]) -> Any:
        points = [types.SimpleNamespace(x=i / 1000, y=i / 500) for i in range(478)]
        faces = [types.SimpleNamespace(landmark=points)] if image.mean() > 100 else None
        return types.SimpleNamespace(multi_face_landmarks=faces)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solutions = types.SimpleNamespace(face_mesh=types.SimpleNamespace(FaceMesh=Mesh))
    monkeypatch.setitem(sys.modules, "mediapipe", types.SimpleNamespace(solutions=solutions))
    picture(tmp_path / "photos/bright.png", 200)
    picture(tmp_path / "photos/dark.png", 10)
    (tmp_path / "photos/broken.png").write_bytes(b"no image")
    out = tmp_path / "found.npz"
    result = CliRunner().invoke(main, ["landmarks", str(tmp_path / "photos"), "--out", str(out)])
    assert result.exit_code == 1, result.output
    assert "dark.png: no face was found" in result.output
    assert "broken.png" in result.output
    assert "landmarks of 1 of 3 images" in result.output
    table = read_landmarks(out)
    points = table.of("bright.png")
    assert points is not None
    expected = torch.tensor([FROM_MESH[30] / 1000 * 40 - 0.5, FROM_MESH[30] / 500 * 30 - 0.5])
    torch.testing.assert_close(points[30], expected)
    assert table.of("dark.png") is None


def test_without_mediapipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "face.png")
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    out = tmp_path / "found.npz"
    result = CliRunner().invoke(main, ["landmarks", str(tmp_path), "--out", str(out)])
    assert result.exit_code == 2
    assert "pip install 'attnguide[landmarks]'" in result.output
    assert not out.exists()
    monkeypatch.setitem(sys.modules, "mediapipe", types.SimpleNamespace(__version__="0.10.30"))
    with pytest.raises(InputError, match=r"mediapipe 0\.10\.30 contains no model.*face_landmarker\.task"):
        extraction.face_mesh()
    with pytest.raises(DataError, match=r"none\.task does not exist"):
        extraction.face_mesh(tmp_path / "none.task")
