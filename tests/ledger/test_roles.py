"""A role that must not create triggers, as on managed MySQL with a binary log."""

from __future__ import annotations

import subprocess
import sys

import pytest
from django.db import connection

from django_meterly.ledger import triggers
from tests.ledger.tampering import sql

# SQLite has no roles: conftest.py leaves this file out.
pytestmark = [pytest.mark.database, pytest.mark.django_db(transaction=True)]

PRIVILEGES = {
    "postgresql": (
        "CREATE ROLE meterly_app LOGIN",
        "GRANT ALL ON SCHEMA public TO meterly_app",
        "GRANT ALL ON ALL TABLES IN SCHEMA public TO meterly_app",
        "GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO meterly_app",
        "REVOKE TRIGGER ON meterly_ledger_entry, meterly_ledger_seal FROM meterly_app",
    ),
    "mysql": (
        "CREATE USER meterly_app@'%%'",
        "GRANT ALL ON `{database}`.* TO meterly_app@'%%'",
        "REVOKE TRIGGER ON `{database}`.* FROM meterly_app@'%%'",
    ),
}
DROPPING = {
    "postgresql": ("DROP OWNED BY meterly_app", "DROP ROLE meterly_app"),
    "mysql": ("DROP USER meterly_app@'%%'",),
}


def test_f52_a_role_that_must_not_create_triggers_migrates_nevertheless(
    workspace, customer
):
    database = connection.settings_dict["NAME"]
    triggers.drop_triggers(connection)
    try:
        for statement in PRIVILEGES[connection.vendor]:
            sql(statement.format(database=database))
        script = """
from django.conf import settings
settings.DATABASES["default"].update(USER="meterly_app", PASSWORD="")
import django
django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
call_command("check", databases=["default"])
call_command("meterly_ledger_verify")
"""
        done = subprocess.run(
            [sys.executable, "-c", script],
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "No triggers protect the ledger's entries" in done.stderr
        assert "meterly_ledger.W001" in done.stderr
        assert "does not refuse changes" in done.stderr
        assert "the books balance" in done.stdout
    finally:
        for statement in DROPPING[connection.vendor]:
            sql(statement)
        triggers.create_triggers(connection)
