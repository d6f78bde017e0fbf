"""Figures of what SSP has learned: the numbers behind them, and the pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.helpers.models import CLASSES, batch, cnn

from attnguide import visual
from attnguide.errors import InputError
from attnguide_segmentation import figures
from attnguide_segmentation.adapted import attach

IMAGES = batch()[0]


def halves(images: torch.Tensor) -> torch.Tensor:
    """Seven regions, one column of the image after the other."""
    labels = torch.arange(images.shape[-1]) * 7 // images.shape[-1]
    one_hot = torch.nn.functional.one_hot(labels, 7).T.float()
    return one_hot[None, :, None].expand(len(images), 7, *images.shape[-2:])


def test_weights_of_regions_are_shares() -> None:
    model = cnn().eval()
    with attach(model, IMAGES, "ssp", regions=halves) as adapted:
        weights = figures.region_weights(adapted, IMAGES)
    assert weights.shape == (4, 7, CLASSES)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(4, CLASSES))
    with (
        attach(model, IMAGES, "pyramid") as adapted,
        pytest.raises(InputError, match="no SSP on the model"),
    ):
        figures.region_weights(adapted, IMAGES)


def test_the_picture_of_weights_is_written(tmp_path: Path) -> None:
    figures.weights_figure(torch.rand(7, 3), ["smiling", "bald", "bangs"], str(tmp_path / "weights.png"))
    with Image.open(tmp_path / "weights.png") as picture:
        assert min(picture.size) > 100
        assert len(picture.convert("RGB").getcolors(2**20)) > 50  # type: ignore[arg-type]


def test_the_most_active_channels_come_first() -> None:
    features = torch.rand(9, 4, 5)
    chosen = figures.top_channels(features, 3)
    order = sorted(range(9), key=lambda channel: -float(features[channel].max()))[:3]
    for found, channel in zip(chosen, order, strict=True):
        plain = features[channel]
        torch.testing.assert_close(found, (plain - plain.min()) / (plain.max() - plain.min()))


def test_regions_and_maps_in_colour() -> None:
    labels = torch.randint(7, (2, 4, 6))
    pictures = figures.colors(labels)
    masks = torch.nn.functional.one_hot(labels, 7).movedim(-1, 1).float()
    assert torch.equal(figures.colors(masks), pictures)
    assert figures.colors(labels, (8, 12))[:, :, ::2, ::2].equal(pictures)
    assert len({tuple(color) for color in pictures.movedim(1, -1).reshape(-1, 3).tolist()}) == len(
        labels.unique()
    )
    maps = torch.rand(5, 4, 6)
    page = figures.sheet(maps, columns=3)
    assert page.shape == (3, 8, 18)
    torch.testing.assert_close(page[:, 4:, 6:12], visual.colorize(maps[4:])[0])
