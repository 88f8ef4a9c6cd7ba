"""``docs/outcomes.md`` names tests for what it says: they are there."""

from __future__ import annotations

import re
from pathlib import Path

from tests.children import ROOT

NAMED = re.compile(r"`(test_\w+)`")
DEFINED = re.compile(r"^\s*(?:async )?def (test_\w+)", re.MULTILINE)


def test_every_test_that_the_page_names_exists() -> None:
    tests = Path(__file__).parent.rglob("test_*.py")
    defined = {
        name for file in tests for name in DEFINED.findall(file.read_text("utf-8"))
    }
    page = (ROOT / "docs" / "outcomes.md").read_text("utf-8")
    named = set(NAMED.findall(page))
    assert len(named) > 40
    assert named <= defined, sorted(named - defined)


def test_every_row_of_the_page_names_its_proof() -> None:
    page = (ROOT / "docs" / "outcomes.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    facts = [row for row in rows if not row.startswith(("| outcome", "| ---"))]
    assert len(facts) > 30
    assert [row for row in facts if not NAMED.search(row)] == []
