"""Determines the layout of a layer's output: rules from shapes, and a fit to measured positions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import isqrt, prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from attnguide.trace import Kind, Layout, order_index

__all__ = [
    "agreement",
    "assume",
    "codes",
    "decode",
    "fit",
    "grids_of",
    "is_informative",
    "likely_grids",
    "needed",
]

#: Numbers of tokens beside the patches that shape rules try: class token, distillation token, registers.
_EXTRAS = (0, 1, 2, 5, 3, 4, 8, 9)
#: As many are tried against a measurement.
_MOST_EXTRAS = 16
#: Standard deviation of measured positions, in units of the image's side, that is informative.
_LEAST_SPREAD = 0.005
#: Grids may differ from the image's proportions by this factor: patches need not be square.
_MOST_SKEW = 2.05


# ------------------------------------------------------------------ shape rules


def assume(shape: tuple[int, ...], image_size: tuple[int, int], prefix: int | None = None) -> Layout | None:
    """Determine rows, columns and channels of an output from its shape alone.

    Args:
        shape: Shape of the output: `(B, C, h, w)`, `(B, h, w, C)` or `(B, tokens, C)`.
        image_size: `(H, W)` of the images; the grid must have their proportions, to within one cell.
        prefix: Number of prefix tokens, if the model has it among its attributes; tried first.

    Returns:
        The layout, or None if the output has no rows and columns.
    """
    if len(shape) == 4:
        grids: dict[Kind, tuple[int, int]] = {"nchw": (shape[2], shape[3]), "nhwc": (shape[1], shape[2])}
        fitting = [
            (_misfit(grid, image_size), kind) for kind, grid in grids.items() if _fits(grid, image_size)
        ]
        # On a tie the order of the dictionary decides: channels first is the convention.
        kind = min(fitting, key=lambda item: item[0])[1] if fitting else None
        return None if kind is None else Layout(kind, grids[kind])
    if len(shape) == 3:
        for count in _EXTRAS if prefix is None else (prefix, *_EXTRAS):
            grid = _grid(shape[1] - count, image_size)
            if grid is not None:
                return Layout("tokens", grid, count)
    return None


def _misfit(grid: tuple[int, int], image_size: tuple[int, int]) -> float:
    """By how many rows a grid misses the proportions of the image."""
    return abs(grid[0] - grid[1] * image_size[0] / image_size[1])


def _fits(grid: tuple[int, int], image_size: tuple[int, int]) -> bool:
    inside = grid[0] <= image_size[0] and grid[1] <= image_size[1]
    return inside and grid[0] * grid[1] >= 4 and _misfit(grid, image_size) < 1


def _grid(tokens: int, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of so many patches, or None."""
    if tokens < 4:
        return None
    guess = isqrt(round(tokens * image_size[1] / image_size[0]))
    for width in (guess, guess + 1):
        if width and tokens % width == 0 and _fits((tokens // width, width), image_size):
            return tokens // width, width
    return None


# ------------------------------------------------------------------ measurement


def fit(
    kind: Kind, places: tuple[int, ...], rows: Tensor, columns: Tensor, image_size: tuple[int, int]
) -> tuple[float, Layout] | None:
    """Find the arrangement that agrees best with measured positions.

    Args:
        kind: `"nchw"` or `"nct"` if the channels are taken to come first, else `"nhwc"`, `"tokens"` or
            `"windows"`.
        places: Sizes of the axes between batch and channels.
        rows: Measured vertical position of each place in the image, in [0, 1]; `(prod(places),)`.
        columns: Likewise, how far to the right.
        image_size: `(H, W)` of the images.

    Returns:
        The smaller of the correlations of measured and expected rows, and columns, with the layout; None if
        no grid is possible.
    """
    best: tuple[float, Layout] | None = None
    worth = float("-inf")
    for layout in _arrangements(kind, places, image_size):
        score = agreement(layout, rows, columns)
        # Patches taken for prefix tokens would always agree a little better.
        merit = score - (layout.prefix + layout.suffix) / (3 * len(rows))
        # What is tried first is what is common: it must be beaten clearly.
        if merit > worth + 1e-3:
            worth, best = merit, (score, layout)
    return best


def agreement(layout: Layout, rows: Tensor, columns: Tensor) -> float:
    """Return the smaller of the correlations between measured and expected rows, and columns."""
    height, width = layout.grid
    span = slice(layout.prefix, rows.numel() - layout.suffix)
    order = slice(None) if layout.order is None else order_index(layout.order, rows.device)
    expected_rows = torch.arange(height, dtype=rows.dtype, device=rows.device).repeat_interleave(width)
    expected_columns = torch.arange(width, dtype=rows.dtype, device=rows.device).repeat(height)
    return min(
        _correlation(rows[span][order], expected_rows), _correlation(columns[span][order], expected_columns)
    )


def is_informative(positions: Tensor) -> bool:
    """Whether the positions of a layer depend on different parts of the image at all.

    Where all see the same, what is left is rounding, and rounding has patterns of its own.
    """
    return float(positions.std(correction=0)) >= _LEAST_SPREAD


def _correlation(measured: Tensor, expected: Tensor) -> float:
    if not is_informative(measured):
        return 0.0
    cosine: Tensor = F.cosine_similarity(measured - measured.mean(), expected - expected.mean(), dim=0)
    return cosine.item()


def needed(places: int) -> float:
    """Return the least correlation that is not explained by chance for this number of positions."""
    return max(0.3, min(3 / sqrt(max(places - 1, 1)), 0.95))


def _arrangements(kind: Kind, places: tuple[int, ...], image_size: tuple[int, int]) -> Iterator[Layout]:
    """List the arrangements to try, the common ones first."""
    if len(places) == 2 and kind in ("nchw", "nhwc"):
        height, width = places
        if min(places) >= 2 and _skew((height, width), image_size) < _MOST_SKEW:
            yield Layout(kind, (height, width))
        if min(places) >= 2 and _skew((width, height), image_size) < _MOST_SKEW:
            yield Layout(kind, (width, height), order=_column_major(width, height))
    if kind in ("nchw", "nhwc"):
        return
    count = prod(places)
    most = min(_MOST_EXTRAS, count // 4) if len(places) == 1 else 0
    for extras in range(most + 1):
        for grid in grids_of(count - extras, image_size):
            for prefix in dict.fromkeys((extras, 0)):
                suffix = extras - prefix
                yield Layout(kind, grid, prefix, suffix)
                yield Layout(kind, grid, prefix, suffix, _column_major(*grid))
                for window in _windows(grid):
                    yield Layout(kind, grid, prefix, suffix, _window_major(*grid, *window))


def grids_of(count: int, image_size: tuple[int, int]) -> list[tuple[int, int]]:
    """List grids (rows, columns) of so many positions, the closest to the image's proportions first."""
    grids = [(count // width, width) for width in range(2, count // 2 + 1) if count % width == 0]
    skewed = [(_skew(grid, image_size), grid) for grid in grids]
    return [grid for skew, grid in sorted(skewed) if skew < _MOST_SKEW]


def likely_grids(count: int, image_size: tuple[int, int], *, spare: bool) -> list[tuple[int, int]]:
    """Return the grids near the image's proportions for so many places, or, if some may be spare, fewer."""
    grids = [
        (round(skew, 1), extras, grid)
        for extras in range(min(_MOST_EXTRAS, count // 4) + 1 if spare else 1)
        for grid in grids_of(count - extras, image_size)
        if (skew := _skew(grid, image_size)) < 1.3
    ]
    return [grid for _, _, grid in sorted(grids)]


def _skew(grid: tuple[int, int], image_size: tuple[int, int]) -> float:
    ratio: float = grid[0] * image_size[1] / (grid[1] * image_size[0])
    return ratio if ratio > 1 else 1 / ratio


def _column_major(height: int, width: int) -> tuple[int, ...]:
    return tuple(torch.arange(height * width).view(width, height).t().flatten().tolist())


def _windows(grid: tuple[int, int]) -> list[tuple[int, int]]:
    height, width = grid
    return [
        (rows, columns)
        for rows in range(2, height + 1)
        for columns in range(2, width + 1)
        # Square windows, and as many windows as there are rows and columns in one.
        if height % rows == 0 and width % columns == 0 and rows == columns and (rows, columns) != grid
    ]


@lru_cache(maxsize=256)
def _window_major(height: int, width: int, rows: int, columns: int) -> tuple[int, ...]:
    """Order of windows one after the other, each row by row."""
    index = torch.arange(height * width).view(height // rows, width // columns, rows, columns)
    return tuple(index.transpose(1, 2).flatten().tolist())


# ------------------------------------------------------------- patches out of order


def codes(grid: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Make patterns of noise that encode the row and the column of each patch as binary numbers.

    Args:
        grid: Rows and columns of patches.
        image_size: `(H, W)` of the images.

    Returns:
        `(1 + bits, H, W)` in [0, 1]: everywhere, then a pattern for each bit of the row and of the column.
    """
    height, width = grid
    rows = torch.arange(height)[:, None].expand(grid)
    columns = torch.arange(width).expand(grid)
    bits = [(rows >> bit) & 1 for bit in range((height - 1).bit_length())]
    bits += [(columns >> bit) & 1 for bit in range((width - 1).bit_length())]
    patterns = torch.stack([torch.ones_like(rows), *bits]).float()
    return F.interpolate(patterns[:, None], size=image_size, mode="nearest")[:, 0]


def decode(kind: Kind, grid: tuple[int, int], extras: int, answers: Tensor) -> Layout | None:
    """Read the order of patches from their answers to `codes`.

    Args:
        kind: How the output is taken apart.
        grid: Rows and columns.
        extras: Number of places that hold no patch, before or after the others.
        answers: How strongly each place answers to each pattern, `(1 + bits, places)`.

    Returns:
        The layout; None if the answers do not give each patch a number of its own.
    """
    height, width = grid
    for prefix in dict.fromkeys((extras, 0)):
        span = answers[:, prefix : answers.shape[1] - extras + prefix]
        shares = span[1:] / span[:1].clamp_min(torch.finfo(span.dtype).tiny)
        # What mixes over the whole image lifts all answers alike: the middle separates ones from zeros.
        middle = (shares.amax(dim=1, keepdim=True) + shares.amin(dim=1, keepdim=True)) / 2
        bits = (shares > middle).long()
        of_rows = (height - 1).bit_length()
        row, column = _number(bits[:of_rows]), _number(bits[of_rows:])
        cell = row * width + column
        if bool((row < height).all() & (column < width).all()) and len(set(cell.tolist())) == height * width:
            return Layout(kind, grid, prefix, extras - prefix, tuple(cell.argsort().tolist()))
    return None


def _number(bits: Tensor) -> Tensor:
    """Read binary numbers, the lowest bit first, `(bits, places)`."""
    return (bits * 2 ** torch.arange(len(bits))[:, None]).sum(dim=0)
