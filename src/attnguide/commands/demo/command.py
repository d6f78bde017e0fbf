"""`attnguide demo`: a classifier that learns a shortcut, and unlearns it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from attnguide.cli.console import progress, table_console
from attnguide.cli.options import PATH

__all__ = ["demo"]

_ROWS = {
    "biased_accuracy": "accuracy where the shortcut helps",
    "unbiased_accuracy": "accuracy where it does not",
    "cam_energy_in_mouth": "Grad-CAM on the mouth",
    "occlusion_energy_in_mouth": "occlusion on the mouth",
}


@click.command(short_help="Train a classifier twice: misled by a shortcut, and guided.")
@click.option(
    "--out",
    type=PATH,
    default=Path("attnguide-demo"),
    show_default=True,
    metavar="DIR",
    help="Where to write the report.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of the data and the weights.",
)
def demo(out: Path, seed: int) -> None:
    """Train a classifier twice, misled by a shortcut and guided to look at the mouth, and write a report.

    Everything is generated; nothing is downloaded.
    """
    from attnguide.data.files import check_target, check_writable

    check_writable(out)
    for name in ("before_after.png", "report.html", "result.json"):
        check_target(out / name)
    with progress("Starting", 1.0, keep=True) as advance:
        from attnguide.commands.demo.story import run_demo

        shown = 0.0

        def report(stage: str, done: float) -> None:
            nonlocal shown
            advance(done - shown, description=stage)
            shown = done

        result = run_demo(out, seed=seed, report=report)
    _print(result, out)


def _print(result: Mapping[str, Any], out: Path) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for title in ("before", "after"):
        table.add_column(title, justify="right")
    before, after = result["before"], result["after"]
    for key, label in _ROWS.items():
        table.add_row(label, f"{before[key]:.1%}", f"{after[key]:.1%}")
    console = table_console()
    console.print(table)
    click.echo(f"{result['seconds']:.0f} s. Report: {out / 'report.html'}")
