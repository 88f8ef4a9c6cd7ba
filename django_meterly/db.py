"""Differences between databases: exact text, one clock, locks and errors.

Both apps use it. The fields compare text by the byte and keep moments in UTC. The
functions tell errors apart (an outage, a lock, one bad row) and change many rows in
batches.
"""

from __future__ import annotations

import datetime as dt
import logging
import random
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
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

#: PostgreSQL: an earlier statement of the transaction has failed.
ABORTED_STATE = "25P02"
#: PostgreSQL: serialization failure, deadlock.
GAVE_WAY_STATES = {"40001", "40P01"}
#: MySQL: lock wait time-out, deadlock; MariaDB: row changed since the snapshot.
GAVE_WAY = {1205, 1213, 1020}
#: A read-only server or transaction: PostgreSQL's state and MySQL's numbers.
READ_ONLY_STATE, READ_ONLY = "25006", {1290, 1792, 1836}


class ExactCharField(models.CharField):  # type: ignore[type-arg]
    """A ``CharField`` that compares by the byte on every database.

    For example, MySQL's default collation treats ``Key-1`` and ``key-1`` as equal. Ids
    and idempotency keys must not be mixed up like this.
    """

    def db_type(self, connection: BaseDatabaseWrapper) -> str | None:
        column = super().db_type(connection)
        if column is not None and connection.vendor == "postgresql":
            # This is another name of the same type. Under the usual name, Django adds
            # a second index for LIKE to unique columns, which slows every movement.
            column = column.replace("varchar", "character varying", 1)
        return column

    def db_parameters(self, connection: BaseDatabaseWrapper) -> Any:
        parameters = super().db_parameters(connection)
        if connection.vendor == "mysql":
            parameters["collation"] = "utf8mb4_bin"
        return parameters


class MomentField(models.DateTimeField):  # type: ignore[type-arg]
    """A ``DateTimeField`` that is stored in UTC with any settings.

    PostgreSQL stores moments. The others store a clock's reading, and Django uses a
    local clock without ``USE_TZ``, or if the database has a ``TIME_ZONE``. Our columns
    are compared with ``DatabaseNow``. A local clock is set back once a year, and then
    leases would last an hour longer.
    """

    def get_db_prep_value(
        self, value: Any, connection: Any, prepared: bool = False
    ) -> Any:
        if not prepared:
            value = self.get_prep_value(value)
        if isinstance(value, dt.datetime) and _keeps_readings(connection):
            # Django writes the reading of a clock in this zone: let it read UTC.
            value = in_utc(value).replace(tzinfo=connection.timezone)
        return super().get_db_prep_value(value, connection, prepared=True)

    def get_db_converters(self, connection: Any) -> list[Any]:
        converters: list[Any] = super().get_db_converters(connection)
        return [*converters, _read] if _keeps_readings(connection) else converters


def _keeps_readings(connection: Any) -> bool:
    """Return whether Django would store a local clock's reading there."""
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
    """Yield *exc* and its causes, the latest first.

    For example, an error may have been raised again as another one, or have broken the
    transaction that was to record it. Stops at *handled*, an exception that the caller
    was handling before.
    """
    while isinstance(exc, Exception) and exc is not handled:
        yield exc
        exc = exc.__cause__ or exc.__context__


def missing_tables(label: str, databases: Collection[str]) -> list[CheckMessage]:
    """Return warnings about tables of the app *label* that *databases* lack.

    These are not errors, because commands that migrate run the checks first, also
    those of other packages.
    """
    if sys.argv[1:2] == ["migrate"]:
        # It runs the checks before it makes the tables.
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
            # Django reports an unreachable database.
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
    chose the transaction as the victim of a deadlock. An invalid statement is not an
    outage: a violated constraint, a missing table, a value out of range.
    """
    return (
        isinstance(exc, Error)
        and not isinstance(
            exc, DataError | IntegrityError | NotSupportedError | ProgrammingError
        )
        and error_codes(exc)[0] != ABORTED_STATE
    )


def gave_way(exc: BaseException) -> bool:
    """Return whether *exc* ended a transaction that can be tried again as it is."""
    sqlstate, number = error_codes(exc)
    if sqlstate in GAVE_WAY_STATES or number in GAVE_WAY:
        return True
    # The low byte is SQLite's primary code: 5 busy, 6 locked.
    return getattr(exc.__cause__, "sqlite_errorcode", 0) & 0xFF in {5, 6}


def refuses_rows(using: str, exc: Exception) -> bool:
    """Return whether *exc* may concern some rows only, and not all of *using*.

    It concerns all rows if the connection is lost, or if SQLite is locked.
    """
    connection = connections[using]
    if connection.vendor == "sqlite" and gave_way(exc):
        return False
    return connection.connection is not None and connection.is_usable()


def was_locked(exc: BaseException, handled: BaseException | None) -> bool:
    """Return whether *exc* was caused by another transaction at the same row.

    Either the row was locked for too long, or this transaction had to give way. It is
    always ``False`` on SQLite, which locks all rows at once. See ``causes`` for
    *handled*.
    """
    for each in causes(exc, handled):
        if isinstance(each, DatabaseError):
            sqlstate, number = error_codes(each)
            if sqlstate in {"55P03", *GAVE_WAY_STATES} or number in GAVE_WAY:
                return True
    return False


def bound_waits(using: str) -> None:
    """Limit how long statements of the ``atomic`` block just begun wait for locks.

    Other databases have a limit, but PostgreSQL waits for ever by default. A shorter
    limit that the project has set stays. Inside another transaction this does nothing,
    because the limit would outlive the block.
    """
    connection = connections[using]
    if connection.vendor == "postgresql" and not connection.savepoint_ids:
        limit = f"{LOCK_SECONDS * 1000:.0f}ms"
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT set_config('lock_timeout', %s, true) WHERE "
                # Zero means no limit.
                "current_setting('lock_timeout')::interval "
                "NOT BETWEEN '1ms'::interval AND %s::interval",
                [limit, limit],
            )


def unlocked(rows: QuerySet[Any]) -> QuerySet[Any]:
    """Return *rows* without those that somebody has locked, and lock the others.

    Databases without ``SKIP LOCKED`` return all rows and lock none.
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
    """Apply *change* to *rows*, *size* at a time; return the sum of its results.

    *change* gets a part of the queryset. It changes or deletes rows so that they leave
    the queryset, and returns their number. Rows that somebody has locked are skipped.

    If *change* fails for a batch, it is applied to each of its rows alone. A row for
    which that fails is logged and left; *otherwise* may take it out of the queryset.
    For example, a project's foreign key may protect one row from being deleted.

    No batch begins at or after the moment *until* (``time.monotonic()``). If the
    database cannot be used at all, its error is raised.
    """
    return _Batches(rows, change, size, until, otherwise).run()


