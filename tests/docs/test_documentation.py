"""What the documentation says is complete."""

from __future__ import annotations

import re

import click
import pytest
from tests.docs.pages import ROOT, blocks

import attnguide
from attnguide.cli.main import BUILT_IN, main
from attnguide.parts.hookspecs import KINDS
from attnguide.parts.registry import registry

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/attnguide demo"
TESTS = 'python3 -m venv .venv && .venv/bin/pip install -e ".[dev]" && .venv/bin/python -m tests'


@pytest.mark.parametrize("name", attnguide.__all__)
def test_public_names_are_in_the_reference(name: str) -> None:
    assert f"`ag.{name}`" in (DOCS / "reference/index.md").read_text(encoding="utf-8")
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    home = f"attnguide.{attnguide._HOMES.get(name, name)}"
    assert re.search(rf"^::: {re.escape(home)}(\.|$)", pages, re.M), f"no reference page shows {home}"
    assert getattr(attnguide, name) is not None


@pytest.mark.parametrize(
    "package",
    [
        "src/attnguide",
        "plugins/attnguide_action_units",
        "plugins/attnguide_gradcam_iou",
        "plugins/attnguide_multichannel",
        "plugins/attnguide_segmentation",
    ],
)
def test_public_modules_are_in_the_reference(package: str) -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    folder = ROOT / package
    for file in sorted(folder.rglob("*.py")):
        steps = file.relative_to(folder.parent).with_suffix("").parts
        # The command line has a page of its own, assets are data and how it was made, and packages only hold
        # modules.
        if steps[1] in ("cli", "assets") or steps[-1].startswith("_"):
            continue
        assert f"::: {'.'.join(steps)}\n" in pages + "\n", f"no reference page shows {'.'.join(steps)}"


@pytest.mark.parametrize("name", BUILT_IN)
def test_options_of_the_command_line(name: str) -> None:
    """The tables in `command-line.md` list each option, and nothing else, with its default."""
    text = (DOCS / "command-line.md").read_text(encoding="utf-8")
    section = re.search(rf"^## `attnguide {name}`$(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert section, f"command-line.md has no section on {name}"
    rows = dict(re.findall(r"^\| `(--[a-z-]+)[^|]*\| ([^|]*?) *\|", section[1], re.M))
    command = main.get_command(click.Context(main), name)
    assert command is not None
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
    named = [name for name in provided if not name.startswith("captum:")]
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
