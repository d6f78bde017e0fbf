"""The server of the painting page: what it serves, and what it refuses."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.helpers.browser import annotating
from tests.plugins.gradcam_iou.helpers import Served, packed, picture, some_mask


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    for name in ("one", "two"):
        picture(folder / "images" / f"{name}.png", seed=len(name))
    (folder / "secret.txt").write_text("secret")
    with annotating(folder / "images", "--out", folder / "masks") as (process, address):
        yield Served(process, address, folder / "masks")


def test_a_mask_is_kept_and_given_back(served: Served) -> None:
    status, content = served.ask("/api/mask/0/0", "PUT", packed(some_mask()))
    assert (status, json.loads(content)) == (200, {"painted": [0], "done": 1})
    np.testing.assert_array_equal(np.asarray(Image.open(served.out / "one.png")) > 0, some_mask())
    assert served.ask("/api/mask/0/0") == (200, packed(some_mask()))
    assert served.ask("/api/mask/1/0") == (204, b"")
    assert json.loads(served.ask("/api/next/0")[1]) == {"sheet": 1}
    status, content = served.ask("/api/image/0")
    assert status == 200
    assert content[:2] == b"\xff\xd8"  # JPEG
    assert json.loads(served.ask("/api/coco")[1])["images"][0]["file_name"] == "one.png"
    page = served.ask(f"/?token={served.token}", X_Token="")[0]
    assert page == 403  # two tokens
    assert served.ask("/")[1].startswith(b"<!doctype html>")


def test_a_reload_brings_a_cookie_that_opens_the_page_and_nothing_else(served: Served) -> None:
    def ask(path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status, answer.headers.get("Set-Cookie", "")

    status, cookie = ask(f"/?token={served.token}")
    name, _, rest = cookie.partition("=")
    key = rest.split(";")[0]
    assert (status, name) == (200, f"attnguide-{served.port}")
    assert served.token not in cookie
    assert "HttpOnly" in cookie
    assert ask("/", Cookie=f"other=1; {name}={key}")[0] == 200
    for path in ("/api/state", "/api/image/0", "/api/coco", f"/api/state?token={key}"):
        assert ask(path, Cookie=f"{name}={key}")[0] == 403
    assert ask("/", "POST", Cookie=f"{name}={key}")[0] == 403
    assert ask("/")[0] == ask("/", Cookie=f"{name}=guessed")[0] == 403
    assert ask("/", Cookie=f"{name}={key}; {name}={key}")[0] == 403
    assert ask("/?token=guessed", Cookie=f"{name}={key}")[0] == 403
    assert ask("/", Cookie=f"{name}={key}", Host="evil.example")[0] == 403


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/api/state", {"X_Token": "guessed"}, 403),
        ("/api/state", {"X_Token": ""}, 403),
        ("/?token=guessed", {"X_Token": "guessed"}, 403),
        ("/api/state", {"Host": "evil.example"}, 403),
        ("/api/state", {"Host": "127.0.0.1:1"}, 403),
        ("/api/state", {"Origin": "http://evil.example"}, 403),
        ("/api/state", {"Origin": "null"}, 403),
        ("/../secret.txt", {}, 404),
        ("/%2e%2e/secret.txt", {}, 404),
        ("/api/image/../../secret.txt", {}, 404),
        ("/api/image/7", {}, 404),
        ("/api/mask/0/3", {}, 404),
        ("/api/mask/-1/0", {}, 404),
        ("/api/map/0/0/before", {}, 404),
        ("/api/part/0/0", {}, 404),
        ("/api/tuning", {}, 404),
        ("/page/app.js", {}, 404),
        (f"/api/image/{'9' * 5000}", {}, 404),
        (f"/api/mask/0/{'9' * 5000}", {}, 404),
        (f"/api/part/{'1' * 10}/0", {}, 404),
    ],
)
def test_what_is_refused(served: Served, path: str, headers: dict[str, str], status: int) -> None:
    found, content = served.ask(path, **headers)
    assert found == status, content
    assert b"secret" not in content
    assert served.alive()


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil"}, {"X_Token": "no"}])
def test_nothing_is_written_for_strangers(served: Served, headers: dict[str, str]) -> None:
    before = served.files()
    assert served.ask("/api/mask/1/0", "PUT", packed(some_mask()), **headers)[0] == 403
    assert served.files() == before


@pytest.mark.parametrize(
    ("method", "path", "body", "message"),
    [
        ("PUT", "/api/mask/1/0", b"", "150 bytes, not 0"),
        ("PUT", "/api/mask/1/0", b"x" * 151, "150 bytes, not 151"),
        ("POST", "/api/import/1", b"{", "not valid JSON"),
        ("POST", "/api/import/1", b'{"a": 1, "a": 2}', "occurs twice"),
        ("POST", "/api/import/1", b"[" * 100_000, "not valid JSON"),
        ("POST", "/api/import/1", b'{"shapes": 3}', "the file has no 'imageHeight'"),
        ("POST", "/api/import/1", b"\xff\xfe", "UTF-8"),
    ],
)
def test_bad_bodies(served: Served, method: str, path: str, body: bytes, message: str) -> None:
    before = served.files()
    status, content = served.ask(path, method, body)
    assert status == 400
    assert message in json.loads(content)["error"]
    assert served.files() == before
    assert served.alive()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_a_gigabyte(served: Served, chunked: bool) -> None:
    before, size = served.files(), 2**30
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
        head = f"PUT /api/mask/1/0 HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nX-Token: {served.token}\r\n"
        connection.sendall(f"{head}{length}\r\n\r\n".encode())
        block = b"x" * 2**20
        block = f"{len(block):x}\r\n".encode() + block + b"\r\n" if chunked else block
        sent = 0
        try:
            while sent < size:
                connection.sendall(block)
                sent += len(block)
        except OSError:
            pass  # it hung up, as it should
        assert sent < size / 4
    assert served.files() == before
    assert served.alive()


def test_killed_at_any_moment(tmp_path: Path) -> None:
    size = (400, 400)
    picture(tmp_path / "images" / "one.png", size)
    for wait in (0.0, 0.01, 0.03):
        with annotating(tmp_path / "images", "--out", tmp_path / "masks") as (process, address):
            served = Served(process, address, tmp_path / "masks")
            assert served.ask("/api/mask/0/0", "PUT", packed(some_mask(1, size)))[0] == 200
            connection = http.client.HTTPConnection("127.0.0.1", served.port)
            connection.request("PUT", "/api/mask/0/0", packed(some_mask(2, size)), {"X-Token": served.token})
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            process.wait()
            connection.close()
        mask = np.asarray(Image.open(tmp_path / "masks" / "one.png")) > 0
        assert any((mask == some_mask(seed, size)).all() for seed in (1, 2))
