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
from django.utils import timezone

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


class MomentField(models.DateTimeField):  # type: ignore[type-arg]
    """A ``DateTimeField`` that is kept in UTC, whatever the settings say.

    PostgreSQL keeps moments. The others keep what a clock shows, and Django takes that
    to be a clock of ``TIME_ZONE`` without ``USE_TZ``, or of the database's own
    ``TIME_ZONE``. Our columns are compared with ``DatabaseNow``, and a local clock is
    set back once a year: leases would last an hour longer.
    """

    def get_db_prep_value(
        self, value: Any, connection: Any, prepared: bool = False
    ) -> Any:
        if not prepared:
            value = self.get_prep_value(value)
        if isinstance(value, dt.datetime) and _keeps_readings(connection):
            # Django is about to write down what a clock in this zone shows.
            value = in_utc(value).replace(tzinfo=connection.timezone)
        return super().get_db_prep_value(value, connection, prepared=True)

    def get_db_converters(self, connection: Any) -> list[Any]:
        converters: list[Any] = super().get_db_converters(connection)
        return [*converters, _read] if _keeps_readings(connection) else converters


def _keeps_readings(connection: Any) -> bool:
    """Return whether Django and we disagree about what is kept there."""
    return (
        not connection.features.supports_timezones and connection.timezone is not dt.UTC
    )


def _read(value: dt.datetime | None, expression: Any, connection: Any) -> Any:
    if value is None:
        return None
    moment = value.replace(tzinfo=dt.UTC)
    if connection.timezone is not None:
        return moment
    return moment.astimezone(timezone.get_default_timezone()).replace(tzinfo=None)


def in_utc(value: dt.datetime) -> dt.datetime:
    """Return *value* in UTC; a naive time is one of ``TIME_ZONE``."""
    if value.tzinfo is None:
        value = value.replace(tzinfo=timezone.get_default_timezone())
    return value.astimezone(dt.UTC)


class DatabaseNow(Now):
    """The database's clock, in UTC.

    Django's ``Now`` is the session's local time on MySQL.
    """

    output_field = MomentField()

    def as_mysql(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        return self.as_sql(compiler, connection, template="UTC_TIMESTAMP(6)", **extra)


def from_now(seconds: float) -> models.Expression:
    """Return the moment *seconds* from now by the database's clock."""
    return models.ExpressionWrapper(
        DatabaseNow() + dt.timedelta(seconds=seconds),
        output_field=MomentField(),
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


def gave_way(exc: BaseException) -> bool:
    """Return whether *exc* ended a transaction that may be tried again."""
    sqlstate, number = error_codes(exc)
    if sqlstate in {"40001", "40P01"}:  # serialization failure, deadlock
        return True
    # The low byte is SQLite's primary code: 5 busy, 6 locked.
    if getattr(exc.__cause__, "sqlite_errorcode", 0) & 0xFF in {5, 6}:
        return True
    # MySQL: lock wait time-out, deadlock; MariaDB: row changed since the snapshot.
    return number in {1205, 1213, 1020}


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
