"""Every check of the project, in order, up to the first that fails.

`python -m tests` runs all of them, `python -m tests format types` the ones that are named, and
`python -m tests nightly` the slow tests, which only a nightly run needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.wheel import ROOT, check_wheel

PYTHON = (sys.executable, "-m")
#: Two processes; the reasons for skipping are listed at the end.
PYTEST = ("pytest", "-q", "-n", "2", "-rs")
SCRIPTS = Path(sys.executable).parent


def run(*command: str | Path) -> bool:
    """Run a command in the repository; whether it succeeded."""
    # One thread a process: the tests bring their own processes, and the models in them are small.
    settings = {"OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, check=False).returncode == 0


def docs() -> bool:
    with tempfile.TemporaryDirectory() as site:
        return run(*PYTHON, "mkdocs", "build", "--strict", "--site-dir", site)


def wheel() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        if not run(*PYTHON, "build", "--wheel", "--outdir", folder):
            return False
        (path,) = Path(folder).glob("*.whl")
        problems = check_wheel(path)
    for problem in problems:
        print(f"wheel: {problem}")
    return not problems


def nightly() -> bool:
    """The tests that only a nightly run needs."""
    return run(*PYTHON, *PYTEST, "-m", "nightly")


STAGES: dict[str, Callable[[], bool]] = {
    "style": lambda: run(*PYTHON, "ruff", "check"),
    "format": lambda: run(*PYTHON, "ruff", "format", "--check"),
    "words": lambda: run(*PYTHON, "tests.words"),
    "types": lambda: run(*PYTHON, "mypy"),
    "imports": lambda: run(SCRIPTS / "lint-imports"),
    "docs": docs,
    "wheel": wheel,
    "tests": lambda: run(*PYTHON, *PYTEST),  # last, so that its summary closes the output
}
#: Runs only where it is named.
EXTRA: dict[str, Callable[[], bool]] = {"nightly": nightly}


def main() -> int:
    chosen, stages = sys.argv[1:] or list(STAGES), {**STAGES, **EXTRA}
    if unknown := [name for name in chosen if name not in stages]:
        print(f"no stage {', '.join(unknown)}; there are {', '.join(stages)}")
        return 2
    for name in chosen:
        print(f"\n== {name}", flush=True)
        start = time.monotonic()
        if not stages[name]():
            print(f"\nFAILED: {name}. The stages after it did not run.")
            return 1
        if name not in ("tests", "nightly"):
            print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
