"""Movements by the ledger's functions in PostgreSQL, each in one round trip.

The text of the functions is ``sql/postgresql.sql``. The migration creates them, and
every ``migrate`` replaces them. ``portable`` has the same movements for every database;
see ``movements``.
"""

from __future__ import annotations

import datetime as dt
from importlib import resources
from typing import TYPE_CHECKING, Any

from django.db import DatabaseError, connections, router, transaction
from django.db.migrations.loader import MigrationLoader

from ..transports.base import NothingFound
from . import constraints
from .movements import UNKNOWN, Closed, Closing, Spending, Spent

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

    from ..transports.base import Statement

#: For the tests, which run the portable path on PostgreSQL as well.
enabled = True


def serves(using: str) -> bool:
    """Return whether the functions are in the database *using*."""
    return enabled and connections[using].vendor == "postgresql"


def spend(using: str, spending: Spending, statement: Statement | None = None) -> Spent:
    """Use or reserve credits; with a *statement*, reserve them in one statement."""
    if statement is None:
        answer = _call(using, _SPEND, (*_named(spending.workspace), *spending[1:]))
    else:
        asked = spending.fingerprint.split(UNKNOWN, 2)
        arguments = (
            *_named(spending.workspace),
            spending.idempotency_key,
            *asked,
            *spending[4:],
        )
        answer = _call_with(using, _RESERVE, arguments, spending.hold_id, statement)
    row = Spent(*answer)
    return row._replace(
        created_at=_time(row.created_at),
        expires_at=_time(row.expires_at),
        customer_id=None if statement is None else statement.found[0],
    )


def close(using: str, closing: Closing, statement: Statement | None = None) -> Closed:
    """Commit or release a hold, in one statement with *statement*."""
    arguments = (*_named(closing.workspace), *closing[1:])
    if statement is None:
        answer = _call(using, _CLOSE, arguments)
    else:
        answer = _call_with(using, _CLOSE, arguments, closing.hold_id, statement)
    row = Closed(*answer)
    return row._replace(expires_at=_time(row.expires_at))


_SPEND = f"SELECT meterly_spend_1({', '.join(['%s'] * 12)}) AS answer"
_CLOSE = f"SELECT meterly_close_1({', '.join(['%s'] * 8)}) AS answer"
# _SPEND for the customer that the statement's source finds. The source also completes
# the key and the text of the call, whose digest is the fingerprint (see UNKNOWN).
_RESERVE = (
    "SELECT meterly_spend_1(%s, %s, source.scope || %s, encode(sha256(convert_to("
    "%s || source.scope || %s || source.payer_id || %s, 'UTF8')), 'hex'), "
    f"source.payer_id, {', '.join(['%s'] * 7)}) AS answer"
)

# MATERIALIZED keeps PostgreSQL from merging the parts: the source is read, and locked,
# before anything is moved.
_WITH = """WITH source AS MATERIALIZED ({source}),
call AS MATERIALIZED ({call} FROM source),
movement AS (SELECT %s AS reservation_id FROM call WHERE answer ->> 0 = 'moved'),
written AS ({sql})
SELECT call.answer, source.* FROM call, source"""


def _named(workspace: int | str) -> tuple[int | None, str | None]:
    return (None, workspace) if isinstance(workspace, str) else (workspace, None)


def _call(using: str, call: str, arguments: tuple[Any, ...]) -> list[Any]:
    with connections[using].cursor() as cursor:
        cursor.execute(call, arguments)
        [answer] = cursor.fetchone()
    return list(answer)


def _call_with(
    using: str,
    call: str,
    arguments: tuple[Any, ...],
    hold_id: str | None,
    statement: Statement,
) -> list[Any]:
    sql = _WITH.format(source=statement.source, call=call, sql=statement.sql)
    parameters = (
        *statement.source_parameters,
        *arguments,
        hold_id,
        *statement.parameters,
    )
    with connections[using].cursor() as cursor:
        cursor.execute(sql, parameters)
        row = cursor.fetchone()
    if row is None:
        raise NothingFound
    answer, *statement.found[:] = row
    return list(answer)


def _time(text: Any) -> dt.datetime | None:
    """Return the time in an answer, which is JSON."""
    return None if text is None else dt.datetime.fromisoformat(text)


_CREATE = "CREATE OR REPLACE FUNCTION "


def create_functions(connection: BaseDatabaseWrapper) -> None:
    """Create or replace the functions; do nothing on other databases.

    In a transaction: until it ends, no other process does so.
    """
    if connection.vendor == "postgresql":
        path = resources.files(__package__) / "sql" / "postgresql.sql"
        _, *functions = path.read_text("utf-8").split(_CREATE)
        with connection.cursor() as cursor:
            # Containers that start at once each run migrate, and PostgreSQL refuses to
            # replace a function twice at a time.
            cursor.execute("SELECT pg_advisory_xact_lock(hashtext('meterly_ledger'))")
            for function in functions:
                # One at a time: no text with several statements can be prepared.
                # Without parameters: a percent sign is a percent sign.
                cursor.execute(_CREATE + function, None)
        constraints.create_shape_function(connection)


def drop_functions(connection: BaseDatabaseWrapper) -> None:
    """Drop the functions; do nothing on other databases."""
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute(
                "DROP FUNCTION IF EXISTS meterly_spend_1, meterly_close_1", None
            )


def create_functions_before_migrate(using: str, **kwargs: Any) -> None:
    """Receive ``pre_migrate``: tables that no migration makes need a function."""
    from .models import Account

    connection = connections[using]
    module, _ = MigrationLoader.migrations_module(Account._meta.app_label)
    if (
        connection.vendor == "postgresql"
        and module is None
        and router.allow_migrate_model(using, Account)
        and Account._meta.db_table not in connection.introspection.table_names()
    ):
        constraints.create_shape_function(connection)


def create_functions_after_migrate(using: str, **kwargs: Any) -> None:
    """Receive ``post_migrate``: a database built without migrations needs them."""
    from .models import Account
    from .triggers import denied

    connection = connections[using]
    if (
        connection.vendor == "postgresql"
        and router.allow_migrate_model(using, Account)
        # Gone when the app has just been migrated back to nothing.
        and Account._meta.db_table in connection.introspection.table_names()
    ):
        try:
            with transaction.atomic(using=using):
                create_functions(connection)
        except DatabaseError as exc:
            # Only their owner may replace them.
            if not denied(exc) or not _are_there(connection):
                raise


def _are_there(connection: BaseDatabaseWrapper) -> bool:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(DISTINCT proname) FROM pg_proc WHERE pg_function_is_visible"
            "(oid) AND proname IN ('meterly_spend_1', 'meterly_close_1')"
        )
        return bool(cursor.fetchone()[0] == 2)
