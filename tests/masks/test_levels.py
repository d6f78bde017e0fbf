"""What an image file means as a mask."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.masks import paint, region, write

from attnguide.errors import DataError
from attnguide.masks import (
    read_mask,
)
from attnguide.masks._levels import is_gray, read_levels


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P"])
def test_luminance(tmp_path, mode):
    mask = read_mask(paint(tmp_path / "a.png", region(), mode))
    assert mask.dtype == torch.float32
    assert np.array_equal(mask, region() / 255)


def test_gray_is_graded(tmp_path):
    gray = np.array([[0, 51, 255]], dtype=np.uint8)
    assert np.allclose(read_mask(paint(tmp_path / "a.png", gray)), gray / 255)
    deep = Image.fromarray(np.array([[0, 13107, 65535]], dtype=np.uint16))
    assert np.allclose(read_mask(paint(tmp_path / "b.png", deep)), gray / 255)


def test_opacity_wins_whatever_the_colour(tmp_path):
    rgba = np.zeros((1, 3, 4))
    rgba[0, :, 3] = 0, 51, 255
    assert np.allclose(read_mask(paint(tmp_path / "a.png", rgba)), [[0, 0.2, 1]])


def test_full_opacity_says_nothing(tmp_path):
    rgba = np.stack([region()] * 3 + [np.full((4, 6), 255)], axis=-1)
    assert np.array_equal(read_mask(paint(tmp_path / "a.png", rgba)), region() / 255)


def test_transparent_palette_entry(tmp_path):
    image = Image.fromarray(region(value=1))
    image.putpalette([255, 255, 255, 0, 0, 0])
    assert np.array_equal(read_mask(paint(tmp_path / "a.png", image, transparency=0)), region() / 255)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_0_and_1(tmp_path, dtype):
    image = Image.fromarray(region(value=1).astype(dtype))
    assert np.array_equal(read_mask(paint(tmp_path / "a.png", image)), region() / 255)


def test_a_file_that_is_not_an_image(tmp_path):
    with pytest.raises(DataError, match=r"a\.png"):
        read_mask(write(tmp_path / "a.png", "hello"))


GREY = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4)


def test_grey_and_opacity(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    np.testing.assert_allclose(read_levels(tmp_path / "grey.png"), GREY / 255)
    painted = np.dstack([np.full((3, 4, 3), 200, np.uint8), GREY])
    Image.fromarray(painted).save(tmp_path / "alpha.png")
    np.testing.assert_allclose(read_levels(tmp_path / "alpha.png"), GREY / 255)


def test_labels_of_zero_and_one_are_not_nearly_black(tmp_path: Path) -> None:
    labels = (GREY > 100).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    np.testing.assert_array_equal(read_levels(tmp_path / "labels.png"), labels)


def test_what_is_gray(tmp_path: Path) -> None:
    assert [is_gray(Image.new(mode, (2, 2))) for mode in ("L", "I", "I;16", "RGB", "P", "LA")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png"):
        read_levels(tmp_path / "text.png")


# One region in many files -------------------------------------------------------------------------------


def scene(height=60, width=80):
    """A disc, as 0 and 1."""
    rows, columns = np.ogrid[:height, :width]
    return ((rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (height / 3) ** 2).astype(np.uint8)


def voc_palette():
    """Return VOC's colours by its published rule: the bits of the index, spread over the channels."""
    return [
        sum((index >> (3 * place + channel) & 1) << (7 - place) for place in range(3))
        for index in range(256)
        for channel in range(3)
    ]


def indexed(values, palette):
    image = Image.new("P", values.shape[::-1])
    image.putdata(values.flatten().tolist())
    image.putpalette(palette)
    return image


