"""The code in the documentation: what there is, and how a page of it runs.

A page runs from top to bottom in one namespace, in an empty folder, as a reader would do it.

- A block of `python` runs. Blocks need not repeat what the page has said before. The namespace starts with
  what `fixtures` returns: a small model, data for it, a criterion and an optimiser.
- A block of `py` needs packages that may not be installed: those that it imports. It runs by itself, after
  the setup before it.
- A block with a title, such as `python title="my_package/priors.py"`, is written to that file instead.
  Modules written so can be imported, and the entry points of a `pyproject.toml` are installed.
- A comment `<!-- setup … -->` holds Python that runs at its place and that readers don't see: files that an
  example reads, for instance.
- A line `$ attnguide …` in a block of `console` must be a command with existing options; it runs unless it
  needs a network, a file of the reader's, or minutes. What the block shows as output must be in the output.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import attnguide as ag
from attnguide.models.networks import small_cnn

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(
    r"^(?P<indent> *)(?P<mark>`{3,})(?P<info>[^\n`]*)\n(?P<code>.*?)^ *(?P=mark)$", re.M | re.S
)
_SETUP = re.compile(r"^ *<!-- setup\n(?P<code>.*?)^ *-->$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A block of a page: its language (`setup` for a hidden one), its title if any, and where it begins."""

    page: Path
    line: int
    language: str
    title: str | None
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in order, those of the given languages or all."""
    return [block for block in _blocks(page) if not languages or block.language in languages]


def _blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in sorted([*_FENCE.finditer(text), *_SETUP.finditer(text)], key=lambda match: match.start()):
        groups = found.groupdict()
        info = groups.get("info", "setup").strip()
        title = re.search(r'title="([^"]*)"', info)
        indent = groups.get("indent") or ""
        code = "".join(line.removeprefix(indent) for line in groups["code"].splitlines(keepends=True))
        line = text.count("\n", 0, found.start("code")) + 1
        yield Block(page, line, info.partition(" ")[0], title and title[1], code)


def setup_of(block: Block) -> list[Block]:
    """The hidden code right before a block."""
    before = [each for each in _blocks(block.page) if each.line < block.line]
    return [each for each in before[-1:] if each.language == "setup"]


def fixtures() -> dict[str, Any]:
    """What a page has before its first block."""
    torch.manual_seed(0)
    masks = torch.zeros(8, 64, 64)
    masks[:, 40:56, 16:48] = 1
    batches = [(torch.rand(8, 3, 64, 64), torch.arange(8) % 4, masks) for _ in range(2)]
    model = small_cnn(4, width=4)
    images, labels, masks = batches[0]
    return {
        "ag": ag,
        "torch": torch,
        "model": model,
        "loader": batches,
        "images": images,
        "labels": labels,
        "masks": masks,
        "criterion": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
    }


def execute(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block of Python, or write one that has a title; the folder is the current one."""
    if block.title is None:
        # Empty lines before it make a traceback point to the page.
        code = "\n" * (block.line - 1) + block.code
        exec(compile(code, str(block.page), "exec"), namespace)
        return
    path = Path(block.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.code, encoding="utf-8")
    if path.name == "pyproject.toml":
        install(path.parent)


def install(where: Path) -> None:
    """Declare the distribution of a folder's pyproject.toml, as an installer does."""
    project = tomllib.loads((where / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = where / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines))
