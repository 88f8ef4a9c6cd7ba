"""Who may import whom: DESIGN's arrows, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import django_meterly

PACKAGE = Path(django_meterly.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}


class Import(NamedTuple):
    source: str
    target: str
    #: Whether importing the module runs it.
    at_import: bool

    def enters(self, *modules: str) -> bool:
        return any(f"{self.target}.".startswith(f"{module}.") for module in modules)

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


def _targets(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parts = package.split(".")
        anchor = parts[: len(parts) - node.level + 1]
        base = ".".join([*anchor, base] if base else anchor)
    # "from package import module" imports the module, not a name of the package.
    names = [
        f"{base}.{alias.name}" for alias in node.names if alias.name != "__version__"
    ]
    return [name if name in MODULES else base for name in names]


def _imports(module: str) -> set[Import]:
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()

    def visit(node: ast.AST, *, at_import: bool) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in _targets(node, package):
                found.add(Import(module, target, at_import))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            at_import = False
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_import = False
        for child in ast.iter_child_nodes(node):
            visit(child, at_import=at_import)

    visit(TREES[module], at_import=True)
    return found


IMPORTS = {line for module in MODULES for line in _imports(module)}


def _inside(module: str, *parents: str) -> bool:
    return any(
        f"{module}.".startswith(f"django_meterly.{parent}.") for parent in parents
    )


def test_every_kind_of_import_is_read() -> None:
    assert Import("django_meterly", "django_meterly.errors", False) in IMPORTS
    assert Import("django_meterly.conf", "django.conf", True) in IMPORTS
    assert Import("django_meterly.client", "django_meterly.conf", False) in IMPORTS
    assert (
        Import("django_meterly.client", "django_meterly.transports.base", True)
        in IMPORTS
    )


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("requests", ["transports"]),
        ("pytest", ["pytest_plugin"]),
        ("celery", ["tasks", "ledger.tasks"]),
        (
            "rest_framework",
            ["rest_framework", "ledger.api", "ledger.authentication"],
        ),
    ],
)
def test_a_library_stays_where_it_belongs(library: str, homes: list[str]) -> None:
    strays = [
        str(line)
        for line in IMPORTS
        if line.enters(library) and not _inside(line.source, *homes)
    ]
    assert strays == []


def test_the_integration_never_imports_the_ledger() -> None:
    strays = [
        str(line)
        for line in IMPORTS
        if line.enters("django_meterly.ledger")
        and not _inside(line.source, "ledger", "testing")
    ]
    assert strays == []


def test_guarded_views_import_no_door_no_task_and_no_admin() -> None:
    above = ("decorators", "mixins", "middleware", "tasks", "jobs", "admin", "checks")
    strays = [
        str(line)
        for line in IMPORTS
        if _inside(line.source, "views")
        and line.enters(*(f"django_meterly.{name}" for name in above))
    ]
    assert strays == []


def test_nothing_below_guarded_views_imports_how_they_run() -> None:
    # Policies and lifecycle ask for the methods and the key of a request.
    homes = ("journal", "transports", "client", "policies", "lifecycle", "guards")
    seam = [f"django_meterly.views.{name}" for name in ("methods", "keys")]
    strays = [
        str(line)
        for line in IMPORTS
        if _inside(line.source, *homes)
        and line.enters("django_meterly.views")
        and not line.enters(*seam)
    ]
    assert strays == []


def test_only_the_pytest_plugin_imports_what_is_for_tests() -> None:
    strays = [
        str(line)
        for line in IMPORTS
        if line.enters(
            "django.test",
            "unittest",
            "django_meterly.testing",
            "django_meterly.pytest_plugin",
        )
        and not _inside(line.source, "testing", "pytest_plugin")
    ]
    assert strays == []


def test_the_ledger_imports_the_seam_and_no_more() -> None:
    seam = [
        f"django_meterly.{name}" for name in ("errors", "wire", "transports.base", "db")
    ]
    strays = [
        str(line)
        for line in IMPORTS
        if _inside(line.source, "ledger")
        and line.enters("django_meterly")
        and not line.enters("django_meterly.ledger", *seam)
    ]
    assert strays == []


def test_the_client_side_imports_no_models_and_no_settings() -> None:
    # The signals are names that the client sends under, and know nothing.
    homes = (
        "answers",
        "client",
        "client_guard",
        "types",
        "errors",
        "wire",
        "transports",
        "signals",
    )
    strays = [
        str(line)
        for line in IMPORTS
        if _inside(line.source, *homes)
        and line.at_import
        and line.enters("django_meterly", "django.db", "django.conf", "django.apps")
        and not any(_inside(line.target, home) for home in homes)
    ]
    assert strays == []


def _reads(tree: ast.AST, setting: str) -> bool:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == setting
            and isinstance(node.ctx, ast.Load)
        ):
            return True
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "getattr",
            "hasattr",
        ):
            name = node.args[1]
            if isinstance(name, ast.Constant) and name.value == setting:
                return True
    return False


@pytest.mark.parametrize(
    ("setting", "reader"),
    [
        ("METERLY", "django_meterly.conf"),
        ("METERLY_LEDGER", "django_meterly.ledger.conf"),
    ],
)
def test_a_settings_dict_has_one_reader(setting: str, reader: str) -> None:
    readers = [name for name, tree in TREES.items() if _reads(tree, setting)]
    assert readers == [reader]


def _run(code: str) -> None:
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        check=True,
        cwd=PACKAGE.parent,
        env={},
    )


NOTHING_HEAVY = """
import sys
heavy = {"celery", "requests", "rest_framework"} & sys.modules.keys()
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "module",
    [
        "django_meterly",
        "django_meterly.client",
        "django_meterly.conf",
        "django_meterly.errors",
        "django_meterly.transports",
        "django_meterly.transports.base",
        "django_meterly.types",
        "django_meterly.wire",
    ],
)
def test_an_import_needs_no_settings_and_no_library(module: str) -> None:
    _run(
        f"import {module}\n{NOTHING_HEAVY}"
        "from django.conf import settings; assert not settings.configured"
    )


def test_the_pytest_plugin_loads_no_django() -> None:
    _run(
        "import sys, django_meterly.pytest_plugin\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'django']"
    )


def test_the_client_works_in_a_plain_script() -> None:
    _run(
        "from django_meterly import MeterlyClient\n"
        "MeterlyClient(api_key='mk_test_' + 32 * 'x')\n"
        "from django.conf import settings; assert not settings.configured\n"
        "import sys; assert not {'celery', 'rest_framework'} & sys.modules.keys()"
    )


def test_an_installed_app_and_its_decorator_load_no_library() -> None:
    _run(
        "import django\n"
        "from django.conf import settings\n"
        "apps = ['django.contrib.auth', 'django.contrib.contenttypes']\n"
        "settings.configure(INSTALLED_APPS=[*apps, 'django_meterly'])\n"
        "django.setup()\n"
        "from django_meterly import guard, meterly_guard\n"
        f"{NOTHING_HEAVY}"
    )
