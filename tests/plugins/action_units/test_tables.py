"""Tables of landmarks in all formats."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from attnguide.errors import DataError
from attnguide_action_units.tables import LandmarkTable, read_landmarks


def written(folder: Path, kind: str, points: np.ndarray, names: list[str]) -> Path:
    path = folder / f"table.{kind}"
    if kind == "npz":
        np.savez(path, landmarks=points, names=np.array(names))
    elif kind == "npy":
        np.save(path, points)
    elif kind == "json":
        path.write_text(json.dumps(dict(zip(names, points.tolist(), strict=True))))
    elif kind == "csv":
        rows = [[name, *map(str, row.flatten())] for name, row in zip(names, points, strict=True)]
        path.write_text("\n".join(",".join(row) for row in rows))
    else:  # OpenFace
        header = ["frame", *(f"x_{i}" for i in range(68)), *(f"y_{i}" for i in range(68))]
        rows = [[name, *map(str, row.T.flatten())] for name, row in zip(names, points, strict=True)]
        path = folder / "openface.csv"
        path.write_text("\n".join(", ".join(row) for row in [header, *rows]))
    return path


@pytest.mark.parametrize("kind", ["npz", "npy", "json", "csv", "openface"])
def test_tables(tmp_path: Path, kind: str) -> None:
    points = np.random.default_rng(0).uniform(0, 100, (3, 68, 2)).astype(np.float32)
    points[2] = np.nan
    if kind == "json":
        points = points[:2]
    names = ["a/1.jpg", "a/2.jpg", "b/3.jpg"][: len(points)]
    table = read_landmarks(written(tmp_path, kind, points, names))
    torch.testing.assert_close(table.points, torch.from_numpy(points), equal_nan=True)
    if kind == "npy":
        assert table.names == ()
        return
    assert table.names == tuple(names)
    for name in ("a/2.jpg", "2.jpg", "2", "elsewhere/2.png"):
        found = table.of(name)
        assert found is not None
        torch.testing.assert_close(found, torch.from_numpy(points[1]))
    assert table.of("3.jpg") is None
    assert table.of("4.jpg") is None
    again = read_landmarks(table.save(tmp_path / "again.npz"))
    torch.testing.assert_close(again.points, table.points, equal_nan=True)
    assert again.names == table.names


def test_names_that_are_not_unique() -> None:
    table = LandmarkTable(("a/1.jpg", "b/1.jpg"), torch.rand(2, 68, 2))
    assert torch.equal(table.of("b/1.jpg"), table.points[1])  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"several entries .* match '1\.jpg'"):
        table.of("c/1.jpg")


def test_files_of_300w(tmp_path: Path) -> None:
    text = "version: 1\nn_points: 68\n{\n" + "\n".join(f"{i + 1} {i + 2}" for i in range(68)) + "\n}\n"
    (tmp_path / "indoor_001.pts").write_text(text)
    points = read_landmarks(tmp_path / "indoor_001.pts").of("indoor_001.png")
    assert points is not None
    assert points[3].tolist() == [3.0, 4.0]  # pixels count from 0 here
    assert read_landmarks(tmp_path).names == ("indoor_001",)
    (tmp_path / "indoor_001.pts").write_text(text.replace("68", "67", 1))
    with pytest.raises(DataError, match="announces 67 points, and has 68"):
        read_landmarks(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("table.csv", "a.jpg,1,2,3,4\n", "2 landmarks belong to none of the known schemes"),
        ("table.csv", "x0,y0,x1\n1,2,3\n", "has no column y1"),
        ("table.csv", "a.jpg,1,2\nb.jpg,1,oops\n", "line 2: .*oops"),
        ("table.json", "[]", "must be an object"),
        ("table.json", '{"a": [[1, 2], [3]]}', r"'a': \[\[1, 2\], \[3\]\] are not landmarks"),
        ("table.json", '{"a": [[1, 2]], "b": [[1, 2], [3, 4]]}', r"'b' has landmarks \(2, 2\), others"),
        ("table.json", '{"a": null}', "has no landmarks"),
        ("table.npz", "no archive", "cannot be read as .npz"),
        ("table.npy", "no array", "cannot be read as .npy"),
        ("table.txt", "1 2 3", "is not a known table of landmarks"),
        ("table.pts", "1 2 3", "n_points and"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, match: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=match) as caught:
        read_landmarks(tmp_path / name)
    assert name in str(caught.value)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.pts file"):
        read_landmarks(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        read_landmarks(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", something=np.zeros(3))
    with pytest.raises(DataError, match="has no array landmarks68"):
        read_landmarks(tmp_path / "other.npz")


def test_openface_writes_pixels_and_millimetres(tmp_path: Path) -> None:
    header = ["frame", "face_id", "timestamp", "confidence", "success"]
    header += [f"{axis}_{n}" for axis in "xy" for n in range(68)]
    header += [f"{axis}_{n}" for axis in "XYZ" for n in range(68)]
    numbers = np.arange(136.0)
    row = ["1", "0", "0.0", "0.98", "1", *map(str, numbers), *["-7.5"] * 204]
    (tmp_path / "openface.csv").write_text(", ".join(header) + "\n" + ", ".join(row) + "\n")
    points = read_landmarks(tmp_path / "openface.csv").points
    assert np.array_equal(points[0].numpy(), np.stack([numbers[:68], numbers[68:]], axis=1))


@pytest.mark.parametrize("columns", [["", "file"], ["id", "image"], ["file"], ["index", "which"]])
def test_names_in_any_column(tmp_path: Path, columns: list[str]) -> None:
    header = [*columns, *(f"{axis}{n}" for n in range(68) for axis in "xy")]
    rows = [[*["5"] * (len(columns) - 1), f"{name}.jpg", *["1.5"] * 136] for name in "ab"]
    (tmp_path / "t.csv").write_text("\n".join(",".join(line) for line in (header, *rows)))
    assert read_landmarks(tmp_path / "t.csv").names == ("a.jpg", "b.jpg")


def test_folders_tell_equal_names_apart() -> None:
    table = LandmarkTable(
        ("train/a.png", "test/a.png", "test/b"), torch.arange(3.0).view(3, 1, 1).expand(3, 68, 2)
    )
    for name, index in (
        ("/x/train/a.png", 0),
        ("test/a.png", 1),
        ("test/a", 1),
        ("b.jpg", 2),
        ("/y/test/b.jpg", 2),
    ):
        found = table.of(name)
        assert found is not None
        assert float(found[0, 0]) == index
    with pytest.raises(DataError, match=r"several entries .* match 'a\.png'"):
        table.of("a.png")
    assert table.of("c.png") is None


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_of_windows(tmp_path: Path, delimiter: str) -> None:
    points = np.arange(136, dtype=np.float32)
    row = delimiter.join(["faces\\a.jpg", *(f"{value:g}" for value in points)])
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n")
    found = read_landmarks(tmp_path / "a.csv").of("elsewhere/faces/a.jpg")
    assert found is not None
    np.testing.assert_array_equal(found.numpy(), points.reshape(68, 2))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.pts", "n_points: " + "9" * 5000 + " { 1 2 }"),
        ("a.csv", "x_" + "9" * 5000 + ",y_0\n1,2\n"),
        ("a.csv", "a," + "1" * 200_000),
    ],
)
def test_numbers_of_thousands_of_digits(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=name):
        read_landmarks(tmp_path / name)


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_damaged_arrays(tmp_path: Path, suffix: str) -> None:
    points = np.zeros((2, 68, 2), np.float32)
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        np.savez_compressed(path, landmarks68=points)
    else:
        np.save(path, points)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(whole), 200):
        path.write_bytes(whole[:place] + bytes([generator.integers(256)]) * 8 + whole[place + 8 :])
        with contextlib.suppress(DataError):
            assert read_landmarks(path).points.shape[1:] == (68, 2)
