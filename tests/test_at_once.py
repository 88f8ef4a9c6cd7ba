"""On PostgreSQL, a movement and the journal's row in one statement."""

from __future__ import annotations

import datetime as dt
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import (
    InterfaceError,
    OperationalError,
    connection,
    connections,
    transaction,
)
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django.utils.connection import ConnectionDoesNotExist

from django_meterly import (
    MeterlyInsufficientCreditsError,
    MeterlyUnavailableError,
    db,
    get_client,
    grants,
    guard,
    journal,
    signals,
)
from django_meterly.db import from_now
from django_meterly.journal import sweeping
from django_meterly.ledger import expiry, postgresql
from django_meterly.ledger.models import Account, Hold
from django_meterly.models import Customer, Grant, Reservation
from django_meterly.testing import assert_books_balance, lapse_leases
from tests.books import balance, fund, movements, states
from tests.children import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator

# Where the database is another, conftest.py leaves this file out.
pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("joined", "functions"),
    pytest.mark.database,
]


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL's functions, where the other tests take the portable path, too."""
    monkeypatch.setattr(postgresql, "enabled", True)


@pytest.fixture
def customer() -> Customer:
    return fund(User.objects.create_user("alice"))


def row_of(work: Any) -> dict[str, Any]:
    [row] = Reservation.objects.filter(pk=work.reservation.pk).values()
    return row


@pytest.mark.parametrize("binding", ["client", "server"])
@pytest.mark.parametrize(
    ("end", "charge"), [("succeed", 25), ("succeed", 7), ("succeed", 0), ("fail", None)]
)
def test_the_row_is_the_same_as_by_several_statements(
    customer: Customer,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    binding: str,
    end: str,
    charge: int | None,
) -> None:
    if binding == "server":
        request.getfixturevalue("prepared")
    rows = []
    for enabled in (True, False):
        monkeypatch.setattr(postgresql, "enabled", enabled)
        work = guard(customer, 25, reference="r", ttl_seconds=60)
        with CaptureQueriesContext(connection) as log:
            work.lifecycle.reserve()
        assert log[0]["sql"].startswith("WITH") == enabled
        rows.append(row_of(work))
        lasts = rows[-1].pop("lease_until") - rows[-1].pop("created_at")
        assert 119 < lasts.total_seconds() < 121
        if charge is not None:
            work.charge(charge)
        with CaptureQueriesContext(connection) as log:
            getattr(work.lifecycle, end)()
        assert log[0]["sql"].startswith("WITH") == enabled
        rows.append(row_of(work))
        assert rows[-1].pop("created_at") < rows[-1].pop("settled_at")
        assert rows[-1].pop("decided_at")
        # In memory, too.
        assert work.reservation.state == rows[-1]["state"]
        assert work.reservation.charge == rows[-1]["charge"] == charge
        for row in rows[-2:]:
            assert row.pop("key")
            row.pop("id")
            assert row.pop("reservation_id")
    assert rows[:2] == rows[2:]
    assert_books_balance()


def expire() -> None:
    Hold.objects.update(expires_at=from_now(-1))


def test_a_refusal_writes_its_row_afterwards(customer: Customer) -> None:
    with pytest.raises(MeterlyInsufficientCreditsError):
        guard(customer, 101).lifecycle.reserve()
    assert states() == ["denied"]
    assert movements() == []


def test_holds_past_their_time_make_room_for_a_new_one(customer: Customer) -> None:
    guard(customer, 100).lifecycle.reserve()
    expire()
    work = guard(customer, 30)
    work.lifecycle.reserve()
    assert balance(customer) == (100, 30)
    assert row_of(work)["state"] == "reserved"
    call_command("meterly_ledger_verify", verbosity=0)


@pytest.mark.parametrize("charge", [25, 40])
def test_a_hold_that_is_gone_is_debited(customer: Customer, charge: int) -> None:
    work = guard(customer, 25)
    work.lifecycle.reserve()
    work.charge(charge)
    expire()
    work.lifecycle.succeed()
    assert states() == ["committed"]
    assert movements() == ["reserved", "expired", "used"]
    assert balance(customer) == (100 - charge, 0)
    assert_books_balance()


