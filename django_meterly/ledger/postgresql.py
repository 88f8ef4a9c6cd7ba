"""The ledger's functions in PostgreSQL: a movement is one of them, one round trip.

Their text is ``sql/postgresql.sql``. A migration creates them, and every
``migrate`` again. Only ``operations`` calls them.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

from django.db import connections, router

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

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


def spend(using: str, workspace: int | str, *arguments: Any) -> Spent:
    """Use or reserve credits."""
    return Spent(*_call(using, _SPEND, workspace, arguments))


def close(using: str, workspace: int | str, *arguments: Any) -> Closed:
    """Commit or release a hold."""
    return Closed(*_call(using, _CLOSE, workspace, arguments))


_SPEND = f"SELECT meterly_spend_1({', '.join(['%s'] * 12)})"
_CLOSE = f"SELECT meterly_close_1({', '.join(['%s'] * 8)})"


def _call(
    using: str, statement: str, workspace: int | str, arguments: tuple[Any, ...]
) -> list[Any]:
    named = (None, workspace) if isinstance(workspace, str) else (workspace, None)
    with connections[using].cursor() as cursor:
        cursor.execute(statement, named + arguments)
        answer: list[Any] = cursor.fetchone()[0]
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
