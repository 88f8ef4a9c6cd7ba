"""The statements of the package (``f47``), and the files whose tests prove them.

::

    python -m tests.statements

writes the last column of the table in ``docs/architecture.md`` anew.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "architecture.md"
_TEST = re.compile(r"^\s*(?:async )?def test_(\w+)", re.M)
_NUMBER = re.compile(r"(?:^|_)f(\d\d)(?=_)")
_ROW = re.compile(r"^\| (F\d\d) \| (.+?) \|(.*)\|$", re.M)


def files() -> dict[str, str]:
    """Return the files that prove each statement, as the page shows them."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in TESTS.rglob("test_*.py"):
        for name in _TEST.findall(file.read_text("utf-8")):
            for number in _NUMBER.findall(name):
                found[f"F{number}"].add(file.relative_to(TESTS).as_posix())
    return {
        number: ", ".join(f"`{name}`" for name in sorted(names))
        for number, names in found.items()
    }


def rows() -> dict[str, str]:
    """Return the last column of the page's table, by statement."""
    return {row[0]: row[2].strip() for row in _ROW.findall(PAGE.read_text("utf-8"))}


def main() -> None:
    proved = files()
    page = _ROW.sub(
        lambda row: f"| {row[1]} | {row[2]} | {proved.get(row[1], '')} |",
        PAGE.read_text("utf-8"),
    )
    PAGE.write_text(page, "utf-8")


if __name__ == "__main__":
    main()
