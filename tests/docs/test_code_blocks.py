"""Every block of code in the README and in `docs` runs; see `pages` for how."""

from __future__ import annotations

import ast
import json
import shlex
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from tests.docs.pages import PAGES, ROOT, Block, blocks, execute, fixtures, setup_of

from attnguide.cli.main import main
from attnguide.parts.registry import registry

#: Commands that need a network, a browser, a file or a package that may be missing, or minutes.
NOT_RUN = ("annotate", "text", "demo", "train", "landmarks", "--pretrained", "--checkpoint", "--before")

HAVE_CODE = [page for page in PAGES if blocks(page, "python")]
CONSOLE = [block for page in PAGES for block in blocks(page, "console")]


@pytest.mark.parametrize("page", HAVE_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_python(page: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace = fixtures()
    of_others = [each for block in blocks(page, "py") for each in setup_of(block)]
    for block in blocks(page):
        if (block.language in ("python", "setup") and block not in of_others) or block.title:
            execute(block, namespace)
            registry.cache_clear()  # the block may have installed a plugin


@pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page, "py")], ids=str)
@pytest.mark.filterwarnings("ignore")  # of the other package
def test_python_of_other_packages(block: Block, photos: Path) -> None:
    for statement in ast.walk(ast.parse(block.code)):
        if isinstance(statement, ast.ImportFrom):
            pytest.importorskip(str(statement.module).partition(".")[0])
    namespace = fixtures()
    for each in (*setup_of(block), block):
        execute(each, namespace)


@pytest.mark.parametrize(
    "block", [block for page in PAGES for block in blocks(page, "toml", "json")], ids=str
)
def test_data_formats(block: Block) -> None:
    parse = {"toml": tomllib.loads, "json": json.loads}[block.language]
    assert parse(block.code)


@pytest.mark.parametrize("block", CONSOLE, ids=str)
def test_console(block: Block, photos: Path) -> None:
    commands = [line for line in block.code.splitlines() if line.startswith("$ ")]
    assert commands, f"{block}: a console block shows commands, each after '$ '"
    output = ""
    for line in block.code.splitlines():
        if line.startswith("$ "):
            words = shlex.split(line.removeprefix("$ ").partition("  #")[0])
            output = _run(words) if words[0] == "attnguide" else ""
        elif output and line.strip("… "):
            assert line.split() in [shown.split() for shown in output.splitlines()], f"{block}: {line}"


def _run(words: list[str]) -> str:
    name, *arguments = words[1:]
    if not name.startswith("-"):
        command = main.get_command(click.Context(main), name)
        assert command is not None, f"no command {name}"
        command.make_context(name, list(arguments))  # raises where an option is unknown or has a wrong value
    if any(word in NOT_RUN for word in words):
        return ""
    result = CliRunner().invoke(main, words[1:])
    assert result.exit_code == 0, result.output
    return result.output
