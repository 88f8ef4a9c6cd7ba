"""Every block of Python and every command in README and docs/ is run.

``docs/quickstart.md`` is typed in as a whole, by ``tests/test_quickstart.py``, and
``docs/testing.md`` by ``tests/test_testing_page.py``. On the other pages

* Python is run in this process, block after block in one namespace. It begins with
  what ``cast`` has, and what a page defines in an invisible block;
* settings, whose every line sets something in capitals, are checked in a project;
* a block whose first line names a file is written to its end (or "all of it" is
  replaced), if the page has made a project with that folder, or if it is invisible;
* commands are run in that project, or else in one with Meterly.

What cannot be run says why, in ``<!-- not run: ... -->`` right above it.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import stat
import sys
from io import StringIO
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import certifi
import pytest
from asgiref.sync import async_to_sync
from django.core.management import call_command
from django.http import HttpResponse
from django.template import engines

from django_meterly.models import Customer
from tests.books import fund
from tests.pages import DOCS, ROOT, Block, blocks
from tests.projects.running import Project, environment

if TYPE_CHECKING:
    from pathlib import Path

    from django.contrib.auth.models import User

PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
#: Languages whose blocks are run. The others show what is sent, or is somebody else's.
RUN = {"python", "console", "html"}
SHOWN = {"http", "nginx", "json", "text", "ini", "yaml", "toml", "sql"}
#: A line that names the file in which the lines below it belong.
FILE = re.compile(r"^# ([\w/]+\.py(?:, all of it)?)\n", re.M)
UNITS = ("image_credits", "gpu_seconds", "tokens")
#: What the projects of pages read from the environment.
ENVIRONMENT = {
    "SECRET_KEY": "not a secret: only tests run with it",
    "OLD_SECRET_KEY": "not a secret either",
    "ALLOWED_HOSTS": "127.0.0.1",
    "METERLY_API_KEY": "mk_test_0123456789abcdef",
}
#: Programs that a page may call, so that a command runs on one machine.
PROGRAMS = {
    "python": f'exec "{sys.executable}" "$@"',
    "django-admin": f'exec "{sys.executable}" -m django "$@"',
    # ssh HOST COMMAND, on this machine.
    "ssh": 'shift; exec sh -c "$*"',
    "alert": "echo alert; exit 1",
}


class _Model:
    """A model of the reader's: all that a page does is to create one."""

    class objects:  # noqa: N801
        @staticmethod
        def create(*_: Any, **__: Any) -> Any:
            return SimpleNamespace(pk=7)


def cast(user: User) -> dict[str, Any]:
    """Return what the pages take for granted: the reader's own names."""
    return {
        "user": user,
        "env": os.environ.get,
        "draw": lambda *_: b"drawn",
        "render": lambda *_: 3,
        "owner_of": lambda *_: user,
        "HttpResponse": HttpResponse,
        "customer": Customer.objects.for_owner(user),
        "Job": _Model,
        "Order": _Model,
    }


@pytest.fixture
def elsewhere(live_server: Any, tmp_path: Path) -> dict[str, str]:
    """What the pages have on other machines, and where it is here."""
    key = StringIO()
    call_command(
        "meterly_ledger_apikey",
        "create",
        "docs",
        "--scope",
        "spend",
        "grant",
        stdout=key,
        stderr=StringIO(),
    )
    return {
        "https://credits.example.com": live_server.url,
        "mk_live_...": key.getvalue().strip(),
        "/mnt/elsewhere": str(tmp_path),
        "/etc/ssl/ledger-ca.pem": certifi.where(),
    }


