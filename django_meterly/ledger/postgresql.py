"""The ledger's functions in PostgreSQL: a movement is one of them, one round trip.

Their text is ``sql/postgresql.sql``. A migration creates them, and every
``migrate`` again. Only ``operations`` calls them.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

from django.db import connections, router

from ..transports.base import Unclaimed

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

    from ..transports.base import Statement

#: For the tests, which run the portable path on PostgreSQL as well.
enabled = True


class Spent(NamedTuple):
    """What ``meterly_spend_1`` answers; *code* tells which of it is there."""

    code: str
    account_id: int = 0
    unit: str = ""
    balance: int = 0
    reserved: int = 0
    entry_id: str = ""
    created_at: str = ""
    hold_id: str = ""
    status: str = ""
    expires_at: str = ""


class Closed(NamedTuple):
    """What ``meterly_close_1`` answers; *code* tells which of it is there."""

    code: str
    customer_id: str = ""
    unit: str = ""
    balance: int = 0
    reserved: int = 0
    amount: int = 0
    reference: str = ""
    status: str = ""
    expires_at: str = ""


def serves(using: str) -> bool:
    """Return whether the functions are in the database *using*."""
    return enabled and connections[using].vendor == "postgresql"


def spend(
    using: str,
    workspace: int | str,
    key: str,
    fingerprint: str,
    customer_id: str,
    unit: str | None,
    amount: int,
    reference: str,
    description: str,
    entry_id: str,
    hold_id: str | None,
    ttl_seconds: int | None,
    *,
    statement: Statement | None = None,
) -> Spent:
    """Use or reserve credits, as one with *statement*."""
    arguments = (
        *_named(workspace),
        *(key, fingerprint, customer_id, unit, amount, reference, description),
        *(entry_id, hold_id, ttl_seconds),
    )
    return Spent(*_call(using, _SPEND, arguments, hold_id, statement))


def close(
    using: str,
    workspace: int | str,
    key: str,
    fingerprint: str,
    hold_id: str,
    status: str,
    charged: int | None,
    entry_id: str,
    *,
    statement: Statement | None = None,
) -> Closed:
    """Commit or release a hold, as one with *statement*."""
    arguments = (
        *_named(workspace),
        *(key, fingerprint, hold_id, status, charged, entry_id),
    )
    return Closed(*_call(using, _CLOSE, arguments, hold_id, statement))


_SPEND = f"SELECT meterly_spend_1({', '.join(['%s'] * 12)}) AS answer"
_CLOSE = f"SELECT meterly_close_1({', '.join(['%s'] * 8)}) AS answer"

# The claim's row is locked before anything is moved: nothing of WITH that is
# MATERIALIZED, and locks, is merged into what reads it.
_CLAIMING = (
    "WITH claim AS MATERIALIZED ({claim}), call AS MATERIALIZED ({call} FROM claim)"
)
_CALLING = "WITH call AS MATERIALIZED ({call})"
_WRITING = """, movement AS (
    SELECT %s AS reservation_id FROM call WHERE answer ->> 0 = 'moved'
), written AS ({sql}) SELECT answer FROM call"""


def _named(workspace: int | str) -> tuple[int | None, str | None]:
    return (None, workspace) if isinstance(workspace, str) else (workspace, None)


def _call(
    using: str,
    call: str,
    arguments: tuple[Any, ...],
    hold_id: str | None,
    statement: Statement | None,
) -> list[Any]:
    sql = call
    if statement is not None:
        sql = (_CLAIMING if statement.claim else _CALLING) + _WRITING
        sql = sql.format(claim=statement.claim, call=call, sql=statement.sql)
        arguments = (
            *statement.claim_parameters,
            *arguments,
            hold_id,
            *statement.parameters,
        )
    with connections[using].cursor() as cursor:
        cursor.execute(sql, arguments)
        row = cursor.fetchone()
    if row is None:
        raise Unclaimed
    answer: list[Any] = row[0]
    return answer


def create_functions(connection: BaseDatabaseWrapper) -> None:
    """Create the functions, or replace them; nothing on other databases."""
    if connection.vendor == "postgresql":
        path = resources.files(__package__) / "sql" / "postgresql.sql"
        with connection.cursor() as cursor:
            # Without parameters: a percent sign is a percent sign.
            cursor.execute(path.read_text("utf-8"), None)


def drop_functions(connection: BaseDatabaseWrapper) -> None:
    """Drop the functions; nothing on other databases."""
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute(
                "DROP FUNCTION IF EXISTS meterly_spend_1, meterly_close_1", None
            )


def create_functions_after_migrate(using: str, **kwargs: Any) -> None:
    """Receive ``post_migrate``: a database built without migrations needs them."""
    from .models import Account

    connection = connections[using]
    if (
        connection.vendor == "postgresql"
        and router.allow_migrate_model(using, Account)
        # Gone when the app has just been migrated back to nothing.
        and Account._meta.db_table in connection.introspection.table_names()
    ):
        create_functions(connection)
