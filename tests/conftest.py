"""What every test has in common: one thread, and the same random numbers each time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from attnguide.layers import _memory as memory

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # so that `from tests.helpers…` works however pytest is started
    sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)  # the models are small; threads would wait for each other


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another has found, nor what the user of this machine has."""
    monkeypatch.setenv("ATTNGUIDE_CACHE", "off")
    memory.forget()
