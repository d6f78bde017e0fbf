"""Pictures: colour maps, overlays, contact sheets."""

from __future__ import annotations

import base64
import io
import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from attnguide import functional
from attnguide.errors import InputError

__all__ = [
    "PERCENTILE",
    "SMOOTHING",
    "color_bar",
    "colorize",
    "contact_sheet",
    "data_uri",
    "displayable",
    "has_signs",
    "overlay",
    "scaled",
    "show",
    "to_pil",
    "to_png",
    "with_legend",
]

PERCENTILE = 99.5
"""Percentile of a map's values at which its colours end: the few above have the color of that value."""

SMOOTHING = 0.01
"""Standard deviation of the Gaussian that smooths maps for display, as a share of the longer side. Maps of a
coarse layer stay as they are; of maps with a value for each pixel it shows the sum over a neighbourhood."""

#: From cold to hot through colours that keep their order in grey and for the colour-blind: violet, magenta,
#: orange, yellow.
_PALETTE = torch.tensor(
    [
        [0.05, 0.03, 0.25],
        [0.30, 0.05, 0.55],
        [0.60, 0.12, 0.55],
        [0.85, 0.28, 0.40],
        [0.97, 0.50, 0.20],
        [0.99, 0.75, 0.15],
        [0.99, 0.97, 0.50],
    ]
)
#: Of signed maps: against the class in blue, for it in red, which the colour-blind distinguish too.
#: The middle is never seen over a photograph, since the map is transparent there.
_DIVERGING = torch.tensor(
    [
        [0.02, 0.19, 0.52],
        [0.13, 0.44, 0.79],
        [0.57, 0.77, 0.91],
        [0.97, 0.97, 0.97],
        [0.98, 0.66, 0.51],
        [0.86, 0.24, 0.18],
        [0.50, 0.02, 0.10],
    ]
)
#: Colours of pages: of the paper, of text, and of text that matters less.
_PAPER, _INK, _MUTED = (250, 250, 248), (30, 30, 30), (130, 130, 126)
#: How bright red, green and blue look (ITU-R 601).
_LUMA = (0.299, 0.587, 0.114)


def colorize(maps: Tensor, *, signed: bool = False) -> Tensor:
    """Colour maps as RGB in [0, 1], `(..., 3, h, w)`.

    Args:
        maps: Maps `(..., h, w)` in [0, 1], from violet to yellow; signed ones in [−1, 1], from blue through
            white to red.
        signed: Whether the maps are signed.
    """
    values = functional.full_precision(maps)
    colors = (_DIVERGING if signed else _PALETTE).to(maps.device).T.contiguous()
    position = ((values + 1) / 2 if signed else values).clamp(0, 1) * (colors.shape[1] - 1)
    low = position.int().clamp(max=colors.shape[1] - 2)
    # Channel by channel, which is several times as fast as picking rows of three.
    start, step = (
        each.index_select(1, low.flatten()).view(3, *low.shape) for each in (colors, colors.diff(dim=1))
    )
    return torch.movedim(torch.addcmul(start, step, position - low), 0, -3)


def has_signs(maps: Tensor) -> bool:
    """Whether any value is below 0, as evidence against a class is."""
    return bool(maps.numel()) and bool(maps.amin() < 0)


def scaled(
    maps: Tensor,
    *,
    size: tuple[int, int] | None = None,
    signed: bool | None = None,
    percentile: float = PERCENTILE,
    smooth: float = SMOOTHING,
) -> Tensor:
    """Scale maps for display, each by its own values, of which the strongest few are cut off.

    Args:
        maps: Maps `(..., h, w)` of any range.
        size: `(H, W)` to which they are resized first.
        signed: Whether 0 is the middle; by default if any value is below 0.
        percentile: Percentile of the values, of signed maps of the magnitudes, that becomes 1.
        smooth: Standard deviation of the smoothing, as a share of the longer side; 0 for none.

    Returns:
        Maps `(..., H, W)`, in [0, 1] from the lowest value, or in [−1, 1] with 0 where it was. A flat map
        becomes zeros.

    Raises:
        InputError: If the percentile is not in (0, 100], or `smooth` not in [0, 1].
    """
    if not isinstance(percentile, (int, float)) or not 0 < percentile <= 100:
        raise InputError(f"percentile={percentile!r} must be above 0, and at most 100.")
    if not isinstance(smooth, (int, float)) or not 0 <= smooth <= 1:
        raise InputError(f"smooth={smooth!r} must be in [0, 1].")
    signed = has_signs(maps) if signed is None else signed
    maps = functional.full_precision(maps.detach())
    shape = (*maps.shape[:-2], *(size or maps.shape[-2:]))
    if not maps.numel():
        return maps.new_zeros(shape)
    maps = maps.reshape(-1, *maps.shape[-2:])
    maps = _smoothed(maps if size is None else functional.resize(maps, size), smooth)
    if not signed:
        maps = maps - maps.amin(dim=(-2, -1), keepdim=True)
    strength = maps.abs().flatten(1)
    rank = max(1, math.ceil(strength.shape[-1] * percentile / 100))
    top = strength.kthvalue(rank, dim=-1).values
    # Where all but a few values are 0, these few are what there is to see.
    top = torch.where(top > 0, top, strength.amax(dim=-1))[:, None, None]
    maps = maps / torch.where(top > 0, top, torch.ones_like(top))
    return maps.clamp(-1 if signed else 0, 1).view(shape)


