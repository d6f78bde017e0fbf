"""Fixtures of pictures, models and plugins, and a way to call the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from tests.helpers.pictures import CLASSES, picture

from attnguide import models
from attnguide.cli.main import main
from attnguide.models.networks import small_cnn
from attnguide.parts.hookspecs import Part
from attnguide.parts.registry import Owned, Registry


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for index in range(5):
        picture(folder / f"{index}.png", index)
    return folder


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like the one that comes with the package: four attributes, 32 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = small_cnn(len(CLASSES), width=4, reduction=8)
        model.get_submodule("head").bias.data = torch.tensor([1.0, -1.0, 0.5, -2.0])
    path = tmp_path_factory.mktemp("weights") / "faces.safetensors"
    models.write_embedded(
        path,
        model,
        classes=CLASSES,
        size=32,
        width=4,
        reduction=8,
        mean=[0.5, 0.4, 0.3],
        std=[0.2, 0.25, 0.3],
    )
    return path


@pytest.fixture
def call() -> Callable[..., Result]:
    def run(*arguments: object, status: int | None = 0) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        if status is not None:
            assert result.exit_code == status, (result.output, result.exception)
            assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry that the command line uses, and to which a test may add parts."""
    parts = Registry()
    parts.load()
    for module in ("cli.main", "commands.plugins"):
        monkeypatch.setattr(f"attnguide.{module}.registry", lambda: parts)
    parts.broken.clear()
    return parts


def declare(plugins: Registry, name: str, path: str, owner: str = "extra (extra 1.0)") -> None:
    """Register a command as a plugin would."""
    plugins.parts["command", name].append(Owned(Part("command", name, path, "says hello"), owner))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep default output folders out of the repository."""
    monkeypatch.chdir(tmp_path)
