"""The standard parts are classes that users import from their packages."""

from __future__ import annotations

import inspect
from functools import partial
from importlib import import_module

import captum.attr
import pytest
import pytorch_grad_cam
import zennit.composites
from tests.helpers.parts import standard

from attnguide.interfaces import AlignmentLoss, AttributionSource, TargetPrior
from attnguide.parts.hookspecs import KINDS, Kind, Part
from attnguide.parts.registry import registry
from attnguide.parts.standard import CAMS, CAPTUM_OF_IMAGES, CAPTUM_OF_LAYERS, ZENNIT, attnguide_parts

PARTS = [part for part in attnguide_parts() if part.kind != "recipe"]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.kind} {part.name}")
def test_a_part_is_imported_from_its_package(part: Part) -> None:
    module, attribute = part.path.split(":")
    factory = getattr(import_module(module), attribute)
    if isinstance(factory, partial):  # a method of another library
        assert factory.args == (attribute,)
        factory = factory.func
    assert isinstance(factory, type)
    package = import_module(module.rpartition(".")[0])
    assert getattr(package, factory.__name__) is factory
    assert factory.__name__ in package.__all__


def test_every_method_of_captum_is_a_part() -> None:
    names = {part.name for part in PARTS if part.name.startswith("captum:")}
    assert names == {f"captum:{method}" for method in (*CAPTUM_OF_IMAGES, *CAPTUM_OF_LAYERS)}


def test_every_method_of_pytorch_grad_cam_and_zennit_is_a_part() -> None:
    others = ("AblationLayer", "AblationLayerFasterRCNN", "AblationLayerVit", "GuidedBackpropReLUModel")
    cams = {name for name, kind in vars(pytorch_grad_cam).items() if hasattr(kind, "forward")}
    assert cams - {*others} == {*CAMS}
    composites = {kind.__name__ for kind in zennit.composites.COMPOSITES.values()}
    assert composites == {*ZENNIT}


INTERFACES: dict[Kind, type] = {"source": AttributionSource, "prior": TargetPrior, "loss": AlignmentLoss}


@pytest.mark.parametrize("kind", INTERFACES)
def test_parts_implement_their_interface(kind: Kind) -> None:
    for name in standard(kind):
        part = registry().create(kind, name, INTERFACES[kind])
        assert isinstance(part, INTERFACES[kind])
        assert repr(part)
        assert inspect.getdoc(type(part))


def test_declarations_are_complete_and_unique() -> None:
    parts = attnguide_parts()
    assert len({(part.kind, part.name) for part in parts}) == len(parts)
    assert {part.kind for part in parts} <= set(KINDS)
    assert all(part.summary and not part.summary.endswith(".") for part in parts)


def test_captums_names_are_captums() -> None:
    assert all(hasattr(captum.attr, name) for name in (*CAPTUM_OF_IMAGES, *CAPTUM_OF_LAYERS))
    assert not set(CAPTUM_OF_IMAGES) & set(CAPTUM_OF_LAYERS)
