"""The command `annotate`: its mistakes, its warnings, its end."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest
from click.testing import CliRunner
from tests.helpers.browser import annotating
from tests.plugins.gradcam_iou.helpers import Served, invoke, picture

from attnguide import models
from attnguide.cli.main import main


def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "one.png")
    with annotating(tmp_path / "images", "--out", tmp_path / "masks") as (process, address):
        assert Served(process, address, tmp_path).alive()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_the_token_is_on_no_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The browser is started with a page that only the owner can read, and that leads to the address."""
    picture(tmp_path / "one.png")
    opened: list[str] = []
    seen: list[tuple[str, int]] = []

    def record(url: str) -> bool:
        page = Path(url2pathname(urlsplit(url).path))
        opened.append(url)
        seen.append((page.read_text(), page.parent.stat().st_mode & 0o077))
        os.kill(os.getpid(), signal.SIGINT)
        return True

    monkeypatch.setattr("webbrowser.open", record)
    done = CliRunner().invoke(
        main, ["annotate", str(tmp_path / "one.png"), "--out", str(tmp_path / "m"), "--port", "0"]
    )
    assert done.exit_code == 0, done.output
    (address,) = re.findall(r"http://\S+", done.stdout)
    token = address.partition("token=")[2]
    assert opened[0].startswith("file://")
    assert token not in opened[0]
    text, others_may = seen[0]
    assert f'content="0; url={address}"' in text
    assert others_may == 0
    assert not Path(url2pathname(urlsplit(opened[0]).path)).exists()


def test_without_a_model_no_torch_is_loaded(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "one.png")
    with annotating(tmp_path / "images", "--out", tmp_path / "masks") as (process, _):
        maps = Path(f"/proc/{process.pid}/maps")
        if not maps.exists():
            pytest.skip("needs /proc to see what a process has loaded")
        assert "libtorch" not in maps.read_text()


def test_mistakes(tmp_path: Path) -> None:
    image, out = picture(tmp_path / "one.png"), tmp_path / "masks"
    (tmp_path / "classes.txt").write_text("a/b\n")
    (tmp_path / "none.txt").write_text("\n\n")
    (tmp_path / "fish.txt").write_text("fish\n")
    (tmp_path / "file").write_text("x")
    for arguments, message in (
        ((), "nothing to paint on"),
        ((tmp_path / "no.png",), "path does not exist"),
        ((image, "--classes", tmp_path / "classes.txt"), "cannot be the name of a file"),
        ((image, "--classes", tmp_path / "none.txt"), "names no class"),
        ((image, "--data", tmp_path), "--data is for fine-tuning"),
        ((image, "--template", tmp_path / "no.png"), "does not exist"),
        ((image, "--checkpoint", models.EMBEDDED, "--classes", tmp_path / "fish.txt"), "none of the classes"),
        (
            (image, "--checkpoint", models.EMBEDDED, "--data", tmp_path),
            "predicts attributes: give the attributes of the images by --labels",
        ),
        ((image, "--checkpoint", models.EMBEDDED, "--source", "grad_can"), "grad_cam"),
        ((image, "--host", "256.1.1.1"), "cannot listen at"),
    ):
        found = invoke(*arguments, "--out", out, "--port", "0")
        assert found.exit_code != 0
        assert message in found.output, (arguments, found.output)
    found = invoke(image, "--out", tmp_path / "file", "--port", "0")
    assert "cannot be a folder of masks" in found.output
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = invoke(image, "--out", out, "--port", taken.getsockname()[1])
        assert "Choose another --port" in found.output


def test_another_address_needs_asking_and_warns(tmp_path: Path) -> None:
    image = picture(tmp_path / "one.png")
    with annotating(image, "--out", tmp_path / "masks", "--host", "0.0.0.0") as (process, address):
        served = Served(process, address, tmp_path / "masks")
        assert served.alive()
        assert "0.0.0.0" not in address
        assert served.ask("/api/state", Host=f"192.0.2.7:{served.port}")[0] == 200
        assert served.ask("/api/state", Host=f"evil.example:{served.port}")[0] == 403
        assert served.ask("/api/state", Origin=f"http://192.0.2.7:{served.port}")[0] == 403
        process.send_signal(signal.SIGINT)
        process.wait(20)
        assert process.stderr is not None
        assert "Warning: at 0.0.0.0 everyone in the network" in process.stderr.read()


def test_it_needs_what_the_extra_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    found = invoke(picture(tmp_path / "one.png"), "--out", tmp_path / "masks")
    assert "pip install 'attnguide[ui]'" in found.output
    assert not (tmp_path / "masks").exists()
