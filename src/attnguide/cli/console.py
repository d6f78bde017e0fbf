"""What commands write to the terminal: results to stdout; progress, notes and warnings to stderr.

Commands of plugins use these functions too, and library functions that show a bar use
[`progress`][attnguide.cli.console.progress]. rich is imported when something is drawn with it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn

    from attnguide.cli.options import ModelChoice
    from attnguide.models import LoadedModel

__all__ = [
    "Advance",
    "Failure",
    "exit_if",
    "note",
    "note_default_model",
    "note_skipped",
    "print_json",
    "progress",
    "table_console",
    "track",
    "warn",
    "warn_of_empty_masks",
    "warn_of_random_weights",
    "warnings_as_lines",
]

_Item = TypeVar("_Item")


class Failure(click.ClickException):
    """An error of the library as one line, with the exit status of wrong usage."""

    exit_code = 2


# ------------------------------------------------------------- lines of text


def _on_one_line(text: str) -> str:
    """Write control characters and line breaks, which names of files may have, as Python does."""
    return "".join(letter if letter >= " " and letter != "\x7f" else repr(letter)[1:-1] for letter in text)


def note(text: str) -> None:
    """Write a line to stderr."""
    click.echo(text, err=True)


def note_skipped(reasons: Iterable[str]) -> None:
    """Write a line to stderr for each skipped file, with the reason."""
    for reason in reasons:
        note(f"Skipped: {_on_one_line(reason)}")


def warn(text: str) -> None:
    """Write a warning to stderr, in colour if stderr is a terminal."""
    click.echo(click.style("Warning: ", fg="yellow", bold=True) + text, err=True)


def warn_of_empty_masks(files: Sequence[Path]) -> None:
    """Warn on stderr of images whose masks have no pixel inside, if there are any."""
    if files:
        warn(
            f"the masks of {len(files)} images have no pixel inside, such as that of {files[0]}; these "
            "images count as without a mask."
        )


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Write the warnings of the library in the block as `warn` does, without the line of code."""
    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        # Other libraries warn their developers by subclasses, as of what is deprecated.
        if category is UserWarning and file is None:
            warn(str(message))
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def warn_of_random_weights(loaded: LoadedModel) -> None:
    """Warn on stderr if no weights were loaded into a model."""
    if loaded.weights == "random":
        warn(
            f"the weights of {loaded.name} are random, so its maps mean nothing. Give --pretrained or "
            "--checkpoint FILE."
        )


def note_default_model(choice: ModelChoice, loaded: LoadedModel) -> None:
    """Write to stderr what the embedded model knows, if it is used because no other one was named.

    Args:
        choice: The options about the model.
        loaded: The model that they chose.
    """
    if choice.name is None and choice.checkpoint is None:
        note(
            f"No --model: the embedded one knows {len(loaded.classes)} attributes of drawn faces "
            f"({', '.join(loaded.classes[:3])} …) and nothing else. For photographs give for example "
            "--model resnet50.a1_in1k --pretrained."
        )


def exit_if(incomplete: object) -> None:
    """End the command with exit status 1 if a part of its work could not be done.

    Args:
        incomplete: What could not be done, such as the skipped files; the command goes on if this is falsy.
    """
    if incomplete:
        raise click.exceptions.Exit(1)


# -------------------------------------------------------------------- results


def print_json(value: Any) -> None:
    """Write a value to stdout as JSON, for other programs."""
    click.echo(json.dumps(value, indent=2))


def table_console() -> Console:
    """Make a console on stdout for tables, which cuts them only to the width of a terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)


# ------------------------------------------------------------------- progress


class Advance(Protocol):
    """Moves a progress bar on."""

    def __call__(
        self, count: float = 1, *, description: str | None = None, total: float | None = None
    ) -> None:
        """Move the bar on.

        Args:
            count: Number of items that were done since the last call.
            description: New text in front of the bar; None keeps the text.
            total: New number of items in all; None keeps the number.
        """


@contextmanager
def progress(
    description: str, total: float | None = None, *, unit: str = "", show: bool = True, keep: bool = False
) -> Iterator[Advance]:
    """Show a progress bar on stderr, with elapsed and remaining time.

    ```python
    with progress("Explaining", len(paths), unit="images") as advance:
        for path in paths:
            ...
            advance()
    ```

    Args:
        description: Text in front of the bar.
        total: Number of items in all; None if it is unknown.
        unit: Name of the items, shown after their number; if empty, a percentage is shown.
        show: Whether there is a bar. Without one, the function that is yielded does nothing.
        keep: Leave the bar on the screen at its end.

    Yields:
        The function that moves the bar on.
    """
    if not show:
        yield _ignore
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(*_columns(unit), console=Console(stderr=True), transient=not keep) as bar:
        task = bar.add_task(description, total=total)

        def advance(count: float = 1, *, description: str | None = None, total: float | None = None) -> None:
            bar.update(task, advance=count, description=description, total=total)

        yield advance


def track(
    items: Iterable[_Item],
    description: str,
    total: float | None = None,
    *,
    unit: str = "",
    show: bool = True,
    keep: bool = False,
) -> Iterator[_Item]:
    """Yield items, and show on stderr how many of them are done; see `progress`.

    Args:
        items: The items.
        description: Text in front of the bar.
        total: Number of items; by default their length, if they have one.
        unit: Name of the items, shown after their number; if empty, a percentage is shown.
        show: Whether there is a bar.
        keep: Leave the bar on the screen at its end.

    Yields:
        The items, one after the other.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(description, total, unit=unit, show=show, keep=keep) as advance:
        for item in items:
            yield item
            advance()


def _ignore(count: float = 1, *, description: str | None = None, total: float | None = None) -> None:
    """Stand in for the function of a bar that is not shown."""


def _columns(unit: str) -> list[ProgressColumn]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    number = [MofNCompleteColumn(), TextColumn(unit)] if unit else [TaskProgressColumn()]
    return [
        TextColumn("{task.description}"),
        BarColumn(),
        *number,
        TimeElapsedColumn(),
        TextColumn("·"),
        TimeRemainingColumn(),
    ]
