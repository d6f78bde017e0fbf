"""Every standard part is what its declaration says."""

from __future__ import annotations

import inspect

import captum.attr
import pytest
from tests.helpers.parts import standard

from attnguide.interfaces import AlignmentLoss, AttributionSource, TargetPrior
from attnguide.parts.hookspecs import KINDS, Kind
from attnguide.parts.registry import registry
from attnguide.parts.standard import CAPTUM_OF_IMAGES, CAPTUM_OF_LAYERS, attnguide_parts

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
