"""The tests themselves: their names can be read, and those of the core need no plugin."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from tests.helpers.ids import readable
from tests.helpers.parts import standard
from tests.wheel import ROOT

from attnguide.parts.standard import attnguide_parts

TESTS = ROOT / "tests"
#: What belongs to plugins, or to everything together.
BEYOND_THE_CORE = ("plugins", "contract", "docs", "examples", "benchmarks")
PLUGINS = {path.name for path in (ROOT / "plugins").iterdir() if path.is_dir()}


def test_no_case_is_named_by_a_counter(request: pytest.FixtureRequest) -> None:
    counted = [
        item.nodeid
        for item in request.session.items
        for name, index in getattr(getattr(item, "callspec", None), "indices", {}).items()
        if re.search(rf"(^|-){re.escape(name)}{index}(-|$)", item.callspec.id)  # type: ignore[attr-defined]
    ]
    assert counted == []


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"epochs": 0, "loss": "iou"}, "epochs=0, loss=iou"),
        ([1, (2, "b")], "(1, (2, b))"),
        ({"b", "a"}, "(a, b)"),
        (torch.tensor([[0, -1]]), "tensor [[0, -1]]"),
        (torch.zeros(4, 8, 8), "float32 (4, 8, 8)"),
        (torch.bfloat16, "bfloat16"),
        (lambda value: value + 1, "value + 1"),
        (torch.no_grad, None),
        (ValueError("no memory"), "ValueError no memory"),
        (object(), "object"),
        ("", "blank"),
        ("a\0b" * 30, "a\\x00ba\\x00b" * 3),
        ("short", None),
        (3, None),
    ],
)
def test_cases_are_named_by_their_content(value: object, name: str | None) -> None:
    given = readable(value)
    assert given == name or (isinstance(value, str) and str(given).startswith(str(name)))


def test_the_standard_parts_are_those_of_the_core() -> None:
    assert "grad_cam" in standard("source")
    assert {"boxes", "mask", "teacher"} <= set(standard("prior"))
    assert all(part.path.startswith("attnguide.") for part in attnguide_parts())


def core_files() -> list[Path]:
    """Test files that belong to the core, and what they use."""
    files = [path.relative_to(TESTS) for path in TESTS.rglob("*.py")]
    return [path for path in sorted(files) if path.parts[0] not in BEYOND_THE_CORE]


@pytest.mark.parametrize("file", core_files(), ids=str)
def test_the_core_is_tested_without_plugins(file: Path) -> None:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                modules = [alias.name for alias in node.names]
            case ast.ImportFrom():
                modules = [node.module or ""]
            case _:
                continue
        used = {module.partition(".")[0] for module in modules} & PLUGINS
        assert not used, f"line {node.lineno} imports {used}"
        assert not any(module.startswith("tests.plugins") for module in modules)
    # Which tests there are may not depend on what is installed; inside of a test the registry may be asked.
    outside = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    outside += [decorator for node in tree.body for decorator in getattr(node, "decorator_list", ())]
    for node in outside:
        for call in ast.walk(node):
            lists_parts = isinstance(call, ast.Call) and ast.unparse(call.func) == "registry().names"
            assert not lists_parts, f"line {node.lineno} lists the installed parts"
