"""The command line, `attnguide`.

Commands are imported when they are called, so `attnguide --help` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from attnguide import __version__
from attnguide.cli._ending import Ended, ending_like_ctrl_c
from attnguide.cli.console import Failure, note, warn, warnings_as_lines
from attnguide.errors import AttnGuideError, PluginError, nearest
from attnguide.parts.registry import registry

__all__ = ["BUILT_IN", "main"]

#: Commands of the library, in the order of the help: name, and the module that defines the command.
BUILT_IN = {
    "demo": "attnguide.commands.demo.command",
    "explain": "attnguide.commands.explain.command",
    "overlay": "attnguide.commands.overlay",
    "layers": "attnguide.commands.layers",
    "train": "attnguide.commands.train",
    "evaluate": "attnguide.commands.evaluate",
    "report": "attnguide.commands.report",
    "masks": "attnguide.commands.masks",
    "plugins": "attnguide.commands.plugins",
    "plugin": "attnguide.commands.plugin",
}

_HELP = """Make image classifiers look where they should.

attnguide shows where a classifier looks, and trains it to look elsewhere: attributions such as Grad-CAM
become part of the training loss. The commands explain, train, measure and compare classifiers; in a training
loop of your own guidance is two lines of Python (`import attnguide as ag`).

\b
First steps:
  attnguide demo                            A shortcut learned and unlearned, with a report
  attnguide explain photos/                 Where the small embedded classifier looks
  attnguide explain photos/ --model resnet50.a1_in1k --pretrained
  attnguide layers resnet50                 Which layers an explanation can use
  attnguide train                           How a training with guidance is written down
"""


class _Commands(click.Group):
    """Commands that are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*BUILT_IN, *(name for name in registry().names("command") if name not in BUILT_IN)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in BUILT_IN:
            command: Any = getattr(import_module(BUILT_IN[cmd_name]), cmd_name)
        elif cmd_name in registry().names("command"):
            command = registry().load_part("command", cmd_name)
        else:
            return None
        if not isinstance(command, click.Command):
            owner = registry().find("command", cmd_name).owner
            raise PluginError(
                f"command {cmd_name!r} of plugin {owner} is a {type(command).__name__}, not a click command. "
                "Report it to its author."
            )
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in (known := self.list_commands(ctx)):
            raise click.UsageError(f"no command {args[0]!r}.{nearest(args[0], known)}{_broken()}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        built_in, of_plugins = [], []
        for name in self.list_commands(ctx):
            if name in BUILT_IN:  # light to import; a plugin's command may import anything
                command = self.get_command(ctx, name)
                built_in.append((name, command.get_short_help_str(limit=80) if command else ""))
            else:
                of_plugins.append((name, registry().parts["command", name][0].part.summary))
        for title, rows in (("Commands", built_in), ("Commands of plugins", of_plugins)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
        if broken := _broken():
            warn(broken.strip())

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with ending_like_ctrl_c(), warnings_as_lines():
                return super().invoke(ctx)
        except AttnGuideError as error:
            raise Failure(str(error)) from error
        except Ended as ended:
            note("Terminated.")
            ctx.exit(128 + ended.signal)
        except KeyboardInterrupt:
            # On a new line: the terminal has echoed ^C.
            note("\nInterrupted.")
            ctx.exit(130)


def _broken() -> str:
    owners = [broken.owner for broken in registry().broken]
    return f" Could not load {', '.join(owners)}; `attnguide plugins` shows why." if owners else ""


main = _Commands(
    "attnguide",
    help=_HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            help="Show the version and exit.",
            callback=lambda ctx, _, value: _show_version(ctx) if value else None,
        )
    ],
)


def _show_version(ctx: click.Context) -> None:
    click.echo(f"attnguide {__version__}")
    ctx.exit()
