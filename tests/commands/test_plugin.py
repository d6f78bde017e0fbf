"""The template of plugins: what it writes passes its own tests, and the contract."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from tests.docs.pages import install

KINDS = [
    "prior",
    *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("source", "loss", "adapter", "command")),
]
Call = Callable[..., Result]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_passes_its_own_tests(call: Call, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "my-thing"
    call("plugin", "new", "my-thing", "--kind", kind, "--out", folder)
    install(folder)
    done = subprocess.run(
        # Where attnguide is not installed by an installer that knows its entry points, -p loads the plugin.
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "attnguide._pytest",
            "-W",
            "error",
            "-p",
            "no:cacheprovider",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
    listed = subprocess.run(
        [sys.executable, "-m", "attnguide", *(["my-thing", "--help"] if kind == "command" else ["plugins"])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "COLUMNS": "200"},
    )
    if kind == "command":
        assert "MASKS..." in listed.stdout
    else:
        assert [kind, "my_thing"] in [line.split()[:2] for line in listed.stdout.splitlines()]


def test_a_part_that_nobody_declares_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "attnguide._pytest", "--attnguide", "grad_kam"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 4
    assert "Did you mean 'grad_cam'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("My Part", "prior", "cannot be the name of a package"),
        ("torch", "prior", "is the name of another package"),
        ("class", "prior", "is the name of another package"),
        ("grad-cam", "source", "there is a source 'grad_cam' already"),
        ("explain", "command", "there is a command 'explain' already"),
    ],
)
def test_names_that_are_taken_or_impossible(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in " ".join(call("plugin", "new", name, "--kind", kind, status=2).output.split())
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call("plugin", "new", "my-thing", "--kind", "loss")
    before = (tmp_path / "my-thing/README.md").read_text()
    assert "exists" in call("plugin", "new", "my-thing", "--kind", "prior", status=2).output
    assert (tmp_path / "my-thing/README.md").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["my-thing"]
