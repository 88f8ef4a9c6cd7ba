"""Triggers that refuse changes to entries, seals and key events.

They refuse each UPDATE, and each INSERT that would replace a row. ``append_only`` says
why. ``flush`` and ``TransactionTestCase`` empty whole tables and must go on working, so
DELETE is refused like this:

==========  =====================================================================
PostgreSQL  Every DELETE. Django empties tables by TRUNCATE, which fires no trigger
            on rows.
MySQL       Every DELETE while foreign keys are checked. Django empties tables
            without these checks.
SQLite      The DELETE of a row while an older one is left. Django deletes all rows,
            and SQLite begins with the oldest.
==========  =====================================================================

A change that gets past them is found by ``verification``. The migration creates the
triggers. Every ``migrate`` creates the missing ones, because Django loses them when it
alters a table on SQLite. If the role may not create triggers, ``migrate`` goes on, and
``checks`` and ``meterly_ledger_verify`` report the missing ones.

A migration that writes to existing rows calls ``drop_triggers`` first.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from django.db import DatabaseError, connections, router, transaction

from ..db import error_codes
from .append_only import APPEND_ONLY
from .models import ApiKeyEvent, Entry, Seal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models import Model

logger = logging.getLogger("django_meterly.ledger")

MODELS: tuple[type[Model], ...] = (Entry, Seal, ApiKeyEvent)
MESSAGE = APPEND_ONLY.replace("'", "''")

FUNCTION = "meterly_append_only"
# Django raises IntegrityError for it, on every database.
BODY = f"BEGIN RAISE EXCEPTION '{MESSAGE}' USING ERRCODE = '23000'; END"
SIGNAL = f"SIGNAL SQLSTATE '23000' SET MYSQL_ERRNO = 3819, MESSAGE_TEXT = '{MESSAGE}'"

#: PostgreSQL: insufficient privilege.
DENIED_STATE = "42501"
#: MySQL: access to database, command or table denied; SUPER needed, also because of
#: the binary log.
DENIED = {1044, 1142, 1227, 1419}


class Trigger(NamedTuple):
    name: str
    table: str
    sql: str
    #: The text that the database returns for the trigger, to compare with.
    definition: str


def triggers(connection: BaseDatabaseWrapper) -> Iterator[Trigger]:
    """Yield the triggers for the connection's database, if it is a supported one."""
    for model in MODELS:
        table = model._meta.db_table
        if connection.vendor == "postgresql":
            name = f"{table}_append_only"
            sql = (
                f"CREATE OR REPLACE TRIGGER {name} BEFORE UPDATE OR DELETE ON {table} "
                f"FOR EACH ROW EXECUTE FUNCTION {FUNCTION}()"
            )
            yield Trigger(name, table, sql, BODY)
        elif connection.vendor == "mysql":
            for event, body in (
                ("update", SIGNAL),
                ("delete", f"IF @@foreign_key_checks THEN {SIGNAL}; END IF"),
            ):
                name = f"{table}_no_{event}"
                sql = (
                    f"CREATE TRIGGER {name} BEFORE {event.upper()} ON {table} "
                    f"FOR EACH ROW {body}"
                )
                yield Trigger(name, table, sql, body)
        elif connection.vendor == "sqlite":
            pk = model._meta.pk.column
            taken = " OR ".join(
                " AND ".join(f"{column} = NEW.{column}" for column in columns)
                for columns in _unique(model)
            )
            for event, when in (
                ("update", "1"),
                ("delete", _exists(table, f"{pk} < OLD.{pk}")),
                # INSERT OR REPLACE deletes the old row without firing its trigger.
                ("insert", _exists(table, taken)),
            ):
                name = f"{table}_no_{event}"
                sql = (
                    f"CREATE TRIGGER {name} BEFORE {event.upper()} ON {table} "
                    f"WHEN {when} BEGIN SELECT RAISE(ABORT, '{MESSAGE}'); END"
                )
                yield Trigger(name, table, sql, sql)


