"""Finds phrases that readers stumble over: `python -m tests.words` lists them by file and line.

- "is no size" for "is not a size". "There is no size" and "is no longer" are fine.
- A description of a parameter that continues its name: "seed: Of the noise." for "seed: Seed of the noise."
- "tell" for report, specify or determine. A few are fine; see `MOST_TELLS`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
#: Files and folders that are read; tests are not, since they hold bad examples.
PLACES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks",
    "docs",
    "examples",
    "plugins",
    "src",
    "tools",
)
SUFFIXES = (".py", ".md", ".html", ".js")

#: Largest number of "tell", "tells" and "told" in all files together.
MOST_TELLS = 10
#: Words after "is no" that make an idiom.
IDIOMS = (
    "longer", "more", "less", "fewer", "better", "worse", "larger", "smaller", "higher", "lower", "wider",
)  # fmt: skip

#: Between two words of a sentence: spaces, line ends, and the marks of comments and strings.
_GAP = r"""(?:[\s"'#*/]|(?<=\s)f(?="))+"""
_IS_NO = re.compile(rf"(?:(?P<before>\b\w+){_GAP})?\b(?:is|are|was|were){_GAP}no{_GAP}(?P<noun>[a-z]+)", re.I)
_CONTINUED = re.compile(
    r"""(?:^\ +(?:-\ )?`?\*{0,2}[a-z_]\w*`?(?:\ \([^)]*\))?:\ |\bhelp=["'])"""
    r"""(?:Of|In|For)\b(?!\ --)""",
    re.M | re.X,
)
_TELL = re.compile(r"\b(?:tell|tells|told)\b", re.I)


class Finding(NamedTuple):
    """A phrase to replace: its line, counted from 1, and what is wrong with it."""

    line: int
    problem: str


def phrases(text: str) -> Iterator[Finding]:
    """Yield the phrases of a text that are always wrong."""
    for match in _IS_NO.finditer(text):
        there = (match["before"] or "").lower() == "there"
        if not there and match["noun"].lower() not in IDIOMS:
            yield Finding(_line(text, match.end()), 'write "is not a …" or "has no …" for "is no …"')
    for match in _CONTINUED.finditer(text):
        yield Finding(_line(text, match.end()), "begin with a noun, not with a preposition after the name")


def tells(text: str) -> Iterator[Finding]:
    """Yield each "tell", "tells" and "told" of a text."""
    for match in _TELL.finditer(text):
        yield Finding(_line(text, match.start()), f'"{match[0]}": write report, show, specify or determine')


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def files(root: Path = ROOT) -> Iterator[Path]:
    """Yield the files to read, in order."""
    for place in PLACES:
        path = root / place
        candidates = path.rglob("*") if path.is_dir() else [path]
        yield from sorted(file for file in candidates if file.is_file() and file.suffix in SUFFIXES)


def report(root: Path = ROOT) -> list[str]:
    """Return a line for each phrase to replace; all of "tell", if they are too many together."""
    wrong: list[str] = []
    told: list[str] = []
    for file in files(root):
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines()
        for findings, listed in ((phrases(text), wrong), (tells(text), told)):
            for finding in findings:
                shown = lines[finding.line - 1].strip()[:100]
                listed.append(f"{file.relative_to(root)}:{finding.line}: {shown}  ({finding.problem})")
    if len(told) > MOST_TELLS:
        wrong += [*told, f'{len(told)} times "tell", "tells" or "told"; at most {MOST_TELLS} are accepted']
    return wrong


if __name__ == "__main__":
    problems = report()
    print("\n".join(problems) or "words: nothing to replace")
    sys.exit(bool(problems))
