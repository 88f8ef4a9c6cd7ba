"""Projects whose settings are wrong or unusual, each in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.children import ROOT
from tests.test_conf import PLATFORMS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LEDGER = "django_meterly.ledger.transport.LedgerTransport"
#: How the messages end that say what to do.
ADD_LEDGER = "Add 'django_meterly.ledger' to INSTALLED_APPS and run migrate."
ADD_METERLY = "Add 'django_meterly' to INSTALLED_APPS and run migrate."
#: Apps that every project of these tests has.
DJANGO = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "rest_framework",
    "studio",
]

SETTINGS = """
SECRET_KEY = "not a secret"
DEBUG = False
ALLOWED_HOSTS = ["*"]
USE_TZ = True
ROOT_URLCONF = "urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3"}}
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [{
    "BACKEND": "django.template.backends.django.DjangoTemplates",
    "APP_DIRS": True,
    "OPTIONS": {"context_processors": [
        "django.template.context_processors.request",
        "django.contrib.auth.context_processors.auth",
        "django.contrib.messages.context_processors.messages",
    ]},
}]
"""
MODELS = """
from django.db import models

class Team(models.Model):
    name = models.CharField(max_length=50)
"""
URLS = """
from django.contrib import admin
from django.http import HttpResponse
from django.urls import path
from django_meterly import meterly_guard

@meterly_guard("tokens", 1, customer=lambda request: "user_1")
def work(request):
    return HttpResponse("done")

urlpatterns = [path("paid/", work), path("admin/", admin.site.urls)]
"""
#: A request, as a server makes it: without any check before.
REQUEST = """
import django
from django.test import Client
django.setup()
response = Client(raise_request_exception=True).post("/paid/")
print(response.status_code, response.content)
"""


class Project:
    """A project in a folder, and its processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "studio").mkdir()
        (folder / "studio" / "__init__.py").touch()
        (folder / "studio" / "models.py").write_text(MODELS)
        (folder / "urls.py").write_text(URLS)

    def configure(self, apps: list[str], **options: Any) -> None:
        lines = [SETTINGS, f"INSTALLED_APPS = {apps!r}"]
        lines += [f"{name} = {value!r}" for name, value in options.items()]
        (self.folder / "settings.py").write_text("\n".join(lines))

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={
                **{k: v for k, v in os.environ.items() if "METERLY" not in k},
                **env,
                "DJANGO_SETTINGS_MODULE": "settings",
                "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}",
            },
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def manage(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "django", *arguments, **env)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def complains(done: subprocess.CompletedProcess[str], *texts: str) -> bool:
    """Whether a process has failed with all *texts* and without a traceback."""
    assert done.returncode != 0, done.stdout
    for text in texts:
        assert text in done.stderr
    assert "Traceback" not in done.stderr
    return True


def ends_with(done: subprocess.CompletedProcess[str], text: str) -> bool:
    """Whether a process has failed with an exception whose message ends in *text*."""
    assert done.returncode != 0, done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("django.core.exceptions.ImproperlyConfigured: ")
    assert last.endswith(text)
    return True


COMMANDS: list[Any] = [
    ["check"],
    ["check", "--database", "default"],
    ["migrate"],
    ["runserver", "--noreload", "127.0.0.1:0"],
    ["meterly_settle"],
    ["makemigrations", "--check", "studio"],
]


@pytest.mark.sample(1)
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_transport_of_a_ledger_that_is_not_installed_is_e004(
    project: Project, command: list[str]
) -> None:
    project.configure([*DJANGO, "django_meterly"], METERLY={"TRANSPORT": LEDGER})
    assert complains(project.manage(*command), "meterly.E004", ADD_LEDGER)


IMPORTS = ("transport", "models", "admin", "tasks", "urls", "spending", "seals")


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "module",
    [
        *IMPORTS,
        *(f"management.commands.meterly_ledger_{n}" for n in ("seal", "apikey")),
    ],
)
def test_import_of_a_ledger_that_is_not_installed_names_the_remedy(
    project: Project, module: str
) -> None:
    project.configure([*DJANGO, "django_meterly"], METERLY={"TRANSPORT": LEDGER})
    code = f"import django; django.setup(); import django_meterly.ledger.{module}"
    assert ends_with(project.run("-c", code), ADD_LEDGER)


def test_request_without_the_ledgers_app_names_the_remedy(project: Project) -> None:
    project.configure([*DJANGO, "django_meterly"], METERLY={"TRANSPORT": LEDGER})
    assert project.manage("migrate", "--skip-checks").returncode == 0
    assert ends_with(project.run("-c", REQUEST), ADD_LEDGER)


