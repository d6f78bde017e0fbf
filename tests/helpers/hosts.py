"""Networks that carry the plugins' adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def nightly_vgg(names: Iterable[str]) -> list[Any]:
    """Cases of a test for networks by name: VGG's fully connected layers are large, so it runs at night."""
    return [
        pytest.param(name, marks=pytest.mark.nightly) if name.startswith("vgg") else name for name in names
    ]
