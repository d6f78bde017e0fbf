"""Reads image files, which may come from anywhere."""

from __future__ import annotations

import glob
import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

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
]

# The formats that are opened, whatever the suffix of a file. A list, because Pillow also opens formats that
# are programs: it passes an EPS file to Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")

#: EXIF orientations by which rows are stored as columns.
_TURNED = (5, 6, 7, 8)

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Suffixes, in lower case, of the files that `find_images` takes from a folder."""

MAX_PIXELS = 178_956_970
"""Largest number of pixels of an image by default, which is the limit of Pillow."""


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as upright RGB with 8 bits per channel.

    The EXIF orientation is applied. Grey, palette and CMYK images become RGB; transparent parts are laid on
    white; 16-bit grey is scaled to 8 bits, and grey floats must lie in [0, 1]. Of an animation the first
    frame is read.

    Args:
        path: A JPEG, PNG, WebP, TIFF, BMP, GIF or PPM file.
        max_pixels: Images of more pixels are refused before they are decoded. Pillow's own limit, twice
            `PIL.Image.MAX_IMAGE_PIXELS`, holds as well.

    Returns:
        An image of mode `"RGB"`.

    Raises:
        DataError: The file is missing, empty, a folder, not an image, truncated, or too large.
    """
    image = load_image(path, max_pixels=max_pixels)
    with _decoding(path):
        if _is_deep(image):
            levels = gray_levels(image, path)
            image = Image.fromarray(np.rint(levels * 255).astype(np.uint8))
        elif image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def load_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file upright, in its own mode: palette indices stay indices.

    Args:
        path: A JPEG, PNG, WebP, TIFF, BMP, GIF or PPM file.
        max_pixels: Images of more pixels are refused before they are decoded.

    Returns:
        A decoded image that holds no open file, and knows its `format`.

    Raises:
        DataError: As for [`read_image`][attnguide.data.read_image].
    """
    return decode_image(check_file(path), path, max_pixels=max_pixels)


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
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    with _decoding(name), Image.open(file, formats=_FORMATS) as image:
        # Opening reads the header only; decoding starts at the transposition.
        if image.width * image.height > max_pixels:
            raise DataError(
                f"{name} is {image.width}×{image.height} pixels, more than max_pixels={max_pixels}. "
                "Shrink it, or raise max_pixels if you trust the file."
            )
        upright = ImageOps.exif_transpose(image)
        upright.format = image.format  # a copy forgets it
        return upright


@contextmanager
def open_image(path: str | Path) -> Iterator[ImageFile.ImageFile]:
    """Open an image file for what its header says.

    Yields:
        An image that is not decoded, nor upright, and is closed at the end of the block.

    Raises:
        DataError: The file is missing, empty, a folder, or not an image, or the block's reading fails.
    """
    path = check_file(path)
    with _decoding(path), Image.open(path, formats=_FORMATS) as image:
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


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Find the image files that files, folders and patterns name.

    A file is accepted with any suffix. A folder is searched, with its subfolders, for the suffixes of
    `IMAGE_SUFFIXES`; hidden entries are left out, and links to other folders are not followed. Any other
    argument is a pattern with `*`, `?`, `[…]` and `**`, whose matches are treated like a folder's content.
    A file that exists is never a pattern: `scan[1].png` is that file.

    Args:
        paths: Files, folders and patterns, or one of them.

    Returns:
        The files in natural order (`2.png` before `10.png`), each once.

    Raises:
        InputError: An argument names no image, or there are no arguments.
    """
    arguments = [paths] if isinstance(paths, str | Path) else list(paths)
    if not arguments:
        raise InputError("paths is empty: there are no images. Give files, folders or patterns.")
    files: dict[Path, Path] = {}
    for file in (file for argument in arguments for file in _expand(argument)):
        # The same file by another path is one file; a link with another name is not.
        files.setdefault(file.parent.resolve() / file.name, file)
    return sorted(files.values(), key=natural_key)


def _expand(argument: str | Path) -> Sequence[Path]:
    path = Path(argument)
    # Unlike those of Path, these return False for a pattern that is too long for the name of a file.
    if os.path.isfile(path):  # noqa: PTH113
        return [path]
    if os.path.isdir(path):  # noqa: PTH112
        files, what = list(_walk(path)), "folder holds no image"
    else:
        # Path.glob takes no absolute pattern.
        matches = [Path(match) for match in glob.glob(str(argument), recursive=True)]  # noqa: PTH207
        files = [f for m in matches for f in (_walk(m) if m.is_dir() else [m]) if _has_image_name(f)]
        what = "pattern matches no image" if glob.has_magic(str(argument)) else "path does not exist"
    if not files:
        raise InputError(
            f"{str(argument)!r}: the {what}. Check the spelling; known suffixes: "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return files


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (file for name in names if _has_image_name(file := Path(parent, name)))


def _has_image_name(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


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
