"""Attributes are as frequent, and agree as often, as they are set to."""

from __future__ import annotations

import numpy as np
import pytest

from attnguide.data.procedural._attributes import AttributeModel
from attnguide.data.procedural.faces import ATTRIBUTES
from attnguide.errors import InputError, UnknownNameError

MANY = 20000


def column(values: np.ndarray, name: str) -> np.ndarray:
    return values[:, ATTRIBUTES.index(name)]


def test_frequencies_and_agreement() -> None:
    model = AttributeModel({("smiling", "lipstick"): 0.9}, {"smiling": 0.4, "lipstick": 0.35})
    values, expressions = model.sample(MANY, seed=1)
    assert values.shape == (MANY, len(ATTRIBUTES))
    assert expressions.shape == (MANY,)
    smiling, lipstick = column(values, "smiling"), column(values, "lipstick")
    error = 4 * 0.5 / MANY**0.5
    assert smiling.mean() == pytest.approx(0.4, abs=error)
    assert lipstick.mean() == pytest.approx(0.35, abs=error)
    assert (smiling == lipstick).mean() == pytest.approx(0.9, abs=error)
    for name, expected in model.prevalence.items():
        assert column(values, name).mean() == pytest.approx(expected, abs=error), name


def test_a_face_does_not_depend_on_how_many_there_are() -> None:
    few, many = (AttributeModel().sample(n, seed=3)[0] for n in (7, 50))
    np.testing.assert_array_equal(few, many[:7])


def test_forced_values_and_what_contradicts() -> None:
    values, _ = AttributeModel(force={"bald": True}).sample(200, seed=0)
    assert column(values, "bald").all()
    assert not column(values, "blond_hair").any()
    assert not column(values, "bangs").any()
    with pytest.raises(UnknownNameError, match="smiling"):
        AttributeModel(force={"smilling": True})
    with pytest.raises(InputError):
        AttributeModel(force={"bald": True, "bangs": True})
    with pytest.raises(InputError, match="at most 1"):
        AttributeModel(prevalence={"black_hair": 0.8, "blond_hair": 0.5})
