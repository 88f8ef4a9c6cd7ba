"""``docs/testing.md``, and the pytest plugin, in projects of their own.

The page's blocks begin with the file that they are, or are the next part of. The
project around them is a user's: its settings ask a ledger over HTTP, and those of its
tests are the page's. The plugin is found by its entry point.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import django_meterly

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(django_meterly.__file__).parent.parent
PAGE = (ROOT / "docs" / "testing.md").read_text("utf-8")

PROJECT = {
    "manage.py": """
import os, sys
from django.core.management import execute_from_command_line

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings_test")
execute_from_command_line(sys.argv)
""",
    "shop/__init__.py": "from .celery import app",
    "shop/celery.py": """
from celery import Celery

app = Celery("shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
""",
    "shop/settings.py": """
import os

SECRET_KEY = "secret"
ROOT_URLCONF = "posters.urls"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": "shop.sqlite3",
        "TEST": {"NAME": os.environ.get("TEST_NAME")},
    }
}
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "rest_framework",
    "django_meterly",
    "posters",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
TEMPLATES = [
    {"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}
]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
METERLY = {"API_KEY": "mk_live_" + 32 * "x", "DEFAULT_UNIT": "image_credits"}
""",
    "posters/__init__.py": "",
    "pytest.ini": """
[pytest]
DJANGO_SETTINGS_MODULE = shop.settings_test
python_files = tests.py test_*.py
pythonpath = .
filterwarnings = error
""",
}


STUDIO = ROOT / "example_project"


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run Python in ``tmp_path``, where the package is installed, and return all."""
    setup_cfg = ConfigParser()
    setup_cfg.read(ROOT / "setup.cfg", "utf-8")
    entry_points = setup_cfg["options.entry_points"]["pytest11"].strip()
    write(
        tmp_path,
        {
            "site/django_meterly-0.dist-info/METADATA": (
                "Metadata-Version: 2.1\nName: django-meterly\nVersion: 0\n"
            ),
            "site/django_meterly-0.dist-info/entry_points.txt": (
                f"[pytest11]\n{entry_points}\n"
            ),
        },
    )
    path = os.pathsep.join(map(str, (ROOT, tmp_path / "site")))
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DJANGO_", "METERLY_", "PYTEST_", "CELERY_"))
    }

    def run(
        *arguments: str, cwd: Path = tmp_path, **env: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env={**inherited, "PYTHONPATH": path, "NO_COLOR": "1", **env},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def blocks() -> dict[str, str]:
    """Return the page's files: their names and what is in them."""
    files: dict[str, str] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M):
        name = re.match(r"# (\S+\.py)\n", block)
        assert name, f"This block names no file:\n{block}"
        files[name[1]] = f"{files.get(name[1], '')}{block}\n\n"
    return files


@pytest.fixture
def shop(tmp_path: Path) -> dict[str, str]:
    files = blocks()
    write(tmp_path, {**PROJECT, **files})
    return files


def count_tests(text: str) -> int:
    return len(re.findall(r"^ *(?:async )?def test_", text, re.M))


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "options",
    [[], ["--parallel", "2", "--shuffle"], ["--keepdb"], ["--reverse", "--keepdb"]],
    ids=" ".join,
)
def test_the_pages_tests_pass_with_manage_py(
    run: Run, shop: dict[str, str], options: list[str]
) -> None:
    env = {"TEST_NAME": "kept.sqlite3"} if "--keepdb" in options else {}
    for _ in range(1 + ("--keepdb" in options)):
        ran = run("-W", "error", "manage.py", "test", *options, **env)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        # RichTests has one test; the others are in their classes as well.
        expected = count_tests(shop["posters/tests.py"])
        assert f"Ran {expected} tests" in ran.stderr


@pytest.mark.slow("the page's tests with pytest; manage.py runs the same")
@pytest.mark.parametrize("options", [["--nomigrations"], [], ["-n", "2"]], ids=" ".join)
def test_the_pages_tests_pass_with_pytest(
    run: Run, shop: dict[str, str], options: list[str]
) -> None:
    ran = run("-m", "pytest", "-q", *options)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    names = ("posters/tests.py", "posters/test_posters.py")
    # One test of them is three, by its parameters.
    expected = sum(count_tests(shop[name]) for name in names) + 2
    assert f"{expected} passed" in ran.stdout