@pytest.mark.parametrize("end", ["succeed", "fail"])
def test_a_decision_whose_answer_is_lost_is_made_once(
    customer: Customer, end: str
) -> None:
    work = guard(customer, 25)
    work.lifecycle.reserve()
    lost = []

    def lose(execute: Any, sql: str, *rest: Any) -> Any:
        result = execute(sql, *rest)
        if sql.startswith("WITH") and not lost:
            lost.append(sql)
            raise OperationalError("gone")
        return result

    with connection.execute_wrapper(lose):
        getattr(work.lifecycle, end)()
    assert lost
    last = "committed" if end == "succeed" else "released"
    assert states() == [last]
    assert movements() == ["reserved", last]
    assert_books_balance()


def test_a_reserve_whose_answer_is_lost_runs_on_trust_under_another_row(
    customer: Customer, settings: Any
) -> None:
    settings.METERLY = {
        **settings.METERLY,
        "ON_UNAVAILABLE": "allow",
        "UNAVAILABLE_CAP": 100,
    }

    def lose(execute: Any, sql: str, *rest: Any) -> Any:
        result = execute(sql, *rest)
        if sql.startswith("WITH") and "meterly_spend" in sql:
            raise OperationalError("gone")
        return result

    work = guard(customer, 25)
    with connection.execute_wrapper(lose):
        work.lifecycle.reserve()
    assert work.reservation is not None
    assert work.reservation.reservation_id is None
    assert states() == ["reserved", "reserved"]
    work.lifecycle.succeed()
    lapse_leases()
    journal.sweep(get_client())
    assert sorted(states()) == ["committed", "released"]
    assert balance(customer) == (75, 0)
    assert_books_balance()


def in_a_thread(function: Any) -> threading.Thread:
    def run() -> None:
        try:
            function()
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def wait_for_a_lock() -> None:
    """Wait until somebody waits for a lock of ours."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_locks WHERE NOT granted "
                "AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
            )
            if cursor.fetchone()[0]:
                return
        time.sleep(0.02)
    raise AssertionError("Nobody waits.")


@pytest.mark.parametrize("fenced", [False, True])
def test_f33_a_decision_that_waited_for_another_moves_nothing_under_it(
    customer: Customer, fenced: bool
) -> None:
    work = guard(customer, 25)
    work.lifecycle.reserve()
    lapse_leases()
    with transaction.atomic():
        if fenced:
            # Somebody takes the work up.
            Reservation.objects.update(fence=2)
        else:
            journal.record_lapsed()
        thread = in_a_thread(work.lifecycle.succeed)
        wait_for_a_lock()
    thread.join()
    # The sweeper's decision is not the last word about work that was done; somebody
    # else's fence is.
    assert states() == (["reserved"] if fenced else ["committed"])
    assert movements().count("committed") + movements().count("used") == (not fenced)
    call_command("meterly_ledger_verify", verbosity=0)


def test_two_that_decide_at_once_are_charged_once(customer: Customer) -> None:
    work, copy = guard(customer, 25), guard(customer, 25)
    work.lifecycle.reserve()
    assert work.reservation is not None
    # As another process that has claimed the row would hold it.
    copy.lifecycle.reservation = Reservation.objects.get()
    copy.lifecycle.fence = copy.lifecycle.reservation.fence
    with transaction.atomic():
        # Both wait for the account.
        Account.objects.update(balance=100)
        threads = [
            in_a_thread(work.lifecycle.succeed),
            in_a_thread(copy.lifecycle.fail),
        ]
        wait_for_a_lock()
    for thread in threads:
        thread.join()
    # Whoever was first: work that was done is paid for, by a debit if need be.
    assert states() == ["committed"]
    assert movements()[1:] in (["committed"], ["released", "used"])
    assert balance(customer) == (75, 0)
    assert_books_balance()


def test_in_a_transaction_a_failure_leaves_the_transaction_usable(
    customer: Customer,
) -> None:
    def fails(execute: Any, sql: str, *rest: Any) -> Any:
        if "meterly_spend" in sql:
            # What PostgreSQL would not forgive without a savepoint.
            return execute("SELECT 1 / 0", None, *rest[1:])
        return execute(sql, *rest)

    with transaction.atomic():
        with connection.execute_wrapper(fails), pytest.raises(Exception, match="asked"):
            guard(customer, 25, durable=False).lifecycle.reserve()
        assert states() == []
        with guard(customer, 25, durable=False):
            pass
    assert states() == ["committed"]
    assert_books_balance()


@pytest.fixture
def manual(customer: Customer) -> Iterator[None]:
    """``AUTOCOMMIT`` off: a transaction of the caller's that no block shows."""
    transaction.set_autocommit(False)
    yield
    connection.close()


