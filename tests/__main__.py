"""Every check of the project, in order, up to the first that fails.

`python -m tests` runs all of them, `python -m tests format types` the ones that are named.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = (sys.executable, "-m")
SCRIPTS = Path(sys.executable).parent

#: What the wheel must hold, besides the modules.
IN_THE_WHEEL = (
    "attnguide/py.typed",
    "attnguide/assets/faces.safetensors",
    "attnguide_action_units/codebook.toml",
    "attnguide_action_units/py.typed",
    "attnguide_action_units/recipes/au-codebook.toml",
    "attnguide_gradcam_iou/py.typed",
    "attnguide_segmentation/assets/parser.safetensors",
    "attnguide_segmentation/attributes.toml",
    "attnguide_segmentation/py.typed",
    "attnguide_gradcam_iou/painting/page/app.js",
    "attnguide_gradcam_iou/painting/page/index.html",
    "attnguide_gradcam_iou/painting/page/raster.js",
    "attnguide_gradcam_iou/painting/page/style.css",
    "attnguide_gradcam_iou/painting/page/view.js",
    "attnguide_gradcam_iou/recipes/gradcam-iou.toml",
    "attnguide_gradcam_iou/assets/report.css",
    "attnguide_gradcam_iou/assets/report.html",
    "attnguide_gradcam_iou/assets/report.js",
    "dist-info/licenses/LICENSE",
)
ENTRY_POINTS = (
    "attnguide.cli:main",
    "attnguide.parts.standard",
    "attnguide_action_units.plugin",
    "attnguide_gradcam_iou.plugin",
    "attnguide_segmentation.plugin",
)
PACKAGES = (ROOT / "src/attnguide", *(folder for folder in (ROOT / "plugins").iterdir() if folder.is_dir()))


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
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            (entry_points,) = (name for name in names if name.endswith("dist-info/entry_points.txt"))
            declared = archive.read(entry_points).decode()
    sources = {
        f"{package.name}/{file.relative_to(package).as_posix()}"
        for package in PACKAGES
        for file in package.rglob("*.py")
    }
    wrong = [f"{name} is missing" for name in sorted({*sources} - {*names})]
    wrong += [f"{name} is missing" for name in IN_THE_WHEEL if not any(n.endswith(name) for n in names)]
    wrong += [f"entry point {name} is missing" for name in ENTRY_POINTS if name not in declared]
    wrong += [f"{name} has no place in it" for name in names if not name.startswith("attnguide")]
    for problem in wrong:
        print(f"wheel: {problem}")
    return not wrong


STAGES: dict[str, Callable[[], bool]] = {
    "style": lambda: run(*PYTHON, "ruff", "check"),
    "format": lambda: run(*PYTHON, "ruff", "format", "--check"),
    "words": lambda: run(*PYTHON, "tests.words"),
    "types": lambda: run(*PYTHON, "mypy"),
    "imports": lambda: run(SCRIPTS / "lint-imports"),
    "docs": docs,
    "wheel": wheel,
    "tests": lambda: run(*PYTHON, "pytest", "-q", "-n", "2"),  # last, so that its summary closes the output
}


def main() -> int:
    chosen = sys.argv[1:] or list(STAGES)
    if unknown := [name for name in chosen if name not in STAGES]:
        print(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
        return 2
    for name in chosen:
        print(f"\n== {name}", flush=True)
        start = time.monotonic()
        if not STAGES[name]():
            print(f"\nFAILED: {name}. The stages after it did not run.")
            return 1
        if name != "tests":
            print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