def test_the_example_projects_tests_pass(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="the example project draws with Pillow")
    options = ["test", "--settings=studio.settings_test"]
    env = {"STATE_DIR": str(tmp_path / "var")}
    ran = run("-W", "error", "manage.py", *options, cwd=STUDIO, **env)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    expected = count_tests((STUDIO / "studio/tests.py").read_text("utf-8"))
    assert f"Ran {expected} tests" in ran.stderr


def test_a_project_without_the_ledger_is_told_what_to_do(
    run: Run, shop: dict[str, str]
) -> None:
    ran = run(
        "manage.py", "test", "--settings=shop.settings", "posters.tests.AsyncTests"
    )
    assert ran.returncode == 1
    assert "MeterlyUsageError: override_credits() works on the embedded" in ran.stderr
    assert "add 'django_meterly.ledger' to INSTALLED_APPS" in ran.stderr


def test_what_the_page_says_of_a_failure_is_said(
    run: Run, shop: dict[str, str], tmp_path: Path
) -> None:
    with (tmp_path / "posters/tests.py").open("a") as file:
        file.write(
            "\n\nclass FailingTests(PosterTests):\n"
            "    def test_it(self):\n"
            "        with override_credits(self.user, image_credits=100):\n"
            "            with assert_charged(self.user, 25):\n"
            "                self.client.post('/posters/')\n"
        )
    ran = run("manage.py", "test", "posters.tests.FailingTests.test_it")
    (said,) = re.findall(r"^```text\n(.*?)^```", PAGE, re.S | re.M)

    def same(text: str) -> str:
        return re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", text)

    assert same(said) in same(ran.stderr)


def test_books_that_are_left_open_fail_a_test_that_asks(
    run: Run, shop: dict[str, str], tmp_path: Path
) -> None:
    write(
        tmp_path,
        {
            "test_open.py": """
from django_meterly import get_client, guard
from django_meterly.conf import meterly_settings

def test_open(meterly_books, meterly_credits):
    meterly_credits("user_1", image_credits=5)
    guard("user_1", 5).lifecycle.reserve()

def test_closed(meterly_books, meterly_credits):
    meterly_credits("user_1", image_credits=5)
    with guard("user_1", 5):
        pass

def test_settings(settings, meterly_faults):
    settings.METERLY = {**settings.METERLY, "ENFORCEMENT": "shadow"}
    assert "Faulty" in meterly_settings.TRANSPORT.__name__

def test_after_it():
    assert meterly_settings.TRANSPORT.__name__ == "LedgerTransport"
    assert meterly_settings.ENFORCEMENT == "enforce"
"""
        },
    )
    ran = run("-m", "pytest", "-q", "-p", "no:randomly", "test_open.py")
    assert "4 passed, 1 error" in ran.stdout, ran.stdout + ran.stderr
    assert "is still open: end its work, or let it lapse by sweep()" in ran.stdout


NO_DJANGO = """
import sys

def test_nothing_is_loaded():
    assert "django_meterly.pytest_plugin" in sys.modules
    loaded = {name.split(".")[0] for name in sys.modules}
    assert not {"django", "celery", "requests", "rest_framework"} & loaded

def test_a_fixture(meterly_credits):
    pass
"""


def test_the_plugin_is_nothing_to_a_project_without_django(
    run: Run, tmp_path: Path
) -> None:
    write(tmp_path, {"test_it.py": NO_DJANGO})
    options = ["-p", "no:django", "-p", "no:xdist", "-W", "error", "-q"]
    ran = run("-m", "pytest", *options)
    assert "1 passed, 1 error" in ran.stdout, ran.stdout + ran.stderr
    # Without pytest-django there is no database to give credits in.
    assert "fixture 'db' not found" in ran.stdout


def test_the_plugin_is_nothing_to_a_project_without_the_app(
    run: Run, tmp_path: Path
) -> None:
    write(
        tmp_path,
        {
            "conftest.py": "",
            "plain.py": """
SECRET_KEY = "secret"
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
""",
            "test_it.py": """
def test_it(db, django_user_model):
    assert not django_user_model.objects.exists()
""",
        },
    )
    options = [
        "-p",
        "no:xdist",
        "-W",
        "error",
        "-q",
        "--ds=plain",
        "-o",
        "pythonpath=.",
    ]
    ran = run("-m", "pytest", *options)
    assert "1 passed" in ran.stdout, ran.stdout + ran.stderr
