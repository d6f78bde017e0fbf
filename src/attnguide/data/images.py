"""Reads image files, which may come from anywhere."""

from __future__ import annotations

import glob
import io
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError, features

from attnguide.data.files import check_file, natural_key
from attnguide.errors import AttnGuideError, DataError, InputError

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "decode_image",
    "find_images",
    "gray_levels",
    "image_size",
    "load_image",
    "open_image",
    "read_image",
    "rgb_image",
    "save_picture",
    "to_rgb",
]

# The formats that are opened, whatever the suffix of a file, with their suffixes. A list, because Pillow also
# opens formats that are programs: it passes an EPS file to Ghostscript.
_FORMATS = {
    "JPEG": (".jfif", ".jif", ".jpe", ".jpeg", ".jpg", ".mpo"),
    "PNG": (".apng", ".png"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp", ".dib"),
    "DIB": (),
    "GIF": (".gif",),
    "PPM": (".pbm", ".pfm", ".pgm", ".pnm", ".ppm"),
    "PCX": (".pcx",),
    "QOI": (".qoi",),
    # These two are missing where Pillow was built without their libraries.
    **({"JPEG2000": (".j2k", ".jp2", ".jpc", ".jpf", ".jpx")} if features.check("jpg_2000") else {}),
    **({"AVIF": (".avif", ".avifs")} if features.check("avif") else {}),
}

#: EXIF orientations by which rows are stored as columns.
_TURNED = (5, 6, 7, 8)

IMAGE_SUFFIXES = frozenset(suffix for suffixes in _FORMATS.values() for suffix in suffixes)
"""Suffixes, in lower case, of the files that `find_images` takes from a folder."""

#: Suffixes of images that are not read: raw photographs, layered and vector graphics, medical scans, and what
#: Pillow lacks a library for. Such files in a folder are counted.
OTHER_SUFFIXES = (
    frozenset(
        suffix
        for suffixes in (
            ".3fr .ari .arw .bay .cr2 .cr3 .crw .dcr .dng .erf .fff .iiq .kdc .mef .mos .mrw .nef .nrw .orf",
            ".pef .ptx .pxn .raf .raw .rw2 .rwl .sr2 .srf .srw .x3f",
            ".ai .emf .eps .psb .psd .svg .svgz .wmf .xcf",
            ".dcm .fits .ndpi .nii .svs",
            ".avif .avifs .bpg .cur .dds .djvu .exr .fpx .hdr .heic .heics .heif .heifs .hif .icns .ico .j2k",
            ".jls .jp2 .jpc .jpf .jpx .jxl .jxr .sgi .tga .wdp .xbm .xpm",
        )
        for suffix in suffixes.split()
    )
    - IMAGE_SUFFIXES
)

#: Bits per value that cameras and scanners have.
_DEPTHS = (1, 2, 4, 8, 10, 12, 14, 16)

#: A chunk of text near the beginning of the PNG files that the library draws, by which it knows them.
_MARK = ("Software", "attnguide")
_MARK_BYTES = b"tEXt" + b"\0".join(text.encode() for text in _MARK)

MAX_PIXELS = 178_956_970
"""Largest number of pixels of an image by default, which is the limit of Pillow."""


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as upright RGB with 8 bits per channel.

    The EXIF orientation is applied. Grey, palette and CMYK images become RGB; transparent parts are laid on
    white, and grey floats must lie in [0, 1]. Of an animation the first frame is read.

    Deep grey, of 16 or 32 bits, is scaled to 8 bits by the depth that its values use: the smallest of 1, 2,
    4, 8, 10, 12, 14 and 16 bits that holds the largest of them. A scan of 12 bits in a file of 16 is as
    bright as the scan. Pillow keeps the upper half of 16-bit colours only, so colours that use no more than
    14 bits are refused.

    Args:
        path: A JPEG, PNG, WebP, TIFF, BMP, GIF, PPM, PCX or QOI file; also JPEG 2000 and AVIF, if Pillow
            was built with them.
        max_pixels: Images of more pixels are refused before they are decoded. Pillow's own limit, twice
            `PIL.Image.MAX_IMAGE_PIXELS`, holds as well.

    Returns:
        An image of mode `"RGB"`.

    Raises:
        DataError: The file is missing, empty, a folder, not an image, truncated, or too large, or its values
            have no known range.
    """
    return rgb_image(check_file(path), path, max_pixels=max_pixels)


def rgb_image(content: bytes | Path, name: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image that lies in memory, or in a file, as `read_image` does.

    Args:
        content: The bytes of an image file, or its path.
        name: The image, for errors.
        max_pixels: Images of more pixels are refused before they are decoded.

    Returns:
        An image of mode `"RGB"`, upright.

    Raises:
        DataError: It is not an image, is truncated, or is too large, or its values have no known range.
    """
    image, is_deep_color = _loaded(content, name, max_pixels)
    return _rgb(image, name, is_deep_color)


def to_rgb(image: Image.Image, name: str | Path) -> Image.Image:
    """Turn an image that lies in memory into upright RGB with 8 bits per channel, as `read_image` does.

    Args:
        image: An image of any mode.
        name: The image, for the error.

    Returns:
        An image of mode `"RGB"`.

    Raises:
        DataError: It cannot be decoded, or its values have no known range.
    """
    with _decoding(name):
        upright = ImageOps.exif_transpose(image)
    return _rgb(upright, name, is_deep_color=False)


def _rgb(image: Image.Image, name: str | Path, is_deep_color: bool) -> Image.Image:
    with _decoding(name):
        if _is_deep(image):
            image = Image.fromarray(np.rint(_scaled_levels(image, name) * 255).astype(np.uint8))
        elif is_deep_color and 0 < (high := _brightest(image)) < 64:
            raise DataError(
                f"{name} has 16-bit colours that use only the lowest {8 + high.bit_length()} bits, and would "
                "turn dark. Scale them to the whole range, or save it with 8 bits."
            )
        elif image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def load_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file upright, in its own mode: palette indices stay indices.

    Args:
        path: A JPEG, PNG, WebP, TIFF, BMP, GIF, PPM, PCX or QOI file; also JPEG 2000 and AVIF, if Pillow
            was built with them.
        max_pixels: Images of more pixels are refused before they are decoded.

    Returns:
        A decoded image that holds no open file, and knows its `format`.

    Raises:
        DataError: The file is missing, empty, a folder, not an image, truncated, or too large.
    """
    return _loaded(check_file(path), path, max_pixels)[0]


def decode_image(content: bytes | Path, name: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image that lies in memory, or in a file, upright, in its own mode.

    Args:
        content: The bytes of an image file, or its path.
        name: The image, for errors.
        max_pixels: Images of more pixels are refused before they are decoded.

    Returns:
        As for `load_image`.

    Raises:
        DataError: It is not an image, is truncated, or is too large.
    """
    return _loaded(content, name, max_pixels)[0]


def _loaded(content: bytes | Path, name: str | Path, max_pixels: int) -> tuple[Image.Image, bool]:
    """Read an image upright, and whether it has colours of 16 bits, of which Pillow keeps the upper half."""
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    with _decoding(name), Image.open(file, formats=tuple(_FORMATS)) as image:
        # Opening reads the header only; decoding starts at the transposition.
        if image.width * image.height > max_pixels:
            raise DataError(
                f"{name} is {image.width}×{image.height} pixels, more than max_pixels={max_pixels}. "
                "Shrink it, or raise max_pixels if you trust the file."
            )
        # The decoder's name for the pixels is known until they are decoded: "RGB;16B".
        is_deep_color = image.mode in ("RGB", "RGBA", "LA") and ";16" in repr(image.tile)
        upright = ImageOps.exif_transpose(image)
        upright.format = image.format  # a copy forgets it
        return upright, is_deep_color


@contextmanager
def open_image(path: str | Path) -> Iterator[ImageFile.ImageFile]:
    """Open an image file for what its header says.

    Yields:
        An image that is not decoded, nor upright, and is closed at the end of the block.

    Raises:
        DataError: The file is missing, empty, a folder, or not an image, or the block's reading fails.
    """
    path = check_file(path)
    with _decoding(path), Image.open(path, formats=tuple(_FORMATS)) as image:
        yield image


def image_size(path: str | Path) -> tuple[int, int]:
    """Return the height and width of an image file, upright, without decoding it.

    Raises:
        DataError: The file is missing, empty, a folder, or not an image.
    """
    with open_image(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in _TURNED
        return (image.width, image.height) if turned else (image.height, image.width)


def gray_levels(image: Image.Image, path: str | Path) -> npt.NDArray[np.float64]:
    """Return an image's luminance in [0, 1], keeping the precision of 16-bit and float greys.

    Colours are weighted by ITU-R 601; transparency is ignored.

    Args:
        image: An image of any mode.
        path: File of the image, for the error.

    Returns:
        Array `(H, W)` of values in [0, 1].

    Raises:
        DataError: The values are outside their range: 0 … 65535 for integers, 0 … 1 for floats.
    """
    if not _is_deep(image):
        return np.asarray(_gray(image), dtype=np.float64) / 255
    top = 1 if image.mode == "F" else 65535
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):  # NaN fails as well
        raise DataError(
            f"{path} has grey values from {low:g} to {high:g}, outside 0 … {top}. Save it with 8 or 16 bits."
        )
    return values / top


def save_picture(picture: Image.Image, path: str | Path, **options: Any) -> None:
    """Save a picture that the library has drawn as PNG, with a mark by which `find_images` leaves it out.

    Args:
        picture: The picture.
        path: The file to write.
        options: Options of Pillow, such as `compress_level`.
    """
    mark = PngImagePlugin.PngInfo()
    mark.add_text(*_MARK)
    picture.save(path, "PNG", pnginfo=mark, **options)


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Find the image files that files, folders and patterns name.

    A file is accepted with any suffix. A folder is searched, with its subfolders, for the suffixes of
    `IMAGE_SUFFIXES`; hidden entries are left out, and links to other folders are not followed. Any other
    argument is a pattern with `*`, `?`, `[…]` and `**`, whose matches are treated like a folder's content.
    A file that exists is never a pattern: `scan[1].png` is that file.

    Pictures that attnguide has drawn itself, such as the maps of an earlier run, are left out of folders and
    patterns. So are images of formats that are not read, such as `.heic`. One warning counts both.

    Args:
        paths: Files, folders and patterns, or one of them.

    Returns:
        The files in natural order (`2.png` before `10.png`), each once.

    Raises:
        InputError: An argument names no image or is empty, or there are no arguments.
    """
    arguments = list(paths) if isinstance(paths, Iterable) and not isinstance(paths, str | bytes) else [paths]
    for argument in arguments:
        if not isinstance(argument, str | Path):
            raise InputError(f"paths has {argument!r:.60}, which is neither text nor a pathlib.Path.")
    if not arguments:
        raise InputError("paths is empty: there are no images. Give files, folders or patterns.")
    files: dict[Path, Path] = {}
    left_out = LeftOut()
    for file in (file for argument in arguments for file in _expand(argument, left_out)):
        # The same file by another path is one file; a link with another name is not.
        files.setdefault(file.parent.resolve() / file.name, file)
    if left_out:
        warnings.warn(f"{left_out}.", stacklevel=2)
    return sorted(files.values(), key=natural_key)


class LeftOut:
    """Counts the images that are not taken from folders and patterns."""

    def __init__(self) -> None:
        self._drawn: set[Path] = set()
        self._others: set[Path] = set()

    def __bool__(self) -> bool:
        return bool(self._drawn or self._others)

    def __str__(self) -> str:
        parts = []
        if self._drawn:
            parts.append(f"{len(self._drawn)} pictures that attnguide has drawn")
        if self._others:
            counts = Counter(path.suffix.lower() for path in self._others)
            listed = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
            parts.append(f"{len(self._others)} images of formats that are not read ({listed}); convert them")
        return "left out: " + ", and ".join(parts)

    def add(self, other: LeftOut) -> None:
        """Count what another one counts; a file that both count is one file."""
        self._drawn |= other._drawn
        self._others |= other._others

    def takes(self, path: Path) -> bool:
        """Whether an entry of a folder is an image to take; images that are not are counted."""
        if path.name.startswith("."):
            return False
        suffix = path.suffix.lower()
        if suffix in OTHER_SUFFIXES:
            self._others.add(path)
        elif suffix == ".png" and _is_drawn(path):
            self._drawn.add(path)
        else:
            return suffix in IMAGE_SUFFIXES
        return False


def _is_drawn(path: Path) -> bool:
    """Whether a PNG file has the mark of `save_picture`, which follows the header of 33 bytes."""
    try:
        with path.open("rb") as file:
            return _MARK_BYTES in file.read(33 + 4 + len(_MARK_BYTES))
    except OSError:
        return False  # reported where it is read


def _expand(argument: str | Path, left_out: LeftOut) -> list[Path]:
    if not str(argument) or "\0" in str(argument):
        raise InputError(
            f"a path is {argument!r:.60}. Give a file, a folder or a pattern; '.' is this folder."
        )
    path = Path(argument)
    # Unlike those of Path, these return False for a pattern that is too long for the name of a file.
    if os.path.isfile(path):  # noqa: PTH113
        return [path]
    own = LeftOut()
    if os.path.isdir(path):  # noqa: PTH112
        files, what = list(walk_images(path, own)), "folder holds no image"
    else:
        # Path.glob takes no absolute pattern.
        matches = [Path(match) for match in glob.glob(str(argument), recursive=True)]  # noqa: PTH207
        files = [
            f for m in matches for f in (walk_images(m, own) if m.is_dir() else [m] if own.takes(m) else [])
        ]
        what = "pattern matches no image" if glob.has_magic(str(argument)) else "path does not exist"
    if not files:
        raise InputError(
            f"{str(argument)!r}: the {what}{f' ({own})' if own else ''}. Check the spelling; known suffixes: "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    left_out.add(own)
    return files


def walk_images(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """Yield the images of a folder and its subfolders by name, without a list of all."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (file for name in sorted(names) if left_out.takes(file := Path(parent, name)))


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _scaled_levels(image: Image.Image, path: str | Path) -> npt.NDArray[np.float64]:
    """Return deep greys in [0, 1], integers scaled by the depth that they use."""
    levels = gray_levels(image, path)
    if image.mode == "F":
        return levels
    high = round(float(levels.max()) * 65535)
    bits = next(bits for bits in _DEPTHS if high < 2**bits)
    return levels * np.float64(65535 / (2**bits - 1))


def _brightest(image: Image.Image) -> int:
    """Return the largest value of the colours, not of the transparency."""
    colors = [band for name, band in zip(image.getbands(), image.split(), strict=True) if name != "A"]
    return max(int(np.asarray(band).max()) for band in colors)


def _gray(image: Image.Image) -> Image.Image:
    # Through RGBA, since Pillow warns when it drops the transparency of a palette.
    return image.convert("RGBA").convert("L") if image.mode == "P" else image.convert("L")


@contextmanager
def _decoding(path: str | Path) -> Iterator[None]:
    """Turn any error of Pillow into a `DataError`, and suppress its warnings."""
    with warnings.catch_warnings():
        # Pillow warns of many pixels, which are refused here, and of odd metadata, which is harmless.
        warnings.simplefilter("ignore")
        try:
            yield
        except AttnGuideError:
            raise
        except Image.DecompressionBombError as error:
            raise DataError(
                f"{path} has too many pixels: {error}. Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if "
                "you trust the file."
            ) from error
        except UnidentifiedImageError as error:
            raise DataError(
                f"{path} is not an image in a known format ({', '.join(_FORMATS)}). Convert or remove it."
            ) from error
        # A corrupt file can make a decoder fail in any way: OSError, struct.error, KeyError, zlib.error, …
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise DataError(
                f"{path} cannot be decoded: {reason}. The file may be truncated or corrupt; replace it."
            ) from error