def _exists(table: str, condition: str) -> str:
    return f"EXISTS (SELECT 1 FROM {table} WHERE {condition})"  # noqa: S608


def _unique(model: type[Model]) -> Iterator[list[str]]:
    """Return the columns of each unique key."""
    columns: dict[str, Any] = {}
    for field in model._meta.concrete_fields:
        columns[field.name] = field.column
        if field.unique:
            yield [columns[field.name]]
    for constraint in model._meta.total_unique_constraints:
        yield [columns[name] for name in constraint.fields]


_EXISTING = {
    "postgresql": (
        "SELECT t.tgname, p.prosrc FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid"
        " WHERE t.tgrelid = to_regclass(%s) AND t.tgenabled IN ('O', 'A')"
    ),
    "mysql": (
        "SELECT TRIGGER_NAME, ACTION_STATEMENT FROM information_schema.TRIGGERS"
        " WHERE EVENT_OBJECT_SCHEMA = DATABASE() AND EVENT_OBJECT_TABLE = %s"
    ),
    "sqlite": (
        "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = %s"
    ),
}


def missing(connection: BaseDatabaseWrapper) -> list[Trigger]:
    """Return the triggers that are missing, or that have another text.

    On MySQL a role without the privilege TRIGGER sees none.
    """
    found = set()
    with connection.cursor() as cursor:
        for model in MODELS:
            if connection.vendor in _EXISTING:
                cursor.execute(_EXISTING[connection.vendor], [model._meta.db_table])
                found |= {*cursor.fetchall()}
    return [
        trigger
        for trigger in triggers(connection)
        if (trigger.name, trigger.definition) not in found
    ]


def create_triggers(connection: BaseDatabaseWrapper) -> None:
    """Create the triggers that are missing, if the role may do that."""
    # On MySQL each statement commits, and would take a savepoint with it.
    undone = connection.features.can_rollback_ddl
    try:
        with (
            transaction.atomic(using=connection.alias) if undone else nullcontext(),
            connection.cursor() as cursor,
        ):
            lacking = missing(connection)
            if lacking and connection.vendor == "postgresql":
                cursor.execute(
                    f"CREATE OR REPLACE FUNCTION {FUNCTION}() RETURNS trigger "
                    f"LANGUAGE plpgsql AS $${BODY}$$",
                    None,
                )
            for trigger in lacking:
                if connection.vendor != "postgresql":
                    cursor.execute(f"DROP TRIGGER IF EXISTS {trigger.name}", None)
                cursor.execute(trigger.sql, None)
                if connection.vendor == "postgresql":
                    # Replacing a disabled trigger does not enable it.
                    cursor.execute(
                        f"ALTER TABLE {trigger.table} ENABLE TRIGGER {trigger.name}"
                    )
    except DatabaseError as exc:
        if not denied(exc):
            raise
        logger.warning("No triggers protect the ledger's entries: %s", exc)


def denied(exc: DatabaseError) -> bool:
    """Return whether the database refused for want of a privilege."""
    sqlstate, number = error_codes(exc)
    return sqlstate == DENIED_STATE or number in DENIED


def drop_triggers(connection: BaseDatabaseWrapper) -> None:
    """Drop the triggers, and PostgreSQL's function."""
    with connection.cursor() as cursor:
        for trigger in triggers(connection):
            on = f" ON {trigger.table}" if connection.vendor == "postgresql" else ""
            cursor.execute(f"DROP TRIGGER IF EXISTS {trigger.name}{on}", None)
        if connection.vendor == "postgresql":
            cursor.execute(f"DROP FUNCTION IF EXISTS {FUNCTION}()", None)


def create_triggers_after_migrate(using: str, **kwargs: object) -> None:
    """Receive ``post_migrate``."""
    connection = connections[using]
    if (
        router.allow_migrate_model(using, Entry)
        # The table is gone after "migrate meterly_ledger zero".
        and Entry._meta.db_table in connection.introspection.table_names()
    ):
        create_triggers(connection)