BINARY = {
    "VOC, class 1": lambda m: indexed(m, voc_palette()),
    "VOC, class 15": lambda m: indexed(m * 15, voc_palette()),
    "black palette": lambda m: indexed(m, [0] * 768),
    "CVAT": lambda m: (m[..., None] * np.array([250, 50, 83])).astype(np.uint8),
    "dark blue": lambda m: (m[..., None] * np.array([0, 0, 1])).astype(np.uint8),
    "1 bit": lambda m: Image.fromarray(m * 255).convert("1"),
    "grey with opacity": lambda m: Image.fromarray(m).convert("LA"),
    "one opacity": lambda m: np.dstack([m * 255] * 3 + [m * 0 + 128]),
    "cut out": lambda m: np.dstack([np.random.default_rng(0).integers(0, 255, (*m.shape, 3)), m * 255]),
    "half opaque": lambda m: np.dstack([m * 0 + 200, m * 0, m * 0, m * 128]),
    **{f"8 bits, {top}": lambda m, top=top: m * np.uint8(top) for top in (1, 2, 100, 128, 255)},
    **{
        f"16 bits, {top}": lambda m, top=top: Image.fromarray(m.astype(np.uint16) * np.uint16(top))
        for top in (1, 255, 4095, 65535)
    },
}


@pytest.mark.parametrize("name", BINARY)
def test_a_region_is_the_same_however_it_is_saved(tmp_path: Path, name: str) -> None:
    np.testing.assert_array_equal(read_levels(paint(tmp_path / "a.png", BINARY[name](scene()))), scene())


@pytest.mark.parametrize("top", [1, 255, 65535, 2**31 - 1])
def test_32_bits(tmp_path: Path, top: int) -> None:
    Image.fromarray(scene().astype(np.int32) * top).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_levels(tmp_path / "a.tif"), scene())
    Image.fromarray(scene() * np.float32(top)).save(tmp_path / "b.tif")
    np.testing.assert_array_equal(read_levels(tmp_path / "b.tif"), scene())


@pytest.mark.parametrize("quality", [50, 75, 100])
def test_jpeg_is_nearly_right(tmp_path: Path, quality: int) -> None:
    Image.fromarray(scene() * 255).convert("RGB").save(tmp_path / "a.jpg", quality=quality)
    levels = read_levels(tmp_path / "a.jpg")
    assert np.minimum(levels, scene()).sum() / np.maximum(levels, scene()).sum() > 0.97
    np.testing.assert_array_equal(levels > 0.5, scene())


def test_void_is_outside(tmp_path: Path) -> None:
    labels = scene() * 15
    labels[27:33] = np.where(labels[27:33] > 0, 255, 0)
    inside = labels == 15
    for mode in (None, "RGB"):
        image = indexed(labels, voc_palette())
        path = paint(tmp_path / f"{mode}.png", image, mode)
        np.testing.assert_array_equal(read_levels(path), inside)
    path = paint(tmp_path / "clear.png", indexed(labels, voc_palette()), transparency=0)
    np.testing.assert_array_equal(read_levels(path), inside)


def test_soft_masks(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:60, :80]
    bump = np.exp(-((rows - 30) ** 2 + (columns - 40) ** 2) / 400)
    Image.fromarray((bump * 255).round().astype(np.uint8)).save(tmp_path / "a.gif")  # a palette of greys
    Image.fromarray((bump * 65535).round().astype(np.uint16)).save(tmp_path / "b.png")
    Image.fromarray(bump.astype(np.float32)).save(tmp_path / "c.tif")
    for name in ("a.gif", "b.png", "c.tif"):
        np.testing.assert_allclose(read_levels(tmp_path / name), bump, atol=0.5 / 255)


def two_classes():
    second = np.zeros_like(scene())
    second[2:9, 2:20] = 1
    return scene(), second


NOT_ONE_REGION = [
    (lambda m, n: indexed(m + 2 * n, voc_palette()), r"3 values.*0 \(#000000\): \d+, 1 \(#800000\): \d+"),
    (lambda m, n: indexed(m + 2 * n, voc_palette()).convert("RGB"), r"#000000: \d+, #008000: 126, #800000"),
    (lambda m, n: m + 2 * n, r"0: \d+, 1: \d+, 2: 126\. Say which mean inside"),
    (lambda m, n: m * 127 + n * 255, r"0: \d+, 127: \d+, 255: 126"),
    (lambda m, n: m + 255 * n, "several regions, not one"),
    (lambda m, n: Image.fromarray(m * np.uint16(1000) + n * np.uint16(60000)), "several regions, not one"),
    (lambda m, n: np.dstack([m * 255, n * 255, m * 0, (m + n) * 255]), "transparent layer: several regions"),
    (lambda m, n: m + 1, r"none of which is clearly the background.*1: \d+, 2: \d+"),
    (lambda m, n: m * 0 + 37, "1 value, none"),
    (lambda m, n: np.where(m[..., None], [255, 0, 0], 255), r"none.*#ff0000: \d+, #ffffff: \d+"),
    (lambda m, n: indexed(m, [255, 255, 255, 0, 0, 0]), "index 0, the background, is the brighter one"),
    (lambda m, n: np.dstack([m * 255, m * 0, m * 0, m * 0]), "transparent throughout"),
]


