"""Regions that are found are kept in a folder, and what is not found is counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.models import batch, cnn
from torch import Tensor, nn

import attnguide as ag
from attnguide.capture.model_state import weights_digest
from attnguide.interfaces import PriorMaps
from attnguide.masks import read_mask
from attnguide.priors import FindingPrior
from attnguide.priors.finding import own_copy

IMAGES, LABELS, _ = batch()


class Bright(FindingPrior):
    """Finds what is brighter than a half, and counts how often it is asked."""

    asked = 0
    none_in: tuple[int, ...] = ()

    def find(self, images: Tensor, classes: Tensor) -> PriorMaps:
        self.asked += len(images)
        maps = (images.mean(dim=1) > 0.5).float()
        weights = torch.ones(len(images))
        weights[list(self.none_in)] = 0
        return PriorMaps(maps, weights)


def losses(prior: FindingPrior, model: nn.Module) -> Tensor:
    with ag.Guide(model, prior=prior) as guide:
        model(IMAGES)
        guide.loss(LABELS)
        return guide.records()[0].losses


def test_the_cache_gives_what_was_found_and_asks_once(tmp_path: Path) -> None:
    model, cached = cnn().eval(), Bright(tmp_path / "cache")
    expected = losses(Bright(), model)
    torch.testing.assert_close(losses(cached, model), expected)
    torch.testing.assert_close(losses(cached, model), expected)
    assert cached.asked == 4
    again = Bright(tmp_path / "cache")  # in another run
    torch.testing.assert_close(losses(again, model), expected)
    assert again.asked == 0
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 4
    shown = {read_mask(file).numpy().tobytes() for file in files}
    assert shown == {(image.mean(dim=0) > 0.5).float().numpy().tobytes() for image in IMAGES}
    # What somebody paints there counts from now on.
    Image.fromarray(np.full((32, 32), 255, dtype=np.uint8)).save(files[0])
    assert not torch.equal(losses(Bright(tmp_path / "cache"), model), expected)


def test_pairs_without_a_region_drop_out_and_are_counted(tmp_path: Path) -> None:
    model = cnn().eval()
    for cache in (None, tmp_path, tmp_path):
        prior = Bright(cache)
        prior.none_in = (1, 2)
        with pytest.warns(UserWarning, match="finds no region for 2 of 4 pairs"):
            assert len(losses(prior, model)) == 2
        assert len(losses(prior, model)) == 2  # warned once
        assert (prior.found, prior.missing) == (4, 4)


def test_a_copy_is_apart_from_the_model() -> None:
    model = cnn().train()
    nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
    copied = own_copy(model)
    assert weights_digest(copied) == weights_digest(model)
    assert not copied.training
    assert all(weight.grad is None and not weight.requires_grad for weight in copied.parameters())
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert weights_digest(copied) != weights_digest(model)
    with pytest.raises(ag.AttnGuideError, match=r"must be a torch\.nn\.Module"):
        own_copy("resnet18")
