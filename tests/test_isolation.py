"""The isolation level is what the server says, wherever it was set."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.auth.models import Group
from django.db import OperationalError, connection, connections, transaction
from django.db.backends.signals import connection_created
from django.db.models.signals import post_save

from django_meterly import MeterlyUnavailableError, db, guard
from django_meterly.ledger import postgresql
from django_meterly.testing import assert_books_balance, sweep
from tests.books import balance, movements, states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django.contrib.auth.models import User
    from django.test import Client

    from django_meterly.models import Customer

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.database]

LEVELS = ["repeatable read", "serializable"]


@contextmanager
def options(**changed: Any) -> Iterator[None]:
    """Give every thread's connection other ``OPTIONS``."""
    before = connections.settings["default"]["OPTIONS"]
    after = {**before, **changed}
    for settings in (connections.settings["default"], connection.settings_dict):
        settings["OPTIONS"] = after
    connection.close()
    try:
        yield
    finally:
        for settings in (connections.settings["default"], connection.settings_dict):
            settings["OPTIONS"] = before
        connection.close()


@contextmanager
def executed(statement: str, undo: str) -> Iterator[None]:
    """Set something on the server, for the connections to come."""
    with connection.cursor() as cursor:
        cursor.execute(statement)
    connection.close()
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute(undo)
        connection.close()


