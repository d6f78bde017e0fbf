"""Reads image files as masks, without torch: how much of each pixel was painted.

Tools save one and the same region in many ways. [`read_mask`][attnguide.masks.read_mask] states the rule by
which a file is read; what the rule leaves open is refused, with the values that were found.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from attnguide.data.images import gray_levels, load_image, open_image
from attnguide.errors import DataError
from attnguide.masks.inside import Inside, as_inside

__all__ = ["is_gray", "packed_colors", "read_levels"]

Levels = npt.NDArray[np.float64]
Values = npt.NDArray[np.int64]
Channel = npt.NDArray[np.uint8]

#: Formats that do not keep the values of pixels.
_LOSSY = ("JPEG", "WEBP")
#: Formats of which a file may hold several images.
_WITH_PAGES = ("TIFF", "GIF", "PNG", "WEBP")
#: Share of the range around black and white that compression fills with noise.
_NOISE = 0.06
#: Largest difference between the channels of a pixel that compression made of a grey one.
_NEARLY_GRAY = 24
#: The background of a soft mask is at most this share of the range, and its inside at least that.
_BACKGROUND, _FULL = 0.1, 0.8
#: With more grey values than this, flat areas are those of a slow gradient; with more colours, it is a
#: picture.
_CLASSES = 64
#: A photograph bends more from pixel to pixel than this share of the range, and less of it is black or white;
#: a soft mask is smooth, and the noise that JPEG adds to a mask lies near black and white.
_SMOOTH, _MOSTLY = 0.006, 0.8
#: VOC's mark of pixels that no class claims: an index, and its colour.
_VOID_INDEX, _VOID_COLOR = 255, 0xE0E0C0
#: How many values an error shows.
_SHOWN = 8


def read_levels(path: str | Path, inside: Inside | None = None) -> Levels:
    """Read a painted mask; see [`read_mask`][attnguide.masks.read_mask].

    Returns:
        Array `(H, W)` in [0, 1].

    Raises:
        DataError: The file cannot be read as an image, or it does not show what is inside.
        InputError: `inside` holds something else than values.
    """
    chosen = None if inside is None else as_inside(inside)
    image = load_image(path)
    if image.format in _WITH_PAGES:
        with open_image(path) as file:
            pages = getattr(file, "n_frames", 1)
        if pages > 1:
            raise DataError(f"{path} has {pages} pages or frames: it is not one mask. Save each in a file.")
    if chosen is not None:
        if chosen.gray:
            return gray_levels(image, path)
        region = np.zeros(image.size[::-1], dtype=bool)
        if chosen.colors:
            region |= np.isin(packed_colors(image, path), chosen.colors)
        if chosen.ranges:
            values = _numbers(image, path)
            for first, last in chosen.ranges:
                region |= (values >= first) & (values <= last)
        return region.astype(np.float64)
    levels = _levels(image, path)
    if not levels.any() and image.mode in ("RGB", "RGBA", "LA") and _was_deep(path):
        raise DataError(
            f"{path} has 16 bits per colour channel, of which 8 can be read, and these are all 0. "
            "Save it as a grey image, or with 8 bits."
        )
    return levels


def is_gray(image: Image.Image) -> bool:
    """Whether an image has one channel of whole numbers, and no palette."""
    return image.mode == "L" or image.mode.startswith("I")


def packed_colors(image: Image.Image, path: str | Path) -> Values:
    """Return the colour of each pixel as 0xRRGGBB, `(H, W)`; −1 where it is transparent: not painted."""
    if image.mode.startswith("I") or image.mode == "F":
        raise DataError(f"{path} has no colours (mode {image.mode}). Give grey values instead.")
    *colors, opacity = image.convert("RGBA").split()
    packed: Values = np.where(np.asarray(opacity) > 0, _packed(*map(np.asarray, colors)), -1)
    return packed


def _packed(red: Channel, green: Channel, blue: Channel) -> Values:
    packed: Values = red.astype(np.int64) << 16
    packed |= green.astype(np.int64) << 8
    packed |= blue
    return packed


def _levels(image: Image.Image, path: str | Path) -> Levels:
    """Read a mask of which nothing but the file is known."""
    if image.has_transparency_data and not image.mode.startswith("I"):
        opacity = np.asarray(image.convert("RGBA").getchannel("A"))
        if opacity.min() < opacity.max():
            return _painted(opacity, packed_colors(image, path), path)
        colors = np.asarray(image.convert("RGBA").convert("RGB"))
        if opacity.max() == 0:
            if (colors != colors[0, 0]).any():
                raise DataError(
                    f"{path} is transparent throughout, but has colours. Save it without opacity."
                )
            return np.zeros(opacity.shape)
        image = image.convert("RGBA").convert("RGB") if image.mode != "P" else image
    lossy = image.format in _LOSSY
    if image.mode == "P":
        return _of_palette(image, path)
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        return _graded(np.asarray(image), _top(image), path, lossy=lossy)
    red, green, blue = map(np.asarray, image.convert("RGB").split())
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    if spread.max() <= (_NEARLY_GRAY if lossy else 0):
        # Without compression all three are one; with it, green is nearest to the luminance.
        return _graded(green, 255, path, lossy=lossy)
    return _of_colors(_packed(red, green, blue), path)


def _graded(numbers: npt.NDArray[np.number], top: float, path: str | Path, *, lossy: bool = False) -> Levels:
    """Read one channel: a region of one value, or a soft mask."""
    values = numbers.astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError(
            f"{path} holds values that are not finite. Replace them, by 0 where nothing is painted."
        )
    found, counts = _occurring(values)
    low, high = float(found[0]), float(found[-1])
    if len(found) == 1 and low in (0, 1, 255, top):
        return np.full(values.shape, float(low > 0))
    if len(found) == 2 and low == 0 and not lossy:
        return (values > 0).astype(np.float64)
    if len(found) > 2 and low >= 0:
        margin = _NOISE * top if lossy else 0
        between = (values > low + margin) & (values < high - margin)
        few = len(np.unique(values[between])) <= _CLASSES
        # The edge of a region has values in between as well, but no areas of them.
        if few and between.any() and _flat(values)[between].mean() > 0.5:
            raise _undecided(path, found, counts, "several regions, not one", _number)
    if len(found) <= 2 and not lossy:
        raise _undecided(path, found, counts, "none of which is clearly the background", _number)
    if low < 0 or low > _BACKGROUND * top or high > top or high < _FULL * top:
        raise DataError(
            f"{path} is graded from {low:g} to {high:g}, where a soft mask reaches from 0 to {top:g}. Scale "
            "it, or say what it means: inside=VALUES (--inside VALUES), such as '128-255', or inside='gray' "
            "for the grey value as it is."
        )
    levels = values / top
    if len(found) > _CLASSES and _looks_like_a_photograph(levels):
        raise DataError(
            f"{path} has {len(found)} grey values and is rough: it looks like a photograph. Give masks; or "
            "inside='gray' (--inside gray) if it is one."
        )
    return levels


def _of_palette(image: Image.Image, path: str | Path) -> Levels:
    """Read an image with a palette: index 0 is the background."""
    values = np.asarray(image, dtype=np.int64)
    palette = np.zeros((256, 3), dtype=np.int64)
    entries = np.asarray(image.getpalette("RGB") or [], dtype=np.int64).reshape(-1, 3)
    palette[: len(entries)] = entries
    found, counts = _occurring(values)
    used = palette[found]
    gray = bool((used.max(axis=1) == used.min(axis=1)).all())
    if gray and (used[:, 0] == found).all():  # no more than a grey image
        return _graded(values, 255, path)
    packed = palette[:, 0] << 16 | palette[:, 1] << 8 | palette[:, 2]

    def name(value: float) -> str:
        return f"{int(value)} (#{packed[int(value)]:06x})"

    if len(found) == 1 and found[0] in (0, 1):
        return np.full(values.shape, float(found[0]))
    if found[0] == 0:
        others = [int(value) for value in found[1:]]
        if len(others) > 1:
            others = [v for v in others if v != _VOID_INDEX and packed[v] != _VOID_COLOR]
        if len(others) == 1:
            if palette[0].sum() > palette[others[0]].sum():
                raise _undecided(
                    path, found, counts, "and index 0, the background, is the brighter one", name
                )
            region: Levels = (values == others[0]).astype(np.float64)
            return region
    if gray and (len(found) > 2 or found[0] > 0):
        return _graded(palette[values][..., 0], 255, path)
    if found[0] > 0 and len(found) == 2:
        return _of_colors(packed[values], path)
    raise _undecided(path, found, counts, "several regions, not one", name)


def _of_colors(colors: Values, path: str | Path) -> Levels:
    """Read flat colours: one on black."""
    found, counts = _occurring(colors)
    others = [int(value) for value in found if value != 0]
    if len(others) == 2:
        others = [value for value in others if value != _VOID_COLOR]
    if len(others) == 1 and 0 in found:
        region: Levels = (colors == others[0]).astype(np.float64)
        return region
    if len(found) > _CLASSES:
        raise DataError(
            f"{path} has {len(found)} colours: it looks like a photograph, not like a mask. Give masks, best "
            "PNG files in black and white."
        )
    complaint = "several regions, not one" if len(found) > 2 else "none of which is clearly the background"
    raise _undecided(path, found, counts, complaint, _hexadecimal)


def _painted(opacity: npt.NDArray[np.uint8], colors: Values, path: str | Path) -> Levels:
    """Read what was painted on a transparent layer: its opacity."""
    painted = colors >= 0
    found, counts = _occurring(colors[painted])
    void = bool((found == _VOID_COLOR).any()) and len(found) > 1
    flat = np.unique(colors[painted & _flat(colors)])
    if len(found) <= _CLASSES and (flat != _VOID_COLOR if void else flat >= 0).sum() > 1:
        raise _undecided(path, found, counts, "painted on a transparent layer: several regions", _hexadecimal)
    levels = _graded(opacity, 255, path)
    return np.where(colors == _VOID_COLOR, 0.0, levels) if void else levels


def _numbers(image: Image.Image, path: str | Path) -> npt.NDArray[np.number]:
    """Return palette indices or grey values as the file holds them, `(H, W)`."""
    if image.mode in ("1", "L", "P", "F") or image.mode.startswith("I"):
        return np.asarray(image, dtype=np.float64)
    if image.mode in ("LA", "PA"):
        return np.asarray(image, dtype=np.float64)[..., 0]
    colors = np.asarray(image.convert("RGB"), dtype=np.float64)
    if (colors.max(axis=-1) != colors.min(axis=-1)).any():
        raise DataError(
            f"{path} is a colour image (mode {image.mode}), but inside= (--inside) has numbers. Give colours "
            "as #rrggbb."
        )
    return colors[..., 0]


def _top(image: Image.Image) -> float:
    """Return the largest value that one channel can hold."""
    return 1 if image.mode in ("1", "F") else 65535 if image.mode.startswith("I") else 255


def _occurring(values: npt.NDArray[np.number]) -> tuple[npt.NDArray[np.number], npt.NDArray[np.int64]]:
    """Return the values that occur, in ascending order, and how often each does."""
    low, high = values.min(), values.max()
    lows, highs = np.count_nonzero(values == low), np.count_nonzero(values == high)
    if low < high and lows + highs == values.size:  # most masks; sorting all pixels takes seconds
        return np.array([low, high]), np.array([lows, highs])
    return np.unique(values, return_counts=True)


def _looks_like_a_photograph(levels: Levels) -> bool:
    bends = (float(np.abs(np.diff(levels, 2, axis=axis)).mean()) for axis in (0, 1) if levels.shape[axis] > 2)
    ends = (levels <= _BACKGROUND) | (levels >= 1 - _BACKGROUND)
    return max(bends, default=0) > _SMOOTH and float(ends.mean()) < _MOSTLY


def _flat(values: npt.NDArray[np.number]) -> npt.NDArray[np.bool_]:
    """Mark the pixels of 2×2 windows of one value: regions have them, the edges of a region do not."""
    same = values[1:, 1:] == values[:-1, :-1]
    same &= (values[1:, :-1] == values[:-1, :-1]) & (values[:-1, 1:] == values[:-1, :-1])
    flat = np.zeros(values.shape, dtype=bool)
    for rows in (slice(None, -1), slice(1, None)):
        for columns in (slice(None, -1), slice(1, None)):
            flat[rows, columns] |= same
    return flat


def _was_deep(path: str | Path) -> bool:
    """Whether Pillow dropped half of the 16 bits of each channel."""
    with open_image(path) as image:
        return any("16" in str(tile[-1]) for tile in image.tile)


def _number(value: float) -> str:
    return f"{value:g}"


def _hexadecimal(value: float) -> str:
    return f"#{int(value):06x}"


def _undecided(
    path: str | Path,
    found: npt.NDArray[np.number],
    counts: npt.NDArray[np.int64],
    complaint: str,
    name: Callable[[float], str],
) -> DataError:
    """Describe the values of a file that do not show what is inside."""
    order = np.argsort(-counts, kind="stable")[:_SHOWN]
    shown = ", ".join(f"{name(float(found[n]))}: {counts[n]}" for n in sorted(order))
    more = f", … ({len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
    plural = "value" if len(found) == 1 else "values"
    return DataError(
        f"{path} has {len(found)} {plural}, {complaint} (value: pixels): {shown}{more}. Say which mean "
        "inside, by inside=VALUES (--inside VALUES) such as 1, '#ff0000' or 'gray' for a soft mask, or name "
        "their classes in a legend."
    )
