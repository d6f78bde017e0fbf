"""DecoyMNIST, on digits made here; the real ones where they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from tests.helpers.real_data import RealData

from attnguide.data.decoy import DecoyMNIST, read_digits
from attnguide.errors import DataError, UnknownNameError


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with two hundred digits of grey 7 in the middle."""
    pixels = np.zeros((200, 28, 28), dtype=np.uint8)
    pixels[:, 8:20, 8:20] = 7
    labels = (np.arange(200) % 10).astype(np.uint8)
    file = tmp_path_factory.mktemp("digits") / "mnist.npz"
    np.savez(file, x_train=pixels, y_train=labels, x_test=pixels[:100], y_test=labels[:100])
    return file


@pytest.mark.parametrize(("protocol", "side", "low"), [("xil", 4, 0.0), ("cdep", 5, -1.0)])
def test_the_patch_tells_the_digit_in_training(digits: Path, protocol: str, side: int, low: float) -> None:
    data = DecoyMNIST(digits, protocol=protocol)  # type: ignore[arg-type]
    assert len(data) == 200
    assert data.images.shape == (200, 1, 28, 28)
    assert float(data.images.min()) == low
    gray = (data.images[:, 0] - low) / (1 - low) * 255
    corners = torch.zeros(4, 28, 28, dtype=torch.bool)
    for index, (row, column) in enumerate(((0, 0), (0, 28 - side), (28 - side, 0), (28 - side, 28 - side))):
        corners[index, row : row + side, column : column + side] = True
    # One corner of each image holds the grey of its digit; the rest is as it was.
    expected = 255.0 - 25 * data.labels
    held = torch.stack([gray[:, corner] for corner in corners], dim=1)
    hits = (held - expected[:, None, None]).abs().amax(dim=2) < 0.01
    assert bool((hits.sum(dim=1) == 1).all())
    assert set(hits.int().argmax(dim=1).tolist()) == {0, 1, 2, 3}
    own = corners[hits.int().argmax(dim=1)]
    assert int((gray[~own] > 0.01).sum()) == 200 * 144
    forbidden = own if protocol == "xil" else corners.any(dim=0).expand(200, -1, -1)
    assert torch.equal(data.masks == 0, forbidden)
    image, label, mask = data[3]
    assert torch.equal(image, data.images[3])
    assert (int(label), mask.shape) == (3, (28, 28))


def test_the_patch_lies_in_the_test(digits: Path) -> None:
    adversarial = DecoyMNIST(digits, "test", protocol="cdep")
    seen = ((adversarial.images[:, 0] + 1) / 2 * 255).masked_fill(adversarial.masks == 1, 0).amax(dim=(1, 2))
    torch.testing.assert_close(seen, 25.0 * adversarial.labels)
    random = DecoyMNIST(digits, "test", protocol="xil")
    seen = (random.images[:, 0] * 255).masked_fill(random.masks == 1, 0).amax(dim=(1, 2))
    told = ((255 - seen) / 25).round().long()
    assert len(told.unique()) == 10
    assert 0 < int((told == random.labels).sum()) < 30
    honest = DecoyMNIST(digits, "test", protocol="xil", honest=True)
    seen = (honest.images[:, 0] * 255).masked_fill(honest.masks == 1, 0).amax(dim=(1, 2))
    torch.testing.assert_close(seen, 255.0 - 25 * honest.labels)


def test_seeds_and_no_decoy(digits: Path) -> None:
    one, same, other = (DecoyMNIST(digits, seed=seed).images for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    plain = DecoyMNIST(digits, decoy=False).images
    assert float(plain.max()) == pytest.approx(7 / 255)


def test_torchvisions_folder(tmp_path: Path, digits: Path) -> None:
    pixels, labels = read_digits(digits, "train")
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, values, kind in (("images-idx3", pixels, 3), ("labels-idx1", labels.byte(), 1)):
        head = np.array([0x800 + kind, *values.shape], dtype=">i4").tobytes()
        for split in ("train", "t10k"):
            (folder / f"{split}-{name}-ubyte").write_bytes(head + values.numpy().tobytes())
    assert torchvision.datasets.MNIST(tmp_path)._check_exists()
    found = read_digits(tmp_path, "train")
    assert torch.equal(found[0], pixels)
    assert torch.equal(found[1], labels)


def test_bad_input(tmp_path: Path, digits: Path) -> None:
    with pytest.raises(UnknownNameError, match="protocol of DecoyMNIST"):
        DecoyMNIST(digits, protocol="xill")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="split of MNIST"):
        DecoyMNIST(digits, "valid")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no MNIST in"):
        DecoyMNIST(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        DecoyMNIST(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match="cannot be read"):
        DecoyMNIST(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", x_train=np.zeros((3, 8, 8)), y_train=np.zeros(3))
    with pytest.raises(DataError, match="expected bytes"):
        DecoyMNIST(tmp_path / "other.npz")


def test_real_digits(real_data: RealData) -> None:
    data = DecoyMNIST(real_data.path("mnist.npz"), "test", protocol="cdep")
    assert len(data) == 10000
    assert data.labels[:5].tolist() == [7, 2, 1, 0, 4]
