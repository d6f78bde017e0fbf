"""What the commands say: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from attnguide.models import LoadedModel

__all__ = ["Failure", "note", "print_json", "progress_bar", "table_console", "warn", "warn_of_random_weights"]


class Failure(click.ClickException):
    """An error of the library as one line, with the exit status of wrong usage."""

    exit_code = 2


def note(text: str) -> None:
    """Write a line to stderr."""
    click.echo(text, err=True)


def warn(text: str) -> None:
    """Write a warning to stderr, in colour where there is any."""
    click.echo(click.style("Warning: ", fg="yellow", bold=True) + text, err=True)


def warn_of_random_weights(loaded: LoadedModel) -> None:
    """Warn on stderr if nothing has been loaded into a model."""
    if loaded.weights == "random":
        warn(
            f"the weights of {loaded.name} are random, so its maps mean nothing. Give --pretrained or --checkpoint FILE."
        )


def print_json(value: Any) -> None:
    """Write a value to stdout for other programs to read."""
    click.echo(json.dumps(value, indent=2))


def table_console() -> Console:
    """A console on stdout that cuts tables only where a terminal's width forces it to."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)


def progress_bar(unit: str = "") -> Progress:
    """Make a bar with elapsed and remaining time, on stderr; enter it to start.

    Args:
        unit: What is counted; with none, a percentage is shown.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    count = (MofNCompleteColumn(), TextColumn(unit)) if unit else (TaskProgressColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *count, TimeElapsedColumn())
    return Progress(*columns, TextColumn("·"), TimeRemainingColumn(), console=Console(stderr=True))
