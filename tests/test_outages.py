"""A database that cannot serve: before the work it is 503, after it no lost charge."""

from __future__ import annotations

import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from django.db import (
    DataError,
    Error,
    IntegrityError,
    InterfaceError,
    InternalError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
    connection,
    utils,
)

from django_meterly import MeterlyUnavailableError, guard, signals
from django_meterly.db import is_outage
from django_meterly.testing import assert_books_balance, sweep
from tests.books import balance, movements, states
from tests.children import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.test import Client

    from django_meterly.models import Customer

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.database]


def error(kind: type[Error], text: str, sqlstate: str = "", number: int = 0) -> Error:
    """Return an error as Django raises it: with the driver's as its cause."""
    cause: Any = Exception(number, text) if number else Exception(text)
    cause.sqlstate = sqlstate or None
    raised = kind(*cause.args)
    raised.__cause__ = cause
    return raised


#: What PostgreSQL, MariaDB and SQLite say when they cannot serve.
OUTAGES = {
    exc.args[-1]: exc
    for exc in (
        error(OperationalError, "couldn't get a connection after 30.00 sec"),
        error(OperationalError, "the pool 'pool-1' is closed"),
        error(OperationalError, "the pool 'pool-1' has already 3 requests waiting"),
        error(OperationalError, "connection refused"),
        error(OperationalError, "the connection is lost"),
        error(InterfaceError, "connection already closed"),
        error(OperationalError, "too many connections already", "53300"),
        error(OperationalError, "could not extend file: No space left", "53100"),
        error(OperationalError, "out of memory", "53200"),
        error(OperationalError, "terminating connection by administrator", "57P01"),
        error(OperationalError, "the database system is shutting down", "57P03"),
        error(OperationalError, "canceling statement: statement timeout", "57014"),
        error(OperationalError, "canceling statement: lock timeout", "55P03"),
        error(OperationalError, "terminating: idle-in-transaction timeout", "25P03"),
        error(InternalError, "cannot execute in a read-only transaction", "25006"),
        error(OperationalError, "deadlock detected", "40P01"),
        error(OperationalError, "could not serialize access", "40001"),
        error(InternalError, "invalid page in block 3", "XX001"),
        error(OperationalError, "Lock wait timeout exceeded", number=1205),
        error(OperationalError, "Deadlock found", number=1213),
        error(OperationalError, "Record has changed since last read", number=1020),
        error(OperationalError, "Too many connections", number=1040),
        error(OperationalError, "Server shutdown in progress", number=1053),
        error(OperationalError, "The table is full", number=1114),
        error(OperationalError, "running with the --read-only option", number=1290),
        error(OperationalError, "MySQL server has gone away", number=2006),
        error(OperationalError, "Lost connection to MySQL server", number=2013),
        error(OperationalError, "max_statement_time exceeded", number=1969),
        error(InterfaceError, "(0, '')"),
        error(InternalError, "Packet sequence number wrong"),
        error(OperationalError, "database is locked"),
        error(OperationalError, "disk I/O error"),
        error(OperationalError, "unable to open database file"),
        error(OperationalError, "attempt to write a readonly database"),
        error(OperationalError, "database or disk is full"),
        error(utils.DatabaseError, "database disk image is malformed"),
    )
}
REFUSALS = [
    error(ProgrammingError, "relation does not exist", "42P01"),
    error(ProgrammingError, "permission denied", "42501"),
    error(IntegrityError, "duplicate key", "23505"),
    error(DataError, "value too long", "22001"),
    error(NotSupportedError, "cannot do that", "0A000"),
    error(InternalError, "current transaction is aborted", "25P02"),
]

any_outage = pytest.mark.parametrize("text", OUTAGES)


@contextmanager
def failing(exc: Exception, times: int = 10_000) -> Iterator[list[str]]:
    """Let the next statements fail."""
    met: list[str] = []

    def fail(execute: Any, sql: str, *rest: Any) -> Any:
        if len(met) < times:
            met.append(sql)
            raise exc
        return execute(sql, *rest)

    with connection.execute_wrapper(fail):
        yield met


@pytest.mark.parametrize("exc", REFUSALS, ids=str)
def test_f64_what_a_database_refuses_is_no_outage(exc: Error) -> None:
    assert not is_outage(exc)


@any_outage
def test_f64_a_database_that_cannot_serve_is_an_outage(text: str) -> None:
    assert is_outage(OUTAGES[text])


