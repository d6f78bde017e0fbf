"""Importing the package, declaring parts and listing them costs no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import attnguide as ag


@pytest.mark.parametrize(
    "code",
    [
        "import attnguide",
        "import attnguide; attnguide.hookimpl, attnguide.Part, attnguide.AttnGuideError",
        "import attnguide.parts.hookspecs",
        "import attnguide.parts.standard; attnguide.parts.standard.attnguide_parts()",
        "from attnguide.parts.registry import registry; assert 'mask' in registry().names('prior')",
        "import attnguide.errors",
    ],
)
def test_without_torch(code: str) -> None:
    check = (
        "import sys; bad = {'torch', 'torchvision', 'timm', 'numpy'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\n{check}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name in ag.__all__ if name != "metrics"])
def test_every_public_name_exists(name: str) -> None:
    assert getattr(ag, name) is not None
    assert name in dir(ag)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match=r"attnguide.*guidance"):
        _ = ag.guidance


def test_names_do_not_change_their_meaning_with_what_is_imported_first() -> None:
    code = """
import attnguide as ag
first = {name: getattr(ag, name) for name in ag.__all__ if name != "metrics"}
import attnguide.guiding.guide, attnguide.parts.registry, attnguide.explanation
import attnguide.guiding.check, attnguide.visual
assert all(getattr(ag, name) is value for name, value in first.items())
"""
    other = "import attnguide.parts.registry, attnguide.guiding.guide, attnguide.explanation\n" + code
    for program in (code, other + "assert ag.registry().names('prior')"):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
