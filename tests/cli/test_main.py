"""The group: help without torch, errors as one line, commands of plugins, broken plugins."""

from __future__ import annotations

import subprocess
import sys
import time

import click
import pytest
from tests.helpers.command_line import declare

from attnguide.cli.main import BUILT_IN
from attnguide.errors import DataError
from attnguide.parts.registry import Broken, registry


@click.command()
def hello():
    click.echo("hello from a plugin")


not_a_command = 3


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["explain", "--help"], ["plugins"]])
def test_torch_is_not_imported(arguments):
    code = (
        "import sys; from attnguide.cli.main import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as end: status = end.code\n"
        "print('torch' in sys.modules, 'timm' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "False False"
    assert "attnguide" in done.stdout.lower()


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "attnguide", "--help"], capture_output=True, text=True)
    assert done.stdout.startswith("Usage: attnguide [OPTIONS]")


def test_help_is_fast_and_teaches():
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", "from attnguide.cli.main import main; main()", "--help"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        best = min(best, time.perf_counter() - start)
    assert done.returncode == 0
    assert best < 1.0  # half a second on a free machine
    for expected in ("attnguide demo", "attnguide explain photos/", "layers", "plugins"):
        assert expected in done.stdout


def test_version(call):
    from attnguide import __version__

    assert call("--version").output == f"attnguide {__version__}\n"


def test_unknown_command_offers_the_nearest(call):
    result = call("explian", status=2)
    assert "Did you mean 'explain'?" in result.stderr


def test_an_error_of_the_library_is_one_line(call, monkeypatch, plugins):
    def fail(*args):
        raise DataError("a.png is broken. Replace it.")

    monkeypatch.setattr("attnguide.data.images.find_images", fail)
    result = call("explain", "a.png", status=2)
    assert result.stderr == "Error: a.png is broken. Replace it.\n"
    assert result.stdout == ""


def test_a_plugin_adds_a_command(call, plugins):
    declare(plugins, "hello", f"{__name__}:hello")
    text = call("--help").stdout
    assert "Commands of plugins" in text
    assert "says hello" in text
    assert call("hello").stdout == "hello from a plugin\n"


def test_help_does_not_import_the_command_of_a_plugin(call, plugins):
    declare(plugins, "hello", "no_such_module:hello")
    assert "says hello" in call("--help").stdout
    assert "no_such_module" in call("hello", status=2).stderr


@pytest.mark.parametrize("path", [f"{__name__}:not_a_command", f"{__name__}:missing"])
def test_what_is_not_a_command_is_an_error_that_names_the_plugin(call, plugins, path):
    declare(plugins, "hello", path)
    assert "extra (extra 1.0)" in call("hello", status=2).stderr


def test_a_broken_plugin_is_one_warning(call, plugins):
    plugins.broken.append(Broken("bad (bad 0.1)", "ImportError: no luck"))
    result = call("--help")
    assert result.stderr.splitlines() == [
        "Warning: Could not load bad (bad 0.1); `attnguide plugins` shows why."
    ]
    assert "explain" in result.stdout


def test_the_real_registry_has_no_command_that_shadows_a_built_in():
    assert not set(registry().names("command")) & set(BUILT_IN)
