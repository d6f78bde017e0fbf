"""Measures how soon the page of `attnguide annotate` loads, and how long it takes to save a mask.

    python benchmarks/page.py

In a separate process, over HTTP, as a browser would. The time for a mask of 1024×1024 pixels, half of them
painted at random, which PNG cannot shorten, runs from the first byte that is sent to the response.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

PROGRAM = Path(sys.executable).parent / "attnguide"


def measure(folder: Path, side: int, images: int, times: int) -> dict[str, float]:
    """Return the seconds until the page responds, and the milliseconds to save a mask, as medians."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (side, side, 3), dtype=np.uint8)
    (folder / "images").mkdir()
    Image.fromarray(pixels).save(folder / "images" / "0.jpg")
    for number in range(1, images):
        (folder / "images" / f"{number}.jpg").hardlink_to(folder / "images" / "0.jpg")
    ready, saving = [], []
    for _ in range(times):
        begun = time.perf_counter()
        command = [PROGRAM, "annotate", folder / "images", "--out", folder / "masks"]
        with subprocess.Popen(
            [*command, "--no-browser", "--port", "0"], stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None
            found = re.search(r"http://\S+", server.stdout.readline())
            assert found
            address = urlsplit(found[0])
            connection = http.client.HTTPConnection("127.0.0.1", address.port)
            connection.request("GET", f"/?{address.query}")
            connection.getresponse().read()
            ready.append(time.perf_counter() - begun)
            token = {"X-Token": address.query.removeprefix("token=")}
            for _ in range(10):
                bits = np.packbits(generator.random((side, side)) < 0.5).tobytes()
                begun = time.perf_counter()
                connection.request("PUT", "/api/mask/0/0", bits, token)
                assert connection.getresponse().read()
                saving.append(time.perf_counter() - begun)
            server.terminate()
    return {"ready_s": round(median(ready), 3), "saving_ms": round(1000 * median(saving), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=1024, help="of the square images, in pixels")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), options.side, options.images, options.times)))


if __name__ == "__main__":
    main()
