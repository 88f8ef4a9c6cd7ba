"""What both apps need from every database alike: exact text, and one clock."""

from __future__ import annotations

import datetime as dt
import logging
import random
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from django.apps import apps
from django.core.checks import CheckMessage
from django.core.checks import Warning as CheckWarning
from django.db import (
    DatabaseError,
    DataError,
    Error,
    IntegrityError,
    NotSupportedError,
    ProgrammingError,
    connections,
    models,
    router,
    transaction,
)
from django.db.models.functions import Now
from django.utils import timezone

from .errors import MeterlyUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models import QuerySet

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: How long a sweeper waits for a row that somebody has locked.
LOCK_SECONDS = 5
#: How long a query is tried again after the database rolled it back in favour of
#: another one (a deadlock, for example).
GIVE_WAY_SECONDS = 2.0

#: PostgreSQL: the transaction has failed before.
ABORTED_STATE = "25P02"
#: PostgreSQL: serialization failure, deadlock.
GAVE_WAY_STATES = {"40001", "40P01"}
#: MySQL: lock wait time-out, deadlock; MariaDB: row changed since the snapshot.
GAVE_WAY = {1205, 1213, 1020}
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


def causes(
    exc: BaseException | None, handled: BaseException | None
) -> Iterator[Exception]:
    """Yield *exc* and what it comes from, the last first.

    The error may have been reported as another one, or have broken the transaction that
    was to record it. An exception that was *handled* before is the caller's: it and
    what is behind it are left out.
    """
    while isinstance(exc, Exception) and exc is not handled:
        yield exc
        exc = exc.__cause__ or exc.__context__


def missing_tables(label: str, databases: Collection[str]) -> list[CheckMessage]:
    """Return warnings about tables of the app *label* that *databases* lack.

    No error: commands of other packages that migrate run the checks first, too.
    """
    if sys.argv[1:2] == ["migrate"]:
        # It runs the checks, and then makes the tables.
        return []
    config = apps.get_app_config(label)
    expected: dict[str, set[str]] = defaultdict(set)
    for model in config.get_models():
        expected[router.db_for_write(model)].add(model._meta.db_table)
    found: list[CheckMessage] = []
    for using in sorted(expected.keys() & set(databases)):
        try:
            present = connections[using].introspection.table_names()
        except Error:
            # A database out of reach: not for this check.
            continue
        if missing := sorted(expected[using].difference(present)):
            option = "" if using == "default" else f" --database {using}"
            found.append(
                CheckWarning(
                    f"The database {using!r} lacks tables of {config.name}: "
                    f"{', '.join(missing)}.",
                    hint=f"Run manage.py migrate{option}.",
                    id=f"{label}.W014",
                )
            )
    return found


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
    if sqlstate in GAVE_WAY_STATES or number in GAVE_WAY:
        return True
    # The low byte is SQLite's primary code: 5 busy, 6 locked.
    return getattr(exc.__cause__, "sqlite_errorcode", 0) & 0xFF in {5, 6}


def refuses_rows(using: str, exc: Exception) -> bool:
    """Return whether *exc* may be about some rows, and not about all of *using*.

    It is about all of them if the connection is lost, or if SQLite is locked.
    """
    connection = connections[using]
    if connection.vendor == "sqlite" and gave_way(exc):
        return False
    return connection.connection is not None and connection.is_usable()


def was_locked(exc: BaseException, handled: BaseException | None) -> bool:
    """Return whether *exc* comes from somebody who is at the same row.

    It was locked for too long, or the transaction had to give way to another. Not on
    SQLite, which locks all rows at once. See ``causes`` for *handled*.
    """
    for each in causes(exc, handled):
        if isinstance(each, DatabaseError):
            sqlstate, number = error_codes(each)
            if sqlstate in {"55P03", *GAVE_WAY_STATES} or number in GAVE_WAY:
                return True
    return False


def bound_waits(using: str) -> None:
    """Let no statement of the ``atomic`` block just begun wait for a lock for ever.

    Other databases have such a limit; PostgreSQL's default is none. A shorter limit of
    the project's stays. Does nothing in somebody else's transaction: the limit would
    outlive the block.
    """
    connection = connections[using]
    if connection.vendor == "postgresql" and not connection.savepoint_ids:
        limit = f"{LOCK_SECONDS * 1000:.0f}ms"
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT set_config('lock_timeout', %s, true) WHERE "
                # Zero is for ever.
                "current_setting('lock_timeout')::interval "
                "NOT BETWEEN '1ms'::interval AND %s::interval",
                [limit, limit],
            )


def unlocked(rows: QuerySet[Any]) -> QuerySet[Any]:
    """Return *rows* without those that somebody has locked, where that can be told.

    The others are locked, too, until the transaction ends.
    """
    if connections[rows.db].features.has_select_for_update_skip_locked:
        return rows.select_for_update(skip_locked=True)
    return rows