@pytest.mark.parametrize(("values", "message"), NOT_ONE_REGION)
def test_what_is_inside_must_be_clear(tmp_path: Path, values, message: str) -> None:
    path = paint(tmp_path / "a.png", values(*two_classes()))
    with pytest.raises(DataError, match=message) as error:
        read_levels(path)
    assert str(path) in str(error.value)


def test_faint_masks_are_refused(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 80).round(), (60, 1))
    for name, image in (
        ("a.png", Image.fromarray((ramp * 0.4).astype(np.uint8))),
        ("b.png", Image.fromarray(ramp.astype(np.uint16))),  # 8 bits in a file of 16
        ("c.tif", Image.fromarray((ramp / 1000).astype(np.float32))),
        ("d.png", Image.fromarray((ramp / 2 + 127).astype(np.uint8))),
    ):
        image.save(tmp_path / name)
        with pytest.raises(DataError, match=rf"{name} is graded from .* inside="):
            read_levels(tmp_path / name)
    paint(tmp_path / "e.jpg", scene())
    with pytest.raises(DataError, match="graded from 0 to"):
        read_levels(tmp_path / "e.jpg")
    np.testing.assert_allclose(read_levels(tmp_path / "a.png", "gray"), (ramp * 0.4).astype(int) / 255)


def test_several_pages(tmp_path: Path) -> None:
    pages = [Image.fromarray(values * 255) for values in two_classes()]
    for name in ("a.tif", "a.gif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(DataError, match="2 pages or frames"):
            read_levels(tmp_path / name)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    Image.fromarray(np.where(scene(), 1, np.nan).astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="not finite"):
        read_levels(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_photographs_are_not_masks(tmp_path: Path, mode: str) -> None:
    from skimage.data import astronaut

    path = paint(tmp_path / "face.png", Image.fromarray(astronaut()), mode)
    with pytest.raises(DataError, match=r"face\.png has \d+ (colours|grey values).* looks like a photograph"):
        read_levels(path)


def test_16_bits_in_colour(tmp_path: Path) -> None:
    """Pillow keeps the upper half of such values: 255 becomes 0, and 65535 255."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width = scene().shape
    for top in (255, 65535):
        pixels = np.repeat(scene().astype(np.uint16)[..., None] * np.uint16(top), 3, axis=2).astype(">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in pixels)
        (tmp_path / f"{top}.png").write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b"")
        )
    np.testing.assert_array_equal(read_levels(tmp_path / "65535.png"), scene())
    with pytest.raises(DataError, match="16 bits per colour channel"):
        read_levels(tmp_path / "255.png")


# Saying what is inside ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inside", "classes"),
    [
        (1, (1,)),
        ([1, 2], (1, 2)),
        ("1,2", (1, 2)),
        ("1-7", (1, 2)),
        ("#008000", (2,)),
        (["#800000", 2], (1, 2)),
        (9, ()),
    ],
)
def test_inside(tmp_path: Path, inside, classes) -> None:
    first, second = two_classes()
    labels = first + 2 * second
    path = paint(tmp_path / "a.png", indexed(labels, voc_palette()))
    np.testing.assert_array_equal(read_levels(path, inside), np.isin(labels, classes))


def test_inside_of_other_kinds_of_images(tmp_path: Path) -> None:
    first, second = two_classes()
    deep = paint(tmp_path / "a.png", Image.fromarray(first * np.uint16(1000) + second * np.uint16(60000)))
    np.testing.assert_array_equal(read_levels(deep, 60000), second)
    gray = paint(tmp_path / "b.png", first + 2 * second, "RGB")
    np.testing.assert_array_equal(read_levels(gray, 2), second)
    color = paint(tmp_path / "c.png", indexed(first, voc_palette()), "RGB")
    with pytest.raises(DataError, match="Give colours as #rrggbb"):
        read_levels(color, 1)
    with pytest.raises(DataError, match="no colours"):
        read_levels(deep, "#ff0000")
