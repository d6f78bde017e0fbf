"""LFWA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from attnguide.errors import AttnGuideError
from attnguide_segmentation.lfwa import LFWA


def picture(path: Path, side: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), "red").save(path)


def grey(path: Path, values: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def lfwa(root: Path, *, labels: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    """Write a folder as LFWA is released, with the tables that MATLAB 7.3 writes."""
    h5py = pytest.importorskip("h5py")
    names = ["A_B\\A_B_0001.jpg", "C\\C_0002.jpg", "C\\C_0001.jpg"]
    for name in names:
        picture(root / "lfw" / name.replace("\\", "/"))
    with h5py.File(root / "lfw_att_40.mat", "w") as file:
        file["label"] = labels.T

        def cells(key: str, texts: list[str]) -> None:
            references = []
            for index, text in enumerate(texts):
                cell = file.create_dataset(
                    f"#refs#/{key}{index}", data=np.array([[ord(c)] for c in text], np.uint16)
                )
                references.append([cell.ref])
            file.create_dataset(key, data=np.array(references, dtype=h5py.ref_dtype).T, dtype=h5py.ref_dtype)

        cells("name", names)
        cells("AttrName", ["Male", "Smiling"])
    with h5py.File(root / "indices_train_test.mat", "w") as file:
        file["indices_img_train"] = np.array([[3.0, 1.0]]).T
        file["indices_img_test"] = np.array([[2.0]])


def test_lfwa(tmp_path: Path) -> None:
    lfwa(tmp_path, labels=np.array([[1.0, 0], [0, 0], [1, 1]]))
    data = LFWA(tmp_path, transform=v2.PILToTensor())
    assert data.classes == ("Male", "Smiling")
    assert [file.name for file in data.files] == ["C_0001.jpg", "A_B_0001.jpg"]
    assert data[0][0].shape == (3, 8, 8)
    assert [labels.tolist() for _, labels in (data[0], data[1])] == [[1, 1], [1, 0]]
    assert len(LFWA(tmp_path, "test")) == 1
    (tmp_path / "lfw/C/C_0002.jpg").unlink()
    with pytest.raises(AttnGuideError, match="1 of 1 images are missing"):
        LFWA(tmp_path, "test")
    (tmp_path / "lfw_att_40.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(AttnGuideError, match="is not the table of LFWA"):
        LFWA(tmp_path)


def test_lfwa_with_too_few_labels(tmp_path: Path) -> None:
    lfwa(tmp_path, labels=np.zeros((2, 2)))
    with pytest.raises(AttnGuideError, match=r"labels of shape \(2, 2\) for 3 images and 2 attributes"):
        LFWA(tmp_path)
