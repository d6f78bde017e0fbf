"""`attnguide plugin new`: writes a package with a part, its page and its tests."""

from __future__ import annotations

import keyword
import re
import secrets
import shutil
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import get_args

import click

from attnguide.cli.options import PATH
from attnguide.errors import InputError
from attnguide.parts.hookspecs import Kind
from attnguide.parts.registry import registry

__all__ = ["plugin"]

#: What each kind of part does in the template: what it is, the end of its class's name, and how it is used.
_KINDS: dict[str, tuple[str, str, str]] = {
    "prior": (
        "a spot around a point of each image",
        "Prior",
        '```python\nguide = ag.Guide(model, prior="$part")\nguide.loss(labels, points=points)\n```',
    ),
    "source": (
        "the strength of the gradient at each position",
        "Source",
        '```python\nag.explain(model, images, "$part")\nguide = ag.Guide(model, source="$part")\n```',
    ),
    "loss": (
        "how far the middle of the attribution is from that of the prior",
        "Loss",
        '```python\nguide = ag.Guide(model, loss="$part")\n```',
    ),
    "adapter": (
        "a learned temperature of the logits",
        "Adapter",
        "```python\nadapters = AdapterSet(model, [$object()])  # of attnguide.adapters\n"
        'optimizer.add_param_group({"params": list(adapters.parameters())})\n```',
    ),
    "command": (
        "prints the share of images that masks cover",
        "",
        "```console\n$$ attnguide $part masks/*.png\n```",
    ),
}


_HELP = """Write the package NAME with one part that works, its page and its tests.

\b
  attnguide plugin new my-spots --kind prior
  cd my-spots
  pip install -e ".[dev]"
  pytest

The part is small; change it to what you need. The tests hold it to the contract of all parts too
(`pytest --attnguide NAME`).
"""


@click.group(short_help="Begin a plugin of your own.")
def plugin() -> None:
    """Begin a plugin of your own: a package whose parts have names everywhere in attnguide."""


@plugin.command(help=_HELP, short_help="Write a package with a part, its page and its tests.")
@click.argument("name", metavar="NAME")
@click.option(
    "--kind",
    type=click.Choice(list(_KINDS)),
    required=True,
    help="What the part is.",
)
@click.option(
    "--out", type=PATH, metavar="DIR", help="The folder to write; it must not exist.  [default: NAME]"
)
def new(name: str, kind: str, out: Path | None) -> None:
    """Write a package with a part, its page and its tests."""
    package = _package(name)
    _check_free(kind, _part(name, kind))
    target = Path(name) if out is None else out
    if target.exists():
        raise InputError(f"{target} exists. Choose another name, or --out.")
    if not target.absolute().parent.is_dir():
        raise InputError(
            f"there is no folder {target.absolute().parent}. Make it first, or choose another --out."
        )
    _write(target, _contents(name, package, kind))
    click.echo(
        f"{target} holds the {kind} {_part(name, kind)}. Next:\n  cd {target}\n  pip install -e '.[dev]'\n"
        "  pytest"
    )


def _package(name: str) -> str:
    """The name of the package that is imported.

    Raises:
        InputError: If a package cannot be called so, or there is one already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*", name):
        raise InputError(
            f"{name!r} cannot be the name of a package. Use lower-case letters, digits, - and _: my-part."
        )
    package = name.replace("-", "_")
    if keyword.iskeyword(package) or package in sys.stdlib_module_names or find_spec(package) is not None:
        raise InputError(f"{package!r} is the name of another package of Python. Choose another one.")
    return package


def _part(name: str, kind: str) -> str:
    """The name of the part: like that of a command, or of a variable."""
    return name.replace("_", "-") if kind == "command" else name.replace("-", "_")


def _check_free(kind: str, part: str) -> None:
    from attnguide.cli.main import BUILT_IN

    known = next(each for each in get_args(Kind) if each == kind)
    if part in registry().names(known) or (kind == "command" and part in BUILT_IN):
        raise InputError(f"there is a {kind} {part!r} already; two of one name are an error. Choose another.")


def _contents(name: str, package: str, kind: str) -> dict[str, str]:
    """The files of the package by their paths."""
    about, ending, usage = _KINDS[kind]
    part = _part(name, kind)
    words = package.split("_")
    named = "".join(word.capitalize() for word in words)
    values = {
        "name": name,
        "package": package,
        "kind": kind,
        "part": part,
        "object": package if kind == "command" else named if named.endswith(ending) else named + ending,
        "about": about,
        "summary": f"A plugin for attnguide with the {kind} `{part}`: {about}.",
    }
    values["usage"] = Template(usage).substitute(values)
    sources = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{package}/plugin.py": "plugin.py",
        f"{package}/{kind}.py": f"{kind}.py",
        f"tests/test_{package}.py": f"test_{kind}.py",
    }
    if kind == "prior":
        sources["tests/conftest.py"] = "conftest_prior.py"
    folder = files("attnguide.commands") / "template"
    filled = {
        path: Template((folder / f"{source}.tmpl").read_text(encoding="utf-8")).substitute(values)
        for path, source in sources.items()
    }
    return {**filled, f"{package}/__init__.py": f'"""{values["summary"]}"""\n'}


def _write(target: Path, contents: dict[str, str]) -> None:
    """Write a folder completely or not at all."""
    scratch = target.with_name(f".attnguide-{secrets.token_hex(8)}")
    try:
        for path, text in contents.items():
            file = scratch / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        scratch.rename(target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}. Choose another --out.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
