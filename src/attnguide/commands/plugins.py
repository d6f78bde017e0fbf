"""`attnguide plugins`: every part there is, and what is wrong with any."""

from __future__ import annotations

import click

from attnguide.cli.console import exit_if, print_json, table_console
from attnguide.parts.registry import Registry, registry

__all__ = ["plugins"]


@click.command(short_help="List sources, priors, losses, methods and recipes.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON for other programs.")
def plugins(as_json: bool) -> None:
    """List sources, priors, losses, methods, recipes and commands, with the plugin that each comes from.

    Plugins that could not be loaded and names that several of them claim are listed too; the exit status is
    then 1.
    """
    found = registry()
    problems = _problems(found)
    if as_json:
        _print_json(found, problems)
    else:
        _print(found, problems)
    exit_if(problems)


def _problems(found: Registry) -> list[str]:
    from attnguide.cli.main import BUILT_IN

    problems = [f"{broken.owner} could not be loaded: {broken.reason}" for broken in found.broken]
    for (kind, name), claims in sorted(found.parts.items()):
        owners = " and ".join(claim.owner for claim in claims)
        if len(claims) > 1:
            problems.append(f"{kind} {name!r} is claimed by {owners}. Uninstall one of them.")
        if kind == "command" and name in BUILT_IN:
            problems.append(f"command {name!r} of {owners} never runs: attnguide has one of that name.")
    return problems


def _print_json(found: Registry, problems: list[str]) -> None:
    parts = [
        {
            "kind": kind,
            "name": name,
            "summary": claim.part.summary,
            "path": claim.part.path,
            "owner": claim.owner,
        }
        for (kind, name), claims in sorted(found.parts.items())
        for claim in claims
    ]
    print_json({"parts": parts, "problems": problems})


def _print(found: Registry, problems: list[str]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from attnguide.parts.hookspecs import KINDS

    table = Table(box=box.SIMPLE_HEAD)
    for title in ("kind", "name", "summary", "plugin"):
        table.add_column(title, no_wrap=title == "name", overflow="fold")
    for kind in KINDS:
        names = found.names(kind)
        for name in names:
            for claim in found.parts[kind, name]:
                table.add_row(
                    *map(Text, (kind, name, claim.part.summary, claim.owner)), end_section=name == names[-1]
                )
    console = table_console()
    console.print(table)
    for problem in problems:
        console.print(Text(f"Problem: {problem}", style="red"), soft_wrap=True)
