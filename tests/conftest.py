"""What every test has in common: one thread, and the same random numbers each time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnguide.layers import _memory as memory

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # so that `from tests.helpers…` works however pytest is started
    sys.path.insert(0, str(ROOT))

from tests.contract.settings import (  # noqa: E402, F401  hooks of the contract
    pytest_attnguide_annotations,
    pytest_attnguide_beside,
    pytest_attnguide_settings,
)
from tests.helpers.ids import readable  # noqa: E402  behind the line that makes it importable
from tests.helpers.real_data import RealData  # noqa: E402

torch.set_num_threads(1)  # the models are small; threads would wait for each other


def pytest_make_parametrize_id(val: Any, argname: str) -> str | None:
    """Name a case by its content, not by a counter."""
    return readable(val)


@pytest.fixture(scope="session")
def real_data() -> RealData:
    """Photographs, digits and pretrained weights; a test that needs one that is missing is skipped."""
    return RealData.find()


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another has found, nor what the user of this machine has."""
    monkeypatch.setenv("ATTNGUIDE_CACHE", "off")
    memory.forget()
