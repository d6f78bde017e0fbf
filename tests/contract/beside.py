"""What has to be on a model before a source can show it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attnguide_multichannel import adapted as multichannel


@contextmanager
def beside(source: str, model: nn.Module, images: Tensor) -> Iterator[None]:
    """Put on the model the adapter that a source shows, if it shows one."""
    if source != "multichannel":
        yield
        return
    with torch.random.fork_rng():
        guide = multichannel.attach(model, images)
    with guide:
        yield
