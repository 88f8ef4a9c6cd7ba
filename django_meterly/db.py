"""What both apps need from every database alike: exact text, and one clock."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

from django.db import (
    DataError,
    Error,
    IntegrityError,
    NotSupportedError,
    ProgrammingError,
    models,
)
from django.db.models.functions import Now

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

#: PostgreSQL: the transaction has failed before.
ABORTED_STATE = "25P02"
#: A server, or a transaction, that only reads: PostgreSQL's state and MySQL's numbers.
READ_ONLY_STATE, READ_ONLY = "25006", {1290, 1792, 1836}


class ExactCharField(models.CharField):  # type: ignore[type-arg]
    """A ``CharField`` that compares by the byte on every database.

    MySQL's default collation takes ``Key-1`` for ``key-1``, and "é" for "e":
    ids and idempotency keys that differ must stay apart.
    """

    def db_type(self, connection: BaseDatabaseWrapper) -> str | None:
        column = super().db_type(connection)
        if column is not None and connection.vendor == "postgresql":
            # The same type, by the name under which Django adds no second index
            # to a unique column, for LIKE: every movement would pay for it.
            column = column.replace("varchar", "character varying", 1)
        return column

    def db_parameters(self, connection: BaseDatabaseWrapper) -> Any:
        parameters = super().db_parameters(connection)
        if connection.vendor == "mysql":
            parameters["collation"] = "utf8mb4_bin"
        return parameters


class DatabaseNow(Now):
    """The database's clock, in UTC.

    Django's ``Now`` is the session's local time on MySQL, while Django stores
    UTC there.
    """

    def as_mysql(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        return self.as_sql(compiler, connection, template="UTC_TIMESTAMP(6)", **extra)


def from_now(seconds: float) -> models.Expression:
    """Return the moment *seconds* from now by the database's clock."""
    return models.ExpressionWrapper(
        DatabaseNow() + dt.timedelta(seconds=seconds),
        output_field=models.DateTimeField(),
    )


def error_codes(exc: BaseException) -> tuple[Any, Any]:
    """Return PostgreSQL's SQLSTATE of *exc* and MySQL's number; ``None`` elsewhere."""
    cause = exc.__cause__
    sqlstate = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    arguments: tuple[Any, ...] = getattr(cause, "args", ())
    return sqlstate, next(iter(arguments), None)


def is_outage(exc: BaseException) -> bool:
    """Return whether *exc* says that a database cannot serve now.

    For example, it is out of reach, overloaded, full, read-only or shutting down, or it
    gave one transaction up for another. It is not an outage when the database refuses
    what it was asked: a constraint, a table that is missing, a value out of range.
    """
    return (
        isinstance(exc, Error)
        and not isinstance(
            exc, DataError | IntegrityError | NotSupportedError | ProgrammingError
        )
        and error_codes(exc)[0] != ABORTED_STATE
    )


def is_read_only(exc: BaseException) -> bool:
    """Return whether *exc* says that the server only reads: after a failover, say."""
    sqlstate, number = error_codes(exc)
    return sqlstate == READ_ONLY_STATE or number in READ_ONLY


def reconnect(connection: BaseDatabaseWrapper) -> None:
    """Close a dead connection, so that the next query opens one that works.

    A pool that checks no connection (``CONN_HEALTH_CHECKS``) may be full of dead ones.
    Each of them would be the next.
    """
    connection.close()
    pool = getattr(connection, "pool", None)
    if pool is not None:
        pool.check()
