"""``migrate``, and one story, in each way that a project may set its database up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from django.apps import apps
from django.conf import settings
from django.db import connection
from django.db.backends.postgresql.psycopg_any import IsolationLevel

from tests.children import PATIENCE, ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Deploy = Callable[..., None]

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.database]

#: docs/performance.md recommends these.
PREPARED = {"server_side_binding": True, "prepare_threshold": 0}
POSTGRESQL: dict[str, dict[str, Any]] = {
    "unprepared, bound by the server": {"OPTIONS": {"server_side_binding": True}},
    "prepared, bound by the client": {"OPTIONS": {"prepare_threshold": 0}},
    "a pool": {"OPTIONS": {"pool": True}},
    "a pool, prepared": {"OPTIONS": {"pool": {"min_size": 1}, **PREPARED}},
    "for a transaction pooler": {"DISABLE_SERVER_SIDE_CURSORS": True},
    "psycopg2": {"PSYCOPG2": True},
    "serializable": {"OPTIONS": {"isolation_level": IsolationLevel.SERIALIZABLE}},
    "serializable by the server": {
        "OPTIONS": {"options": "-c default_transaction_isolation=serializable"}
    },
    "an impatient server": {
        "OPTIONS": {
            "options": "-c idle_in_transaction_session_timeout=5000 "
            "-c lock_timeout=5000 -c statement_timeout=20000"
        }
    },
    "backslashes that escape": {
        "OPTIONS": {"options": "-c standard_conforming_strings=off"}
    },
    "a zone of the connection": {"TIME_ZONE": "Asia/Kolkata"},
}
MYSQL: dict[str, dict[str, Any]] = {
    "ANSI quotes": {
        "OPTIONS": {"init_command": "SET sql_mode='ANSI,STRICT_ALL_TABLES'"}
    },
    "no backslashes": {
        "OPTIONS": {"init_command": "SET sql_mode='TRADITIONAL,NO_BACKSLASH_ESCAPES'"}
    },
    "repeatable read": {"OPTIONS": {"isolation_level": "repeatable read"}},
    "serializable": {"OPTIONS": {"isolation_level": "serializable"}},
    "as the server has it": {"OPTIONS": {"isolation_level": None}},
}
SQLITE: dict[str, dict[str, Any]] = {
    "in memory": {"NAME": ":memory:"},
    "immediate": {"OPTIONS": {"transaction_mode": "IMMEDIATE"}},
    "exclusive": {"OPTIONS": {"transaction_mode": "EXCLUSIVE"}},
    "WAL": {
        "OPTIONS": {
            "transaction_mode": "IMMEDIATE",
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA recursive_triggers=ON",
        }
    },
    "a zone of the connection": {"TIME_ZONE": "Asia/Kolkata"},
}
VENDORS = {"postgresql": POSTGRESQL, "mysql": MYSQL, "sqlite": SQLITE}
UNMIGRATED = dict.fromkeys(config.label for config in apps.get_app_configs())
#: On every database.
PROJECTS: dict[str, dict[str, Any]] = {
    "ATOMIC_REQUESTS": {"ATOMIC_REQUESTS": True},
    "local times": {"SETTINGS": {"USE_TZ": False, "TIME_ZONE": "America/New_York"}},
    "no migrations": {
        "SETTINGS": {"MIGRATION_MODULES": UNMIGRATED},
        "COMMANDS": [["migrate", "--run-syncdb"]],
    },
    "back and forth": {
        "COMMANDS": [
            ["migrate"],
            ["migrate", "meterly", "zero"],
            ["migrate", "meterly_ledger", "zero"],
            ["migrate", "meterly_ledger"],
            ["migrate"],
        ]
    },
    "the journal first": {"COMMANDS": [["migrate", "meterly"], ["migrate"]]},
    "faked": {
        "COMMANDS": [
            ["migrate"],
            ["migrate", "--fake", "meterly_ledger", "zero"],
            ["migrate", "--fake-initial"],
            ["migrate", "--fake", "meterly_ledger", "zero"],
            ["migrate", "--fake"],
        ]
    },
    "looked at": {
        "COMMANDS": [
            ["migrate", "--plan"],
            *(["sqlmigrate", app, "0001"] for app in ("meterly", "meterly_ledger")),
            ["migrate"],
            ["sqlmigrate", "meterly_ledger", "0001", "--backwards"],
            ["inspectdb"],
            ["sqlflush"],
            ["sqlsequencereset", "meterly", "meterly_ledger"],
            ["flush", "--no-input"],
        ]
    },
}


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database, on the server that the suite uses."""
    url = urlsplit(os.environ["DATABASE_URL"])
    if connection.vendor == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.sqlite3'}"
        return
    name = f"{settings.DATABASES['default']['TEST']['NAME']}_empty"
    with connection._nodb_cursor() as cursor:
        cursor.execute(f"DROP DATABASE IF EXISTS {name}")
        cursor.execute(f"CREATE DATABASE {name}")
    yield url._replace(path=f"/{name}").geturl()
    with connection._nodb_cursor() as cursor:
        cursor.execute(f"DROP DATABASE {name}")