@dataclass
class _Batches:
    """One run of ``change_in_batches``."""

    rows: QuerySet[Any]
    change: Callable[[QuerySet[Any]], int]
    size: int
    until: float
    otherwise: Callable[[QuerySet[Any]], int] | None
    #: The rows that cannot be changed.
    left: list[Any] = field(default_factory=list)
    #: The rows of the latest attempt, failed or not.
    chosen: list[Any] = field(default_factory=list)

    def run(self) -> int:
        using = self.rows.db
        changed = 0
        while True:
            try:
                count = self._attempt(self.rows.exclude(pk__in=self.left))
                batch = self.chosen
                changed += count
                if count < len(batch):
                    # For example, a trigger may keep a row without an error.
                    kept = self.rows.filter(pk__in=batch)
                    for pk in kept.values_list("pk", flat=True):
                        self._leave(pk, None)
            except Exception as exc:
                batch = self.chosen
                if not batch or not refuses_rows(using, exc):
                    raise
                changed += self._one_by_one(batch)
            if len(batch) < self.size or time.monotonic() >= self.until:
                return changed

    def _one_by_one(self, batch: list[Any]) -> int:
        changed = 0
        for pk in batch:
            if time.monotonic() >= self.until:
                break
            try:
                changed += self._attempt(self.rows.filter(pk=pk))
            except Exception as exc:
                if not refuses_rows(self.rows.db, exc):
                    raise
                self._leave(pk, exc)
        return changed

    def _attempt(self, some: QuerySet[Any]) -> int:
        """Choose at most *size* of *some* rows, and apply the change to them."""
        self.chosen = []
        using = self.rows.db
        connection = connections[using]
        # Two transactions that lock many rows each can deadlock, unless each skips the
        # other's. SQLite has no row locks, and a transaction that only writes fails
        # less often than one that has read before.
        locks = connection.features.has_select_for_update_skip_locked
        inside = locks or connection.in_atomic_block
        with transaction.atomic(using=using) if inside else nullcontext():
            if inside:
                bound_waits(using)
            self.chosen = list(unlocked(some).values_list("pk", flat=True)[: self.size])
            return self.change(self.rows.filter(pk__in=self.chosen))

    def _leave(self, pk: Any, exc: Exception | None) -> None:
        """Log that a row cannot be changed, and do *otherwise* with it."""
        # Not str(exc): the exception may be the project's and show its objects.
        reason = "the database keeps it" if exc is None else type(exc).__name__
        # A protected row needs no traceback. A failing receiver does.
        trace = None if isinstance(exc, IntegrityError) else exc
        name = self.rows.model._meta.object_name
        logger.warning("%s %s is left as it is: %s", name, pk, reason, exc_info=trace)
        try:
            if self.otherwise is not None:
                with transaction.atomic(using=self.rows.db):
                    if self.otherwise(self.rows.filter(pk=pk)):
                        return
        except Error:
            logger.exception("%s %s can only be left for now", name, pk)
        self.left.append(pk)


def is_read_only(exc: BaseException) -> bool:
    """Return whether *exc* says that the server is read-only.

    For example, it was the primary server before a failover.
    """
    sqlstate, number = error_codes(exc)
    return sqlstate == READ_ONLY_STATE or number in READ_ONLY


def reconnect(connection: BaseDatabaseWrapper) -> None:
    """Close a dead connection, so that the next query opens one that works.

    Without ``CONN_HEALTH_CHECKS``, a pool may be full of dead connections, and would
    hand out the next one of them.
    """
    connection.close()
    pool = getattr(connection, "pool", None)
    if pool is not None:
        pool.check()


def pause() -> None:
    """Wait for up to 0.1 seconds between two tries.

    For a random time: processes that collided once should not collide again.
    """
    time.sleep(random.uniform(0, 0.1))  # noqa: S311


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
            pause()
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