def change_in_batches(
    rows: QuerySet[Any],
    change: Callable[[QuerySet[Any]], int],
    *,
    size: int = 1000,
    until: float = float("inf"),
    otherwise: Callable[[QuerySet[Any]], int] | None = None,
) -> int:
    """Apply *change* to *rows*, *size* at a time; return the sum of what it returns.

    *change* takes rows out of the queryset, and returns how many. What others have
    locked is skipped. If *change* fails, it is applied to each row by itself: a row for
    which it fails is logged and left, or taken out of the queryset by *otherwise*.
    Begins no batch at, or after, the moment *until* (``time.monotonic()``). Raises what
    the database raises if it cannot be used at all.
    """
    connection = connections[rows.db]
    left: list[Any] = []
    chosen: list[Any] = []

    def attempt(some: QuerySet[Any]) -> int:
        chosen.clear()
        # Two that lock many rows each can deadlock, unless each leaves the other's
        # alone. SQLite locks nothing, and writes best if it has not read before.
        locks = connection.features.has_select_for_update_skip_locked
        inside = locks or connection.in_atomic_block
        with transaction.atomic(using=rows.db) if inside else nullcontext():
            if inside:
                bound_waits(rows.db)
            chosen.extend(unlocked(some).values_list("pk", flat=True)[:size])
            return change(rows.filter(pk__in=chosen))

    def leave(pk: Any, exc: Exception | None) -> None:
        # Without its str(): the exception may be of the project, or hold its objects.
        reason = "the database keeps it" if exc is None else type(exc).__name__
        # A protected row is no surprise; a receiver that fails is one.
        trace = None if isinstance(exc, IntegrityError) else exc
        name = rows.model._meta.object_name
        logger.warning("%s %s is left as it is: %s", name, pk, reason, exc_info=trace)
        try:
            if otherwise is not None:
                with transaction.atomic(using=rows.db):
                    if otherwise(rows.filter(pk=pk)):
                        return
        except Error:
            logger.exception("%s %s can only be left for now", name, pk)
        left.append(pk)

    changed = 0
    while True:
        try:
            count = attempt(rows.exclude(pk__in=left))
            batch = list(chosen)
            changed += count
            if count < len(batch):
                # A trigger may refuse a row without a word.
                for pk in rows.filter(pk__in=batch).values_list("pk", flat=True):
                    leave(pk, None)
        except Exception as exc:
            if not refuses_rows(rows.db, exc):
                raise
            batch = list(chosen)
            if not batch:
                raise
            for pk in batch:
                if time.monotonic() >= until:
                    break
                try:
                    changed += attempt(rows.filter(pk=pk))
                except Exception as refused:
                    if not refuses_rows(rows.db, refused):
                        raise
                    leave(pk, refused)
        if len(batch) < size or time.monotonic() >= until:
            return changed


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


#: Seconds between two tries at most.
PAUSE = 0.1


def in_transaction(using: str) -> bool:
    """Return whether a transaction is open on the database *using*.

    The one that Django's ``TestCase`` wraps around a test does not count.
    """
    connection = connections[using]
    if not connection.in_atomic_block:
        return not connection.get_autocommit()
    try:
        # Django knows its TestCase's block; no query is sent by this one.
        with transaction.atomic(using=using, savepoint=False, durable=True):
            return False
    except RuntimeError:
        return True


@contextmanager
def serving() -> Iterator[None]:
    """Raise ``MeterlyUnavailableError`` where a database cannot serve."""
    try:
        yield
    except Error as exc:
        if not is_outage(exc):
            raise
        logger.warning("The database cannot serve: %s", exc)
        raise MeterlyUnavailableError(f"The database failed: {exc}") from exc


READS_COMMITTED = (
    "current_setting('transaction_isolation') IN ('read committed', 'read uncommitted')"
)


def reads_committed(using: str) -> bool:
    """Return whether the transaction on *using* sees what others commit meanwhile.

    Only the server knows the isolation level: it may be set there for the database, for
    the role, or by a statement.
    """
    connection: Any = connections[using]
    if connection.vendor == "postgresql":
        sql = f"SELECT {READS_COMMITTED}"
    elif connection.vendor == "mysql":
        # MariaDB has this name in every version, and MySQL the other.
        name = "tx" if connection.mysql_is_mariadb else "transaction"
        sql = f"SELECT @@{name}_isolation IN ('READ-COMMITTED', 'READ-UNCOMMITTED')"
    else:
        # SQLite has one writer at a time.
        return True
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return bool(cursor.fetchone()[0])


def on_live_connection(
    using: str, query: Callable[[], T], *, patience: float = 0.0
) -> T:
    """Run *query*, once more on a new connection if the present one is dead.

    If the database cannot serve for another reason, or cannot be reached, *query* is
    tried again for *patience* seconds. After a deadlock, for example, it is tried again
    for at least ``GIVE_WAY_SECONDS``. Inside a transaction it is never tried again,
    because the transaction's other changes are lost.
    """
    connection = connections[using]
    begun = time.monotonic()
    replaced = False
    while True:
        before = None
        try:
            connection.ensure_connection()
            before = connection.connection
            return query()
        except Error as exc:
            if connection.in_atomic_block or not is_outage(exc):
                raise
            dead = before is not None and (
                # Django closes a dead connection when it leaves an atomic block.
                connection.connection is not before
                or is_read_only(exc)
                or not connection.is_usable()
            )
            if gave_way(exc):
                patience = max(patience, GIVE_WAY_SECONDS)
            if (replaced or not dead) and time.monotonic() - begun >= patience:
                raise
        if dead:
            reconnect(connection)
        if replaced or not dead:
            # Jitter: processes that collided once should not collide again.
            time.sleep(random.uniform(0, PAUSE))  # noqa: S311
        replaced = replaced or dead


def refused_by_database(
    exc: BaseException | None, handled: BaseException | None
) -> Exception | None:
    """Return what *exc* comes from if a database in reach refuses what a row asks.

    A constraint or a trigger on an account, for example. See ``causes`` for *handled*.
    """
    for each in causes(exc, handled):
        sqlstate, number = error_codes(each)
        # RAISE EXCEPTION in PostgreSQL, and SIGNAL in MySQL.
        raised = sqlstate == "P0001" or number == 1644
        if raised or isinstance(each, IntegrityError | DataError):
            return each
    return None
