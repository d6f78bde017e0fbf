"""Pictures: colour maps, overlays, contact sheets."""

from __future__ import annotations

import base64
import io
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from attnguide import functional
from attnguide.errors import InputError

__all__ = ["colorize", "contact_sheet", "data_uri", "displayable", "overlay", "to_pil"]

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
#: How bright red, green and blue look (ITU-R 601).
_LUMA = (0.299, 0.587, 0.114)


def colorize(maps: Tensor) -> Tensor:
    """Colour maps in [0, 1], `(..., h, w)`, as RGB in [0, 1], `(..., 3, h, w)`."""
    position = functional.full_precision(maps).clamp(0, 1) * (len(_PALETTE) - 1)
    low = position.floor().long().clamp(max=len(_PALETTE) - 2)
    palette = _PALETTE.to(maps.device)
    share = (position - low)[..., None]
    return torch.movedim(palette[low] * (1 - share) + palette[low + 1] * share, -1, -3)


def displayable(images: Tensor) -> Tensor:
    """Bring images `(B, C, H, W)` of any range to RGB in [0, 1], each by its own minimum and maximum."""
    images = functional.full_precision(images.detach())
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    return (images - low) / torch.where(high > low, high - low, torch.ones_like(high))


def overlay(images: Tensor, maps: Tensor, alpha: float = 0.5) -> Tensor:
    """Lay coloured maps over images, whose own colours fade by as much, so that the two are distinct.

    Args:
        images: `(B, 3, H, W)` in [0, 1].
        maps: `(B, T, h, w)` in [0, 1]; resized to the images.
        alpha: Opacity of the maps, in [0, 1]; 0 gives the images as they are.

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
    sized = functional.resize(maps.flatten(0, 1).float(), (height, width)).view(batch, count, height, width)
    base = images.to(sized)[:, None]
    gray = (base * base.new_tensor(_LUMA)[:, None, None]).sum(dim=2, keepdim=True)
    faded = torch.lerp(base, gray, alpha)
    mixed = torch.lerp(faded.expand(-1, count, -1, -1, -1), colorize(sized), alpha)
    picture: Tensor = (mixed.clamp(0, 1) * 255).round().byte().cpu()
    return picture


def to_pil(picture: Tensor) -> Image.Image:
    """Turn a picture `(3, H, W)`, uint8 or in [0, 1], into a PIL image."""
    if picture.is_floating_point():
        picture = (picture.clamp(0, 1) * 255).round().byte()
    return Image.fromarray(picture.cpu().permute(1, 2, 0).contiguous().numpy())


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
    page = Image.new("RGB", (columns * wide + gap, -(-count // columns) * high + gap), (250, 250, 248))
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
            draw.text(
                (left + 1, top + cell + 3), text, fill=(130, 130, 126) if muted else (30, 30, 30), font=font
            )
    return page


def _fitted(text: str, width: float, measure: Callable[[str], float]) -> str:
    """Shorten a text to a width, on one line."""
    # A file name need not be valid Unicode, but what is drawn must be; it may have line breaks, too.
    text = text.encode("utf-8", "replace").decode()
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    if measure(text[: int(width)]) <= width and len(text) <= width:
        return text
    # No letter is narrower than a pixel.
    lengths = range(1, min(len(text), int(width)))
    fitting = bisect_right(lengths, width, key=lambda length: measure(text[:length] + "…"))
    return text[:fitting] + "…" if fitting else ""
