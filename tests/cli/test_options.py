"""Options that commands share: sizes, names, devices, and the choice of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from attnguide.cli.options import ModelChoice, pair_of_sizes, pick_device, read_class_names
from attnguide.errors import DataError, InputError


def test_sizes() -> None:
    assert pair_of_sizes("224") == (224, 224)
    assert pair_of_sizes("192x256") == pair_of_sizes("192×256") == pair_of_sizes("192X256") == (192, 256)
    for wrong in ("", "0", "1x2x3", "-4", "4.5", "99999"):
        with pytest.raises(InputError, match="--size"):
            pair_of_sizes(wrong)


def test_names_of_classes(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\n\n red fox \n")
    (tmp_path / "names.json").write_text('["cat", "red fox"]')
    assert read_class_names(tmp_path / "names.txt") == ["cat", "red fox"]
    assert read_class_names(tmp_path / "names.json") == ["cat", "red fox"]
    (tmp_path / "names.json").write_text('{"0": "cat"}')
    with pytest.raises(DataError, match="JSON list of strings"):
        read_class_names(tmp_path / "names.json")


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(InputError, match="--device warp9 cannot be used"):
        pick_device("warp9")


def test_a_choice_that_contradicts_itself() -> None:
    with pytest.raises(InputError, match="--num-classes needs a model"):
        ModelChoice(None, None, False, 3, None, False).check()
    with pytest.raises(InputError, match="exclude each other"):
        ModelChoice("resnet18", Path("w.pt"), True, None, None, False).check()
    with pytest.raises(DataError, match="does not exist"):
        ModelChoice("resnet18", Path("nowhere.pt"), False, None, None, False).check()


def test_equal_settings_are_equal_files(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes(b"weights")
    one, other = (
        ModelChoice("m", tmp_path / name, False, None, None, False).settings() for name in ("a.pt", "b.pt")
    )
    assert one == other
    assert one["checkpoint"] == hashlib.sha256(b"weights").hexdigest()


@pytest.mark.parametrize("name", ["meta", "warp9", "cuda:99", "cpu:x", ""])
def test_devices_that_cannot_be_used(name: str) -> None:
    with pytest.raises(InputError, match=f"--device {name}"):
        pick_device(name)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-1", "2", "1e400", "x"])
def test_thresholds_and_opacities_out_of_range(call: Callable[..., Result], text: str) -> None:
    assert "--threshold" in call("evaluate", "photos", "--threshold", text, status=2).stderr
    assert "--alpha" in call("explain", "photos", "--alpha", text, status=2).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", "a.png", "--out", ""),
        ("explain", "a.png", "--checkpoint", ""),
        ("evaluate", ""),
        ("evaluate", "data", "--masks", ""),
        ("demo", "--out", ""),
        ("landmarks", "a.png", "--out", ""),
        ("analyze", "a.png", "--model", "x", "--checkpoint", "", "--adapters", "y"),
        ("annotate", "a.png", "--out", ""),
    ],
)
def test_an_empty_path_is_not_the_current_folder(
    call: Callable[..., Result], arguments: tuple[str, ...]
) -> None:
    assert "the path is empty" in call(*arguments, status=2).stderr
