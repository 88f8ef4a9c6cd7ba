"""What PostgreSQL's functions promise beyond what every database does.

The other tests of this folder run over the functions and over the portable path.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.core.management import call_command
from django.db import connection, transaction

from django_meterly import errors
from django_meterly.client import MeterlyClient
from django_meterly.db import from_now
from django_meterly.ledger import customers, grants, postgresql, spending, triggers
from django_meterly.ledger.models import Account, Entry, Hold
from django_meterly.ledger.transport import LedgerTransport
from tests.ledger.holds import reserve

# Where the database is another, conftest.py leaves this file out.
pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.database]

with_migrations = pytest.mark.skipif(
    "config.getoption('nomigrations')", reason="This run has no migrations to test."
)


@pytest.fixture(autouse=True)
def functions(monkeypatch):
    monkeypatch.setattr(postgresql, "enabled", True)


@pytest.fixture
def client():
    return MeterlyClient(transport=LedgerTransport())


@pytest.fixture
def spender(client):
    """The id of a customer with 100 credits, for the client."""
    return client.grant_credits("user_1", 100, "credits", "opening").grant.customer_id


FUNCTIONS = {
    "meterly_spend_1",
    "meterly_close_1",
    "meterly_append_only",
    "meterly_shaped_1",
}


def function_names():
    with connection.cursor() as cursor:
        cursor.execute("SELECT proname FROM pg_proc WHERE proname LIKE 'meterly%%'")
        return {name for (name,) in cursor.fetchall()}


@pytest.fixture
def one_statement(django_assert_num_queries):
    """One statement, and so no BEGIN and no COMMIT either."""
    assert not connection.in_atomic_block
    return lambda: django_assert_num_queries(1)


# One round trip


def test_every_movement_is_one_statement(client, spender, one_statement):
    with one_statement():
        held = client.reserve_credits(spender, 10, idempotency_key="reserve")
    with one_statement():
        assert client.reserve_credits(
            spender, 10, idempotency_key="reserve", reference=held.reference
        )
    with one_statement():
        client.commit_reservation(held.reservation_id, amount=3)
    with one_statement():
        other = client.reserve_credits(spender, 10)
    with one_statement():
        client.release_reservation(other.reservation_id)
    with one_statement():
        assert client.use_credits(spender, 1).balance.available == 96


def test_a_refusal_is_one_statement(client, spender, one_statement):
    with one_statement(), pytest.raises(errors.MeterlyInsufficientCreditsError):
        client.reserve_credits(spender, 101)
    with one_statement(), pytest.raises(errors.MeterlyNotFoundError):
        client.use_credits("cus_nobody", 1)
    with one_statement(), pytest.raises(errors.MeterlyNotFoundError):
        client.commit_reservation("res_none")


def test_a_workspace_that_is_not_there_has_no_customers(client, spender, settings):
    settings.METERLY_LEDGER = {"WORKSPACE": "another"}
    with pytest.raises(errors.MeterlyNotFoundError):
        client.reserve_credits(spender, 1)


def test_a_movement_does_not_lock_the_workspaces_row(workspace, customer):
    # Every movement would: two at once, and each has to make a multixact.
    def locker():
        with connection.cursor() as cursor:
            cursor.execute("SELECT xmax FROM meterly_ledger_workspace")
            return cursor.fetchall()

    before = locker()
    held = reserve(workspace, customer)
    spending.commit(workspace.pk, held.reservation_id, idempotency_key="commit")
    assert locker() == before


def test_a_row_is_found_by_its_own_key_before_any_analyze(client, spender):
    # The planner's guess, and a session keeps it: the index of all live holds, or of
    # all the workspace's customers.
    for number in range(50):
        client.create_customer(f"other_{number}", "credits")
    connection.close()

    def scanned():
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_stat_force_next_flush()")
            cursor.execute(
                "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname IN "
                "('meterly_ledger_hold_due', "
                "'meterly_ledger_customer_unique_external_id') ORDER BY 1"
            )
            return cursor.fetchall()

    before = scanned()
    for _ in range(10):
        held = client.reserve_credits(spender, 1)
        client.commit_reservation(held.reservation_id)
        held = client.reserve_credits(spender, 1)
        client.release_reservation(held.reservation_id)
    assert scanned() == before


# Two at once, one of them ahead


def ahead(first, second):
    """Run *second* when *first* has moved and before it commits.

    Return what *second* did. It is let wait for the database's own locks.
    """
    moved, waiting = threading.Event(), threading.Event()

    def lead():
        try:
            with transaction.atomic():
                first()
                moved.set()
                waiting.wait(60)
                give_up = time.monotonic() + 10
                while not _somebody_waits() and time.monotonic() < give_up:
                    time.sleep(0.01)
        finally:
            connection.close()

    def follow():
        try:
            assert moved.wait(60)
            connection.ensure_connection()
            waiting.set()
            return second()
        except errors.MeterlyApiError as exc:
            return exc
        finally:
            connection.close()

    with ThreadPoolExecutor(2) as pool:
        leading, following = pool.submit(lead), pool.submit(follow)
        leading.result()
        return following.result()


def _somebody_waits():
    with connection.cursor() as cursor:
        cursor.execute("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
        return cursor.fetchone()[0]


@pytest.mark.parametrize("amount", [40, 100])
@pytest.mark.parametrize("in_transaction", [False, True])
def test_f42_the_second_of_two_with_one_key_is_answered_as_the_first(
    workspace, customer, amount, in_transaction
):
    def second():
        if not in_transaction:
            return reserve(workspace, customer, amount)
        with transaction.atomic():
            again = reserve(workspace, customer, amount)
            # F28: the caller's transaction is as usable as before.
            assert Hold.objects.count() == 1
        return again

    again = ahead(lambda: reserve(workspace, customer, amount), second)

    assert again.replayed
    assert again.reservation_id == Hold.objects.get().public_id
    assert Account.objects.get().reserved == amount
    call_command("meterly_ledger_verify")


@pytest.mark.parametrize("operation", ["use", "reserve"])
def test_f42_one_key_for_two_accounts_moves_one_of_them(workspace, customer, operation):
    other = grants.grant(
        workspace.pk,
        external_id="user_2",
        amount=100,
        credit_unit="credits",
        reference="opening",
        idempotency_key="opening-2",
    ).account.customer_id

    def second():
        return getattr(spending, operation)(
            workspace.pk, other, amount=40, reference="job-1", idempotency_key="reserve"
        )

    refused = ahead(lambda: reserve(workspace, customer), second)

    assert isinstance(refused, errors.MeterlyIdempotencyMismatchError)
    account = customers.default_balance(workspace.pk, other)
    assert (account.balance, account.reserved) == (100, 0)
    assert Hold.objects.count() == 1
    call_command("meterly_ledger_verify")


def test_f42_one_key_for_two_holds_closes_one_of_them(workspace, customer):
    one, other = (reserve(workspace, customer, 10, key) for key in ("one", "other"))

    def close(held):
        return lambda: spending.commit(
            workspace.pk, held.reservation_id, idempotency_key="commit"
        )

    # The two share an account, so the second is first stopped by its lock.
    refused = ahead(close(one), close(other))

    assert isinstance(refused, errors.MeterlyIdempotencyMismatchError)
    left = spending.get_reservation(workspace.pk, other.reservation_id)
    assert (left.status, left.account.balance, left.account.reserved) == (
        "reserved",
        90,
        10,
    )
    assert Hold.objects.live().get().closed_at is None
    call_command("meterly_ledger_verify")


@pytest.mark.parametrize(
    ("first", "second", "error"),
    [
        (spending.commit, spending.commit, None),
        (
            spending.commit,
            spending.release,
            errors.MeterlyReservationCommittedError,
        ),
        (
            spending.release,
            spending.commit,
            errors.MeterlyReservationReleasedError,
        ),
    ],
)
def test_a_hold_closed_by_two_is_closed_once(workspace, customer, first, second, error):
    held = reserve(workspace, customer)

    result = ahead(
        lambda: first(workspace.pk, held.reservation_id, idempotency_key="first"),
        lambda: second(workspace.pk, held.reservation_id, idempotency_key="second"),
    )

    if error is None:
        assert (result.status, result.replayed) == ("committed", True)
    else:
        assert isinstance(result, error)
    assert Entry.objects.exclude(hold=None).count() == 2
    call_command("meterly_ledger_verify")


def test_f43_a_due_hold_is_expired_by_a_spender_inside_a_transaction(
    workspace, customer
):
    reserve(workspace, customer, 100)
    Hold.objects.update(expires_at=from_now(-1))
    with transaction.atomic():
        movement = spending.use(
            workspace.pk, customer, amount=70, reference="page", idempotency_key="use"
        )
    assert (movement.account.balance, movement.account.reserved) == (30, 0)
    call_command("meterly_ledger_verify")


# Where the functions are


def test_a_test_database_without_migrations_has_the_functions():
    postgresql.drop_functions(connection)
    triggers.drop_triggers(connection)
    # The table of entries has a constraint that calls this one.
    assert function_names() == {"meterly_shaped_1"}
    # As pytest's --nomigrations does it: nothing but post_migrate follows.
    call_command("migrate", run_syncdb=True, verbosity=0)
    assert function_names() == FUNCTIONS


def test_f63_processes_that_migrate_at_once_take_turns():
    def create():
        with transaction.atomic():
            postgresql.create_functions(connection)

    def migrate():
        try:
            create()
        finally:
            connection.close()

    def somebody_waits():
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_locks WHERE NOT granted "
                "AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
            )
            return cursor.fetchone()[0]

    with ThreadPoolExecutor() as pool:
        with transaction.atomic():
            postgresql.create_functions(connection)
            other = pool.submit(migrate)
            until = time.monotonic() + 20
            while not somebody_waits():
                assert time.monotonic() < until
                time.sleep(0.02)
        other.result()


def test_migrating_back_leaves_no_function_behind():
    try:
        call_command("migrate", "meterly_ledger", "zero", verbosity=0)
        assert function_names() == set()
    finally:
        call_command("migrate", verbosity=0)
    assert function_names() == FUNCTIONS


@with_migrations
def test_a_ledger_routed_elsewhere_has_its_functions_there(transactional_db):
    script = """
