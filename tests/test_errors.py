"""Errors offer the nearest name, and can be caught as what a caller expects."""

from __future__ import annotations

import pickle

import pytest

from attnguide import errors
from attnguide.errors import AttnGuideError, UnknownNameError, nearest


def test_the_nearest_name_is_offered() -> None:
    assert nearest("grad_kam", ["grad_cam", "mask"]) == " Did you mean 'grad_cam'? Known: grad_cam, mask."
    assert nearest("zzz", ["grad_cam", "mask"]) == " Known: grad_cam, mask."
    assert nearest("zzz", []) == " There are none."
    assert nearest("x", [f"n{index}" for index in range(5)], limit=2) == " Known: n0, n1, … (3 more)."


def test_an_unknown_name_knows_what_there_is() -> None:
    error = UnknownNameError("prior", "masc", ["mask", "boxes"])
    assert (error.kind, error.name, error.known) == ("prior", "masc", ["boxes", "mask"])
    assert str(error).startswith("unknown prior 'masc'. Did you mean 'mask'?")


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [("InputError", ValueError), ("LayerError", LookupError), ("GuidanceError", RuntimeError)],
)
def test_errors_are_those_that_a_caller_expects(kind: str, builtin: type[Exception]) -> None:
    error = getattr(errors, kind)
    assert issubclass(error, AttnGuideError)
    assert issubclass(error, builtin)
    assert str(pickle.loads(pickle.dumps(error("what, value, remedy")))) == "what, value, remedy"
