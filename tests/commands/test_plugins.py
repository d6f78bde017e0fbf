"""`attnguide plugins`: the parts it lists, and the problems it finds."""

from __future__ import annotations

import json

from tests.helpers.command_line import declare

from attnguide.parts.hookspecs import KINDS
from attnguide.parts.registry import Broken


def test_help_names_every_kind(call):
    text = " ".join(call("plugins", "--help").stdout.split())
    assert "sources, priors, losses, adapters, regions, recipes and commands, with the plugin" in text
    assert len(KINDS) == 7


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
    shown = json.loads(call("plugins", "--json").stdout)
    assert shown["problems"] == []
    part = next(part for part in shown["parts"] if (part["kind"], part["name"]) == ("loss", "iou"))
    assert part["path"] == "attnguide.losses.overlap:IoU"
