"""Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner

from attnguide.cli import console


def test_streams() -> None:
    @click.command()
    def speak() -> None:
        console.note("noted")
        console.warn("careful")
        console.print_json({"é": [1, None]})
        with console.progress_bar("images") as bar:
            bar.update(bar.add_task("Reading", total=2), completed=2)

    result = CliRunner().invoke(speak)
    assert json.loads(result.stdout) == {"é": [1, None]}
    assert result.stderr.startswith("noted\nWarning: careful\n")
    assert "2/2" in result.stderr


@pytest.mark.parametrize(("weights", "warned"), [("random", True), ("pretrained", False)])
def test_random_weights_are_warned_of(weights: str, warned: bool, capsys: pytest.CaptureFixture[str]) -> None:
    loaded: Any = SimpleNamespace(weights=weights, name="resnet50")
    console.warn_of_random_weights(loaded)
    assert ("resnet50" in capsys.readouterr().err) == warned


def test_failures_have_the_status_of_wrong_usage() -> None:
    @click.command()
    def fail() -> None:
        raise console.Failure("no such layer")

    result = CliRunner().invoke(fail)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", "Error: no such layer\n")


def test_tables_are_cut_for_no_pipe() -> None:
    assert console.table_console().width >= 200
