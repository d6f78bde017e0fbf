"""`attnguide layers`: shows the layers at which a model can be explained."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from attnguide.cli.console import print_json, table_console
from attnguide.cli.options import ModelChoice, pair_of_sizes, structure_options

if TYPE_CHECKING:
    from attnguide.layers import Candidate

__all__ = ["layers"]

_HOW = {
    "measured": "perturbed images show which part of the image each position depends on",
    "inherited": "measured at another layer of the same shape",
    "assumed": "not measured; its shape and the model's metadata suggest it",
}


@dataclass(frozen=True)
class _Row:
    """A layer, alone or as the representative of its stage."""

    candidate: Candidate
    count: int
    chosen: bool
    reach: float = math.nan


@click.command(short_help="Show the layers at which a model can be explained.")
@click.argument("model", required=False)
@structure_options
@click.option(
    "--size", metavar="PIXELS", help="Size of the images: 224, or rows x columns.  [default: the model's own]"
)
@click.option("--all", "every", is_flag=True, help="List every layer, not one for each stage.")
@click.option("--no-measure", is_flag=True, help="Do not measure: use only shapes and metadata.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON, for other programs.")
def layers(choice: ModelChoice, size: str | None, every: bool, no_measure: bool, as_json: bool) -> None:
    """Show the layers at which MODEL can be explained, and which of them is the default.

    MODEL is a model of timm, torchvision/NAME, or hf:NAME_OR_FOLDER; by default the small embedded
    classifier. Weights are not needed: the model runs on a few perturbed images, which shows the part of the
    image that each position depends on, and one backward pass shows the positions that the logits depend on.
    """
    shape = None if size is None else pair_of_sizes(size)
    import torch

    from attnguide import layers as core

    loaded = choice.load()
    height, width = shape or loaded.size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, height, width, generator=generator)
    candidates = _candidates(loaded.model, images, size, measure=not no_measure)
    chosen = core.choose(loaded.model, candidates)
    rows = _rows(candidates, chosen, every)
    if not no_measure:
        reached = core.reach(loaded.model, images, [row.candidate.layer for row in rows])
        rows = [replace(row, reach=reached[row.candidate.layer.name]) for row in rows]
    if as_json:
        print_json([_as_json(row) for row in rows])
        return
    _print(rows, chosen, f"{loaded.name}, {height}×{width} pixels")


def _candidates(model: Any, images: Any, size: str | None, *, measure: bool) -> list[Candidate]:
    from attnguide import layers as core
    from attnguide.errors import AttnGuideError, InputError

    try:
        return core.list_candidates(model, images, measure=measure)
    except AttnGuideError:
        raise
    # A model may raise anything for a size that it was not made for: an assertion, a mismatch of shapes …
    except Exception as error:
        if size is None:
            raise
        raise InputError(
            f"the model does not take images of --size {size}: {error}. Try its own size."
        ) from error


def _rows(candidates: Sequence[Candidate], chosen: Candidate, every: bool) -> list[_Row]:
    """Join the layers of each stage into a row with the chosen layer, or else the last usable one."""

    def is_chosen(candidate: Candidate) -> bool:
        return chosen.names == candidate.names

    if every:
        return [_Row(chosen if is_chosen(c) else c, 1, is_chosen(c)) for c in candidates]
    rows: list[_Row] = []
    for _, stage in groupby(candidates, key=_stage):
        members = list(stage)
        hit = any(is_chosen(member) for member in members)
        shown = chosen if hit else ([member for member in members if member.usable] or members)[-1]
        rows.append(_Row(shown, len(members), hit))
    return rows


def _stage(candidate: Candidate) -> tuple[Any, ...]:
    """Return what the layers of a stage share: the grid, and in a transformer, which has one, the block."""
    block = re.match(r".*?\.\d+", candidate.layer.name) if candidate.layer.layout.kind == "tokens" else None
    return candidate.layer.layout.grid, candidate.layer.layout.kind == "tokens", block and block[0]


def _as_json(row: _Row) -> dict[str, Any]:
    candidate = row.candidate
    return {
        "name": candidate.layer.name,
        "names": list(candidate.names),
        "type": candidate.type,
        "grid": list(candidate.layer.layout.grid),
        "channels": candidate.channels,
        "layout": candidate.layer.layout.kind,
        "prefix": candidate.layer.layout.prefix,
        "suffix": candidate.layer.layout.suffix,
        "reordered": candidate.layer.layout.order is not None,
        "how": candidate.layer.how,
        "agreement": _number(candidate.layer.agreement),
        "gradient": _number(candidate.layer.spread),
        "sees": _number(row.reach),
        "pooled": candidate.layer.shortcuts.pooled,
        "usable": candidate.usable,
        "layers": row.count,
        "chosen": row.chosen,
    }


def _number(value: float) -> float | None:
    """Round a number for JSON, which has no NaN."""
    return None if math.isnan(value) else round(value, 4)


def _print(rows: Sequence[_Row], chosen: Candidate, title: str) -> None:
    from rich.text import Text
    from rich.tree import Tree

    tree = Tree(Text(title))
    branch = tree
    shown: tuple[Any, ...] | None = None
    for row in rows:
        if shown != row.candidate.layer.layout.grid:
            shown = row.candidate.layer.layout.grid
            branch = tree.add(Text(f"{shown[0]}×{shown[1]}"))
        branch.add(_line(row))
    console = table_console()
    console.print(tree)
    notes = [
        f"▶ {chosen.layer.name}: the last layer with rows and columns that the logits depend on throughout.",
        f"  {chosen.layer.layout}, {chosen.layer.how}: {_HOW[chosen.layer.how]}.",
        "gradient: share of the positions that the logits depend on. The number after measured: correlation "
        "of the measured positions with the layout. Dim layers are never the default.",
        "sees: share of the image that a position depends on, measured on noise with these weights (a "
        "network that was trained sees more). Where it is large, features inside a region hold what is "
        "outside of it, and a map proves little.",
    ]
    for note, style in zip(notes, ("", "", "dim", "dim"), strict=True):
        console.print(Text(note), style=style, soft_wrap=True)


def _line(row: _Row) -> Any:
    from rich.text import Text

    candidate = row.candidate
    layout = candidate.layer.layout
    parts = [
        f"{candidate.channels} channels",
        layout.kind
        + (f" + {layout.prefix}" if layout.prefix else "")
        + (", reordered" if layout.order is not None else ""),
        candidate.layer.how
        + ("" if math.isnan(candidate.layer.agreement) else f" {candidate.layer.agreement:.2f}"),
        f"gradient {candidate.layer.spread:.0%}",
    ]
    parts += [] if math.isnan(row.reach) else [f"sees {row.reach:.0%}"]
    parts += [f"{row.count} alike"] if row.count > 1 else []
    style = "bold green" if row.chosen else "" if candidate.usable else "dim"
    mark = "▶ " if row.chosen else ""
    return Text.assemble(
        (f"{mark}{candidate.layer.name}", style), (f"  {candidate.type}  {' · '.join(parts)}", style or "dim")
    )