def color_bar(width: int, height: int, *, signed: bool = False) -> Image.Image:
    """Draw the colours of maps from the lowest value, on the left, to the highest."""
    values = torch.linspace(-1 if signed else 0, 1, width).expand(max(1, height), width)
    return to_pil(colorize(values, signed=signed))


def displayable(images: Tensor) -> Tensor:
    """Bring images `(B, C, H, W)` of any range to RGB in [0, 1], each by its own minimum and maximum."""
    images = functional.full_precision(images.detach())
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    return (images - low) / torch.where(high > low, high - low, torch.ones_like(high))


def overlay(images: Tensor, maps: Tensor, alpha: float = 0.5, *, signed: bool | None = None) -> Tensor:
    """Lay coloured maps over images, whose own colours fade by as much, so that the two are distinct.

    Signed maps are drawn in red and blue on a grey image, and are transparent where they are 0.

    Args:
        images: `(B, 3, H, W)` in [0, 1].
        maps: `(B, T, h, w)` in [0, 1], or signed in [−1, 1], as [`scaled`][attnguide.visual.scaled] returns
            them; resized to the images.
        alpha: Opacity of the maps, in [0, 1]; 0 gives the images as they are.
        signed: Whether the maps are signed; by default if any value is below 0.

    Returns:
        uint8 pictures `(B, T, 3, H, W)`, on the CPU.

    Raises:
        InputError: If the numbers of images and maps differ, or alpha is out of range.
    """
    if (
        not isinstance(images, Tensor)
        or images.ndim != 4
        or images.shape[1] != 3
        or maps.ndim != 4
        or len(images) != len(maps)
    ):
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(
            f"cannot lay maps {tuple(maps.shape)} over images {shape}: give (B, T, h, w) and (B, 3, H, W)."
        )
    if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise InputError(f"alpha={alpha!r} must be in [0, 1].")
    batch, count = maps.shape[:2]
    height, width = images.shape[-2:]
    if not count:
        return torch.zeros(batch, 0, 3, height, width, dtype=torch.uint8)
    signed = has_signs(maps) if signed is None else signed
    sized = functional.resize(maps.detach().flatten(0, 1).float(), (height, width))
    sized = sized.view(batch, count, height, width)
    base = images.detach().to(sized)[:, None]
    gray = (base * base.new_tensor(_LUMA)[:, None, None]).sum(dim=2, keepdim=True)
    faded = torch.lerp(base, _pale(gray, alpha) if signed else gray, min(1.0, 2 * alpha) if signed else alpha)
    mixed = torch.lerp(faded.expand(-1, count, -1, -1, -1), *_painted(sized, signed, alpha))
    picture: Tensor = (mixed.clamp(0, 1) * 255).round().byte().cpu()
    return picture


def _pale(gray: Tensor, alpha: float) -> Tensor:
    """Lighten a grey image, on which red and blue then stand out, in dark places too."""
    return 1 - (1 - gray) * (1 - 0.7 * alpha)


def _painted(maps: Tensor, signed: bool, alpha: float) -> tuple[Tensor, Tensor]:
    """Return colours `(B, T, 3, H, W)` and their opacity, which in signed maps grows with the value."""
    if not signed:
        return colorize(maps), maps.new_tensor(alpha)
    # The opacity grows slowly: many weak values of either sign would hide the few that are strong.
    opacity = 1 - (1 - alpha) ** (3 * maps.abs() ** 1.5)
    return colorize(maps.sign() * (0.5 + 0.35 * maps.abs()), signed=True), opacity[:, :, None]


def _smoothed(maps: Tensor, share: float) -> Tensor:
    """Smooth maps `(N, h, w)` by a Gaussian."""
    height, width = maps.shape[-2:]
    sigma = share * max(height, width)
    radius = min(math.ceil(3 * sigma), height - 1, width - 1)  # the border is a reflection
    if radius < 1:
        return maps
    # One axis after the other: a kernel of both would take several times as long.
    taps, sigmas = 2 * radius + 1, [sigma, sigma]
    smoothed: Tensor = gaussian_blur(gaussian_blur(maps[:, None], [taps, 1], sigmas), [1, taps], sigmas)
    return smoothed[:, 0]


def to_pil(picture: Tensor) -> Image.Image:
    """Turn a picture `(3, H, W)`, uint8 or in [0, 1], into a PIL image."""
    if picture.is_floating_point():
        picture = (picture.clamp(0, 1) * 255).round().byte()
    return Image.fromarray(picture.cpu().permute(1, 2, 0).contiguous().numpy())