@pytest.mark.parametrize("apps", [["django_meterly"], []], ids=["integration", "none"])
def test_urls_of_a_ledger_that_is_not_installed_name_the_remedy(
    project: Project, apps: list[str]
) -> None:
    project.configure([*DJANGO, *apps])
    (project.folder / "urls.py").write_text(
        "from django.urls import include, path\n"
        "urlpatterns = [path('', include('django_meterly.ledger.urls'))]\n"
    )
    assert ends_with(project.manage("check"), ADD_LEDGER)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "module", ["models", "admin", "forms", "grants", "journal", "guards", "mixins"]
)
@pytest.mark.parametrize(
    "apps", [[], ["django_meterly.ledger"]], ids=["none", "ledger"]
)
def test_import_of_an_integration_that_is_not_installed_names_the_remedy(
    project: Project, apps: list[str], module: str
) -> None:
    project.configure([*DJANGO, *apps])
    code = f"import django; django.setup(); import django_meterly.{module}"
    assert ends_with(project.run("-c", code), ADD_METERLY)


def test_request_without_the_integrations_app_names_the_remedy(
    project: Project,
) -> None:
    project.configure(DJANGO, METERLY={"API_KEY": "mk_test_x"})
    assert ends_with(project.run("-c", REQUEST), ADD_METERLY)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "apps",
    [
        ["django_meterly", "django_meterly.ledger", *DJANGO],
        ["django_meterly.ledger", *DJANGO, "django_meterly"],
        [
            *DJANGO,
            "django_meterly.ledger.apps.MeterlyLedgerConfig",
            "django_meterly.apps.MeterlyConfig",
        ],
    ],
    ids=["first", "ledger first", "configs"],
)
def test_apps_may_stand_in_any_order_and_by_their_configs(
    project: Project, apps: list[str]
) -> None:
    project.configure(apps, METERLY={"TRANSPORT": LEDGER})
    first = project.manage("migrate")
    assert first.returncode == 0, first.stderr
    # It says nothing of tables that it is about to make.
    assert "W014" not in first.stderr
    done = project.manage("check", "--database", "default", "--fail-level", "WARNING")
    assert done.returncode == 0, done.stderr
    done = project.run("-c", REQUEST)
    assert "402" in done.stdout, done.stderr


def test_ledger_is_a_project_without_the_integration(project: Project) -> None:
    project.configure(
        [*DJANGO[1:3], "rest_framework", "django_meterly.ledger"],
        MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
    )
    (project.folder / "urls.py").write_text(
        "from django.urls import include, path\n"
        "urlpatterns = [path('', include('django_meterly.ledger.urls'))]\n"
    )
    for command in (
        ["check", "--fail-level", "WARNING"],
        ["migrate"],
        ["check", "--database", "default", "--fail-level", "WARNING"],
        ["meterly_ledger_apikey", "create", "shop", "--scope", "spend"],
        ["meterly_ledger_expire"],
        ["meterly_ledger_verify"],
    ):
        done = project.manage(*command)
        assert done.returncode == 0, done.stderr
    health = (
        "from django.test import Client; print(Client().get('/health').status_code)"
    )
    done = project.run("-c", f"import django; django.setup(); {health}")
    assert done.stdout.strip() == "200", done.stderr


# METERLY, wrong in every way


