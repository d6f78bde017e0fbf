"""When values on an accelerator may be read, which makes the host wait for it.

Checks of values are worth a wait once, at the first step of a training, and never again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["may_read", "reading"]


class _State(threading.local):
    depth = 0


_state = _State()


def may_read(tensor: Tensor) -> bool:
    """Whether a value of this tensor may be read now: always on the CPU, elsewhere if a caller allows it.

    While a model is exported or compiled there are no values.
    """
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return tensor.device.type == "cpu" or _state.depth > 0


@contextmanager
def reading(allowed: bool = True) -> Iterator[None]:
    """Allow values to be read in this thread, wherever they are."""
    _state.depth += allowed
    try:
        yield
    finally:
        _state.depth -= allowed
