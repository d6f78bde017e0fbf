"""The check of the wheel notices whatever is missing from it."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from importlib.metadata import entry_points

import pytest
from tests.wheel import ROOT, declared_entry_points, differences, packaged_entry_points, tracked_files

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FILES = tracked_files()
METADATA = {
    f"attnguide-0.1.0.dist-info/{name}"
    for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
}


def written(points: set[tuple[str, str, str]]) -> str:
    """The text of an `entry_points.txt`."""
    groups = sorted({group for group, _, _ in points})
    return "\n".join(
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for of, name, value in sorted(points) if of == group)
        for group in groups
    )


DECLARED = declared_entry_points(PROJECT)


def test_a_complete_wheel_passes() -> None:
    assert packaged_entry_points(written(DECLARED)) == DECLARED
    assert differences(FILES | METADATA, written(DECLARED), files=FILES, project=PROJECT) == []


def test_the_lists_come_from_the_project() -> None:
    groups = {group for group, _, _ in DECLARED}
    assert {"console_scripts", "attnguide"} <= groups
    plugins = {path.name for path in (ROOT / "plugins").iterdir() if (path / "plugin.py").is_file()}
    assert {value.partition(".")[0] for group, _, value in DECLARED if group == "attnguide"} == {
        "attnguide",
        *plugins,
    }
    suffixes = {name.rpartition(".")[2] for name in FILES}
    assert {"py", "pyi", "typed", "toml", "safetensors", "html", "css", "js"} <= suffixes
    assert all((ROOT / "src" / name).is_file() or (ROOT / "plugins" / name).is_file() for name in FILES)


@pytest.mark.parametrize("point", sorted(DECLARED), ids=lambda point: f"{point[0]}:{point[1]}")
@pytest.mark.parametrize("change", ["missing", "of another value"])
def test_every_entry_point_counts(point: tuple[str, str, str], change: str) -> None:
    group, name, value = point
    wrong = (DECLARED - {point}) | ({(group, name, value + "s")} if change != "missing" else set())
    problems = differences(FILES | METADATA, written(wrong), files=FILES, project=PROJECT)
    assert f"entry point {name} = {value} of group {group} is missing" in problems
    assert len(problems) == (1 if change == "missing" else 2)


@pytest.mark.parametrize("name", sorted(name for name in FILES if not name.endswith(".py")))
def test_every_data_file_counts(name: str) -> None:
    problems = differences((FILES - {name}) | METADATA, written(DECLARED), files=FILES, project=PROJECT)
    assert problems == [f"{name} is missing"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda names: names - {"attnguide/guiding/guide.py"}, "attnguide/guiding/guide.py is missing"),
        (lambda names: names | {"tests/conftest.py"}, "tests/conftest.py does not belong in it"),
        (lambda names: names | {"attnguide/notes.txt"}, "attnguide/notes.txt does not belong in it"),
        (
            lambda names: {name for name in names if "LICENSE" not in name},
            "license file LICENSE is missing",
        ),
    ],
    ids=["no module", "tests inside", "a stray file", "no license"],
)
def test_modules_and_strays(change: Callable[[set[str]], set[str]], problem: str) -> None:
    assert differences(change(FILES | METADATA), written(DECLARED), files=FILES, project=PROJECT) == [problem]


def test_what_is_installed_here_declares_the_same() -> None:
    installed = {
        (point.group, point.name, point.value)
        for point in entry_points(group="attnguide")
        if point.dist is not None and point.dist.name == "attnguide"
    }
    assert {(group, name) for group, name, _ in installed} == {
        (group, name) for group, name, _ in DECLARED if group == "attnguide"
    }
