"""The packages of the plugins: public names, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from types import ModuleType

import pytest

PACKAGES = (
    "attnguide_action_units",
    "attnguide_gradcam_iou",
    "attnguide_multichannel",
    "attnguide_segmentation",
)


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names(name: str) -> None:
    package = import_module(name)
    assert package.__all__
    for public in package.__all__:
        assert getattr(package, public) is not None
        assert public in dir(package)
    with pytest.raises(AttributeError, match=rf"{name}.*guidance"):
        _ = package.guidance


def test_a_package_and_a_function_of_one_name() -> None:
    package = import_module("attnguide_gradcam_iou")
    assert isinstance(package.finetune, ModuleType)
    assert callable(package.finetune.finetune)
    assert package.prepare is package.finetune.prepare


@pytest.mark.parametrize("name", [*PACKAGES, "attnguide_gradcam_iou.finetune"])
def test_a_package_costs_no_torch(name: str) -> None:
    code = f"import sys, {name}; bad = {{'torch', 'numpy'}} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", PACKAGES)
def test_modules_are_public_by_a_name_or_internal(name: str) -> None:
    """A module whose names are not public has an underscore; of a package, the docstring says "Internal:"."""
    package = import_module(name)
    assert package.__file__ is not None
    folder = import_module("pathlib").Path(package.__file__).parent
    stubs = "".join(stub.read_text(encoding="utf-8") for stub in folder.rglob("*.pyi"))
    for module in folder.glob("**/*.py"):
        steps = module.relative_to(folder).with_suffix("").parts
        inside = (folder.joinpath(*steps[:1]) / "__init__.py") if len(steps) > 1 else None
        if inside is not None and '"""Internal:' in inside.read_text(encoding="utf-8"):
            continue
        if steps[-1].startswith("_") or steps == ("plugin",):
            continue
        assert f"from .{steps[-1]} import" in stubs, f"{'.'.join(steps)} is neither public nor internal"
