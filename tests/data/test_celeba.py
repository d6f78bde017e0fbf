from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from tests.helpers.celeba import ATTRIBUTES, make_celeba
from torch.utils.data import DataLoader

from attnguide.data.celeba import CelebA
from attnguide.errors import DataError, InputError, UnknownNameError


@pytest.fixture
def folder(tmp_path):
    make_celeba(tmp_path)
    return tmp_path / "celeba"


class Unchecked(torchvision.datasets.CelebA):
    """torchvision's class on a folder that is not the full release."""

    def _check_integrity(self):
        return True


@pytest.mark.parametrize("split", ["train", "valid", "test", "all"])
def test_agrees_with_torchvision(tmp_path, split):
    make_celeba(tmp_path, 12)
    ours, theirs = CelebA(tmp_path, split), Unchecked(tmp_path, split)
    assert len(ours) == len(theirs) == {"train": 6, "valid": 3, "test": 3, "all": 12}[split]
    assert ours.filename == theirs.filename
    for name in ("attr", "identity", "bbox", "landmarks_align"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    for (image, labels), (image_, labels_) in zip(ours, theirs, strict=False):
        assert np.array_equal(image, image_)
        assert torch.equal(labels, labels_.float())
    assert theirs.attr_names == [*ATTRIBUTES, ""]
    assert ours.attr_names == ours.classes == ATTRIBUTES


def test_labels_are_those_written(tmp_path):
    attributes = make_celeba(tmp_path)
    dataset = CelebA(tmp_path, "all")
    labels = torch.stack([dataset[i][1] for i in range(len(dataset))])
    assert labels.dtype == torch.float32
    assert np.array_equal(labels, attributes)


def test_attributes_select_columns_in_their_order(tmp_path):
    attributes = make_celeba(tmp_path)
    chosen = ("Wearing_Lipstick", "Bald")
    dataset = CelebA(tmp_path, "all", attributes=chosen)
    assert dataset.classes == list(chosen)
    columns = [ATTRIBUTES.index(name) for name in chosen]
    assert dataset[3][1].tolist() == attributes[3, columns].tolist()


@pytest.mark.parametrize("n", [3, 4])
def test_split_of_one_image(tmp_path, n):
    make_celeba(tmp_path, n)
    assert CelebA(tmp_path, "valid").filename == ["000003.jpg"]


def test_folder_of_one_image(tmp_path):
    make_celeba(tmp_path, 1)
    assert len(CelebA(tmp_path, "all")) == len(CelebA(tmp_path, "train")) == 1


def test_transforms_and_workers(tmp_path):
    make_celeba(tmp_path)
    transform = torchvision.transforms.functional.to_tensor
    dataset = CelebA(tmp_path, "all", transform=transform, target_transform=lambda y: y[:2])
    images, labels = next(iter(DataLoader(dataset, batch_size=8)))
    assert images.shape == (8, 3, 218, 178)
    assert labels.shape == (8, 2)


def test_missing_files_are_listed(tmp_path):
    with pytest.raises(
        DataError, match=r"list_attr_celeba\.txt.*list_eval_partition\.txt, img_align_celeba/"
    ) as e:
        CelebA(tmp_path)
    assert str(tmp_path / "celeba") in str(e.value)


def test_one_missing_file(folder):
    (folder / "identity_CelebA.txt").unlink()
    with pytest.raises(DataError, match=r": identity_CelebA\.txt missing"):
        CelebA(folder.parent)


def test_missing_images_are_counted(folder):
    (folder / "img_align_celeba" / "000003.jpg").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of 2 images of the split 'valid', such as 000003\.jpg"):
        CelebA(folder.parent, "valid")
    assert len(CelebA(folder.parent, "train")) == 4


def test_corrupt_image(folder):
    (folder / "img_align_celeba" / "000001.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"000001\.jpg is not an image"):
        CelebA(folder.parent)[0]


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("list_attr_celeba.txt", "000002.jpg", "000002.jpg x", r"line 4: .*'x'"),
        ("list_attr_celeba.txt", "000002.jpg", "000002.jpg  1", "line 4: 41 values, expected 40"),
        ("list_attr_celeba.txt", "Young", "", "line 2 names 39 attributes"),
        ("list_attr_celeba.txt", "000002.jpg", "000009.jpg", r"lists 000009\.jpg where .* lists 000002\.jpg"),
        ("list_attr_celeba.txt", " -1", "  0", r"000001\.jpg has an attribute that is neither -1 nor 1"),
        ("identity_CelebA.txt", "000008.jpg", "\n", "line 8|line 9"),
        ("list_eval_partition.txt", "000001.jpg 0", "000001.jpg", "line 1: 0 values"),
    ],
)
def test_malformed_lists(folder, name, old, new, message):
    edit(folder / name, old, new)
    with pytest.raises(DataError, match=message) as error:
        CelebA(folder.parent)
    assert str(folder / name) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"8\n", b"\xff\xfe\xff", b"8\nYoung\n"])
def test_broken_lists(folder, content):
    (folder / "list_attr_celeba.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"list_attr_celeba\.txt"):
        CelebA(folder.parent)


def test_empty_split(tmp_path):
    make_celeba(tmp_path, 2)
    with pytest.raises(DataError, match="split 'test'"):
        CelebA(tmp_path, "test")


def test_unknown_names(folder):
    with pytest.raises(UnknownNameError, match="Did you mean 'train'"):
        CelebA(folder.parent, "trian")
    with pytest.raises(UnknownNameError, match="Did you mean 'Wearing_Lipstick'"):
        CelebA(folder.parent, attributes=["Wearing_Lipstik"])
    for attributes in ("Bald", []):
        with pytest.raises(InputError, match="attributes"):
            CelebA(folder.parent, attributes=attributes)


def test_images_are_rgb(folder):
    Image.new("L", (178, 218), 7).save(folder / "img_align_celeba" / "000001.jpg")
    assert CelebA(folder.parent)[0][0].mode == "RGB"
