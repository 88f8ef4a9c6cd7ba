"""On PostgreSQL, a movement and the journal's row in one statement."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.auth.models import User
from django.db import OperationalError, connection, connections, transaction
from django.test.utils import CaptureQueriesContext

from django_meterly import MeterlyInsufficientCreditsError, get_client, guard, journal
from django_meterly.db import from_now
from django_meterly.ledger import postgresql
from django_meterly.ledger.models import Account, Hold
from django_meterly.models import Reservation
from tests.books import balance, fund, let_lapse, movements, states, verify

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django_meterly.models import Customer

# Where the database is another, conftest.py leaves this file out.
pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("joined"),
]


@pytest.fixture
def customer() -> Customer:
    return fund(User.objects.create_user("alice"))


@pytest.fixture
def prepared() -> Iterator[None]:
    """Let the server bind the parameters, and know the statements."""
    connection.close()
    before = connection.settings_dict["OPTIONS"]
    connection.settings_dict["OPTIONS"] = {**before, "server_side_binding": True}
    yield
    connection.close()
    connection.settings_dict["OPTIONS"] = before


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
            work.reserve()
        assert log[0]["sql"].startswith("WITH") == enabled
        rows.append(row_of(work))
        lasts = rows[-1].pop("lease_until") - rows[-1].pop("created_at")
        assert 119 < lasts.total_seconds() < 121
        if charge is not None:
            work.settle(charge)
        with CaptureQueriesContext(connection) as log:
            getattr(work, end)()
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
    verify()


def expire() -> None:
    Hold.objects.update(expires_at=from_now(-1))


def test_a_refusal_writes_its_row_afterwards(customer: Customer) -> None:
    with pytest.raises(MeterlyInsufficientCreditsError):
        guard(customer, 101).reserve()
    assert states() == ["denied"]
    assert movements() == []


def test_holds_past_their_time_make_room_for_a_new_one(customer: Customer) -> None:
    guard(customer, 100).reserve()
    expire()
    work = guard(customer, 30)
    work.reserve()
    assert balance(customer) == (100, 30)
    assert row_of(work)["state"] == "reserved"
    verify()


@pytest.mark.parametrize("charge", [25, 40])
def test_a_hold_that_is_gone_is_debited(customer: Customer, charge: int) -> None:
    work = guard(customer, 25)
    work.reserve()
    work.settle(charge)
    expire()
    work.succeed()
    assert states() == ["committed"]
    assert movements() == ["reserved", "expired", "used"]
    assert balance(customer) == (100 - charge, 0)
    verify()


@pytest.mark.parametrize("end", ["succeed", "fail"])
def test_a_decision_whose_answer_is_lost_is_made_once(
    customer: Customer, end: str
) -> None:
    work = guard(customer, 25)
    work.reserve()
    lost = []

    def lose(execute: Any, sql: str, *rest: Any) -> Any:
        result = execute(sql, *rest)
        if sql.startswith("WITH") and not lost:
            lost.append(sql)
            raise OperationalError("gone")
        return result

    with connection.execute_wrapper(lose):
        getattr(work, end)()
    assert lost
    last = "committed" if end == "succeed" else "released"
    assert states() == [last]
    assert movements() == ["reserved", last]
    verify()


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
        work.reserve()
    assert work.reservation is not None
    assert work.reservation.reservation_id is None
    assert states() == ["reserved", "reserved"]
    work.succeed()
    let_lapse()
    journal.sweep(get_client())
    assert sorted(states()) == ["committed", "released"]
    assert balance(customer) == (75, 0)
    verify()


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
    for _ in range(500):
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) "
                "WHERE NOT l.granted AND a.datname = current_database()"
            )
            if cursor.fetchone()[0]:
                return
        threading.Event().wait(0.02)
    raise AssertionError("Nobody waits.")


@pytest.mark.parametrize("fenced", [False, True])
def test_f33_a_decision_that_waited_for_another_moves_nothing_under_it(
    customer: Customer, fenced: bool
) -> None:
    work = guard(customer, 25)
    work.reserve()
    let_lapse()
    with transaction.atomic():
        if fenced:
            # Somebody takes the work up.
            Reservation.objects.update(fence=2)
        else:
            journal.record_lapsed()
        thread = in_a_thread(work.succeed)
        wait_for_a_lock()
    thread.join()
    # The sweeper's decision is not the last word about work that was done; somebody
    # else's fence is.
    assert states() == (["reserved"] if fenced else ["committed"])
    assert movements().count("committed") + movements().count("used") == (not fenced)
    verify()


def test_two_that_decide_at_once_are_charged_once(customer: Customer) -> None:
    work, copy = guard(customer, 25), guard(customer, 25)
    work.reserve()
    assert work.reservation is not None
    copy.adopt(Reservation.objects.get())
    with transaction.atomic():
        # Both wait for the account.
        Account.objects.update(balance=100)
        threads = [in_a_thread(work.succeed), in_a_thread(copy.fail)]
        wait_for_a_lock()
    for thread in threads:
        thread.join()
    # Whoever was first: work that was done is paid for, by a debit if need be.
    assert states() == ["committed"]
    assert movements()[1:] in (["committed"], ["released", "used"])
    assert balance(customer) == (75, 0)
    verify()


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
            guard(customer, 25, durable=False).reserve()
        assert states() == []
        with guard(customer, 25, durable=False):
            pass
    assert states() == ["committed"]
    verify()
