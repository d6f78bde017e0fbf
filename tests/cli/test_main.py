"""The group: help without torch, errors as one line, plugins that join or break."""

from __future__ import annotations

import subprocess
import sys
import time

import click
import pytest

from attnguide.cli import main
from attnguide.errors import DataError
from attnguide.parts.hookspecs import Part
from attnguide.parts.registry import Broken, Owned, Registry, registry


@click.command()
def hello():
    click.echo("hello from a plugin")


not_a_command = 3


@pytest.fixture
def plugins(monkeypatch):
    found = Registry()
    found.load()
    for module in ("cli.main", "commands.plugins"):
        monkeypatch.setattr(f"attnguide.{module}.registry", lambda: found)
    found.broken.clear()
    return found


def declare(found, name, path, owner="extra (extra 1.0)"):
    found.parts["command", name].append(Owned(Part("command", name, path, "says hello"), owner))


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
def test_what_is_no_command_is_an_error_that_names_the_plugin(call, plugins, path):
    declare(plugins, "hello", path)
    assert "extra (extra 1.0)" in call("hello", status=2).stderr


def test_a_broken_plugin_is_one_warning(call, plugins):
    plugins.broken.append(Broken("bad (bad 0.1)", "ImportError: no luck"))
    result = call("--help")
    assert result.stderr.splitlines() == [
        "Warning: Could not load bad (bad 0.1); `attnguide plugins` tells why."
    ]
    assert "explain" in result.stdout


def test_plugins_lists_parts_and_problems(call, plugins):
    assert "grad_cam" in call("plugins").stdout
    plugins.broken.append(Broken("bad (bad 0.1)", "ImportError: no luck"))
    declare(plugins, "twice", "a:b", "one")
    declare(plugins, "twice", "c:d", "two")
    declare(plugins, "explain", "a:b", "three")
    text = call("plugins", status=1).stdout
    assert "bad (bad 0.1) could not be loaded: ImportError: no luck" in text
    assert "command 'twice' is claimed by one and two" in text
    assert "command 'explain' of three never runs" in text


def test_plugins_as_json(call, plugins):
    import json

    found = json.loads(call("plugins", "--json").stdout)
    assert found["problems"] == []
    part = next(part for part in found["parts"] if (part["kind"], part["name"]) == ("loss", "iou"))
    assert part["path"] == "attnguide.losses.overlap:IoU"


def test_the_real_registry_has_no_command_that_shadows_a_built_in():
    assert not set(registry().names("command")) & set(main.BUILT_IN)
