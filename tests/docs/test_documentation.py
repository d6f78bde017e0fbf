"""What the documentation says is complete."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import click
import griffe
import pytest
import yaml
from tests.docs.pages import ROOT, blocks

import attnguide
from attnguide.cli.main import BUILT_IN, main
from attnguide.parts.hookspecs import KINDS
from attnguide.parts.registry import registry

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/attnguide demo"
TESTS = 'python3 -m venv .venv && .venv/bin/pip install -e ".[dev]" && .venv/bin/python -m tests'


@dataclass(frozen=True)
class Entry:
    """An entry `::: path` of the reference, with the members that it shows if they are named."""

    path: str
    members: tuple[str, ...] | None


def entries(package: str) -> list[Entry]:
    """Return the entries of a package on all pages of the reference."""
    found = []
    for page in sorted((DOCS / "reference").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^::: ({package}(?:\.\S+)?)\n((?:    .*\n)*)", text, re.M):
            settings = yaml.safe_load(match[2]) or {}
            members = settings.get("options", {}).get("members")
            found.append(Entry(match[1], None if members is None else tuple(members or ())))
    return found


@cache
def site(package: str) -> griffe.Module:
    """Return a package as the site sees it."""
    extensions = griffe.load_extensions(ROOT / "tools/griffe_exports.py")
    loader = griffe.GriffeLoader(search_paths=[ROOT / "src", ROOT / "plugins"], extensions=extensions)
    loaded = loader.load(package)
    loader.resolve_aliases(implicit=False)
    assert isinstance(loaded, griffe.Module)
    return loaded


def at(path: str) -> griffe.Object | griffe.Alias:
    package, _, rest = path.partition(".")
    found = site(package)[rest] if rest else site(package)
    assert isinstance(found, griffe.Object | griffe.Alias)
    return found


def homes(module: str, names: Iterable[str]) -> list[str]:
    """Return where the names of a module are defined, so that a name of two modules is one object."""
    return [at(f"{module}.{name}").canonical_path for name in names]


def modules_of(package: str) -> tuple[str, ...]:
    """Return the public modules: the listed ones, or a plugin and the packages in it that have a stub."""
    if package == "attnguide":
        return attnguide.PUBLIC_MODULES
    folder = ROOT / "plugins" / package
    return (package, *(f"{package}.{stub.parent.name}" for stub in folder.glob("*/__init__.pyi")))


PLUGINS = [stub.parent.name for stub in sorted((ROOT / "plugins").glob("*/__init__.pyi"))]


@pytest.mark.parametrize("package", ["attnguide", *PLUGINS])
def test_the_reference_shows_exactly_what_is_public(package: str) -> None:
    modules = modules_of(package)
    public = {*modules, *homes(package, import_module(package).__all__)}
    public |= {home for module in modules for home in homes(module, at(module).exports or ())}
    shown: Counter[str] = Counter()
    for entry in entries(package):
        shown[at(entry.path).canonical_path] += 1
        if entry.path in modules:
            shown.update(
                homes(entry.path, (at(entry.path).exports or ()) if entry.members is None else entry.members)
            )
    missing = sorted(public - {*shown})
    assert missing == [], "public, but on no page of docs/reference: add an entry `::: name`"
    assert sorted({*shown} - public) == [], "in docs/reference, but not public: remove its entry"
    assert sorted(path for path, times in shown.items() if times > 1) == [], "shown more than once"


@pytest.mark.parametrize("module", ["attnguide", *attnguide.PUBLIC_MODULES, *PLUGINS])
def test_the_site_sees_the_names_of_a_module(module: str) -> None:
    """It reads stubs, and must find there what Python finds."""
    seen = at(module).exports or ()
    exports = {name for name in import_module(module).__all__ if not at(f"{module}.{name}").is_module}
    assert {name for name in map(str, seen) if not at(f"{module}.{name}").is_module} == exports
    # What has no docstring is not shown.
    assert [name for name in seen if not at(f"{module}.{name}").has_docstrings] == []


@pytest.mark.parametrize("name", attnguide.__all__)
def test_public_names_are_in_the_table_of_the_reference(name: str) -> None:
    assert f"`ag.{name}`" in (DOCS / "reference/index.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", attnguide.PUBLIC_MODULES)
def test_public_modules_are_in_the_table_of_the_reference(name: str) -> None:
    assert f"`{name}`" in (DOCS / "reference/index.md").read_text(encoding="utf-8")


def commands() -> dict[str, click.Command]:
    """The built-in commands by what is typed; of a group, those in it."""
    found: dict[str, click.Command] = {}
    for name in BUILT_IN:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        inner = command.commands if isinstance(command, click.Group) else {}
        found |= {f"{name} {each}": value for each, value in inner.items()} or {name: command}
    return found


@pytest.mark.parametrize("name", commands())
def test_options_of_the_command_line(name: str) -> None:
    """The tables in `command-line.md` list each option, and nothing else, with its default."""
    text = (DOCS / "command-line.md").read_text(encoding="utf-8")
    section = re.search(rf"^## `attnguide {name}`$(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert section, f"command-line.md has no section on {name}"
    rows = dict(re.findall(r"^\| `(--[a-z-]+)[^|]*\| ([^|]*?) *\|", section[1], re.M))
    command = commands()[name]
    options = {param.opts[0]: param for param in command.params if isinstance(param, click.Option)}
    assert set(rows) == set(options)
    for option, param in options.items():
        if param.show_default:
            default = param.default[0] if isinstance(param.default, tuple) else param.default
            assert rows[option] == f"`{default}`", option


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_in_the_documentation(kind: str) -> None:
    page = (DOCS / "parts.md").read_text(encoding="utf-8")
    provided = [name for name in registry().names(kind) if "(attnguide " in registry().find(kind, name).owner]
    # captum's are too many for a table; the command line lists them.
    named = [name for name in provided if ":" not in name]
    assert [name for name in named if f"`{name}`" not in page] == []


def test_the_two_commands() -> None:
    code = [line for block in blocks(ROOT / "README.md", "console") for line in block.code.splitlines()]
    assert f"$ {DEMO}" in code
    assert f"$ {TESTS}" in code
    assert TESTS in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


def test_pictures_exist() -> None:
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for target in re.findall(r"!\[[^\]]*\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page}: {target}"


def test_links_of_the_readme_exist() -> None:
    """Those inside `docs` are checked when the site is built."""
    for target in re.findall(r"\]\(([^)#:]+)[^)]*\)", README):
        assert (ROOT / target).exists(), target


def test_files_of_the_contributing_table_exist() -> None:
    """`NAME` stands for a new file; its folder exists."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("## Where does it go?")[1].split("\n\n")[2]
    paths = re.findall(r"`([\w/]+(?:/|\.\w+))`", table)
    assert len(paths) > 20
    for path in paths:
        file = ROOT / path if path.startswith(("plugins", "docs")) else ROOT / "src/attnguide" / path
        assert (file.parent if "NAME" in path else file).exists(), path
