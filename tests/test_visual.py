"""Colours, overlays and contact sheets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from attnguide import visual
from attnguide.errors import InputError


def test_colours_run_from_cold_to_hot_and_get_brighter() -> None:
    colours = visual.colorize(torch.linspace(0, 1, 50).reshape(1, 1, 50))
    assert colours.shape == (1, 3, 1, 50)
    assert 0 <= float(colours.min()) <= float(colours.max()) <= 1
    brightness = (colours[0, :, 0] * torch.tensor([0.3, 0.6, 0.1])[:, None]).sum(dim=0)
    assert bool((brightness.diff() > 0).all())
    torch.testing.assert_close(visual.colorize(torch.tensor([[-5.0, 9.0]])), colours[0, :, :, [0, -1]])


def test_an_overlay_mixes_the_colours_of_the_map_with_the_image() -> None:
    images = torch.full((1, 3, 8, 8), 0.5)
    maps = torch.zeros(1, 2, 4, 4)
    maps[:, 0, :, :2], maps[:, 1] = 1, 1
    hot = visual.colorize(torch.ones(1, 1))[:, 0, 0]
    for alpha in (0.0, 0.5, 1.0):
        pictures = visual.overlay(images, maps, alpha=alpha).float() / 255
        assert pictures.shape == (1, 2, 3, 8, 8)
        expected = (1 - alpha) * 0.5 + alpha * hot
        for place in (pictures[0, 0, :, 0, 0], pictures[0, 1, :, 7, 7]):
            torch.testing.assert_close(place, expected, atol=0.003, rtol=0)
        assert bool((pictures[0, 0, :, 0, 0] == pictures[0, 0, :, 0, 7]).all()) == (alpha == 0)


def test_displayable_spans_0_to_1_each() -> None:
    images = torch.randn(3, 3, 8, 8) * 40 - 7
    shown = visual.displayable(images)
    assert shown.amin(dim=(1, 2, 3)).tolist() == [0, 0, 0]
    assert shown.amax(dim=(1, 2, 3)).tolist() == [1, 1, 1]
    assert not bool(visual.displayable(torch.ones(1, 3, 4, 4)).any())
    assert visual.displayable(torch.rand(2, 1, 4, 4)).shape == (2, 3, 4, 4)


def test_to_pil() -> None:
    assert visual.to_pil(torch.ones(3, 4, 6)).getpixel((5, 3)) == (255, 255, 255)
    assert visual.to_pil(torch.zeros(3, 4, 6, dtype=torch.uint8)).size == (6, 4)


@pytest.mark.parametrize(("count", "columns"), [(1, 0), (5, 0), (6, 2)])
def test_contact_sheet(count: int, columns: int) -> None:
    pictures = [Image.new("RGB", (30 + 10 * n, 50), (200, 0, 0)) for n in range(count)]
    page = visual.contact_sheet(pictures, columns=columns, cell=40)
    assert page.width >= 40
    captioned = visual.contact_sheet(pictures, ["a very long caption " * 9] * count, columns=columns, cell=40)
    assert captioned.height > page.height
    assert captioned.width == page.width
    if columns:
        assert page.height > page.width  # three rows of two


def test_contact_sheets_that_cannot_be() -> None:
    with pytest.raises(InputError, match="got 0 and 0"):
        visual.contact_sheet([])
    with pytest.raises(InputError, match="got 1 and 2"):
        visual.contact_sheet([Image.new("RGB", (4, 4))], ["a", "b"])


def test_captions_of_any_text_and_length() -> None:
    picture = Image.new("RGB", (8, 8))
    texts = ["a\nb", "\0", "\u2028", "\udcff", "word " * 5000, "i" * 100_000, "\u202ex", "é" * 30, ""]
    page = visual.contact_sheet([picture] * len(texts), texts, cell=64)
    assert page.size == visual.contact_sheet([picture] * len(texts), ["a"] * len(texts), cell=64).size


def test_captions_are_shortened_to_their_width() -> None:
    assert visual._fitted("abcdef", 6, len) == "abcdef"
    assert visual._fitted("abcdefg", 6, len) == "abcde…"
    assert visual._fitted("a\nb", 6, len) == "a b"
    assert visual._fitted("abc", 0.5, lambda text: 2 * len(text)) == ""


# ------------------------------------------------------------------ signed maps


def test_signed_colours_run_from_blue_through_white_to_red() -> None:
    against, middle, in_favour = visual.colorize(torch.tensor([[-1.0, 0.0, 1.0]]), signed=True)[:, 0].T
    assert against[2] > against[0] + 0.3  # blue over red
    assert in_favour[0] > in_favour[2] + 0.3
    assert float(middle.min()) > 0.9


def test_scaled_cuts_off_outliers_at_the_percentile() -> None:
    maps = torch.arange(1000.0).reshape(1, 20, 50)
    maps[0, -1, -1] = 1e9  # one pixel would leave all others black
    scaled = visual.scaled(maps, percentile=99, smooth=0)
    torch.testing.assert_close(scaled[0].flatten()[:990], torch.arange(990.0) / 989)
    assert bool((scaled[0].flatten()[990:] == 1).all())
    assert float(visual.scaled(maps, percentile=100, smooth=0)[0, 0, -1]) < 1e-6


def test_scaled_keeps_zero_where_it_was() -> None:
    maps = torch.tensor([[[-4.0, 0.0], [1.0, 2.0]]])
    expected = torch.tensor([[[-1.0, 0.0], [0.25, 0.5]]])
    torch.testing.assert_close(visual.scaled(maps, percentile=100, smooth=0), expected)
    unsigned = visual.scaled(maps, percentile=100, smooth=0, signed=False)
    torch.testing.assert_close(unsigned, torch.tensor([[[0.0, 4.0], [5.0, 6.0]]]) / 6)


def test_scaled_shows_the_few_values_of_a_map_of_zeros_and_nothing_of_a_flat_one() -> None:
    maps = torch.zeros(2, 50, 50)
    maps[0, 3, 4] = 2
    scaled = visual.scaled(maps, smooth=0)
    assert float(scaled[0, 3, 4]) == 1
    assert int((scaled > 0).sum()) == 1
    assert not bool(visual.scaled(torch.full((1, 5, 5), 3.0)).any())
    assert visual.scaled(torch.zeros(2, 0, 4, 4), size=(8, 8)).shape == (2, 0, 8, 8)


def test_scaled_smooths_as_a_gaussian_does() -> None:
    maps = torch.rand(1, 60, 80, generator=torch.Generator().manual_seed(0))
    expected = ndimage.gaussian_filter(maps[0].numpy(), 1.6, mode="mirror", radius=5)
    found = visual.scaled(maps, percentile=100, smooth=0.02)[0].numpy()
    np.testing.assert_allclose(
        found, (expected - expected.min()) / (expected.max() - expected.min()), atol=1e-5
    )


@pytest.mark.parametrize("wrong", [{"percentile": 0}, {"percentile": 101}, {"smooth": -1}, {"smooth": "a"}])
def test_scaled_refuses_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        visual.scaled(torch.rand(1, 4, 4), **wrong)


def test_a_signed_overlay_shows_the_image_where_the_map_is_zero() -> None:
    images = torch.full((1, 3, 4, 4), 0.4)
    maps = torch.zeros(1, 1, 4, 4)
    maps[..., 0, 0], maps[..., 3, 3] = 1, -1
    red, gray, blue = (visual.overlay(images, maps)[0, 0][:, n, n].tolist() for n in (0, 1, 3))
    assert red[0] > red[2] + 80
    assert blue[2] > blue[0] + 80
    assert len(set(gray)) == 1
    assert visual.overlay(images, maps, 0.0).unique().tolist() == [102]  # as it is


def test_a_legend_fits_its_page() -> None:
    page = Image.new("RGB", (500, 100), "white")
    assert visual.with_legend(page, "short", signed=True).size == (500, 120)
    assert visual.with_legend(page, "long " * 40).size == (500, 140)  # on a line of its own
    assert visual.with_legend(Image.new("RGB", (60, 60)), "long").width == 60
    assert visual.color_bar(10, 3, signed=True).size == (10, 3)


def test_show_calls_the_viewer_outside_of_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Image.Image] = []
    monkeypatch.setattr(Image.Image, "show", lambda picture: shown.append(picture))
    page = Image.new("RGB", (4, 4))
    visual.show(page)
    assert shown == [page]
