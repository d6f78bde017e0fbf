"""Colours, overlays and contact sheets."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

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
