"""The check of phrases finds bad ones, and leaves good ones alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.words import MOST_TELLS, phrases, report, tells


@pytest.mark.parametrize(
    "text",
    [
        "--size 2x is no size.",
        "The labels are no integers.",
        'f"{path} is no "\n    f"archive."',
        "# Corners that close are\n# no face.",
        "        seed: Of the noise.",
        "        maps: In [0, 1], `(N, h, w)`.",
        "        **options: For `torch.compile`.",
        "    threshold (float): Of the IoU.",
        'click.option("--seed", help="Of the noise.")',
    ],
)
def test_bad_phrases_are_found(text: str) -> None:
    (finding,) = phrases(text)
    assert finding.line == text.count("\n") + 1


@pytest.mark.parametrize(
    "text",
    [
        "--size 2x is not a size.",
        "There is no archive, and there are no labels.",
        "A layer that is no longer there; it is no more than a name.",
        "        seed: Seed of the noise.",
        "        maps: Maps in [0, 1]. For each class one.",
        "        labels: Whether there are any.",
        "This is the rule: Of two names the shorter wins.",
        'click.option("--labels", help="With --data: CSV of the labels.")',
    ],
)
def test_good_phrases_pass(text: str) -> None:
    assert list(phrases(text)) == []


def test_each_tell_is_counted() -> None:
    text = "It tells the class.\nTell us what you were told by a teller of tall tales."
    assert [finding.line for finding in tells(text)] == [1, 2, 2]


def test_the_report_names_file_and_line(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "page.md").write_text("# Page\n\nThis is no page. It tells little.\n")
    (line,) = report(tmp_path)  # one "tell" is accepted
    assert line.startswith("docs/page.md:3: This is no page. It tells little.")


def test_too_many_tells_are_all_listed(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("It tells.\n" * (MOST_TELLS + 1))
    lines = report(tmp_path)
    assert [line.partition(" ")[0] for line in lines[:-1]] == [
        f"README.md:{number}:" for number in range(1, MOST_TELLS + 2)
    ]
    assert lines[-1].startswith(f"{MOST_TELLS + 1} times")
