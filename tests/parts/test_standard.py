"""The standard parts are classes that users import from their packages."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import pytest

from attnguide.parts.hookspecs import Part
from attnguide.parts.standard import CAPTUM_OF_IMAGES, CAPTUM_OF_LAYERS, attnguide_parts

PARTS = [part for part in attnguide_parts() if part.kind != "recipe"]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.kind} {part.name}")
def test_a_part_is_imported_from_its_package(part: Part) -> None:
    module, attribute = part.path.split(":")
    factory = getattr(import_module(module), attribute)
    if isinstance(factory, partial):  # a method of captum
        assert factory.args == (attribute,)
        factory = factory.func
    assert isinstance(factory, type)
    package = import_module(module.rpartition(".")[0])
    assert getattr(package, factory.__name__) is factory
    assert factory.__name__ in package.__all__


def test_every_method_of_captum_is_a_part() -> None:
    names = {part.name for part in PARTS if part.name.startswith("captum:")}
    assert names == {f"captum:{method}" for method in (*CAPTUM_OF_IMAGES, *CAPTUM_OF_LAYERS)}
