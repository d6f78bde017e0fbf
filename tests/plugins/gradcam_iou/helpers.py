"""Images and masks to paint on, and requests to the painting page's server."""

from __future__ import annotations

import http.client
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from click.testing import CliRunner, Result
from PIL import Image

from attnguide.cli.main import main

SIZE = (30, 40)


def picture(path: Path, size: tuple[int, int] = SIZE, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def some_mask(seed: int = 0, size: tuple[int, int] = SIZE) -> npt.NDArray[np.bool_]:
    return np.random.default_rng(seed).random(size) < 0.4


class Served:
    """A server, and raw requests to it."""

    def __init__(self, process: Any, address: str, out: Path) -> None:
        parts = urlsplit(address)
        assert parts.port is not None
        self.process, self.port, self.out = process, parts.port, out
        self.token = parts.query.removeprefix("token=")

    def ask(
        self, path: str, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {"X-Token": self.token, **named})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content

    def alive(self) -> bool:
        return self.process.poll() is None and self.ask("/api/state")[0] == 200

    def files(self) -> list[str]:
        return sorted(path.name for path in self.out.rglob("*"))


def packed(mask: npt.NDArray[np.bool_]) -> bytes:
    return np.packbits(mask).tobytes()


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["annotate", *map(str, arguments), "--no-browser"])
