"""`attnguide plugins`: lists the registered parts, and the problems of plugins."""

from __future__ import annotations

import click

from attnguide.cli.console import exit_if, print_json, table_console
from attnguide.parts.hookspecs import KINDS
from attnguide.parts.registry import Registry, registry

__all__ = ["plugins"]

_PLURALS = [
    kind if kind.endswith("ns") else f"{kind}es" if kind.endswith("s") else f"{kind}s" for kind in KINDS
]
_KINDS = f"{', '.join(_PLURALS[:-1])} and {_PLURALS[-1]}"
_HELP = f"""List the {_KINDS}, with the plugin that provides each of them.

Plugins that could not be loaded, and names that several plugins claim, are listed as problems; the exit
status is then 1.
"""


@click.command(help=_HELP, short_help=f"List the {_KINDS}.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON, for other programs.")
def plugins(as_json: bool) -> None:
    """List the parts of the library and of plugins, and the problems of plugins."""
    parts = registry()
    problems = _problems(parts)
    if as_json:
        _print_json(parts, problems)
    else:
        _print(parts, problems)
    exit_if(problems)


def _problems(parts: Registry) -> list[str]:
    from attnguide.cli.main import BUILT_IN

    problems = [f"{broken.owner} could not be loaded: {broken.reason}" for broken in parts.broken]
    for (kind, name), claims in sorted(parts.parts.items()):
        owners = " and ".join(claim.owner for claim in claims)
        if len(claims) > 1:
            problems.append(f"{kind} {name!r} is claimed by {owners}. Uninstall one of them.")
        if kind == "command" and name in BUILT_IN:
            problems.append(f"command {name!r} of {owners} never runs: attnguide has a command of that name.")
    return problems


def _print_json(parts: Registry, problems: list[str]) -> None:
    rows = [
        {
            "kind": kind,
            "name": name,
            "summary": claim.part.summary,
            "path": claim.part.path,
            "owner": claim.owner,
        }
        for (kind, name), claims in sorted(parts.parts.items())
        for claim in claims
    ]
    print_json({"parts": rows, "problems": problems})


def _print(parts: Registry, problems: list[str]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for title in ("kind", "name", "summary", "plugin"):
        table.add_column(title, no_wrap=title == "name", overflow="fold")
    for kind in KINDS:
        names = parts.names(kind)
        for name in names:
            for claim in parts.parts[kind, name]:
                table.add_row(
                    *map(Text, (kind, name, claim.part.summary, claim.owner)), end_section=name == names[-1]
                )
    console = table_console()
    console.print(table)
    for problem in problems:
        console.print(Text(f"Problem: {problem}", style="red"), soft_wrap=True)