@pytest.mark.parametrize("call", ["meterly_spend", "meterly_close"])
def test_without_autocommit_a_failure_leaves_the_transaction_usable(
    customer: Customer, manual: None, call: str
) -> None:
    def fails(execute: Any, sql: str, *rest: Any) -> Any:
        if call in sql:
            return execute("SELECT 1 / 0", None, *rest[1:])
        return execute(sql, *rest)

    User.objects.create_user("bob")
    work = guard(customer, 25, durable=False)
    if call == "meterly_spend":
        with connection.execute_wrapper(fails), pytest.raises(Exception, match="asked"):
            work.lifecycle.reserve()
    else:
        work.lifecycle.reserve()
        with connection.execute_wrapper(fails):
            work.lifecycle.succeed()
        assert states() == ["commit_pending"]
    assert User.objects.filter(username="bob").exists()


@pytest.mark.parametrize("end", ["succeed", "fail"])
@pytest.mark.parametrize("level", ["READ_COMMITTED", "REPEATABLE_READ"])
def test_f33_a_beat_in_the_way_of_a_decision_does_not_stop_it(
    customer: Customer, end: str, level: str
) -> None:
    from django.db.backends.postgresql.psycopg_any import IsolationLevel

    connection.close()
    before = connection.settings_dict["OPTIONS"]
    isolation = {"isolation_level": IsolationLevel[level]}
    connections.settings["default"]["OPTIONS"] = {**before, **isolation}
    connection.settings_dict["OPTIONS"] = {**before, **isolation}
    try:
        work = guard(customer, 25)
        work.lifecycle.reserve()
        with transaction.atomic():
            journal.beat(work.reservation, fence=0)
            thread = in_a_thread(getattr(work.lifecycle, end))
            wait_for_a_lock()
        thread.join()
    finally:
        connection.close()
        connections.settings["default"]["OPTIONS"] = before
        connection.settings_dict["OPTIONS"] = before
    last = "committed" if end == "succeed" else "released"
    assert movements() == ["reserved", last]
    [row] = Reservation.objects.all()
    assert (row.state, row.lease_until) == (last, None)
    assert_books_balance()


def test_values_are_values_whatever_they_contain(customer: Customer) -> None:
    nasty = "{call} {} {0} %s %% %(x)s ' \" \\ ; -- $1"
    work = guard(nasty, 25, reference=nasty)
    fund(nasty)
    with work:
        pass
    row = Reservation.objects.get()
    assert (row.reference, row.customer.external_id) == (nasty, nasty)
    assert_books_balance()


@pytest.mark.parametrize("on_unavailable", ["allow", "deny"])
def test_a_connection_that_dies_while_reserving_is_replaced(
    customer: Customer, settings: Any, on_unavailable: str
) -> None:
    settings.METERLY = {**settings.METERLY, "UNAVAILABLE_CAP": 100}
    work = guard(customer, 25, on_unavailable=on_unavailable)
    outcomes: list[Any] = []

    def reserve() -> None:
        try:
            work.lifecycle.reserve()
        except MeterlyUnavailableError as exc:
            outcomes.append(type(exc))
        # What comes next in the same request has a connection.
        outcomes.append(User.objects.count())

    with transaction.atomic():
        Account.objects.update(balance=100)
        thread = in_a_thread(reserve)
        wait_for_a_lock()
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid() "
                "AND query LIKE 'WITH%%'"
            )
    thread.join()
    allowed = on_unavailable == "allow"
    assert outcomes == ([1] if allowed else [MeterlyUnavailableError, 1])
    assert states() == (["reserved"] if allowed else [])
    assert balance(customer) == (100, 0)


def test_a_success_stands_whichever_way_the_connection_fails(
    customer: Customer,
) -> None:
    """psycopg2 has an ``InterfaceError`` for a connection that is closed."""
    failed: list[str] = []

    def fails(execute: Any, sql: str, *rest: Any) -> Any:
        if not failed and Reservation._meta.db_table in sql:
            failed.append(sql)
            raise InterfaceError("connection already closed")
        return execute(sql, *rest)

    work = guard(customer, 25)
    work.lifecycle.reserve()
    with connection.execute_wrapper(fails):
        work.lifecycle.succeed()
    assert failed
    assert states() == ["commit_pending"]


def test_the_database_that_a_queryset_names_is_asked(customer: Customer) -> None:
    with pytest.raises(ConnectionDoesNotExist):
        Customer.objects.using("elsewhere").resolve(customer.external_id)