@pytest.fixture
def environment(empty: str) -> Callable[[dict[str, Any]], dict[str, str]]:
    """The environment of a process of the project."""

    def environment(deployment: dict[str, Any]) -> dict[str, str]:
        return {
            **os.environ,
            "DATABASE_URL": empty,
            "DEPLOYMENT": json.dumps(deployment),
            "DJANGO_SETTINGS_MODULE": "tests.deployment",
        }

    return environment


@pytest.fixture
def deploy(environment: Any) -> Deploy:
    """Let a project with an empty database of its own tell its story."""

    def deploy(**deployment: Any) -> None:
        child = subprocess.run(
            [sys.executable, "-m", "tests.deployment"],
            cwd=ROOT,
            env=environment(deployment),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert child.returncode == 0, child.stdout + child.stderr

    return deploy


def in_the_database(empty: str, *statements: str) -> None:
    """Execute *statements* in the *empty* database of PostgreSQL."""
    from psycopg import connect

    with connect(empty.replace("postgres:", "postgresql:"), autocommit=True) as opened:
        for statement in statements:
            opened.execute(statement)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", PROJECTS)
def test_f63_migrate_as_a_project_runs_it(deploy: Deploy, name: str) -> None:
    deploy(**PROJECTS[name])


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", VENDORS[connection.vendor])
def test_f63_migrate_with_the_options_of(deploy: Deploy, name: str) -> None:
    if "psycopg2" in name:
        pytest.importorskip("psycopg2")
    deploy(**VENDORS[connection.vendor][name])


if connection.vendor == "postgresql":

    def test_f63_migrate_with_the_options_that_we_recommend(deploy: Deploy) -> None:
        deploy(OPTIONS=PREPARED)

    @pytest.fixture
    def role() -> Iterator[str]:
        """A role that may log in, and nothing else."""
        name = f"meterly_plain_{os.getpid()}"
        with connection._nodb_cursor() as cursor:
            cursor.execute(f"CREATE ROLE {name} LOGIN")
        yield name
        with connection._nodb_cursor() as cursor:
            cursor.execute(f"DROP ROLE {name}")

    @pytest.mark.parametrize("options", [{}, PREPARED], ids=["plain", "prepared"])
    @pytest.mark.parametrize("where", ["database", "schema", "assumed"])
    @pytest.mark.slow("each is a process")
    def test_f63_migrate_as_a_role_with_few_rights(
        role: str, deploy: Deploy, empty: str, where: str, options: dict[str, Any]
    ) -> None:
        options = {**options, "assume_role": role}
        if where == "schema":
            in_the_database(
                empty,
                "REVOKE ALL ON SCHEMA public FROM PUBLIC",
                f'CREATE SCHEMA "Of One" AUTHORIZATION {role}',
            )
            options["options"] = '-c search_path="Of\\ One"'
        else:
            name = urlsplit(empty).path[1:]
            in_the_database(empty, f"ALTER DATABASE {name} OWNER TO {role}")
        if where != "assumed":
            options.pop("assume_role")
            deploy(OPTIONS=options, USER=role)
        else:
            deploy(OPTIONS=options)

    @pytest.mark.slow("two processes, one after the other")
    def test_f63_migrate_one_schema_after_the_other(deploy: Deploy, empty: str) -> None:
        in_the_database(empty, "CREATE SCHEMA one", "CREATE SCHEMA two")
        for schema in ("one", "two"):
            deploy(OPTIONS={"options": f"-c search_path={schema},public"})