@pytest.mark.sample(3)
@any_outage
def test_f64_an_outage_before_the_work_is_answered_503(
    payer: Client, customer: Customer, text: str
) -> None:
    heard = []

    def hear(**facts: Any) -> None:
        heard.append(facts["error"])

    # Django's own queries, of the session and the user, are Django's to answer for.
    def after_the_user(execute: Any, sql: str, *rest: Any) -> Any:
        if "meterly" in sql:
            raise OUTAGES[text]
        return execute(sql, *rest)

    signals.credits_denied.connect(hear)
    try:
        with connection.execute_wrapper(after_the_user):
            answer = payer.post("/paid/")
    finally:
        signals.credits_denied.disconnect(hear)
    assert answer.status_code == 503
    assert int(answer["Retry-After"]) > 0
    assert [type(exc) for exc in heard] == [MeterlyUnavailableError]
    assert balance(customer) == (100, 0)
    assert payer.post("/paid/").status_code == 200
    assert (movements(), states()) == (["reserved", "committed"], ["committed"])


@pytest.mark.sample(2)
@pytest.mark.parametrize("number", range(1, 12))
def test_f64_an_outage_in_any_statement_of_a_guard_charges_for_work_done(
    customer: Customer, number: int
) -> None:
    """Whichever statement meets it: no work without its charge, and the reverse."""
    count, works = 0, []

    def fail(execute: Any, sql: str, *rest: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            raise OUTAGES["deadlock detected"]
        return execute(sql, *rest)

    with connection.execute_wrapper(fail):
        try:
            with guard(customer.external_id, 25):
                works.append(1)
        except MeterlyUnavailableError:
            assert not works
    sweep()
    sweep()
    assert balance(customer) == (100 - 25 * len(works), 0)
    assert_books_balance()


@pytest.mark.parametrize("times", [1, 3, 12])
def test_f64_an_outage_that_passes_costs_nobody_a_charge(
    customer: Customer, times: int
) -> None:
    work = guard(customer, 25)
    work.lifecycle.reserve()
    with failing(OUTAGES["canceling statement: lock timeout"], times) as met:
        work.lifecycle.succeed()
    assert len(met) == times
    sweep()
    assert states() == ["committed"]
    assert balance(customer) == (75, 0)


def test_f64_an_outage_that_stays_is_raised_after_the_work(customer: Customer) -> None:
    work = guard(customer, 25)
    work.lifecycle.reserve()
    outage = OUTAGES["the database system is shutting down"]
    with failing(outage), pytest.raises(OperationalError):
        work.lifecycle.succeed()


# A file has no server that could go.
if connection.vendor != "sqlite":

    def kill_connections() -> None:
        """Let the server close every connection to the test database."""
        parameters = connection.get_connection_params()
        if connection.vendor == "postgresql":
            statement = (
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        else:
            statement = (
                "SELECT GROUP_CONCAT('KILL ', id) FROM information_schema.PROCESSLIST "
                "WHERE db = DATABASE() AND id <> CONNECTION_ID()"
            )
        # Not by Django, which may have a pool.
        opened = connection.Database.connect(
            **{name: parameters[name] for name in parameters if name in PLAIN}
        )
        with closing(opened), opened.cursor() as cursor:
            cursor.execute(statement)
            if connection.vendor == "mysql":
                for kill in cursor.fetchone()[0].split(","):
                    cursor.execute(kill)

    PLAIN = {"dbname", "database", "host", "port", "user", "password"}

    ENDS = {
        "succeed": ("committed", 75),
        "fail": ("released", 100),
        "cancel": ("released", 100),
    }

    #: Pools that check no connection, and none.
    POOLS = [None]
    if connection.vendor == "postgresql":
        POOLS += [True, {"min_size": 4, "max_size": 6, "timeout": 5}]

    @pytest.fixture(params=POOLS, ids=str)
    def pool(request: pytest.FixtureRequest) -> Iterator[Any]:
        if request.param is None:
            yield None
            return
        pytest.importorskip("psycopg_pool")
        before = connection.settings_dict["OPTIONS"]
        connection.close()
        connection.settings_dict["OPTIONS"] = {**before, "pool": request.param}
        try:
            yield request.param
        finally:
            connection.close()
            connection.close_pool()
            connection.settings_dict["OPTIONS"] = before

    def fill(pool: Any) -> None:
        """Let the *pool* open all its connections."""
        until = time.monotonic() + PATIENCE
        while pool and connection.pool.get_stats()["pool_size"] < 4:
            assert time.monotonic() < until
            time.sleep(0.01)

    @pytest.mark.parametrize("end", ENDS)
    def test_f64_f29_connections_that_died_during_the_work_cost_nobody_a_charge(
        pool: Any, customer: Customer, end: str
    ) -> None:
        work = guard(customer, 25)
        work.lifecycle.reserve()
        fill(pool)
        if end == "cancel":
            work.lifecycle.presume()
        kill_connections()
        getattr(work.lifecycle, end)()
        state, left = ENDS[end]
        assert states() == [state]
        assert balance(customer) == (left, 0)

    def test_f64_connections_that_died_before_the_work_are_replaced(
        pool: Any, customer: Customer
    ) -> None:
        fill(pool)
        kill_connections()
        with guard(customer.external_id, 25):
            kill_connections()
        assert states() == ["committed"]
