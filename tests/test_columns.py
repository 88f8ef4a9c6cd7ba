"""Processes of the version before go on while a column is added."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from django.apps import apps
from django.core.management import call_command
from django.db import connection

from django_meterly import get_client, guard
from django_meterly.ledger import expiry
from django_meterly.testing import assert_books_balance, sweep
from tests.books import balance, fund_by_grant, states

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.contrib.auth.models import User
    from django.test import Client

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.database]

TABLES = [
    model._meta.db_table
    for app in ("meterly", "meterly_ledger")
    for model in apps.get_app_config(app).get_models()
]


@pytest.fixture(params=[False, True], ids=["plain", "prepared"])
def prepared(request: pytest.FixtureRequest) -> Iterator[None]:
    """Statements as they are, and prepared as docs/performance.md recommends."""
    before = connection.settings_dict["OPTIONS"]
    if request.param and connection.vendor == "postgresql":
        connection.close()
        connection.settings_dict["OPTIONS"] = {
            **before,
            "server_side_binding": True,
            "prepare_threshold": 0,
        }
    yield
    connection.close()
    connection.settings_dict["OPTIONS"] = before


def everything(user: User, client: Client) -> None:
    """Do what moves credits, and look at the books."""
    customer = fund_by_grant(user)
    with guard(user, 4):
        pass
    with guard(user, 4, idempotency_key=f"key-{len(states())}"):
        pass
    guard(user, 4).lifecycle.reserve()
    sweep()
    assert client.post("/paid/", {"trace": f"trace-{len(states())}"}).status_code == 200
    get_client().list_entries(str(customer.customer_id))
    expiry.expire_due()
    call_command("meterly_ledger_seal", verbosity=0)
    assert_books_balance()


def add_columns(added: list[str]) -> None:
    try:
        with connection.cursor() as cursor:
            for table in TABLES:
                cursor.execute(f"ALTER TABLE {table} ADD COLUMN added int DEFAULT 1")
                added.append(table)
    finally:
        connection.close()


@pytest.fixture
def added() -> Iterator[list[str]]:
    """Tables with a column more; taken away afterwards."""
    tables: list[str] = []
    yield tables
    with connection.cursor() as cursor:
        for table in tables:
            cursor.execute(f"ALTER TABLE {table} DROP COLUMN added")


def test_f63_a_column_that_is_added_breaks_no_old_process(
    prepared: None, client: Client, user: User, joined: None, added: list[str]
) -> None:
    client.force_login(user)
    # Every plan is kept, also those of PL/pgSQL, which come with the sixth call.
    for _ in range(7):
        everything(user, client)
    # By somebody else: a driver forgets what it has prepared when it changes a table.
    with ThreadPoolExecutor(1) as somebody:
        somebody.submit(add_columns, added).result()
    everything(user, client)
    customer = fund_by_grant(user)
    assert balance(customer)[1] == 0
