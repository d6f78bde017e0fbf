"""A real browser, and the page of `attnguide annotate` served to it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
#: The browser asks for nothing on its own account.
ALONE = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--window-size=1280,800",
)

needs_browser = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="needs chromium and chromedriver on the path"
)


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium, without a screen, with a log of what it asks for."""
    from selenium.webdriver import Chrome
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(BROWSER)
    for argument in ALONE:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


@contextmanager
def annotating(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`attnguide annotate` in a process of its own, and the address that it gave."""
    program = Path(sys.executable).parent / "attnguide"
    command = [program, "annotate", *map(str, arguments), "--no-browser"]
    with subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found, process.stderr.read()
            yield process, found[0]
        finally:
            process.kill()
