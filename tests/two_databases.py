"""A project whose ledger has a database of its own: its settings, and its story.

``python -m tests.two_databases FOLDER`` makes both databases there and ends with 0
if everything went as it should.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

if __name__ != "__main__":
    from tests.settings import *  # noqa: F403
    from tests.settings import DATABASES

    folder = Path(sys.argv[1])
    for alias in ("default", "ledger"):
        DATABASES[alias] = {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": folder / f"{alias}.sqlite3",
            "ATOMIC_REQUESTS": True,
            "OPTIONS": {
                "timeout": 20,
                "transaction_mode": "IMMEDIATE",
                # No process is killed here.
                "init_command": "PRAGMA synchronous = OFF",
            },
        }
    DATABASE_ROUTERS = ["tests.two_databases.Router"]


class Router:
    """The ledger's tables are in ``ledger``, everything else in ``default``."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "ledger" if model._meta.app_label == "meterly_ledger" else "default"

    db_for_write = db_for_read

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool:
        return db == ("ledger" if app_label == "meterly_ledger" else "default")


def main() -> None:
    """Tell the story; an ``AssertionError`` is what went wrong."""
    import os

    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.two_databases"
    import django

    django.setup()

    from django.contrib.auth.models import Group, User
    from django.core.management import call_command
    from django.db import IntegrityError, connections, transaction
    from django.test import Client

    from django_meterly import MeterlyUsageError, guard
    from django_meterly.testing import assert_books_balance
    from tests import views
    from tests.books import balance, fund, states

    for alias in ("default", "ledger"):
        call_command("migrate", database=alias, verbosity=0)
    tables = connections["default"].introspection.table_names()
    assert not [name for name in tables if name.startswith("meterly_ledger")]

    user = User.objects.create_user("alice")
    customer = fund(user)

    # An open transaction on either would take something along in its rollback.
    for alias in ("default", "ledger"):
        refused = pytest.raises(MeterlyUsageError, match=repr(alias))
        with transaction.atomic(using=alias), refused:
            guard(user, 25).lifecycle.reserve()
    assert states() == []

    with guard(user, 10) as work:
        work.charge(4)
    assert (states(), balance(customer)) == (["committed"], (96, 0))

    # A view's transactions, on both: what it did and its charge stand or fall.
    client = Client()
    client.force_login(user)
    assert client.post("/paid/").status_code == 200
    assert (states()[1:], balance(customer)) == (["committed"], (71, 0))
    with pytest.raises(views.Boom):
        client.post("/raises/", {"kind": "boom", "trace": "rolled back"})
    assert (states()[2:], balance(customer)) == (["released"], (71, 0))
    assert Group.objects.count() == 1
    with pytest.raises(IntegrityError):
        client.post("/breaks_at_commit/")
    assert (states()[3:], balance(customer)) == (["released"], (71, 0))
    assert_books_balance()


if __name__ == "__main__":
    main()