class Page:
    """A page that is run, with its namespace and its project."""

    def __init__(
        self, folder: Path, namespace: dict[str, Any], elsewhere: dict[str, str]
    ) -> None:
        self.folder = folder
        self.elsewhere = elsewhere
        self.namespace = namespace
        programs = folder / "bin"
        programs.mkdir()
        for name, script in PROGRAMS.items():
            program = programs / name
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        self.env = environment(
            **ENVIRONMENT,
            PATH=f"{programs}:{os.environ['PATH']}",
            DATABASE_URL=f"sqlite:///{folder}/page.sqlite3",
            PROJECT_FOLDER=str(folder),
        )
        self.project = Project(folder / "project", env=self.env)
        self.project.folder.mkdir()

    def run(self, block: Block) -> None:
        if block.not_run:
            return
        for there, here in self.elsewhere.items():
            block = block._replace(source=block.source.replace(there, here))
        if block.language == "html":
            engines["django"].from_string(block.source)
        elif block.language == "console":
            for command in block.commands:
                self._command(command)
        elif block.language == "python":
            for file, line, source in _parts(block):
                self._python(block, file, line, source)

    def _python(self, block: Block, file: str, line: int, source: str) -> None:
        file, _, whole = file.partition(", ")
        written = self.project.folder / file
        if "/" in file and (written.parent.is_dir() or block.invisible):
            written.parent.mkdir(exist_ok=True)
            with written.open("w" if whole else "a") as end:
                end.write(f"\n{source}")
            return
        if file.endswith("settings.py") or _is_settings(source):
            self._check_settings(source)
            return
        code = compile(
            "\n" * (line - 1) + source,
            str(block.page),
            "exec",
            flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
            # Of the page, not of this file.
            dont_inherit=True,
        )
        if code.co_flags & inspect.CO_COROUTINE:

            async def run() -> None:
                await eval(code, self.namespace)

            async_to_sync(run)()
        else:
            exec(code, self.namespace)

    def _check_settings(self, source: str) -> None:
        settings = self.folder / "page_settings.py"
        settings.write_text(
            "import environ\n"
            "from tests.projects.base import *\n"
            "env = environ.Env()\n"
            f"ROOT_URLCONF = 'tests.projects.urls'\n{source}\n"
            # Some of them say what the base has.
            "INSTALLED_APPS = [*dict.fromkeys(INSTALLED_APPS)]\n"
        )
        project = Project(
            self.folder,
            env={
                **self.env,
                "DJANGO_SETTINGS_MODULE": "page_settings",
                "PYTHONPATH": f"{self.folder}:{self.project.folder}:{ROOT}",
            },
        )
        project.manage("check")

    def _command(self, command: str) -> None:
        program, *arguments = command.split()
        if program == "pip":
            # With an extra, or without.
            named = re.findall(r"django-meterly(?:\[(\w+)\])?", command)
            assert named, command
            return
        if program == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert arguments[0] in targets, command
            return
        if (
            program != "django-admin"
            and not (self.project.folder / "manage.py").exists()
        ):
            self._begin_project()
        self.project.run("sh", "-c", command)

    def _begin_project(self) -> None:
        shutil.copytree(
            ROOT / "tests" / "projects" / "plain",
            self.project.folder,
            dirs_exist_ok=True,
        )
        self.project.manage("migrate", "--verbosity=0")


def _parts(block: Block) -> list[tuple[str, int, str]]:
    """Return the files that *block* names, with the lines that belong there."""
    # What comes before the first one is in no file.
    pieces = ["", *FILE.split(block.source)]
    if not pieces[1].strip():
        del pieces[:2]
    found = []
    line = block.line
    for file, source in zip(pieces[::2], pieces[1::2], strict=True):
        line += bool(file)
        found.append((file, line, source))
        line += source.count("\n")
    return found


def _is_settings(source: str) -> bool:
    """Return whether *source* imports, and sets nothing but names in capitals."""
    found = False
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        match statement:
            case ast.Assign(targets=[target]) | ast.AugAssign(target=target):
                while isinstance(target, ast.Subscript):
                    target = target.value
                if not (isinstance(target, ast.Name) and target.id.isupper()):
                    return False
            case _:
                return False
        found = True
    return found


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_is_run(
    page: Path, tmp_path: Path, user: User, elsewhere: dict[str, str]
) -> None:
    if page.stem == "quickstart":
        # tests/test_quickstart.py runs it.
        assert all(block.file or block.commands for block in blocks(page))
        return
    if page.stem == "testing":
        # tests/test_testing_page.py runs it.
        return
    for unit in UNITS:
        fund(user, 1000, unit)
    namespace = {"__name__": f"docs_{page.stem.replace('-', '_')}", **cast(user)}
    running = Page(tmp_path, namespace, elsewhere)
    for block in blocks(page):
        try:
            running.run(block)
        except Exception as exc:
            exc.add_note(f"That was {page.name}, line {block.line}.")
            raise
    # Signals forget a receiver with its page.
    namespace.clear()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks(page):
        assert block.language in RUN | SHOWN, f"{block}: {block.language}"
        assert not block.not_run or len(block.not_run.split()) > 3, block
    # A fence without a language would be no block to the lexer.
    fences = re.findall(r"^ *```(\w*)", page.read_text("utf-8"), re.M)
    assert "" not in fences[::2], page


def _anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of *page*, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles
    }


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted(ROOT.glob("[CS]*.md"))], ids=lambda page: page.stem
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name}: {path}"
        assert not anchor or anchor in _anchors(target), f"{page.name}: #{anchor}"


def test_a_reason_is_that_of_the_block_below_it_only(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: it is only the first one -->\n```python\n1\n```\n"
        "<!-- invisible-code-block: python\n2\n-->\n```python\n3\n```\n"
    )
    assert [(block.source, bool(block.not_run)) for block in blocks(page)] == [
        ("1\n", True),
        ("2\n", False),
        ("3\n", False),
    ]
