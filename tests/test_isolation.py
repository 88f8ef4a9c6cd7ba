"""The isolation level is what the server says, wherever it was set."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.auth.models import Group
from django.db import OperationalError, connection, connections, transaction
from django.db.backends.signals import connection_created
from django.db.models.signals import post_save

from django_meterly import MeterlyUnavailableError, db, guard, journal
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
            assert not journal.reads_committed("default")

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
        assert journal.reads_committed("default")


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
