"""What the contract has to know of the parts of the plugins in this repository."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from tests.helpers.clip import clip, tokenizer
from torch import Tensor, nn

from attnguide.data.procedural.faces import ProceduralFaces
from attnguide.testing import tiny_vit


def _mean_of_channels() -> nn.Module:
    network = nn.Conv2d(3, 1, 1)
    nn.init.constant_(network.weight, 1)
    nn.init.constant_(network.bias, -1.5)
    return network


def _small_transformer() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_vit()


# What parts have to be told about the model of the contract; the other adapters have tests of their own.
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("prior", "teacher"): {"source": "cam"},  # which always shows something
    # Noise has no object: a network that calls bright pixels one, and features that differ enough for a cut.
    ("prior", "segmenter"): {"model": _mean_of_channels()},
    ("prior", "token_cut"): {"model": _small_transformer(), "similarity": 0.7},
    ("prior", "text"): {"words": "a bird", "model": clip(), "tokenizer": tokenizer()},
    ("prior", "action_units"): {"classes": ["surprise", "fear", "happiness", "sadness"]},
    ("prior", "segmentation"): {"classes": ["smiling", "blond_hair", "pointy_nose", "eyeglasses"]},
    ("adapter", "pyramid"): {"channels": 16, "classes": 4},
    ("adapter", "multichannel"): {"channels": 16, "classes": 4},
}


@pytest.hookimpl(trylast=True)
def pytest_attnguide_annotations(name: str) -> Any:
    if name == "landmarks":
        return ProceduralFaces(4, size=32).stack().landmarks
    if name == "regions":
        return torch.arange(32).mul(7).div(32, rounding_mode="floor").expand(4, 32, 32)
    return None


def pytest_attnguide_settings(kind: str, name: str) -> dict[str, Any] | None:
    return SETTINGS.get((kind, name))


def pytest_attnguide_beside(
    source: str, model: nn.Module, images: Tensor
) -> AbstractContextManager[None] | None:
    return _attached(model, images) if source == "multichannel" else None


@contextmanager
def _attached(model: nn.Module, images: Tensor) -> Iterator[None]:
    from attnguide_multichannel import adapted as multichannel

    with torch.random.fork_rng():
        guide = multichannel.attach(model, images)
    with guide:
        yield
