"""Writes the tables of results into the documentation, or checks them.

python benchmarks/tables.py            # write the tables of the pages that have some
python benchmarks/tables.py --check    # only compare; exit status 1 if one is out of date
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
#: A table, and the command before it that prints it.
BLOCK = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def filled(page: str) -> str:
    """Return the page with tables of what was measured."""

    def fill(block: re.Match[str]) -> str:
        script, *options = block[2].split()
        command = [sys.executable, str(HERE / script), *options]
        table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return f"{block[1]}\n{table.strip()}\n\n{block[3]}"

    return BLOCK.sub(fill, page)


def main() -> int:
    status = 0
    for path in sorted(DOCS.rglob("*.md")):
        page = path.read_text(encoding="utf-8")
        fresh = filled(page)
        if page == fresh:
            continue
        if "--check" in sys.argv[1:]:
            print(f"{path} is out of date: run python benchmarks/tables.py", file=sys.stderr)
            status = 1
        else:
            path.write_text(fresh, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
