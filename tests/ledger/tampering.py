"""What somebody with a database shell can do to the books."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.db import connection, transaction

from django_meterly.ledger import triggers, verification
from django_meterly.ledger.models import Entry

if TYPE_CHECKING:
    from collections.abc import Iterator

MODELS = list(apps.get_app_config("meterly_ledger").get_models())


@contextmanager
def unguarded() -> Iterator[None]:
    """Open the database to every change: no triggers, no constraints but unique keys.

    In a test with ``transaction=True``.
    """
    with connection.cursor() as cursor:
        if connection.vendor == "sqlite":
            cursor.execute("PRAGMA foreign_keys = OFF")
            cursor.execute("PRAGMA ignore_check_constraints = ON")
        elif connection.vendor == "mysql":
            cursor.execute("SET foreign_key_checks = 0, check_constraint_checks = 0")
    triggers.drop_triggers(connection)
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            if connection.vendor == "sqlite":
                cursor.execute("PRAGMA foreign_keys = ON")
                cursor.execute("PRAGMA ignore_check_constraints = OFF")
            elif connection.vendor == "mysql":
                cursor.execute(
                    "SET foreign_key_checks = 1, check_constraint_checks = 1"
                )
        triggers.create_triggers(connection)


@contextmanager
def undone() -> Iterator[None]:
    """Take back what is done in here. Inside ``unguarded()``."""
    with transaction.atomic():
        if connection.vendor == "postgresql":
            _drop_constraints()
        yield
        transaction.set_rollback(True)


def _drop_constraints() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL session_replication_role = replica")
        for model in MODELS:
            table = model._meta.db_table
            cursor.execute(
                "SELECT conname FROM pg_constraint "
                "WHERE conrelid = %s::regclass AND contype = 'c'",
                [table],
            )
            for (name,) in cursor.fetchall():
                cursor.execute(f'ALTER TABLE {table} DROP CONSTRAINT "{name}"')


def found(*kept: str) -> list[tuple[str, str]]:
    """Return the rows and columns where something is wrong."""
    return [
        (difference.row, difference.column)
        for difference in verification.differences(kept)
    ]


def sql(text: str, *parameters: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(text, parameters)


def forge(pk: int) -> None:
    """Write an entry that changes nothing, with this primary key."""
    row: Any = Entry.objects.order_by("pk").values().first()
    row |= {"id": pk, "public_id": "ent_forged", "idempotency_key": "f"}
    row |= {"reference": "f", "unique_reference": "f"}
    columns = ", ".join(row)
    places = ", ".join(["%s"] * len(row))
    sql(
        f"INSERT INTO meterly_ledger_entry ({columns}) VALUES ({places})", *row.values()
    )