def to_png(picture: Image.Image) -> bytes:
    """Return a picture as the content of a PNG file, which a notebook shows."""
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def show(picture: Image.Image) -> None:
    """Show a picture: in a notebook below the cell, elsewhere in the system's viewer."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None:
        picture.show()
        return
    from IPython.display import display  # it runs, so it is installed

    display(picture)  # type: ignore[no-untyped-call]


def data_uri(picture: Image.Image | bytes, format: Literal["png", "jpeg"] = "png") -> str:
    """Write a picture as a link that an HTML page shows without the file.

    Args:
        picture: The picture, or the content of its file.
        format: Format of the file. Photographs are a fraction of the size as JPEG.
    """
    if not isinstance(picture, bytes):
        buffer = io.BytesIO()
        picture.save(buffer, format, quality=90)
        picture = buffer.getvalue()
    return f"data:image/{format};base64,{base64.b64encode(picture).decode('ascii')}"


def contact_sheet(
    pictures: Sequence[Image.Image | None],
    captions: Sequence[str] = (),
    *,
    columns: int = 0,
    cell: int = 160,
    group: int = 1,
) -> Image.Image:
    """Put pictures on one page, row by row.

    Args:
        pictures: Any sizes; each is fitted into a square cell. None leaves the cell empty.
        captions: One for each picture, or none.
        columns: Number of groups in a row; by default such that the page is a little wider than high.
        cell: Side of a cell in pixels.
        group: Number of successive pictures that belong together, such as an image and its maps. They touch,
            and the caption of the first is muted.

    Returns:
        The page.

    Raises:
        InputError: If there are no pictures, or the captions do not fit.
    """
    from PIL import ImageDraw, ImageFont  # only here, and fonts are slow to load

    if not pictures or len(captions) not in (0, len(pictures)) or len(pictures) % group:
        raise InputError(
            f"a contact sheet needs pictures, a caption for each or none, and whole groups of {group}; got "
            f"{len(pictures)} and {len(captions)}."
        )
    count = len(pictures) // group
    columns = min(count, columns or max(1, round((count * 1.4 / group) ** 0.5)))
    inner, gap, line = 2, 10 if group == 1 else 18, 20 if captions else 0
    wide, high = group * (cell + inner) - inner + gap, cell + line + gap
    page = Image.new("RGB", (columns * wide + gap, -(-count // columns) * high + gap), _PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)
    for index, picture in enumerate(pictures):
        place, within = divmod(index, group)
        left = gap + (place % columns) * wide + within * (cell + inner)
        top = gap + (place // columns) * high
        if picture is not None:
            scale = cell / max(picture.size)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            small = picture.resize(size, Image.Resampling.LANCZOS)
            page.paste(small, (left + (cell - small.width) // 2, top + (cell - small.height) // 2))
        if captions:
            muted = group > 1 and within == 0
            text = _fitted(captions[index], cell - 4, lambda text: draw.textlength(text, font=font))
            draw.text((left + 1, top + cell + 3), text, fill=_MUTED if muted else _INK, font=font)
    return page


def with_legend(page: Image.Image, text: str, *, signed: bool = False) -> Image.Image:
    """Put a colour bar under a page of maps, and a line of text beside it.

    Args:
        page: The page, such as a contact sheet.
        text: What the maps are. Shortened to the width of the page.
        signed: Whether the maps are signed.
    """
    from PIL import ImageDraw, ImageFont

    bar, gap, line, margin = min(140, page.width // 3), 6, 20, 18
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)

    def measure(text: str) -> float:
        return draw.textlength(text, font=font)

    labels = ("against", "for") if signed else ("low", "high")
    width = bar + 2 * gap + round(sum(map(measure, labels)))
    beside = margin + width + 2 * gap + measure(text) <= page.width - margin
    result = Image.new("RGB", (page.width, page.height + line + (0 if beside else line)), _PAPER)
    result.paste(page, (0, 0))
    draw = ImageDraw.Draw(result)
    left, top = margin, page.height - 6
    draw.text((left, top), labels[0], fill=_INK, font=font)
    left += round(measure(labels[0])) + gap
    result.paste(color_bar(bar, 12, signed=signed), (left, top + 2))
    left += bar + gap
    draw.text((left, top), labels[1], fill=_INK, font=font)
    place = (margin + width + 2 * gap, top) if beside else (margin, top + line)
    draw.text(place, _fitted(text, page.width - 2 * margin, measure), fill=_MUTED, font=font)
    return result


def _fitted(text: str, width: float, measure: Callable[[str], float]) -> str:
    """Shorten a text to a width, on one line."""
    # A file name need not be valid Unicode, but what is drawn must be; it may have line breaks, too.
    if width < 1:
        return ""
    text = text.encode("utf-8", "replace").decode()
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    if measure(text[: int(width)]) <= width and len(text) <= width:
        return text
    # No letter is narrower than a pixel.
    lengths = range(1, min(len(text), int(width)))
    fitting = bisect_right(lengths, width, key=lambda length: measure(text[:length] + "…"))
    return text[:fitting] + "…" if fitting else ""
