"""Runs the examples, and keeps what they found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(script: str, settings: Sequence[str], results: Path, pictures: Path | None = None) -> None:
    """Run a script of `examples/`, and keep its `result.json`; its pictures as `{pictures}-NAME.png`."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(EXAMPLES / script), *settings, "--out", folder], check=True)
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
        if pictures is not None:
            for picture in Path(folder).glob("*.png"):
                shutil.copy(picture, pictures.with_name(f"{pictures.name}-{picture.name}"))
    for where in ("data", "out", "device", "landmarks", "parser", "helen", "celeba"):  # nobody else has these
        result["settings"].pop(where, None)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