@pytest.mark.parametrize("end", ["succeed", "fail"])
def test_f29_a_connection_that_died_meanwhile_is_no_outage_of_the_ledger(
    customer: Customer, end: str
) -> None:
    work = guard(customer, 25)
    work.lifecycle.reserve()
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        [pid] = cursor.fetchone()

    def terminate() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])

    in_a_thread(terminate).join()
    heard = []

    def hear(**facts: Any) -> None:
        heard.append(facts["error"])

    signals.ledger_unreachable.connect(hear)
    try:
        getattr(work.lifecycle, end)()
    finally:
        signals.ledger_unreachable.disconnect(hear)
    assert states() == ["committed" if end == "succeed" else "released"]
    assert heard == []


# What somebody else has locked for long


@pytest.fixture
def locked() -> Iterator[Any]:
    """What locks rows in a transaction of somebody else's, until the test ends."""
    holds, over = threading.Event(), threading.Event()
    threads = []

    def lock(rows: Any) -> None:
        def hold() -> None:
            with transaction.atomic():
                assert list(rows.select_for_update())
                holds.set()
                over.wait(PATIENCE)
            connection.close()

        threads.append(in_a_thread(hold))
        assert holds.wait(PATIENCE)

    yield lock
    over.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("remotely", [False, True], ids=["joined", "remote"])
@pytest.mark.parametrize("step", ["lapse", "settle", "prune"])
def test_f71_a_locked_row_leaves_the_others(
    customer: Customer,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    locked: Any,
    step: str,
    remotely: bool,
) -> None:
    if remotely:
        request.getfixturevalue("remote")
    # One at a time: a round ends although what is left is more than that.
    monkeypatch.setattr(sweeping, "BATCH", 1)
    for _ in range(4):
        guard(customer, 1).lifecycle.reserve()
    lapse_leases()
    if step != "lapse":
        journal.record_lapsed()
        lapse_leases()
    if step == "prune":
        journal.settle_due(get_client())
        past = timezone.now() - dt.timedelta(days=100)
        Reservation.objects.update(created_at=past, settled_at=past)
    pks = list(Reservation.objects.values_list("pk", flat=True)[:2])
    locked(Reservation.objects.filter(pk__in=pks))
    if step == "lapse":
        assert journal.record_lapsed() == 2
    elif step == "settle":
        assert journal.settle_due(get_client()).settled == 2
    else:
        assert journal.prune() == 2


@pytest.mark.parametrize("step", ["settle", "expire"])
@pytest.mark.parametrize("model", [Account, Hold])
def test_f71_a_locked_account_leaves_the_others(
    customer: Customer,
    monkeypatch: pytest.MonkeyPatch,
    locked: Any,
    step: str,
    model: Any,
) -> None:
    monkeypatch.setattr(db, "LOCK_SECONDS", 0.2)
    others = [fund(f"team_{number}") for number in range(3)]
    for payer in (customer, *others):
        guard(payer, 1).lifecycle.reserve()
    lapse_leases()
    journal.record_lapsed()
    lapse_leases()
    Hold.objects.update(expires_at=from_now(-1))
    mine = {"account__" * (model is Hold) + "customer__public_id": customer.customer_id}
    locked(model.objects.filter(**mine))
    if step == "settle":
        done = journal.settle_due(get_client())
        assert (done.settled, done.outage) == (3, False)
    else:
        assert expiry.expire_due() == 3


def release_due(*payers: Customer) -> None:
    """Have a hold of each payer's wait for its release, due now."""
    for payer in payers:
        guard(payer, 1).lifecycle.reserve()
    lapse_leases()
    journal.record_lapsed()
    lapse_leases()


def account_of(customer: Customer) -> Any:
    return Account.objects.filter(customer__public_id=customer.customer_id)


def test_f71_many_rows_of_a_locked_account_are_no_outage(
    customer: Customer, monkeypatch: pytest.MonkeyPatch, locked: Any
) -> None:
    monkeypatch.setattr(db, "LOCK_SECONDS", 0.1)
    others = [fund(f"team_{number}") for number in range(3)]
    # In whatever order, OUTAGE_AFTER of them come in a row.
    count = 3 * journal.OUTAGE_AFTER
    release_due(*[customer] * count, *others)
    locked(account_of(customer))
    done = journal.settle_due(get_client())
    assert (done.settled, done.outage) == (3, False)
    left = Reservation.objects.filter(customer=customer)
    # As they were: the next round has them.
    assert set(left.values_list("settle_attempts", "last_error")) == {(0, "")}
    assert left.due().count() == count


