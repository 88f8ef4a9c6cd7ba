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
    tables = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    facts = [
        row
        for header, _, *rows in map(str.splitlines, tables)
        if header.endswith("| proved by |")
        for row in rows
    ]
    assert len(facts) > 80
    assert [row for row in facts if not NAMED.search(row)] == []


def test_only_the_tables_that_define_words_name_no_proof() -> None:
    page = (ROOT / "docs" / "outcomes.md").read_text("utf-8")
    headers = re.findall(r"^(\|.*)\n\| ---", page, re.MULTILINE)
    assert [header for header in headers if not header.endswith("| proved by |")] == [
        "| word | meaning |",
        "| the response is | the credits are |",
        "| `ON_DISCONNECT` | a reader who leaves |",
        "| server | event | an async view or stream |",
    ]
