"""``docs/architecture.md`` names what exists, and the other pages list all there is."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
from django.dispatch import Signal

import django_meterly
from django_meterly import conf, signals
from django_meterly.models import Reservation
from django_meterly.policies import TaskOptions, ViewOptions, WorkOptions
from tests import statements
from tests.pages import DOCS, ROOT

PACKAGE = Path(django_meterly.__file__).parent
PAGE = (DOCS / "architecture.md").read_text("utf-8")
#: ``journal/opening.py:reserve``, ``journal/``; relative to the package or the project.
NAMED = re.compile(r"`((?:[\w.-]+/)*(?:[\w-]+\.(?:py|sql|md)|(?<=/)))(?::([\w.]+))?`")
# The last column of that table has its own test.
NAMES = sorted(set(NAMED.findall(PAGE.partition("## The F-numbers")[0])))


def _defined(body: list[ast.stmt]) -> dict[str, list[ast.stmt]]:
    found: dict[str, list[ast.stmt]] = {}
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found[node.name] = node.body
            case (
                ast.Assign(targets=[ast.Name(name)])
                | ast.AnnAssign(target=ast.Name(name))
            ):
                found[name] = []
    return found


def _exists(path: str, name: str) -> bool:
    for folder in (PACKAGE, ROOT):
        if (file := folder / path).exists():
            break
    else:
        return False
    if not name:
        return True
    text = file.read_text("utf-8")
    if file.suffix == ".sql":
        return f"FUNCTION {name}(" in text
    body = ast.parse(text).body
    for part in name.split("."):
        defined = _defined(body)
        if part not in defined:
            return False
        body = defined[part]
    return True


def test_the_page_names_files_and_functions() -> None:
    assert len(NAMES) > 60
    assert len([name for _, name in NAMES if name]) > 20


def test_what_the_page_names_exists() -> None:
    missing = [(path, name) for path, name in NAMES if not _exists(path, name)]
    assert missing == []


def test_every_statement_is_in_the_table_with_its_tests() -> None:
    # If this fails: python -m tests.statements, and a sentence for a new number.
    assert statements.rows() == statements.files()


@pytest.mark.parametrize("setting", conf.DEFAULTS)
def test_every_setting_is_documented(setting: str) -> None:
    page = (DOCS / "settings.md").read_text("utf-8")
    assert re.search(rf"^\| [^|]*`{setting}`[^|]* \|", page, re.M)


@pytest.mark.parametrize(
    ("page", "options"), [("guard", ViewOptions), ("jobs", TaskOptions)]
)
def test_every_option_is_documented(page: str, options: type[WorkOptions]) -> None:
    text = (DOCS / f"{page}.md").read_text("utf-8")
    for option in fields(options):
        assert re.search(rf"^\| [^|]*`{option.name}`[^|]* \|", text, re.M), option.name


def test_every_check_is_documented() -> None:
    # Both apps have this one: f"{app.label}.W014".
    ids = {"meterly.W014", "meterly_ledger.W014"}
    for file in PACKAGE.rglob("*.py"):
        found = re.findall(
            r"\b(meterly(?:_ledger)?\.[EWI]\d{3})\b", file.read_text("utf-8")
        )
        ids.update(found)
    page = (DOCS / "settings.md").read_text("utf-8")
    documented = {
        f"{app}.{number}"
        for first in re.findall(r"^\| (`meterly[^|]+)\|", page, re.M)
        for app, number in re.findall(r"`(?:(meterly\w*)\.)?([EWI]\d{3})`", first)
        for app in [app or "meterly"]
    }
    assert len(ids) > 25
    assert ids == documented


def test_every_signal_is_documented() -> None:
    page = (DOCS / "signals.md").read_text("utf-8")
    names = [name for name, value in vars(signals).items() if isinstance(value, Signal)]
    assert len(names) > 8
    for name in names:
        assert f"\n| `{name}` |" in page, name


def test_every_state_is_documented() -> None:
    page = (DOCS / "sweeping.md").read_text("utf-8")
    table = page.partition("## The states of a row")[2].partition("\n## ")[0]
    for state in Reservation.State:
        # As the admin says it; "intent" is what the code calls it.
        assert f"`{state.value.replace('_', ' ')}`" in table, state