WRONG = {
    "a list": ([], "meterly.E001", "METERLY must be a dict, not list."),
    "None": (None, "meterly.E001", "METERLY must be a dict, not NoneType."),
    "a name": (
        {"API_KEYS": "x"},
        "meterly.E002",
        "Unknown setting METERLY['API_KEYS'].",
    ),
    **{
        f"CUSTOMER_MODEL {value!r}": (
            {"API_KEY": "mk_test_x", "CUSTOMER_MODEL": value},
            "meterly.E003",
            "METERLY['CUSTOMER_MODEL']",
        )
        for value in (
            "studio.Taem",
            "studio",
            "Studio.team.x",
            "Studio.Team",
            "x.Team",
            5,
        )
    },
    "a duration": ({"DEADLINE": "8"}, "meterly.E003", "METERLY['DEADLINE']"),
    "a path": ({"EXTERNAL_ID": "no.such"}, "meterly.E004", "METERLY['EXTERNAL_ID']"),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_wrong_settings_are_an_error_of_a_check_in_every_command(
    project: Project, command: list[str], wrong: str
) -> None:
    value, check, text = WRONG[wrong]
    project.configure([*DJANGO, "django_meterly"], METERLY=value)
    assert complains(project.manage(*command), check, text)


@pytest.mark.sample(1)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_settings_end_a_first_request_and_a_migration_with_their_names(
    project: Project, wrong: str
) -> None:
    value, _, text = WRONG[wrong]
    project.configure([*DJANGO, "django_meterly"], METERLY=value)
    setup = project.run("-c", "import django; django.setup()")
    assert setup.returncode == 0, setup.stderr
    for done in (
        project.run("-c", REQUEST),
        *([project.manage("migrate", "--skip-checks")] if "CUST" in wrong else []),
    ):
        assert done.returncode != 0, done.stdout
        last = done.stderr.strip().splitlines()[-1]
        assert text.removesuffix(".") in last
        assert "ImproperlyConfigured" in last


def test_a_customer_model_gets_a_suggestion_by_the_check(project: Project) -> None:
    project.configure(
        [*DJANGO, "django_meterly"],
        METERLY={"API_KEY": "mk_test_x", "CUSTOMER_MODEL": "studio.Taem"},
    )
    assert complains(project.manage("check"), "Did you mean 'studio.Team'?")


# Tables that are missing


@pytest.mark.sample(1)
@pytest.mark.parametrize("app", ["django_meterly", "django_meterly.ledger"])
def test_missing_tables_are_warned_of_until_they_are_migrated(
    project: Project, app: str
) -> None:
    project.configure([*DJANGO, app], METERLY={"API_KEY": "mk_test_x"})
    (project.folder / "urls.py").write_text("urlpatterns = []")
    label = {"django_meterly": "meterly"}.get(app, "meterly_ledger")
    assert "W014" not in project.manage("check").stderr
    missing = project.manage("check", "--database", "default")
    assert missing.returncode == 0
    assert f"({label}.W014) The database 'default' lacks tables of {app}: " in (
        missing.stderr
    )
    assert "HINT: Run manage.py migrate." in missing.stderr
    first = project.manage("migrate")
    assert first.returncode == 0
    assert "W014" not in first.stdout + first.stderr
    assert "W014" not in project.manage("check", "--database", "default").stderr


@pytest.mark.slow("two databases and a router, in processes")
def test_missing_tables_are_looked_for_where_the_router_puts_them(
    project: Project,
) -> None:
    (project.folder / "router.py").write_text(
        "class Router:\n"
        "    def db_for_read(self, model, **hints):\n"
        "        label = model._meta.app_label\n"
        "        return 'credits' if label.startswith('meterly') else None\n"
        "    db_for_write = db_for_read\n"
        "    def allow_migrate(self, db, app_label, **hints):\n"
        "        return app_label.startswith('meterly') if db == 'credits' else (\n"
        "            None if not app_label.startswith('meterly') else False)\n"
    )
    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": "credits.sqlite3"}
    project.configure(
        [*DJANGO, "django_meterly", "django_meterly.ledger"],
        METERLY={"TRANSPORT": LEDGER},
        DATABASE_ROUTERS=["router.Router"],
        DATABASES={"default": {**database, "NAME": "db.sqlite3"}, "credits": database},
    )
    both = ["check", "--database", "default", "--database", "credits"]
    assert "W014" not in project.manage(*both[:3]).stderr
    said = project.manage(*both).stderr
    for label in ("meterly", "meterly_ledger"):
        assert f"({label}.W014) The database 'credits' lacks tables" in said
    assert said.count("HINT: Run manage.py migrate --database credits.") == 2
    for alias in ("default", "credits"):
        done = project.manage("migrate", "--database", alias)
        assert done.returncode == 0, done.stderr
    assert "W014" not in project.manage(*both).stderr


# The environment


@pytest.fixture
def container(project: Project) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return what runs ``check`` in an environment, with ``from_env``."""
    project.configure([*DJANGO, "django_meterly"])
    with (project.folder / "settings.py").open("a") as file:
        file.write(
            "\nimport environ\nfrom django_meterly.conf import from_env\n"
            "METERLY = from_env(environ.FileAwareEnv())\n"
        )
    return lambda **env: project.manage("check", "--fail-level", "WARNING", **env)


def test_f65_process_beside_a_service_called_meterly_starts(
    container: Any, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("mk_test_x\n")
    done = container(**PLATFORMS, METERLY_API_KEY_FILE=str(key))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"METERLY_BASE_ULR": "x"}, "METERLY. Did you mean 'BASE_URL'?"),
        ({"METERLY_DEADLINE": "5m"}, "must be a number, like 2.5, not '5m'."),
        (
            {"METERLY_API_KEY": "$mk_test_x"},
            r"With Env.escape_proxy = True, \$ is a $.",
        ),
    ],
)
def test_f65_process_with_a_wrong_variable_ends_with_its_name(
    container: Any, env: dict[str, str], message: str
) -> None:
    done = container(**env)
    assert ends_with(done, message)
    assert next(iter(env)) in done.stderr
    assert "mk_test_x" not in done.stderr.splitlines()[-1]


def test_f65_variable_of_ours_is_warned_of(container: Any) -> None:
    done = container(METERLY_API_KEY="mk_test_x", METERLY_URL="https://ledger.test")
    assert done.returncode != 0
    assert "(meterly.W013) The environment variable METERLY_URL names" in done.stderr
