"""`attnguide layers`: which layers of a model can be looked at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from attnguide.cli.console import print_json, table_console
from attnguide.cli.options import ModelChoice, pair_of_sizes, structure_options

if TYPE_CHECKING:
    from attnguide.layers import Candidate

__all__ = ["layers"]

_WHY = {
    "feature_info": "the model's own metadata names it as its last feature map",
    "probe": "the last layer with rows and columns over which the logits' gradient is spread",
}


@dataclass(frozen=True)
class _Row:
    """A layer, or the stage that it stands for."""

    candidate: Candidate
    count: int
    chosen: bool


@click.command(short_help="Show which layers of a model can be looked at.")
@click.argument("model", required=False)
@structure_options
@click.option(
    "--size", metavar="PIXELS", help="Size of the images: 224, or rows x columns.  [default: the model's own]"
)
@click.option("--all", "every", is_flag=True, help="List every layer, not one for each stage.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON for other programs.")
def layers(choice: ModelChoice, size: str | None, every: bool, as_json: bool) -> None:
    """Show which layers of MODEL can be looked at, and which one is chosen.

    MODEL is a name of timm or torchvision/NAME; without one, the small embedded classifier. Weights are not
    needed: the shapes of a forward pass and the reach of its gradient tell.
    """
    shape = None if size is None else pair_of_sizes(size)
    import torch

    from attnguide import layers as core

    loaded = choice.load()
    height, width = shape or loaded.size
    generator = torch.Generator().manual_seed(0)
    candidates = _candidates(loaded.model, torch.rand(2, 3, height, width, generator=generator), size)
    chosen = core.choose(loaded.model, candidates)
    rows = _rows(candidates, chosen, every)
    if as_json:
        print_json([_as_json(row) for row in rows])
        return
    _print(rows, chosen, f"{loaded.name}, {height}×{width} pixels")


def _candidates(model: Any, images: Any, size: str | None) -> list[Candidate]:
    from attnguide import layers as core
    from attnguide.errors import AttnGuideError, InputError

    try:
        return core.list_candidates(model, images)
    except AttnGuideError:
        raise
    # Whatever a model raises for a size that it was not made for: an assertion, a mismatch of shapes …
    except Exception as error:
        if size is None:
            raise
        raise InputError(
            f"the model does not take images of --size {size}: {error}. Try its own size."
        ) from error


def _rows(candidates: Sequence[Candidate], chosen: Candidate, every: bool) -> list[_Row]:
    """Join the layers of a stage into a row that shows the last usable of them, or the chosen one."""

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
    """What a stage has in common: the grid, and in a transformer, where all have the same, the block."""
    block = re.match(r".*?\.\d+", candidate.name) if candidate.layout.kind == "tokens" else None
    return candidate.layout.grid, candidate.layout.kind == "tokens", block and block[0]


def _as_json(row: _Row) -> dict[str, Any]:
    candidate = row.candidate
    return {
        "name": candidate.name,
        "names": list(candidate.names),
        "type": candidate.type,
        "grid": list(candidate.layout.grid),
        "channels": candidate.channels,
        "layout": candidate.layout.kind,
        "prefix": candidate.layout.prefix,
        "spread": candidate.spread,
        "usable": candidate.usable,
        "layers": row.count,
        "chosen": row.chosen,
        "how": candidate.how if row.chosen else None,
    }


def _print(rows: Sequence[_Row], chosen: Candidate, title: str) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("layer", no_wrap=True)
    table.add_column("type", no_wrap=True)
    for name in ("grid", "channels"):
        table.add_column(name, justify="right")
    table.add_column("layout", no_wrap=True)
    table.add_column("gradient", justify="right")
    stages = any(row.count > 1 for row in rows)
    if stages:
        table.add_column("alike", justify="right")
    for row in rows:
        candidate = row.candidate
        grid = f"{candidate.layout.grid[0]}×{candidate.layout.grid[1]}"
        prefix = f" + {candidate.layout.prefix}" if candidate.layout.prefix else ""
        style = "bold green" if row.chosen else "" if candidate.usable else "dim"
        cells = [
            "▶" if row.chosen else "",
            candidate.name,
            candidate.type,
            grid,
            str(candidate.channels),
            candidate.layout.kind + prefix,
            f"{candidate.spread:.0%}",
        ]
        table.add_row(*map(Text, cells + [str(row.count)] * stages), style=style)
    console = table_console()
    console.print(table)
    console.print(Text(f"▶ {chosen.name}: {_WHY[chosen.how]}."), soft_wrap=True)
    console.print(
        Text(
            "gradient: share of the positions that the logits depend on. Dim layers are not chosen by "
            "themselves."
        ),
        style="dim",
        soft_wrap=True,
    )