@contextmanager
def said_at_connection(statement: str) -> Iterator[None]:
    def say(connection: Any, **kwargs: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(statement)

    connection_created.connect(say)
    connection.close()
    try:
        yield
    finally:
        connection_created.disconnect(say)
        connection.close()


def _ways() -> dict[str, Callable[[str, pytest.MonkeyPatch], Any]]:
    """Return how the isolation level may be set."""
    session = "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL {}"
    if connection.vendor == "mysql":
        session = "SET SESSION TRANSACTION ISOLATION LEVEL {}"
        return {
            "isolation_level": lambda level, _: options(isolation_level=level),
            "init_command": lambda level, _: options(
                isolation_level=None, init_command=session.format(level)
            ),
            "session": lambda level, _: said_at_connection(session.format(level)),
        }
    from django.db.backends.postgresql.psycopg_any import IsolationLevel

    def altered(what: str) -> Callable[[str, Any], Any]:
        name = connection.ops.quote_name(connection.settings_dict["NAME"])
        alter = f"ALTER {what.format(name)}"
        return lambda level, _: executed(
            f"{alter} SET default_transaction_isolation = '{level}'",
            f"{alter} RESET default_transaction_isolation",
        )

    def by_environment(level: str, monkeypatch: pytest.MonkeyPatch) -> Any:
        setting = level.replace(" ", "\\ ")
        monkeypatch.setenv("PGOPTIONS", f"-c default_transaction_isolation={setting}")
        return options()

    return {
        "isolation_level": lambda level, _: options(
            isolation_level=IsolationLevel[level.upper().replace(" ", "_")]
        ),
        "options": lambda level, _: options(
            options="-c default_transaction_isolation=" + level.replace(" ", "\\ ")
        ),
        "database": lambda level, monkeypatch: altered("DATABASE {}")(level, None),
        "role": lambda level, monkeypatch: altered("ROLE CURRENT_USER IN DATABASE {}")(
            level, None
        ),
        "environment": by_environment,
        "session": lambda level, _: said_at_connection(session.format(level)),
    }


WAYS = (
    ["isolation_level", "options", "database", "role", "environment", "session"]
    if connection.vendor == "postgresql"
    else ["isolation_level", "init_command", "session"]
)

# SQLite has one writer at a time.
if connection.vendor != "sqlite":

    @pytest.fixture(params=WAYS)
    def way(request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture(params=LEVELS)
    def level(
        request: pytest.FixtureRequest, way: str, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[str]:
        with _ways()[way](request.param, monkeypatch):
            yield request.param

    def test_f69_the_server_is_asked_for_its_level(level: str) -> None:
        with transaction.atomic():
            assert not db.reads_committed("default")

    def test_f69_a_busy_account_does_not_fail_the_work(
        payer: Client,
        user: User,
        customer: Customer,
        level: str,
        atomic_requests: None,
    ) -> None:
        """Above READ COMMITTED the view's transaction does not see what others do.

        At SERIALIZABLE a database may take the view for the one that has to give way:
        then nothing of it is left, and it is free.
        """

        def spend() -> None:
            try:
                with guard(customer.external_id, 10):
                    pass
            finally:
                connection.close()

        def spend_beside(**kwargs: Any) -> None:
            thread = threading.Thread(target=spend)
            thread.start()
            thread.join()

        post_save.connect(spend_beside, sender=Group)
        gave_way = False
        try:
            assert payer.post("/paid/").status_code == 200
        except OperationalError as exc:
            gave_way = level == "serializable" and db.gave_way(exc)
            if not gave_way:
                raise
        finally:
            post_save.disconnect(spend_beside, sender=Group)
        sweep()
        assert Group.objects.count() == (0 if gave_way else 1)
        end = "released" if gave_way else "committed"
        assert sorted(states()) == ["committed", end]
        assert sorted(movements()) == ["committed", end, "reserved", "reserved"]
        assert balance(customer) == (90 if gave_way else 65, 0)
        assert_books_balance()


def test_f69_read_committed_settles_in_the_works_own_transaction(
    payer: Client, customer: Customer, joined: None, atomic_requests: None
) -> None:
    assert payer.post("/paid/").status_code == 200
    assert states() == ["committed"]
    with transaction.atomic():
        assert db.reads_committed("default")


if connection.vendor == "postgresql":

    @pytest.fixture
    def commit_fails_once() -> Iterator[None]:
        """Let the first COMMIT that writes a reservation give way."""
        with connection.cursor() as cursor:
            cursor.execute("CREATE SEQUENCE commits")
            cursor.execute(
                "CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS $$ "
                "BEGIN IF nextval('commits') = 1 THEN RAISE EXCEPTION 'gave way' "
                "USING ERRCODE = '40001'; END IF; RETURN NULL; END $$"
            )
            cursor.execute(
                "CREATE CONSTRAINT TRIGGER fail_once AFTER INSERT "
                "ON meterly_reservation DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW EXECUTE FUNCTION fail_once()"
            )
        yield
        with connection.cursor() as cursor:
            cursor.execute("DROP TRIGGER fail_once ON meterly_reservation")
            cursor.execute("DROP FUNCTION fail_once")
            cursor.execute("DROP SEQUENCE commits")

    @pytest.mark.usefixtures("commit_fails_once", "joined")
    @pytest.mark.parametrize("by_functions", [True, False])
    def test_f69_a_reserve_whose_commit_gives_way_is_tried_anew(
        customer: Customer, monkeypatch: pytest.MonkeyPatch, by_functions: bool
    ) -> None:
        monkeypatch.setattr(postgresql, "enabled", by_functions)
        with guard(customer, 25, idempotency_key="k"):
            pass
        sweep()
        assert states() == ["committed"]
        assert movements() == ["reserved", "committed"]
        assert balance(customer) == (75, 0)
        assert_books_balance()


if connection.vendor == "sqlite":

    def test_f69_a_reserve_whose_commit_meets_a_reader_is_tried_anew(
        customer: Customer, joined: None
    ) -> None:
        """A reader keeps SQLite from writing a COMMIT, for as long as it reads."""
        connection.close()
        before = connection.settings_dict["OPTIONS"]
        connection.settings_dict["OPTIONS"] = {**before, "timeout": 0.3}
        reader = sqlite3.connect(
            str(connection.settings_dict["NAME"]),
            check_same_thread=False,
            isolation_level=None,
        )
        reader.execute("BEGIN")
        reading = reader.execute("SELECT * FROM auth_user")
        reading.fetchone()

        def leave() -> None:
            reading.close()
            reader.execute("COMMIT")
            reader.close()

        timer = threading.Timer(0.6, leave)
        timer.start()
        try:
            with guard(customer, 25):
                pass
        finally:
            timer.join()
            connection.close()
            connection.settings_dict["OPTIONS"] = before
        assert states() == ["committed"]
        assert balance(customer) == (75, 0)
        assert_books_balance()


if connection.vendor != "sqlite":

    @pytest.mark.parametrize("keyed", [False, True])
    def test_f69_many_guards_of_one_account_are_charged_once_each(
        customer: Customer, level: str, keyed: bool
    ) -> None:
        works: list[int] = []
        refused: list[Exception] = []

        def work(number: int) -> None:
            try:
                for turn in range(5):
                    key = f"{number}-{turn}" if keyed else None
                    try:
                        with guard(customer.external_id, 2, idempotency_key=key):
                            works.append(number)
                    except MeterlyUnavailableError as exc:
                        refused.append(exc)
            finally:
                connection.close()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        sweep()
        sweep()
        assert balance(customer) == (100 - 2 * len(works), 0)
        assert len(works) + len(refused) == 20
        # MySQL's reads lock at SERIALIZABLE, and what meets deadlocks.
        if connection.vendor == "postgresql" or level == "repeatable read":
            assert not refused
        assert_books_balance()
