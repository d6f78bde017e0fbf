"""`attnguide plugins`: every part with its owner, and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable

from click.testing import Result
from tests.helpers.parts import standard

from attnguide.parts.hookspecs import KINDS
from attnguide.parts.registry import registry
from attnguide.parts.standard import attnguide_parts


def test_json_lists_every_standard_part(call: Callable[..., Result]) -> None:
    listing = json.loads(call("plugins", "--json").stdout)
    assert listing["problems"] == []
    found = {(part["kind"], part["name"]): part for part in listing["parts"]}
    for part in attnguide_parts():
        listed = found[part.kind, part.name]
        assert (listed["path"], listed["summary"]) == (part.path, part.summary)
        assert listed["owner"].startswith("standard")
    assert len(found) == sum(len(registry().names(kind)) for kind in KINDS)


def test_the_table_shows_names_and_summaries(call: Callable[..., Result]) -> None:
    printed = call("plugins").stdout
    assert all(name in printed for name in (*standard("loss"), *standard("prior"), *standard("recipe")))
    assert "bounding boxes in pixels" in printed
