"""What SQLite alone does, whatever database the other tests run on."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from tests.ledger.spender import run, start_spender


@pytest.fixture
def sqlite(tmp_path):
    """The environment of a process with a SQLite file and 1000 credits in it."""
    environment = {"DATABASE_URL": f"sqlite:///{tmp_path}/test_meterly.sqlite3"}
    script = """
import django
django.setup()
from django.core.management import call_command
from django_meterly.ledger import customers, grants
call_command("migrate", verbosity=0)
grants.grant(
    customers.ensure_workspace("acme").pk, external_id="user_1", amount=1000,
    credit_unit="credits", reference="opening", idempotency_key="opening",
)
"""
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={**os.environ, **environment}
    )
    return environment


@pytest.mark.slow("1200 attempts to spend by 8 threads")
def test_f40_8_threads_on_sqlite_never_see_a_locked_database(sqlite):
    # Django's own defaults: five seconds, a lock taken with the first write, and a
    # wait for the disk with each.
    spender = start_spender(
        "user_1",
        threads=8,
        attempts=150,
        options={"timeout": 5, "init_command": ""},
        environment=sqlite,
    )
    assert run([spender]) == [(1000, 200)]


def test_f40_a_locked_sqlite_database_is_tried_again(sqlite):
    spender = start_spender(
        "user_1", attempts=1, options={"timeout": 0.01}, environment=sqlite
    )
    somebody = sqlite3.connect(
        sqlite["DATABASE_URL"].removeprefix("sqlite:///"), check_same_thread=False
    )
    assert spender.stdout is not None
    # Only now: the spender reads while it starts.
    somebody.isolation_level = None
    release = threading.Timer(1, somebody.rollback)
    started = time.monotonic()
    somebody.execute("BEGIN IMMEDIATE")
    release.start()

    counts = run([spender])

    assert time.monotonic() - started > 1
    assert counts == [(1, 0)]
    release.join()
    somebody.close()
