"""Compares a wheel with the project that it was built from: its files and its entry points, all of them."""

from __future__ import annotations

import configparser
import subprocess
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

#: (group, name, value), as in `entry_points.txt`.
EntryPoint = tuple[str, str, str]


def declared_entry_points(project: Mapping[str, Any]) -> set[EntryPoint]:
    """Entry points of a parsed `pyproject.toml`: its scripts, and those of every group."""
    table = project["project"]
    groups = {
        "console_scripts": table.get("scripts", {}),
        "gui_scripts": table.get("gui-scripts", {}),
        **table.get("entry-points", {}),
    }
    return {(group, name, value) for group, points in groups.items() for name, value in points.items()}


def packaged_entry_points(text: str) -> set[EntryPoint]:
    """Entry points in the text of an `entry_points.txt`."""
    parser = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
    parser.read_string(text)
    return {(group, name, value) for group in parser.sections() for name, value in parser[group].items()}


def tracked_files(root: Path = ROOT) -> set[str]:
    """Files under version control in `src/` and `plugins/`, by their names in the wheel.

    Outside a repository, such as in an unpacked source distribution: all files but what Python compiled.
    """
    folders = ("src", "plugins")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *folders],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode == 0 and listing.stdout:
        files = [name for name in listing.stdout.split("\0") if name and (root / name).is_file()]
    else:
        files = [
            path.relative_to(root).as_posix()
            for folder in folders
            for path in (root / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        ]
    return {name.partition("/")[2] for name in files}


def differences(
    names: Iterable[str],
    entry_points: str,
    *,
    files: Iterable[str],
    project: Mapping[str, Any],
) -> list[str]:
    """Describe what a wheel lacks, and what it should not hold.

    Args:
        names: Names of the wheel's members.
        entry_points: Text of its `entry_points.txt`.
        files: What it must hold besides its metadata, and nothing else.
        project: The parsed `pyproject.toml`.

    Returns:
        One line for each difference; none for a wheel that is complete.
    """
    names, files = set(names), set(files)
    metadata = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    problems = [f"{name} is missing" for name in sorted(files - names)]
    problems += [f"{name} does not belong in it" for name in sorted(names - files - metadata)]
    for license_file in project["project"].get("license-files", ()):
        if not any(name.endswith(f".dist-info/licenses/{license_file}") for name in metadata):
            problems.append(f"license file {license_file} is missing")
    declared, packaged = declared_entry_points(project), packaged_entry_points(entry_points)
    for missing in sorted(declared - packaged):
        problems.append("entry point {1} = {2} of group {0} is missing".format(*missing))
    for extra in sorted(packaged - declared):
        problems.append("entry point {1} = {2} of group {0} is not declared".format(*extra))
    return problems


def check_wheel(path: Path, root: Path = ROOT) -> list[str]:
    """Describe how a built wheel differs from the project in `root`."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        points = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        text = archive.read(points[0]).decode() if points else ""
    return differences(names, text, files=tracked_files(root), project=project)
