"""Images are listed from folders, tables and CelebA's attributes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tests.helpers.celeba import make_celeba
from tests.helpers.recipes import pictures

from attnguide.errors import DataError, InputError
from attnguide.training import DataSettings, Listing, draw_share, list_images


def listed(path: Path, **more: object) -> Listing:
    return list_images(DataSettings(path, **more))  # type: ignore[arg-type]


def table(root: Path, text: str) -> Path:
    pictures(root, 4)
    path = root / "photos" / "labels.csv"
    path.write_text(text)
    return path


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    found = listed(pictures(tmp_path, 10) / "photos")
    assert (found.classes, found.multi_label) == (("blue", "red"), False)
    assert (len(found.train), len(found.validation)) == (16, 4)
    assert [sample.label for sample in found.validation] == [0, 0, 1, 1]
    assert all(sample.path.parent.name == found.classes[int(sample.label)] for sample in found.train)
    assert listed(tmp_path / "photos", validation=0).validation == []


def test_folders_of_splits(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        pictures(tmp_path / name, 3)
        (tmp_path / name / "photos").rename(tmp_path / f"{name}s")
    root = tmp_path / "data"
    root.mkdir()
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}s").rename(root / name)
    found = listed(root)
    assert {sample.path.parts[-3] for sample in found.train} == {"train"}
    assert {sample.path.parts[-3] for sample in found.validation} == {"val"}


def test_another_folder_for_validation(tmp_path: Path) -> None:
    found = listed(pictures(tmp_path / "a", 3) / "photos", validation=pictures(tmp_path / "b", 2) / "photos")
    assert (len(found.train), len(found.validation)) == (6, 4)
    with pytest.raises(InputError, match="both for training and for validation"):
        listed(tmp_path / "a" / "photos", validation=tmp_path / "a" / "photos")


def test_a_table_of_classes(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "image,class,split,mask\nblue/0.png,b,train,../masks/blue/0.png\nred/0.png,r,train,\n"
        "red/1.png,r,val,\nblue/1.png,b,test,\n",
    )
    found = listed(path)
    assert found.classes == ("b", "r")
    assert [sample.label for sample in found.train] == [0, 1]
    assert found.train[0].mask == path.parent / "../masks/blue/0.png"
    assert found.train[1].mask is None
    assert [sample.path.name for sample in found.validation] == ["1.png"]
    assert found.notes == [f"1 rows of {path} belong to another split, such as the test."]


def test_numbers_of_classes_are_sorted_as_numbers(tmp_path: Path) -> None:
    path = table(tmp_path, "file;label\nblue/0.png;10\nred/0.png;2\nred/1.png;\n")
    found = listed(path, validation=0)
    assert found.classes == ("2", "10")
    assert [sample.label for sample in found.train] == [1, 0, -100]


def test_a_table_of_attributes(tmp_path: Path) -> None:
    path = table(tmp_path, "file,hat,smile\nblue/0.png,1,-1\nred/0.png,0,\n")
    found = listed(path, validation=0)
    assert (found.classes, found.multi_label) == (("hat", "smile"), True)
    first, second = (sample.label for sample in found.train)
    assert first == (1.0, 0.0)
    assert isinstance(second, tuple)
    assert second[0] == 0.0
    assert math.isnan(second[1])
    assert listed(path, validation=0, attributes=("smile",)).train[0].label == (0.0,)


def test_annotations_of_a_table(tmp_path: Path) -> None:
    path = table(
        tmp_path, 'file,label,boxes\nblue/0.png,b,1 2 3 4\nred/0.png,r,"[[1, 2, 3, 4]]"\nred/1.png,r,\n'
    )
    found = list_images(DataSettings(path, validation=0), ["boxes"])
    boxes = [sample.annotations["boxes"] for sample in found.train]
    assert boxes[0].tolist() == [1, 2, 3, 4]
    assert boxes[1].tolist() == [[1, 2, 3, 4]]
    assert boxes[2] is None


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = table(tmp_path, "file,label\nblue/0.png,b\n").with_suffix(".parquet")
    columns = {
        "file": ["blue/0.png", "red/0.png"],
        "label": ["b", "r"],
        "boxes": [[1.0, 2.0, 3.0, 4.0], None],
    }
    parquet.write_table(pyarrow.table(columns), path)
    found = list_images(DataSettings(path, validation=0), ["boxes"])
    assert [sample.label for sample in found.train] == [0, 1]
    assert found.train[0].annotations["boxes"].tolist() == [1, 2, 3, 4]
    columns = {"file": columns["file"], "hat": [1.0, -1.0], "bald": [True, None]}
    parquet.write_table(pyarrow.table(columns), path)
    first, second = (sample.label for sample in list_images(DataSettings(path, validation=0)).train)
    assert first == (1.0, 1.0)
    assert str(second) == "(0.0, nan)"
    path.write_text("no table")
    with pytest.raises(DataError, match="is not a Parquet file"):
        listed(path)


def test_celeba(tmp_path: Path) -> None:
    make_celeba(tmp_path, 12, size=(20, 24))
    found = listed(tmp_path, attributes=("Smiling", "Bald"))
    assert (found.classes, found.multi_label) == (("Smiling", "Bald"), True)
    assert len(found.train) > 0
    assert len(found.validation) > 0
    assert len(found.train) + len(found.validation) < 12
    assert len(listed(tmp_path / "celeba" / "list_attr_celeba.txt").classes) == 40
    with pytest.raises(InputError, match="Did you mean 'Smiling'"):
        listed(tmp_path, attributes=("Smilling",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n", "has no row"),
        ("file,label\nblue/0.png,b\n", "two are needed"),
        ("name,label\nblue/0.png,b\n", "no column for the files.*data.file"),
        ("file,label\nblue/0.png\n", "row 2: 1 cells, expected 2"),
        ("file,label\nblue/0.png,b\nred/9.png,r\n", "1 files that do not exist.*9.png"),
        ("file,hat\nblue/0.png,maybe\n", "holds 'maybe'"),
        ("file,file\na,b\n", "two columns have one name"),
        ("file,label,split\nblue/0.png,b,test\nred/0.png,r,test\n", "no image to train on"),
    ],
)
def test_tables_with_mistakes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises((DataError, InputError), match=message):
        listed(table(tmp_path, text))


def test_paths_with_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        listed(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no subfolder"):
        listed(tmp_path / "empty")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(InputError, match="neither a folder"):
        listed(tmp_path / "a.json")


def test_shares_are_drawn_from_each_class() -> None:
    train, held_out = draw_share([0] * 10 + [1] * 5 + [2], 0.2)
    assert sorted(train + held_out) == list(range(16))
    assert [number // 10 for number in held_out] == [0, 0, 1]
    assert 15 in train
    assert draw_share([0] * 10 + [1] * 5 + [2], 0.2) == (train, held_out)
