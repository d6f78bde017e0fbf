"""One run at a time writes to a folder, and a lock never outlives its process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from attnguide.commands.explain.reserving import SCRATCH, reserved
from attnguide.errors import InputError


def test_a_folder_is_reserved_once(tmp_path: Path) -> None:
    with reserved(tmp_path):
        with pytest.raises(InputError, match="another run writes to"), reserved(tmp_path):
            pass
        assert (tmp_path / SCRATCH / "lock").exists()
    assert list(tmp_path.iterdir()) == []
    with reserved(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_taken_over_and_its_files_are_removed(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time; from attnguide.commands.explain.reserving import SCRATCH, reserved\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with reserved(folder):\n"
        "    (folder / SCRATCH / 'half.png').touch(); print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(InputError, match=rf"\(process {process.pid}\)"), reserved(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / SCRATCH / "half.png").exists()
    with reserved(tmp_path):
        assert [path.name for path in (tmp_path / SCRATCH).iterdir()] == ["lock"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot lock the folder"), reserved(tmp_path / "gone"):
        pass