@contextmanager
def changing_meanwhile(rows: Any, **fields: Any) -> Iterator[None]:
    """Have somebody else change *rows* once a transaction of ours has begun to write.

    All transactions are at REPEATABLE READ: ours will have to give way.
    """

    def change(execute: Any, sql: str, *rest: Any) -> Any:
        result = execute(sql, *rest)
        if sql.startswith("UPDATE") and connection.in_atomic_block:
            in_a_thread(lambda: rows.update(**fields)).join()
        return result

    name = connection.ops.quote_name(connection.settings_dict["NAME"])
    setting = f"ALTER DATABASE {name} %s default_transaction_isolation"
    with connection.cursor() as cursor:
        cursor.execute(setting % "SET" + " = 'repeatable read'")
    connection.close()
    try:
        with connection.execute_wrapper(change):
            yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute(setting % "RESET")
        connection.close()


def test_f69_rows_of_a_busy_account_are_no_outage(customer: Customer) -> None:
    release_due(*[customer] * (2 * journal.OUTAGE_AFTER))
    with changing_meanwhile(account_of(customer), balance=100):
        done = journal.settle_due(get_client())
    assert (done.settled, done.outage) == (0, False)
    assert Reservation.objects.due().count() == 2 * journal.OUTAGE_AFTER
    assert journal.settle_due(get_client()).settled == 2 * journal.OUTAGE_AFTER
    assert_books_balance()


def test_f71_a_row_locked_once_its_batch_was_chosen_leaves_the_others(
    customer: Customer,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    locked: Any,
) -> None:
    request.getfixturevalue("remote")
    monkeypatch.setattr(db, "LOCK_SECONDS", 0.2)
    release_due(*[customer] * 4)

    def lock_the_next(number: int) -> None:
        if number == 1:
            pks = list(Reservation.objects.due().values_list("pk", flat=True)[:1])
            locked(Reservation.objects.filter(pk__in=pks))

    done = journal.settle_due(get_client(), on_row=lock_the_next)
    assert (done.settled, done.outage) == (3, False)


@pytest.mark.parametrize(
    ("ledger", "what"),
    [
        ("joined", "account"),
        ("joined", "grant"),
        ("joined", "chosen grant"),
        ("remote", "grant"),
        ("remote", "chosen grant"),
    ],
)
def test_f71_what_is_locked_of_some_grants_leaves_the_others(
    customer: Customer,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    locked: Any,
    ledger: str,
    what: str,
) -> None:
    request.getfixturevalue(ledger)
    monkeypatch.setattr(db, "LOCK_SECONDS", 0.2)
    # In whatever order, OUTAGE_AFTER of them come in a row.
    count = 2 * journal.OUTAGE_AFTER + 1
    payers = [*[customer] * count, *(fund(f"team_{number}") for number in range(2))]
    rows = [
        grants.grant(None, payer, 5, "image_credits", reason="r", reference=f"{number}")
        for number, payer in enumerate(payers)
    ]
    mine = Grant.objects.filter(pk__in=[row.pk for row, _ in rows[:count]])
    if what == "account":
        locked(account_of(customer))
    elif what == "grant":
        locked(mine)
    else:
        unlocked = grants.unlocked

        def choose_all(rows: Any) -> Any:
            monkeypatch.setattr(grants, "unlocked", unlocked)
            locked(mine)
            return rows

        monkeypatch.setattr(grants, "unlocked", choose_all)
    asked = grants.settle_due(get_client())
    assert asked == (2 if what == "grant" else 2 + count)
    assert Grant.objects.filter(state="granted").count() == 2
    assert set(mine.values_list("state", flat=True)) == {"pending"}


@pytest.mark.parametrize(
    ("own", "bounded"), [("0", "5s"), ("1min", "5s"), ("5s", "5s"), ("20ms", "20ms")]
)
def test_f71_the_limit_is_of_our_own_transactions_and_lengthens_none(
    customer: Customer, own: str, bounded: str
) -> None:
    def limit() -> str:
        with connection.cursor() as cursor:
            cursor.execute("SHOW lock_timeout")
            return str(cursor.fetchone()[0])

    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = '{own}'")
    with transaction.atomic():
        db.bound_waits("default")
        assert limit() == bounded
    assert limit() == own
    release_due(customer)
    with transaction.atomic():
        # The limit would last as long as the caller's transaction.
        assert journal.settle_due(get_client()).settled == 1
        journal.retry_stuck(Reservation.objects.all())
        grants.settle_due(get_client())
        expiry.expire_due()
        assert limit() == own
    connection.close()
