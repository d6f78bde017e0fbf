from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attnguide.data.files import atomic_write, natural_key, read_json, read_text
from attnguide.data.images import (
    decode_image,
    find_images,
    gray_levels,
    image_size,
    load_image,
    open_image,
    read_image,
    save_picture,
)
from attnguide.errors import DataError, InputError

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def save(path, pixels=RGB, mode=None, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def pixels(path, **options):
    image = read_image(path, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def png_header(width, height):
    """A PNG that declares a size and holds no pixel."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


# Reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm"])
def test_rgb_is_read_as_it_is(tmp_path, suffix):
    assert np.array_equal(pixels(save(tmp_path / f"a{suffix}")), RGB)


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".gif"])
def test_other_formats(tmp_path, suffix):
    color = np.full((16, 16, 3), (200, 100, 50), dtype=np.uint8)
    assert np.abs(pixels(save(tmp_path / f"a{suffix}", color)).astype(int) - color).max() <= 3


def test_the_content_decides_not_the_suffix(tmp_path):
    assert np.array_equal(pixels(save(tmp_path / "a.jpg", format="PNG")), RGB)


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, RGB),
        (2, RGB[:, ::-1]),
        (3, RGB[::-1, ::-1]),
        (4, RGB[::-1]),
        (5, RGB.transpose(1, 0, 2)),
        (6, np.rot90(RGB)),
        (7, RGB[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(RGB, -1)),
    ],
)
def test_exif_orientation(tmp_path, orientation, stored):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(save(tmp_path / "a.png", np.ascontiguousarray(stored), exif=exif)), RGB)
    assert image_size(tmp_path / "a.png") == RGB.shape[:2]


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    expected = [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    assert pixels(save(tmp_path / "a.png", rgba)).tolist() == expected


def test_gray_with_alpha(tmp_path):
    la = Image.merge("LA", [Image.new("L", (2, 2), 0), Image.new("L", (2, 2), 51)])
    assert (pixels(save(tmp_path / "a.png", la)) == 204).all()


def test_palette_with_transparent_entries(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    path = save(tmp_path / "a.png", image, transparency=bytes([255, 0]))
    assert pixels(path).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_one_transparent_color(tmp_path):
    path = save(tmp_path / "a.png", RGB, transparency=tuple(map(int, RGB[2, 3])))
    expected = RGB.copy()
    expected[2, 3] = 255
    assert np.array_equal(pixels(path), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_modes_without_transparency(tmp_path, mode):
    image = Image.fromarray(RGB).convert(mode)
    assert np.array_equal(pixels(save(tmp_path / "a.png", image)), image.convert("RGB"))


def test_cmyk(tmp_path):
    image = Image.fromarray(RGB).convert("CMYK")
    assert np.array_equal(pixels(save(tmp_path / "a.tif", image)), image.convert("RGB"))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    gray = np.array([[0, 257, 65535, 32896, 128]], dtype=np.uint16)
    path = save(tmp_path / f"a{suffix}", gray)
    assert pixels(path)[0, :, 0].tolist() == [0, 1, 255, 128, 0]
    assert np.array_equal(gray_levels(load_image(path), path), gray / 65535)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1], [0, 255]),  # a drawing in black and white
        ([0, 5, 10, 15], [0, 85, 170, 255]),  # 4 bits
        ([0, 51, 128, 255], [0, 51, 128, 255]),  # 8 bits
        ([0, 819, 4095], [0, 51, 255]),  # a scan of 12 bits
        ([0, 4096, 16383], [0, 64, 255]),  # 14 bits
        ([0, 16384, 32768], [0, 64, 128]),  # all 16, but not the highest of them
        ([0, 0], [0, 0]),
    ],
)
def test_deep_grays_are_scaled_by_the_depth_that_they_use(tmp_path, suffix, values, expected):
    path = save(tmp_path / f"a{suffix}", np.array([values], dtype=np.uint16))
    assert pixels(path)[0, :, 0].tolist() == expected
    wide = save(tmp_path / "wide.tif", np.array([values], dtype=np.int32))
    assert pixels(wide)[0, :, 0].tolist() == expected


def deep_color(path, values):
    """Write a PNG of one row with three channels of 16 bits, which Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"".join(struct.pack(">3H", *color) for color in values)
    header = struct.pack(">IIBBBBB", len(values), 1, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_deep_colors(tmp_path):
    bright = deep_color(tmp_path / "a.png", [(0, 257 * 9, 65535), (65535, 257, 0)])
    assert pixels(bright).tolist() == [[[0, 9, 255], [255, 1, 0]]]
    assert not pixels(deep_color(tmp_path / "b.png", [(0, 0, 0)])).any()
    scan = deep_color(tmp_path / "c.png", [(0, 1000, 4095)])
    with pytest.raises(DataError, match=r"c\.png has 16-bit colours that use only the lowest 12 bits"):
        read_image(scan)


def test_floats_lie_in_0_to_1(tmp_path):
    path = save(tmp_path / "a.tif", np.array([[0, 0.2, 1]], dtype=np.float32))
    assert pixels(path)[0, :, 0].tolist() == [0, 51, 255]


@pytest.mark.parametrize(
    "values", [np.float32([[0, 1.5]]), np.float32([[0, np.nan]]), np.int32([[-1, 5]]), np.int32([[65536]])]
)
def test_values_without_a_known_range(tmp_path, values):
    path = save(tmp_path / "a.tif", values)
    with pytest.raises(DataError, match=r"a\.tif has grey values from"):
        read_image(path)


def test_load_image_keeps_the_mode_and_closes_the_file(tmp_path):
    palette = Image.new("P", (3, 2), 5)
    palette.putpalette(range(30))
    path = save(tmp_path / "a.png", palette)
    image = load_image(path)
    path.unlink()
    assert image.mode == "P"
    assert (np.asarray(image) == 5).all()


# Broken files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".gif", ".tif", ".webp", ".ppm"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_truncated(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f"a{suffix}", noise)
    data = path.read_bytes()
    path.write_bytes(data[: max(1, int(len(data) * share))])
    with pytest.raises(DataError, match=rf"a{suffix}"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".gif", ".tif", ".webp", ".ppm"])
def test_flipped_bytes_give_an_image_or_a_data_error(tmp_path, suffix):
    rng = np.random.default_rng(0)
    path = save(tmp_path / f"a{suffix}", rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    for _ in range(100):
        broken = data.copy()
        broken[rng.integers(0, min(len(data), 400), 4)] = rng.integers(0, 256, 4)
        path.write_bytes(broken.tobytes())
        try:
            assert read_image(path, max_pixels=10**6).mode == "RGB"
        except DataError as error:
            assert str(path) in str(error)  # noqa: PT017 - not every byte matters


@pytest.mark.parametrize(
    "content", [b"hello", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0"]
)
def test_not_an_image(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png"):
        read_image(path)


def test_what_is_no_file(tmp_path):
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    for name, message in [
        ("missing.png", "does not exist"),
        (".", "is a folder"),
        ("empty.png", "0 bytes"),
        ("pipe.png", "not a regular file"),
        ("dangling.png", "does not exist"),
        ("a" * 300, "cannot be read"),
    ]:
        with pytest.raises(DataError, match=message):
            read_image(tmp_path / name)


def test_a_bomb_is_refused_by_its_header(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(14_000, 14_000))
    with pytest.raises(DataError, match=r"bomb\.png has too many pixels.*MAX_IMAGE_PIXELS"):
        read_image(path)
    path.write_bytes(png_header(11, 10))
    with pytest.raises(DataError, match="11×10 pixels, more than max_pixels=109"):
        read_image(path, max_pixels=109)
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(path, max_pixels=110)


def test_pillow_may_not_warn_of_what_is_allowed(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    assert np.array_equal(pixels(path), RGB)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match="too many pixels"):
        read_image(path)


def test_the_filters_of_warnings_stay(tmp_path):
    before = warnings.filters[:]
    read_image(save(tmp_path / "a.png"))
    assert warnings.filters == before


# Finding ------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ["10.png", "2.PNG", "note.txt", "sub/1.jpg", "sub/deep/3.webp", ".hidden/4.png", "._2.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*arguments):
    return [path.as_posix() for path in find_images(arguments)]


def test_folder_is_searched_in_natural_order(tree):
    assert names(".") == ["2.PNG", "10.png", "sub/1.jpg", "sub/deep/3.webp"]
    assert find_images(tree) == [tree / name for name in names(".")]


def test_files_and_patterns(tree):
    assert names("note.txt") == ["note.txt"]
    assert names("*") == names(".")
    assert names("*.png") == ["10.png"]
    assert names("**/*.jpg", "[0-9].*") == ["2.PNG", "sub/1.jpg"]
    assert names(str(tree / "s?b" / "*.jpg")) == [str(tree / "sub" / "1.jpg")]


def test_no_duplicates(tree):
    (tree / "link").symlink_to(tree / "sub")
    assert names("10.png", "./10.png", "sub/../10.png", str(tree / "10.png"), "1*.png") == ["10.png"]
    assert names("sub", "link", "sub/*.jpg") == ["sub/1.jpg", "sub/deep/3.webp"]


def test_an_existing_file_is_no_pattern(tree):
    (tree / "scan[1].png").touch()
    (tree / "scan1.png").touch()
    assert names("scan[1].png") == ["scan[1].png"]
    (tree / "scan[1].png").unlink()
    assert names("scan[1].png") == ["scan1.png"]


def test_links_that_form_a_loop(tree):
    (tree / "sub" / "loop").symlink_to(tree)
    assert len(find_images(["."])) == 4


@pytest.mark.parametrize(
    "argument", ["nothing.png", "*.tiff", ".hidden/deeper", "*" + "x" * 300, "empty", "note.*"]
)
def test_an_argument_that_stands_for_nothing(tree, argument):
    (tree / "empty").mkdir()
    with pytest.raises(InputError) as error:
        find_images(["10.png", argument])
    assert repr(argument) in str(error.value)


def test_an_empty_path_is_not_the_current_folder(tree):
    with pytest.raises(InputError, match="a path is ''"):
        find_images([""])


@pytest.mark.parametrize(
    "suffix", ["jfif", "JPE", "jif", "Jpeg", "tif", "TIFF", "dib", "jp2", "avif", "pcx", "qoi"]
)
def test_every_suffix_of_a_format_that_is_read(tmp_path, suffix):
    formats = {"jif": "JPEG", "jfif": "JPEG", "JPE": "JPEG"}
    path = save(tmp_path / f"a.{suffix}", format=formats.get(suffix))
    assert find_images([tmp_path]) == [path]
    assert read_image(path).size == (7, 5)


def test_images_of_other_formats_are_counted(tree):
    for name in ("a.heic", "sub/b.HEIC", "sub/c.psd", ".d.svg", "e.txt"):
        (tree / name).touch()
    expected = r"left out: 3 images of formats that are not read \(2 \.heic, 1 \.psd\); convert them\.$"
    with pytest.warns(UserWarning, match=expected):
        assert len(find_images([".", "*", "sub"])) == 4
    with pytest.raises(InputError, match=r"pattern matches no image \(left out: 1 images"):
        find_images(["*.heic"])


def test_pictures_that_the_library_drew_are_left_out_of_folders(tree):
    save_picture(Image.fromarray(RGB), tree / "map.png", compress_level=3)
    save_picture(Image.fromarray(RGB).convert("P"), tree / "sub" / "map.PNG")
    assert np.array_equal(pixels(tree / "map.png"), RGB)
    with pytest.warns(UserWarning, match=r"left out: 2 pictures that attnguide has drawn\.$"):
        assert names(".") == ["2.PNG", "10.png", "sub/1.jpg", "sub/deep/3.webp"]
    assert names("map.png") == ["map.png"]


def test_no_arguments():
    with pytest.raises(InputError, match="paths is empty"):
        find_images([])


def test_natural_key():
    ordered = ["a/2.png", "a/10.png", "a2b1", "a2b10", "a10", "B1", "c01", "c1"]
    assert sorted(set(ordered), key=natural_key) == ordered


# Writing ------------------------------------------------------------------------------------------------


def test_atomic_write_replaces_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".txt")
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_write_leaves_nothing_behind(tmp_path, exception):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise exception

    with pytest.raises(exception):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_gives_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "a"):
        pass
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_atomic_write_where_it_cannot(tmp_path):
    (tmp_path / "file").touch()
    for path, message in [
        (tmp_path, "not a regular file"),
        (Path(os.devnull), "not a regular file"),
        (tmp_path / "missing" / "a", "no folder .*missing. Create it"),
        (tmp_path / "file" / "a", "no folder"),
    ]:
        with pytest.raises(InputError, match=message), atomic_write(path):
            pytest.fail("the block ran")


def test_atomic_write_without_permission(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the mode of a folder does not stop root
    with (
        pytest.raises(InputError, match=r"cannot write .*a\.pt: Permission denied"),
        atomic_write(tmp_path / "a.pt"),
    ):
        pytest.fail("the block ran")


# Text ---------------------------------------------------------------------------------------------------


def test_read_text_takes_off_the_mark(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfhello")
    assert read_text(tmp_path / "a") == "hello"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5000, b'{"a": 1, "b": 2, "a": 3}', b"\0"]
)
def test_what_is_not_json(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_headers_of_broken_files(tmp_path):
    """Whatever a block reads from a header, errors are ours and Pillow warns of nothing."""
    path = save(tmp_path / "a.tif")
    whole = path.read_bytes()
    with open_image(path) as image:
        assert (image.n_frames, image_size(path)) == (1, RGB.shape[:2])
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(DataError, match=r"a\.tif"), open_image(path) as image:
                image.load()


def test_an_image_in_memory(tmp_path):
    content = save(tmp_path / "a.png").read_bytes()
    assert np.array_equal(decode_image(content, "it"), RGB)
    with pytest.raises(DataError, match="it is not an image"):
        decode_image(b"text", "it")
    with pytest.raises(DataError, match=r"it is .* more than max_pixels=2"):
        decode_image(content, "it", max_pixels=2)
