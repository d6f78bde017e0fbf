"""Progress bars and lines on stderr, results on stdout."""

from __future__ import annotations

import json
import warnings

import click
import pytest

from attnguide.cli.console import (
    exit_if,
    note_skipped,
    print_json,
    progress,
    table_console,
    track,
    warn,
    warnings_as_lines,
)


def test_progress_counts_items_on_stderr(capsys):
    with progress("Explaining", unit="images", keep=True) as advance:
        advance(2, total=5)
        advance(description="Drawing")
    out, err = capsys.readouterr()
    assert out == ""
    assert "Drawing" in err
    assert "3/5 images" in err
    assert "Explaining" not in err


def test_a_bar_shows_a_percentage_without_a_unit(capsys):
    with progress("Training", 1.0, keep=True) as advance:
        advance(0.25)
    assert "25%" in capsys.readouterr().err


def test_a_bar_is_gone_at_its_end_unless_it_is_kept(capsys):
    with progress("Reading", 3) as advance:
        advance(3)
    assert "Reading" not in capsys.readouterr().err


def test_no_bar(capsys):
    with progress("Reading", 3, show=False) as advance:
        advance(3, description="Writing", total=4)
    assert list(track("ab", "Reading", show=False)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_track_takes_the_total_from_the_items(capsys):
    assert list(track([1, 2, 3], "Reading", unit="files", keep=True)) == [1, 2, 3]
    assert "3/3 files" in capsys.readouterr().err
    assert list(track(iter([1, 2]), "Reading", 4, unit="files", keep=True)) == [1, 2]
    assert "2/4 files" in capsys.readouterr().err
    assert list(track(iter([1, 2]), "Reading", unit="files", keep=True)) == [1, 2]
    assert "2/? files" in capsys.readouterr().err


def test_an_error_inside_a_bar_leaves_it():
    with pytest.raises(ValueError, match="broken"), progress("Reading", 3):
        raise ValueError("broken")


def test_lines(capsys):
    warn("the weights are random")
    note_skipped(["a.png is empty", "b.png is a folder"])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "Warning: the weights are random",
        "Skipped: a.png is empty",
        "Skipped: b.png is a folder",
    ]


def test_results_go_to_stdout(capsys):
    print_json({"a": [1, 2]})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": [1, 2]}
    table_console().print("x" * 190)
    out, err = capsys.readouterr()
    assert out == "x" * 190 + "\n"
    assert err == ""


def test_exit_if():
    exit_if([])
    exit_if({})
    with pytest.raises(click.exceptions.Exit) as error:
        exit_if(["a.png"])
    assert error.value.exit_code == 1


def test_warnings_of_the_library_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        with warnings_as_lines():
            warnings.warn("2 files were left out.", stacklevel=1)
            warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "Warning: 2 files were left out.\n"
    assert [str(other.message) for other in others] == ["old"]


def test_skipped_files_take_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    note_skipped(["a\nb.png is empty", "c.png\x1b[31m"])
    assert capsys.readouterr().err == "Skipped: a\\nb.png is empty\nSkipped: c.png\\x1b[31m\n"