from django.conf import settings

class Router:
    def db_for_write(self, model, **hints):
        return "elsewhere" if model._meta.app_label == "meterly_ledger" else "default"

    db_for_read = db_for_write

    def allow_migrate(self, db, app_label, **hints):
        return (db == "elsewhere") == (app_label == "meterly_ledger")

settings.DATABASES = {
    "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
    "elsewhere": settings.DATABASES["default"],
}
settings.DATABASE_ROUTERS = [Router()]
import django
django.setup()
from django.core.management import call_command
from django.db import connections
from django_meterly.client import MeterlyClient
from django_meterly.ledger import postgresql
from django_meterly.ledger.transport import LedgerTransport
postgresql.drop_functions(connections["elsewhere"])
for alias in connections:
    call_command("migrate", database=alias, verbosity=0)
client = MeterlyClient(transport=LedgerTransport())
customer = client.grant_credits("user_1", 9, "credits", "opening").grant.customer_id
print(client.reserve_credits(customer, 4).balance.available)
"""
    printed = subprocess.run(
        [sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True
    )
    assert printed.stdout == "5\n"


def test_f52_nothing_runs_on_an_insert():
    with connection.cursor() as cursor:
        cursor.execute("SELECT tgtype FROM pg_trigger WHERE tgname LIKE '%append_only'")
        # Row, before, delete and update; 4 would be insert.
        assert {*cursor.fetchall()} == {(1 | 2 | 8 | 16,)}
