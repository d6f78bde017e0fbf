"""Reading image files that anybody may have made."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from attnguide.data.files import check_file, natural_key
from attnguide.errors import AttnGuideError, DataError, InputError

__all__ = ["IMAGE_SUFFIXES", "MAX_PIXELS", "find_images", "grey_levels", "load_image", "read_image"]

# The formats that are opened, whatever a file's suffix says. Named one by one because Pillow also knows
# formats that are programs: it hands an EPS file to Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Suffixes, in lower case, of the files that `find_images` takes from a folder."""

MAX_PIXELS = 178_956_970
"""Pixels that an image may have by default: where Pillow itself refuses to go on."""


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as upright RGB with 8 bits per channel.

    The EXIF orientation is applied. Grey, palette and CMYK images become RGB; transparent parts are laid on
    white; 16-bit grey is scaled to 8 bits, and grey floats are taken to lie in [0, 1]. Of an animation,
    the first frame is read.

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
            levels = grey_levels(image, path)
            image = Image.fromarray(np.rint(levels * 255).astype(np.uint8))
        elif image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def load_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file upright, in the mode that it has: palette indices stay indices.

    Args:
        path: A JPEG, PNG, WebP, TIFF, BMP, GIF or PPM file.
        max_pixels: Images of more pixels are refused before they are decoded.

    Returns:
        A decoded image that holds no open file.

    Raises:
        DataError: As for [`read_image`][attnguide.data.read_image].
    """
    path = check_file(path)
    with _decoding(path), Image.open(path, formats=_FORMATS) as image:
        # Opening reads the header only; decoding starts at the transposition.
        if image.width * image.height > max_pixels:
            raise DataError(
                f"{path} is {image.width}×{image.height} pixels, more than max_pixels={max_pixels}. "
                "Shrink it, or raise max_pixels if you trust the file."
            )
        return ImageOps.exif_transpose(image)


def grey_levels(image: Image.Image, path: str | Path) -> npt.NDArray[np.float64]:
    """Return an image's luminance in [0, 1], keeping the precision of 16-bit and float greys.

    Colours are weighed by ITU-R 601; transparency is disregarded.

    Args:
        image: An image of any mode.
        path: The file that it came from, for the error.

    Returns:
        Array `(H, W)` of values in [0, 1].

    Raises:
        DataError: The values are outside their range: 0 … 65535 for integers, 0 … 1 for floats.
    """
    if not _is_deep(image):
        return np.asarray(_grey(image), dtype=np.float64) / 255
    top = 1 if image.mode == "F" else 65535
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):  # NaN fails as well
        raise DataError(
            f"{path} has grey values from {low:g} to {high:g}, outside 0 … {top}. Save it with 8 or 16 bits."
        )
    return values / top


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Find the image files that files, folders and patterns stand for.

    A file is taken whatever its suffix. A folder is searched with its subfolders for the suffixes of
    `IMAGE_SUFFIXES`; hidden entries are left out, and links to other folders are not followed. Any other
    argument is a pattern with `*`, `?`, `[…]` and `**`, whose matches are treated like a folder's content.
    A file that exists is never a pattern, so `scan[1].png` means itself.

    Args:
        paths: Files, folders and patterns; a single one may stand alone.

    Returns:
        The files in natural order (`2.png` before `10.png`), each once.

    Raises:
        InputError: An argument stands for no image, or there are no arguments.
    """
    arguments = [paths] if isinstance(paths, str | Path) else list(paths)
    if not arguments:
        raise InputError("no images were asked for: paths is empty. Give files, folders or patterns.")
    found: dict[Path, Path] = {}
    for file in (file for argument in arguments for file in _expand(argument)):
        # The way to a file does not make it another one; a link with a name of its own does.
        found.setdefault(file.parent.resolve() / file.name, file)
    return sorted(found.values(), key=natural_key)


def _expand(argument: str | Path) -> Sequence[Path]:
    path = Path(argument)
    # Unlike those of Path, these say no to a pattern that is too long for the name of a file.
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


def _grey(image: Image.Image) -> Image.Image:
    # By way of RGBA, since Pillow warns of a palette with transparency that it is asked to drop.
    return image.convert("RGBA").convert("L") if image.mode == "P" else image.convert("L")


@contextmanager
def _decoding(path: str | Path) -> Iterator[None]:
    """Turn whatever Pillow raises into a `DataError`, and keep its warnings from the caller."""
    with warnings.catch_warnings():
        # What Pillow warns of (many pixels, odd metadata) is either refused here or harmless.
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
